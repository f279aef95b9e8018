"""`flux1_dev_flex.py` with all weights of the transformer trained, as published, instead of an adapter.

Learning rate 3e-6 as published; number of prompts and placement are our own choice, and nobody has run this recipe yet.
Eight learners share float32 weights, gradients and AdamW's moments (FSDP2), eight rollout workers sample; the judge runs
elsewhere. New weights go to the workers by a collective broadcast.
"""

from dataclasses import replace

from experiments import flux1_dev_flex
from grpo_flex.config import Full, RunConfig
from grpo_flex.overrides import override


def config() -> RunConfig:
    changes = (
        "name=flux1_dev_flex_full",
        "optimizer.lr=3e-6",
        "placement.learners=8",
        "placement.shard_base=true",
        "placement.broadcast=true",
        "placement.rollout_workers=8",
    )
    return replace(override(flux1_dev_flex.config(), changes), adapter=Full(state_each_step=False))
