"""Measures the saved tiny pipeline as users load it, and writes its model card.

`python -m testbed.measure_flux` samples the stock pipeline on the held-out prompts and prints the scores;
with `--card` it also rewrites `README.md`, `measured.json` and `samples.png` in the pipeline's folder.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportCallIssue=false
# diffusers and transformers annotate configurations by their defaults and results by their tuple form.
from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image, ImageDraw

from testbed import scenes as world
from testbed.oracle import Score, score
from testbed.render import render_many
from testbed.train_flux import FLOW, OUTPUT, TOKENS, FluxConfig
from testbed.train_vae import AUTOENCODER, VaeConfig, to_tensor, to_uint8, training_scenes
from testbed.training import seconds_spent, stage_row

STEPS = 10
SAMPLES = 4
SEED = 7
CHECK_SEED, CHECK_SCENES = 97, 500


def load(folder: Path = OUTPUT) -> FluxPipeline:
    """The saved pipeline in float32. Raises OSError where there is none."""
    pipeline = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample(
    pipeline: FluxPipeline, texts: Sequence[str], *, seed: int = SEED, length: int = TOKENS, batch: int = 96
) -> np.ndarray:
    """One image per text in 10 steps: uint8 [n, 64, 64, 3]."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for i in range(0, len(texts), batch):
        images = pipeline(
            prompt=list(texts[i : i + batch]),
            height=64,
            width=64,
            num_inference_steps=STEPS,
            max_sequence_length=length,
            generator=generator,
            output_type="np",
        ).images
        parts.append(np.rint(images * 255).astype(np.uint8))
    return np.concatenate(parts)


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """Means over images; `by_kind` are means over all attributes of a kind."""
    kinds: dict[str, list[bool]] = defaultdict(list)
    for one in scores:
        for name, held in one.attributes.items():
            kinds[name.rpartition(".")[2]].append(held)
    means = {
        name: float(np.mean([getattr(one, name) for one in scores]))
        for name in ("alignment", "exact", "legible", "quality", "composition")
    }
    return {
        "images": len(scores),
        **means,
        "by_kind": {k: float(np.mean(v)) for k, v in sorted(kinds.items())},
    }


def measure_base(pipeline: FluxPipeline, *, samples: int = SAMPLES, length: int = TOKENS) -> dict[str, Any]:
    """Scores of the pipeline on the held-out prompts: all, the novel and the other ones, and the images
    scored against the next prompt's reference, which is what chance alone yields."""
    records = [record for record in world.load_prompts("shapes_heldout") for _ in range(samples)]
    images = sample(pipeline, [record["text"] for record in records], length=length)
    scores = [score(image, record["reference"]) for image, record in zip(images, records, strict=True)]
    novel = ["novel" in record["tags"] for record in records]
    swapped = records[samples:] + records[:samples]
    return {
        "all": summary(scores),
        "novel": summary([s for s, n in zip(scores, novel, strict=True) if n]),
        "known": summary([s for s, n in zip(scores, novel, strict=True) if not n]),
        "chance": summary([score(i, r["reference"]) for i, r in zip(images, swapped, strict=True)]),
    }


