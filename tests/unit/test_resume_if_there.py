"""One command for the first start of a job and for all others: --resume-if-there."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_flex import checkpoint, run
from grpo_flex.__main__ import main
from grpo_flex.config import RunConfig
from grpo_flex.config_file import to_json
from grpo_flex.mirror import Mirror

Started = list[tuple[Path | None, int, str]]
"""What was started: the run that goes on, its steps, and what names it."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    seen: Started = []

    def train(config: RunConfig, resume: Path | None = None, where: str = "") -> int:
        seen.append((resume, config.steps, where))
        return 0

    monkeypatch.setattr(run, "train", train)
    return seen


@pytest.fixture
def own(config: RunConfig, tmp_path: Path) -> RunConfig:
    return replace(config, runs_dir=str(tmp_path / "runs"))


def there(config: RunConfig, name: str, saved: int = 0, steps: int = 50, at: int = 0) -> Path:
    """A run's directory with a checkpoint, or with one whose writing was cut off."""
    run_dir = Path(config.runs_dir) / name
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text('{"step": 0}\n')
    (run_dir / "config.json").write_text(to_json(replace(config, name=name, steps=steps)))
    if not saved:
        (run_dir / "checkpoints" / ".step_000005.partial").mkdir(parents=True)
        return run_dir
    folder = checkpoint.save(run_dir, saved, {}, keep=1)
    os.utime(folder, (at, at))
    return run_dir


def command(config: RunConfig, folder: Path, *words: str) -> int:
    saved, file = folder / "exp.json", folder / "exp.py"
    saved.write_text(to_json(config))
    file.write_text(
        f"from pathlib import Path\nfrom grpo_flex.config_file import from_json\ndef config(): return from_json(Path({str(saved)!r}).read_text())\n"
    )
    return main(["train", str(file), "--resume-if-there", *words])


def test_without_a_run_it_starts_one(own: RunConfig, tmp_path: Path, started: Started) -> None:
    assert command(own, tmp_path, "steps=9") == 0
    there(own, "tiny")  # nothing is saved in it, so there is nothing to resume
    there(own, "tiny-other", saved=1)
    assert command(own, tmp_path) == 0
    assert started == [(None, 9, ""), (None, own.steps, "")]


def test_the_run_that_saved_last_goes_on_with_its_own_settings(
    own: RunConfig, tmp_path: Path, started: Started
) -> None:
    there(own, "tiny")
    second = there(own, "tiny-2", saved=3, at=1000)
    assert command(own, tmp_path) == 0
    there(own, "tiny-3")
    assert command(own, tmp_path, "steps=70") == 0
    tenth = there(own, "tiny-10", saved=2, at=2000)
    assert command(own, tmp_path) == 0
    assert started == [(second, 50, str(second)), (second, 70, str(second)), (tenth, 50, str(tenth))]


def test_where_the_node_is_gone_it_comes_from_the_mirror(own: RunConfig, tmp_path: Path, started: Started) -> None:
    place = f"file://{tmp_path}/mirror"
    own = replace(own, checkpoint=replace(own.checkpoint, mirror=place))
    for name in ("tiny-2", "tiny-10", "tiny-other"):
        run_dir = there(own, name, saved=2)
        Mirror(place, run_dir, lambda _: None).finish()
        run_dir.rename(tmp_path / f"gone-{name}")
    assert command(own, tmp_path) == 0
    assert started == [(Path(own.runs_dir) / "tiny-10", 50, f"{place}/tiny-10")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resume-if-there"], "which experiment?"),
        (["--resume-if-there", "steps=3"], "which experiment?"),
        (["exp.py", "--resume", "runs/tiny", "--resume-if-there"], "not allowed with argument --resume"),
    ],
)
def test_what_it_needs(words: list[str], said: str, started: Started, capsys: pytest.CaptureFixture[str]) -> None:
    status: Any
    try:
        status = main(["train", *words])
    except SystemExit as end:
        status = end.code
    assert status == 2 and said in capsys.readouterr().err and not started


def test_the_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--resume-if-there continue the experiment's newest run that has a checkpoint" in said


def test_a_directory_whose_run_has_gone_on_elsewhere_is_set_aside(
    own: RunConfig, tmp_path: Path, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a node's own disk, to which the job comes back."""
    place = f"file://{tmp_path}/mirror"
    own = replace(own, checkpoint=replace(own.checkpoint, mirror=place))
    run_dir = there(own, "tiny", saved=10)
    Mirror(place, run_dir, print).finish()
    left = tmp_path / "left"
    shutil.copytree(run_dir, left)  # what the node keeps
    checkpoint.save(run_dir, 50, {}, keep=1)
    (run_dir / "metrics.jsonl").write_text('{"step": 50}\n')
    Mirror(place, run_dir, print).finish()
    shutil.rmtree(run_dir)
    shutil.copytree(left, run_dir)
    assert command(own, tmp_path) == 0
    assert started == [(run_dir, 50, f"{place}/tiny")] and not run_dir.exists()
    assert checkpoint.complete(run_dir.with_name("tiny.older")) and "renamed to" in capsys.readouterr().out
