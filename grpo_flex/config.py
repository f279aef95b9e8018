"""RunConfig and its parts: frozen dataclasses, validated as a whole.

Nothing here imports torch, Ray or diffusers: ``--help``, a bad override and ``--dry-run``'s first complaints
answer in under a second. Variants (a generator, a sampler, an objective, a judge family, a reward) are objects
in the configuration, each a frozen dataclass of its own file; there is no registry of names.

A part checks itself with a ``problems()`` method that yields ``(field, complaint)``; ``RunConfig.validate``
walks the tree, gives every complaint its full dotted name and raises one ``ConfigError`` with all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast
from urllib.parse import urlsplit

from grpo_flex.config_rules import rules_between_parts
from grpo_flex.dynamics import Ode
from grpo_flex.field_types import fits, hints, is_finite, is_part, spell
from grpo_flex.pairing import Calibrated, PairPlan

if TYPE_CHECKING:
    from grpo_flex.advantages import Advantage
    from grpo_flex.dynamics import Dynamics, Solver, Window
    from grpo_flex.generators.base import Generator, Model
    from grpo_flex.objectives.base import Objective
    from grpo_flex.rewards import Reward
    from grpo_flex.weights import Weights
    from reward_server.families.base import Family

Problem = tuple[str, str]


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the field, what it needs and the way out."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Where prompts come from: files of plain text, JSON lines, CSV or Parquet, folders of Parquet or of a data set (``readers.py``)."""

    train: str
    heldout: str
    per_step: int = 8
    """P: prompts per training step, one group each."""

    def problems(self) -> Iterator[Problem]:
        if self.per_step < 1:
            yield "per_step", f"is {self.per_step}; a step needs at least 1 prompt"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a group is sampled and which of its steps are trained."""

    group_size: int = 16
    """G: siblings of one prompt, compared with each other and with nobody else."""
    steps: int = 10
    """Denoising steps in training rollouts."""
    eval_steps: int = 10
    """Denoising steps of held-out samples (always plain ODE)."""
    dynamics: Dynamics
    window: Window
    same_noise: bool = True
    """Siblings start from the same initial noise and differ by the SDE's noise alone (Pref-GRPO's setting)."""
    solver: Solver = field(default_factory=Ode)
    """Takes the steps of a rollout that have no noise; ``Multistep()`` is of second order."""
    eval_solver: Solver = field(default_factory=Ode)
    """Takes the steps of held-out samples."""
    batch_tokens: int = 0
    """So many latent tokens (N × group_size × prompts, twice that where a generator batches guidance) may go through the
    transformer at once, so that a worker samples several prompts together. The learner computes group by group, and
    kernels may round a larger batch otherwise: policy/first_log_ratio_abs says by how much. 0: one prompt at a time,
    in the learner's own batch shape."""
    micro_batch: int = 0
    """At most so many siblings go through the model at once, in rollout, update, decoding and held-out samples. Rollout and
    update cut a group alike, so the first ratio stays exactly 1; gradients of the parts are summed. 0: the whole group."""
    lookahead: int = 0
    """k: rollouts of the next k steps go on while a step is judged and learnt from. Step j (from 0) is sampled by the
    adapter of version max(0, j − k), so its staleness, in updates, is min(j, k); 0 is on-policy."""

    def problems(self) -> Iterator[Problem]:
        if self.group_size < 2:
            yield (
                "group_size",
                f"is {self.group_size}; group-relative advantages compare siblings, so it needs at least 2 "
                "(with 1 every advantage would be 0 and nothing would be learnt)",
            )
        if self.steps < 2:
            yield (
                "steps",
                f"is {self.steps}; it needs at least 2: the last one is never trained, so with fewer nothing would be learnt",
            )
        else:
            yield from (("window." + name, text) for name, text in self.window.fits(self.steps))
        if self.eval_steps < 1:
            yield (
                "eval_steps",
                f"is {self.eval_steps}; held-out pictures need at least 1 denoising step, or they would be bare noise",
            )
        if self.batch_tokens < 0:
            yield "batch_tokens", f"is {self.batch_tokens}; it cannot be negative (0: one prompt at a time)"
        yield from self._micro_batch_problems()
        if self.lookahead < 0:
            yield "lookahead", f"is {self.lookahead}; it cannot be negative (0: no step is sampled ahead)"
        if not hasattr(self.dynamics, "moments"):
            yield (
                "dynamics",
                f"is {self.dynamics!r}, which only takes steps without noise; give it as sampling.solver, with dynamics=Ode()",
            )
        for name in ("solver", "eval_solver"):
            if not hasattr(getattr(self, name), "advance"):
                yield (
                    name,
                    f"is {getattr(self, name)!r}, which adds noise; the steps that it takes have none: use Ode() or Multistep()",
                )
        if self.same_noise and not getattr(self.dynamics, "stochastic", True):
            yield (
                "same_noise",
                "is true with a deterministic sampler: all siblings would be the same picture; set it to false",
            )

    def _micro_batch_problems(self) -> Iterator[Problem]:
        if self.micro_batch < 0:
            yield "micro_batch", f"is {self.micro_batch}; it cannot be negative (0: the whole group at once)"
        if self.micro_batch > 0 and self.batch_tokens > 0:
            yield (
                "micro_batch",
                f"is {self.micro_batch} with sampling.batch_tokens={self.batch_tokens}: one takes a prompt's siblings apart, the "
                "other puts several prompts together, and the first ratio would no longer be 1; set one of the two to 0",
            )

    def micro_batches(self, siblings: int) -> list[slice]:
        """Those of so many siblings that go through the model together."""
        size = self.micro_batch or siblings
        return [slice(i, i + size) for i in range(0, siblings, size)]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The LoRA adapter that is trained (peft)."""

    folder: ClassVar[str] = "adapter"
    """In the run's directory: where the result is written."""
    state_each_step: ClassVar[bool] = True

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ()
    """Module-name suffixes; empty: the generator's own choice."""

    def problems(self) -> Iterator[Problem]:
        if self.rank < 1:
            yield "rank", f"is {self.rank}; a LoRA adapter needs a rank of at least 1"
        if self.alpha <= 0:
            yield "alpha", f"is {self.alpha}; it scales the adapter and needs to be above 0"

    def attach(self, model: Model, seed: int) -> Weights:
        from grpo_flex.weights import Lora

        return Lora(model, self, seed)


