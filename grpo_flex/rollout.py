"""The rollout worker: a prompt becomes a group of siblings, with the steps that will be trained.

Knows nothing of Ray: ``actors.py`` makes an actor of it. What it samples depends on (run seed, step, prompt,
sibling) and the adapter alone, not on which worker does it or what it did before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from grpo_flex.config import RunConfig
from grpo_flex.dynamics import Past, Selection, Step, step
from grpo_flex.pictures import MOTION
from grpo_flex.prompts import seed_for
from grpo_flex.types import Adapter, Prompt, Role, RolloutGroup, Sample, Trajectories
from grpo_flex.weights import Whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from grpo_flex.generators.base import Conditioning, Model

UNTRAINED = Adapter(version=-1, tensors={}, role="base")
"""What a worker holds that was never given anything: the base model."""
HELDOUT_BATCH = 16
"""Held-out prompts in one batch at the most. A constant, like the next: pictures must not depend on the number of workers."""
HELDOUT_TOKENS = 65_536
"""Of latents in one batch, so that long clips are dealt out in smaller ones: a worker that gives no result for
``placement.rollout_timeout_s`` is taken to hang."""


class RolloutWorker:
    """Holds the generator with an adapter, and samples groups and held-out pictures.

    Args:
        model: a loaded one with an adapter, where it is shared with a learner.
    """

    def __init__(
        self, config: RunConfig, device: str = "cpu", name: str = "rollout-0", model: Model | None = None
    ) -> None:
        import torch

        torch.set_num_threads(config.placement.threads_per_worker)
        self.config, self.name = config, name
        self.model = model or config.generator.load(device)
        self.weights = None if model else config.adapter.attach(self.model, config.seed)
        self.loaded = (UNTRAINED.version, str(UNTRAINED.role))
        """(version, role) of the adapter that the model holds."""

    @property
    def together(self) -> int:
        """How many prompts ``sampling.batch_tokens`` lets into one forward pass; at least one."""
        sampling, tokens = self.config.sampling, self.model.latent_shape[0]
        branches = 2 if getattr(self.config.generator, "batched_guidance", False) else 1
        return max(1, sampling.batch_tokens // (tokens * sampling.group_size * branches))

    @property
    def heldout_together(self) -> int:
        """How many held-out prompts go into one batch; at least one."""
        tokens = self.heldout_model.latent_shape[0] * self.config.evaluation.samples_per_prompt
        return max(1, min(HELDOUT_BATCH, HELDOUT_TOKENS // tokens))

    def generate(self, step_index: int, prompt: Prompt, adapter: Adapter) -> RolloutGroup:
        """Sample the G siblings of one prompt with the given adapter."""
        return self.generate_together(step_index, [prompt], adapter)[0]

    def generate_together(self, step_index: int, prompts: Sequence[Prompt], adapter: Adapter) -> list[RolloutGroup]:
        """A group for each of the prompts, which go through the transformer in one batch."""
        import torch

        began = time.perf_counter()
        self.use(adapter)
        encoded = self.model.encode(prompts)
        paths = [self._path(step_index, p, c) for p, c in zip(prompts, encoded, strict=True)]
        with torch.no_grad():
            for schedule in dict.fromkeys(path.sigmas for path in paths):
                self._sample([path for path in paths if path.sigmas == schedule], schedule)
        return [self._group(path, step_index, adapter, began, len(prompts)) for path in paths]

    def _path(self, step_index: int, prompt: Prompt, conditioning: Conditioning) -> _Path:
        config = self.config.sampling
        seed = seed_for(self.config.seed, "rollout", step_index, prompt.id)
        seeds = tuple(seed_for(seed, sibling) for sibling in range(config.group_size))
        selection = config.window.select(config.steps, step_index, seed)
        # From the same noise siblings are one until the first step with noise: that prefix is computed once.
        return _Path(
            prompt=prompt,
            conditioning=conditioning,
            seeds=seeds,
            selection=selection,
            sigmas=selection.schedule(self.model.sigmas(config.steps)),
            generators=[_generator(seed_for(s, "sde")) for s in seeds],
            x=self._noise([seed] if config.same_noise else seeds),
        )

    def _group(self, path: _Path, step_index: int, adapter: Adapter, began: float, together: int) -> RolloutGroup:
        """The group at the end of a path; ``seconds`` is its share of the time that passed since ``began``."""
        import torch

        media = [m for part in self._parts(path.x) for m in self.model.decode(path.x[part])]
        pixels = torch.from_numpy(np.stack(media)).float() / 255
        return RolloutGroup(
            step=step_index,
            prompt=path.prompt,
            conditioning=path.conditioning,
            media_G=tuple(media),
            diversity={"latent": mean_distance(path.x), "pixel": mean_distance(pixels)},
            trajectories=self._record(path),
            seeds_G=path.seeds,
            policy_version=adapter.version,
            worker=self.name,
            seconds=(time.perf_counter() - began) / together,
        )

    def evaluate(self, prompts: Sequence[Prompt], adapter: Adapter) -> list[Sample]:
        """Held-out samples: plain ODE from noise that is fixed for the whole run, scored. One batch, or micro-batches."""
        import torch

        self.use(adapter)
        config, seed, model = self.config.evaluation, self.config.seed, self.heldout_model
        copies = [prompt for prompt in prompts for _ in range(config.samples_per_prompt)]
        seeds = [seed_for(seed, "heldout", p.id, i) for p in prompts for i in range(config.samples_per_prompt)]
        media = list[np.ndarray]()
        with torch.no_grad():
            for part in self._parts(seeds):
                conditioning = _together(model.encode(copies[part]))
                media += model.decode(
                    self.sample_ode(conditioning, seeds[part], self.config.sampling.eval_steps, model)
                )
        return [
            Sample(prompt=p, media=m, scores={**(config.scorer(m, p) if config.scorer else {}), **motion(m)})
            for p, m in zip(copies, media, strict=True)
        ]

    def use(self, adapter: Adapter) -> None:
        """Load the adapter unless it is loaded already.

        Raises:
            ValueError: tensors of another model, or none for what the model does not hold.
        """
        if (adapter.version, adapter.role) != self.loaded:
            if not adapter.tensors:
                raise ValueError(
                    f"{self.name} was called without the {adapter.role} weights of version {adapter.version}, but it holds "
                    f"{self.loaded}; this is a fault of the program, not of the configuration"
                )
            self.loaded = (-1, "")  # a write that fails half way leaves no adapter that could be used
            assert self.weights is not None, "a shared model is lent what it needs"
            self.weights.write(adapter.tensors)
            self.loaded = (adapter.version, adapter.role)

    def receive(self, version: int, role: Role, fill: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Let ``fill`` overwrite all weights in place with those of that version; until it is done, they are none's."""
        assert isinstance(self.weights, Whole), "a validated configuration broadcasts no LoRA adapter"
        self.loaded = (-1, "")
        fill(self.weights.held())
        self.loaded = (version, role)

    @property
    def heldout_model(self) -> Model:
        """The model, for samples of the size of held-out ones."""
        wanted = self.config.heldout_generator
        return self.model if wanted == self.config.generator else self.model.resized(wanted)

    def sample_ode(
        self, conditioning: Conditioning, seeds: Sequence[int], steps: int, model: Model | None = None
    ) -> Tensor:
        """Clean latents [len(seeds), N, C] by the held-out samples' solver; ``model``: the same for another size."""
        model = model or self.model
        x, past = self._noise(seeds, model), None
        for sigma, sigma_next in pairwise(model.sigmas(steps)):
            v = model.velocity(x, sigma, conditioning)
            x, past = self.config.sampling.eval_solver.advance(x, v, sigma, sigma_next, past), Past(v, sigma)
        return x

    def _sample(self, paths: Sequence[_Path], sigmas: Sequence[float]) -> None:
        """Take all paths from noise to clean latents, each with noise and solver as its own selection says."""
        import torch

        batch = _Batch(paths)
        for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            for path in paths:
                path.x = _branched(path.x, len(path.seeds)) if i in self._stochastic(path) else path.x
            x, conditioning = batch.now()
            v = torch.cat([self.model.velocity(x[part], sigma, conditioning) for part in self._parts(x)])
            for path, own in zip(paths, v.split([len(path.x) for path in paths]), strict=True):
                self._advance(path, i, own, sigma, sigma_next)

    def _parts(self, rows: Sized) -> list[slice]:
        return self.config.sampling.micro_batches(len(rows))

    def _stochastic(self, path: _Path) -> frozenset[int]:
        return path.selection.stochastic if self.config.sampling.dynamics.stochastic else frozenset()

    def _trained(self, path: _Path) -> tuple[int, ...]:
        return path.selection.trained if self.config.objective.needs_noise else ()

    def _advance(self, path: _Path, i: int, v: Tensor, sigma: float, sigma_next: float) -> None:
        """One step of one path, from σ to the next."""
        config = self.config.sampling
        if i not in self._stochastic(path):
            path.x, path.past = config.solver.advance(path.x, v, sigma, sigma_next, path.past), Past(v, sigma)
            return
        noise = _normal(self.model.latent_shape, path.generators).to(path.x.device)
        now = joined(
            [step(config.dynamics, path.x[p], v[p], sigma, sigma_next, noise=noise[p]) for p in self._parts(v)]
        )
        if i in self._trained(path):
            path.before.append(path.x)
            path.taken.append(now)
        path.x, path.past = now.next_sample, None  # the path that a solver extrapolates ends where noise comes in

    def _record(self, path: _Path) -> Trajectories:
        objective = self.config.objective
        return _record(
            self._trained(path),
            path.sigmas,
            path.before,
            path.taken,
            objective.keeps_means,
            path.x,
            objective.keeps_final,
        )

    def _noise(self, seeds: Sequence[int], model: Model | None = None) -> Tensor:
        """Initial noise, one draw a seed, made on the CPU so that every device gets the same numbers."""
        model = model or self.model
        return _normal(model.latent_shape, [_generator(seed_for(s, "start")) for s in seeds]).to(model.device)


