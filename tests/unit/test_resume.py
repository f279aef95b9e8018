"""What a resume may change, and what it may not."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_flex import checkpoint, run
from grpo_flex.__main__ import main
from grpo_flex.config import Adapter, ConfigError, Full, RunConfig
from grpo_flex.config_file import to_json
from grpo_flex.generators.flux import Flux
from grpo_flex.prompts import read_prompts
from grpo_flex.run_dir import SPACE_MB, basis_of, check_basis, rewrite
from tests.configs import judge_of
from tests.one_process import StandInJudge, in_one_process
from tests.tiny import write_prompts

Change = Callable[[Path, RunConfig], list[str]]


@pytest.fixture
def own(config: RunConfig, tmp_path: Path) -> RunConfig:
    """A configuration whose prompts a test may change."""
    write_prompts(tmp_path / "train.jsonl", 10)
    write_prompts(tmp_path / "heldout.jsonl", 3)
    prompts = replace(config.prompts, train=str(tmp_path / "train.jsonl"), heldout=str(tmp_path / "heldout.jsonl"))
    return replace(config, prompts=prompts, runs_dir=str(tmp_path / "runs"))


def stopped(config: RunConfig, **state: Any) -> Path:
    """The directory of a run with one step done, and exported."""
    run_dir = Path(config.runs_dir) / config.name
    checkpoint.save(run_dir, 1, state, keep=1)
    (run_dir / "adapter").mkdir()
    (run_dir / "adapter" / "pytorch_lora_weights.safetensors").write_text("")
    (run_dir / "config.json").write_text(to_json(config))
    return run_dir


def basis(config: RunConfig) -> dict[str, str]:
    train, heldout = (read_prompts(getattr(config.prompts, name), name) for name in ("train", "heldout"))
    return basis_of(config, train, heldout)


def another_model(folder: Path, config: RunConfig) -> list[str]:
    assert isinstance(config.generator, Flux)
    (folder / "other").symlink_to(config.generator.model)
    return [f"generator.model={folder / 'other'}"]


def another_file(folder: Path, config: RunConfig) -> list[str]:
    write_prompts(folder / "more.jsonl", 12)
    return [f"prompts.train={folder / 'more.jsonl'}"]


def another_text(folder: Path, config: RunConfig) -> list[str]:
    lines = [json.loads(line) for line in Path(config.prompts.train).read_text().splitlines()]
    lines[3]["text"] += "!"
    Path(config.prompts.train).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return []


def a_lost_line(folder: Path, config: RunConfig) -> list[str]:
    path = Path(config.prompts.heldout)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    return []


REFUSED: list[tuple[Change, str]] = [
    (lambda *_: ["seed=5"], "seed is now 5, and was 7"),
    (lambda *_: ["prompts.per_step=3"], "prompts.per_step is now 3, and was 2"),
    (lambda *_: ["adapter.alpha=5"], "adapter.alpha is now 5, and was "),
    (lambda *_: ["adapter.rank=5"], "adapter.rank is now 5, and was "),
    (lambda *_: ["adapter.targets=attn.to_q"], r"adapter.targets is now \('attn.to_q',\), and was "),
    (lambda *_: ["generator.height=64"], "generator.height is now 64, and was "),
    (lambda *_: ["generator.guidance=1"], "generator.guidance is now 1, and was "),
    (another_model, "generator.model is now .*other, and was .*tiny_flux"),
    (another_file, "prompts.train is now 12 prompts .*, and was 10 prompts"),
    (another_text, "prompts.train is now 10 prompts .*, and was 10 prompts"),
    (a_lost_line, "prompts.heldout is now 2 prompts .*, and was 3 prompts"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_another_run_is_refused_and_nothing_changes(
    own: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Change, message: str
) -> None:
    run_dir = stopped(own, basis=basis(own))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(run_dir), *change(tmp_path, own)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert "start a new run, without --resume" in said
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


GOES_ON = "has completed its 1 steps"
"""The complaint that comes next: these tests start nothing."""


def test_what_is_no_part_of_it_may_change(own: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = stopped(own, basis=basis(own))
    moved = Path(own.prompts.train).rename(tmp_path / "moved.jsonl")
    changed = [
        "steps=1", f"prompts.train={moved}", "optimizer.lr=0.5", "evaluation.every=9", "placement.rollout_workers=1",
        "judge.server=none", "judge.endpoints=http://127.0.0.1:9/v1", "checkpoint.every=7", "objective.clip=0.1",
        "generator.memory.vae_tiling=true",
    ]  # fmt: skip
    assert main(["train", "--resume", str(run_dir), *changed]) == 2
    assert GOES_ON in capsys.readouterr().err


def test_another_kind_of_training_is_refused(own: RunConfig) -> None:
    now = basis(replace(own, adapter=Full()))
    with pytest.raises(ConfigError, match="adapter is now Full, and was Adapter"):
        check_basis(Path("runs/x"), 1, basis(own), now)


def test_whole_numbers_may_be_written_without_a_point(own: RunConfig) -> None:
    assert isinstance(own.adapter, Adapter)
    one, other = (replace(own, adapter=replace(own.adapter, alpha=alpha)) for alpha in (8, 8.0))
    assert basis(one) == basis(other)


def test_a_checkpoint_of_an_earlier_version_says_nothing_of_it(
    own: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume", str(stopped(own)), "steps=1", "seed=5"]) == 2
    assert GOES_ON in capsys.readouterr().err


def free(monkeypatch: pytest.MonkeyPatch, megabytes: int) -> None:
    usage = shutil._ntuple_diskusage(2**40, 2**40, megabytes * 2**20)  # pyright: ignore
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_a_resume_needs_room_too(
    own: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = stopped(own, basis=basis(own))
    in_one_process(monkeypatch, StandInJudge(lambda _: 6))
    free(monkeypatch, SPACE_MB - 1)
    assert main(["train", "--resume", str(run_dir)]) == 2
    out, err = capsys.readouterr()
    assert f"'{run_dir}' has 255 MB free" in err and "free some, then --resume" in err and "resuming" not in out


def test_a_disk_that_is_full_at_a_resume_leaves_the_configuration(
    own: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose config.json is cut off can never be resumed."""
    judge = replace(judge_of(own), server=None, endpoints=("http://judge/v1",))
    in_one_process(monkeypatch, StandInJudge(lambda _: 6))
    config = replace(own, steps=1, judge=judge, evaluation=replace(own.evaluation, versus_base=0))
    assert run.train(config) == 0
    path = Path(config.runs_dir) / config.name / "config.json"
    before = path.read_text()
    opened = Path.open

    def full(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = opened(self, mode, *arguments, **options)  # which empties it
        if "config.json" in self.name and "w" in mode:
            file.close()
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        assert main(["train", "--resume", str(path.parent), "steps=2"]) == 2
    assert "No space left" in capsys.readouterr().err and path.read_text() == before
    assert main(["train", "--resume", str(path.parent), "steps=2"]) == 0
    assert json.loads(path.read_text())["steps"] == 2
    assert not list(path.parent.glob(".config*"))


def test_a_resume_that_changes_nothing_leaves_the_configuration_as_it_is(own: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    rewrite(path, to_json(own))
    before = path.stat()
    rewrite(path, to_json(own))
    assert path.stat().st_ino == before.st_ino and path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "config.json is not that of a run"),
        ('{"architectures": ["Qwen3VLForConditionalGeneration"]}', "config.json is not that of a run"),
        ('{"type": "grpo_flex.config:Prompts", "train": "a", "heldout": "b"}', "config.json is not that of a run"),
        ("{", "config.json does not fit"),
    ],
)
def test_a_folder_of_something_else_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "config.json").write_text(content)
    for words in (["train", "--resume", str(tmp_path)], ["evaluate", str(tmp_path)]):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    for command in ("report", "compare"):
        assert main([command, str(tmp_path)]) == (0 if content.startswith('{"') else 2)
        said = capsys.readouterr().err
        assert content.startswith('{"') or "is no configuration of a run" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "README.md"], "'README.md' is no experiment"),
        (["train", "experiments/shapes_image.py", "--resume", ""], "--resume names no run"),
    ],
)
def test_what_names_no_run_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_a_number_of_rows_is_not_negative(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verdicts", "runs/any", "--limit", "-3"])
    assert "--limit" in capsys.readouterr().err
