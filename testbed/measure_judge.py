"""Measures the tiny judge against the oracle: held-out prompts, the tiny FLUX's own samples, both orders.

`python -m testbed.measure_judge` prints the numbers of `testbed/tiny_judge`, decoded greedily by transformers. With
`--card` it also writes the model card.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# transformers annotates configurations by their defaults and results by their tuple form.
from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3VLForConditionalGeneration

from reward_server.families.base import Reply
from reward_server.families.flex import ANCHORS, parse
from testbed.judge_data import SIBLINGS, Bank, Draw, Pair, draw_renders, heldout_texts, load_bank, siblings
from testbed.judge_model import CELLS, GRID, MERGE, new_tokenizer, patches, request_ids
from testbed.judge_preferences import CLEAR
from testbed.judge_trace import winner_of
from testbed.train_judge import OUTPUT, STAGES, JudgeConfig, flux_draw
from testbed.training import BUILD, seconds_spent

SEED = 91
MAX_TOKENS = 64
_VALUES = {"alignment": "alignment", "quality": "quality", "aesthetics": "composition"}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The judge's replies to a pair as it stands and swapped, and how long the former is."""

    pair: Pair
    reply: Reply
    swapped: Reply
    tokens: int


def heldout_pairs(kind: str, draw: Draw, build: Path = BUILD) -> list[Pair]:
    """All pairs of siblings on held-out prompts in random order, without those in which neither is better."""
    bank: Bank = load_bank(build / f"judge_heldout_{kind}", heldout_texts(), draw, SEED)
    rng = np.random.default_rng(SEED)
    pairs = []
    for prompt in range(len(bank.texts)):
        for members in combinations(range(SIBLINGS), 2):
            one, two = members if rng.random() < 0.5 else members[::-1]
            made = siblings(bank, prompt, one, two)
            pairs += [made] if made is not None else []
    return pairs


@torch.no_grad()
def decode(
    model: Qwen3VLForConditionalGeneration, requests: Sequence[list[int]], images: np.ndarray, batch: int = 64
) -> list[list[int]]:
    """Greedy replies, with their end, to requests that show `images` uint8 [requests * k, 64, 64, 3], k each."""
    alike: dict[int, list[int]] = defaultdict(list)
    for i, request in enumerate(requests):
        alike[len(request)].append(i)  # equal lengths need no padding
    shown = images.reshape(len(requests), -1, *images.shape[1:])
    replies: list[list[int]] = [[] for _ in requests]
    for rows in alike.values():
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            made = _generate(model, torch.tensor([requests[i] for i in some]), shown[some])
            for i, reply in zip(some, made, strict=True):
                replies[i] = reply
    return replies


def _generate(model: Qwen3VLForConditionalGeneration, ids: torch.Tensor, shown: np.ndarray) -> list[list[int]]:
    pixels = patches(shown.reshape(-1, *shown.shape[2:]))
    end = model.generation_config.eos_token_id
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        pixel_values=pixels.flatten(0, 1),
        image_grid_thw=torch.tensor([[1, CELLS * MERGE, GRID]] * len(pixels)),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
    )[:, ids.shape[1] :]
    return [row[: row.index(end) + 1] if end in row else row for row in made.tolist()]


def ask(model: Qwen3VLForConditionalGeneration, pairs: Sequence[Pair]) -> list[Answer]:
    """Asks about every pair in both orders."""
    both = [*pairs, *(pair.swapped() for pair in pairs)]
    images = np.stack([image for pair in both for image in pair.images])
    replies = decode(model, [request_ids(2, pair.text) for pair in both], images)
    texts = new_tokenizer().batch_decode(replies, skip_special_tokens=True)
    read = [parse(text) for text in texts]
    half = len(pairs)
    return [
        Answer(pair=pair, reply=one, swapped=two, tokens=len(ids))
        for pair, one, two, ids in zip(pairs, read[:half], read[half:], replies[:half], strict=True)
    ]


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
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


