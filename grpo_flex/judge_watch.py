"""A step waits until its groups are judged: for a judge that is away, and for one that has to be started again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from grpo_flex.config import Judge
from grpo_flex.console import Console
from grpo_flex.judge_figures import judged_share, mostly, what_to_mend
from grpo_flex.judge_server import JudgeAway, JudgeServer, JudgeUseless, Revival
from grpo_flex.types import Verdict

if TYPE_CHECKING:
    from grpo_flex.cluster import Cluster

HEARTBEAT_S = 5.0
"""Between two looks at a judge that is away."""
ALIKE_ROUNDS = 3
"""So often in a row a judge that is there may answer a step in a way that it would answer again."""


class JudgeWatch:
    """The judge as the loop sees it.

    Args:
        judge: Its settings, or None: every group has the verdicts that it needs.
        server: The judge that the run started for itself, to be started again when its process has ended.
        pause: Waits so many seconds and looks after the run meanwhile, ``tend`` included.
    """

    def __init__(
        self,
        judge: Judge | None,
        cluster: Cluster,
        console: Console,
        server: JudgeServer | None,
        pause: Callable[[float], None],
    ) -> None:
        self._judge, self._cluster, self._console = judge, cluster, console
        self._server, self._pause = server, pause
        self._revival: Revival | None = None
        """Of the run's own judge, while it is being started again."""
        self._not_before = 0.0
        """When it may be started again."""
        self._counts: dict[str, float] = {}

    def unusable(self, verdicts: Sequence[Sequence[Verdict]]) -> list[int]:
        """Indices of the groups with too small a share of judged pairs (``judge.min_judged``)."""
        if self._judge is None:
            return []
        return [i for i, vs in enumerate(verdicts) if not vs or judged_share(vs) < self._judge.min_judged]

    def missing(self, step: int, verdicts: Sequence[Sequence[Verdict]]) -> Iterator[list[int]]:
        """The groups to ask about again, each time that the judge is back, until enough of them are judged.

        Args:
            step: For messages.
            verdicts: Of every group; the caller replaces those of the groups it asked about again.

        Raises:
            JudgeAway: the judge was away for longer than ``judge.give_up_s``, or would answer as uselessly again.
        """
        away_since, alike = None, 0
        while len(missing := self.unusable(verdicts)) > self._spare(len(verdicts)):
            away_since = away_since or time.monotonic()
            lacking = [verdicts[i] for i in missing]
            what = f"{len(missing)} of {len(verdicts)} groups lack verdicts{mostly(lacking)}"
            mend = what_to_mend(lacking)
            alike = alike + 1 if mend else 0
            if alike >= ALIKE_ROUNDS:
                raise JudgeUseless(f"{what}, however often it is asked: the judge is there; {mend}, then resume")
            self._hold(step, time.monotonic() - away_since, what, mend)
            yield missing
        self.count("away_s", time.monotonic() - away_since if away_since else 0.0)

    def tend(self) -> None:
        """Tells ``status`` of the endpoints, and starts the run's own judge, or one of its replicas, again that has ended."""
        endpoints = self._cluster.judge_states()
        self._console.judge({e.url: str(e) for e in endpoints})
        if self._server is not None and self._revival is None and any(not e.healthy for e in endpoints):
            for lost in self._server.tend():
                self._console.note(f"the judge's {lost}")
                self.count("restarts", 1)
        if self._revival is not None or (endpoints and not any(e.healthy for e in endpoints)):
            self._revive()

    def count(self, name: str, more: float) -> None:
        self._counts[name] = self._counts.get(name, 0.0) + more

    def next_step(self) -> None:
        """What is counted from here on is the next step's."""
        self._counts = {}

    def figures(self, dropped: int) -> dict[str, float]:
        """What a judge that was away cost this step; nothing to say without a judge.

        Args:
            dropped: Groups that are left out of the update.
        """
        if self._judge is None:
            return {}
        counts = {"dropped_groups": float(dropped), "away_s": 0.0, "asked_again": 0.0, "restarts": 0.0} | self._counts
        return {f"judge/{name}": value for name, value in counts.items()}

    def _spare(self, groups: int) -> int:
        """How many groups a step can do without (``judge.min_groups``); never all of them."""
        share = self._judge.min_groups if self._judge else 0.0
        return min(groups - 1, groups - math.ceil(groups * share - 1e-9))

    def _hold(self, step: int, away_s: float, what: str, mend: str) -> None:
        """One heartbeat of waiting, and on until the judge answers its health probe."""
        assert self._judge is not None
        began, limit = time.monotonic(), self._judge.give_up_s
        while True:
            if away_s + time.monotonic() - began > limit:
                mend = mend or "bring the judge back"
                raise JudgeAway(f"{what} for longer than judge.give_up_s={limit:g}; {mend}, then resume")
            self._console.note(f"step {step}: {what}; waiting for the judge")
            self._pause(HEARTBEAT_S)
            if self._cluster.judge_is_healthy():
                return
            self._revive()

    def _revive(self) -> None:
        """Called when no endpoint is healthy, and until the judge is up."""
        if self._revival is not None:
            if (problem := self._revival.outcome()) is None:
                return
            self._revival = None
            if problem:
                self._console.note(f"the judge did not come up: {problem}")
                self._not_before = time.monotonic() + HEARTBEAT_S
            else:
                self._cluster.judge_is_healthy()  # closes the circuit breaker now, not with its next probe
        elif self._server is not None and self._server.ended and time.monotonic() >= self._not_before:
            self._console.note("the judge's process has ended; starting it again")
            self.count("restarts", 1)
            self._revival = Revival(self._server)
