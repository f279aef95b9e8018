"""A tiny Wan learns to obey its prompts from the oracle's pairwise verdicts on eight frames of each clip.

The path and the settings are those of `shapes_image_oracle.py`, with half its pull to the base. There is no classifier-free
guidance: it would double the cost of every step, and DiffusionNFT does without.
"""

from dataclasses import replace

from experiments import shapes_image_oracle
from grpo_flex.config import Judge, Prompts, RunConfig
from grpo_flex.generators.wan import Wan
from grpo_flex.objectives.nft import Nft
from grpo_flex.pairing import RoundRobin
from reward_server.families.flex import Flex
from testbed.oracle_judge import OracleJudge
from testbed.video_oracle import VideoOracle


def config() -> RunConfig:
    base = shapes_image_oracle.config()
    return replace(
        base,
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
        judge=Judge(family=Flex(medium="video"), server=OracleJudge(), pairs=RoundRobin()),
        objective=Nft(kl_beta=0.03),
        evaluation=replace(base.evaluation, scorer=VideoOracle(), samples_per_prompt=1),
    )
