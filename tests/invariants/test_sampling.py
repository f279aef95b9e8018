"""Rollouts: the shared prefix, windows inside the schedule, solvers, and what the siblings differ by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from grpo_flex.config import RunConfig
from grpo_flex.dynamics import (
    AllButLast,
    Cps,
    Dance,
    Dynamics,
    FastWindow,
    FlowSde,
    Multistep,
    Ode,
    SlidingWindow,
    Window,
)
from grpo_flex.learner import BoundPolicy, Learner
from grpo_flex.objectives.nft import Nft
from grpo_flex.rollout import RolloutWorker, mean_distance
from grpo_flex.types import Prompt, RolloutGroup

PROMPT = Prompt(id="p0", text="a red circle on a black background")


def counting(config: RunConfig) -> tuple[RolloutWorker, list[int]]:
    """A worker, and how many siblings each of its transformer's calls was given so far."""
    worker, calls = RolloutWorker(config), list[int]()
    velocity = worker.model.velocity

    def counted(x: torch.Tensor, sigma: float, conditioning: Any) -> torch.Tensor:
        calls.append(len(x))
        return velocity(x, sigma, conditioning)

    worker.model.velocity = counted
    return worker, calls


def sampled(config: RunConfig, **changes: Any) -> tuple[RolloutGroup, list[int]]:
    """A group, and how many siblings each of the transformer's calls was given."""
    config = replace(config, sampling=replace(config.sampling, **changes))
    config.validate()
    worker, calls = counting(config)
    return worker.generate(0, PROMPT, Learner(config).adapter()), calls


def at(start: int, size: int = 1, flash: float = 1.0) -> Window:
    """A window that begins at ``start``, for the training step 0."""

    class Pinned(SlidingWindow):
        def select(self, steps: int, iteration: int, seed: int) -> Any:
            return super().select(steps, start, seed)

    return Pinned(size=size, every=1, flash=flash)


def test_a_shared_prefix_is_computed_once(config: RunConfig) -> None:
    group, calls = sampled(config, steps=6, window=at(3, 2), same_noise=True)
    assert calls == [1, 1, 1, 4, 4, 4]
    starts = group.trajectories.latents_GKNC[:, 0]
    assert all(torch.equal(starts[0], other) for other in starts)
    assert not torch.equal(group.trajectories.next_latents_GKNC[0, 0], group.trajectories.next_latents_GKNC[1, 0])
    assert group.trajectories.steps_K == (3, 4) and group.trajectories.latents_GKNC.shape[1] == 2


def test_the_shared_prefix_is_what_siblings_would_have_computed(config: RunConfig) -> None:
    window = at(2)
    once, _ = sampled(config, window=window, same_noise=True)
    worker = RolloutWorker(replace(config, sampling=replace(config.sampling, window=window, same_noise=False)))
    noise = worker._noise
    worker._noise = lambda seeds: noise([once_seed] * len(seeds))  # pyright: ignore[reportAttributeAccessIssue]
    from grpo_flex.prompts import seed_for

    once_seed = seed_for(config.seed, "rollout", 0, PROMPT.id)
    each = worker.generate(0, PROMPT, Learner(config).adapter())
    torch.testing.assert_close(once.trajectories.latents_GKNC, each.trajectories.latents_GKNC, rtol=1e-5, atol=1e-5)


def test_siblings_of_different_noise_share_nothing(config: RunConfig) -> None:
    _, calls = sampled(config, window=at(2), same_noise=False)
    assert calls == [4, 4, 4, 4]


