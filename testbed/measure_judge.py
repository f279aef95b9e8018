"""Measures the tiny judge against the oracle: held-out prompts, the tiny FLUX's own samples, both orders.

`python -m testbed.measure_judge` prints the numbers of `testbed/tiny_judge`, served by vLLM. With `--card` it also writes
the model card; with `--readme` it only writes the card anew, from the numbers that are there.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Generic

import numpy as np
from PIL import Image
from safetensors import safe_open

from reward_server.asking import Asker, Endpoint, for_each
from reward_server.families.base import FIRST, SECOND, TIE, ChatFamily, Reply
from reward_server.families.chat import data_url
from reward_server.families.flex import ANCHORS, Flex
from reward_server.families.unified import Unified2Point
from reward_server.judge_training import Fit
from reward_server.serve import VllmJudge
from testbed.judge_data import (
    SIBLINGS,
    Draw,
    J,
    MediaBank,
    Pair,
    draw_renders,
    heldout_texts,
    load_bank,
    siblings,
)
from testbed.judge_preferences import CLEAR
from testbed.judge_trace import Judged, winner_of
from testbed.preference import NEAR, Score
from testbed.train_judge import FITS, OUTPUT, JudgeConfig, flux_draw
from testbed.training import BUILD

SEED = 91
STAGES_TABLE = "stages.md"
"""Beside the weights: the figures before and after each stage of the recipe."""
POINT_WEIGHTS = {"alignment": 1.0, "coherence": 0.5, "style": 0.1}
"""Of the scores of a single picture, as in `experiments/shapes_image_pointwise.py`."""
_AXES = {"alignment": "alignment", "quality": "coherence", "aesthetics": "style"}
_VALUES = {"alignment": "alignment", "quality": "quality", "aesthetics": "composition"}


@dataclass(frozen=True, kw_only=True)
class Answer(Generic[J]):
    """The judge's replies to a pair as it stands and swapped, and how long the former is."""

    pair: Pair[J]
    reply: Reply
    swapped: Reply
    tokens: int


Question = tuple[str, Sequence[np.ndarray]]
"""A prompt, and the candidates: pictures uint8 [H, W, 3], or clips uint8 [F, H, W, 3]."""


def heldout_pairs(kind: str, draw: Draw, build: Path = BUILD) -> list[Pair[Judged]]:
    """All pairs of siblings on held-out prompts."""
    return all_pairs(load_bank(build / f"judge_heldout_{kind}", heldout_texts(), draw, SEED))


def all_pairs(bank: MediaBank[J]) -> list[Pair[J]]:
    """All pairs of siblings in random order, without those in which neither is better."""
    rng = np.random.default_rng(SEED)
    pairs = []
    for prompt in range(len(bank.texts)):
        for members in combinations(range(SIBLINGS), 2):
            one, two = members if rng.random() < 0.5 else members[::-1]
            made = siblings(bank, prompt, one, two)
            pairs += [made] if made is not None else []
    return pairs


def answers(endpoint: Endpoint, family: ChatFamily, questions: Sequence[Question]) -> list[tuple[Reply, int]]:
    """The reply to each question, and how many tokens it took."""
    return asyncio.run(_answers(endpoint, family, questions))


async def _answers(endpoint: Endpoint, family: ChatFamily, questions: Sequence[Question]) -> list[tuple[Reply, int]]:
    found: dict[int, tuple[Reply, int]] = {}
    async with Asker(endpoint) as judge:

        async def ask_one(i: int) -> None:
            prompt, shown = questions[i]
            answer = await judge.ask(family, prompt, [_urls(candidate) for candidate in shown])
            found[i] = (answer.reply, answer.tokens)

        await for_each(range(len(questions)), ask_one, endpoint.concurrency)
    return [found[i] for i in range(len(questions))]


def _urls(candidate: np.ndarray) -> list[str]:
    frames = candidate if candidate.ndim == 4 else candidate[None]
    return [data_url(Image.fromarray(frame)) for frame in frames]


