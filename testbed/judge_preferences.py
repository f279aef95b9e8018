"""Preferences of the testbed's oracle as files, for the recipe that trains any judge (docs/train-a-judge.md).

`python -m testbed.judge_preferences FOLDER` writes `preferences.jsonl` and its pictures as PNG. A pair's category is
"clear" where the two differ much in alignment, else "near". Pairs that the oracle cannot tell apart are left out.
`--heldout` takes all pairs on the held-out prompts, as `testbed.measure_judge` does; without it the pairs are random and
show no held-out description.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from reward_server.preferences import Preference, write
from testbed.judge_data import SIBLINGS, Bank, Draw, Material, Pair, draw_renders, siblings, training_texts
from testbed.judge_trace import winner_of

CLEAR = 0.1
"""Difference of two pictures' alignment from which the oracle's preference counts as clear."""
SEED = 71


def training_pairs(count: int, seed: int) -> list[Pair]:
    """Random pairs of the tiny judge's own material: the tiny FLUX's samples and renders."""
    from testbed.train_judge import JudgeConfig, material

    drawn: Material = material(JudgeConfig())
    rng = np.random.default_rng(seed)
    return [drawn.pair(rng) for _ in range(count)]


def render_pairs(count: int, seed: int) -> list[Pair]:
    """Random pairs of sibling renders, which need no generator."""
    rng = np.random.default_rng(seed)
    texts = training_texts(max(1, count // 4), seed, novel=0.15)
    images = draw_renders(rng, [text for text in texts for _ in range(SIBLINGS)])
    bank = Bank(texts=texts, images=images.reshape(len(texts), SIBLINGS, *images.shape[1:]))
    pairs: list[Pair] = []
    while len(pairs) < count:
        one, two = (int(k) for k in rng.permutation(SIBLINGS)[:2])
        made = siblings(bank, int(rng.integers(len(texts))), one, two)
        pairs += [made] if made is not None else []
    return pairs


def heldout(kind: str) -> list[Pair]:
    """All pairs on held-out prompts, of "samples" or "renders"."""
    from testbed.measure_judge import heldout_pairs
    from testbed.train_judge import flux_draw

    draw: Draw = flux_draw() if kind == "samples" else draw_renders
    return heldout_pairs(kind, draw)


def save(folder: Path, pairs: Iterable[Pair]) -> list[Preference]:
    """Writes pictures and `preferences.jsonl` and returns what the file says."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    preferences = []
    for number, pair in enumerate(pairs):
        paths = [pictures / f"{number:06d}_{k}.png" for k in range(2)]
        for path, image in zip(paths, pair.images, strict=True):
            Image.fromarray(image).save(path)
        preferences.append(_preference(number, pair, paths))
    write(folder / "preferences.jsonl", preferences)
    return preferences


def _preference(number: int, pair: Pair, paths: Sequence[Path]) -> Preference:
    one, two = (judged.score for judged in pair.judged)
    winner = winner_of(one, two)
    assert winner is not None, "a Pair has a better picture"
    return Preference(
        id=f"{number:06d}",
        prompt=pair.text,
        candidates=((str(paths[0]),), (str(paths[1]),)),
        label=1 if winner else 0,
        category="clear" if abs(one.alignment - two.alignment) >= CLEAR else "near",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=2000, help="how many, if not held out (%(default)s)")
    parser.add_argument("--renders", action="store_true", help="renders only, without the tiny FLUX")
    parser.add_argument("--heldout", action="store_true", help="all pairs on the held-out prompts")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    if options.heldout:
        pairs = heldout("renders" if options.renders else "samples")
    else:
        pairs = (render_pairs if options.renders else training_pairs)(options.pairs, options.seed)
    made = save(options.folder, pairs)
    clear = sum(p.category == "clear" for p in made)
    print(f"{len(made)} pairs, {clear} clear: {options.folder / 'preferences.jsonl'}")


if __name__ == "__main__":
    main()
