"""Distillation from the oracle: right traces, kills, contradictions and servers that fail."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reward_server import asking
from reward_server.__main__ import main
from reward_server.ask import Answer
from reward_server.asking import Endpoint
from reward_server.distill import NO_LABEL_REACHED, Distillation, Tally, compact, distil, fault
from reward_server.families.flex import parse
from reward_server.ledger import Ledger
from reward_server.preferences import Preference, read, shown_order
from testbed import scenes
from testbed.judge_data import judge
from testbed.judge_preferences import render_pairs, save
from testbed.judge_trace import trace
from testbed.oracle_judge import OracleJudge, application
from tests.serving import Body, chat_app, said, serving

PAIRS = 24


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    save(folder, render_pairs(PAIRS, seed=1))
    return folder / "preferences.jsonl"


@pytest.fixture
def preferences(file: Path) -> list[Preference]:
    return list(read(file).preferences)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "LONGEST_WAIT_S", 0.0)
    monkeypatch.delenv("GRPO_FLEX_JUDGE_KEY", raising=False)


def settings(folder: Path, url: str, **changes: Any) -> Distillation:
    endpoint = Endpoint(url=url, temperature=0.7, **{k: changes.pop(k) for k in list(changes) if k == "concurrency"})
    made = Distillation(out=folder / "t.jsonl", rejected=folder / "r.jsonl", endpoint=endpoint)
    return replace(made, **changes)


def run(preferences: list[Preference], asked: Distillation) -> Tally:
    return asyncio.run(distil(preferences, asked))


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_another_file_with_the_same_ids_is_refused(tmp_path: Path, preferences: list[Preference]) -> None:
    others = [replace(p, prompt=f"another {p.prompt}") for p in preferences]
    with serving(application(OracleJudge(style="trace"))) as url:
        run(preferences[:3], settings(tmp_path, url))
        with pytest.raises(ValueError, match=r"a record of another instance with the id .* another --out"):
            run(others, settings(tmp_path, url))
        assert len(records(tmp_path / "t.jsonl")) == 3


def test_what_was_begun_with_another_seed_or_wording_is_refused(tmp_path: Path, preferences: list[Preference]) -> None:
    wording = tmp_path / "wording.txt"
    wording.write_text("Which is better for {prompt}?")
    with serving(application(OracleJudge(style="trace"))) as url:
        asked = settings(tmp_path, url)
        run(preferences[:2], asked)
        with pytest.raises(ValueError, match=r"seed is 1, not 0.*give another --out"):
            run(preferences, replace(asked, seed=1))
        with pytest.raises(ValueError, match="wording of image is"):
            run(preferences, replace(asked, family=replace(asked.family, prompt_file=str(wording))))
        assert run(preferences, asked).traces == PAIRS


def test_tokens_of_answers_that_came_to_nothing_are_counted(tmp_path: Path, preferences: list[Preference]) -> None:
    """The first try is no trace, the second is refused."""
    tries = []

    def now_and_then(body: Body) -> Any:
        tries.append(body)
        return said("nothing") if len(tries) == 1 else 400

    with serving(chat_app(now_and_then)) as url:
        tally = run(preferences[:1], settings(tmp_path, url))
    (record,) = records(tmp_path / "r.jsonl")
    assert record["prompt_tokens"] > 0 and tally.prompt_tokens == record["prompt_tokens"]


def test_the_traces_are_the_teachers_in_the_order_shown(tmp_path: Path, preferences: list[Preference]) -> None:
    unlabelled = [replace(preferences[0], label=None), replace(preferences[1], label=None, tie=True), *preferences[2:]]
    with serving(application(OracleJudge(style="trace"))) as url:
        tally = run(unlabelled, settings(tmp_path, url))
    assert (tally.traces, tally.ties, tally.rejected.total(), tally.unanswered.total()) == (PAIRS - 1, 1, 0, 0)
    made = {record["id"]: record for record in records(tmp_path / "t.jsonl")}
    assert set(made) == {p.id for p in preferences} - {preferences[1].id}
    assert {tuple(record["order"]) for record in made.values()} == {(0, 1), (1, 0)}
    assert made[preferences[0].id]["label"] is None
    for record in made.values():
        reference = scenes.reference(scenes.parse(record["prompt"]))
        one, two = (judge(np.asarray(Image.open(path)), reference) for [path] in record["media"])
        assert record["reply"] == "".join(trace(reference, one, two))
        assert (
            record["label"] in (None, parse(record["reply"]).winner)
            and record["winner"] == parse(record["reply"]).winner
        )
    assert tally.completion_tokens == sum(record["completion_tokens"] for record in made.values()) > 0


def test_a_label_in_the_file_is_the_one_of_the_candidate_shown_first(
    tmp_path: Path, preferences: list[Preference]
) -> None:
    with serving(application(OracleJudge())) as url:
        run(preferences, settings(tmp_path, url, seed=5))
    for record in records(tmp_path / "t.jsonl"):
        original = next(p for p in preferences if p.id == record["id"])
        assert tuple(record["order"]) == shown_order(original, 5)
        assert [tuple(shown) for shown in record["media"]][record["label"]] == original.candidates[original.label or 0]


def test_a_kill_loses_at_most_the_line_being_written(tmp_path: Path, preferences: list[Preference]) -> None:
    asked: list[str] = []

    def answer(body: Body) -> dict[str, Any]:
        asked.append(body["messages"][0]["content"][-1]["text"])
        return said(TRACE)

    free = [replace(p, label=None) for p in preferences]
    with serving(chat_app(answer)) as url:
        run(free[:10], settings(tmp_path, url))
        whole = (tmp_path / "t.jsonl").read_bytes()
        (tmp_path / "t.jsonl").write_bytes(whole[:-40])
        assert len(asked) == 10
        tally = run(free, settings(tmp_path, url))
    assert len(asked) == 10 + 1 + (PAIRS - 10)
    assert sorted(r["id"] for r in records(tmp_path / "t.jsonl")) == [p.id for p in preferences]
    assert tally.traces == PAIRS and tally.completion_tokens == 5 * PAIRS  # earlier runs count


def test_contradictions_are_retried_with_new_seeds_and_set_aside(tmp_path: Path, preferences: list[Preference]) -> None:
    with serving(application(OracleJudge(noise=1.0))) as url:
        tally = run(preferences, settings(tmp_path, url, tries=3))
        again = run(preferences, settings(tmp_path, url, tries=3))
    made, aside = records(tmp_path / "t.jsonl"), records(tmp_path / "r.jsonl")
    assert all(record["winner"] == record["label"] for record in made)
    assert {record["tries"] for record in made} >= {1, 2}  # a toss that changes with the seed
    assert aside and all(record["problems"] == [NO_LABEL_REACHED] * 3 for record in aside)
    assert all(len(record["replies"]) == 3 for record in aside)
    assert len(made) + len(aside) == PAIRS and tally.rejected == {NO_LABEL_REACHED: len(aside)}
    assert again == tally and records(tmp_path / "r.jsonl") == aside  # nothing is asked about twice


def test_a_server_that_fails_now_and_then_costs_nothing(tmp_path: Path, preferences: list[Preference]) -> None:
    with serving(application(OracleJudge(failure_rate=0.3, drop_rate=0.2))) as url:
        tally = run(preferences, settings(tmp_path, url))
    assert tally.traces == PAIRS and not tally.unanswered


def test_a_teacher_that_is_gone_stops_the_work_and_keeps_it(tmp_path: Path, preferences: list[Preference]) -> None:
    count = iter(range(1000))
    with (
        serving(chat_app(lambda body: said(TRACE) if next(count) < 5 else 503)) as url,
        pytest.raises(ValueError, match=r"in a row had no answer.*HTTP 503.*start the same command again"),
    ):
        run([replace(p, label=None) for p in preferences], settings(tmp_path, url, concurrency=4))
    assert len(records(tmp_path / "t.jsonl")) == 5 and not records(tmp_path / "r.jsonl")


@pytest.mark.parametrize(("status", "message"), [(401, "GRPO_FLEX_JUDGE_KEY"), (404, "HTTP 404")])
def test_what_every_question_would_meet_stops_at_once(
    tmp_path: Path, preferences: list[Preference], status: int, message: str
) -> None:
    with serving(chat_app(lambda body: status)) as url, pytest.raises(ValueError, match=message):
        run(preferences, settings(tmp_path, url))


def test_a_refused_instance_is_set_aside_once_the_teacher_is_known_to_answer(
    tmp_path: Path, preferences: list[Preference]
) -> None:
    def answer(body: Body) -> dict[str, Any] | int:
        return 400 if preferences[3].prompt in body["messages"][0]["content"][-1]["text"] else said(TRACE)

    free = [replace(p, label=None) for p in preferences]
    refused = {p.id for p in free if p.prompt == preferences[3].prompt}
    with serving(chat_app(answer)) as url:
        run(free, settings(tmp_path, url, concurrency=1))
    assert {r["id"] for r in records(tmp_path / "r.jsonl")} == refused
    assert "HTTP 400" in records(tmp_path / "r.jsonl")[0]["problems"][0]
    with (
        serving(chat_app(lambda body: 400)) as url,
        pytest.raises(ValueError, match="in a row"),
    ):
        run(free, replace(settings(tmp_path, url), out=tmp_path / "o.jsonl", rejected=tmp_path / "q.jsonl"))
    assert not records(tmp_path / "q.jsonl")  # the endpoint is at fault, not the instances


def test_an_unreadable_picture_is_set_aside_and_a_missing_one_refused(
    tmp_path: Path, preferences: list[Preference]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    broken = replace(preferences[5], candidates=((str(tmp_path / "broken.png"),), preferences[5].candidates[1]))
    with serving(application(OracleJudge())) as url:
        run([*preferences[:5], broken], settings(tmp_path, url, concurrency=1))
        assert [r["id"] for r in records(tmp_path / "r.jsonl")] == [broken.id]
        absent = replace(broken, candidates=(("/nowhere/a.png",), broken.candidates[1]))
        with pytest.raises(ValueError, match=r"/nowhere/a.png.*--media"):
            run([absent], settings(tmp_path, url))


def test_half_a_surrogate_pair_comes_back_from_the_file(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.jsonl") as ledger:
        ledger.add({"id": "\u56fe", "text": "so \ud800"})
        assert list(ledger) == [{"id": "\u56fe", "text": "so \ud800"}]


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.jsonl") as ledger:
        ledger.add({"id": "1"})
        with pytest.raises(ValueError, match="another process"):
            Ledger(tmp_path / "l.jsonl")
    (tmp_path / "l.jsonl").write_text('{"id": "1"}\nnonsense\n{"id": "2"}\n')
    with pytest.raises(ValueError, match="line 2"):
        Ledger(tmp_path / "l.jsonl")


# ---------------------------------------------------------------- what is a trace


def category(name: str, one: int = 6, two: int = 4, winner: str = "Image 1") -> dict[str, Any]:
    dim = {"name": "d", "reason_1": "r", "reason_2": "r", "score_1": one, "score_2": two}
    return {"name": name, "dims": [dim], "cat_reason": "r", "cat_winner": winner}


def reply(change: Callable[[dict[str, Any]], object] = lambda made: None) -> str:
    names = ("Semantic Alignment & Accuracy", "Image Quality & Realism", "Aesthetics & Artistry")
    made = {"categories": [category(name) for name in names], "reason": "ü", "winner": "Image 1"}
    change(made)
    return json.dumps(made)


TRACE = reply()


@pytest.mark.parametrize(
    ("text", "label", "problem"),
    [
        (TRACE, 0, ""),
        (TRACE, None, ""),
        (TRACE, 1, NO_LABEL_REACHED),
        (reply(lambda made: made.update(winner="tie")), None, "a tie"),
        (reply(lambda made: made.update(winner=None)), None, "no winner"),
        (reply(lambda made: made["categories"].pop()), None, "without winner"),
        (reply(lambda made: made["categories"][0]["dims"][0].update(score_1=7)), None, "add up"),
        (reply(lambda made: made["categories"][1].update(dims=[])), None, "without dimensions"),
        (TRACE[:-20], None, "truncated|broken"),
        (TRACE + TRACE, None, "two answers"),
        ("", None, "empty"),
    ],
)
def test_only_whole_and_right_replies_are_traces(text: str, label: Any, problem: str) -> None:
    said = fault(Answer(reply=parse(text), text=text, tokens=1, seconds=0.1), label)
    assert bool(said) == bool(problem)
    if problem:
        assert any(part in said for part in problem.split("|"))


def test_the_trace_is_the_object_alone() -> None:
    for around in ("{}", "<think>so {it} is</think>\n```json\n{}\n```", "Here it is:\n{}\nDone."):
        assert compact(around.replace("{}", TRACE)) == json.dumps(
            json.loads(TRACE), ensure_ascii=False, separators=(",", ":")
        )


# ---------------------------------------------------------------- the command


def test_the_command_stops_on_ctrl_c_and_goes_on(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.jsonl"
    with serving(application(OracleJudge(style="trace", latency_s=0.3))) as url:
        words = ["distill", str(file), "--endpoint", url, "--out", str(out)]
        begun = subprocess.Popen(
            [sys.executable, "-m", "reward_server", *words, "--concurrency", "2"],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
        )  # fmt: skip
        while begun.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= 3):
            time.sleep(0.05)
        begun.send_signal(signal.SIGINT)
        _, errors = begun.communicate(timeout=60)
        assert begun.returncode == 130 and errors.strip().endswith("stopped") and "Traceback" not in errors
        before = records(out)
        assert 3 <= len(before) < PAIRS
        assert main([*words, "--concurrency", "24"]) == 0
    assert records(out)[: len(before)] == before
    assert sorted(r["id"] for r in records(out)) == [f"{k:06d}" for k in range(PAIRS)]
    assert f"{PAIRS} traces, 0 set aside" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tries", "0"], "tries is 0"),
        (["--concurrency", "0"], "--concurrency is 0"),
        (["--body", "[1]"], "--body needs to be an object"),
        (["--body", "{"], "--body is no JSON"),
        (["--layout", "mmrb2"], "another layout"),
        (["--media", "/nowhere"], "files are missing"),
        (["--prompt-file", "/nowhere.txt"], "prompt_file"),
        (["--endpoint", "http://127.0.0.1:9/v1"], "no judge answers"),
        (["--rejected", "{out}"], "would both go to"),
        (["--", "x"], "what is 'x'"),
    ],
)
def test_wrong_words_are_refused_in_a_line(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    out = str(tmp_path / "t.jsonl")
    assert main(["distill", str(file), "--out", out, *(word.replace("{out}", out) for word in words)]) == 2
    assert message in capsys.readouterr().err
