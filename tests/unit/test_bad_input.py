"""Samplers and objectives that cannot work are refused at start: field, requirement, consequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from grpo_flex.config import ConfigError, RunConfig
from grpo_flex.dynamics import Cps, FastWindow, FlowSde, Multistep, Ode, SlidingWindow
from grpo_flex.objectives.awm import Awm
from grpo_flex.objectives.dpo import Dpo
from grpo_flex.objectives.grpo import Grpo
from grpo_flex.objectives.guard import Guard
from grpo_flex.objectives.nft import Nft

SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"group_size": 1}, "sampling.group_size is 1; .* needs at least 2 .* nothing would be learnt"),
    ({"eval_steps": 0}, "sampling.eval_steps is 0; .* at least 1 denoising step"),
    ({"steps": 1}, "sampling.steps is 1; it needs at least 2: the last one is never trained"),
    ({"dynamics": Cps(a=1.2)}, "sampling.dynamics.a is 1.2; for CPS .* between 0 .* and 1 .* is negative"),
    ({"dynamics": FlowSde(a=-1.0)}, "sampling.dynamics.a is -1.0; a noise level cannot be negative"),
    ({"window": FastWindow(size=4)}, "sampling.window.size is 4; .* would reach step 3, but only steps 0…2 .*steps=4"),
    ({"window": FastWindow(size=2, last_start=2)}, "sampling.window.size is 2; .* may start at step 2"),
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


@pytest.mark.parametrize("objective", [Nft(), Awm(), Dpo()], ids=lambda o: type(o).__name__)
def test_forward_objectives_take_a_sampler_without_noise(config: RunConfig, objective: Any) -> None:
    sampling = replace(config.sampling, dynamics=Ode(), solver=Multistep(), same_noise=False)
    replace(config, objective=objective, sampling=sampling).validate()
