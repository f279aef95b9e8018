"""What an experiment will need, without a GPU and without weights: memory by process, FLOPs, judge calls, time.

The learner and a rollout worker are built for real, on torch's meta device, from the pipeline's configuration, and one
denoising step, one decoding and one pass of the objective run through them. Parameters, adapters and FLOPs of the
transformer are therefore exact. Memory is the largest sum of bytes that were alive at one time; a GPU's allocator
rounds them up, and CUDA's context, the libraries' workspaces and fragmentation come on top; for those of the VAE's
convolutions a share is assumed (``WORKSPACES``), because they were seen to be large. Not counted either: the activations and FLOPs of the text encoders, and the scales of quantised weights (bits themselves are).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from grpo_flex.config import ConfigError, Full, RunConfig

if TYPE_CHECKING:
    from grpo_flex.learner import Learner
    from grpo_flex.tracing import LiveBytes
    from grpo_flex.types import Trajectories

GIB = 2**30
WORKSPACES = 0.3
"""Of the VAE's activations while it decodes: what its convolutions need besides, such as their input in another order. A
quarter was measured on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """One kind of process and the bytes that it holds, by part, at each moment that may be its fullest."""

    name: str
    count: int
    gpus: float
    """Of a card; 0: on the CPU."""
    moments: Mapping[str, Mapping[str, int]]
    stays: Mapping[str, int]
    """What is there from the start to the end, whatever is done with it."""

    @property
    def fullest(self) -> str:
        """The moment with the most bytes."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Mapping[str, int]:
        """What it holds at its fullest."""
        return self.moments[self.fullest]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def lasting(self) -> int:
        return sum(self.stays.values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    config: RunConfig
    parameters: Mapping[str, int]
    """Of each component, without the adapter."""
    adapter: int
    """Parameters that are trained."""
    processes: tuple[Process, ...]
    stored: int
    """Bytes of one step's groups in Ray's object store, on the host: trajectories, encodings, media."""
    published: int = 0
    """Bytes of weights on the host: what was published (nothing with ``placement.broadcast``, unless a worker misses it),
    the learners' newest state, and copies that they keep there."""
    forward_flops: int
    """Of one denoising step of a whole group."""
    rollout_flops: int
    """Of all groups of a step, decoding included."""
    longest_call: int = 0
    """FLOPs of a worker's longest call: groups that it samples together, or a batch of held-out samples."""
    update_flops: int
    judge_calls: int

    def cards(self) -> list[list[Process]]:
        """Which processes share a card: each goes to the first with enough of it left, as Ray packs them."""
        cards: list[list[Process]] = []
        for process in (p for p in self.processes if p.gpus for _ in range(p.count)):
            free = (card for card in cards if sum(p.gpus for p in card) + process.gpus <= 1 + 1e-9)
            if (card := next(free, None)) is not None:
                card.append(process)
            else:
                cards.extend([[process]] * max(1, math.ceil(process.gpus)))
        return cards

    def fullest(self) -> int:
        """Bytes on the card that holds most."""
        return max((sum(p.total for p in card) for card in self.cards()), default=0)

    def lasting(self) -> int:
        """The same of what lasts alone: no smaller group and no recomputation takes anything from it."""
        return max((sum(p.lasting for p in card) for card in self.cards()), default=0)

    def fits(self, gpus: int, gpu_memory: float) -> bool:
        """Whether there are cards enough, and the fullest one holds what lies on it.

        Args:
            gpu_memory: of each card, GiB.
        """
        return len(self.cards()) <= gpus and self.fullest() <= gpu_memory * GIB


def make_plan(config: RunConfig) -> Plan:
    """Trace one experiment: seconds for pictures, more for clips, whose decoding has many steps.

    Raises:
        ConfigError: a model whose configuration is not known here, or that is of no kind that can be traced.
    """
    from grpo_flex.generators.blank import without_weights

    try:
        parameters = {
            name: sum(p.numel() for p in part.parameters()) for name, part in _modules(_blank(config)).items()
        }
        with without_weights():
            learner, adapter, update, published = _learner(config)
            worker, forward, rollout, longest, stored = _worker(config)
    except (AttributeError, KeyError, StopIteration) as error:
        if type(config.generator).__module__.startswith("grpo_flex."):
            raise
        raise ConfigError(
            f"generator {type(config.generator).__name__} cannot be planned ({type(error).__name__}: {error}): it has to have a "
            "folder of a diffusers pipeline as its `model`, and where its encodings have names of their own its loaded model "
            "needs a method stand_in(), which gives zeros in the shapes of one (generators/blank.py)"
        ) from error
    groups = config.prompts.per_step
    return Plan(
        config=config,
        parameters=parameters,
        adapter=adapter,
        processes=(_as_one(worker, learner),) if config.placement.colocated else (worker, learner),
        stored=groups * stored,
        published=published,
        forward_flops=forward,
        rollout_flops=groups * rollout,
        longest_call=longest,
        update_flops=groups * update,
        judge_calls=judge_calls(config),
    )


