"""THE loop: prompts -> groups -> verdicts -> rewards -> advantages -> update -> adapter."""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from grpo_flex import checkpoint
from grpo_flex.cluster import Cluster
from grpo_flex.config import RunConfig
from grpo_flex.console import Console
from grpo_flex.judge_server import JudgeAway, JudgeServer
from grpo_flex.judging import judge_metrics, judged_share
from grpo_flex.metrics import RunLog, VerdictRow
from grpo_flex.prompts import PromptStream, seed_for
from grpo_flex.rewards import reward_metrics
from grpo_flex.scorers import scorer_metrics
from grpo_flex.types import Prompt, RewardedGroup, RolloutGroup, UpdateBatch, Verdict

if TYPE_CHECKING:
    from grpo_flex.types import Adapter

    GroupRef = ray.ObjectRef[RolloutGroup]
    AdapterRef = ray.ObjectRef[Adapter]

HEARTBEAT_S = 5.0
"""Between two looks at a judge that is away."""
POLL_S = 0.5
"""How long a Ctrl-C, or a process that died, may go unnoticed while the run waits."""
STARVED_STEPS = 3
"""So many steps in a row in which no sibling got a reward end the run: it would only burn time."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the step in flight is given up, the steps before it are safe."""


class Starved(Exception):
    """Nobody gave any sibling a reward, step after step: scorers fail throughout."""