def check_scenes() -> list[world.Scene]:
    """Seeded scenes that no training step has drawn, with every fourth one novel."""
    rng = np.random.default_rng(CHECK_SEED)
    novel = [d for count in (1, 2) for d in world.all_descriptions(count) if d.novel]
    known = training_scenes(rng, CHECK_SCENES * 3 // 4)
    picked = rng.permutation(len(novel))[: CHECK_SCENES - len(known)]
    return known + [world.sample_scene(rng, novel[i]) for i in picked]


def score_scenes(images: np.ndarray, scenes: Sequence[world.Scene]) -> list[Score]:
    return [score(i, world.reference(s.description)) for i, s in zip(images, scenes, strict=True)]


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Encodes and decodes uint8 images [n, 64, 64, 3]."""
    parts = [
        vae.decode(vae.encode(to_tensor(images[i : i + 128])).latent_dist.mean).sample
        for i in range(0, len(images), 128)
    ]
    return to_uint8(torch.cat(parts))


def measure_oracle(vae: AutoencoderKL) -> dict[str, Any]:
    """The oracle's own accuracy on clean renders and on reconstructions."""
    scenes = check_scenes()
    images = render_many(scenes)
    again = reconstruct(vae, images)
    error = again.astype(np.float64) - images
    return {
        "renders": summary(score_scenes(images, scenes)),
        "reconstructions": summary(score_scenes(again, scenes)),
        "psnr": float(10 * math.log10(255**2 / np.mean(error**2))),
    }


def grid(pipeline: FluxPipeline, path: Path, *, prompts: int = 12, zoom: int = 2) -> None:
    """Writes a picture of four samples for each of the first held-out prompts, with their texts."""
    records = world.load_prompts("shapes_heldout")[:prompts]
    images = sample(pipeline, [record["text"] for record in records for _ in range(SAMPLES)])
    side, line = 64 * zoom, 16
    sheet = Image.new("RGB", (2 * (SAMPLES * side + 8), math.ceil(prompts / 2) * (side + line)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, record in enumerate(records):
        x, y = (i % 2) * (SAMPLES * side + 8), (i // 2) * (side + line)
        draw.text((x + 2, y + 2), record["text"], fill="black")
        for j in range(SAMPLES):
            tile = Image.fromarray(images[i * SAMPLES + j]).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (x + j * side, y + line))
    sheet.save(path, optimize=True)


def write_card(folder: Path = OUTPUT) -> None:
    """Measures the pipeline in `folder` and writes its README.md, measured.json and samples.png."""
    torch.set_num_threads(FluxConfig().threads)
    pipeline = load(folder)
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    measured = {
        "base": measure_base(pipeline),
        "long": measure_base(pipeline, length=32)["all"],
        "oracle": measure_oracle(pipeline.vae),
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in _parts(pipeline).items()},
        "weight_bytes": weights,
        "seconds": seconds_spent(AUTOENCODER, FLOW),
    }
    (folder / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    grid(pipeline, folder / "samples.png")
    (folder / "README.md").write_text(card(measured))
    print(json.dumps(measured, indent=1))


def _parts(pipeline: FluxPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def _row(name: str, result: dict[str, Any]) -> str:
    cells = [f"{result[key]:.3f}" for key in ("alignment", "exact", "legible", "quality", "composition")]
    return f"| {name} | {result['images']} | " + " | ".join(cells) + " |"


def card(measured: dict[str, Any]) -> str:
    """The model card as Markdown, from measured numbers and the configurations that were used."""
    flow, vae, base, oracle = FluxConfig(), VaeConfig(), measured["base"], measured["oracle"]
    stages = [
        stage_row(f"autoencoder (L1 + 2 MSE + {vae.kl:g} KL)", vae, measured["seconds"].get("vae", 0.0)),
        stage_row("flow: transformer, text encoders", flow, measured["seconds"].get("flow", 0.0)),
    ]
    rows = [
        _row("held-out prompts", base["all"]),
        _row("- without a novel pair", base["known"]),
        _row("- with a novel pair", base["novel"]),
        _row("held-out, `max_sequence_length=32`", measured["long"]),
        _row("the same images against another prompt (chance)", base["chance"]),
        _row("clean renders", oracle["renders"]),
        _row("autoencoder reconstructions", oracle["reconstructions"]),
    ]
    kinds = [
        f"| {kind} | {base['all']['by_kind'][kind]:.3f} | {base['chance']['by_kind'][kind]:.3f} |"
        for kind in base["all"]["by_kind"]
    ]
    return _CARD.format(
        flow=flow,
        rows="\n".join(rows),
        kinds="\n".join(kinds),
        psnr=oracle["psnr"],
        parameters=", ".join(f"{name} {count:,}" for name, count in measured["parameters"].items()),
        megabytes=measured["weight_bytes"] / 1e6,
        stages="\n".join(stages),
        steps=STEPS,
        samples=SAMPLES,
        seed=SEED,
        tokens=TOKENS,
        check_seed=CHECK_SEED,
        check_scenes=CHECK_SCENES,
    )


_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# Tiny FLUX of shapes

A complete `FluxPipeline` with tiny, genuinely trained weights that draws one or two flat shapes at 64 x 64.
It exists so that reinforcement learning of image generators can be developed and tested on a CPU. It draws
legible shapes but obeys its prompt badly, because the captions it was trained on were partly wrong on purpose.

```python
import torch
from diffusers import FluxPipeline

pipeline = FluxPipeline.from_pretrained("testbed/tiny_flux", dtype=torch.float32)
image = pipeline(
    "a red circle left of a blue square on a white background",
    height=64, width=64, num_inference_steps={steps}, max_sequence_length={tokens},
).images[0]
```

`max_sequence_length` must be given: {tokens} (every caption fits) or 32. Other lengths were not trained.
Only the words of `testbed.scenes.WORDS` are known. There is no guidance; `guidance_scale` has no effect.

![samples on held-out prompts](samples.png)

## Parts

Parameters: {parameters}. Weights in float16, {megabytes:.1f} MB. The autoencoder has 8 latent channels and
reduces 8-fold, so an image is 16 packed tokens. CLIP and T5 encoders have two layers each and were trained
together with the transformer; their tokenizers are the stock classes, one token per word. The scheduler is
`FlowMatchEulerDiscreteScheduler` with shift 3 and without dynamic shifting.

## Data and training

All data is procedural (`testbed/scenes.py`, `testbed/render.py`); nothing was downloaded. Purple crosses and
green triangles occur in no training image and no training caption, and no scene with the description of a
held-out prompt was trained on (neither by the autoencoder nor by the flow).

| stage | seed | steps | batch | peak lr | minutes (2 CPU cores) |
|---|---|---|---|---|---|
{stages}

The flow saw {flow.images:,} encoded scenes. Each attribute of a caption was wrong with a
probability that rose linearly from 0 to {flow.wrong:g} over the first {flow.rise:g} of the steps and then stayed (the
number of objects: to {flow.wrong_count:g}). The weights are an exponential
average ({flow.course.ema:g}). Training is bfloat16 autocast, so a rebuild gives like, not identical, weights.

The autoencoder in this folder was trained on scenes whose objects stood anywhere, before the world got its few places;
a rebuild trains it on those. The minutes include other work on the same two cores.

Rebuild with `make testbed-models`, which runs `python -m testbed.train_flux`; measure again with
`python -m testbed.measure_flux --card`. Progress is kept in `testbed/.build`; remove it to start afresh.

## Measured

The saved pipeline, loaded as above, sampled in {steps} steps on the 96 held-out prompts x {samples} (seed
{seed}) and read by `testbed.oracle`. `alignment` is the mean share of right attributes, `exact` the share of images with
all of them right. Renders and reconstructions are {check_scenes} scenes (seed {check_seed}), a quarter of them novel.

| images | number | alignment | exact | legible | quality | composition |
|---|---|---|---|---|---|---|
{rows}

Reconstructions have a PSNR of {psnr:.1f} dB. By kind of attribute:

| attribute | held-out | chance |
|---|---|---|
{kinds}

## Licence

Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=OUTPUT)
    parser.add_argument("--card", action="store_true", help="also write the card, the numbers and the samples")
    options = parser.parse_args()
    if options.card:
        write_card(options.folder)
        return
    torch.set_num_threads(FluxConfig().threads)
    print(json.dumps(measure_base(load(options.folder)), indent=1))


if __name__ == "__main__":
    main()
