"""What must hold between the parts of a configuration; what one part needs by itself is in its own ``problems()``.

Part of ``RunConfig.problems``: each function yields ``(field, complaint)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from grpo_flex.pairing import Calibrated
from grpo_flex.rewards import BradleyTerry, Consistent, Pointwise, Several, WinRate

if TYPE_CHECKING:
    from grpo_flex.config import Problem, RunConfig


def rules_between_parts(config: RunConfig) -> Iterator[Problem]:
    """All complaints that are about more than one part."""
    yield from _noise(config)
    yield from _whole_weights(config)
    yield from _quantised(config)
    yield from _broadcast(config)
    yield from _cards(config)
    yield from _who_judges(config)
    yield from _scorers(config)
    yield from _unread(config)
    if config.judge is not None:
        yield from _anchors(config)
        yield from _criteria(config)
        yield from _incomplete(config)
        yield from _medium(config)
        yield from _sources(config)
    yield from _lookahead(config)
    yield from _updates(config)
    yield from _watched(config)


# ---------------------------------------------------------------- sampler, objective, processes


def _noise(config: RunConfig) -> Iterator[Problem]:
    if config.objective.needs_noise and not getattr(config.sampling.dynamics, "stochastic", True):
        yield (
            "sampling.dynamics",
            f"has no noise, so its steps have no density for {type(config.objective).__name__} to learn from; "
            "use e.g. FlowSde(a=0.7)",
        )
    if getattr(config.objective, "needs_diffusion", False) and not getattr(config.sampling.dynamics, "diffuses", True):
        yield (
            "sampling.dynamics",
            f"is {type(config.sampling.dynamics).__name__}, whose mean does not move with the velocity in proportion to a step's "
            f"length; {type(config.objective).__name__} divides by that length and would weigh steps wrongly: take FlowSde or "
            "Dance, or the objective Grpo",
        )


def _whole_weights(config: RunConfig) -> Iterator[Problem]:
    """What full fine-tuning does not go with."""
    from grpo_flex.config import Full

    if not isinstance(config.adapter, Full):
        return
    memory = getattr(config.generator, "memory", None)
    if memory is not None and memory.base_bits:
        yield (
            "generator.memory.base_bits",
            f"is {memory.base_bits} with adapter=Full(): quantised weights cannot be trained; set 0, or train a LoRA adapter",
        )
    asks = {
        "objective": config.objective.needs_base or config.objective.first_beta > 0,
        "evaluation.versus_base": config.judge is not None and config.evaluation.versus_base > 0,
    }
    for name in (name for name, asked in asks.items() if asked and not config.adapter.keep_base):
        yield (
            "adapter.keep_base",
            f"is false, but {name} compares with the base weights, which nobody would have; set it to true",
        )


def _broadcast(config: RunConfig) -> Iterator[Problem]:
    """Why weights cannot be broadcast."""
    from grpo_flex.config import Full

    name = "placement.broadcast"
    if not config.placement.broadcast:
        return
    if not isinstance(config.adapter, Full):
        yield (
            name,
            "is true with a LoRA adapter, which is small and goes through Ray's object store: set it to false, or train "
            "all weights with adapter=Full()",
        )
    if config.placement.colocated:
        yield name, "is true with placement.colocated, where no weights travel: set one of the two to false"
    if config.sampling.lookahead:
        yield (
            name,
            f"is true with sampling.lookahead={config.sampling.lookahead}: workers then need weights of several versions, "
            "and after a broadcast they hold one; set it to false, or sampling.lookahead=0",
        )


def _quantised(config: RunConfig) -> Iterator[Problem]:
    """Where a quantised base cannot lie."""
    memory, place = getattr(config.generator, "memory", None), config.placement
    if memory is None or not memory.base_bits:
        return
    name, bits = "generator.memory.base_bits", f"is {memory.base_bits}"
    if place.shard_base:
        yield (
            name,
            f"{bits} with placement.shard_base=true: FSDP2 would take weights apart from the scales that bitsandbytes keeps "
            "beside them; set base_bits=0, or shard_base=false",
        )
    if not place.learner_gpus and (place.colocated or not place.rollout_gpus):
        asked = "placement.learner_gpus" + ("" if place.colocated else " and placement.rollout_gpus")
        yield name, f"{bits}, which works on CUDA only, but no process has a GPU; set it to 0, or {asked} above 0"


def _cards(config: RunConfig) -> Iterator[Problem]:
    """NCCL takes no two processes of a group on one GPU, where Ray may put those that ask for parts of it."""
    place = config.placement
    learner, worker = place.learner_gpus, place.rollout_gpus
    if place.learners > 1 and _may_share(learner, learner):
        yield (
            "placement.learner_gpus",
            f"is {learner} with placement.learners={place.learners}: two of them could share a GPU, and NCCL, by which they sum "
            "gradients, refuses that; set it to 1, or placement.learners=1",
        )
    several = max(place.rollout_workers, place.rollout_workers_max) > 1
    if place.broadcast and (_may_share(learner, worker) or (several and _may_share(worker, worker))):
        yield (
            "placement.broadcast",
            f"is true with placement.learner_gpus={learner} and placement.rollout_gpus={worker}: processes could share a "
            "GPU, and NCCL, by which weights are broadcast, refuses that; set both to 1, or broadcast=false",
        )


def _may_share(one: float, two: float) -> bool:
    return one > 0 and two > 0 and one + two <= 1


def _lookahead(config: RunConfig) -> Iterator[Problem]:
    name, ahead = "sampling.lookahead", config.sampling.lookahead
    if ahead and config.placement.colocated:
        yield (
            name,
            f"is {ahead} with placement.colocated, where the weights that sample are the learner's "
            "own, never older ones: set it to 0, or keep rollout workers apart",
        )
    if ahead and config.objective.old_sampled:
        yield (
            name,
            f"is {ahead} with {type(config.objective).__name__}, whose ratio needs the weights that "
            "sampled, while the learner has only newer ones: it would weigh samples wrongly; set it to 0",
        )


def _updates(config: RunConfig) -> Iterator[Problem]:
    """Groups enough for every update and every learner."""
    updates, groups = config.optimizer.updates_per_rollout, config.prompts.per_step
    if updates > groups:
        yield (
            "optimizer.updates_per_rollout",
            f"is {updates}, more than the {groups} groups of a step (prompts.per_step): some updates would have nothing to "
            "learn from",
        )
    elif (most := groups // updates) < config.placement.learners:
        yield (
            "placement.learners",
            f"is {config.placement.learners}, but an update has {most} groups (prompts.per_step / "
            "optimizer.updates_per_rollout): some learners would have nothing to do",
        )


def _watched(config: RunConfig) -> Iterator[Problem]:
    """Somebody gives the figure that stops a run early."""
    evaluation = config.evaluation
    if not evaluation.stop_after or not evaluation.stop_on:
        return
    asks = f"is {evaluation.stop_on!r}, but"
    if evaluation.stop_on == "heldout/win_rate":
        if config.judge is None or not evaluation.versus_base:
            yield (
                "evaluation.stop_on",
                f"{asks} nobody compares held-out samples with the base model's: that needs a judge, and "
                "evaluation.versus_base above 0",
            )
    elif evaluation.scorer is None:
        yield "evaluation.stop_on", f"{asks} there is no evaluation.scorer to give it; heldout/win_rate needs none"


# ---------------------------------------------------------------- judge, scorers, reward, generator


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


def _anchors(config: RunConfig) -> Iterator[Problem]:
    """The reward reads the dimensions that the judge's verdicts have: of others only some would count, and in silence."""
    assert config.judge is not None
    given = set(getattr(config.judge.family, "anchors", ()))
    for name, reward in _pairwise("reward", config.reward):
        if given and not given.issuperset(reward.anchors):
            yield (
                f"{name}.anchors",
                f"is {reward.anchors}, but judge.family {type(config.judge.family).__name__} compares {tuple(sorted(given))}: what "
                f"the others say would not count; give {type(reward).__name__}(anchors={tuple(sorted(given))}), or some of them",
            )


