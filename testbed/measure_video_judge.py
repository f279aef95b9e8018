"""Measures the tiny judge of clips against the oracle: held-out prompts, renders and the tiny Wan's own samples, both orders.

`python -m testbed.measure_video_judge` prints the numbers of `testbed/tiny_video_judge`, served by vLLM. With `--card` it also writes
the model card; with `--readme` it only writes the card anew, from the numbers that are there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reward_server.families.flex import Flex
from testbed.judge_data import SIBLINGS, Draw, Pair
from testbed.judge_preferences import CLEAR
from testbed.measure_judge import SEED, all_pairs, category_row, compared, facts, row, serving, write_card
from testbed.preference import NEAR
from testbed.train_video_judge import OUTPUT, STAGES, VideoJudgeConfig, has_wan, load_bank, state_path, wan_draw
from testbed.training import BUILD, seconds_spent
from testbed.video_judge_data import SEEN, draw_renders, heldout_texts
from testbed.video_judge_trace import JudgedClip


def heldout_pairs(kind: str, draw: Draw, build: Path = BUILD) -> list[Pair[JudgedClip]]:
    """All pairs of siblings on held-out prompts."""
    return all_pairs(load_bank(build / f"video_judge_heldout_{kind}", heldout_texts(), draw, SEED))


def measure(folder: Path = OUTPUT) -> dict[str, Any]:
    """The numbers of a saved judge on renders and, where the tiny Wan is there, on its held-out samples."""
    config, draws = VideoJudgeConfig(), {"renders": draw_renders}
    if has_wan(config):
        draws = {"samples": wan_draw(config.wan)} | draws
    pairs = {kind: heldout_pairs(kind, draw) for kind, draw in draws.items()}
    with serving(folder) as endpoint:
        family = Flex(medium="video", prompt_file=str(folder / "prompt.txt"), structured=False)
        return facts(folder) | {"seconds": _seconds(folder)} | compared(endpoint, family, pairs)


def _seconds(folder: Path) -> dict[str, float]:
    """How long the stages took: as the card has it where they were trained elsewhere."""
    measured = folder / "measured.json"
    before = json.loads(measured.read_text())["seconds"] if measured.exists() else {}
    return before | seconds_spent(*(state_path(stage, VideoJudgeConfig()) for stage in STAGES))


def card_of(folder: Path = OUTPUT) -> str:
    """The model card from the numbers that were measured when a saved judge was made."""
    return card(json.loads((folder / "measured.json").read_text()))


def card(measured: Mapping[str, Any]) -> str:
    """The model card as Markdown, from measured numbers and the configurations that were used."""
    kinds = [kind for kind in ("samples", "renders") if kind in measured]
    config = VideoJudgeConfig()
    samples = f"the tiny Wan's samples for {config.sampled_prompts:,} random prompts x {SIBLINGS}, and "
    return _CARD.format(
        config=config,
        clips=samples if "samples" in kinds else "",
        stages=_stage_rows(measured["seconds"]),
        rows="\n".join(row(kind, measured[kind]) for kind in kinds),
        categories="\n".join(category_row(kind, measured[kind]) for kind in kinds),
        parameters=f"{measured['parameters']:,}",
        megabytes=measured["weight_bytes"] / 1e6,
        siblings=SIBLINGS,
        frames=len(SEEN),
        seed=SEED,
        clear=CLEAR,
        near=NEAR,
        prompts=len(heldout_texts()),
        tokens=measured[kinds[0]]["tokens"],
    )


def _stage_rows(seconds: Mapping[str, float]) -> str:
    return "\n".join(
        f"| {s.name} | {s.seed} | {s.steps} | {s.batch} | {s.peak_lr} | {seconds.get(s.name, 0) / 60:.0f} |"
        for s in STAGES
    )


_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# Tiny judge of moving shapes

A complete Qwen3-VL with tiny weights that compares two clips of flat shapes for a prompt, by {frames} frames of 48 x 48
of each, and replies in the UnifiedReward-Flex format. It is the tiny judge of shapes after further training on clips. It exists so that
reinforcement learning against a judge can be developed and tested on a CPU. It knows the testbed's world and nothing else.

vLLM serves the folder like any Qwen3-VL (give it `--dtype float32` or `bfloat16`). Ask it with the Flex family and
`prompt.txt` as its wording: `Flex(medium="video", prompt_file="testbed/tiny_video_judge/prompt.txt")`.

## Parts

{parameters} parameters, {megabytes:.1f} MB in float16: text 192 wide in 4 layers, vision 128 wide in 3, a frame is 4 tokens.
The tokenizer is a byte-level unigram model in which the fixed text of a reply is whole tokens, so that a verdict takes
about {tokens:.0f} of them.

## Data and training

The teacher is `testbed.video_oracle`, which sees the same frames. It writes what each clip shows and how that moves,
then, for each thing that the prompt asks for, whether it holds, how much of the prompt holds in total, measures of
quality, identity, smoothness and steadiness, how much of the motion that was asked for holds, and last the winner
(`testbed/video_judge_trace.py`). Clips are {clips}renders
for {config.rendered_prompts:,} random prompts x {siblings}, with errors and faults: frozen, jumping, changing, flickering, blurred (`testbed/video_judge_data.py`). No prompt tells of what a
held-out one does. It begins with the weights of the judge of pictures, whose patches and places are interpolated and
whose vectors for the words that both know are kept (`judge_model.extended`). First it learns to describe one clip, then
to compare two; the order is random, and pairs in which neither is better are left out. The weights' seed is {config.seed}.

| stage | seed | steps | batch | peak lr | minutes |
|---|---|---|---|---|---|
{stages}

These weights were begun with 4,000 and 6,000 steps, cut to 1,600 at step 700 of the first stage and to 3,600 at step 800 of
the second, whose last 2,800 steps had two threads instead of one. The judge of pictures that they began with was an earlier
one of the same shape.

Rebuild with `python -m testbed.train_video_judge`, measure with `python -m testbed.measure_video_judge --card`. Training is
bfloat16 autocast, so a rebuild gives like, not identical, weights.

## Measured

All pairs of {siblings} siblings on the {prompts} held-out prompts (seed {seed}), where one is better; greedy decoding by
vLLM in float32 on a CPU. `clear`: their alignment differs by {clear:g} or more. `consistent`: both orders name the same clip.
`first`: share of replies in which the clip shown first wins. An unparsed reply counts as wrong.

| clips | pairs | clear pairs | accuracy | clear | not clear | parsed | consistent | first |
|---|---|---|---|---|---|---|---|---|
{rows}

By category, where the two clips differ in it by {near:g} or more:

| clips | alignment | quality | aesthetics |
|---|---|---|---|
{categories}

## Licence

Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=OUTPUT)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--card", action="store_true", help="also write README.md and measured.json")
    what.add_argument("--readme", action="store_true", help="measure nothing, write README.md from measured.json")
    options = parser.parse_args()
    if options.readme:
        (options.folder / "README.md").write_text(card_of(options.folder))
        return
    measured = measure(options.folder)
    print(json.dumps(measured, indent=1))
    if options.card:
        write_card(options.folder, measured, card(measured))


if __name__ == "__main__":
    main()
