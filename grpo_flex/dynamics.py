"""One step function that both samples and re-scores, the dynamics behind it, and the windows of trained steps.

Convention (rectified flow): σ runs from 1 (noise) to 0, x_σ = (1−σ)·x0 + σ·ε, v = ε − x0, Δ = σ − σ' > 0.
From a velocity, x̂0 = x − σv and ε̂ = x + (1−σ)v.

A dynamics gives mean and standard deviation of one step x_σ -> x_σ'. Because sampling and re-scoring call the
same ``step``, rollout and update cannot drift apart: with the same weights the ratio is exactly 1.

Sources: Flow-GRPO (arXiv 2505.05470, eq. 8–9), DanceGRPO (2505.07818), Flow-CPS (2509.05952), MixGRPO (2507.21802).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Past(NamedTuple):
    """The step before, for a solver with a memory."""

    v: Tensor
    sigma: float


class Solver(Protocol):
    """Takes the steps without noise: held-out samples, and what a window leaves of a rollout."""

    def advance(self, x: Tensor, v: Tensor, sigma: float, sigma_next: float, past: Past | None) -> Tensor:
        """x_σ'. ``past`` is None for the first step, and for the first one after a step with noise."""
        ...


class Dynamics(Protocol):
    """Mean and standard deviation of one denoising step."""

    diffuses: ClassVar[bool]
    """Whether the noise is that of a diffusion s, so that std = s√Δ and the mean moves with the velocity by about Δ."""

    @property
    def stochastic(self) -> bool:
        """Whether any step has noise: without noise there is no density to learn from."""
        ...

    def moments(self, x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, float]:
        """(μ, shape of x; std, the same for every element)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Ode:
    """Euler steps of the probability-flow ODE: μ = x − vΔ, std = 0."""

    diffuses: ClassVar[bool] = True

    @property
    def stochastic(self) -> bool:
        return False

    def moments(self, x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, float]:
        return x - v * (sigma - sigma_next), 0.0

    def advance(self, x: Tensor, v: Tensor, sigma: float, sigma_next: float, past: Past | None) -> Tensor:
        return x - v * (sigma - sigma_next)


@dataclass(frozen=True, kw_only=True)
class Multistep:
    """A second-order multistep solver at one model call a step: Adams–Bashforth, x' = x − Δ·(v + Δ/(2Δ_past)·(v − v_past)).

    It extrapolates the velocity to the middle of the step. DPM-Solver++(2M) (arXiv 2211.01095), which MixGRPO-Flash
    takes, does the same for x̂0 in the log signal-to-noise ratio, which is infinite at σ = 1 and σ = 0: its first two
    steps and its last are Euler's. In σ only the very first one is.
    """

    def advance(self, x: Tensor, v: Tensor, sigma: float, sigma_next: float, past: Past | None) -> Tensor:
        delta = sigma - sigma_next
        if past is not None:
            v = v + delta / (2 * (past.sigma - sigma)) * (v - past.v)
        return x - v * delta


@dataclass(frozen=True, kw_only=True)
class FlowSde:
    """Flow-GRPO's SDE: diffusion s = a·√(σ/(1−σ)), std = s√Δ.

    At σ = 1 the denominator takes the next σ, which makes the first step's std exactly a whatever the schedule.
    """

    a: float = 0.7
    diffuses: ClassVar[bool] = True

    @property
    def stochastic(self) -> bool:
        return self.a != 0

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.a < 0:
            yield "a", f"is {self.a}; a noise level cannot be negative (0 is the ODE)"

    def moments(self, x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, float]:
        s = self.a * math.sqrt(sigma / (1 - (sigma_next if sigma >= 1 else sigma)))
        return _sde_moments(x, v, sigma, sigma_next, s)


@dataclass(frozen=True, kw_only=True)
class Dance:
    """DanceGRPO's SDE: the same drift as Flow-SDE with a constant diffusion s = η."""

    eta: float = 0.3
    diffuses: ClassVar[bool] = True

    @property
    def stochastic(self) -> bool:
        return self.eta != 0

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.eta < 0:
            yield "eta", f"is {self.eta}; a noise level cannot be negative (0 is the ODE)"

    def moments(self, x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, float]:
        return _sde_moments(x, v, sigma, sigma_next, self.eta)


def _sde_moments(x: Tensor, v: Tensor, sigma: float, sigma_next: float, s: float) -> tuple[Tensor, float]:
    """x' = x + (v + s²/(2σ)·(x + (1−σ)v))·dt + s·√Δ·noise, with dt = −Δ (Flow-GRPO eq. 9)."""
    delta = sigma - sigma_next
    pull = s * s * delta / (2 * sigma)
    return x * (1 - pull) - v * (delta + pull * (1 - sigma)), s * math.sqrt(delta)


