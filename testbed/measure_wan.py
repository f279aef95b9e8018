"""Measures the saved tiny video pipeline as users load it, and writes its model card.

`python -m testbed.measure_wan` samples the stock pipeline on the held-out prompts and prints the scores; with
`--card` it also rewrites `README.md`, `measured.json` and `samples.png` in the pipeline's folder. With `--readme` it only
rewrites `README.md`, from the numbers that are there.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportCallIssue=false
# diffusers and transformers annotate configurations by their defaults and results by their tuple form.
from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from PIL import Image, ImageDraw

from testbed.clips import FRAMES, SIDE, render_clips
from testbed.scenes import load_prompts
from testbed.train_wan import FLOW, OUTPUT, TOKENS, WanConfig
from testbed.train_wan_vae import AUTOENCODER, SHARPENED, WanVaeConfig, reconstruct
from testbed.training import seconds_spent, stage_row
from testbed.video_oracle import CHECK_CLIPS, CHECK_SEED, check_clips, score, score_clips, summary

STEPS = 10
SAMPLES = 2
SEED = 7
GUIDANCE = (1.0, 3.0)


def load(folder: Path = OUTPUT) -> WanPipeline:
    """The saved pipeline in float32. Raises OSError where there is none."""
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample(
    pipeline: WanPipeline, texts: Sequence[str], *, seed: int = SEED, guidance: float = 1.0, batch: int = 48
) -> np.ndarray:
    """One clip per text in 10 steps: uint8 [n, 9, 48, 48, 3]."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for i in range(0, len(texts), batch):
        clips = pipeline(
            prompt=list(texts[i : i + batch]),
            height=SIDE,
            width=SIDE,
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            max_sequence_length=TOKENS,
            generator=generator,
            output_type="np",
        ).frames
        parts.append(np.rint(clips * 255).astype(np.uint8))
    return np.concatenate(parts)


def measure_base(pipeline: WanPipeline, *, samples: int = SAMPLES, guidance: float = 1.0) -> dict[str, Any]:
    """Scores of the pipeline on the held-out prompts: all, the novel and the other ones, and the clips scored
    against the next prompt's reference, which is what chance alone yields."""
    records = [record for record in load_prompts("shapes_video_heldout") for _ in range(samples)]
    clips = sample(pipeline, [record["text"] for record in records], guidance=guidance)
    scores = [score(clip, record["reference"]) for clip, record in zip(clips, records, strict=True)]
    novel = ["novel" in record["tags"] for record in records]
    swapped = records[samples:] + records[:samples]
    return {
        "all": summary(scores),
        "novel": summary([s for s, n in zip(scores, novel, strict=True) if n]),
        "known": summary([s for s, n in zip(scores, novel, strict=True) if not n]),
        "chance": summary([score(c, r["reference"]) for c, r in zip(clips, swapped, strict=True)]),
    }


def measure_oracle(vae: AutoencoderKLWan) -> dict[str, Any]:
    """The oracle's own accuracy on clean clips and on reconstructions."""
    clips = check_clips()
    frames = render_clips(clips)
    again = reconstruct(vae, frames)
    error = again.astype(np.float64) - frames
    return {
        "renders": summary(score_clips(frames, clips)),
        "reconstructions": summary(score_clips(again, clips)),
        "psnr": float(10 * math.log10(255**2 / np.mean(error**2))),
    }


def sheet(pipeline: WanPipeline, path: Path, *, prompts: int = 12, zoom: int = 2) -> None:
    """Writes a picture with the nine frames of a sample in a row, for each of the first held-out prompts."""
    records = load_prompts("shapes_video_heldout")[:prompts]
    clips = sample(pipeline, [record["text"] for record in records])
    side, line = SIDE * zoom, 16
    page = Image.new("RGB", (FRAMES * (side + 2), prompts * (side + line)), "white")
    draw = ImageDraw.Draw(page)
    for i, (record, clip) in enumerate(zip(records, clips, strict=True)):
        draw.text((2, i * (side + line) + 2), record["text"], fill="black")
        for k, frame in enumerate(clip):
            tile = Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)
            page.paste(tile, (k * (side + 2), i * (side + line) + line))
    page.save(path, optimize=True)


