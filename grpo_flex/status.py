"""Where a run stands, from its directory: status.json, which the run keeps, its summary at the end, its status from elsewhere."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from grpo_flex.config import ConfigError
from grpo_flex.metrics import Row, check_run, curve, headline_key, keys_of, phase_seconds, read_metrics, step_seconds
from grpo_flex.terminal import duration

STATUS = "status.json"
STATUS_EVERY = 1.0
"""Seconds between two writes of status.json, at least."""
BEAT_S = 10.0
"""Between two signs of life in status.json, however long a phase takes."""
GONE_S = 60.0
"""Without a sign for so long, a run on another host counts as dead: whether its process lives cannot be seen from here."""
OVER = ("finished", "stopped")
"""Phases of a run whose process has said farewell."""
RECENT = 10
"""Steps over which the time of a step is averaged."""


class StatusFile:
    """status.json, written atomically, at most once a second, and from the first update on at least every ``BEAT_S``.

    The last state always gets there.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float]):
        self._path = run_dir / STATUS
        self._clock = clock
        pid, host = os.getpid(), os.uname().nodename
        self._state: dict[str, Any] = {"pid": pid, "started": _birth(pid), "host": host}
        self._written = -STATUS_EVERY
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._closed = threading.Event()
        self._beat: threading.Thread | None = None

    def update(self, state: Mapping[str, Any]) -> None:
        with self._lock:
            self._state |= {**state, "time": time.time()}
            if self._beat is None:
                self._beat = threading.Thread(target=self._beats, name="status", daemon=True)
                self._beat.start()
            wait = self._written + STATUS_EVERY - self._clock()
            if wait <= 0:
                self._write()
            elif self._timer is None:  # a phase that begins too soon is written when its second is over
                self._timer = threading.Timer(wait, self._late)
                self._timer.daemon = True
                self._timer.start()

    def close(self) -> None:
        self._closed.set()
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

    def _beats(self) -> None:
        while not self._closed.wait(BEAT_S):
            with self._lock:
                if not self._closed.is_set():  # nothing may come after the farewell
                    self._state["time"] = time.time()
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


class Elsewhere(ConfigError):
    """A run may still go on on another host; it does not if it gives no other sign for so many seconds more."""

    def __init__(self, message: str, left_s: float, sign: float) -> None:
        super().__init__(message)
        self.left_s, self.sign = left_s, sign


def running_pid(run_dir: Path) -> int | None:
    """The process that works on a run at this moment on this machine, unless it is this one.

    Raises:
        Elsewhere: one on another host does, or did until a moment ago.
    """
    state = _read_json(run_dir / STATUS)
    if not state or state.get("phase") in OVER:
        return None
    if (alive := _alive(state)) is None and (left := GONE_S - (time.time() - state["time"])) > 0:
        raise Elsewhere(
            f"{run_dir} is still running, or was until a moment ago, on another host ({state['host']}, process "
            f"{state['pid']}, last sign {_ago(state['time'])}); stop it there. If that host is gone, try again in "
            f"{duration(left)}, or remove {run_dir / STATUS} to go on at once",
            min(left, GONE_S),  # the clock of that host may be ahead
            state["time"],
        )
    return int(state["pid"]) if alive and state["pid"] != os.getpid() else None


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
    works = bool(state) and state["phase"] not in OVER and _alive(state) is not False
    if state.get("eta_s") and works:
        lines.append(("ETA", duration(state["eta_s"])))
    lines += [("held-out", text) for text in _before_after(rows)]
    lines.append(("checkpoint", str(last[1]) if (last := last_checkpoint(run_dir)) else "none yet"))
    lines += _mirror_lines(run_dir)
    then = "" if works else ", when last seen"
    lines += [("worker", f"{name}: {what}{then}") for name, what in state.get("workers", {}).items()]
    lines += [("judge", f"{name}: {what}{then}") for name, what in state.get("judge", {}).items()]
    _print_lines(lines, out)


def _mirror_lines(run_dir: Path) -> list[tuple[str, str]]:
    from grpo_flex.copied_run import record

    if not (known := record(run_dir)):
        return []
    there = known.get("number", known["step"])  # written by an earlier version: without the number
    return [("mirror", f"{known['url']}, of step {known['step']}" if there else f"nothing at {known['url']} yet")]


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
    if state["phase"] in OVER:
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
    """Empty also for one that a power loss has torn."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
