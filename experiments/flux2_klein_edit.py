"""FLUX.2-klein-base-9B as an editor, with UnifiedReward-Edit as the judge: `flux2_klein_flex.py` for editing.

Every prompt names the picture to edit, ``{"text": "make the circle green", "reference": {"source": "PATH"}}``; editor and
judge see it in the sample's size. The judge, `make serve-judge PRESET=edit`, runs elsewhere; its verdicts have no
dimensions, so `advantage.alpha` weighs nothing. No settings are published for this: they are the text-to-image recipe's, and
nobody has run it yet. The starter prompts and pictures only show the format. FLUX.1-Kontext is ``FluxKontext(model=…)`` here.
"""

from dataclasses import replace

from experiments import flux2_klein_flex
from grpo_flex.config import RunConfig
from grpo_flex.generators.flux2 import Flux2KleinEdit
from grpo_flex.generators.memory import Memory
from reward_server.families.edit import EditPair


def config() -> RunConfig:
    base = flux2_klein_flex.config()
    assert base.judge is not None
    return replace(
        base,
        name="flux2_klein_edit",
        generator=Flux2KleinEdit(
            model="black-forest-labs/FLUX.2-klein-base-9B", height=720, width=720, guidance=4.0, shift=3.0,
            dtype="bfloat16", memory=Memory(checkpoint_every=1),
        ),
        prompts=replace(
            base.prompts,
            train="experiments/prompts/starter_edit_train.jsonl",
            heldout="experiments/prompts/starter_edit_heldout.jsonl",
            per_step=8,
        ),
        judge=replace(base.judge, family=EditPair()),
    )  # fmt: skip