@dataclass(kw_only=True)
class _Path:
    """The siblings of one prompt on their way from noise to clean latents."""

    prompt: Prompt
    conditioning: Conditioning
    seeds: tuple[int, ...]
    selection: Selection
    sigmas: tuple[float, ...]
    generators: list[torch.Generator]
    x: Tensor
    """[G, N, C]; [1, N, C] while the siblings are still one."""
    past: Past | None = None
    before: list[Tensor] = field(default_factory=list)
    taken: list[Step] = field(default_factory=list)
    """The trained steps, and the latents before them."""


class _Batch:
    """Paths as one batch. Their conditionings are put together anew only where a path has branched."""

    def __init__(self, paths: Sequence[_Path]) -> None:
        self._paths, self._rows = paths, [0] * len(paths)
        self._conditioning: Conditioning = {}

    def now(self) -> tuple[Tensor, Conditioning]:
        """Latents of all paths, and what conditions each row; one path's own, as it is, has a single row."""
        import torch

        if len(self._paths) == 1:
            return self._paths[0].x, self._paths[0].conditioning
        rows = [len(path.x) for path in self._paths]
        if rows != self._rows:
            each = [path.conditioning for path, n in zip(self._paths, rows, strict=True) for _ in range(n)]
            self._rows, self._conditioning = rows, _together(each)
        return torch.cat([path.x for path in self._paths]), self._conditioning


