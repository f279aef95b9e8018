"""Trains the tiny judge from nothing and saves it to `testbed/tiny_judge`.

`python -m testbed.train_judge` draws the pictures, then trains what is missing: first to describe one picture, then
to compare two in the Flex format and, in every fifth step, to score one in UnifiedReward 2.0's, with the oracle as the
teacher; at last the same on more of what it will judge, the tiny FLUX's own samples. Everything resumes from
`testbed/.build`.
`--export` only saves the present weights. `--compile` takes two minutes and a C++ compiler, and makes a step 1.6 times
as fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen3VLForConditionalGeneration

from testbed import judge_trace, training
from testbed.judge_data import SHARES, Draw, Material, draw_renders, load_bank, training_texts
from testbed.judge_model import (
    PICTURES,
    Form,
    new_model,
    patches,
    picture_features,
    reply_ids,
    reply_logits,
    request_ids,
    save,
    token_ids,
)
from testbed.training import BUILD, Course

OUTPUT = Path(__file__).parent / "tiny_judge"


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """What all stages share: the weights' seed, how many prompts have pictures, where progress is kept, and whether the
    model is compiled."""

    seed: int = 41
    build: Path = BUILD
    sampled_prompts: int = 5000
    rendered_prompts: int = 5000
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Hyper-parameters of a stage; `pictures` (or clips) is 1 to describe one, 2 to compare two.

    Every `point_every`-th step scores single pictures instead, `pictures` times as many; 0: none does. `more_prompts`
    have samples beside the config's; `shares` are those of the kinds of pairs.
    """

    name: str
    pictures: int
    seed: int
    steps: int
    batch: int
    peak_lr: float
    point_every: int = 0
    more_prompts: int = 0
    shares: Mapping[str, float] = field(default_factory=lambda: SHARES)


