"""A judge that the run started for itself: started again on the same port when its process has ended."""

from __future__ import annotations

import threading
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from grpo_flex.config import Judge


class JudgeAway(Exception):
    """The judge is gone for longer, or more often, than the configuration bears. The message says what to do."""


class JudgeUseless(JudgeAway):
    """The judge is there, and would answer as uselessly again."""


class JudgeServer:
    """The judge process of a run; a context manager that stops it.

    Args:
        server: ``judge.server``, an object with ``start(log_dir)``.
        log_dir: Where it writes its log.
        restarts: How often it may be started again (``judge.restarts``).

    Raises:
        ValueError: from ``server.start``, when it does not come up at the start of the run.
    """

    def __init__(self, server: Any, log_dir: Path, restarts: int) -> None:
        self._server, self._log_dir, self._allowed = server, log_dir, restarts
        self._handle: Any = server.start(log_dir)
        self.endpoints: tuple[str, ...] = tuple(self._handle.endpoints)
        self.restarts = 0
        """How often it was started again, or that was tried."""
        self._left = False

    def __enter__(self) -> JudgeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        self._handle.stop()

    @property
    def reserved(self) -> tuple[str, ...]:
        """What each endpoint's server has for itself, in words; "-" where the handle does not say."""
        return getattr(self._handle, "reserved", ("-",) * len(self.endpoints))

    @property
    def ended(self) -> bool:
        """Whether its process has ended; a handle that cannot tell (no ``alive()``) is taken to live."""
        alive = getattr(self._handle, "alive", None)
        return alive is not None and not alive()

    def tend(self) -> list[str]:
        """Let the handle start those of several replicas again that have ended, if it can; a text for each."""
        tend = getattr(self._handle, "tend", None)
        return tend() if tend and not self.ended else []

    def start_again(self) -> str:
        """One more start at the same address; blocks until it answers, and returns "" or why it did not come up.

        Raises:
            JudgeAway: it was started again as often as it may be, or came up at another address.
        """
        if self.restarts >= self._allowed:
            raise JudgeAway(
                f"the judge that the run started has ended once more, after {self.restarts} restarts (judge.restarts="
                f"{self._allowed}); see its log in {self._log_dir} for the cause, then resume"
            )
        self.restarts += 1
        self._handle.stop()
        try:
            self._handle = _at(self._server, self.endpoints[0]).start(self._log_dir)
        except (ValueError, OSError) as error:  # a port that is still taken, memory that is not yet free
            return str(error)
        if set(self._handle.endpoints) != set(self.endpoints):  # replicas may have changed places
            raise JudgeAway(
                f"the judge came up again at {', '.join(self._handle.endpoints)} and not at {', '.join(self.endpoints)}, "
                "where the run asks: give judge.server a fixed port, then resume"
            )
        if self._left:  # the run ended while it came up
            self._handle.stop()
        return ""


class Revival:
    """``start_again`` in a thread of its own: a start takes minutes, in which a run looks after its workers and hears a Ctrl-C."""

    def __init__(self, server: JudgeServer) -> None:
        self._server, self._found = server, list[str | Exception]()
        # A daemon: whoever leaves in the meantime does not wait, and what was being started ends with its parent.
        threading.Thread(target=self._start, name="judge", daemon=True).start()

    def _start(self) -> None:
        try:
            self._found.append(self._server.start_again())
        except Exception as error:  # told where it is asked for
            self._found.append(error)

    def outcome(self) -> str | None:
        """None while it lasts; then as ``start_again``."""
        if not self._found:
            return None
        found = self._found[0]
        if isinstance(found, Exception):
            raise found
        return found


def gpus_of(judge: Judge | None) -> list[str]:
    """This machine's GPUs that a judge will have once the run has started it, if its settings can tell.

    Raises:
        ValueError: it would not find enough.
    """
    tell = getattr(judge.server, "gpus_here", None) if judge else None
    return [gpu for gpus in tell() for gpu in gpus] if tell else []


def _at(server: Any, endpoint: str) -> Any:
    """The server's settings with the port that it had; unchanged where there is no such field."""
    if is_dataclass(server) and not isinstance(server, type) and "port" in {f.name for f in fields(server)}:
        return replace(server, **{"port": urlsplit(endpoint).port})
    return server
