"""The record of every verdict, the judge's and the scorers': ``verdicts.jsonl.gz``, written, cut back and read.

The file is a chain of gzip members, each a batch of whole JSON lines that one ``write`` appended. ``zcat`` and
any gzip reader take it as one file; a process that is killed loses at most the batch it was collecting, and a
torn last member is cut off when the file is opened again.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from grpo_flex.types import Verdict

if TYPE_CHECKING:
    from rich.console import Console

FILE_NAME = "verdicts.jsonl.gz"
BATCH_LINES, BATCH_SECONDS = 64, 5.0
GZIP_MEMBER = 31  # zlib's window argument for one gzip member
BLOCK = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the file: a verdict and what it was about."""

    step: int
    prompt_id: str
    prompt: str
    about: str = ""
    """Which held-out sample stands beside the base model's; empty: the group of the step."""
    verdict: Verdict

    @property
    def group(self) -> tuple[int, str, str]:
        """Equal for verdicts on the same siblings. A held-out prompt may have the id of another."""
        return self.step, self.prompt_id, self.about


class VerdictLog:
    """Appends verdicts; not for use from several processes at once."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lines: list[str] = []
        self._since = time.monotonic()
        _cut_torn_tail(self.path)

    def add(self, step: int, prompt_id: str, prompt: str, verdict: Verdict, about: str = "") -> None:
        """Takes one verdict; written with its batch, after at most 64 lines or at the first one after 5 s."""
        line = {"step": step, "prompt_id": prompt_id, "prompt": prompt, "about": about} | asdict(verdict)
        self._lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        if len(self._lines) >= BATCH_LINES or time.monotonic() - self._since > BATCH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what was collected as one gzip member.

        Raises:
            OSError: no space or no permission; the file is as it was, and the next call tries again.
        """
        self._since = time.monotonic()
        if not self._lines:
            return
        member = gzip.compress("".join(self._lines).encode("utf-8", "surrogatepass"), compresslevel=6)
        # One unbuffered write: a kill leaves a whole member or a torn tail, never one inside the file.
        with self.path.open("ab", buffering=0) as file:
            whole = file.tell()
            try:
                if file.write(member) < len(member):  # what a disk that becomes full does before it refuses
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(whole)
                raise
        self._lines = []

    def sync(self) -> None:
        """Writes what was collected, and waits until the disk has it: a checkpoint, which does too, must not outlive it."""
        self.flush()
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


def drop_from_step(path: str | Path, step: int, evaluation: int | None = None) -> int:
    """Takes out the verdicts of ``step`` and later, as a resume from a checkpoint needs; atomic.

    Args:
        evaluation: the step from which on those of held-out samples go; None: ``step``.

    Returns:
        How many lines were dropped. A file that is not there has none.

    Raises:
        OSError: no space or no permission; the file is as it was.
    """
    path = Path(path)
    if not path.exists():
        return 0
    partial, dropped = path.with_suffix(".partial"), 0
    try:
        with partial.open("wb") as out:
            for member in gzip_members(path):
                lines = member.lines
                kept = [line for line in lines if _is_before(json.loads(line), step, evaluation)]
                dropped += len(lines) - len(kept)
                if kept:  # what stays whole, nearly all of it, is not compressed anew
                    out.write(member.packed if len(kept) == len(lines) else gzip.compress(b"".join(kept)))
            out.flush()
            os.fsync(out.fileno())
        partial.replace(path)
    except OSError as error:  # which of a full disk names no file
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    return dropped


def _is_before(record: Mapping[str, Any], step: int, evaluation: int | None) -> bool:
    return record["step"] < (evaluation if evaluation is not None and record.get("about") else step)


def read_verdicts(path: str | Path) -> Iterator[Entry]:
    """Every verdict in the order of writing; a torn last batch is left out. Raises FileNotFoundError."""
    for member in gzip_members(Path(path)):
        for line in member.lines:
            yield _entry(json.loads(line))


def _entry(record: dict[str, Any]) -> Entry:
    what = {name: record.pop(name) for name in ("step", "prompt_id", "prompt")}
    what["about"] = record.pop("about", "")  # of an earlier version: without
    record["members"] = tuple(record["members"])
    record["scores"] = {name: tuple(values) for name, values in record["scores"].items()}
    return Entry(**what, verdict=Verdict(**record))


class Member(NamedTuple):
    """One whole gzip member of the file."""

    packed: bytes
    content: bytes

    @property
    def lines(self) -> list[bytes]:
        return self.content.splitlines(keepends=True)


def gzip_members(path: Path) -> Iterator[Member]:
    """One after the other, because a long run's file does not fit into memory; stops at a torn one."""
    with path.open("rb") as file:
        rest = b""
        while True:
            packed, content, unpacker = bytearray(), bytearray(), zlib.decompressobj(GZIP_MEMBER)
            while not unpacker.eof:
                if not (block := rest or file.read(BLOCK)):
                    return
                try:
                    content += unpacker.decompress(block)
                except zlib.error:
                    return
                rest = unpacker.unused_data
                packed += block[: len(block) - len(rest)]
            yield Member(bytes(packed), bytes(content))


def _cut_torn_tail(path: Path) -> None:
    if not path.exists():
        return
    end = sum(len(member.packed) for member in gzip_members(path))
    if end < path.stat().st_size:
        os.truncate(path, end)


# ---------------------------------------------------------------- reading them


Show = Literal["all", "disagreements", "unparsed", "masked"]


