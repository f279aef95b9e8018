"""Sampler, learner and adapter agree with each other, on a tiny FLUX of the true classes (CPU, float32)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo_flex.advantages import Pareto
from grpo_flex.config import RunConfig
from grpo_flex.dynamics import Cps, Dance, Dynamics, FlowSde
from grpo_flex.generators.flux import Flux
from grpo_flex.learner import BoundPolicy, Learner
from grpo_flex.objectives.base import Objective
from grpo_flex.objectives.dpo import Dpo
from grpo_flex.objectives.grpo import Grpo
from grpo_flex.objectives.nft import Nft
from grpo_flex.overrides import override
from grpo_flex.rollout import RolloutWorker
from grpo_flex.types import Adapter, Prompt, RewardedGroup, RolloutGroup
from tests.tiny import tiny_flux

PROMPT = Prompt(id="p0", text="a red circle on a black background")


def _model(config: RunConfig) -> str:
    assert isinstance(config.generator, Flux)
    return config.generator.model


def rolled_out(config: RunConfig, adapter: Adapter, prompts: Sequence[Prompt] = (PROMPT,)) -> list[RolloutGroup]:
    worker = RolloutWorker(config)
    return [worker.generate(0, prompt, adapter) for prompt in prompts]


def nudged(learner: Learner, scale: float = 0.05) -> Adapter:
    """An adapter that does something: a fresh one has B = 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in learner.parameters:
            p.add_(scale * torch.randn(p.shape, generator=generator))
    state = learner.state()
    learner.load_state({key: state[key] for key in ("version", "adapter", "optimizer")})  # θ_old and the average too
    return learner.adapter()


@pytest.mark.parametrize("dynamics", [FlowSde(a=0.7), Dance(eta=0.3), Cps(a=0.7)], ids=lambda d: type(d).__name__)
def test_ratio_is_exactly_one_before_the_first_update(config: RunConfig, dynamics: Dynamics) -> None:
    config = replace(config, sampling=replace(config.sampling, dynamics=dynamics))
    learner = Learner(config)
    (group,) = rolled_out(config, nudged(learner))
    policy = BoundPolicy(learner.model, group.conditioning, dynamics)
    for k in range(len(group.trajectories.steps_K)):
        assert torch.equal(policy.rescore(group.trajectories, k).logprob, group.trajectories.logprobs_GK[:, k])


def test_first_gradient_is_minus_advantage_times_score(config: RunConfig) -> None:
    learner = Learner(config)
    (group,) = rolled_out(config, nudged(learner))
    advantages = np.array([1.5, -0.5, -1.0, 0.0])
    seen = _gradient_of_update(learner, group, advantages)
    policy = BoundPolicy(learner.model, group.conditioning, config.sampling.dynamics)
    steps = len(group.trajectories.steps_K)
    for p in learner.parameters:
        p.grad = None
    for k in range(steps):
        logprob = policy.rescore(group.trajectories, k).logprob
        (-(torch.from_numpy(advantages).float() * logprob).sum() / (4 * steps)).backward()
    for p, gradient in zip(learner.parameters, seen, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-7)


def test_a_sibling_that_nobody_judged_is_in_no_pair(config: RunConfig) -> None:
    """Pareto's advantages are 0 for the dominated, which is the lowest of this group: a masked 0 must not come before it."""
    won = np.array([np.nan, 1.0, 0.5, np.nan])
    group = RewardedGroup(prompt_id="p0", rewards_G=won, breakdown_G={"overall": won, "dim": won})
    (advantages,), _ = Pareto()([group])
    assert advantages[2] == 0 < advantages[1] and np.isnan(advantages[[0, 3]]).all()
    by_pareto, by_pair = (Learner(replace(config, objective=Dpo())) for _ in range(2))
    (sampled,) = rolled_out(by_pareto.config, by_pareto.adapter())
    by_pareto.update([sampled], [advantages], 0)
    by_pair.update([sampled], [np.array([np.nan, 1.0, -1.0, np.nan])], 0)
    assert all(map(torch.equal, by_pareto.parameters, by_pair.parameters))


def _gradients(learner: Learner) -> list[torch.Tensor]:
    return [p.grad.clone() for p in learner.parameters if p.grad is not None]


