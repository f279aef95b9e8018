"""The terminal: a run's progress while it trains, its summary at the end, its status from elsewhere."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from grpo_flex.metrics import Row, check_run, curve, headline_key, keys_of, read_metrics, step_seconds

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.text import Text

STATUS = "status.json"
STATUS_EVERY = 1.0
"""Seconds between two writes of status.json, at least."""
LINE_EVERY = 10.0
"""Seconds between two lines of plain output, at least; evaluations and the last step always show."""
RECENT = 10
"""Steps over which the time of a step is averaged."""


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
        self._view = _view(out if out is not None else sys.stdout, clock)
        self._status = None if run_dir is None else _StatusFile(Path(run_dir), clock)

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
        """Seconds of a step and of its phases, and the last checkpoint: what the bar's second line ends with."""
        seconds = self.seconds_per_step
        phases = phase_seconds(self._shown)
        parts = [f"{seconds:.1f} s a step"] if seconds is not None else []
        parts += [" · ".join(f"{name} {value:.1f} s" for name, value in phases.items())] if phases else []
        last = None if self._run_dir is None else last_checkpoint(self._run_dir)
        parts += [f"checkpoint of step {last[0]}"] if last else []
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


def duration(seconds: float) -> str:
    """E.g. "45 s", "12 min 05 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# ---------------------------------------------------------------- views


def _view(out: TextIO, clock: Callable[[], float]) -> _Bar | _Lines:
    return _Bar(out) if out.isatty() else _Lines(out, clock)


class _Bar:
    """rich's progress bar, and below it a line on pace and checkpoint, and on what is not well."""

    def __init__(self, out: TextIO):
        from rich.console import Console as Terminal
        from rich.console import Group
        from rich.live import Live
        from rich.text import Text

        self._progress = _progress()
        self._below = Text()
        self._live = Live(
            get_renderable=lambda: Group(self._progress, self._below), console=Terminal(file=out), refresh_per_second=4
        )

    def start(self, console: Console) -> None:
        fields: dict[str, Any] = console.fields()
        self._task = self._progress.add_task("", total=console.total, completed=console.done, **fields)
        self._live.start()

    def refresh(self, console: Console) -> None:
        fields: dict[str, Any] = console.fields()
        self._progress.update(self._task, completed=console.done, **fields)
        self._below = _below(console.troubles, console.pace)

    def step(self, console: Console, numbers: Mapping[str, float]) -> None:
        self.refresh(console)

    def note(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def stop(self, console: Console) -> None:
        self.refresh(console)
        self._live.stop()


def _below(troubles: str, pace: str) -> Text:
    """Troubles come first: the line ends where the terminal does."""
    from rich.text import Text

    parts = [Text(troubles, "yellow"), Text(pace, "dim")]
    line = Text("  ").join(part for part in parts if part)
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _progress() -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("[bold]{task.fields[name]}"),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("[cyan]{task.fields[phase]:<9}"),
        TextColumn("reward {task.fields[reward]}"),
        TextColumn("held-out [bold green]{task.fields[heldout]}"),
        TextColumn("[dim]{task.fields[eta]}"),
        expand=True,
    )


class _Lines:
    """One line per step for logs, not more often than every ``LINE_EVERY`` seconds."""

    def __init__(self, out: TextIO, clock: Callable[[], float]):
        self._out, self._clock = out, clock
        self._next = 0.0

    def start(self, console: Console) -> None:
        fields = console.fields()
        self._print(f"{fields['name']}: {console.done} of {console.total} steps done")
        self._next = self._clock()

    def refresh(self, console: Console) -> None:
        """Phases pass too often for a log."""

    def step(self, console: Console, numbers: Mapping[str, float]) -> None:
        evaluated = any(key.startswith("heldout/") for key in numbers)
        if evaluated or console.done >= console.total or self._clock() >= self._next:
            self._next = self._clock() + LINE_EVERY
            self._print(_line(console, numbers, evaluated))

    def note(self, text: str) -> None:
        self._print(text)

    def stop(self, console: Console) -> None:
        self._print(f"{console.fields()['phase']} at step {console.done} of {console.total}")

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)  # a log that is read while it grows must not be buffered


