"""FLUX.1-dev with UnifiedReward-Flex as the judge: the settings of Pref-GRPO and UnifiedReward-Flex, with LoRA.

One learner and seven rollout workers on eight GPUs; the judge runs elsewhere. The starter prompts only show the
format: give your own with prompts.train=… and prompts.heldout=…. A plan for eight GPUs of 80 GB says that the learner
has to recompute its activations. Nobody has run this recipe at full size yet.
"""

from grpo_flex.advantages import GroupRelative
from grpo_flex.config import Adapter, Checkpoint, Evaluation, Judge, Optimizer, Placement, Prompts, RunConfig, Sampling
from grpo_flex.dynamics import FlowSde, RandomFraction
from grpo_flex.generators.flux import Flux
from grpo_flex.generators.memory import Memory
from grpo_flex.objectives.guard import Guard
from grpo_flex.rewards import WinRate
from reward_server.families.flex import Flex


def config() -> RunConfig:
    return RunConfig(
        name="flux1_dev_flex",
        steps=300,
        generator=Flux(
            model="black-forest-labs/FLUX.1-dev",
            height=720,
            width=720,
            guidance=3.5,
            shift=3.0,
            dtype="bfloat16",
            memory=Memory(checkpoint_every=1),
        ),
        prompts=Prompts(
            train="experiments/prompts/starter_train.jsonl",
            heldout="experiments/prompts/starter_heldout.jsonl",
            per_step=32,
        ),
        sampling=Sampling(
            group_size=9, steps=15, eval_steps=30, dynamics=FlowSde(a=0.7), window=RandomFraction(fraction=0.6)
        ),
        judge=Judge(family=Flex(), endpoints=("http://127.0.0.1:8000/v1",), concurrency=128),
        reward=WinRate(),
        advantage=GroupRelative(alpha=0.7),
        objective=Guard(clip=1e-4),
        adapter=Adapter(rank=64, alpha=128),
        optimizer=Optimizer(lr=1e-4, updates_per_rollout=3),
        evaluation=Evaluation(every=20),
        checkpoint=Checkpoint(every=5),
        placement=Placement(rollout_workers=7, rollout_gpus=1, learner_gpus=1),
    )