def _gradient_of_update(learner: Learner, group: RolloutGroup, advantages: np.ndarray) -> list[torch.Tensor]:
    """The gradient that the optimiser is given, before clipping and without taking the step."""
    learner.config = replace(learner.config, optimizer=replace(learner.config.optimizer, max_grad_norm=1e9))
    found: list[torch.Tensor] = []
    learner.optimizer.register_step_pre_hook(lambda *_: found.extend(_gradients(learner)))
    before = [p.detach().clone() for p in learner.parameters]
    learner.update([group], [advantages], 0)
    with torch.no_grad():
        for p, old in zip(learner.parameters, before, strict=True):
            p.copy_(old)
    return found


@pytest.mark.parametrize("kl_beta", [0.0, 0.1])
def test_a_group_of_zero_advantages_has_zero_gradient_at_the_base(config: RunConfig, kl_beta: float) -> None:
    learner = Learner(replace(config, objective=Grpo(kl_beta=kl_beta)))
    learner._matters = lambda advantage: True  # the group is not passed over, which it would be without a pull
    (group,) = rolled_out(learner.config, learner.adapter())
    assert not any(g.any() for g in _gradient_of_update(learner, group, np.zeros(4)))


def _nudged_learner(config: RunConfig) -> Learner:
    learner = Learner(config)
    nudged(learner)
    return learner


def test_a_masked_member_carries_no_loss(config: RunConfig) -> None:
    learner = Learner(config)
    (group,) = rolled_out(config, nudged(learner))
    masked = _gradient_of_update(learner, group, np.array([1.0, -1.0, 0.5, np.nan]))
    fresh = Learner(config)
    fresh._matters = lambda advantage: True  # the group is not passed over
    zeroed = _gradient_of_update(fresh, group, np.array([0.0, 0.0, 0.0, np.nan]))
    went = group.trajectories.next_latents_GKNC.clone()
    went[3] = -went[3]  # the masked member went elsewhere
    other = replace(group, trajectories=replace(group.trajectories, next_latents_GKNC=went))
    again = _gradient_of_update(_nudged_learner(config), other, np.array([1.0, -1.0, 0.5, np.nan]))
    assert all(torch.isfinite(g).all() for g in masked) and any(g.any() for g in masked)
    for one, two in zip(masked, again, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)
    assert zeroed and not any(g.any() for g in zeroed)


@pytest.mark.parametrize(
    ("objective", "name", "value", "advantage"),
    [
        (Grpo(), "latents_GKNC", np.nan, np.nan),
        (Grpo(), "next_latents_GKNC", np.inf, 2.0),
        (Grpo(), "logprobs_GK", -1e4, np.nan),  # finite, but the ratio is not
        (Nft(draws=1), "final_GNC", np.nan, 2.0),
    ],
)
def test_what_is_infinite_in_one_sibling_leaves_the_others_their_gradient(
    config: RunConfig, objective: Objective, name: str, value: float, advantage: float
) -> None:
    """Whether the judge found something to like in it or not."""
    config = replace(config, objective=objective)
    learner, twin = _nudged_learner(config), _nudged_learner(config)
    (group,) = rolled_out(config, learner.adapter())
    broken = getattr(group.trajectories, name).clone()
    broken[3] = value
    other = replace(group, trajectories=replace(group.trajectories, **{name: broken}))
    expected = _gradient_of_update(learner, group, np.array([1.0, -1.0, 0.5, np.nan]))
    found = _gradient_of_update(twin, other, np.array([1.0, -1.0, 0.5, advantage]))
    assert any(g.any() for g in expected) and found and all(map(torch.equal, found, expected))


def test_siblings_that_are_not_finite_are_counted(config: RunConfig) -> None:
    learner = _nudged_learner(config)
    (group,) = rolled_out(config, learner.adapter())
    went = group.trajectories.next_latents_GKNC.clone()
    went[1:] = np.nan
    groups = [group, replace(group, trajectories=replace(group.trajectories, next_latents_GKNC=went))]
    metrics = learner.update(groups, [np.array([1.0, -1.0, 0.5, -0.5])] * 2, 0).metrics
    assert metrics["policy/nonfinite_share"] == 3 / 8 and metrics["policy/skipped_updates"] == 0


def test_figures_are_means_over_unmasked_siblings(config: RunConfig) -> None:
    """By hand, with r = A/4 + ½. A group of which little is left does not weigh as much as a whole one, in β's control neither."""
    learner = _nudged_learner(replace(config, objective=Nft(draws=2, kl_beta=0.1)))
    (group,) = rolled_out(learner.config, learner.adapter())
    whole, alone = np.array([2.0, 2.0, 2.0, -1.0]), np.array([np.nan, np.nan, -2.0, np.nan])
    kl: list[float] = []
    learner._close = lambda totals: kl.extend(totals["kl"])
    metrics = learner.update([group, group], [whole, alone], 0).metrics
    assert metrics["policy/optimality"] == (1 + 1 + 1 + 0.25 + 0) / 5
    assert len(kl) == 2 * 5 and len(set(kl)) == 8  # the third sibling stands in both groups


