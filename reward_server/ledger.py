"""A file of JSON lines that only grows, so that long work goes on where it stopped."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class Ledger:
    """Records on disk, each written whole or not at all; one process writes at a time.

    A kill may leave half a line at the end, which is cut off when the file is next opened.
    """

    def __init__(self, path: Path, key: Callable[[Mapping[str, Any]], str] = lambda record: str(record["id"])) -> None:
        """Opens the file or makes it.

        Args:
            path: The file; its folder is made.
            key: What tells records apart.

        Raises:
            ValueError: another process writes the file, or a line of it is no record.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process writes {str(path)!r}: wait for it, or name another file") from error
        self._cut_half_a_line()
        self._key = key
        self.done = {key(record) for record in self}

    def _cut_half_a_line(self) -> None:
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if line.endswith(b"\n"):
                whole = self._file.tell()
        self._file.truncate(whole)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records so far, as they are in the file."""
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                    self._key(record)
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{str(self.path)!r}, line {number} is no record: move the file away") from error
                yield record

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends a record; it stands in the file when this returns."""
        line = json.dumps(record, ensure_ascii=False) + "\n"
        self._file.write(line.encode(errors="backslashreplace"))  # half a surrogate pair becomes its JSON escape
        self._file.flush()
        self.done.add(self._key(record))

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        self._file.close()