def judge_calls(config: RunConfig) -> int:
    """Questions to the judge in one training step."""
    if config.judge is None:
        return 0
    return config.prompts.per_step * len(config.judge.questions(config.sampling.group_size, 0))


# ---------------------------------------------------------------- tracing


def _traceable(config: RunConfig) -> RunConfig:
    """The same generator without what meta tensors cannot do: sleep on the CPU, be compiled, be quantised."""
    memory = getattr(config.generator, "memory", None)
    if memory is None:
        return config
    plain = replace(memory, offload=False, compile=False, attention="native", base_bits=0, encodings="")
    adapter = replace(config.adapter, copies="device") if isinstance(config.adapter, Full) else config.adapter
    return replace(config, adapter=adapter, generator=replace(config.generator, memory=plain))  # pyright: ignore[reportArgumentType]


def _memory(config: RunConfig, field: str) -> Any:
    """A field of the generator's ``memory``; None for a generator without."""
    return getattr(getattr(config.generator, "memory", None), field, None)


def _blank(config: RunConfig) -> Any:
    """The generator's whole pipeline on the meta device, text encoders included, in its own precision."""
    import diffusers
    import torch

    from grpo_flex.generators.blank import blank_pipeline, describe

    generator: Any = config.generator
    described, dtype = describe(generator.model), getattr(torch, generator.dtype)
    of_vae = getattr(torch, getattr(generator, "vae_dtype", generator.dtype))
    cls = getattr(diffusers, described.index["_class_name"])
    pipeline = blank_pipeline(cls, described, {"default": dtype, "vae": of_vae}, "meta", {})
    for part in _modules(pipeline).values():
        part.requires_grad_(False)
    return pipeline