def _together(conditionings: Sequence[Conditioning]) -> Conditioning:
    """Conditionings of different prompts as one batch, padded with zeros to the longest (a mask belongs to those that differ)."""
    import torch
    from torch.nn.functional import pad

    def joined(name: str) -> Tensor:
        tensors = [c[name] for c in conditionings]
        if tensors[0].ndim > 1:
            longest = max(t.shape[1] for t in tensors)
            tensors = [pad(t, [0, 0] * (t.ndim - 2) + [0, longest - t.shape[1]]) for t in tensors]
        return torch.cat(tensors)

    return {name: joined(name) for name in conditionings[0]}


def joined(parts: Sequence[Step]) -> Step:
    """The same step of all siblings, from that of each part: a sum over latents may depend on how many there are beside it."""
    import torch

    following, logprobs, means, stds = zip(*parts, strict=True)
    return Step(torch.cat(following), torch.cat(logprobs), torch.cat(means), stds[0])


def _branched(x: Tensor, siblings: int) -> Tensor:
    """[siblings, N, C]: one path becomes one for each sibling."""
    return x if x.shape[0] == siblings else x.expand(siblings, -1, -1).contiguous()


def mean_distance(points: Tensor) -> float:
    """Mean over all pairs of siblings of the root mean square difference of their elements.

    Args:
        points: [G, …], G > 1.
    """
    import torch

    flat = points.flatten(1).float()
    return float(torch.pdist(flat).mean() / flat.shape[1] ** 0.5)


def motion(media: np.ndarray) -> dict[str, float]:
    """{"motion": mean change of a pixel from frame to frame, white − black = 1}; nothing of a picture.

    Rewards that ignore motion are known to freeze videos: this is what would fall.

    Args:
        media: uint8 [F, H, W, 3].
    """
    if len(media) < 2:
        return {}
    return {MOTION: float(np.abs(np.diff(media.astype(np.float32), axis=0)).mean() / 255)}


def _generator(seed: int) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(seed)


def _normal(shape: tuple[int, int], generators: Sequence[torch.Generator]) -> Tensor:
    """One standard normal draw from each generator, [len(generators), *shape]: siblings never share a stream."""
    import torch

    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def _record(
    steps_K: tuple[int, ...],
    sigmas: tuple[float, ...],
    before: list[Tensor],
    taken: list[Step],
    keep_means: bool,
    final: Tensor,
    keep_final: bool,
) -> Trajectories:
    import torch

    def stack(tensors: list[Tensor], empty: Tensor) -> Tensor:
        """[G, K, …] on the CPU, where any process can receive it, also for K = 0 (an objective that looks at x_0 alone)."""
        return torch.stack([empty, *tensors], dim=1)[:, 1:].cpu()

    return Trajectories(
        latents_GKNC=stack(before, final),
        next_latents_GKNC=stack([s.next_sample for s in taken], final),
        steps_K=steps_K,
        sigmas=sigmas,
        logprobs_GK=stack([s.logprob for s in taken], final.new_zeros(final.shape[0])),
        means_GKNC=stack([s.mean for s in taken], final) if keep_means else None,
        final_GNC=final.cpu() if keep_final else None,
    )