def ask(endpoint: Endpoint, family: ChatFamily, pairs: Sequence[Pair[J]]) -> list[Answer[J]]:
    """Asks about every pair in both orders."""
    both = [*pairs, *(pair.swapped() for pair in pairs)]
    read = answers(endpoint, family, [(pair.text, pair.images) for pair in both])
    return [
        Answer(pair=pair, reply=one, swapped=two, tokens=tokens)
        for pair, (one, tokens), (two, _) in zip(pairs, read[: len(pairs)], read[len(pairs) :], strict=True)
    ]


def score(endpoint: Endpoint, family: ChatFamily, pairs: Sequence[Pair[J]]) -> list[Answer[J]]:
    """Asks for scores of every picture by itself; the higher weighted sum of a pair wins, in either order."""
    shown = {(pair.text, image.tobytes()): image for pair in pairs for image in pair.images}
    read = answers(endpoint, family, [(text, [image]) for (text, _), image in shown.items()])
    found = dict(zip(shown, read, strict=True))
    made = []
    for pair in pairs:
        (one, spent), (two, more) = (found[pair.text, image.tobytes()] for image in pair.images)
        made.append(Answer(pair=pair, reply=_won(one, two), swapped=_won(two, one), tokens=spent + more))
    return made


def _won(one: Reply, two: Reply) -> Reply:
    if one.status != "ok" or two.status != "ok":
        return one if one.status != "ok" else two
    first, second = (sum(w * reply.scores[name][0] for name, w in POINT_WEIGHTS.items()) for reply in (one, two))
    axes = {anchor: _higher(one.scores[axis][0], two.scores[axis][0]) for anchor, axis in _AXES.items()}
    return Reply(status="ok", winner=_higher(first, second), dimensions=axes)


def _higher(one: float, two: float) -> float:
    return TIE if one == two else FIRST if one > two else SECOND


def summary(answers: Sequence[Answer[Any]]) -> dict[str, Any]:
    """Shares of right verdicts (an unparsed reply is a wrong one), of parsed replies, of agreement in both orders."""
    right = [a.reply.winner == winner_of(*_scores(a.pair)) for a in answers]
    clear = [abs(one.alignment - two.alignment) >= CLEAR for one, two in (_scores(a.pair) for a in answers)]
    replies = [reply for a in answers for reply in (a.reply, a.swapped)]
    return {
        "pairs": len(answers),
        "accuracy": _mean(right),
        "clear_pairs": sum(clear),
        "accuracy_clear": _mean(r for r, c in zip(right, clear, strict=True) if c),
        "accuracy_near": _mean(r for r, c in zip(right, clear, strict=True) if not c),
        "parsed": _mean(reply.status == "ok" for reply in replies),
        "consistent": _mean(_agree(a) for a in answers),
        "first": _mean(reply.winner == 0 for reply in replies),
        "by_category": {anchor: _category_accuracy(answers, anchor) for anchor in ANCHORS},
        "tokens": _mean(a.tokens for a in answers),
    }


def _scores(pair: Pair[Any]) -> tuple[Score, Score]:
    return pair.judged[0].score, pair.judged[1].score


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return float(np.mean(listed)) if listed else float("nan")


def _agree(answer: Answer[Any]) -> bool:
    """Whether both orders name the same picture."""
    one, two = answer.reply.winner, answer.swapped.winner
    return one is not None and two is not None and one + two == 1


def _category_accuracy(answers: Sequence[Answer[Any]], anchor: str) -> float:
    """Where the two pictures differ in what the category is about, by enough for the teacher to say so."""
    name = _VALUES[anchor]
    right = []
    for answer in answers:
        one, two = (getattr(score, name) for score in _scores(answer.pair))
        if abs(one - two) >= NEAR:
            right.append(answer.reply.dimensions.get(anchor) == float(two > one))
    return _mean(right)


