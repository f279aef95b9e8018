"""The prompt stream and the reader of prompts files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_flex.config import ConfigError
from grpo_flex.prompts import PromptStream, read_prompts, seed_for
from grpo_flex.types import Prompt


def stream(count: int, per_step: int, seed: int = 0) -> PromptStream:
    return PromptStream([Prompt(id=str(i), text="x") for i in range(count)], per_step, seed)


@given(count=st.integers(8, 30), per_step=st.integers(1, 8), seed=st.integers(0, 9))
def test_no_prompt_comes_twice_in_an_epoch_of_whole_batches(count: int, per_step: int, seed: int) -> None:
    prompts, batches = stream(count, per_step, seed), count // per_step
    for epoch in range(3):
        drawn = [p.id for place in range(batches) for p in prompts.batch(epoch * batches + place)]
        assert len(drawn) == len(set(drawn)) == batches * per_step


def test_epochs_leave_different_prompts_out() -> None:
    prompts = stream(5, 4)
    assert len({frozenset(p.id for p in prompts.batch(epoch)) for epoch in range(20)}) > 1


def test_a_step_larger_than_the_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompts\.per_step is 4, but prompts\.train holds 3"):
        stream(3, 4)


def test_a_batch_does_not_depend_on_those_before_it() -> None:
    running, fresh = stream(7, 3), stream(7, 3)
    assert [running.batch(step) for step in range(20)][-1] == fresh.batch(19)


def test_seeds_are_stable_and_apart() -> None:
    assert seed_for(0, "rollout", 3, "p1") == 3098713884541513361
    assert seed_for("ab", "c") != seed_for("a", "bc")
    assert len({seed_for(s, p) for s in range(50) for p in range(50)}) == 2500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ("\n\n", "holds no prompts"),
        ("nonsense", "prompts.train: {}:1 is no prompt"),
        ('{"id": "a", "text": "x"}\n{"id": "b"}', "{}:2 is no prompt"),
        ('{"text": "   "}', '"text" is empty'),
        ('["a"]', "is no prompt"),
        ('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}', "has the id 'a' twice"),
    ],
)
def test_unreadable_prompts_are_named_with_their_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_prompts(str(file), "prompts.train")
    assert message.format(file) in str(error.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts\.train is '.*nowhere', which is not there"):
        read_prompts(str(tmp_path / "nowhere"), "prompts.train")
    file = tmp_path / "b"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(str(file), "prompts.train")


def test_fields_of_a_line(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"id": "a", "text": "x", "reference": {"n": 1}, "tags": ["t"]}\n\n{"text": "no id"}\n{"id": null, "text": "x"}\n{"id": 0, "text": "x"}'
    )
    first, *others = read_prompts(str(file), "prompts.train")
    assert first == Prompt(id="a", text="x", reference={"n": 1}, tags=("t",))
    assert [prompt.id for prompt in others] == ["3", "4", "0"]
