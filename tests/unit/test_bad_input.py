"""Samplers and objectives that cannot work are refused at start: field, requirement, consequence."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from grpo_flex import run
from grpo_flex.config import ConfigError, RunConfig
from grpo_flex.dynamics import AllButLast, Cps, Dance, FastWindow, FlowSde, Multistep, Ode, SlidingWindow
from grpo_flex.generators.flux import FluxKontext
from grpo_flex.generators.wan import Wan
from grpo_flex.objectives.awm import Awm
from grpo_flex.objectives.dpo import Dpo
from grpo_flex.objectives.grpo import Grpo
from grpo_flex.objectives.guard import Guard
from grpo_flex.objectives.nft import Nft
from grpo_flex.rewards import Pointwise
from reward_server.families.edit import EditPair, EditPoint
from reward_server.families.flex import Flex
from reward_server.families.unified import Unified2Point
from tests.configs import judge_of

SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"dynamics": FlowSde(a=math.nan)}, "sampling.dynamics.a is nan; it needs to be finite: .* infinite or no number"),
    ({"dynamics": Dance(eta=math.inf)}, "sampling.dynamics.eta is inf; it needs to be finite"),
    ({"group_size": 1}, "sampling.group_size is 1; .* needs at least 2 .* nothing would be learnt"),
    ({"eval_steps": 0}, "sampling.eval_steps is 0; .* at least 1 denoising step, or they would be bare noise"),
    (
        {"steps": 1},
        "sampling.steps is 1; it needs at least 2: the last one is never trained, .* nothing would be learnt",
    ),
    ({"dynamics": Cps(a=1.2)}, "sampling.dynamics.a is 1.2; for CPS .* between 0 .* and 1 .* is negative"),
    ({"dynamics": FlowSde(a=-1.0)}, "sampling.dynamics.a is -1.0; a noise level cannot be negative"),
    ({"window": FastWindow(size=4)}, "sampling.window.size is 4; .* would reach step 3, but only steps 0…2 .*steps=4"),
    ({"window": FastWindow(size=2, last_start=2)}, "sampling.window.last_start is 2; .* step 3, .* make it 1 or less"),
    ({"window": SlidingWindow(size="4")}, "sampling.window.size is '4'; it needs to be a whole number"),  # pyright: ignore[reportArgumentType]
    ({"window": None}, r"sampling.window is None; it needs to be a window of steps, such as AllButLast\(\)"),
    ({"window": AllButLast}, "sampling.window is <class .*; it needs to be a window of steps"),
    ({"window": FlowSde()}, "sampling.window is FlowSde.*; it needs to be a window of steps"),
    ({"dynamics": FlowSde(a="0.7")}, "sampling.dynamics.a is '0.7'; it needs to be a number"),  # pyright: ignore[reportArgumentType]
    ({"dynamics": None}, r"sampling.dynamics is None; it needs to be dynamics, such as FlowSde\(a=0.7\)"),
    ({"solver": None}, r"sampling.solver is None; it needs to be a solver, such as Ode\(\)"),
    ({"window": SlidingWindow(size=4)}, "sampling.window.size is 4; .* make it shorter, or the schedule longer"),
    ({"window": SlidingWindow(size=2, flash=0.0)}, "sampling.window.flash is 0.0; .* above 0 and at most 1"),
    ({"dynamics": Ode(), "same_noise": False}, "sampling.dynamics has no noise.* for Grpo to learn from; use"),
    ({"dynamics": Ode()}, "sampling.same_noise is true with a deterministic sampler: .* the same picture"),
    ({"dynamics": Multistep()}, "sampling.dynamics is Multistep.* give it as sampling.solver"),
    ({"solver": FlowSde()}, "sampling.solver is FlowSde.* which adds noise; .* use Ode"),
    ({"eval_solver": Cps()}, "sampling.eval_solver is Cps.* which adds noise"),
]
OBJECTIVES: list[tuple[Any, str]] = [
    (Grpo(clip=0.0), "objective.clip is 0.0; it needs to be above 0 .* every gradient is clipped away"),
    (Guard(clip=-1.0), "objective.clip is -1.0; it needs to be above 0"),
    (Grpo(kl_target=0.1), "objective.kl_beta is 0 while kl_target is set; .* needs to begin above 0"),
    (Nft(beta=0.0), "objective.beta is 0.0; it needs to be above 0: .* nothing is learnt"),
    (Nft(beta=-1.0), "objective.beta is -1.0"),
    (Nft(old_max=1.0), "objective.old_max is 1.0; .* sampling would never change"),
    (Awm(draws=0), "objective.draws is 0; .* nothing to learn from"),
    (Grpo(kl_beta=math.nan), "objective.kl_beta is nan; it needs to be finite"),
    (Dpo(beta=-5.0), "objective.beta is -5.0; .* the loss does not depend on the policy"),
    (Nft(draws=1.5), "objective.draws is 1.5; it needs to be a whole number"),  # pyright: ignore[reportArgumentType]
]


@pytest.mark.parametrize(("changes", "message"), SAMPLING, ids=lambda x: str(x)[:40])
def test_sampling(config: RunConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(config, sampling=replace(config.sampling, **changes)).validate()


@pytest.mark.parametrize(("objective", "message"), OBJECTIVES, ids=lambda x: str(x)[:40])
def test_objectives(config: RunConfig, objective: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(config, objective=objective).validate()


@pytest.mark.parametrize("dynamics", [Cps(a=-0.1), Dance(eta=-1.0), FlowSde(a="x")], ids=str)  # pyright: ignore[reportArgumentType]
def test_one_mistake_is_one_complaint(config: RunConfig, dynamics: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(config, sampling=replace(config.sampling, dynamics=dynamics)).validate()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": None}, "objective is None; it needs to be an objective, such as Nft"),
        ({"sampling": None}, r"sampling is None; it needs to be a Sampling\(…\)"),
        ({"judge": "http://127.0.0.1"}, r"judge is 'http://127.0.0.1'; it needs to be a Judge\(…\) or none"),
        (
            {"generator": "black-forest-labs/FLUX.1-dev"},
            "generator is 'black.*; it needs to be a generator, such as Flux",
        ),
        ({"advantage": 0.7}, "advantage is 0.7; it needs to be an advantage, such as GroupRelative"),
    ],
)
def test_what_is_no_part_is_refused(config: RunConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(config, **changes).validate()


def test_guard_is_refused_where_its_weight_would_be_wrong(config: RunConfig) -> None:
    guarded = replace(config, objective=Guard())
    guarded.validate()
    with pytest.raises(
        ConfigError, match=r"sampling.dynamics is Cps, .*; Guard divides by that .* take FlowSde or Dance"
    ):
        replace(guarded, sampling=replace(config.sampling, dynamics=Cps())).validate()


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"stop_on": "win_rate"}, "evaluation.stop_on is 'win_rate'; it needs the whole name"),
        (
            {"stop_on": "heldout/win_rate", "versus_base": 0},
            "evaluation.stop_on is .* nobody compares held-out samples",
        ),
        ({"stop_on": "heldout/light", "scorer": None}, "evaluation.stop_on is .* no evaluation.scorer to give it"),
    ],
)
def test_a_figure_that_nobody_gives_stops_no_run(config: RunConfig, evaluation: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(config, evaluation=replace(config.evaluation, stop_after=2, **evaluation)).validate()


def test_numbers_in_a_tuple_are_looked_at_too(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"optimizer.betas is \(0.9, nan\); it needs to be finite"):
        replace(config, optimizer=replace(config.optimizer, betas=(0.9, math.nan))).validate()


def test_only_a_ratio_that_needs_the_weights_that_sampled_is_refused_with_lookahead(config: RunConfig) -> None:
    ahead = replace(config, sampling=replace(config.sampling, lookahead=1))
    for objective in (Grpo(), Nft(), Dpo()):
        replace(ahead, objective=objective).validate()
    with pytest.raises(ConfigError, match=r"sampling.lookahead is 1 with Awm, .* weigh samples wrongly; set it to 0"):
        replace(ahead, objective=Awm()).validate()


@pytest.mark.parametrize("objective", [Nft(), Awm(), Dpo()], ids=lambda o: type(o).__name__)
def test_forward_objectives_take_a_sampler_without_noise(config: RunConfig, objective: Any) -> None:
    sampling = replace(config.sampling, dynamics=Ode(), solver=Multistep(), same_noise=False)
    replace(config, objective=objective, sampling=sampling).validate()


FLUX, EDITOR, CLIPS = None, FluxKontext(model="owner/name"), Wan(model="owner/name")


@pytest.mark.parametrize(
    ("generator", "family", "message"),
    [
        (
            FLUX,
            Flex(medium="video"),
            r"judge\.family\.medium is 'video' of Flex, .* but Flux makes single pictures.*to image",
        ),
        (CLIPS, Flex(), r"judge\.family\.medium is 'image' of Flex, .* Wan makes clips of 33 frames: .* to video"),
        (
            CLIPS,
            EditPair(),
            r"judge\.family is EditPair, which judges edits .* but Wan edits none; take .* FluxKontext",
        ),
        (FLUX, EditPoint(), r"judge\.family is EditPoint, which judges edits .* but Flux edits none"),
        (EDITOR, Flex(), r"judge\.family is Flex, which is not shown the picture that FluxKontext edits: .* EditPair"),
        (replace(CLIPS, frames=1), Flex(medium="video"), r"Wan makes single pictures"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_judge_of_something_else_is_refused(config: RunConfig, generator: Any, family: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shown(config, generator, family).validate()


@pytest.mark.parametrize(
    ("generator", "family"),
    [
        (FLUX, Unified2Point()),
        (EDITOR, EditPair()),
        (EDITOR, EditPoint()),
        (CLIPS, Flex(medium="video")),
        (replace(CLIPS, frames=1), Flex()),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_judge_that_is_made_for_it_is_taken(config: RunConfig, generator: Any, family: Any) -> None:
    shown(config, generator, family).validate()


def shown(config: RunConfig, generator: Any, family: Any) -> RunConfig:
    judge, reward = replace(judge_of(config), family=family), config.reward if family.candidates == 2 else Pointwise()
    return replace(config, generator=generator or config.generator, judge=judge, reward=reward)


@pytest.mark.parametrize("key", ["s3cret\r\n", "two words"])
def test_a_key_that_no_header_takes_is_not_told(config: RunConfig, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("GRPO_FLEX_JUDGE_KEY", key)
    with pytest.raises(ConfigError, match=r"GRPO_FLEX_JUDGE_KEY .* the end of a line") as caught:
        run._auth(judge_of(config))
    assert key.strip() not in str(caught.value)