def measure(folder: Path = OUTPUT) -> dict[str, Any]:
    """The numbers of a saved judge on the generator's held-out samples and on renders."""
    draws = {"samples": flux_draw(), "renders": draw_renders}
    pairs = {kind: heldout_pairs(kind, draw) for kind, draw in draws.items()}
    found = facts(folder)
    with serving(folder) as endpoint:
        found |= compared(endpoint, Flex(prompt_file=str(folder / "prompt.txt"), structured=False), pairs)
        point = Unified2Point(prompt_file=str(folder / "prompt_point.txt"))
        found["scored"] = {kind: summary(score(endpoint, point, some)) for kind, some in pairs.items()}
    return found


@contextmanager
def serving(folder: Path) -> Iterator[Endpoint]:
    """A saved judge behind vLLM, in float32: half precision is bfloat16 on a CPU, and such small weights feel it."""
    server = VllmJudge(
        model=str(folder), max_model_len=1024, kv_cache_gb=1, cpu_threads=1, extra=("--dtype", "float32")
    )
    with tempfile.TemporaryDirectory() as logs, server.start(logs) as running:
        yield Endpoint(url=running.endpoints[0], model=server.served_name, max_tokens=192, concurrency=128)


def compared(endpoint: Endpoint, family: ChatFamily, pairs: Mapping[str, Sequence[Pair[Any]]]) -> dict[str, Any]:
    """The figures of each kind of pairs."""
    found = {}
    for kind, some in pairs.items():
        start = time.time()
        found[kind] = summary(ask(endpoint, family, some))
        print(f"{kind}: {2 * len(some) / (time.time() - start):.1f} verdicts a second", flush=True)
    return found


def facts(folder: Path) -> dict[str, Any]:
    """A saved judge's size, and a digest of its weights."""
    files = sorted(folder.glob("*.safetensors"))
    return {
        "weights": hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12],
        "parameters": sum(_parameters(path) for path in files),
        "weight_bytes": sum(path.stat().st_size for path in files),
    }


def _parameters(path: Path) -> int:
    with safe_open(path, "np") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


# ---------------------------------------------------------------- the card


def card_of(folder: Path = OUTPUT) -> str:
    """The model card from the numbers that were measured when a saved judge was made."""
    measured = json.loads((folder / "measured.json").read_text())
    return card(measured, (folder / STAGES_TABLE).read_text().rstrip())


def card(measured: Mapping[str, Any], recipe: str) -> str:
    """The model card as Markdown, from measured numbers, the configurations that were used, and the recipe's table."""
    from testbed import refine_judge  # which measures by this module

    training, config = refine_judge.config(), JudgeConfig()
    fits: dict[str, Fit] = {**FITS, "sft": training.sft, "dpo": training.dpo}
    examples = {
        "describe": f"{SIBLINGS * (config.sampled_prompts + config.rendered_prompts):,} pictures",
        "compare": f"{config.pairs:,} pairs, {config.scored:,} scored pictures",
        "practise": f"{config.more_pairs:,} pairs, {config.more_scored:,} scored pictures",
        "sft": f"{refine_judge.SFT_PAIRS:,} pairs",
        "dpo": f"of {refine_judge.DPO_PAIRS:,} pairs",
    }
    return _CARD.format(
        recipe=recipe,
        beta=training.dpo.beta,
        fits="\n".join(fit_row(name, examples[name], fit) for name, fit in fits.items()),
        config=config,
        rows="\n".join(row(kind, measured[kind]) for kind in ("samples", "renders")),
        categories="\n".join(category_row(kind, measured[kind]) for kind in ("samples", "renders")),
        scored="\n".join(row(kind, measured["scored"][kind]) for kind in ("samples", "renders")),
        parameters=f"{measured['parameters']:,}",
        megabytes=measured["weight_bytes"] / 1e6,
        siblings=SIBLINGS,
        seed=SEED,
        clear=CLEAR,
        near=NEAR,
        tokens=measured["samples"]["tokens"],
    )


def fit_row(name: str, examples: str, fit: Fit) -> str:
    length = f"{fit.steps:,} steps" if fit.steps else f"{fit.epochs:g} epoch"
    return f"| {name} | {examples} | {length} | {fit.batch} x {fit.accumulation} | {fit.lr:g} |"


