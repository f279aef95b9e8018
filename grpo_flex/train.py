"""THE loop: prompts -> groups -> verdicts -> rewards -> advantages -> update -> adapter."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayError

from grpo_flex import checkpoint
from grpo_flex.cluster import Cluster
from grpo_flex.config import ConfigError, RunConfig
from grpo_flex.console import Console
from grpo_flex.fleet import Job
from grpo_flex.guards import Regress, regress, spread, versus_base
from grpo_flex.judge_figures import answered, judge_metrics
from grpo_flex.judge_server import JudgeServer
from grpo_flex.judge_watch import JudgeWatch
from grpo_flex.metrics import RunLog, VerdictRow, curve, headline_key, keys_of, mean_scores, read_metrics
from grpo_flex.mirror import Mirror
from grpo_flex.prompts import PromptStream, seed_for
from grpo_flex.rewards import reward_metrics
from grpo_flex.scorers import scorer_metrics
from grpo_flex.types import Adapter, GroupMedia, Prompt, RewardedGroup, RolloutGroup, Sample, UpdateBatch, Verdict

if TYPE_CHECKING:
    from grpo_flex.cluster import AdapterRef

    GroupRef = ray.ObjectRef[RolloutGroup]
    MediaRef = ray.ObjectRef[GroupMedia]

POLL_S = 0.5
"""How long a Ctrl-C, or a process that died, may go unnoticed while the run waits."""
SIGNAL_S = 2.0
"""A signal to the whole process group may end Ray's processes before this one has seen it; so long it is waited for."""
STARVED_STEPS = 3
"""So many steps in a row in which no sibling got a reward end the run: it would only burn time."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the step in flight is given up, the steps before it are safe."""


class Starved(Exception):
    """Nobody gave any sibling a reward, step after step: scorers fail throughout."""


@dataclass(kw_only=True)
class Flight:
    """A step under way: its prompts, and by their index what was asked for."""

    step: int
    prompts: Sequence[Prompt]
    jobs: list[Job] = field(default_factory=list)
    """For each prompt; those that are sampled together have one in common."""
    asked: dict[int, ray.ObjectRef[list[Verdict]]] = field(default_factory=dict)
    scoring: dict[int, list[ray.ObjectRef[list[Verdict]]]] = field(default_factory=dict)
    begun: list[np.ndarray] = field(default_factory=list)
    """Advantages of its first groups, which the learners were given before the others were complete."""

    @property
    def groups(self) -> list[GroupRef]:
        """What the learners are given of each prompt's group."""
        return [group for job in dict.fromkeys(self.jobs) for group in job.results[1::2]]

    @property
    def media(self) -> list[MediaRef]:
        """What judge and scorers are given of each prompt's group."""
        return [media for job in dict.fromkeys(self.jobs) for media in job.results[::2]]


