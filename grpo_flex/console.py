"""A run's progress, as numbers: what the terminal shows of it and what status.json tells elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from grpo_flex.metrics import headline_key, phase_seconds
from grpo_flex.status import RECENT, StatusFile, last_checkpoint
from grpo_flex.terminal import duration, view


class Console:
    """Shows a run's progress: a bar on a terminal, plain lines in a log.

    >>> with Console(total_steps=100, start_step=0, name="shapes") as console:  # doctest: +SKIP
    ...     console.phase("rollout")
    ...     console.step(1, {"reward/mean": 0.5})

    Args:
        total_steps: Training steps of the whole run.
        start_step: Steps that were done before, when a run continues.
        name: The run's name.
        run_dir: Where status.json is written, for ``status``; None writes none.
        out: Where to print; standard output if None. A terminal gets the bar, everything else lines.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        name: str = "",
        *,
        run_dir: str | Path | None = None,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._done, self._name = total_steps, start_step, name
        self._phase, self._since = "starting", time.time()
        self._shown: dict[str, float] = {}
        self._states: dict[str, dict[str, Any]] = {"workers": {}, "judge": {}}
        self._run_dir = None if run_dir is None else Path(run_dir)
        self._clock = clock
        # One mark more than there are steps between them; the first is when training began.
        self._marks: deque[float] = deque([clock()], maxlen=RECENT + 1)
        self._view = view(out if out is not None else sys.stdout, clock)
        self._status = None if run_dir is None else StatusFile(Path(run_dir), clock)

    def __enter__(self) -> Console:
        self._view.start(self)
        self._save()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._enter("finished" if self._done >= self._total else "stopped")
        self._view.stop(self)
        self._save()
        if self._status is not None:
            self._status.close()

    def phase(self, name: str) -> None:
        """Say what the run does now: rollout, judge, update, evaluate."""
        if name == "rollout" and len(self._marks) == 1:
            self._marks[0] = self._clock()  # what came before, the base model's evaluation, is no step
        self._enter(name)
        self._view.refresh(self)
        self._save()

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        """Count ``step`` steps as done; reward and held-out score are taken from ``numbers``.

        Keys are those of metrics.jsonl; a number that is absent keeps its last value on display.
        """
        if step > self._done:
            self._marks.append(self._clock())
        self._done = step
        self._shown |= {k: float(v) for k, v in numbers.items()}
        self._view.step(self, numbers)
        self._save()

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        self._view.note(text)

    def workers(self, states: Mapping[str, str]) -> None:
        """Worker -> state, for ``status``; the bar names those that are not just "alive"."""
        self._notice(workers=dict(states))

    def judge(self, health: Mapping[str, Any]) -> None:
        """Endpoint -> what is known of it, for ``status``; the bar names those that are not "healthy"."""
        self._notice(judge=dict(health))

    # What the views read.

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to go at the pace of the last steps; None before a step is done."""
        pace = self.seconds_per_step
        return None if pace is None else pace * max(0, self._total - self._done)

    @property
    def seconds_per_step(self) -> float | None:
        if len(self._marks) < 2:
            return None
        return (self._marks[-1] - self._marks[0]) / (len(self._marks) - 1)

    @property
    def done(self) -> int:
        return self._done

    @property
    def total(self) -> int:
        return self._total

    def fields(self) -> dict[str, str]:
        """Everything that is shown, as text."""
        key = headline_key([dict(self._shown)])
        eta = self.eta_seconds
        return {
            "name": self._name,
            "phase": self._phase,
            "reward": _number(self._shown.get("reward/mean")),
            "heldout": _number(self._shown.get(key) if key else None),
            "eta": "" if eta is None else duration(eta),
        }

    @property
    def pace(self) -> str:
        """Seconds of a step and of its phases: what the bar's second line goes on with."""
        seconds = self.seconds_per_step
        phases = phase_seconds(self._shown)
        parts = [f"{seconds:.1f} s a step"] if seconds is not None else []
        parts += [" · ".join(f"{name} {value:.1f} s" for name, value in phases.items())] if phases else []
        return "  ".join(parts)

    @property
    def standing(self) -> str:
        """The last checkpoint, and how many processes and endpoints of the judge are well: what the line ends with."""
        last = None if self._run_dir is None else last_checkpoint(self._run_dir)
        parts = [f"checkpoint of step {last[0]}"] if last else []
        for name, word in (("workers", "alive"), ("judge", "healthy")):
            said = self._states[name].values()
            well = sum(str(what).startswith(word) for what in said)
            parts += [f"{name} {well}/{len(said)} {word}"] if said else []
        return "  ".join(parts)

    @property
    def troubles(self) -> str:
        """Processes that are not there or were started again, and endpoints of the judge that are not asked."""
        found = [f"{name} {what}" for name, what in self._states["workers"].items() if what != "alive"]
        found += [f"judge {url} away" for url, what in self._states["judge"].items() if "healthy" not in str(what)]
        return "  ".join(found)

    def _notice(self, **states: dict[str, Any]) -> None:
        before = self.troubles
        self._states |= states
        if self.troubles != before:
            self._view.refresh(self)
        self._save(**states)

    def _enter(self, phase: str) -> None:
        self._phase, self._since = phase, time.time()

    def _save(self, **more: Any) -> None:
        if self._status is not None:
            now = {"phase": self._phase, "since": self._since, "step": self._done, "total": self._total}
            self._status.update({**now, "eta_s": self.eta_seconds, **more})


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
