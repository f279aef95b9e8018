"""Copies a run's directory after every checkpoint, beside the training, for nodes that do not outlive the run."""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from grpo_flex import checkpoint
from grpo_flex.config import ConfigError
from grpo_flex.copied_run import Copy, Manifest, Stored, newest_step, reason, record, write_record

LEFT_OUT = "status.json"
"""It says which process works on the run on this machine at this moment."""
PATIENCE_S = 2.0
"""The last copy may take so long before anything is said about it."""


class Mirror:
    """Copies a run's directory to ``<url>/<its name>``, one copy at a time, in a thread of its own.

    Args:
        url: ``checkpoint.mirror``.
        run_dir: The run's directory.
        say: Tells the person of a copy that failed.

    Raises:
        ConfigError, MirrorError: what lies there is another run's, or a newer state of this one, or the run itself.
    """

    def __init__(self, url: str, run_dir: Path, say: Callable[[str], None]) -> None:
        self.say = say
        self._run_dir = run_dir
        self._copy = Copy.at(f"{url.rstrip('/')}/{run_dir.name}")
        if self._copy.local and (own := run_dir.resolve()) in (
            (there := Path(self._copy.root).resolve()),
            *there.parents,
        ):
            raise ConfigError(
                f"checkpoint.mirror '{url}' would put the copy into the run itself, {own}; give another place"
            )
        self._done = self._copy.manifest() or Manifest(run=record(run_dir).get("run") or uuid4().hex)
        self._number = self._done.number
        if self._number:
            self._copy.is_here(run_dir)
        self._lock = threading.Lock()
        self._next: _Snapshot | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception):  # no ``finish`` follows; a second Ctrl-C waits for nothing
            self._wait()

    def copy(self) -> None:
        """Copy what there is now; after the copy in flight if there is one, and instead of any other that waits."""
        try:
            snapshot = _Snapshot(self._run_dir)
        except OSError as error:
            self._failed(error)
            return
        with self._lock:
            if self._next:
                self._next.close()
            self._next = snapshot
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def finish(self) -> None:
        """Copy the run as it ended, and wait for that."""
        if checkpoint.complete(self._run_dir):
            self.copy()
        self._wait()

    def _wait(self) -> None:
        if (thread := self._thread) is None:
            return
        try:
            thread.join(PATIENCE_S)
            if thread.is_alive():
                self.say(f"waiting for the last copy to {self._copy.url} (Ctrl-C goes without it)")
                thread.join()
        except KeyboardInterrupt:
            self.say(f"the last copy to {self._copy.url} is not complete; {self._stays()}")

    def _work(self) -> None:
        while snapshot := self._take():
            try:
                self._upload(snapshot)
            except Exception as error:  # each back-end has errors of its own, and none may end the run
                self._failed(error)
            finally:
                snapshot.close()

    def _take(self) -> _Snapshot | None:
        with self._lock:
            snapshot, self._next = self._next, None
            if snapshot is None:
                self._thread = None
            return snapshot

    def _upload(self, snapshot: _Snapshot) -> None:
        self._number += 1  # anew for another try too: the manifest of one that failed may be there all the same
        old, files = self._done, dict[str, Stored]()
        write_record(self._run_dir, old, self._copy.url)  # before the copy is one, so that the two know each other
        for name, seen in snapshot.files.items():
            before = old.files.get(name)
            if before and (before.size, before.mtime_ns) == (seen.st_size, seen.st_mtime_ns):
                files[name] = before
            elif opened := snapshot.open(name):
                source, size, mtime_ns = opened
                at = f"{name}.copy{self._number}" if before else name
                with source:
                    files[name] = Stored(at=at, size=self._copy.write(at, source, size), mtime_ns=mtime_ns)
        new = Manifest(run=old.run, step=snapshot.step, number=self._number, files=files)
        self._copy.describe(new)
        self._done = new
        write_record(self._run_dir, new, self._copy.url)
        known = {f.at for f in old.files.values()}
        left = {at for at in self._copy.names() if _is_left_over(at, old.files.keys() | files)}
        for at in sorted((known | left) - {f.at for f in files.values()}):
            self._copy.remove(at)

    def _failed(self, error: Exception) -> None:
        self.say(f"the copy to {self._copy.url} failed ({reason(error)}); {self._stays()}")

    def _stays(self) -> str:
        now = f"is of step {self._done.step}" if self._done.number else "holds nothing"
        return f"it {now} until the next one, after the next checkpoint or by a resume"


def _is_left_over(at: str, names: Collection[str]) -> bool:
    """Whether a name is one that uploads alone give, if no manifest has it: other files there are somebody else's."""
    own = _AGAIN.fullmatch(at)
    return bool(_CHECKPOINT.fullmatch(at)) or (own is not None and own[1] in names)


_AGAIN = re.compile(r"(.+)\.copy\d+")
_CHECKPOINT = re.compile(r"checkpoints/step_\d+/[^/]+")


class _Snapshot:
    """What a run's directory held at one moment.

    Checkpoints are held open, which keeps what is in them although they may be thinned out while they are copied. Of every
    other file as much is read as there was, for it may be growing: lines that came later are cut off by a resume. One that
    was replaced meanwhile, such as a picture by that of the next evaluation, is read as it is by then.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.step = newest_step(run_dir)
        self.files = _files(run_dir)
        held = (name for name in self.files if name.startswith("checkpoints/"))
        self._held: dict[str, BinaryIO] = {name: (run_dir / name).open("rb") for name in held}

    def open(self, name: str) -> tuple[BinaryIO, int, int] | None:
        """A file, how much of it to read, and its time of change in ns; None for one that is gone by now."""
        try:
            source = self._held.pop(name, None) or (self._run_dir / name).open("rb")
        except FileNotFoundError:
            return None
        seen, now = self.files[name], os.fstat(source.fileno())
        if not os.path.samestat(seen, now):
            seen = now
        return source, seen.st_size, seen.st_mtime_ns

    def close(self) -> None:
        for file in self._held.values():
            file.close()


def _files(run_dir: Path) -> dict[str, os.stat_result]:
    """A run's files by their relative names, without links and what is hidden: halves of files that will be renamed."""
    found: dict[str, os.stat_result] = {}
    for folder, folders, names in os.walk(run_dir):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for path in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
            with suppress(FileNotFoundError):
                if stat.S_ISREG((info := path.lstat()).st_mode):
                    found[path.relative_to(run_dir).as_posix()] = info
    found.pop(LEFT_OUT, None)
    return found
