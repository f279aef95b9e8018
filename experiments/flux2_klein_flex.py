"""FLUX.2-klein-base-9B with UnifiedReward-Flex as the judge: `flux1_dev_flex.py` with the published settings for klein.

The base model, because the distilled one takes no guidance. Nobody has run this recipe yet.
"""

from dataclasses import replace

from experiments import flux1_dev_flex
from grpo_flex.config import RunConfig
from grpo_flex.generators.flux2 import Flux2Klein
from grpo_flex.generators.memory import Memory


def config() -> RunConfig:
    base = flux1_dev_flex.config()
    return replace(
        base,
        name="flux2_klein_flex",
        generator=Flux2Klein(
            model="black-forest-labs/FLUX.2-klein-base-9B", height=720, width=720, guidance=4.0, shift=3.0,
            dtype="bfloat16", memory=Memory(checkpoint_every=1),
        ),
        sampling=replace(base.sampling, steps=25),
        optimizer=replace(base.optimizer, lr=5e-5),
        # By the plan an update takes 0.7 h at 400 TFLOP/s and 1.5 h at 180.
        placement=replace(base.placement, update_timeout_s=4 * 3600.0),
    )  # fmt: skip