def _line(console: Console, numbers: Mapping[str, float], evaluated: bool) -> str:
    fields = console.fields()
    width = len(str(console.total))
    parts = [f"step {console.done:>{width}}/{console.total}", f"reward {fields['reward']}"]
    parts += [f"held-out {fields['heldout']}"] if evaluated else []
    pace = console.seconds_per_step
    parts += [f"{pace:.1f} s/step"] if pace is not None else []
    phases = phase_seconds(dict(numbers))
    parts += [" ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items())] if phases else []
    return "  ".join([*parts, f"ETA {fields['eta']}"] if fields["eta"] else parts)


def phase_seconds(row: Row | Mapping[str, float]) -> dict[str, float]:
    """Phase -> seconds, of one step; the step as a whole is no phase."""
    found = {k[len("perf/") : -2]: v for k, v in row.items() if k.startswith("perf/") and k.endswith("_s")}
    return {name: value for name, value in found.items() if value is not None and name != "step"}


# ---------------------------------------------------------------- status.json


class _StatusFile:
    """status.json, written atomically and at most once a second; the last state always gets there."""

    def __init__(self, run_dir: Path, clock: Callable[[], float]):
        self._path = run_dir / STATUS
        self._clock = clock
        pid, host = os.getpid(), os.uname().nodename
        self._state: dict[str, Any] = {"pid": pid, "started": _birth(pid), "host": host}
        self._written = -STATUS_EVERY
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def update(self, state: Mapping[str, Any]) -> None:
        with self._lock:
            self._state |= {**state, "time": time.time()}
            wait = self._written + STATUS_EVERY - self._clock()
            if wait <= 0:
                self._write()
            elif self._timer is None:  # a phase that begins too soon is written when its second is over
                self._timer = threading.Timer(wait, self._late)
                self._timer.daemon = True
                self._timer.start()

    def close(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._write()

    def _late(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer = None
                self._write()

    def _write(self) -> None:
        self._written = self._clock()
        half = self._path.with_name(f".{STATUS}.part")
        with suppress(OSError):  # only a display: what the run cannot do without says so by itself
            half.write_text(json.dumps(self._state, indent=1), encoding="utf-8")
            os.replace(half, self._path)


def _birth(pid: int) -> str:
    """When the process began, in the kernel's own count: tells a pid from its later re-use. "" if unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def running_pid(run_dir: Path) -> int | None:
    """The process that works on a run at this moment on this machine, unless it is this one."""
    state = _read_json(run_dir / STATUS)
    over = not state or state.get("phase") in ("finished", "stopped") or state["pid"] == os.getpid()
    return None if over or not _alive(state) else int(state["pid"])


def _alive(state: Mapping[str, Any]) -> bool | None:
    """Whether the run's process lives; None when it runs on another host."""
    if state.get("host") != os.uname().nodename:
        return None
    try:
        os.kill(state["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process, so there is one
        pass
    return _birth(state["pid"]) == state["started"]


# ---------------------------------------------------------------- summary and status


def summary(run_dir: str | Path, resume_command: str = "", out: TextIO | None = None, stopped: bool = False) -> None:
    """Print what came of a run: held-out score before and after, and where its results are.

    Args:
        run_dir: The run's directory.
        resume_command: How to continue it, as the user would type it; left out when empty.
        out: Standard output if None.
        stopped: The run ended before its last step.

    Raises:
        ValueError: ``run_dir`` is no run's directory.
    """
    run_dir = check_run(run_dir)
    rows = read_metrics(run_dir)
    how = "stopped" if stopped else "finished"
    lines = [("", f"{run_dir.name}: {how} at step {rows[-1]['step'] if rows else 0}")]
    lines += [("held-out", text) for text in _before_after(rows)]
    for label, name in _RESULTS:
        lines += [(label, str(run_dir / name))] if (run_dir / name).exists() else []
    lines += _mirror_lines(run_dir)
    lines += [("continue", resume_command)] if resume_command else []
    _print_lines(lines, out)


_RESULTS = (
    ("pictures", "samples/before_after.png"),
    ("clips", "samples/before_after.mp4"),
    ("adapter", "adapter/pytorch_lora_weights.safetensors"),
    ("weights", "weights"),
    ("report", "report.html"),
)


def _before_after(rows: list[Row]) -> list[str]:
    out = []
    first = headline_key(rows)
    for key in sorted(keys_of(rows, "heldout/"), key=lambda k: k != first):
        _, values = curve(rows, key)
        if len(values) > 1:
            change = f"({values[-1] - values[0]:+.3f})"
            out.append(f"{key.removeprefix('heldout/'):<10} {values[0]:.3f} → {values[-1]:.3f} {change}")
        elif values:
            out.append(f"{key.removeprefix('heldout/'):<10} {values[0]:.3f}")
    return out


def _print_lines(lines: list[tuple[str, str]], out: TextIO | None) -> None:
    from rich.console import Console as Terminal
    from rich.text import Text

    terminal = Terminal(file=out, soft_wrap=True)
    for label, text in lines:
        line = Text(f"  {label:<11}", style="dim") + Text(text) if label else Text(text, style="bold")
        terminal.print(line, highlight=False)


def status(run_dir: str | Path, out: TextIO | None = None) -> None:
    """Print where a run stands, from its directory: phase, pace, ETA, checkpoint, process, workers, judge.

    Raises:
        ValueError: ``run_dir`` is no run's directory.
    """
    run_dir = check_run(run_dir)
    rows = read_metrics(run_dir)
    state = _read_json(run_dir / STATUS)
    total = state.get("total") or _read_json(run_dir / "config.json").get("steps", "?")
    done = state.get("step", rows[-1]["step"] if rows else 0)
    lines = [("", f"{run_dir.name}: step {done} of {total}")]
    lines += [("process", _process_text(state)), ("phase", _phase_text(state))]
    lines += _pace_lines(rows[-RECENT:])
    if state.get("eta_s") and _alive(state) is not False:
        lines.append(("ETA", duration(state["eta_s"])))
    lines += [("held-out", text) for text in _before_after(rows)]
    lines.append(("checkpoint", str(last[1]) if (last := last_checkpoint(run_dir)) else "none yet"))
    lines += _mirror_lines(run_dir)
    lines += [("worker", f"{name}: {what}") for name, what in state.get("workers", {}).items()]
    lines += [("judge", f"{name}: {what}") for name, what in state.get("judge", {}).items()]
    _print_lines(lines, out)


def _mirror_lines(run_dir: Path) -> list[tuple[str, str]]:
    from grpo_flex.copied_run import record

    if not (known := record(run_dir)):
        return []
    return [
        ("mirror", f"{known['url']}, of step {known['step']}" if known["step"] else f"nothing at {known['url']} yet")
    ]


def _pace_lines(recent: list[Row]) -> list[tuple[str, str]]:
    steps = [seconds for row in recent if (seconds := step_seconds(row)) is not None]
    if not steps:
        return []
    names = list(dict.fromkeys(name for row in recent for name in phase_seconds(row)))
    parts = []
    for name in names:
        values = [v for row in recent if (v := phase_seconds(row).get(name)) is not None]
        parts.append(f"{name} {sum(values) / len(values):.1f} s")
    pace = f"{sum(steps) / len(steps):.1f} s, mean of the last {len(steps)}"
    return [("a step", f"{pace}: {' · '.join(parts)}" if parts else pace)]


def _process_text(state: Mapping[str, Any]) -> str:
    if not state:
        return "unknown: the run wrote no status.json"
    where = f"pid {state['pid']} on {state['host']}"
    if state["phase"] in ("finished", "stopped"):
        return f"ended ({where})"
    alive = _alive(state)
    if alive is None:
        return f"runs on another host: {where}, last sign {_ago(state['time'])}"
    return f"alive ({where})" if alive else f"dead without a farewell ({where}), last sign {_ago(state['time'])}"


def _phase_text(state: Mapping[str, Any]) -> str:
    return f"{state['phase']}, since {_ago(state['since'])}" if state else "unknown"


def _ago(moment: float) -> str:
    return f"{duration(max(0.0, time.time() - moment))} ago"


def last_checkpoint(run_dir: Path) -> tuple[int, Path] | None:
    """(step, folder) of the newest."""
    numbered = [
        (int(path.name.removeprefix("step_")), path)
        for path in (run_dir / "checkpoints").glob("step_*")
        if path.name.removeprefix("step_").isdigit()
    ]
    return max(numbered, default=None)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