def select(entries: Iterable[Entry], *, step: int | None = None, prompt: str = "", show: Show = "all") -> list[Entry]:
    """The entries that a reader asked for, in the order of writing.

    Args:
        step: Only this step.
        prompt: Only prompts with this id, or whose text contains this.
        show: "disagreements": pairs asked in both orders whose answers name different siblings; "unparsed":
            replies that could not be read; "masked": everything without a verdict.
    """
    chosen = [e for e in entries if step is None or e.step == step]
    if prompt:
        chosen = [e for e in chosen if prompt == e.prompt_id or prompt.casefold() in e.prompt.casefold()]
    kept: dict[Show, Callable[[], list[Entry]]] = {
        "all": lambda: chosen,
        "disagreements": lambda: disagreements(chosen),
        "unparsed": lambda: [e for e in chosen if e.verdict.status == "unparsed"],
        "masked": lambda: [e for e in chosen if e.verdict.status != "ok"],
    }
    return kept[show]()


def disagreements(entries: Sequence[Entry]) -> list[Entry]:
    """Both entries of each pair whose two orders were answered differently, one after the other."""
    asked: dict[tuple[object, ...], list[Entry]] = defaultdict(list)
    for e in entries:
        if e.verdict.winner is not None and len(e.verdict.members) == 2:
            asked[*e.group, *sorted(e.verdict.members)].append(e)
    return [e for both in asked.values() if len({winner_of(x.verdict) for x in both}) > 1 for e in both]


def winner_of(verdict: Verdict) -> int | None:
    """The sibling that a pair's verdict names, or None for a tie."""
    assert verdict.winner is not None
    return None if verdict.winner == 0.5 else verdict.members[int(verdict.winner)]


def main(
    run_dir: str | Path,
    *,
    step: int | None = None,
    prompt: str = "",
    show: Show = "all",
    limit: int = 20,
    full: bool = False,
) -> None:
    """Prints a run's verdicts: figures by step, then the chosen verdicts (``full``: with the whole reply).

    Raises:
        ValueError: the run has no verdicts, or none fits.
    """
    from rich.text import Text

    path = Path(run_dir) / FILE_NAME
    if not path.is_file():
        raise ValueError(f"no {FILE_NAME} in {run_dir}: give the directory of a run, e.g. runs/NAME")
    chosen = select(read_verdicts(path), step=step, prompt=prompt, show=show)
    if not chosen:
        hint = "; is any pair asked in both orders? See judge.pairs" if show == "disagreements" else ""
        there = sum(1 for _ in read_verdicts(path))
        raise ValueError(
            f"none of the {there} verdicts in {path} fits (step={step}, prompt={prompt!r}, show={show}){hint}"
        )
    console = plain_console()
    if any(not e.verdict.scorer for e in chosen):
        console.print(_step_table(chosen))
    console.print(_verdict_table(chosen[:limit]) if not full else "")
    for e in chosen[:limit] if full else []:
        console.rule(Text(printable(f"step {e.step} · {_named(e)} · {_shown(e.verdict)}")))
        nothing = _outcome(e.verdict) if e.verdict.scorer else "(no reply)"
        console.print(printable(f"{e.prompt}\n{e.verdict.rationale or nothing}"))
    if len(chosen) > limit:
        console.print(f"{len(chosen) - limit} more; see them with a larger limit", style="dim")


def _step_table(entries: Sequence[Entry]) -> Any:
    from rich.table import Table

    from grpo_flex.judge_figures import judge_metrics

    groups: dict[int, dict[object, list[Verdict]]] = defaultdict(lambda: defaultdict(list))
    for e in entries:
        if e.verdict.scorer:  # no reply to parse, no order to be consistent in
            continue
        groups[e.step][e.group].append(e.verdict)
    keys = ("verdicts", "masked_share", "parse_rate", "order_consistency", "first_position_win_rate", "latency_p95")
    table = Table("step", *(k.replace("_", " ") for k in keys), title="by step", title_justify="left")
    for step, by_prompt in sorted(groups.items()):
        found = judge_metrics(list(by_prompt.values()))
        table.add_row(str(step), *(f"{found[f'judge/{k}']:.3g}" if f"judge/{k}" in found else "–" for k in keys))
    return table


def _verdict_table(entries: Sequence[Entry]) -> Any:
    from rich.table import Table

    table = Table("step", "prompt", "shown", "verdict", "dimensions", "seconds", "what it said", title_justify="left")
    for e in entries:
        v = e.verdict
        dims = " ".join(f"{name}:{_side(value, v.members)}" for name, value in v.dimensions.items())
        said = " ".join(v.rationale.split())[:160] or "–"
        cells = (str(e.step), f"{_named(e)}\n{e.prompt}", _shown(v), _outcome(v), dims, f"{v.seconds:.2f}", said)
        table.add_row(*map(printable, cells))
    return table


def plain_console() -> Console:
    """A terminal that takes prompts and replies as they are: "[red]" is text, and no colour."""
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False)


def printable(text: str) -> str:
    """With a mark for what no terminal can be given: halves of surrogate pairs, which a JSON reply may hold."""
    return text.encode(errors="replace").decode()


def _named(entry: Entry) -> str:
    return f"{entry.prompt_id} ({entry.about})" if entry.about else entry.prompt_id


def _shown(verdict: Verdict) -> str:
    members = " vs ".join(map(str, verdict.members))
    return f"{members}, by {verdict.scorer}" if verdict.scorer else members


def _outcome(verdict: Verdict) -> str:
    if verdict.status != "ok":
        return f"{verdict.status}: {verdict.problem}"
    if verdict.winner is not None:
        return _side(verdict.winner, verdict.members)
    return " ".join(f"{name} {values[0]:.2f}" for name, values in verdict.scores.items())


def _side(position: float, members: Sequence[int]) -> str:
    return "tie" if position == 0.5 else str(members[int(position)])