def test_masked_and_missing_groups_divide_the_loss_rightly(config: RunConfig) -> None:
    """The gradient is the mean over unmasked members, so a wholly masked group changes nothing."""
    learner = Learner(config)
    adapter = nudged(learner)
    one, two = rolled_out(config, adapter, (PROMPT, Prompt(id="p1", text="a blue square on a white background")))
    advantages = np.array([1.0, -1.0, 0.5, -0.5])
    alone = _gradient_of_update(learner, one, advantages)
    learner = Learner(config)
    nudged(learner)
    found: list[torch.Tensor] = []
    learner.config = replace(config, optimizer=replace(config.optimizer, max_grad_norm=1e9))
    learner.optimizer.register_step_pre_hook(lambda *_: found.extend(_gradients(learner)))
    learner.update([one, two], [advantages, np.full(4, np.nan)], 0)
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


@pytest.mark.parametrize("updates", [1, 2])
def test_a_head_start_changes_no_bit(config: RunConfig, updates: int) -> None:
    config = replace(config, optimizer=replace(config.optimizer, updates_per_rollout=updates))
    prompts = [Prompt(id=f"p{i}", text=f"a {colour} square") for i, colour in enumerate(("red", "green", "blue"))]
    advantages = [np.array(a) for a in ([1.0, -1.0, 0.5, -0.5], [1.0, np.nan, np.nan, -1.0], [np.nan] * 4)]
    straight, begun = Learner(config), Learner(config)
    for step in range(2):
        groups = rolled_out(config, replace(straight.adapter(), version=0), prompts)
        groups = [replace(group, policy_version=step) for group in groups]
        before = [p.detach().clone() for p in begun.parameters]
        for first in (1, 1, 2):
            new = {i: groups[i] for i in begun.to_begin(first, len(groups))}
            begun.begin(new, advantages[:first], len(groups), step)
        assert all(map(torch.equal, before, begun.parameters))
        assert begun.update(groups, advantages, step) == straight.update(groups, advantages, step)
        assert all(map(torch.equal, straight.parameters, begun.parameters))


def test_kl_pulls_back_to_the_base(config: RunConfig) -> None:
    learner = Learner(replace(config, objective=Grpo(kl_beta=1.0), optimizer=replace(config.optimizer, lr=1e-3)))
    groups = rolled_out(learner.config, nudged(learner))
    kl = [learner.update(groups, [np.zeros(4)], i).metrics["policy/kl"] for i in range(8)]
    assert kl[0] > 0 and kl[-1] < 0.8 * kl[0]


def test_the_pull_to_the_base_weighs_beta(config: RunConfig) -> None:
    """∇L(β) − ∇L(0) = β·∇KL, the mean over siblings and steps."""
    beta = 0.3
    pulled, free = (Learner(replace(config, objective=Grpo(kl_beta=b))) for b in (beta, 0.0))
    nudged(pulled, 0.2)
    (group,) = rolled_out(config, nudged(free, 0.2))
    seen = [_gradient_of_update(learner, group, np.array([1.5, -0.5, -1.0, 0.0])) for learner in (pulled, free)]
    policy = BoundPolicy(free.model, group.conditioning, config.sampling.dynamics)
    free.optimizer.zero_grad()
    steps = len(group.trajectories.steps_K)
    for term in Grpo(kl_beta=1.0).terms(policy, group.trajectories, torch.zeros(4), 0):
        assert term.kl_G is not None
        (term.kl_G.sum() / (4 * steps)).backward()
    for one, two, p in zip(*seen, free.parameters, strict=True):
        assert p.grad is not None and p.grad.any()
        torch.testing.assert_close(one - two, beta * p.grad, rtol=1e-3, atol=1e-3 * float(p.grad.abs().max()))


def test_better_siblings_become_likelier(config: RunConfig) -> None:
    learner = Learner(replace(config, objective=Grpo(clip=0.2)))
    (group,) = rolled_out(config, learner.adapter())
    advantages = np.array([1.0, -1.0, 1.0, -1.0])
    for i in range(3):
        learner.update([group], [advantages], i)
    policy = BoundPolicy(learner.model, group.conditioning, config.sampling.dynamics)
    with torch.no_grad():
        gained = torch.stack(
            [policy.rescore(group.trajectories, k).logprob - group.trajectories.logprobs_GK[:, k] for k in range(3)]
        ).mean(0)
    assert gained[[0, 2]].min() > 0 > gained[[1, 3]].max()