STAGES = (
    Stage(name="judge_describe", pictures=1, seed=42, steps=3000, batch=96, peak_lr=2e-3),
    Stage(name="judge_compare", pictures=2, seed=43, steps=4000, batch=48, peak_lr=1.5e-3, point_every=5),
    Stage(
        name="judge_samples",
        pictures=2,
        seed=44,
        steps=1600,
        batch=48,
        peak_lr=8e-4,
        point_every=5,
        more_prompts=3000,
        shares={"samples": 0.75, "renders": 0.15, "strangers": 0.1},
    ),
)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Right-padded sequences: patches of all their pictures as `judge_model.patches` cuts them, ids [b, length], wanted bool [b, length] with m true
    places whose next tokens are `targets` [m]."""

    pixels: torch.Tensor
    ids: torch.Tensor
    wanted: torch.Tensor
    targets: torch.Tensor


@lru_cache(maxsize=1)
def material(config: JudgeConfig, more_prompts: int = 0) -> Material:
    """The pictures to learn from, drawn where they are missing; samples for `more_prompts` than the config says."""
    sampled = training_texts(config.sampled_prompts + more_prompts, config.seed)
    rendered = training_texts(config.rendered_prompts, config.seed + 1, novel=0.15)
    return Material(
        samples=load_bank(config.build / "judge_samples", sampled, flux_draw(), config.seed),
        renders=load_bank(config.build / "judge_renders", rendered, draw_renders, config.seed + 1),
    )


def flux_draw() -> Draw:
    """Draws with the tiny FLUX as it is saved; loads it when it is first needed."""
    pipelines = []

    def draw(rng: np.random.Generator, texts: Sequence[str]) -> np.ndarray:
        from testbed.measure_flux import load, sample

        if not pipelines:
            pipelines.append(load())
        return sample(pipelines[0], texts, seed=int(rng.integers(2**31)))

    return draw


def make_batch(stage: Stage, drawn: Material, step: int) -> Batch:
    """The batch of a step; the same for the same step."""
    rng = np.random.default_rng((stage.seed, step))
    if stage.point_every and step % stage.point_every == stage.point_every - 1:
        examples = [_scored(drawn, rng) for _ in range(stage.batch * stage.pictures)]
    else:
        examples = [
            _described(drawn, rng) if stage.pictures == 1 else _compared(drawn, rng, stage.shares)
            for _ in range(stage.batch)
        ]
    images, requests, replies = zip(*examples, strict=True)
    return collate(np.concatenate(images), requests, [reply_ids(pieces) for pieces in replies])


Example = tuple[np.ndarray, list[int], list[str]]
"""Pictures [k, side, side, 3], the request's ids, and the reply's pieces."""


def _described(drawn: Material, rng: np.random.Generator) -> Example:
    image, judged = drawn.picture(rng)
    return image[None], request_ids(1), judge_trace.description(judged.reading)


def _scored(drawn: Material, rng: np.random.Generator) -> Example:
    text, reference, image, judged = drawn.prompted(rng)
    return image[None], request_ids(1, text), judge_trace.scores(reference, judged)


def _compared(drawn: Material, rng: np.random.Generator, shares: Mapping[str, float]) -> Example:
    pair = drawn.pair(rng, shares)
    return np.stack(pair.images), request_ids(2, pair.text), judge_trace.trace(pair.reference, *pair.judged)


def collate(
    images: np.ndarray,
    requests: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    form: Form = PICTURES,
    multiple: int = 8,
) -> Batch:
    """Pads on the right, to a length that is a `multiple`; only the replies are to be learned."""
    longest = max(len(request) + len(reply) for request, reply in zip(requests, replies, strict=True))
    length = -(-longest // multiple) * multiple  # few lengths, because each is compiled for itself
    ids = torch.full((len(requests), length), token_ids(form)["<|endoftext|>"])
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (request, reply) in enumerate(zip(requests, replies, strict=True)):
        end = len(request) + len(reply)
        ids[row, :end] = torch.tensor([*request, *reply])
        wanted[row, len(request) - 1 : end - 1] = True
    return Batch(pixels=patches(images, form), ids=ids, wanted=wanted, targets=ids[:, 1:][wanted[:, :-1]])


def logits_of(model: Qwen3VLForConditionalGeneration, batch: Batch, features_of=picture_features) -> torch.Tensor:
    """Logits [m, vocabulary] in float32, by bfloat16 arithmetic."""
    # For so few tokens the plain attention is the fastest of the CPU's.
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", dtype=torch.bfloat16):
        return reply_logits(model, batch.pixels, batch.ids, batch.wanted, features_of).float()


class Progress:
    """Moving averages of what a training prints; `winners` are the tokens that decide."""

    def __init__(self, winners: Sequence[int]) -> None:
        self.values: dict[str, float] = {}
        self._winners = torch.tensor(winners)

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        right = (logits.argmax(-1) == targets).float()
        decisive = torch.isin(targets, self._winners)
        self._follow("tokens right", right.mean().item())
        if decisive.any():
            self._follow("winner right", right[decisive].mean().item())

    def _follow(self, name: str, value: float) -> None:
        self.values[name] = 0.98 * self.values.get(name, value) + 0.02 * value

    def __str__(self) -> str:
        return " ".join(f"{name} {value:.4f}" for name, value in self.values.items())


def train(
    model: Qwen3VLForConditionalGeneration, stage: Stage, config: JudgeConfig, stop_at: int | None = None
) -> None:
    """Trains, or resumes, a stage in place; its state is `<build>/<stage>.pt`."""
    drawn = material(config, stage.more_prompts)
    winners = [token_ids()[piece] for piece in judge_trace.overall_winners()]
    fit(model, stage, config, lambda step: make_batch(stage, drawn, step), winners, stop_at)


def fit(
    model: Qwen3VLForConditionalGeneration,
    stage: Stage,
    config: JudgeConfig,
    batch_of: Callable[[int], Batch],
    winners: Sequence[int],
    stop_at: int | None = None,
    origin: str = "",
) -> None:
    """Trains, or resumes, a stage on the batches of its steps; `winners` are the tokens that decide, `origin` as in `training.train`."""
    progress, features_of = Progress(winners), picture_features
    if config.compile:
        features_of = torch.compile(features_of, dynamic=False)
        model.model.language_model.compile(dynamic=False)

    def loss_of(step: int) -> torch.Tensor:
        batch = batch_of(step)
        logits = logits_of(model, batch, features_of)
        progress.add(logits.detach(), batch.targets)
        return nn.functional.cross_entropy(logits, batch.targets)

    course = Course(steps=stage.steps, peak_lr=stage.peak_lr, weight_decay=0.05)
    training.train(config.build / f"{stage.name}.pt", model, loss_of, course, stop_at, progress.__str__, origin)


def train_all(config: JudgeConfig) -> None:
    """All stages, each from where the one before ends."""
    model = new_model(config.seed)
    for stage in STAGES:
        train(model, stage, config)


def present_model(
    config: JudgeConfig, stages: Sequence[Stage] = STAGES, form: Form = PICTURES
) -> Qwen3VLForConditionalGeneration:
    """The model of the latest stage that has begun. Raises FileNotFoundError where none has."""
    begun = [path for stage in stages if (path := config.build / f"{stage.name}.pt").exists()]
    if not begun:
        raise FileNotFoundError(f"no stage has begun in {config.build}")
    model = new_model(config.seed, form)
    model.load_state_dict(torch.load(begun[-1], weights_only=False)["parts"][0])
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export", action="store_true", help="save the present weights and stop")
    parser.add_argument("--compile", action="store_true", help="compile the model: 1.6 times as fast")
    parser.add_argument("--draw", action="store_true", help="draw the pictures and stop")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = JudgeConfig(compile=options.compile)
    if options.draw:
        material(config, STAGES[-1].more_prompts)
        return
    if not options.export:
        train_all(config)
    save(present_model(config), options.output)


if __name__ == "__main__":
    main()