def _criteria(config: RunConfig) -> Iterator[Problem]:
    """Which of a judge's scores count is said where some are parts of others, or in other units."""
    from reward_server.families.rank_and_score import by_candidates

    assert config.judge is not None
    asked = by_candidates(config.judge.family).values()
    decisive = next(((type(f).__name__, names) for f in asked if (names := getattr(f, "decisive", ()))), None)
    for name, reward in _rewards("reward", config.reward):
        if isinstance(reward, Pointwise) and not reward.criteria and decisive:
            yield (
                f"{name}.criteria",
                f"is empty, and the scores that {decisive[0]} gives are of several kinds, some of them parts of "
                f"others, which a plain mean would mix; give Pointwise(criteria={decisive[1]})",
            )


def _incomplete(config: RunConfig) -> Iterator[Problem]:
    """Who meets only some of the others may owe wins to them, which win rates do not see."""
    assert config.judge is not None
    judge, size = config.judge, config.sampling.group_size
    if (
        size < 2 or isinstance(judge.pairs, Calibrated) or not hasattr(judge.pairs, "pairs")
    ):  # measured with win rates too
        return
    asked = {frozenset(members) for members in judge.questions(size, 0) if len(members) == 2}
    for name, reward in _pairwise("reward", config.reward):
        if isinstance(reward, WinRate) and 0 < len(asked) < size * (size - 1) // 2:
            yield (
                name,
                f"is WinRate, but judge.pairs {type(judge.pairs).__name__} leaves out some of the {size * (size - 1) // 2} pairs of a "
                "group (sampling.group_size): a win over a strong sibling would count as one over a weak one; use BradleyTerry, "
                "which takes WinRate's settings, or RoundRobin",
            )