@dataclass(frozen=True, kw_only=True)
class Cps:
    """Coefficient-preserving sampling: c = σ'·sin(aπ/2) of the noise is fresh, the rest is the predicted noise.

    a = 0 is the Euler ODE, a = 1 replaces all the noise; the total noise level is σ' for every a (Flow-CPS).

    Steps are scored by the whole density of Normal(μ, c²), as everywhere here. Flow-CPS's own code leaves out the 1/(2c²), so
    its log-ratios are 2c² times ours, and a clip range published for it means another one here.
    """

    a: float = 0.7
    diffuses: ClassVar[bool] = False

    @property
    def stochastic(self) -> bool:
        return self.a != 0

    def problems(self) -> Iterator[tuple[str, str]]:
        if not 0 <= self.a <= 1:
            yield (
                "a",
                f"is {self.a}; for CPS it needs to lie between 0 (the ODE) and 1 (all noise is fresh), above which σ'² − c² is negative",
            )

    def moments(self, x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, float]:
        if self.a == 0:  # the same value, free of the rounding of the longer way round
            return x - v * (sigma - sigma_next), 0.0
        c = sigma_next * math.sin(self.a * math.pi / 2)
        clean, noise = x - sigma * v, x + (1 - sigma) * v
        return (1 - sigma_next) * clean + math.sqrt(max(sigma_next**2 - c**2, 0.0)) * noise, c


class Step(NamedTuple):
    """What one denoising step did, or would have done."""

    next_sample: Tensor
    """x_σ', [B, N, C]."""
    logprob: Tensor
    """[B], nats, mean over N·C; 0 for a deterministic step."""
    mean: Tensor
    """μ, [B, N, C]."""
    std: float


def step(
    dynamics: Dynamics,
    x: Float[Tensor, "B N C"],
    v: Float[Tensor, "B N C"],
    sigma: float,
    sigma_next: float,
    *,
    noise: Float[Tensor, "B N C"] | None = None,
    next_sample: Float[Tensor, "B N C"] | None = None,
) -> Step:
    """Take one step, or re-score a given one.

    Args:
        x: latents at ``sigma``; the arithmetic is done in their precision (float32 or better).
        v: predicted velocity.
        noise: standard normal, to sample with. Not needed by a deterministic step.
        next_sample: a step taken earlier, to be re-scored instead of sampled.

    Raises:
        ValueError: a stochastic step with neither noise nor a sample to score.
    """
    mean, std = dynamics.moments(x, v.to(x.dtype), sigma, sigma_next)
    if next_sample is None:
        if std == 0:
            next_sample = mean
        elif noise is None:
            raise ValueError("a stochastic step needs noise to sample with, or next_sample to score")
        else:
            next_sample = mean + std * noise
    return Step(next_sample, gaussian_logprob(next_sample, mean, std), mean, std)