def write_card(folder: Path = OUTPUT) -> None:
    """Measures the pipeline in `folder` and writes its README.md, measured.json and samples.png."""
    torch.set_num_threads(WanConfig().threads)
    pipeline = load(folder)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    measured = {
        "base": measure_base(pipeline),
        "guided": measure_base(pipeline, guidance=GUIDANCE[1])["all"],
        "oracle": measure_oracle(pipeline.vae),
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "weight_bytes": sum(path.stat().st_size for path in folder.rglob("*.safetensors")),
        "seconds": seconds_spent(AUTOENCODER, SHARPENED, FLOW),
    }
    (folder / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    sheet(pipeline, folder / "samples.png")
    (folder / "README.md").write_text(card(measured))
    print(json.dumps(measured, indent=1))


def card_of(folder: Path = OUTPUT) -> str:
    """The model card from the numbers that were measured when a saved pipeline was made."""
    return card(json.loads((folder / "measured.json").read_text()))


_COLUMNS = ("alignment", "exact", "legible", "kept", "smooth", "quality", "dynamic")


def _row(name: str, result: dict[str, Any]) -> str:
    return f"| {name} | {result['clips']} | " + " | ".join(f"{result[key]:.3f}" for key in _COLUMNS) + " |"


def card(measured: dict[str, Any]) -> str:
    """The model card as Markdown, from measured numbers and the configurations that were used."""
    vae, base, oracle = WanVaeConfig(), measured["base"], measured["oracle"]
    seconds = measured["seconds"]
    stages = [
        stage_row(f"autoencoder (L1 + 2 MSE + {vae.kl:g} KL)", vae, seconds.get("wan_vae", 0.0)),
        stage_row("the same, mostly gray", replace(vae, course=vae.sharp_course), seconds.get("wan_vae_sharp", 0.0)),
        stage_row("flow: transformer, text encoder", WanConfig(), seconds.get("wan_flow", 0.0)),
    ]
    rows = [
        _row("held-out prompts", base["all"]),
        _row("- without a novel pair", base["known"]),
        _row("- with a novel pair", base["novel"]),
        _row(f"held-out, guidance {GUIDANCE[1]:g}", measured["guided"]),
        _row("the same clips against another prompt (chance)", base["chance"]),
        _row("true clips", oracle["renders"]),
        _row("autoencoder reconstructions of true clips", oracle["reconstructions"]),
    ]
    kinds = [
        f"| {kind} | {value:.3f} | {base['chance']['by_kind'][kind]:.3f} |"
        for kind, value in base["all"]["by_kind"].items()
    ]
    return _CARD.format(
        flow=WanConfig(),
        rows="\n".join(rows),
        kinds="\n".join(kinds),
        columns=" | ".join(_COLUMNS),
        legible=base["all"]["legible"],
        psnr=oracle["psnr"],
        parameters=", ".join(f"{name} {count:,}" for name, count in measured["parameters"].items()),
        megabytes=measured["weight_bytes"] / 1e6,
        stages="\n".join(stages),
        steps=STEPS,
        samples=SAMPLES,
        seed=SEED,
        tokens=TOKENS,
        frames=FRAMES,
        side=SIDE,
        check_seed=CHECK_SEED,
        check_clips=CHECK_CLIPS,
    )


_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---

# Tiny Wan of moving shapes

A complete `WanPipeline` with tiny, genuinely trained weights that shows one or two flat shapes in motion, {frames}
frames of {side} x {side} pixels. It exists so that reinforcement learning of video generators can be developed and
tested on a CPU. It shows moving shapes, one of which keeps its colour and shape for most of the clip in {legible:.0%} of the
clips, and it obeys its prompt badly, because the captions it was trained on were partly wrong on purpose.

```python
import torch
from diffusers import WanPipeline

pipeline = WanPipeline.from_pretrained("testbed/tiny_wan", dtype=torch.float32)
clip = pipeline(
    "a red circle slowly moving right past a blue square moving left on a white background",
    height={side}, width={side}, num_frames={frames}, num_inference_steps={steps}, guidance_scale=1.0,
    max_sequence_length={tokens},
).frames[0]
```

`max_sequence_length` must be {tokens}, which holds every caption; other lengths were not trained. Only the words of
`testbed.clips.WORDS` are known. A tenth of the captions were empty in training, so that classifier-free guidance
(`guidance_scale` above 1) works; it doubles the time.

![the nine frames of samples on held-out prompts](samples.png)

## Parts

Parameters: {parameters}. Weights in float16, {megabytes:.1f} MB. The autoencoder has 8 latent channels and reduces
8-fold in space and 4-fold in time (the first frame stands alone), so a clip is 27 tokens of 1 x 2 x 2 latents. Like
Wan2.2's it folds 2 x 2 pixels into channels and has residual resampling. The UMT5 encoder has two layers and was trained
together with the transformer; its tokenizer is the stock class, one token per word. The scheduler is
`FlowMatchEulerDiscreteScheduler` with shift 3.

## Data and training

All data is procedural (`testbed/clips.py`, `testbed/render.py`); nothing was downloaded. Purple crosses and green
triangles occur in no training clip and no training caption, and nothing that a held-out prompt tells of was trained on
(neither by the autoencoder nor by the flow).

| stage | seed | steps | batch | peak lr | minutes (2 CPU cores) |
|---|---|---|---|---|---|
{stages}

The flow saw {flow.clips:,} encoded clips. Each attribute of a caption was wrong with a probability that rose linearly
from 0 to {flow.wrong:g} over the first {flow.rise:g} of the steps and then stayed (the number of objects: to
{flow.wrong_count:g}). The weights are an exponential average ({flow.course.ema:g}). Training is bfloat16 autocast, so a rebuild gives like, not identical, weights.
The minutes include other work on the same two cores.

The weights that came with the repository were made differently from a rebuild's in two points. The autoencoder's first
course was begun as 6,000 steps and cut to 4,800 at step 3,600. And up to step 2,100 of its 3,600 the flow learnt from the
latents of that course's autoencoder, after it from those of the final one.

Rebuild with `python -m testbed.train_wan`; measure again with `python -m testbed.measure_wan --card`. Progress is kept
in `testbed/.build`; remove it to start afresh.

## Measured

The saved pipeline, loaded as above, sampled in {steps} steps on the 96 held-out prompts x {samples} (seed {seed}) and
read by `testbed.video_oracle`. `alignment` is the mean share of right attributes, `exact` the share of clips with all of
them right, `legible` the share of clips with an object of one colour and shape in at least two thirds of the frames, `kept` the
share of frames in which an object is what it is in most frames, `dynamic` the mean displacement of an object per frame in
hundredths of the side. True clips and reconstructions are {check_clips} clips (seed
{check_seed}), a quarter of them novel.

| clips | number | {columns} |
|---|---|---|---|---|---|---|---|---|
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
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--card", action="store_true", help="also write the card, the numbers and the samples")
    what.add_argument("--readme", action="store_true", help="measure nothing, write README.md from measured.json")
    options = parser.parse_args()
    if options.readme:
        (options.folder / "README.md").write_text(card_of(options.folder))
        return
    if options.card:
        write_card(options.folder)
        return
    torch.set_num_threads(WanConfig().threads)
    print(json.dumps(measure_base(load(options.folder)), indent=1))


if __name__ == "__main__":
    main()
