"""Keeps a server and all that it starts from outliving whoever asked for it.

`python keeper.py PARENT GRACE_S COMMAND…` runs COMMAND in a session of its own and ends it, with every process below it,
when it is told to (SIGTERM, SIGINT), when the process PARENT is gone in whatever way, or when COMMAND ends by
itself. Needs nothing but the standard library, so any Python runs it. ``Kept`` is the other end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE_S = 10.0
"""How long a server may take to end by itself before it is killed."""
POLL_S = 0.2
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Kept:
    """A command under a keeper's care: ``pid`` (the keeper's), ``alive()``, ``stop()``.

    Args:
        command: What to run.
        environment: Its whole environment.
        log: Where its output goes; the folder is made. What is there of an earlier one, which may say why it ended, is kept
            as ``<log>.1``.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():
            log.replace(log.with_name(f"{log.name}.1"))
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(GRACE_S), *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,  # a Ctrl-C at the terminal is for who asked, and that one stops this
            )
        self.pid = self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def status(self) -> int | None:
        """Exit status of the command, 128 + signal if one ended it; None while it runs."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """Tells the keeper, without waiting; ``stop`` waits."""
        self._process.terminate()

    def stop(self) -> None:
        """Ends the command and all below it; harmless when it has ended. Takes ``GRACE_S`` and a little at most."""
        self._process.terminate()
        try:
            self._process.wait(GRACE_S + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# ---------------------------------------------------------------- the keeper's own process


def keep(parent: int, grace_s: float, command: Sequence[str]) -> int:
    """Runs ``command`` until it ends, a signal comes, or ``parent`` is no longer this process's parent."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda given, _: asked.append(given))
    prctl = _prctl()
    prctl(_PR_SET_CHILD_SUBREAPER, 1)  # whatever the server leaves behind becomes a child of this process
    # vLLM leaves its sockets where it made them, three at each start.
    with tempfile.TemporaryDirectory(prefix="judge-", ignore_cleanup_errors=True) as sockets:
        server = subprocess.Popen(
            command,
            start_new_session=True,
            preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),  # for the case that somebody kills the keeper
            env=os.environ | {"VLLM_RPC_BASE_PATH": sockets},
        )
        while server.poll() is None and not asked and os.getppid() == parent:
            time.sleep(POLL_S)
        _end(server, grace_s)
    status = server.returncode
    return 0 if asked else status if status >= 0 else 128 - status


def _prctl():
    """Linux's prctl; elsewhere a stand-in, where the process group alone has to do."""
    if sys.platform != "linux":
        return lambda option, value: 0
    return ctypes.CDLL(None).prctl


def _end(server: subprocess.Popen[bytes], grace_s: float) -> None:
    """Asks the server to end, then kills what is left of its group and of its descendants."""
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(grace_s)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left of the group
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    while True:  # a killed orphan's children come here in their turn
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    """Processes whose parent is this one, from /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            after_name = entry.read_text().rpartition(")")[2].split()
            if int(after_name[1]) == os.getpid():
                found.append(int(entry.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