def _modules(pipeline: Any) -> dict[str, Any]:
    import torch

    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def _weights(config: RunConfig, modules: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the weights of each component; those of an adapter are counted elsewhere."""
    full = isinstance(config.adapter, Full)
    bits = _memory(config, "base_bits") or 0
    sizes = {}
    for name, part in modules.items():
        quantised = bits if name.startswith("transformer") else 0
        own = [p for p in part.parameters() if full or not p.requires_grad]
        sizes[name] = sum(_size(p, quantised) for p in own) + sum(b.nbytes for b in part.buffers())
    return sizes


def _size(parameter: Any, bits: int) -> int:
    """bitsandbytes quantises the matrices of linear layers and leaves the rest."""
    return parameter.numel() * bits // 8 if bits and parameter.ndim == 2 else parameter.nbytes


def _learner(config: RunConfig) -> tuple[Process, int, int, int]:
    """The learner, the parameters that it trains, the FLOPs of one group's update, and bytes of weights on the host."""
    import torch

    from grpo_flex.generators.blank import stand_in
    from grpo_flex.learner import BoundPolicy, Learner
    from grpo_flex.tracing import LiveBytes, cost

    threads, live = torch.get_num_threads(), LiveBytes()
    with live:
        learner = Learner(_traceable(config), "meta")
        learner.optimizer.step()  # makes its state, as the first update will
    torch.set_num_threads(threads)
    model: Any = learner.model
    trained = live.now - sum(_weights(_traceable(config), _modules(model.pipeline)).values())
    size = at_once = config.sampling.group_size
    if not config.objective.whole_groups:
        at_once = min(size, config.sampling.micro_batch or size)
    trajectories = blank_trajectories(config, model.latent_shape, at_once)
    old = learner._old if config.optimizer.updates_per_rollout > 1 or config.objective.old_decay(1000) else ()
    policy = BoundPolicy(model, stand_in(model), config.sampling.dynamics, learner.weights, old)

    def one_pass() -> None:
        advantages = torch.zeros(at_once, device="meta")
        term = next(iter(config.objective.terms(policy, trajectories, advantages, 0)))
        (term.loss_G if term.kl_G is None else term.loss_G + term.kl_G).sum().backward()

    spent, place = cost(one_pass, live), config.placement
    weights = _weights(config, _modules(model.pipeline))
    if _memory(config, "offload"):
        weights.pop("vae", None)
    full = config.adapter if isinstance(config.adapter, Full) else None
    aside = sum(t.nbytes for t in learner.apart) if full and full.copies == "cpu" else 0
    trained -= aside
    parts = place.learners if place.shard_base else 1
    weights = {n: math.ceil(s / parts) if n.startswith("transformer") else s for n, s in weights.items()}
    lasting = {f"weights: {name}": size for name, size in weights.items()}
    lasting[f"{'float32 weights' if full else 'adapter'}, gradient, averages, AdamW"] = (
        math.ceil(trained / parts) if full else trained
    )
    process = Process(
        name="learner", count=place.learners, gpus=place.learner_gpus,
        moments={"updating": lasting | {"activations": spent.peak}}, stays=lasting,
    )  # fmt: skip
    host = aside * (place.learners if parts == 1 else 1) + _published(config, learner)
    count = sum(p.numel() for p in learner.parameters)
    return process, count, config.objective.passes(trajectories) * spent.flops * size // at_once, host


def _published(config: RunConfig, learner: Learner) -> int:
    """What samples the present step and each one ahead, in the model's precision, and the state after an update."""
    widths = [p.nbytes for p in learner.model.transformer.parameters() if p.requires_grad]
    exact = sum(p.nbytes for p in learner.parameters)
    state = 3 * exact + sum(t.nbytes for t in learner.apart) - sum(t.nbytes for t in learner.weights.kept)
    versions = 0 if config.placement.broadcast else 1 + config.sampling.lookahead
    return versions * sum(widths) + (state if config.adapter.state_each_step else 0)


def blank_trajectories(config: RunConfig, shape: tuple[int, int], size: int, device: str = "meta") -> Trajectories:
    """What a rollout keeps of so many siblings with latents [N, C]; zeros, or on ``meta`` no values at all."""
    import torch

    from grpo_flex.dynamics import shifted_sigmas
    from grpo_flex.types import Trajectories

    sampling, objective = config.sampling, config.objective
    selection = sampling.window.select(sampling.steps, 0, 0)
    trained = selection.trained if objective.needs_noise else ()
    kept = torch.zeros(size, len(trained), *shape, device=device)
    return Trajectories(
        latents_GKNC=kept,
        next_latents_GKNC=torch.zeros_like(kept),
        steps_K=trained,
        sigmas=selection.schedule(shifted_sigmas(sampling.steps, 3.0)),
        logprobs_GK=torch.zeros(size, len(trained), device=device),
        means_GKNC=torch.zeros_like(kept) if objective.keeps_means else None,
        final_GNC=torch.zeros(size, *shape, device=device) if objective.keeps_final else None,
    )


def _worker(config: RunConfig) -> tuple[Process, int, int, int, int]:
    """A rollout worker; FLOPs of a denoising step, of the rollout of one group and of the longest call; bytes that a group
    leaves on the host."""
    import torch

    from grpo_flex.generators.blank import stand_in
    from grpo_flex.rollout import RolloutWorker
    from grpo_flex.tracing import LiveBytes

    threads, live, size = torch.get_num_threads(), LiveBytes(), config.sampling.group_size
    with live, torch.no_grad():
        worker = RolloutWorker(_traceable(config), "meta")
        model: Any = worker.model
        heldout_model: Any = worker.heldout_model
        told = stand_in(model)
    torch.set_num_threads(threads)
    adapter = live.now - sum(_weights(_traceable(config), _modules(model.pipeline)).values())
    if isinstance(config.adapter, Full):
        adapter = 0  # nothing of the kind; what is left are buffers
    group = _samples(config, model, told, live, size)
    shown = worker.heldout_together * config.evaluation.samples_per_prompt
    heldout = _samples(config, heldout_model, stand_in(heldout_model), live, shown)
    kept = blank_trajectories(config, model.latent_shape, size)
    tensors = [t for t in (kept.latents_GKNC, kept.next_latents_GKNC, kept.means_GKNC, kept.final_GNC) if t is not None]
    path = sum(t.nbytes for t in tensors)
    generator: Any = config.generator
    media = size * getattr(generator, "frames", 1) * generator.height * generator.width * 3
    stored = path + media + sum(t.nbytes for t in told.values())
    together, apart = _forwards(config)
    rollout = (together + apart * size) * group.step_flops + size * group.decode_flops
    longest = max(
        worker.together * rollout,
        shown * (config.sampling.eval_steps * heldout.step_flops + heldout.decode_flops),
    )
    weights = _weights(config, _weights_of_all(config, model))
    process = _moments(config, weights, adapter, path, group, heldout)
    return process, size * group.step_flops, rollout, longest, stored


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """What it takes to denoise and decode some samples: peaks of those that are taken at once, FLOPs of one."""

    latents: int
    """Bytes of all, and of their velocities where they are not computed at once."""
    denoise: int
    decode: int
    step_flops: int
    decode_flops: int


def _samples(config: RunConfig, model: Any, told: Any, live: LiveBytes, count: int) -> _Samples:
    import torch

    from grpo_flex.tracing import cost

    with live, torch.no_grad():
        x = torch.empty(count, *model.latent_shape, device="meta")
        first, *others = config.sampling.micro_batches(count)
        part = x[first]
        step, decoding = cost(lambda: model.velocity(part, 1.0, told), live), cost(lambda: _decode(model, part), live)
    return _Samples(
        latents=2 * x.nbytes if others else x.nbytes, denoise=step.peak, decode=decoding.peak,
        step_flops=step.flops // len(part), decode_flops=decoding.flops // len(part),
    )  # fmt: skip


def _weights_of_all(config: RunConfig, model: Any) -> dict[str, Any]:
    """The modules of a worker: its generator may load text encoders later than the rest."""
    return _modules(_blank(config)) | _modules(model.pipeline)


def _decode(model: Any, x: Any) -> None:
    """Decode up to where pixels would leave the device, which those of meta tensors cannot."""
    try:
        model.decode(x)
    except NotImplementedError as error:
        if "meta" not in str(error):
            raise


def _forwards(config: RunConfig) -> tuple[int, int]:
    """Model calls for one path that the siblings share, and for all of them."""
    sampling = config.sampling
    selection = sampling.window.select(sampling.steps, 0, 0)
    noisy = selection.stochastic if sampling.dynamics.stochastic else frozenset()
    taken = sampling.steps - len(selection.skipped)
    together = min(noisy, default=taken) if sampling.same_noise else 0
    return together, taken - together


def _moments(
    config: RunConfig, weights: Mapping[str, int], adapter: int, path: int, group: _Samples, heldout: _Samples
) -> Process:
    """A rollout worker while it encodes, samples a group, decodes it, and at the fuller half of a held-out batch.

    Text encoders leave after encoding with ``memory.encodings`` or ``memory.offload``, the VAE sleeps with the latter.

    Args:
        path: bytes of what is recorded of a group.
    """
    texts = {f"weights: {name}": size for name, size in weights.items() if name.startswith("text_encoder")}
    vae = {"weights: vae": weights["vae"]}
    leave, offload = _memory(config, "encodings") or _memory(config, "offload"), _memory(config, "offload")
    stays = {f"weights: {name}": s for name, s in weights.items() if name != "vae" and not name.startswith("text_")}
    stays |= ({} if offload else vae) | ({} if leave else texts) | ({"adapter": adapter} if adapter else {})
    halves = (
        stays | {"activations": heldout.denoise, "latents": heldout.latents},
        stays | vae | _decoding(heldout) | {"latents": heldout.latents},
    )
    moments = {
        "encoding": stays | texts,
        "sampling": stays | {"activations": group.denoise, "latents": group.latents + path},
        "decoding": stays | vae | _decoding(group) | {"latents": group.latents + path},
        "held-out": max(halves, key=lambda parts: sum(parts.values())),
    }
    place = config.placement
    return Process(
        name="rollout worker", count=place.rollout_workers, gpus=place.rollout_gpus, moments=moments, stays=stays
    )


def _decoding(samples: _Samples) -> dict[str, int]:
    return {"activations": samples.decode, "workspaces (assumed)": math.ceil(WORKSPACES * samples.decode)}


def _as_one(worker: Process, learner: Process) -> Process:
    """A learner that samples too: one set of weights and one adapter, which take turns."""
    stays = {name: size for name, size in {**worker.stays, **learner.stays}.items() if name != "adapter"}
    moments = {
        moment: stays | {name: size for name, size in parts.items() if name != "adapter"}
        for moment, parts in {**worker.moments, **learner.moments}.items()
    }
    return replace(learner, name="learner that samples too", moments=moments, stays=stays)
