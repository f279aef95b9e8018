"""`shapes_image.py` with scores of single pictures, by the same judge, in place of comparisons."""

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
