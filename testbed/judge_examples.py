"""What the tiny judge is fine-tuned on, in the files that `reward_server sft` reads.

The oracle is the teacher. It describes single pictures, which a model that has seen nothing yet learns first; it compares
two in the Flex format; and it scores one in UnifiedReward 2.0's. A picture is kept once, whatever examples show it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from testbed import judge_trace
from testbed.judge_data import SIBLINGS, Material

DESCRIBE, SCORE = "describe", "score"
"""The questions that do not compare, as an example names them."""
SHARES = {"samples": 0.6, "renders": 0.22, "strangers": 0.18}
LATER_SHARES = {"samples": 0.7, "renders": 0.18, "strangers": 0.12}
"""Of the kinds of pairs."""
Example = tuple[str, str, tuple[np.ndarray, ...], list[str]]
"""Question ("" compares), prompt, pictures [side, side, 3] as shown, and the reply's pieces."""


def descriptions(material: Material) -> Iterator[Example]:
    """What the oracle reads in each of the pictures."""
    for bank in (material.samples, material.renders):
        for prompt in range(len(bank.texts)):
            for sibling in range(SIBLINGS):
                reply = judge_trace.description(bank.judged(prompt, sibling).reading)
                yield DESCRIBE, "", (bank.images[prompt, sibling],), reply


def comparisons(material: Material, count: int, seed: int, shares: Mapping[str, float] = SHARES) -> Iterator[Example]:
    """Random pairs with their traces."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        pair = material.pair(rng, shares)
        yield "", pair.text, pair.images, judge_trace.trace(pair.reference, *pair.judged)


def scorings(material: Material, count: int, seed: int) -> Iterator[Example]:
    """Random pictures, each scored for the prompt that it was made for."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        text, reference, image, judged = material.prompted(rng)
        yield SCORE, text, (image,), judge_trace.scores(reference, judged)


def write(path: Path, examples: Iterable[Example]) -> None:
    """Writes the examples, and their pictures to `pictures/` beside the file; nothing where it is there already."""
    if path.exists():
        return
    pictures, scratch = path.parent / "pictures", path.with_suffix(".tmp")
    pictures.mkdir(parents=True, exist_ok=True)
    with scratch.open("w", encoding="utf-8") as file:
        for question, prompt, images, pieces in examples:
            media = [[f"pictures/{_kept(image, pictures)}"] for image in images]
            row: dict[str, Any] = {"prompt": prompt, "media": media, "reply": "".join(pieces)}
            file.write(json.dumps(row | ({"question": question} if question else {})) + "\n")
    scratch.replace(path)


def _kept(image: np.ndarray, folder: Path) -> str:
    """The name of the picture's file, which is made where it is not there."""
    name = hashlib.blake2b(image.tobytes(), digest_size=10).hexdigest() + ".png"
    if not (folder / name).exists():
        Image.fromarray(image).save(folder / "part.tmp.png")
        (folder / "part.tmp.png").replace(folder / name)  # a kill leaves no half of one under its name
    return name
