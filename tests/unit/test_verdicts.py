"""Reading a run's verdicts back: selections by hand, and what the command prints."""

from __future__ import annotations

import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_flex import verdicts
from grpo_flex.types import Verdict
from grpo_flex.verdicts import (
    FILE_NAME,
    Entry,
    VerdictLog,
    disagreements,
    drop_from_step,
    main,
    read_verdicts,
    select,
)


def entry(step: int, prompt_id: str, members: tuple[int, int], winner: float | None, **more: Any) -> Entry:
    status = more.pop("status", "ok")
    verdict = Verdict(members=members, status=status, winner=winner, dimensions={}, **more)
    return Entry(step=step, prompt_id=prompt_id, prompt=f"a picture of {prompt_id}", verdict=verdict)


ENTRIES = [
    entry(0, "cat", (0, 1), 0.0, rationale="[bold]Image 1[/bold] it is"),
    entry(0, "cat", (1, 0), 0.0),  # names 1, where the other order named 0
    entry(0, "dog", (0, 1), 0.0),
    entry(0, "dog", (1, 0), 1.0),  # both orders name 0
    entry(1, "cat", (0, 1), None, status="unparsed", problem="two answers", rationale="both!"),
    entry(1, "cat", (1, 0), None, status="timeout", problem="request timed out"),
    entry(1, "dog", (0, 1), 0.5),
    entry(1, "dog", (1, 0), 0.5),
    entry(2, "dog", (0, 1), 0.5),
    entry(2, "dog", (1, 0), 0.0),
]


@pytest.mark.parametrize(
    ("asked", "rows"),
    [
        ({}, range(10)),
        ({"step": 1}, [4, 5, 6, 7]),
        ({"prompt": "cat"}, [0, 1, 4, 5]),
        ({"prompt": "Picture Of Dog", "step": 0}, [2, 3]),
        ({"show": "unparsed"}, [4]),
        ({"show": "masked"}, [4, 5]),
        ({"show": "disagreements"}, [0, 1, 8, 9]),
        ({"show": "disagreements", "step": 1}, []),
    ],
)
def test_selections(asked: dict[str, Any], rows: Any) -> None:
    assert select(ENTRIES, **asked) == [ENTRIES[k] for k in rows]


def test_the_same_pair_of_two_prompts_or_steps_is_no_disagreement() -> None:
    assert disagreements([ENTRIES[0], entry(0, "dog", (1, 0), 0.0), entry(1, "cat", (1, 0), 0.0)]) == []


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    log = VerdictLog(tmp_path / FILE_NAME)
    for e in ENTRIES:
        log.add(e.step, e.prompt_id, e.prompt, e.verdict)
    log.flush()
    return tmp_path


def test_a_held_out_prompt_with_the_id_of_another_is_another() -> None:
    shown = entry(0, "cat", (1, 0), 0.0)
    assert disagreements([ENTRIES[0], shown]) and not disagreements([ENTRIES[0], replace(shown, about="held-out 3")])


def test_any_text_is_printed_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    log = VerdictLog(tmp_path / FILE_NAME)
    said = Verdict(members=(0, 1), status="ok", winner=0.0, rationale="[red]half \ud800 a pair[/b]")
    log.add(1, "p", "a sign [/b] in [red] :cat:", said, "held-out 3")
    log.flush()
    for full in (False, True):
        main(tmp_path, full=full)
        printed = " ".join(capsys.readouterr().out.split())
        assert "[red]half ? a" in printed and "held-out" in printed
    assert "a sign [/b] in [red] :cat:" in printed
    (read,) = read_verdicts(tmp_path / FILE_NAME)
    assert read.about == "held-out 3"


def test_what_is_written_is_read_back(run_dir: Path) -> None:
    assert list(read_verdicts(run_dir / FILE_NAME)) == ENTRIES


@pytest.mark.parametrize("block", [1, 100, verdicts.BLOCK])
def test_a_long_file_is_read_in_pieces_and_what_a_resume_keeps_stays_byte_for_byte(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(verdicts, "BLOCK", block)
    path = run_dir / FILE_NAME
    first = path.read_bytes()
    log = VerdictLog(path)
    for e in ENTRIES:
        log.add(e.step + 10, e.prompt_id, e.prompt, e.verdict)
        log.flush()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    VerdictLog(path)
    assert whole.startswith(path.read_bytes()) and len(list(read_verdicts(path))) == 2 * len(ENTRIES) - 1
    assert drop_from_step(path, 10) == len(ENTRIES) - 1
    assert path.read_bytes() == first


def test_the_command_prints_figures_and_verdicts(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    main(run_dir, show="masked")
    out = capsys.readouterr().out
    assert "two answers" in out and "request timed out" in out and "a picture of dog" not in out
    main(run_dir, step=0, limit=1, full=True)
    out = capsys.readouterr().out
    assert "[bold]Image 1[/bold] it is" in out and "3 more" in out


def test_a_useless_question_has_one_clear_answer(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of the 10 verdicts"):
        main(run_dir, step=7)
    with pytest.raises(ValueError, match=f"no {FILE_NAME} in"):
        main(tmp_path / "elsewhere")


def test_a_disk_that_becomes_full_leaves_whole_members(tmp_path: Path) -> None:
    """The first write takes a part of what it is given, as a disk does that has some room left."""
    log, limits = VerdictLog(tmp_path / FILE_NAME), resource.getrlimit(resource.RLIMIT_FSIZE)
    log.add(1, "cat", "a cat", ENTRIES[0].verdict)
    log.flush()
    whole = log.path.read_bytes()
    log.add(1, "dog", "a dog", ENTRIES[2].verdict)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            log.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.path.read_bytes() == whole
    log.flush()  # somebody made room
    assert [e.prompt_id for e in read_verdicts(log.path)] == ["cat", "dog"]


def test_a_step_is_on_the_disk_and_a_batch_waits_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system over a network one sync takes as long as many questions."""
    log, synced = VerdictLog(tmp_path / FILE_NAME), list[int]()
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    log.sync()  # no file yet
    log.add(1, "cat", "a cat", ENTRIES[0].verdict)
    log.flush()
    assert synced == []
    log.add(1, "dog", "a dog", ENTRIES[2].verdict)
    log.sync()
    assert synced == [log.path.stat().st_size] and len(list(read_verdicts(log.path))) == 2


def test_a_cut_that_a_full_disk_refuses_leaves_the_file_and_nothing_beside_it(run_dir: Path) -> None:
    path, limits = run_dir / FILE_NAME, resource.getrlimit(resource.RLIMIT_FSIZE)
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '.*{FILE_NAME}'"):
            drop_from_step(path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(run_dir.iterdir()) == [path]
    assert drop_from_step(path, 2) == 2  # somebody made room


def test_what_an_evaluation_that_was_cut_short_asked_is_taken_out_alone(tmp_path: Path) -> None:
    log = VerdictLog(tmp_path / FILE_NAME)
    for step, about in ((1, ""), (1, "held-out 0"), (2, ""), (2, "held-out 0"), (3, "")):
        log.add(step, "cat", "a cat", ENTRIES[0].verdict, about)
    log.flush()
    assert drop_from_step(tmp_path / FILE_NAME, 3, evaluation=2) == 2
    kept = [(entry.step, entry.about) for entry in read_verdicts(tmp_path / FILE_NAME)]
    assert kept == [(1, ""), (1, "held-out 0"), (2, "")]