def _scores(pair: Pair):
    return pair.judged[0].score, pair.judged[1].score


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return float(np.mean(listed)) if listed else float("nan")


def _agree(answer: Answer) -> bool:
    """Whether both orders name the same picture."""
    one, two = answer.reply.winner, answer.swapped.winner
    return one is not None and two is not None and one + two == 1


def _category_accuracy(answers: Sequence[Answer], anchor: str) -> float:
    """Where the two pictures differ in what the category is about."""
    name = _VALUES[anchor]
    right = []
    for answer in answers:
        one, two = (getattr(score, name) for score in _scores(answer.pair))
        if one != two:
            right.append(answer.reply.dimensions.get(anchor) == float(two > one))
    return _mean(right)


def measure(folder: Path = OUTPUT) -> dict[str, Any]:
    """The numbers of a saved judge on the generator's held-out samples and on renders."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[str, Any] = {}
    for kind, draw in (("samples", flux_draw()), ("renders", draw_renders)):
        pairs, start = heldout_pairs(kind, draw), time.time()
        found[kind] = summary(ask(model, pairs))
        print(f"{kind}: {time.time() - start:.0f} s", flush=True)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["weight_bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    found["seconds"] = seconds_spent(*(JudgeConfig().build / f"{stage.name}.pt" for stage in STAGES))
    return found


# ---------------------------------------------------------------- the card


def card(measured: Mapping[str, Any]) -> str:
    """The model card as Markdown, from measured numbers and the configurations that were used."""
    config = JudgeConfig()
    stages = [
        f"| {s.name} | {s.seed} | {s.steps} | {s.batch} | {s.peak_lr} | {measured['seconds'].get(s.name, 0) / 60:.0f} |"
        for s in STAGES
    ]
    return _CARD.format(
        config=config,
        stages="\n".join(stages),
        rows="\n".join(_row(kind, measured[kind]) for kind in ("samples", "renders")),
        categories="\n".join(_category_row(kind, measured[kind]) for kind in ("samples", "renders")),
        parameters=f"{measured['parameters']:,}",
        megabytes=measured["weight_bytes"] / 1e6,
        siblings=SIBLINGS,
        seed=SEED,
        clear=CLEAR,
        tokens=measured["samples"]["tokens"],
    )


def _row(kind: str, found: Mapping[str, Any]) -> str:
    names = ("accuracy", "accuracy_clear", "accuracy_near", "parsed", "consistent", "first")
    cells = [str(found["pairs"]), str(found["clear_pairs"]), *(f"{found[name]:.3f}" for name in names)]
    return f"| {kind} | " + " | ".join(cells) + " |"


def _category_row(kind: str, found: Mapping[str, Any]) -> str:
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
held-out one. First it learns to describe one picture, then to compare two; the order is random, and pairs in
which neither is better are left out. The weights' seed is {config.seed}.

| stage | seed | steps | batch | peak lr | minutes |
|---|---|---|---|---|---|
{stages}

Rebuild with `python -m testbed.train_judge`, measure with `python -m testbed.measure_judge --card`. Training is bfloat16
autocast, so a rebuild gives like, not identical, weights.

## Measured

All pairs of {siblings} siblings on the 96 held-out prompts (seed {seed}), where one is better; greedy decoding by transformers in
float32. `clear`: their alignment differs by {clear:g} or more. `consistent`: both orders name the same picture. `first`:
share of replies in which the picture shown first wins. An unparsed reply counts as wrong.

| pictures | pairs | clear pairs | accuracy | clear | not clear | parsed | consistent | first |
|---|---|---|---|---|---|---|---|---|
{rows}

By category, where the two pictures differ in it:

| pictures | alignment | quality | aesthetics |
|---|---|---|---|
{categories}

## Licence

Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=OUTPUT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--card", action="store_true", help="also write README.md and measured.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured = measure(options.folder)
    print(json.dumps(measured, indent=1))
    if options.card:
        (options.folder / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
        (options.folder / "README.md").write_text(card(measured))


if __name__ == "__main__":
    main()
