"""`shapes_image.py` with scores of single pictures, by the same judge, in place of comparisons.

What else differs follows from that. The reward is the mean of the three scores, with the weights that the comparison gives
its dimensions, because there are no pairs to fit strengths to; a group takes one question a sibling, 8, instead of one for
half of the pairs, 14; and there is no overall verdict beside the dimensions, so `advantage.alpha` weighs nothing.
"""

from dataclasses import replace

from experiments import shapes_image
from grpo_flex.config import RunConfig
from grpo_flex.rewards import Pointwise
from reward_server.families.unified import Unified2Point


def config() -> RunConfig:
    base = shapes_image.config()
    assert base.judge is not None
    return replace(
        base,
        name="shapes_image_pointwise",
        judge=replace(base.judge, family=Unified2Point(prompt_file="testbed/tiny_judge/prompt_point.txt")),
        reward=Pointwise(criteria=("alignment", "coherence", "style"), weights=(1.0, 0.5, 0.1)),
    )