@dataclass(frozen=True, kw_only=True)
class Full:
    """Full fine-tuning: all weights of the transformer are trained, and there is no adapter.

    The optimiser steps float32 masters; the model computes in ``generator.dtype``. With ``placement.shard_base`` all of
    it is shared out among the learners (FSDP2).
    """

    folder: ClassVar[str] = "weights"

    keep_base: bool = True
    """Each learner keeps the weights that training began with: for a pull to them (``objective.kl_beta``, Flow-DPO), the
    distance from them (policy/base_distance) and the win rate against them (``evaluation.versus_base``)."""
    copies: Literal["cpu", "device"] = "cpu"
    """Where those lie, θ_old of an objective that needs one, and the average (``optimizer.ema``): on the CPU they cost no
    GPU memory, and time for each transfer."""
    state_each_step: bool = True
    """After each update the learners' state (12 bytes a weight) goes to the object store: learners that die start again
    from there. False: it is read when a checkpoint is written, and a learner's death ends the run."""

    def attach(self, model: Model, seed: int) -> Weights:
        from grpo_flex.weights import Whole

        return Whole(model, self)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW and how many updates one rollout feeds."""

    lr: float = 1e-4
    lr_end: float = 1.0
    """Share of ``lr`` that is left at the run's last step, linear in between; 1: constant. A resume with another number
    of steps follows the line of that number."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    updates_per_rollout: int = 1
    """Optimiser steps per rollout; the prompts' groups are dealt out among them."""
    ema: float = 0.0
    """Decay of the adapter's average over training steps, which is evaluated, shown and exported; it grows from 0.1 to
    this. 0: the newest adapter itself."""

    def problems(self) -> Iterator[Problem]:
        if not self.lr > 0:
            yield "lr", f"is {self.lr}; it needs to be above 0"
        if not 0 < self.lr_end <= 1:
            yield (
                "lr_end",
                f"is {self.lr_end}; it is the share of lr at the last step, above 0 and at most 1 (constant)",
            )
        if not self.max_grad_norm > 0:
            yield (
                "max_grad_norm",
                f"is {self.max_grad_norm}; it needs to be above 0 (use a large number for no clipping)",
            )
        if self.warmup_steps < 0:
            yield "warmup_steps", f"is {self.warmup_steps}; it cannot be negative"
        if self.updates_per_rollout < 1:
            yield "updates_per_rollout", f"is {self.updates_per_rollout}; it needs at least 1"
        if not 0 <= self.ema < 1:
            yield (
                "ema",
                f"is {self.ema}; it needs to be 0 (no average) or more and below 1, where nothing would be learnt",
            )

    def updates(self, groups: int) -> int:
        """How many optimiser steps so many groups are dealt out among."""
        return min(self.updates_per_rollout, groups)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Who compares the siblings, how it is reached, and what a failure may cost."""

    family: Family
    """The protocol: how to ask and how to read the reply (``reward_server.families``)."""
    server: Any = None
    """An object whose ``start(log_dir)`` starts a judge and gives a handle with ``endpoints``, ``stop()`` and, if it
    is to be started again when it has died, ``alive()``; a field ``port`` of the object says where (``judge_server.py``)."""
    endpoints: tuple[str, ...] = ()
    """Base URLs of judges that run already, e.g. ("http://10.0.0.5:8000/v1",)."""
    model: str = "UnifiedReward"
    """The model name that is served."""
    api_key_env: str = "GRPO_FLEX_JUDGE_KEY"
    """Name of the environment variable that holds the key; secrets never stand in a configuration."""
    pairs: PairPlan = field(default_factory=Calibrated)
    """Which ordered pairs of a group are asked. The default asks as few as keep the advantages of all pairs in both orders
    to a correlation of 0.95, for the size of the group."""
    concurrency: int = 32
    timeout_s: float = 60.0
    """For one request."""
    retries: int = 2
    """Further tries of a request that timed out, dropped or met a 5xx; a 4xx is never tried again."""
    backoff_s: float = 0.5
    """Longest wait before the first retry; it doubles with each further one, and the wait is random below it."""
    breaker_failures: int = 5
    """After so many failures in a row an endpoint is left alone until a health probe succeeds."""
    probe_s: float = 2.0
    """Seconds between two health probes (GET /v1/models) of an endpoint that is left alone."""
    patience_s: float = 15.0
    """How long questions wait when no endpoint is healthy; then they are masked as "failed" at once."""
    step_budget_s: float = 600.0
    """For a step's verdicts: each group has so long from when its last sibling is there, then what is missing is masked as
    "timeout"."""
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = 2048
    min_judged: float = 0.5
    """A group with a smaller share of judged pairs is left out of the update."""
    min_groups: float = 0.5
    """With a smaller share of usable groups the run waits for the judge, and asks again."""
    give_up_s: float = 1800.0
    """How long to wait for a judge that is away before the run stops with a checkpoint."""
    restarts: int = 3
    """How often a judge that the run started is started again when its process has ended."""

    def questions(self, group_size: int, seed: int) -> list[tuple[int, ...]]:
        """What a group's first questions show: ordered pairs of its siblings, each sibling by itself, or both."""
        from reward_server.families.rank_and_score import by_candidates

        asked_by = by_candidates(self.family)
        pairs = self.pairs.pairs(group_size, seed) if 2 in asked_by else ()
        return [*pairs, *((i,) for i in range(group_size) if 1 in asked_by)]

    def problems(self) -> Iterator[Problem]:
        if self.server is None and not self.endpoints:
            yield (
                "endpoints",
                "is empty and judge.server is not set: give the URL of a running judge, or a server to start",
            )
        if self.server is not None and self.endpoints:
            yield "endpoints", "is set together with judge.server: choose one"
        for url in self.endpoints:
            if "@" in url.partition("://")[2].partition("/")[0]:
                yield (
                    "endpoints",
                    _secret(f"set the variable {self.api_key_env} (judge.api_key_env) to the judge's key"),
                )
            elif not _is_url(url):
                yield "endpoints", f"holds {url!r}; each needs to be a URL such as http://127.0.0.1:8000/v1"
        if not self.model:
            yield "model", "is empty; it needs to be the name under which the endpoints serve the judge"
        if not 0 <= self.temperature <= 2:
            yield "temperature", f"is {self.temperature}; it needs to be 0 (always the same reply) … 2"
        for name in ("concurrency", "max_tokens", "breaker_failures"):
            if getattr(self, name) < 1:
                yield name, f"is {getattr(self, name)}; it needs at least 1"
        for name in ("timeout_s", "step_budget_s", "give_up_s", "probe_s"):
            if not getattr(self, name) > 0:
                yield name, f"is {getattr(self, name)}; it needs to be above 0 seconds"
        for name in ("min_judged", "min_groups"):
            if not 0 <= getattr(self, name) <= 1:
                yield name, f"is {getattr(self, name)}; it is a share, between 0 and 1"
        for name in ("retries", "backoff_s", "patience_s", "restarts"):
            if getattr(self, name) < 0:
                yield name, f"is {getattr(self, name)}; it cannot be negative"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out samples: plain ODE, fixed noise, scored by what nobody optimises."""

    every: int = 20
    """Steps between evaluations; step 0 and the last step are always evaluated."""
    scorer: Any = None
    """A frozen dataclass or a function, ``(media uint8 [F,H,W,3], Prompt) -> {"name": value}``; logged as heldout/name.
    None: held-out samples are drawn and shown, not scored."""
    samples_per_prompt: int = 1
    height: int = 0
    """Of held-out samples, and of the base model's beside them; 0: ``generator.height``."""
    width: int = 0
    shift: float = 0.0
    """Time shift of their σ schedule, which larger samples may want higher; 0: ``generator.shift``."""
    grid: int = 24
    """Pictures in the before-and-after grid."""
    versus_base: int = 24
    """So many held-out samples are shown to the judge beside the base model's from the same noise: heldout/win_rate."""
    stop_after: int = 0
    """The run ends early when so many evaluations running stay below the best one; 0: never."""
    stop_drop: float = 0.02
    """An evaluation counts as below the best one when it misses it by more than this."""
    stop_on: str = ""
    """The figure that ``stop_after`` watches, such as "heldout/win_rate"; empty: the first that ``scorer`` gives."""

    def problems(self) -> Iterator[Problem]:
        for name in ("every", "samples_per_prompt", "grid"):
            if getattr(self, name) < 1:
                yield name, f"is {getattr(self, name)}; it needs at least 1"
        for name in (*SIZE, "versus_base", "stop_after", "stop_drop"):
            if getattr(self, name) < 0:
                yield name, f"is {getattr(self, name)}; it cannot be negative"
        if self.stop_on and not self.stop_on.startswith("heldout/"):
            yield (
                "stop_on",
                f"is {self.stop_on!r}; it needs the whole name of a held-out figure, such as heldout/win_rate",
            )
        if self.stop_after and self.scorer is None and not self.stop_on:
            yield (
                "stop_after",
                "watches a held-out figure, but there is no evaluation.scorer; name one in evaluation.stop_on",
            )
        if self.scorer is not None and not callable(self.scorer):
            yield "scorer", f"is {self.scorer!r}; it needs to be callable as scorer(media, prompt)"