class Trainer:
    """One run in progress. ``run`` is the loop; the other methods are its phases, in the order of the data path.

    Args:
        prompts: the stream of training prompts.
        heldout: the prompts of the evaluations.
        step: training steps completed so far (0, or the checkpoint's).
        server: the judge that the run started for itself, to be started again when it dies.
        ahead: the adapters that sample the next steps, the newest one left out (``sampling.lookahead``).
        basis: what a resume must not change, by field; each checkpoint holds it.
        pending: the figures of step ``step``, where it lacks its evaluation and so its line of metrics.
    """

    def __init__(
        self, config: RunConfig, cluster: Cluster, log: RunLog, console: Console,
        *, prompts: PromptStream, heldout: Sequence[Prompt], step: int, server: JudgeServer | None = None,
        ahead: Sequence[Adapter] = (), basis: Mapping[str, str] | None = None,
        pending: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.cluster, self.log, self.console = config, cluster, log, console
        self.prompts, self.heldout, self.step = prompts, heldout, step
        self._judge_watch = JudgeWatch(config.judge, cluster, console, server, self._pause)
        self.mirror: Mirror | None = None
        self.basis = dict(basis or {})
        self._stop, self._stop_at = False, 0.0
        self._numbers = None if pending is None else dict(pending)
        """Of a step whose line is not written yet; None: there is no such step."""
        self.evaluates_on_resume = False
        """Whether the checkpoint is of a step that lacks its evaluation."""
        self._next_look = 0.0
        self._starved = 0
        self._flights: deque[Flight] = deque()
        k = config.sampling.lookahead
        self._adapters: deque[AdapterRef] = deque([ray.put(a) for a in ahead[len(ahead) - k :]], maxlen=k + 1)
        """Those that sample the present step and the next k."""
        cluster.stopping, cluster.stopped_s = partial(self.stopping, SIGNAL_S), self.stopped_s
        self._example: tuple[MediaRef, RewardedGroup, Sequence[Verdict]] | None = None
        self._seconds: dict[str, float] = {}
        self._base: list[ray.ObjectRef[np.ndarray]] = []

    def run(self) -> None:
        """Train until ``config.steps`` are completed.

        Raises:
            ConfigError: the figure that stops it early is none that the scorer gives.
            Interrupted, JudgeAway, Starved: after which ``save`` keeps every completed step.
            KeyboardInterrupt: it was to stop before there was anything to keep.
        """
        self._adapters.extend([self.cluster.publish()] * (self.config.sampling.lookahead + 1 - len(self._adapters)))
        if self.log.last_step < 0 and not self.step:  # one that was stopped in its first step has its step 0 already
            try:
                numbers = self.evaluate(self.cluster.publish_evaluation())
            except Interrupted as asked:  # as while models load: there is nothing yet to go on with
                raise KeyboardInterrupt from asked
            self._check_watched(numbers)
            self.log.log(0, numbers)
            self.console.step(0, numbers)
        elif not self._watches(keys_of(read_metrics(self.log.run_dir), "heldout/")):
            # A resume may bring another scorer, which nobody has asked yet.
            samples = self.cluster.evaluate(self.heldout, self.cluster.publish_evaluation(), self._look_around)
            self._check_watched({f"heldout/{name}" for name in mean_scores(list(samples))})
        while self._numbers is not None or self.step < self.config.steps:
            began, self._seconds = time.perf_counter(), {}
            if self._numbers is None:  # else the run was stopped while it evaluated this step
                self._numbers = self.take_step()
                self._judge_watch.next_step()
                self._adapters.append(self.cluster.publish())
                self.step += 1
                self._flights.popleft()
                self._numbers |= self._spent(began)
                began = time.perf_counter()
            numbers = dict(self._numbers)
            if self._to_evaluate():
                numbers |= self.evaluate(self.cluster.publish_evaluation())
                self.show_verdicts()
            before = numbers.get("perf/step_s", 0.0)
            numbers |= self._spent(began)
            numbers["perf/step_s"] += before
            self.log.log(self.step, numbers)
            self._numbers = None
            self.console.step(self.step, numbers)
            worse = self.regress(numbers)
            if self._due(numbers) or worse:
                self.save(numbers)
            if worse:
                self.console.note(f"stopping early: {worse}")
                return

    def _spent(self, began: float) -> dict[str, float]:
        """Seconds of the phases so far, and since ``began``."""
        phases = {f"perf/{phase}_s": seconds for phase, seconds in self._seconds.items()}
        return phases | {"perf/step_s": time.perf_counter() - began}

    # ------------------------------------------------------------ phases

    def take_step(self) -> dict[str, float]:
        """From prompts to the update; again with the same groups where a node has taken some along."""
        while True:
            try:
                flight = self.rollout()
                verdicts = self.judge(flight)
                scores = self.score(flight)
                return self.learn(flight, verdicts, scores)
            except ObjectLostError:
                jobs = dict.fromkeys(job for flight in self._flights for job in flight.jobs)
                if not (lost := self.cluster.again(jobs)):
                    raise  # an adapter, or the learners' state
                groups = sum(job.count // 2 for job in lost)
                self.console.note(f"step {self.step + 1}: {groups} groups lost with their node; sampling again")

    def rollout(self) -> Flight:
        """The groups of the present step; those of the next ``sampling.lookahead`` steps go on in the meantime."""
        with self._phase("rollout"):
            until = min(self.step + self.config.sampling.lookahead + 1, self.config.steps)
            for step in range(self.step + len(self._flights), until):
                self._flights.append(self._launch(step, self._adapters[step - self.step]))
            self.cluster.wait(self._flights[0].jobs, self._look)
        return self._flights[0]

    def judge(self, flight: Flight) -> list[list[Verdict]]:
        """Verdicts of every group; waits for a judge that is away and asks again about what it missed."""
        if self.config.judge is None:
            return [[] for _ in flight.prompts]
        with self._phase("judge"):
            verdicts = self._get([flight.asked[i] for i in range(len(flight.prompts))])
            for missing in self._judge_watch.missing(self.step + 1, verdicts):
                self._judge_watch.count("asked_again", sum(not answered(v) for i in missing for v in verdicts[i]))
                flight.asked |= {i: self._ask(flight, i, flight.media[i], verdicts[i]) for i in missing}
                again = self._get([flight.asked[i] for i in missing])
                for i, verdict in zip(missing, again, strict=True):
                    verdicts[i] = verdict
            return verdicts

    def score(self, flight: Flight) -> list[list[Verdict]]:
        """What the in-process scorers said of every group; a failed score is masked, and never asked again."""
        if not self.config.scorers:
            return [[] for _ in flight.prompts]
        with self._phase("score"):
            return [[v for said in self._get(flight.scoring[i]) for v in said] for i in range(len(flight.prompts))]

    def learn(
        self, flight: Flight, verdicts: Sequence[Sequence[Verdict]], scores: Sequence[Sequence[Verdict]]
    ) -> dict[str, float]:
        """Verdicts and scores -> rewards -> advantages -> update. Groups with too few verdicts are masked."""
        groups, unusable = flight.groups, set(self._judge_watch.unusable(verdicts))
        usable = [i for i in range(len(groups)) if i not in unusable]
        if unusable:
            self.console.note(
                f"step {self.step + 1}: {len(unusable)} of {len(groups)} groups got too few verdicts and are left out of the update"
            )
        said = [[*verdicts[i], *scores[i]] for i in usable]
        rewarded = [self._rewarded(flight, i, v) for i, v in zip(usable, said, strict=True)]
        self._check_rewards(rewarded, scores)
        self._check_parts(rewarded)
        advantages, numbers = self.config.advantage(rewarded)
        given = dict.fromkeys(range(len(groups)), np.full(self.config.sampling.group_size, np.nan))
        given |= zip(usable, advantages, strict=True)
        report = self.cluster.judge_report()  # read beside the update, which takes longer
        with self._phase("update"):
            batch = UpdateBatch(groups=tuple(groups), advantages=tuple(given.values()))
            result = self.cluster.update(batch, self.step)
            if self.config.scorers:  # not before, for a step that is taken again scores again
                about = zip(flight.prompts, scores, strict=True)
                ray.get([self.cluster.record(flight.step, prompt, score) for prompt, score in about])
        self._example = (flight.media[usable[0]], rewarded[0], said[0])
        numbers["perf/early_groups"] = float(self._begun_early(len(flight.begun), len(groups)))
        numbers |= reward_metrics(rewarded) | judge_metrics(verdicts) | scorer_metrics(scores)
        return numbers | self._judge_watch.figures(len(unusable)) | ray.get(report) | dict(result.metrics)

    def evaluate(self, adapter: AdapterRef) -> dict[str, float]:
        """Mean scores of held-out samples, as heldout/<name>; pictures go to the log."""
        with self._phase("evaluate"):
            samples = list(self.cluster.evaluate(self.heldout, adapter, self._look_around))
            numbers = self.versus_base(samples)
        self.log.samples(self.step, samples)
        return {f"heldout/{name}": score for name, score in mean_scores(samples).items()} | numbers

    def versus_base(self, samples: Sequence[Sample]) -> dict[str, float]:
        """The judge's win rate of some held-out samples against the base model's from the same noise."""
        shown = self.config.evaluation.versus_base if self.config.judge else 0
        if shown and not self._base:  # at step 0 these are the base's; a run that was resumed draws them again
            first = samples
            if self.step:
                first = list(self.cluster.evaluate(self.heldout, self.cluster.publish_base(), self._look_around))
            self._base = [ray.put(sample.media) for sample in spread(first, shown)]
        if not shown or not self.step:
            return {}
        now = spread(samples, shown)
        seeds = [seed_for(self.config.seed, "versus base", sample.prompt.id, i) for i, sample in enumerate(now)]
        asked = [
            self.cluster.compare(sample.prompt, self.step - 1, seed, base, sample.media, f"held-out {number}")
            for number, (sample, seed, base) in enumerate(zip(now, seeds, self._base, strict=True))
        ]
        self._wait(asked, self._look_around)
        said = ray.get(asked)
        said = [
            [verdict for verdict in v if len(verdict.members) == 2] or v for v in said
        ]  # who wins, not who scores more
        return versus_base([self.config.reward(2, v, s.prompt.id) for v, s in zip(said, now, strict=True)])

    def _watches(self, scores: Collection[str]) -> bool:
        """Whether the figure that stops a run early, if any does, is among these."""
        config = self.config.evaluation
        return not config.stop_after or config.stop_on in ("", "heldout/win_rate", *scores)

    def _check_watched(self, scores: Collection[str]) -> None:
        """Raise ConfigError, before the first step, when the figure that stops a run early is none that the scorer gives."""
        if not self._watches(scores):
            raise ConfigError(
                f"evaluation.stop_on is {self.config.evaluation.stop_on!r}, which evaluation.scorer does not give: it gives "
                f"{', '.join(sorted(scores))}"
            )

    def regress(self, numbers: Mapping[str, float]) -> Regress | None:
        """Whether held-out samples got worse for so long that ``evaluation.stop_after`` ends the run."""
        config = self.config.evaluation
        if not config.stop_after or not self._to_evaluate():  # a long run's metrics take a while to read
            return None
        rows = read_metrics(self.log.run_dir)
        key = config.stop_on or headline_key(rows)
        if key is None or key not in numbers:
            return None
        return regress(rows, key, config.stop_after, config.stop_drop)

    def show_verdicts(self) -> None:
        """One group of the step in W&B's table: prompt, picture, reward and what the judge said."""
        if self._example:
            group, rewarded, verdicts = self._example
            with suppress(ObjectLostError):  # only for a reader, and the step is done
                self.log.verdict_table(self.step, verdict_rows(ray.get(group), rewarded, verdicts))

    def _to_evaluate(self) -> bool:
        return self.step % self.config.evaluation.every == 0 or self.step == self.config.steps

    def save(self, numbers: Mapping[str, float] | None = None) -> Path:
        """Write a checkpoint of the completed steps; ``numbers`` are those of the last one.

        A step is complete with its update: if what comes after it fails, ``step`` is set to what the learners' state says.
        An evaluation that it lacks is made up for by the run that goes on, which then writes its line.
        """
        self.console.phase("save")
        state, config = self.cluster.learner_state(), self.config.checkpoint
        late = int(state["version"]) - self.step
        self.step += late
        unwritten = self.step > 0 and self.log.last_step < self.step
        self.evaluates_on_resume = unwritten and self._to_evaluate()
        if self._numbers is not None and unwritten and not self.evaluates_on_resume:
            with suppress(OSError):  # the checkpoint is what counts
                self.log.log(self.step, self._numbers)
        # References: with a broadcast there are no older ones. The newest update's own adapter may not be there yet.
        older: list[Any] = list(self._adapters)[late:][: self.config.sampling.lookahead]
        ahead: list[Adapter] = ray.get(older)
        state |= {"ahead": [(a.version, dict(a.tensors)) for a in ahead], "basis": self.basis}
        if self.evaluates_on_resume:
            state[checkpoint.PENDING] = {name: float(value) for name, value in (self._numbers or {}).items()}
        score = (numbers or {}).get(headline_key([dict(numbers or {})]) or "")
        folder = checkpoint.save(self.log.run_dir, self.step, state, config.keep, score, config.keep_best)
        if self.mirror is not None:
            self.mirror.copy()
        return folder

    # ------------------------------------------------------------ waiting

    def stop(self) -> None:
        """Ask the run to end at the next wait for rollouts, the judge or held-out samples."""
        self._stop, self._stop_at = True, self._stop_at or time.monotonic()

    def stopped_s(self) -> float:
        """For how many seconds the run has been asked to end."""
        return time.monotonic() - self._stop_at if self._stop_at else 0.0

    def stopping(self, within_s: float) -> bool:
        """Whether the run was asked to end, or is within so many seconds."""
        until = time.monotonic() + within_s
        while not self._stop and time.monotonic() < until:
            time.sleep(0.05)
        return self._stop

    def _due(self, numbers: Mapping[str, float]) -> bool:
        """Whether a step that was logged is to be saved: by its number, or for its held-out score."""
        if self.step % self.config.checkpoint.every == 0 or self.step == self.config.steps:
            return True
        key = headline_key([dict(numbers)])
        if key is None or not self.config.checkpoint.keep_best:
            return False
        return numbers[key] >= max(curve(read_metrics(self.log.run_dir), key)[1], default=-math.inf)

    def _launch(self, step: int, adapter: AdapterRef) -> Flight:
        """Hand out the groups of a step to the workers."""
        flight = Flight(step=step, prompts=self.prompts.batch(step))
        for first in range(0, len(flight.prompts), self.cluster.together):
            some = flight.prompts[first : first + self.cluster.together]
            job = self.cluster.generate(step, some, adapter, partial(self._ask_about, flight, first))
            flight.jobs += [job] * len(some)
        return flight

    def _ask_about(self, flight: Flight, first: int, *results: Any) -> None:
        """Judge and scorers begin with a group as soon as it exists. One that is sampled again is the same: they are asked
        anew unless they have answered."""
        for i, media in enumerate(results[::2], first):
            if self.config.judge is not None and not _answered([flight.asked[i]] if i in flight.asked else []):
                flight.asked[i] = self._ask(flight, i, media)
            if not _answered(flight.scoring.get(i, [])):
                flight.scoring[i] = self.cluster.score(media)

    def _ask(
        self, flight: Flight, i: int, media: MediaRef, previous: Sequence[Verdict] = ()
    ) -> ray.ObjectRef[list[Verdict]]:
        seed = seed_for(self.config.seed, "pairs", flight.step, flight.prompts[i].id)
        return self.cluster.judge(media, seed, previous)

    def _begin(self) -> None:
        """Give the learners the groups of the present step that are complete, in the order of the prompts.

        Only a head start: ``learn`` gives the same without it. Where advantages depend on all groups there is none.
        """
        if not self._flights or not self.config.advantage.per_group:
            return
        flight = self._flights[0]
        before = len(flight.begun)
        while (i := len(flight.begun)) < len(flight.jobs) and (said := self._said(flight, i)) is not None:
            flight.begun += self.config.advantage([self._rewarded(flight, i, said)])[0]
        if len(flight.begun) > before:
            batch = UpdateBatch(groups=tuple(flight.groups[: len(flight.begun)]), advantages=tuple(flight.begun))
            self.cluster.begin(batch, len(flight.jobs), self.step)

    def _begun_early(self, given: int, groups: int) -> int:
        """How many of the groups that the learners were given early they could begin with (``Learner.begin``)."""
        first = len(range(0, given, self.config.optimizer.updates(groups)))
        return first - first % self.config.placement.learners

    def _said(self, flight: Flight, i: int) -> list[Verdict] | None:
        """What judge and scorers said of a group; None while that is not all, or too little to use."""
        if not flight.jobs[i].done:
            return None
        asked = [] if self.config.judge is None else [flight.asked[i]]
        refs = [*asked, *flight.scoring[i]]
        if refs and ray.wait(refs, num_returns=len(refs), timeout=0)[1]:
            return None
        said = ray.get(refs)
        return None if self._judge_watch.unusable(said[: len(asked)]) else [v for given in said for v in given]

    def _rewarded(self, flight: Flight, i: int, said: Sequence[Verdict]) -> RewardedGroup:
        return self.config.reward(self.config.sampling.group_size, said, flight.prompts[i].id)

    def _check_rewards(self, rewarded: Sequence[RewardedGroup], scores: Sequence[Sequence[Verdict]]) -> None:
        """Say so when scorers fail throughout; raise Starved when that leaves step after step without a reward."""
        flat = [v for group in scores for v in group]
        for name in sorted({v.scorer for v in flat} - {v.scorer for v in flat if v.status == "ok"}):
            reason = next(f"{v.problem}: {v.rationale}" for v in flat if v.scorer == name)
            self.console.note(f"step {self.step + 1}: the scorer {name} failed for every sibling ({reason})")
        given = any(not np.isnan(group.rewards_G).all() for group in rewarded)
        self._starved = 0 if given else self._starved + 1
        if self._starved >= STARVED_STEPS:
            raise Starved(
                f"no sibling got a reward in {STARVED_STEPS} steps running (scorer/problem/… and judge/problem/… in the "
                "metrics say why); mend that, then resume"
            )

    def _check_parts(self, rewarded: Sequence[RewardedGroup]) -> None:
        """Say so when the advantage reads a part of the reward that no sibling of the step has."""
        given = {n for group in rewarded for n, values in group.breakdown_G.items() if not np.isnan(values).all()}
        missing = [name for name in getattr(self.config.advantage, "reads", ()) if name not in given]
        if given and missing:
            self.console.note(
                f"step {self.step + 1}: advantage reads {', '.join(map(repr, missing))}, which no sibling has; the reward gives "
                f"{', '.join(sorted(given))}"
            )

    def _wait(self, refs: Sequence[Any], look: Callable[[], None] | None = None) -> None:
        """Until all references are there; looks in between."""
        pending = list(refs)
        while pending:
            (look or self._look)()
            _, pending = ray.wait(pending, timeout=POLL_S, fetch_local=False)

    def _get(self, refs: Sequence[Any]) -> list[Any]:
        self._wait(refs)
        return ray.get(list(refs))

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._look()
            time.sleep(min(POLL_S, left))

    def _look(self) -> None:
        """What the learners can begin with, and all that ``_look_around`` sees."""
        if self._stop:
            raise Interrupted
        self._begin()
        self._look_around()

    def _look_around(self) -> None:
        """Whether to stop, how processes and judge are doing (for ``status``), whether the judge needs a start."""
        if self._stop:
            raise Interrupted
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + POLL_S
        self.cluster.tend()
        self.console.workers(self.cluster.worker_states())
        self._judge_watch.tend()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.console.phase(name)
        began = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began


def _answered(refs: Sequence[Any]) -> bool:
    """Whether there are any, and all of them are there and no errors."""
    if not refs or ray.wait(list(refs), num_returns=len(refs), timeout=0)[1]:
        return False
    try:
        return bool(ray.get(list(refs)))
    except RayError:
        return False


def verdict_rows(group: GroupMedia, rewarded: RewardedGroup, verdicts: Sequence[Verdict]) -> list[VerdictRow]:
    """One row a sibling: its picture, its reward, and one verdict on it in the judge's words."""
    rows = []
    for i, (media, reward) in enumerate(zip(group.media_G, rewarded.rewards_G, strict=True)):
        said = next((v for v in verdicts if i in v.members and v.status == "ok"), None)
        text = f"{' vs '.join(map(str, said.members))}: {_words(said)}" if said else "not judged"
        rows.append(VerdictRow(prompt=group.prompt.text, media=media, score=float(reward), verdict=text))
    return rows


def _words(verdict: Verdict) -> str:
    """The judge's reply, or a scorer's numbers."""
    return verdict.rationale or ", ".join(f"{name} {values[0]:.3g}" for name, values in verdict.scores.items())


@contextmanager
def signals(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP ask the run to end; a second Ctrl-C ends it at once, without a checkpoint."""

    def first(number: int, frame: FrameType | None) -> None:
        trainer.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        trainer.console.note("stopping: what is complete is being saved (press again to stop at once)")

    before = {s: signal.signal(s, first) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
