"""FLUX.2-klein-base-4B on a single GPU of 24 GB: one process samples and learns in turn, with one copy.

The published settings for klein, but for the smaller model and fewer prompts a step, to save time. It fits because three
siblings go through the model at once, activations are recomputed, the text encoder runs once per prompt and leaves, and the
autoencoder sleeps on the CPU; the judge runs elsewhere. Nobody has run this recipe yet.
"""

from experiments import flux2_klein_flex
from grpo_flex.config import RunConfig
from grpo_flex.overrides import override


def config() -> RunConfig:
    changes = (
        "name=one_gpu_24gb",
        "generator.model=black-forest-labs/FLUX.2-klein-base-4B",
        "generator.memory.encodings=encodings",
        "generator.memory.vae_slicing=true",
        "generator.memory.offload=true",
        "prompts.per_step=8",
        "sampling.micro_batch=3",
        "placement.colocated=true",
    )
    return override(flux2_klein_flex.config(), changes)
