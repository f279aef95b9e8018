"""FLUX.2-klein-base-4B on a single GPU of 24 GB: one process samples and learns in turn, with one copy.

The text encoder runs once per prompt and leaves, the autoencoder sleeps on the CPU; the judge runs elsewhere. Smaller
pictures, groups and adapter than the published settings, so that it fits. Nobody has run this recipe yet.
"""

from experiments import flux2_klein_flex
from grpo_flex.config import RunConfig
from grpo_flex.overrides import override


def config() -> RunConfig:
    changes = (
        "name=one_gpu_24gb",
        "generator.model=black-forest-labs/FLUX.2-klein-base-4B",
        "generator.height=512",
        "generator.width=512",
        "generator.memory.encodings=encodings",
        "generator.memory.vae_slicing=true",
        "generator.memory.offload=true",
        "prompts.per_step=8",
        "sampling.group_size=6",
        "adapter.rank=32",
        "adapter.alpha=64",
        "placement.colocated=true",
    )
    return override(flux2_klein_flex.config(), changes)