@pytest.mark.parametrize("solver", [Ode(), Multistep()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "window", [AllButLast(), FastWindow(size=1, last_start=2), at(1, 2, flash=0.5)], ids=["all", "fast", "flash"]
)
def test_ratio_is_exactly_one_for_every_window_and_solver(config: RunConfig, window: Window, solver: Any) -> None:
    group, _ = sampled(config, steps=6, window=window, solver=solver)
    learner = Learner(config)
    policy = BoundPolicy(learner.model, group.conditioning, config.sampling.dynamics)
    for k in range(len(group.trajectories.steps_K)):
        assert torch.equal(policy.rescore(group.trajectories, k).logprob, group.trajectories.logprobs_GK[:, k])


@pytest.mark.parametrize("dynamics", [FlowSde(a=0.7), Dance(eta=0.3), Cps(a=0.7)], ids=lambda d: type(d).__name__)
def test_the_noise_is_normal_and_nobodys_but_its_own(config: RunConfig, dynamics: Dynamics) -> None:
    """(x' − μ)/std of every step and sibling, and the noise that each began with: bounds are four standard errors and more."""
    group, _ = sampled(config, group_size=8, steps=8, dynamics=dynamics, same_noise=False)
    policy, kept = BoundPolicy(Learner(config).model, group.conditioning, dynamics), group.trajectories
    with torch.no_grad():
        again = [policy.rescore(kept, k) for k in range(7)]
    noises = [kept.latents_GKNC[:, 0], *((s.next_sample - s.mean) / s.std for s in again)]
    z = torch.cat(noises).flatten(1).double()  # a row for each sibling of each step
    rows, numbers = z.shape
    assert (rows, numbers) == (64, 64)
    assert z.mean().abs() < 4 / z.numel() ** 0.5
    assert (z.square().mean() - 1).abs() < 4 * (2 / z.numel()) ** 0.5
    between = (z @ z.T / numbers)[~torch.eye(rows, dtype=torch.bool)]
    assert between.abs().max() < 6 / numbers**0.5


def test_flash_saves_calls_after_the_window_only(config: RunConfig) -> None:
    group, calls = sampled(config, steps=8, window=at(1, 2, flash=0.4), same_noise=True, solver=Multistep())
    assert calls == [1, 4, 4, 4, 4]
    assert len(group.trajectories.sigmas) == 6 and group.trajectories.sigmas[-1] == 0


def test_a_solver_forgets_what_was_before_the_noise(config: RunConfig) -> None:
    """With one step before the window and one after it, a second-order solver has nothing to extrapolate."""
    second, _ = sampled(config, steps=3, window=at(1), solver=Multistep())
    first, _ = sampled(config, steps=3, window=at(1), solver=Ode())
    assert all(np.array_equal(a, b) for a, b in zip(first.media_G, second.media_G, strict=True))


@pytest.mark.parametrize("dynamics", [Ode(), FlowSde(a=0.0), Dance(eta=0.0), Cps(a=0.0)], ids=str)
def test_a_rollout_without_noise_is_the_held_out_sampler(config: RunConfig, dynamics: Dynamics) -> None:
    """Which other tests hold against the stock pipelines; every a of 0 is the same ODE, bit for bit."""
    config = replace(config, objective=Nft())
    group, _ = sampled(config, steps=4, dynamics=dynamics, same_noise=False)
    worker = RolloutWorker(config)
    ours = worker.sample_ode(worker.model.encode([PROMPT])[0], group.seeds_G, 4)
    assert group.trajectories.final_GNC is not None and torch.equal(group.trajectories.final_GNC, ours)


def test_held_out_samples_take_their_own_solver(config: RunConfig) -> None:
    pictures = []
    for solver in (Ode(), Multistep()):
        sampling = replace(config.sampling, eval_steps=4, eval_solver=solver)
        worker = RolloutWorker(replace(config, sampling=sampling))
        pictures.append(worker.sample_ode(worker.model.encode([PROMPT])[0], [3], 4))
    assert not torch.equal(*pictures)


def test_mean_distance_by_hand() -> None:
    # Pairs differ by (3, 4), (0, 0) and (3, 4): root mean squares 5/√2, 0 and 5/√2.
    points = torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]], [[0.0, 0.0]]])
    assert mean_distance(points) == pytest.approx(10 / 3 / 2**0.5)


def test_diversity_is_measured_and_logged(config: RunConfig) -> None:
    group, _ = sampled(config)
    assert group.diversity["latent"] > 0 and 0 < group.diversity["pixel"] < 1
    metrics = Learner(config).update([group], [np.array([1.0, -1.0, 1.0, -1.0])], 0).metrics
    assert metrics["policy/diversity_latent"] == group.diversity["latent"]
    assert {"steps/log_ratio_00", "steps/log_ratio_02"} <= metrics.keys()
