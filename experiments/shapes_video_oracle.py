"""A tiny Wan learns to obey its prompts from the oracle's pairwise verdicts on eight frames of each clip.

The path is that of `shapes_image_oracle.py`, with the objective and the optimiser's settings from there and half its pull to
the base. There is no classifier-free guidance: it would double the cost of every step, and DiffusionNFT does without.
"""

from grpo_flex.advantages import GroupRelative
from grpo_flex.config import Adapter, Checkpoint, Evaluation, Judge, Optimizer, Placement, Prompts, RunConfig, Sampling
from grpo_flex.dynamics import AllButLast, Ode
from grpo_flex.generators.wan import Wan
from grpo_flex.objectives.nft import Nft
from grpo_flex.pairing import RoundRobin
from grpo_flex.rewards import WinRate
from reward_server.families.flex import Flex
from testbed.oracle_judge import OracleJudge
from testbed.video_oracle import VideoOracle


def config() -> RunConfig:
    return RunConfig(
        name="shapes_video_oracle",
        steps=60,
        generator=Wan(
            model="testbed/tiny_wan",
            height=48,
            width=48,
            frames=9,
            fps=8,
            guidance=1.0,
            shift=3.0,
            max_sequence_length=20,
        ),
        prompts=Prompts(
            train="testbed/prompts/shapes_video_train.jsonl",
            heldout="testbed/prompts/shapes_video_heldout.jsonl",
            per_step=8,
        ),
        sampling=Sampling(
            group_size=16,
            steps=10,
            eval_steps=10,
            dynamics=Ode(),
            window=AllButLast(),
            same_noise=False,
            lookahead=1,
        ),
        judge=Judge(family=Flex(medium="video"), server=OracleJudge(), pairs=RoundRobin()),
        reward=WinRate(weights=(1.0, 0.5, 0.1)),
        advantage=GroupRelative(alpha=0.7, scale="batch"),
        objective=Nft(kl_beta=0.03),
        adapter=Adapter(rank=16, alpha=32),
        optimizer=Optimizer(lr=1e-3, lr_end=0.1, updates_per_rollout=2, ema=0.9),
        evaluation=Evaluation(every=10, scorer=VideoOracle()),
        placement=Placement(learner_threads=1),
        checkpoint=Checkpoint(every=10),
    )
