"""The judge that a run started itself: noticed when it has ended, started again, a limited number of times."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from grpo_flex.endpoints import EndpointState
from grpo_flex.judge_server import JudgeAway, JudgeServer, Revival
from grpo_flex.judge_watch import JudgeWatch
from testbed.oracle_judge import OracleJudge


@dataclass
class Handle:
    endpoints: tuple[str, ...]
    running: bool = True

    def alive(self) -> bool:
        return self.running

    def stop(self) -> None:
        self.running = False


@dataclass(frozen=True)
class Server:
    """Comes up as often as ``ups`` says, at its own port or at the next one it likes."""

    ups: list[bool]
    port: int = 0
    faithful: bool = True
    handles: list[Handle] = field(default_factory=list)

    def start(self, log_dir: Path) -> Handle:
        if not self.ups.pop(0):
            raise ValueError("port taken")
        port = self.port if self.port and self.faithful else 8000 + len(self.handles)
        self.handles.append(Handle((f"http://127.0.0.1:{port}/v1",)))
        return self.handles[-1]


def test_started_again_at_the_same_port_and_stopped_at_the_end(tmp_path: Path) -> None:
    server = Server([True, False, True])
    with JudgeServer(server, tmp_path, restarts=3) as judge:
        assert judge.endpoints == ("http://127.0.0.1:8000/v1",) and not judge.ended
        server.handles[0].running = False
        assert judge.ended and judge.start_again() == "port taken"
        assert judge.ended and judge.start_again() == ""
        assert not judge.ended and server.handles[1].endpoints == judge.endpoints
    assert not server.handles[1].running


def test_a_start_in_a_thread_of_its_own_is_told_when_it_has_ended(tmp_path: Path) -> None:
    server = Server([True, False, True, True])
    with JudgeServer(server, tmp_path, restarts=2) as judge:
        assert told(Revival(judge)) == "port taken" and told(Revival(judge)) == ""
        with pytest.raises(JudgeAway):
            told(Revival(judge))
        judge.restarts = 0
    assert told(Revival(judge)) == "" and not server.handles[-1].running  # the run had ended in the meantime


def told(revival: Revival) -> str:
    until = time.monotonic() + 10
    while (outcome := revival.outcome()) is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    return outcome


def test_restarts_are_limited_and_the_message_says_where_to_look(tmp_path: Path) -> None:
    with JudgeServer(Server([True, True]), tmp_path, restarts=1) as judge:
        judge.start_again()
        with pytest.raises(JudgeAway, match=r"after 1 restarts \(judge\.restarts=1\).*resume") as error:
            judge.start_again()
    assert str(tmp_path) in str(error.value)


def test_a_judge_that_comes_up_elsewhere_is_no_judge(tmp_path: Path) -> None:
    server = Server([True, True], faithful=False)
    with (
        JudgeServer(server, tmp_path, restarts=1) as judge,
        pytest.raises(JudgeAway, match=r"give judge\.server a fixed"),
    ):
        judge.start_again()
    assert not server.handles[1].running


def test_a_handle_that_cannot_tell_is_taken_to_live(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Mute:
        endpoints: tuple[str, ...] = ("http://127.0.0.1:1/v1",)

        def start(self, log_dir: Path) -> Mute:
            return self

        def stop(self) -> None: ...

    assert not JudgeServer(Mute(), tmp_path, restarts=1).ended


def test_the_oracle_judge_comes_back_after_a_kill(tmp_path: Path) -> None:
    with JudgeServer(OracleJudge(), tmp_path, restarts=1) as judge:
        os.kill(judge._handle.pid, signal.SIGKILL)
        until = time.monotonic() + 10
        while not judge.ended and time.monotonic() < until:
            time.sleep(0.02)
        assert judge.ended and judge.start_again() == "" and not judge.ended


def test_one_of_several_replicas_that_has_ended_is_started_again_while_the_others_judge() -> None:
    states = [EndpointState(url=f"http://h:{k}/v1", healthy=True, in_flight=0, failures=0) for k in range(2)]
    told, notes = ["replica 1 is started again: it has ended with status 9"], list[str]()
    server = SimpleNamespace(tend=lambda: [told.pop()] if told else [], ended=False)
    cluster = SimpleNamespace(judge_states=lambda: states)
    console = SimpleNamespace(judge=lambda shown: None, note=notes.append)
    watch = JudgeWatch(cast(Any, object()), cast(Any, cluster), cast(Any, console), cast(Any, server), lambda s: None)
    watch.tend()
    assert notes == []
    states[1] = replace(states[1], healthy=False)
    watch.tend()
    watch.tend()
    assert notes == ["the judge's replica 1 is started again: it has ended with status 9"]
    assert watch.figures(0)["judge/restarts"] == 1
