"""How a run's progress looks: a bar with a line below it on a terminal, plain lines in a log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from grpo_flex.metrics import phase_seconds

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.text import Text

    from grpo_flex.console import Console

LINE_EVERY = 10.0
"""Seconds between two lines of plain output, at least; evaluations and the last step always show."""


def duration(seconds: float) -> str:
    """E.g. "45 s", "12 min 05 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def view(out: TextIO, clock: Callable[[], float]) -> Bar | Lines:
    """A bar on a terminal, plain lines in a log."""
    return Bar(out) if out.isatty() else Lines(out, clock)


class Bar:
    """rich's progress bar, and below it a line on what is not well, on pace, checkpoint, workers and judge."""

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
        self._below = _below(console.troubles, console.pace, console.standing)

    def step(self, console: Console, numbers: Mapping[str, float]) -> None:
        self.refresh(console)

    def note(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def stop(self, console: Console) -> None:
        self.refresh(console)
        self._live.stop()


def _below(troubles: str, pace: str, standing: str) -> Text:
    """Troubles come first: the line ends where the terminal does."""
    from rich.text import Text

    parts = [Text(troubles, "yellow"), Text(pace, "dim"), Text(standing, "dim")]
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


class Lines:
    """One line per step for logs, not more often than every ``LINE_EVERY`` seconds.

    It also names what is not well; after an evaluation the last checkpoint and how many workers and endpoints are well.
    """

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
    parts += [f"ETA {fields['eta']}"] if fields["eta"] else []
    parts += [console.standing] if evaluated and console.standing else []
    return "  ".join([*parts, console.troubles] if console.troubles else parts)
