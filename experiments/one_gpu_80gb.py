"""`flux1_dev_flex.py` on a single GPU of 80 GB: one process samples and learns in turn, with one copy of the model.

The text encoders run once per prompt and leave; the judge runs elsewhere. Fewer prompts a step than published, to save
time, and otherwise the same settings. Nobody has run this recipe yet.
"""

from experiments import flux1_dev_flex
from grpo_flex.config import RunConfig
from grpo_flex.overrides import override


def config() -> RunConfig:
    changes = (
        "name=one_gpu_80gb",
        "generator.memory.encodings=encodings",
        "generator.memory.vae_slicing=true",
        "prompts.per_step=8",
        "placement.colocated=true",
    )
    return override(flux1_dev_flex.config(), changes)