def gaussian_logprob(sample: Float[Tensor, "B N C"], mean: Float[Tensor, "B N C"], std: float) -> Float[Tensor, " B"]:
    """log Normal(sample; mean, std), *mean* over all dimensions but the first, nats.

    The mean rather than the sum is what makes clip ranges of 1e-4 … 1e-5 meaningful (Flow-GRPO). A step
    without noise has no density; it gets 0 and must not be trained.
    """
    if std == 0:
        return sample.new_zeros(sample.shape[0])
    density = -((sample - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(dim=1)


def shifted_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """FLUX's schedule, and nearly Wan's: u = 1 − k/steps, σ = shift·u/(1 + (shift−1)u), then 0.

    diffusers' scheduler for Wan takes u = 1 − 0.999·k/steps, which differs most at the end.

    Written so that the first σ is exactly 1 in floating point.
    """
    us = [1 - k * (1 - 1 / steps) / (steps - 1) if steps > 1 else 1.0 for k in range(steps)]
    return (*(shift * u / (1 - u + shift * u) for u in us), 0.0)


# ---------------------------------------------------------------- windows


class Selection(NamedTuple):
    """Which steps of a rollout get noise, and which of those are trained (indices, ascending)."""

    stochastic: frozenset[int]
    trained: tuple[int, ...]
    skipped: frozenset[int] = frozenset()
    """Entries of the schedule that the rollout leaves out, all after the last trained step."""

    def schedule(self, sigmas: tuple[float, ...]) -> tuple[float, ...]:
        """The σ that the rollout visits. Indices of stochastic and trained steps stay as they are."""
        return tuple(sigma for i, sigma in enumerate(sigmas) if i not in self.skipped)


class Window(Protocol):
    """Chooses the steps of one group. The last step is never stochastic: the judge sees clean media."""

    def select(self, steps: int, iteration: int, seed: int) -> Selection:
        """``iteration`` counts training steps; ``seed`` is the group's own, shared by its siblings."""
        ...

    def fits(self, steps: int) -> Iterator[tuple[str, str]]:
        """(field, complaint) for a window that a schedule of so many steps cannot hold."""
        ...


@dataclass(frozen=True, kw_only=True)
class AllButLast:
    """Every step but the last is stochastic and trained (Flow-GRPO)."""

    def select(self, steps: int, iteration: int, seed: int) -> Selection:
        return Selection(frozenset(range(steps - 1)), tuple(range(steps - 1)))

    def fits(self, steps: int) -> Iterator[tuple[str, str]]:
        return iter(())


@dataclass(frozen=True, kw_only=True)
class RandomFraction:
    """Every step but the last is stochastic; a random share of them is trained (Pref-GRPO: 0.6)."""

    fraction: float = 0.6
    shared: bool = False
    """All groups of a training step train the same steps; otherwise each has its own choice."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if not 0 < self.fraction <= 1:
            yield "fraction", f"is {self.fraction}; it is the share of the steps to train, above 0 and at most 1"

    def select(self, steps: int, iteration: int, seed: int) -> Selection:
        count, chance = max(1, round(self.fraction * (steps - 1))), random.Random(iteration if self.shared else seed)
        return Selection(frozenset(range(steps - 1)), tuple(sorted(chance.sample(range(steps - 1), count))))

    def fits(self, steps: int) -> Iterator[tuple[str, str]]:
        return iter(())


@dataclass(frozen=True, kw_only=True)
class FastWindow:
    """Flow-GRPO-Fast: a few adjacent stochastic steps that start somewhere early, ODE elsewhere."""

    size: int = 2
    last_start: int = 0
    """The window starts at a random step between 0 and this one; 0 pins it to the beginning."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.size < 1:
            yield "size", f"is {self.size}; at least 1 step has to be trained"
        if self.last_start < 0:
            yield "last_start", f"is {self.last_start}; it is the index of a step, 0 or more"

    def select(self, steps: int, iteration: int, seed: int) -> Selection:
        start = random.Random(seed).randint(0, self.last_start)
        chosen = tuple(range(start, start + self.size))
        return Selection(frozenset(chosen), chosen)

    def fits(self, steps: int) -> Iterator[tuple[str, str]]:
        if self.size > steps - 1:
            yield "size", _too_long(0, self.size, steps)
        elif self.last_start + self.size > steps - 1:
            yield (
                "last_start",
                f"is {self.last_start}; a window of {self.size} that begins there would reach step "
                f"{self.last_start + self.size - 1}, but only steps 0…{steps - 2} of sampling.steps={steps} can be trained (the last "
                f"one is always ODE); make it {steps - 1 - self.size} or less, or the schedule longer",
            )


@dataclass(frozen=True, kw_only=True)
class SlidingWindow:
    """MixGRPO: a window that slides over the schedule as training goes on, ODE elsewhere."""

    size: int = 4
    stride: int = 1
    every: int = 25
    """Training steps between two moves; after the last position it begins anew."""
    flash: float = 1.0
    """The share of the steps after the window that is left. MixGRPO-Flash: below 1, with ``sampling.solver=Multistep()``."""

    def problems(self) -> Iterator[tuple[str, str]]:
        for name in ("size", "stride", "every"):
            if getattr(self, name) < 1:
                yield name, f"is {getattr(self, name)}; it needs at least 1"
        if not 0 < self.flash <= 1:
            yield "flash", f"is {self.flash}; it is the share of steps left after the window, above 0 and at most 1"

    def select(self, steps: int, iteration: int, seed: int) -> Selection:
        positions = range(0, steps - self.size, self.stride)
        start = positions[(iteration // self.every) % len(positions)]
        chosen = tuple(range(start, start + self.size))
        return Selection(frozenset(chosen), chosen, _thinned(start + self.size, steps, self.flash))

    def fits(self, steps: int) -> Iterator[tuple[str, str]]:
        if self.size > steps - 1:
            yield "size", _too_long(0, self.size, steps)


def _thinned(first: int, last: int, share: float) -> frozenset[int]:
    """Entries to leave out between two that stay, so that about ``share`` of the steps between them is left."""
    left = max(1, round(share * (last - first)))
    kept = {first + round(j * (last - first) / left) for j in range(left + 1)}
    return frozenset(range(first, last + 1)) - kept


def _too_long(start: int, size: int, steps: int) -> str:
    return (
        f"is {size}; a window that may start at step {start} would reach step {start + size - 1}, but only steps "
        f"0…{steps - 2} of sampling.steps={steps} can be trained (the last one is always ODE); make it shorter, or the schedule longer"
    )
