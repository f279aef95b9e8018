"""How the testbed's generators and its judge of clips are trained: one loop that resumes; and one way to save a pipeline."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import T5Tokenizer

BUILD = Path(__file__).parent / ".build"
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Course:
    """AdamW with a one-cycle learning rate.

    `warm_up` is the share of the steps until `peak_lr`, which falls to `peak_lr` / (25 `fall`); `ema` is the decay of
    the average of the weights, 0 for none.
    """

    steps: int
    peak_lr: float
    warm_up: float = 0.08
    fall: float = 50
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    ema: float = 0.0
    checkpoint_every: int = 100


def train(
    path: Path,
    model: Module,
    loss_of: Callable[[int], Tensor],
    course: Course,
    stop_at: int | None = None,
    more: Callable[[], str] = str,
    origin: str = "",
) -> Module:
    """Trains, or resumes from the checkpoint `path`; returns the average of the weights, or the model where there is none.

    Args:
        loss_of: The loss of a step. It draws its batch from the step's number alone.
        stop_at: A step to stop at before the end.
        more: What a line of progress says beside the loss.
        origin: The weights that it begins with, by a digest; "" for untrained ones.

    Raises:
        ValueError: the checkpoint is of another course, whose learning rate would be gone on with, or of another origin.
    """
    begun = asdict(replace(course, checkpoint_every=0)) | ({"origin": origin} if origin else {})
    average = copy.deepcopy(model).requires_grad_(False) if course.ema else None
    optimizer = torch.optim.AdamW(
        model.parameters(), course.peak_lr, betas=course.betas, weight_decay=course.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, course.peak_lr, course.steps, pct_start=course.warm_up, final_div_factor=course.fall
    )
    parts = [part for part in (model, average, optimizer, schedule) if part is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    first, spent = load_state(path, begun, *parts)
    start, recent = time.time() - spent, 0.0
    last = min(course.steps, stop_at or course.steps)
    for step in range(first, last):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if average is not None:
            follow(average, model, min(course.ema, (step + 1) / (step + 10)))
        recent = loss.item() if not recent else 0.98 * recent + 0.02 * loss.item()
        spent = time.time() - start
        if (step + 1) % 50 == 0:
            print(f"{path.stem} {step + 1}/{course.steps} loss {recent:.4f} {more()} {spent:.0f} s", flush=True)
        if (step + 1) % course.checkpoint_every == 0 or step + 1 == last:
            save_state(path, step + 1, spent, begun, *parts)
    return model if average is None else average


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Moves the average's parameters towards the module's, in place."""
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)


# ---------------------------------------------------------------- checkpoints


def load_state(path: Path, begun: Mapping[str, Any], *parts: Any) -> tuple[int, float]:
    """Restores `parts` from a checkpoint, if there is one; finished steps and seconds spent on them.

    Raises:
        ValueError: it was begun otherwise.
    """
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=False)
    before = state.get("begun", begun)
    other = [
        f"{name} was {before.get(name)}, not {value}" for name, value in begun.items() if value != before.get(name)
    ]
    if other:
        raise ValueError(f"{path} was begun otherwise ({'; '.join(other)}): move it away to begin anew")
    for part, saved in zip(parts, state["parts"], strict=True):
        part.load_state_dict(saved)
    return int(state["step"]), float(state["seconds"])


def save_state(path: Path, step: int, seconds: float, begun: Mapping[str, Any], *parts: Any) -> None:
    """Writes a checkpoint so that a crash never leaves half of one."""
    scratch = path.with_suffix(".tmp")
    saved = [part.state_dict() for part in parts]
    torch.save({"step": step, "seconds": seconds, "begun": dict(begun), "parts": saved}, scratch)
    scratch.replace(path)


def present_average(path: Path, model: Module) -> Module:
    """`model` with the present average of a training that goes on. Raises FileNotFoundError before its first checkpoint."""
    model.load_state_dict(torch.load(path, weights_only=False)["parts"][1])
    return model.eval()


def seconds_spent(*paths: Path) -> dict[str, float]:
    """Wall-clock seconds of each training that has a checkpoint, by the checkpoint's name."""
    return {path.stem: torch.load(path, weights_only=False)["seconds"] for path in paths if path.exists()}


def stage_row(name: str, config: Any, seconds: float) -> str:
    """A training's row in a model card: seed, steps, batch, peak learning rate, minutes."""
    cells = (name, config.seed, config.course.steps, config.batch, config.course.peak_lr, f"{seconds / 60:.1f}")
    return "| " + " | ".join(map(str, cells)) + " |"


# ---------------------------------------------------------------- pipelines


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Saves a pipeline in half precision, replacing the weights in `folder` but not its other files."""
    scratch = folder.with_name(folder.name + ".new")
    shutil.rmtree(scratch, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(scratch)
    folder.mkdir(exist_ok=True)
    for part in scratch.iterdir():
        old = folder / part.name
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        part.rename(old)
    scratch.rmdir()


def word_tokenizer(words: Iterable[str], length: int) -> T5Tokenizer:
    """A stock T5 tokenizer (unigram): each word is one token, other text is unknown; texts of at most `length` tokens."""
    pieces = ["<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in dict.fromkeys(words)), "\u2581"]
    scores = [(piece, 0.0 if i < 3 else -2.0) for i, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=length)


# ---------------------------------------------------------------- flows


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Hyper-parameters of a flow.

    `wrong` is the chance of each caption attribute to be replaced, `wrong_count` that of a wrong number of objects. Both
    rise linearly from nothing to their full value over the first `rise` of the training: the model learns first what
    words mean and then not to trust them. `shift` leans the noise levels towards the sampler's.
    """

    seed: int
    threads: int
    course: Course
    batch: int = 128
    wrong: float = 0.35
    wrong_count: float = 0.05
    rise: float = 0.7
    shift: float = 2.0

    def at(self, step: int) -> Self:
        """The same with the wrongness of a training step."""
        share = min(1.0, step / (self.rise * self.course.steps))
        return replace(self, wrong=share * self.wrong, wrong_count=share * self.wrong_count)


def swapped(rng: np.random.Generator, value: str, options: Sequence[str], chance: float) -> str:
    """The value, or with a chance another of the options."""
    others = [option for option in options if option != value]
    return others[int(rng.integers(len(others)))] if rng.random() < chance else value


def noise_levels(count: int, shift: float) -> Tensor:
    """Random sigmas [count] that lean towards a sampler's shifted ones: a logistic normal, shifted."""
    sigma = torch.sigmoid(1.2 * torch.randn(count))
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_loss(velocity_of: Callable[[Tensor, Tensor], Tensor], latents: Tensor, shift: float) -> Tensor:
    """Mean squared error of the velocity, in bfloat16 arithmetic.

    Args:
        velocity_of: Noisy latents and sigmas [n] to velocities.
        latents: Clean ones, [n, ...].
    """
    noise = torch.randn_like(latents)
    sigma = noise_levels(len(latents), shift)
    mixed = torch.lerp(latents, noise, sigma.view(-1, *[1] * (latents.ndim - 1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = velocity_of(mixed, sigma)
    return (velocity.float() - (noise - latents)).square().mean()
