"""The loop that trains the judge of clips: our own forward through the stock weights, twice as fast as the stock one.

The judge of pictures is trained by `reward_server.sft` instead (`testbed.train_judge`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen3VLForConditionalGeneration

from testbed import training
from testbed.judge_model import CLIPS, Form, new_model, patches, picture_features, reply_logits, token_ids
from testbed.training import Course


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Hyper-parameters of a stage; `candidates` is 1 to describe one, 2 to compare two."""

    name: str
    candidates: int
    seed: int
    steps: int
    batch: int
    peak_lr: float


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Right-padded sequences: patches of all their pictures as `judge_model.patches` cuts them, ids [b, length], wanted bool [b, length] with m true
    places whose next tokens are `targets` [m]."""

    pixels: torch.Tensor
    ids: torch.Tensor
    wanted: torch.Tensor
    targets: torch.Tensor


def collate(
    images: np.ndarray,
    requests: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    form: Form = CLIPS,
    multiple: int = 16,
) -> Batch:
    """Pads on the right, to a length that is a `multiple`, for each is compiled for itself; only the replies are learned."""
    longest = max(len(request) + len(reply) for request, reply in zip(requests, replies, strict=True))
    length = -(-longest // multiple) * multiple
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


def fit(
    path: Path,
    model: Qwen3VLForConditionalGeneration,
    stage: Stage,
    batch_of: Callable[[int], Batch],
    winners: Sequence[int],
    stop_at: int | None = None,
    origin: str = "",
    compile: bool = False,
) -> None:
    """Trains, or resumes, a stage on the batches of its steps; `path` keeps its state.

    Args:
        winners: The tokens that decide.
        stop_at, origin: As in `training.train`.
    """
    progress, features_of = Progress(winners), picture_features
    if compile:
        features_of = torch.compile(features_of, dynamic=False)
        model.model.language_model.compile(dynamic=False)

    def loss_of(step: int) -> torch.Tensor:
        batch = batch_of(step)
        logits = logits_of(model, batch, features_of)
        progress.add(logits.detach(), batch.targets)
        return nn.functional.cross_entropy(logits, batch.targets)

    course = Course(steps=stage.steps, peak_lr=stage.peak_lr, weight_decay=0.05)
    training.train(path, model, loss_of, course, stop_at, progress.__str__, origin)


def present_model(paths: Sequence[Path], seed: int) -> Qwen3VLForConditionalGeneration:
    """The model of the latest stage that has begun, by its state. Raises FileNotFoundError where none has."""
    begun = [path for path in paths if path.exists()]
    if not begun:
        raise FileNotFoundError(f"no stage has begun: there is none of {', '.join(map(str, paths))}")
    model = new_model(seed, CLIPS)
    model.load_state_dict(torch.load(begun[-1], weights_only=False)["parts"][0])
    return model.eval()
