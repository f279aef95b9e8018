"""Whether somebody gives what a configuration's reward reads, and whether the judge is made for what it will be shown.

Part of ``RunConfig.problems``: each function yields ``(field, complaint)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo_flex.config import Problem, RunConfig


def reward_problems(config: RunConfig) -> Iterator[Problem]:
    """All complaints about judge, scorers and reward that are about more than one of them, or the generator."""
    yield from _who_judges(config)
    yield from _scorers(config)
    if config.judge is not None:
        yield from _medium(config)
        yield from _sources(config)


def _who_judges(config: RunConfig) -> Iterator[Problem]:
    if config.judge is None and not config.scorers:
        yield "judge", "is none and scorers is empty: nobody would say which sibling is better; give one of the two"
    if not getattr(config.reward, "compares", False):
        return
    reward = f"is {type(config.reward).__name__}, which counts wins, but"
    if config.judge is None:
        yield "reward", f"{reward} judge is none: no pair would ever be judged; use Pointwise, or set a judge"
    elif config.judge.family.candidates == 1:
        yield (
            "reward",
            f"{reward} judge.family {type(config.judge.family).__name__} looks at one sibling at a time: no pair would "
            "ever be judged; use Pointwise, or a family that compares two",
        )


def _scorers(config: RunConfig) -> Iterator[Problem]:
    from grpo_flex.scorers import label

    for i, scorer in enumerate(config.scorers):
        if not callable(scorer):
            yield f"scorers.{i}", f"is {scorer!r}; it needs to be callable as scorer(media, prompt)"
    names = [label(scorer) for scorer in config.scorers]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield "scorers", f"holds two that are called {name!r}; give each a field or attribute `name` of its own"


def _medium(config: RunConfig) -> Iterator[Problem]:
    """Pictures for a judge of pictures, clips for a judge of clips."""
    assert config.judge is not None
    family, frames = config.judge.family, getattr(config.generator, "frames", 1)
    who, made = f"is {family.medium!r} of {type(family).__name__}", type(config.generator).__name__
    if family.medium == "video" and frames == 1:
        yield (
            "judge.family.medium",
            f"{who}, which judges clips, but {made} makes single pictures: it would be asked about motion that is not there; "
            "set it to image, or take a generator of clips such as Wan",
        )
    if family.medium == "image" and frames > 1:
        yield (
            "judge.family.medium",
            f"{who}, which judges one picture, but {made} makes clips of {frames} frames: it would see the middle one alone, "
            "and the reward would ignore motion; set it to video, if the family takes it, or generator.frames to 1",
        )


def _sources(config: RunConfig) -> Iterator[Problem]:
    """A judge of edits for an editor."""
    assert config.judge is not None
    family, made = config.judge.family, type(config.generator).__name__
    edits, who = getattr(config.generator, "edits", False), f"is {type(family).__name__}, which"
    if family.sources and not edits:
        yield (
            "judge.family",
            f"{who} judges edits beside the picture that was edited, but {made} edits none; take a family such as Flex, or an "
            "editor such as FluxKontext",
        )
    if edits and not family.sources:
        yield (
            "judge.family",
            f"{who} is not shown the picture that {made} edits: a sample that has nothing of it could win; take EditPair or "
            "EditPoint (reward_server/families/edit.py)",
        )