SIZE = ("height", "width", "shift")
"""What held-out samples may have different from those of the training."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Who sits where."""

    rollout_workers: int = 2
    rollout_cpus: float = 1.0
    rollout_gpus: float = 0.0
    rollout_workers_max: int = 0
    """Where the cluster has room, or comes to have it, so many workers in all may join in mid-run; 0: none."""
    rollout_timeout_s: float = 1800.0
    """A rollout worker that has work and finishes none for so long is taken for hung: its groups are sampled elsewhere,
    from the same seeds, and it is started again."""
    rollout_restarts: int = 5
    """How often a rollout worker that died, hung or failed is started again without a result in between; then the run goes
    on without it."""
    colocated: bool = False
    """Each learner is a rollout worker too: one process, one device, one set of weights, which take turns at their two
    tasks. rollout_workers, rollout_cpus and rollout_gpus are not used."""
    learners: int = 1
    """Learner processes. Each computes some of a step's groups; their gradients are summed, so that N learners do what
    one would, up to the rounding of that sum."""
    learner_cpus: float = 1.0
    """For each learner, as are its GPUs."""
    learner_gpus: float = 0.0
    learner_restarts: int = 3
    """How often learners that died, hang or failed are started again from the last completed step without completing
    another; then the run ends."""
    update_timeout_s: float = 3600.0
    """Learners that take longer than this for an update are taken for hung, and several of them wait no longer for each
    other. It has to exceed any update by far; `plan --tflops` says if it does not."""
    shard_base: bool = False
    """Share the frozen base weights out among the learners (FSDP2) instead of keeping them whole in each."""
    broadcast: bool = False
    """New weights of a full fine-tuning go to all rollout workers by one collective broadcast (gloo on CPUs, NCCL on
    GPUs), straight into their models. A worker that misses it gets them through Ray's object store, the way that all
    of them take without it."""
    broadcast_timeout_s: float = 120.0
    """How long its members wait for each other, and for any one tensor, before the broadcast counts as failed. NCCL's
    communicator, which is made in between, has no limit of its own."""
    scorer_cpus: float = 1.0
    """For each of ``scorers``."""
    scorer_gpus: float = 0.0
    threads_per_worker: int = 1
    """Torch threads of a rollout worker, of held-out sampling and of a scorer. Part of the run's numerics: a matrix
    product's order of summation depends on it."""
    learner_threads: int = 2
    wait_s: float = 60.0
    """How long a cluster that exists may take to offer what is asked for: an autoscaler starts nodes."""
    ray_address: str = ""
    """Empty: a cluster that is announced by RAY_ADDRESS, or else a local one that lives as long as the run."""

    def problems(self) -> Iterator[Problem]:
        for name in ("rollout_workers", "learners", "threads_per_worker", "learner_threads"):
            if getattr(self, name) < 1:
                yield name, f"is {getattr(self, name)}; it needs at least 1"
        for name in ("learner_restarts", "rollout_restarts", "rollout_workers_max", "wait_s"):
            if getattr(self, name) < 0:
                yield name, f"is {getattr(self, name)}; it cannot be negative"
        for name in ("rollout_cpus", "learner_cpus", "scorer_cpus"):
            if getattr(self, name) < 0:
                yield name, f"is {getattr(self, name)}; it cannot be negative (0: nothing is reserved)"
        for name in ("rollout_gpus", "learner_gpus", "scorer_gpus"):
            if (gpus := getattr(self, name)) < 0:
                yield name, f"is {gpus}; it cannot be negative (0: it computes on the CPU)"
            elif gpus > 1 and gpus % 1:
                yield name, f"is {gpus}; Ray gives a part of one GPU, below 1, or a whole number of them"
        for name in ("update_timeout_s", "rollout_timeout_s", "broadcast_timeout_s"):
            if not getattr(self, name) > 0:
                yield name, f"is {getattr(self, name)}; it needs to be above 0 seconds"
        if 0 < self.rollout_workers_max < self.rollout_workers:
            yield (
                "rollout_workers_max",
                f"is {self.rollout_workers_max}, less than placement.rollout_workers; 0: none join",
            )
        if self.colocated and self.shard_base:
            yield (
                "shard_base",
                "is true with placement.colocated: each process samples by itself and needs whole weights",
            )
        if self.shard_base and self.learners == 1:
            yield "shard_base", "is true with placement.learners=1: there is nobody to share the base weights with"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When the learner's state is written, and which ones stay."""

    every: int = 10
    """Steps between two checkpoints; the last step and one with a new best held-out score have theirs anyway."""
    keep: int = 2
    """So many of the newest stay."""
    keep_best: bool = True
    """The one with the best held-out score (the first that ``evaluation.scorer`` gives, or "oracle") stays too."""
    mirror: str = ""
    """Below it the run's directory is copied after each checkpoint and at the end, as <mirror>/<its name>: a URL that
    fsspec knows (s3://bucket/runs, gs://…, file:///…) or an absolute path. ``--resume <mirror>/<name>`` brings it back."""

    def problems(self) -> Iterator[Problem]:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                yield name, f"is {getattr(self, name)}; it needs at least 1"
        if ":" in self.mirror.partition("://")[2].partition("/")[0].rpartition("@")[0]:  # a name alone is no secret
            yield "mirror", _secret("fsspec takes credentials from the storage's own variables and files")
        elif self.mirror:
            from grpo_flex.copied_run import problem

            yield from (("mirror", complaint) for complaint in problem(self.mirror))


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Offline by default, online when WANDB_API_KEY is set; mode "disabled" writes nothing."""

    mode: str = "auto"
    project: str = "grpo-flex"
    entity: str = ""

    def problems(self) -> Iterator[Problem]:
        if self.mode not in ("auto", "online", "offline", "disabled"):
            yield "mode", f"is {self.mode!r}; it needs to be one of auto, online, offline, disabled"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One experiment. ``experiments/*.py`` return one from ``config()``."""

    name: str
    """Names the run's directory: runs/<name>/."""
    steps: int
    seed: int = 0
    runs_dir: str = "runs"
    generator: Generator
    prompts: Prompts
    sampling: Sampling
    judge: Judge | None = None
    """None: ``scorers`` alone give the reward."""
    scorers: tuple[Any, ...] = ()
    """In-process rewards (``scorers.py``), each in a process of its own; their numbers stand in the verdicts by name."""
    reward: Reward
    advantage: Advantage
    objective: Objective
    adapter: Adapter | Full = field(default_factory=Adapter)
    """What is trained: a LoRA adapter, or ``Full()``."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluation: Evaluation = field(default_factory=Evaluation)
    placement: Placement = field(default_factory=Placement)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    wandb: Wandb = field(default_factory=Wandb)

    def problems(self) -> Iterator[Problem]:
        if not self.name or "/" in self.name or self.name.startswith("."):
            yield "name", f"is {self.name!r}; it names a directory below runs_dir, so it needs a plain file name"
        if "://" in self.runs_dir:
            yield (
                "runs_dir",
                f"is {self.runs_dir!r}; a run works in a folder of a file system: leave it at one, and name a store in "
                "checkpoint.mirror, where the run is copied after each checkpoint",
            )
        if self.steps < 1:
            yield "steps", f"is {self.steps}; a run needs at least 1 training step, or nothing would be learnt"
        yield from self._heldout_size()
        yield from rules_between_parts(self)

    @property
    def heldout_generator(self) -> Generator:
        """The generator at the size of held-out samples."""
        given = {name: value for name in SIZE if (value := getattr(self.evaluation, name))}
        return replace(cast("Any", self.generator), **given) if given else self.generator

    def _heldout_size(self) -> Iterator[Problem]:
        parts = (part for part in (self.evaluation, self.generator) if is_part(part))
        if any(True for part in parts for _ in _complaints(part)):
            return  # which are told by themselves
        given = [name for name in SIZE if getattr(self.evaluation, name) > 0]
        for name in (name for name in given if not hasattr(self.generator, name)):
            yield f"evaluation.{name}", f"is set, but {type(self.generator).__name__} has no {name}; leave it at 0"
            return
        if given and hasattr(self.generator, "problems"):
            asked: Any = self.heldout_generator
            yield from ((f"evaluation.{name}", text) for name, text in asked.problems() if name in given)

    def validate(self) -> None:
        """Raise ConfigError with every complaint of every part, each under its dotted name."""
        complaints = [f"{name} {text}" for name, text in _complaints(self)]
        if complaints:
            raise ConfigError("\n".join(complaints))


VARIANTS: dict[str, tuple[tuple[str, ...], str]] = {
    "generator": (("load",), "a generator, such as Flux(model=…)"),
    "dynamics": (("moments", "advance"), "dynamics, such as FlowSde(a=0.7)"),
    "window": (("select",), "a window of steps, such as AllButLast()"),
    "solver": (("moments", "advance"), "a solver, such as Ode()"),
    "eval_solver": (("moments", "advance"), "a solver, such as Ode()"),
    "family": (("request",), "a family of judges, such as Flex()"),
    "pairs": (("pairs",), "a pair plan, such as RoundRobin()"),
    "reward": (("__call__",), "a reward, such as WinRate()"),
    "advantage": (("__call__",), "an advantage, such as GroupRelative()"),
    "objective": (("terms",), "an objective, such as Nft()"),
}
"""Fields that hold an object of a protocol: one of these it has to have, and how to say what it is."""


def _complaints(part: Any) -> Iterator[Problem]:
    yield from _mistyped(part)
    yield from _broken_rules(part)


def _mistyped(part: Any, prefix: str = "") -> Iterator[Problem]:
    """Fields whose value is of another type, in a part and in the parts of it."""
    for f in fields(part):
        value, hint = getattr(part, f.name), hints(type(part)).get(f.name, Any)
        ours = type(part).__module__ == __name__  # a user's own class may call another thing so
        abstract = ours and (hint is Any or getattr(hint, "_is_protocol", False))
        offers, what = VARIANTS.get(f.name, ((), "")) if abstract else ((), "")
        if offers and (isinstance(value, type) or not any(hasattr(value, name) for name in offers)):
            yield f"{prefix}{f.name}", f"is {value!r}; it needs to be {what}"
        elif not fits(value, hint):
            yield f"{prefix}{f.name}", f"is {value!r}; it needs to be {spell(hint)}"
        elif not is_finite(value):
            yield (
                f"{prefix}{f.name}",
                f"is {value!r}; it needs to be finite: all that is computed from it would be infinite or no number",
            )
        for name, inner in _parts_of(f.name, value):
            yield from _mistyped(inner, f"{prefix}{name}.")


def _broken_rules(part: Any, prefix: str = "") -> Iterator[Problem]:
    """What ``problems()`` of a part and of the parts of it say. They presume the right types, theirs and those below."""
    for f in fields(part):
        for name, inner in _parts_of(f.name, getattr(part, f.name)):
            yield from _broken_rules(inner, f"{prefix}{name}.")
    if hasattr(part, "problems") and not any(True for _ in _mistyped(part)):
        yield from ((prefix + name, text) for name, text in part.problems())


def _parts_of(name: str, value: Any) -> list[tuple[str, Any]]:
    """A field's own parts with their dotted names: the value itself, or the parts in a tuple."""
    found = {name: value} if not isinstance(value, tuple) else {f"{name}.{i}": v for i, v in enumerate(value)}
    return [(path, inner) for path, inner in found.items() if is_part(inner)]


def _secret(instead: str) -> str:
    return f"holds a name or a password before an @, which would be written to config.json and W&B: leave it out; {instead}"


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # half a bracket, a port that is no number
        return False
