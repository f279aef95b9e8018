"""What an experiment of a judge's training says: ``def config() -> JudgeTraining`` in a Python file.

`python -m reward_server sft|pairs|dpo EXPERIMENT [field=value …]` reads it; dotted names reach into its parts. Nothing
here imports torch, so a wrong field is refused at once.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from reward_server.asking import Endpoint
from reward_server.families.base import ChatFamily, Medium
from reward_server.families.flex import Flex

Problem = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How one stage fits the weights: AdamW, a linear warm-up, then the schedule."""

    lr: float
    batch: int = 2
    """Examples on one device at a time."""
    accumulation: int = 2
    """Batches whose gradients one optimiser step adds up."""
    epochs: float = 1.0
    steps: int = 0
    """Optimiser steps, in place of ``epochs`` where it is above 0."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises from 0."""
    schedule: str = "cosine"
    """What follows the warm-up: "cosine" or "linear" (to 0), or "constant"."""
    weight_decay: float = 0.0
    beta2: float = 0.999
    """AdamW's decay of squared gradients; less forgets a beginning with large ones sooner."""
    max_grad_norm: float = 1.0
    checkpoint_every: int = 200
    """Steps between checkpoints, of which the newest two are kept."""
    log_every: int = 10

    def problems(self) -> Iterator[Problem]:
        if not self.lr > 0:
            yield "lr", f"is {self.lr}; it needs to be above 0"
        for name in ("batch", "accumulation", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                yield name, f"is {getattr(self, name)}; it needs at least 1"
        if self.steps < 0 or (self.steps == 0 and not self.epochs > 0):
            yield "steps", f"is {self.steps} with {self.epochs} epochs; one of the two needs to be above 0"
        if not 0 <= self.warmup < 1:
            yield "warmup", f"is {self.warmup}; it is a share of the steps, from 0 to below 1"
        if not 0 < self.beta2 < 1:
            yield "beta2", f"is {self.beta2}; it needs to be between 0 and 1"
        if self.schedule not in ("cosine", "linear", "constant"):
            yield "schedule", f"is {self.schedule!r}; it needs to be cosine, linear or constant"


@dataclass(frozen=True, kw_only=True)
class Sft(Fit):
    """Stage 1: imitate the teacher's traces. Learning rate, batch and warm-up are UnifiedReward-Flex's (2602.02380)."""

    traces: str = ""
    """The file that `distil` wrote: JSON lines {"id", "prompt", "media", "reply", "label"}."""
    lr: float = 2.5e-6


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Two traces for each instance, sampled from the judge that stage 1 made, and which of them is preferred."""

    preferences: str = ""
    """A file of labelled preference instances (``preferences.py``)."""
    endpoint: Endpoint = field(default_factory=lambda: Endpoint(temperature=0.7))
    """Where the judge of stage 1 is served, and how it is sampled."""
    reasoning: Endpoint = field(default_factory=lambda: Endpoint(url=""))
    """A judge of reasoning quality, asked where both traces name the right winner. Without a url those are dropped."""

    def problems(self) -> Iterator[Problem]:
        for name in ("endpoint", "reasoning"):
            yield from ((f"{name}.{inner}", text) for inner, text in getattr(self, name).problems())
        if not self.endpoint.temperature > 0:
            yield "endpoint.temperature", "is 0, at which both traces would be the same; the paper has 0.7"


@dataclass(frozen=True, kw_only=True)
class Dpo(Fit):
    """Stage 2: direct preference optimisation against stage 1's judge (arXiv 2305.18290), with the paper's β."""

    model: str = ""
    """Where it starts, and its reference; empty: what this experiment's ``sft`` has saved."""
    beta: float = 0.1
    # Our own choice, a fifth of stage 1's: the paper's for this stage is not known to us.
    lr: float = 5e-7

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if not self.beta > 0:
            yield "beta", f"is {self.beta}; it needs to be above 0"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA adapter on every linear layer; it is merged into the weights that are saved."""

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.0

    def problems(self) -> Iterator[Problem]:
        if self.rank < 1:
            yield "rank", f"is {self.rank}; it needs at least 1"


@dataclass(frozen=True, kw_only=True)
class JudgeTraining:
    """One judge's training. It writes to ``<output>/<name>/``: sft/, pairs.jsonl, dpo/."""

    name: str
    model: str
    """Folder or hub id of the vision-language model to begin with: Qwen3-VL's or Qwen3.5's classes."""
    image: ChatFamily = field(default_factory=Flex)
    """How the judge is asked about pictures, in training exactly as when it is served."""
    video: ChatFamily = field(default_factory=lambda: Flex(medium="video"))
    """The same about videos, which are shown as frames."""
    questions: Mapping[str, ChatFamily] = field(default_factory=dict)
    """Further ways to ask: an example of ``sft`` that says "question": name is asked as this family asks, e.g. for scores
    of one candidate. All others compare two."""
    sft: Sft = field(default_factory=Sft)
    pairs: Pairs = field(default_factory=Pairs)
    dpo: Dpo = field(default_factory=Dpo)
    lora: Lora | None = None
    """None: all weights are trained."""
    train_vision: bool = True
    """Whether the picture encoder is trained with the rest."""
    precision: str = "auto"
    """Of the arithmetic: "bfloat16", "float32", or "auto", which is bfloat16 on GPUs that have it."""
    gradient_checkpointing: bool = True
    """Compute activations again instead of keeping them: less memory for more time."""
    loader_workers: int = 0
    """Processes that read pictures ahead; 0: none but the trainer."""
    wandb: str = "auto"
    """"online", "offline", "disabled", or "auto": WANDB_MODE, else online with a WANDB_API_KEY, else offline."""
    seed: int = 0
    output: str = "runs"

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    def family(self, medium: Medium, question: str = "") -> ChatFamily:
        if question:
            return self.questions[question]
        return self.video if medium == "video" else self.image

    def problems(self) -> Iterator[Problem]:
        for name in ("image", "video"):
            family = getattr(self, name)
            if family.medium != name:
                yield name, f"is set for {family.medium}s: give {type(family).__name__}(medium={name!r})"
            if family.candidates != 2 or family.sources:
                yield name, f"is {type(family).__name__}, which does not compare two candidates alone"
        if "" in self.questions:
            yield "questions", "has one without a name; an example that names none compares"
        for name, family in self.questions.items():
            yield from ((f"questions[{name!r}].{inner}", text) for inner, text in family.problems())
        if self.precision not in ("auto", "bfloat16", "float32"):
            yield "precision", f"is {self.precision!r}; it needs to be auto, bfloat16 or float32"
        if self.wandb not in ("auto", "online", "offline", "disabled"):
            yield "wandb", f"is {self.wandb!r}; it needs to be auto, online, offline or disabled"
        for part in (p for p in fields(self) if is_dataclass(getattr(self, p.name))):
            yield from ((f"{part.name}.{name}", text) for name, text in getattr(self, part.name).problems())

    def validate(self) -> None:
        """Raises ValueError with every field that cannot be."""
        found = [f"{name} {complaint}" for name, complaint in self.problems()]
        if found:
            raise ValueError("\n".join(found))


def load(path: str | Path, assignments: Sequence[str] = ()) -> JudgeTraining:
    """The experiment's configuration with "field=value" assignments, validated.

    Raises:
        ValueError: no such file, no usable ``config()``, or a field that is unknown or cannot be.
    """
    if not Path(path).is_file():
        raise ValueError(f"no experiment file {str(path)!r}: give a Python file with def config() -> JudgeTraining")
    spec = importlib.util.spec_from_file_location(f"_judge_experiment_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{str(path)!r} is no experiment: an experiment is a Python file, its name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass of the file looks up its annotations
    try:
        spec.loader.exec_module(module)
        made = module.config()
    except (SyntaxError, ImportError, TypeError, NameError, AttributeError) as error:
        raise ValueError(f"{path} makes no configuration: {type(error).__name__}: {error}") from error
    if not isinstance(made, JudgeTraining):
        raise ValueError(f"config() in {path} returns {type(made).__name__}; it needs to return a JudgeTraining")
    for assignment in assignments:
        name, sign, text = assignment.partition("=")
        if not sign:
            raise ValueError(f"{assignment!r} is no assignment; write field=value, e.g. sft.lr=1e-5")
        made = _assigned(made, name.split("."), text, name)
    made.validate()
    return made


def _assigned(part: Any, names: Sequence[str], text: str, path: str) -> Any:
    """``part`` with one field set from text."""
    name, *rest = names
    known = [f.name for f in fields(part)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"no field {path!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {known}"))
    value = getattr(part, name)
    if rest and not is_dataclass(value):
        raise ValueError(f"{path!r} cannot be set: {name} is {value!r}; choose an object in the experiment file")
    new = _assigned(value, rest, text, path) if rest else _read(text, value, get_type_hints(type(part))[name], path)
    return replace(part, **{name: new})


def _is(value: Any, kind: Any) -> bool:
    plain = get_origin(kind) or kind
    return isinstance(value, plain) and (plain is bool or not isinstance(value, bool))


def _read(text: str, present: Any, hint: Any, path: str) -> Any:
    """The text as a value of the field's type; "none" takes an adapter away, where there is one."""
    if isinstance(present, str):
        return text
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    if float in kinds and type(value) is int:
        value = float(value)
    if is_dataclass(present) and value is not None:
        raise ValueError(f"{path} is an object; set one of its fields, e.g. {path}.{fields(present)[0].name}=…")
    if not any(_is(value, kind) for kind in kinds):
        wanted = [
            "none" if kind is NoneType else f"a {getattr(kind, '__name__', kind)}"
            for kind in kinds
            if not is_dataclass(kind)
        ]
        raise ValueError(f"{path}={text}: it needs to be {' or '.join(wanted)}")
    return value