def row(kind: str, found: Mapping[str, Any]) -> str:
    names = ("accuracy", "accuracy_clear", "accuracy_near", "parsed", "consistent", "first")
    cells = [str(found["pairs"]), str(found["clear_pairs"]), *(f"{found[name]:.3f}" for name in names)]
    return f"| {kind} | " + " | ".join(cells) + " |"


def category_row(kind: str, found: Mapping[str, Any]) -> str:
    return f"| {kind} | " + " | ".join(f"{found['by_category'][anchor]:.3f}" for anchor in ANCHORS) + " |"


_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# Tiny judge of shapes

A complete Qwen3-VL with tiny weights, trained from nothing, that compares two 64 x 64 pictures of flat shapes for a
prompt and replies in the UnifiedReward-Flex format. It exists so that reinforcement learning against a judge can be
developed and tested on a CPU. It knows the testbed's world and nothing else.

vLLM serves the folder like any Qwen3-VL (give it `--dtype float32` or `bfloat16`). Ask it with the Flex family and
`prompt.txt` as its wording: `Flex(prompt_file="testbed/tiny_judge/prompt.txt")`.

## Parts

{parameters} parameters, {megabytes:.1f} MB in float16: text 192 wide in 4 layers, vision 128 wide in 3, a picture is 16
tokens. The tokenizer is a byte-level unigram model in which the fixed text of a reply is whole tokens, so that a
verdict takes about {tokens:.0f} of them.

## Data and training

The teacher is `testbed.oracle`. It writes what each picture shows, then, for each thing that the prompt asks for,
whether it holds, how much of the prompt holds in total, measures of quality and composition, and last the winners
(`testbed/judge_trace.py`). Pictures are the tiny FLUX's samples for {config.sampled_prompts:,} random prompts x {siblings}, and
as many renders for {config.rendered_prompts:,}, with errors and faults (`testbed/judge_data.py`). No prompt has the description of a
held-out one. The order of two is random, and pairs in which neither is better are left out.

`reward_server`'s recipe trains it from random weights (seed {config.seed}), by the commands that train any judge. Fine-tuning
(stage 1) comes in four courses: `describe`, in which it learns to see, one picture at a time; `compare`, with pairs and, in UnifiedReward
2.0's format, single pictures; `practise`, the same with more of the samples (`testbed/train_judge.py`); `sft`, on pairs drawn anew from
the same pictures, whose traces the oracle wrote as a teacher behind an endpoint. `dpo` (stage 2, β {beta:g}) learns from pairs of the judge's own traces (`testbed/refine_judge.py`).

| course | examples | length | batch x accumulation | peak lr |
|---|---|---|---|---|
{fits}

{recipe}

Rebuild with `make train-judge`, measure with `python -m testbed.measure_judge --card`. Threads add up in
no fixed order, so a rebuild gives like, not identical, weights.

## Measured

All pairs of {siblings} siblings on the 96 held-out prompts (seed {seed}), where one is better; greedy decoding by vLLM in
float32 on a CPU. `clear`: their alignment differs by {clear:g} or more. `consistent`: both orders name the same picture. `first`:
share of replies in which the picture shown first wins. An unparsed reply counts as wrong.

| pictures | pairs | clear pairs | accuracy | clear | not clear | parsed | consistent | first |
|---|---|---|---|---|---|---|---|---|
{rows}

By category, where the two pictures differ in it by {near:g} or more:

| pictures | alignment | quality | aesthetics |
|---|---|---|---|
{categories}

By scores of single pictures (UnifiedReward 2.0's format, `prompt_point.txt`): the higher of the sums weighted 1, 0.5
and 0.1 wins, and equal ones count as wrong.

| pictures | pairs | clear pairs | accuracy | clear | not clear | parsed | consistent | first |
|---|---|---|---|---|---|---|---|---|
{scored}

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
        table = (options.folder / STAGES_TABLE).read_text().rstrip()
        write_card(options.folder, measured, card(measured, table))


def write_card(folder: Path, measured: Mapping[str, Any], text: str) -> None:
    (folder / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    (folder / "README.md").write_text(text)


if __name__ == "__main__":
    main()
