"""Wan2.1-T2V-14B with UnifiedReward-Flex as the judge: the settings of UnifiedReward-Flex's video experiment, with LoRA.

One learner and seven rollout workers on eight GPUs; the judge runs elsewhere. Published are 2 steps of gradient
accumulation, which do not say how many updates a rollout feeds: the two updates here are our own choice, as are the prompts a
step, the pairs that are asked and the placement; β is published without the KL's form, and we take that of Flow-GRPO's code,
which leaves out the paper's Δ. Nobody has run this recipe yet. Held-out clips are evaluated at 480×832, as
published, six at a time (``micro_batch``), which is what 80 GiB hold. The starter prompts only show the format: give your own with prompts.train=… and prompts.heldout=….
"""

from grpo_flex.advantages import GroupRelative
from grpo_flex.config import Adapter, Checkpoint, Evaluation, Judge, Optimizer, Placement, Prompts, RunConfig, Sampling
from grpo_flex.dynamics import FlowSde, RandomFraction
from grpo_flex.generators.memory import Memory
from grpo_flex.generators.wan import Wan
from grpo_flex.objectives.guard import Guard
from grpo_flex.rewards import WinRate
from reward_server.families.flex import Flex


def config() -> RunConfig:
    return RunConfig(
        name="wan21_14b_flex",
        steps=300,
        generator=Wan(
            model="Wan-AI/Wan2.1-T2V-14B-Diffusers",
            height=240,
            width=416,
            frames=33,
            guidance=5.0,
            shift=3.0,
            dtype="bfloat16",
            memory=Memory(checkpoint_every=1, vae_slicing=True),
        ),
        prompts=Prompts(
            train="experiments/prompts/starter_video_train.jsonl",
            heldout="experiments/prompts/starter_video_heldout.jsonl",
            per_step=32,
        ),
        sampling=Sampling(
            group_size=6,
            micro_batch=6,
            steps=20,
            eval_steps=30,
            dynamics=FlowSde(a=0.7),
            window=RandomFraction(fraction=0.8),
        ),
        judge=Judge(
            family=Flex(medium="video"),
            endpoints=("http://127.0.0.1:8000/v1",),
            concurrency=128,
        ),
        reward=WinRate(),
        advantage=GroupRelative(alpha=0.7),
        objective=Guard(clip=1e-4, kl_beta=0.004, kl_form="flow_grpo"),
        adapter=Adapter(rank=64, alpha=128),
        optimizer=Optimizer(lr=3e-5, updates_per_rollout=2),
        evaluation=Evaluation(every=20, height=480, width=832),
        checkpoint=Checkpoint(every=5),
        # By the plan an update takes 1.7 h at 400 TFLOP/s and 3.7 h at 180.
        placement=Placement(rollout_workers=7, rollout_gpus=1, learner_gpus=1, update_timeout_s=8 * 3600.0),
    )