class Trainer:
    """One run in progress. ``run`` is the loop; the other methods are its phases, in the order of the data path.

    Args:
        prompts: the stream of training prompts.
        heldout: the prompts of the evaluations.
        step: training steps completed so far (0, or the checkpoint's).
        server: the judge that the run started for itself, to be started again when it dies.
    """

    def __init__(
        self, config: RunConfig, cluster: Cluster, log: RunLog, console: Console,
        *, prompts: PromptStream, heldout: Sequence[Prompt], step: int, server: JudgeServer | None = None,
    ) -> None:  # fmt: skip
        self.config, self.cluster, self.log, self.console = config, cluster, log, console
        self.prompts, self.heldout, self.step, self.server = prompts, heldout, step, server
        self._stop = False
        self._next_look = 0.0
        self._starved = 0
        self._batch: Sequence[Prompt] = ()
        self._asked: list[ray.ObjectRef[list[Verdict]]] = []
        self._scoring: list[list[ray.ObjectRef[list[Verdict]]]] = []
        self._example: tuple[GroupRef, RewardedGroup, Sequence[Verdict]] | None = None
        self._seconds: dict[str, float] = {}
        self._outage: dict[str, float] = {}

    def run(self) -> None:
        """Train until ``config.steps`` are completed.

        Raises:
            Interrupted, JudgeAway, Starved: after which ``save`` keeps every completed step.
        """
        adapter = self.cluster.publish()
        if self.log.last_step < 0:  # a run that was stopped in its first step has its step 0 already
            numbers = self.evaluate(self.cluster.publish_evaluation())
            self.log.log(0, numbers)
            self.console.step(0, numbers)
        while self.step < self.config.steps:
            began, self._seconds, self._outage = time.perf_counter(), {}, {}
            groups = self.rollout(self.prompts.batch(self.step), adapter)
            verdicts = self.judge(groups)
            scores = self.score()
            numbers = self.learn(groups, verdicts, scores)
            adapter = self.cluster.publish()
            self.step += 1
            if self.step % self.config.evaluation.every == 0 or self.step == self.config.steps:
                numbers |= self.evaluate(self.cluster.publish_evaluation())
                self.show_verdicts()
            numbers |= {f"perf/{phase}_s": seconds for phase, seconds in self._seconds.items()}
            numbers["perf/step_s"] = time.perf_counter() - began
            self.log.log(self.step, numbers)
            self.console.step(self.step, numbers)
            if self.step % self.config.checkpoint.every == 0 or self.step == self.config.steps:
                self.save()

    # ------------------------------------------------------------ phases

    def rollout(self, prompts: Sequence[Prompt], adapter: AdapterRef) -> list[GroupRef]:
        """Groups of all prompts; judge and scorers begin with each as soon as it exists."""
        with self._phase("rollout"):
            groups = self.cluster.generate(self.step, prompts, adapter)
            self._batch = prompts
            if self.config.judge is not None:
                self._asked = [self._ask(group, prompt) for group, prompt in zip(groups, prompts, strict=True)]
            self._scoring = [self.cluster.score(group) for group in groups]
            self._wait(groups)
        return groups

    def judge(self, groups: Sequence[GroupRef]) -> list[list[Verdict]]:
        """Verdicts of every group; waits for a judge that is away and asks again about what it missed."""
        if self.config.judge is None:
            return [[] for _ in groups]
        with self._phase("judge"):
            verdicts = self._get(self._asked)
            away_since = None
            while len(missing := self._unusable(verdicts)) > self._spare(len(groups)):
                away_since = away_since or time.monotonic()
                what = f"{len(missing)} of {len(groups)} groups lack verdicts{_mostly(verdicts)}"
                self._hold_for_judge(time.monotonic() - away_since, what)
                self._count("asked_again", sum(v.status != "ok" for i in missing for v in verdicts[i]))
                again = self._get([self._ask(groups[i], self._batch[i], verdicts[i]) for i in missing])
                for i, verdict in zip(missing, again, strict=True):
                    verdicts[i] = verdict
            self._count("away_s", time.monotonic() - away_since if away_since else 0.0)
            return verdicts

    def score(self) -> list[list[Verdict]]:
        """What the in-process scorers said of every group; a failed score is masked, and never asked again."""
        if not self.config.scorers:
            return [[] for _ in self._batch]
        with self._phase("score"):
            given = [[v for said in self._get(refs) for v in said] for refs in self._scoring]
        for prompt, verdicts in zip(self._batch, given, strict=True):
            self.cluster.record(self.step, prompt, verdicts)
        return given

    def learn(
        self, groups: Sequence[GroupRef], verdicts: Sequence[Sequence[Verdict]], scores: Sequence[Sequence[Verdict]]
    ) -> dict[str, float]:
        """Verdicts and scores -> rewards -> advantages -> update. Groups with too few verdicts are left out."""
        config, unusable = self.config, set(self._unusable(verdicts))
        usable = [i for i in range(len(groups)) if i not in unusable]
        said = [[*verdicts[i], *scores[i]] for i in usable]
        prompts = [self._batch[i] for i in usable]
        rewarded = [config.reward(config.sampling.group_size, v, p.id) for v, p in zip(said, prompts, strict=True)]
        self._check_rewards(rewarded, scores)
        advantages, numbers = config.advantage(rewarded)
        report = self.cluster.judge_report()  # read beside the update, which takes longer
        with self._phase("update"):
            batch = UpdateBatch(
                groups=tuple(groups[i] for i in usable),
                advantages=tuple(advantages),
            )
            result = self.cluster.update(batch, self.step)
        self._example = (groups[usable[0]], rewarded[0], said[0])
        numbers |= reward_metrics(rewarded) | judge_metrics(verdicts) | scorer_metrics(scores)
        return numbers | self._outage_metrics(len(unusable)) | ray.get(report) | dict(result.metrics)

    def evaluate(self, adapter: AdapterRef) -> dict[str, float]:
        """Mean scores of held-out samples, as heldout/<name>; pictures go to the log."""
        with self._phase("evaluate"):
            samples = list(self.cluster.evaluate(self.heldout, adapter))
        self.log.samples(self.step, samples)
        return {f"heldout/{name}": float(np.mean([s.scores[name] for s in samples])) for name in samples[0].scores}

    def show_verdicts(self) -> None:
        """One group of the step in W&B's table: prompt, picture, reward and what the judge said."""
        if self._example:
            group, rewarded, verdicts = self._example
            self.log.verdict_table(self.step, verdict_rows(ray.get(group), rewarded, verdicts))

    def save(self) -> Path:
        """Write a checkpoint of the completed steps."""
        self.console.phase("save")
        return checkpoint.save(self.log.run_dir, self.step, self.cluster.learner_state(), self.config.checkpoint.keep)

    # ------------------------------------------------------------ waiting

    def stop(self) -> None:
        """Ask the run to end at the next wait for rollouts or the judge."""
        self._stop = True

    def stopping(self, within_s: float) -> bool:
        """Whether the run was asked to end, or is within so many seconds."""
        until = time.monotonic() + within_s
        while not self._stop and time.monotonic() < until:
            time.sleep(0.05)
        return self._stop

    def _ask(self, group: GroupRef, prompt: Prompt, previous: Sequence[Verdict] = ()) -> ray.ObjectRef[list[Verdict]]:
        return self.cluster.judge(group, seed_for(self.config.seed, "pairs", self.step, prompt.id), previous)

    def _unusable(self, verdicts: Sequence[Sequence[Verdict]]) -> list[int]:
        """Indices of the groups with too small a share of judged pairs; without a judge there is none."""
        if (judge := self.config.judge) is None:
            return []
        return [i for i, vs in enumerate(verdicts) if not vs or judged_share(vs) < judge.min_judged]

    def _spare(self, groups: int) -> int:
        """How many groups a step can do without; never all of them."""
        assert self.config.judge is not None
        return min(groups - 1, groups - math.ceil(groups * self.config.judge.min_groups - 1e-9))

    def _hold_for_judge(self, away_s: float, what: str) -> None:
        """One heartbeat of waiting, and on until the judge answers its health probe."""
        assert self.config.judge is not None
        began, limit = time.monotonic(), self.config.judge.give_up_s
        while True:
            if away_s + time.monotonic() - began > limit:
                raise JudgeAway(f"{what} for longer than judge.give_up_s={limit:g}; bring the judge back, then resume")
            self.console.note(f"step {self.step + 1}: {what}; waiting for the judge")
            self._pause(HEARTBEAT_S)
            if self.cluster.judge_is_healthy():
                return
            self._revive_judge()

    def _revive_judge(self) -> None:
        """Start the run's own judge again if its process has ended; called when no endpoint is healthy."""
        if self.server is None or not self.server.ended:
            return
        self.console.note(f"step {self.step + 1}: the judge's process has ended; starting it again")
        self._count("restarts", 1)
        if problem := self.server.start_again():
            self.console.note(f"the judge did not come up: {problem}")
            self._next_look = time.monotonic() + HEARTBEAT_S
        else:
            self.cluster.judge_is_healthy()  # closes the circuit breaker now, not with its next probe

    def _outage_metrics(self, dropped: int) -> dict[str, float]:
        """What a judge that was away cost this step; nothing to say without a judge."""
        if self.config.judge is None:
            return {}
        counted = {"dropped_groups": float(dropped), "away_s": 0.0, "asked_again": 0.0, "restarts": 0.0} | self._outage
        return {f"judge/{name}": value for name, value in counted.items()}

    def _count(self, name: str, more: float) -> None:
        self._outage[name] = self._outage.get(name, 0.0) + more

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

    def _wait(self, refs: Sequence[Any]) -> None:
        """Until all references are there; looks around in between."""
        pending = list(refs)
        while pending:
            self._look()
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S, fetch_local=False)

    def _get(self, refs: Sequence[Any]) -> list[Any]:
        self._wait(refs)
        return ray.get(list(refs))

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._look()
            time.sleep(min(POLL_S, left))

    def _look(self) -> None:
        """Whether to stop, how processes and judge are doing (for ``status``), whether the judge needs a start."""
        if self._stop:
            raise Interrupted
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + POLL_S
        self.console.workers(self.cluster.worker_states())
        endpoints = self.cluster.judge_states()
        self.console.judge({e.url: str(e) for e in endpoints})
        if endpoints and not any(e.healthy for e in endpoints):
            self._revive_judge()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.console.phase(name)
        began = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began


def _mostly(verdicts: Sequence[Sequence[Verdict]]) -> str:
    """The commonest reason why verdicts are missing, for a message."""
    reasons = Counter(v.problem for group in verdicts for v in group if v.status != "ok" and v.problem)
    return f" (mostly: {reasons.most_common(1)[0][0]})" if reasons else ""


def verdict_rows(group: RolloutGroup, rewarded: RewardedGroup, verdicts: Sequence[Verdict]) -> list[VerdictRow]:
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
        trainer.console.note("stopping: the completed steps are being saved (press again to stop at once)")

    before = {s: signal.signal(s, first) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