def test_sampling_depends_on_seed_step_prompt_and_sibling_only(config: RunConfig) -> None:
    learner = Learner(config)
    adapter = nudged(learner)
    fresh, busy = RolloutWorker(config, name="a"), RolloutWorker(config, name="b")
    busy.generate(5, Prompt(id="other", text="a blue square"), learner.adapter())
    one, two = fresh.generate(3, PROMPT, adapter), busy.generate(3, PROMPT, adapter)
    assert torch.equal(one.trajectories.next_latents_GKNC, two.trajectories.next_latents_GKNC)
    assert all(np.array_equal(a, b) for a, b in zip(one.media_G, two.media_G, strict=True))
    other = fresh.generate(4, PROMPT, adapter)
    assert not torch.equal(one.trajectories.latents_GKNC, other.trajectories.latents_GKNC)


@pytest.mark.parametrize("same", [True, False])
def test_same_or_different_initial_noise(config: RunConfig, same: bool) -> None:
    config = replace(config, sampling=replace(config.sampling, same_noise=same))
    (group,) = rolled_out(config, Learner(config).adapter())
    start = group.trajectories.latents_GKNC[:, 0]
    assert torch.equal(start[0], start[1]) is same
    assert not torch.equal(group.trajectories.next_latents_GKNC[0, 0], group.trajectories.next_latents_GKNC[1, 0])


def test_a_fetched_adapter_is_bit_identical_to_the_published_one(config: RunConfig) -> None:
    published = nudged(Learner(config))
    worker = RolloutWorker(config)
    worker.use(published)
    from grpo_flex.weights import read_adapter

    fetched = read_adapter(worker.model.transformer, published.version).tensors
    assert fetched.keys() == published.tensors.keys()
    assert all(torch.equal(fetched[k], published.tensors[k]) for k in fetched)


def test_an_adapter_of_another_shape_is_refused(config: RunConfig) -> None:
    other = Learner(replace(config, adapter=replace(config.adapter, rank=2))).adapter()
    with pytest.raises(ValueError, match=r"adapter\.rank"):
        RolloutWorker(config).use(other)


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_sampler_without_noise_equals_the_diffusers_pipeline(
    config: RunConfig, tmp_path: Path, guidance_embeds: bool
) -> None:
    pipeline: Any = tiny_flux(guidance_embeds)
    pipeline.save_pretrained(tmp_path)
    worker = RolloutWorker(override(config, [f"generator.model={tmp_path}"]))
    seeds = [11, 12]
    conditioning = worker.model.encode([PROMPT])[0]
    latents = worker._noise(seeds)
    with torch.no_grad():
        ours = worker.model.decode(worker.sample_ode(conditioning, seeds, 5))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=[PROMPT.text] * 2, height=32, width=32, num_inference_steps=5, guidance_scale=3.5,
        latents=latents, output_type="np", max_sequence_length=16,
    ).images  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a[0].astype(int) - (b * 255).round().astype(int)).max() <= 1  # one grey level of rounding


def test_the_saved_adapter_gives_the_trainers_pictures_in_a_stock_pipeline(config: RunConfig, tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    learner = Learner(config)
    adapter = nudged(learner, 0.3)
    path = learner.save_adapter(tmp_path)
    assert path.name == "pytorch_lora_weights.safetensors"
    worker = RolloutWorker(config)
    with torch.no_grad():
        worker.use(adapter)
        conditioning = worker.model.encode([PROMPT])[0]
        ours = worker.sample_ode(conditioning, [3], 4)
        base = RolloutWorker(config).sample_ode(conditioning, [3], 4)
    pipeline: Any = FluxPipeline.from_pretrained(_model(config))
    pipeline.load_lora_weights(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=PROMPT.text, height=32, width=32, num_inference_steps=4, latents=worker._noise([3]),
        output_type="latent", max_sequence_length=16,
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - base).abs().max() > 1e-2


def test_the_learning_rate_falls_on_a_line_after_the_warm_up(config: RunConfig) -> None:
    learner = Learner(
        override(config, ["steps=5", "optimizer.lr=1.0", "optimizer.lr_end=0.2", "optimizer.warmup_steps=1"])
    )
    rates = [learner._schedule(index) for index in range(6)]
    assert rates == pytest.approx([0.5, 0.8, 0.6, 0.4, 0.2, 0.2])
    assert learner.optimizer.param_groups[0]["lr"] == rates[-1]