def _pairwise(name: str, reward: Any) -> Iterator[tuple[str, Any]]:
    """The rewards that count wins, wherever they are wrapped, with their fields' names."""
    return ((where, one) for where, one in _rewards(name, reward) if isinstance(one, WinRate | BradleyTerry))


def _rewards(name: str, reward: Any) -> Iterator[tuple[str, Any]]:
    """All rewards that wrap no other, with their fields' names."""
    if isinstance(reward, Consistent):
        yield from _rewards(f"{name}.inner", reward.inner)
    elif isinstance(reward, Several):
        for i, one in enumerate(reward.rewards):
            yield from _rewards(f"{name}.rewards.{i}", one)
    else:
        yield name, reward


def _scorers(config: RunConfig) -> Iterator[Problem]:
    from grpo_flex.scorers import label

    for i, scorer in enumerate(config.scorers):
        if not callable(scorer):
            yield f"scorers.{i}", f"is {scorer!r}; it needs to be callable as scorer(media, prompt)"
    names = [label(scorer) for scorer in config.scorers]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield "scorers", f"holds two that are called {name!r}; give each a field or attribute `name` of its own"


def _unread(config: RunConfig) -> Iterator[Problem]:
    """Rewards that count wins read verdicts on two siblings, and a scorer's are on one."""
    rewards = [reward for _, reward in _rewards("reward", config.reward)]
    if config.scorers and all(isinstance(reward, WinRate | BradleyTerry) for reward in rewards):
        yield (
            "scorers",
            f"give numbers that nothing would read: reward {type(config.reward).__name__} counts wins. Set both side by side, "
            'Several(names=("judge", "scores"), rewards=(WinRate(), Pointwise(criteria=…))) with Gdpo or WeightedSum as the '
            "advantage, or score held-out samples alone, with evaluation.scorer",
        )


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
