"""What the learner says of an objective that does other than its class variables and ``passes`` promise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from grpo_flex.config import RunConfig
from grpo_flex.dynamics import Ode
from grpo_flex.learner import Learner
from grpo_flex.objectives.base import Objective, Policy, Term
from grpo_flex.rollout import RolloutWorker
from grpo_flex.types import Prompt, Trajectories


@dataclass(frozen=True, kw_only=True)
class Careless(Objective):
    """Moves the velocity, one pass, right in all that its subclasses get wrong."""

    promised: int = 1

    def passes(self, trajectories: Trajectories) -> int:
        return self.promised

    def terms(
        self, policy: Policy, trajectories: Trajectories, advantages_G: torch.Tensor, seed: int
    ) -> Iterator[Term]:
        v = policy.velocity(torch.ones(len(advantages_G), 4, 16), 0.5)
        yield self.term(policy, trajectories, v.mean((1, 2)) * advantages_G)

    def term(self, policy: Policy, trajectories: Trajectories, loss_G: torch.Tensor) -> Term:
        return Term(loss_G, {"loss_twice": 2 * loss_G.detach()})


class AsksForOld(Careless):
    def term(self, policy: Policy, trajectories: Trajectories, loss_G: torch.Tensor) -> Term:
        policy.old_velocity(torch.ones(4, 4, 16), 0.5)
        return Term(loss_G, {})


class SaysSo(AsksForOld):
    needs_old: ClassVar[bool] = True


class AsksForSteps(Careless):
    def term(self, policy: Policy, trajectories: Trajectories, loss_G: torch.Tensor) -> Term:
        return Term(loss_G + policy.rescore(trajectories, 0).logprob, {})


class SumsUp(Careless):
    def term(self, policy: Policy, trajectories: Trajectories, loss_G: torch.Tensor) -> Term:
        return Term(loss_G.sum(), {})


class OneNumber(Careless):
    def term(self, policy: Policy, trajectories: Trajectories, loss_G: torch.Tensor) -> Term:
        return Term(loss_G, {"spread": loss_G.detach().std()})


def learnt(config: RunConfig, objective: Any) -> None:
    """One update of one group, sampled without noise."""
    sampling = replace(config.sampling, dynamics=Ode(), same_noise=False)
    config = replace(config, objective=objective, sampling=sampling)
    learner = Learner(config)
    group = RolloutWorker(config).generate(0, Prompt(id="p", text="a red circle"), learner.adapter())
    learner.update([group], [np.array([1.0, -1.0, 0.5, -0.5])], 0)


@pytest.mark.parametrize("objective", [Careless(), SaysSo()])
def test_what_keeps_its_promises_is_let_alone(config: RunConfig, objective: Careless) -> None:
    learnt(config, objective)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (AsksForOld(), "old_velocity; it has to say so: needs_old: ClassVar"),
        (AsksForSteps(), "rescores step 0 of 0 that are stored.*needs_noise: ClassVar"),
        (SumsUp(), r"SumsUp gives loss_G of shape \(\); it needs one number for each sibling, \(4,\)"),
        (OneNumber(), r"OneNumber gives spread of shape \(\)"),
        (Careless(promised=2), "Careless.passes says 2 and its terms are 1"),
    ],
)
def test_what_breaks_one_is_told_which(config: RunConfig, objective: Careless, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        learnt(config, objective)
