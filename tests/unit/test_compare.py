"""Runs side by side."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from grpo_flex.compare import compare
from tests.unit.run_stand_in import StandInConfig, StandInOptimizer, make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    first = make_run(root, StandInConfig(name="cool"))
    second = make_run(root, StandInConfig(name="hot[1]", optimizer=StandInOptimizer(lr=3e-3)), upto=12, gain=-0.1)
    return [first, second]


def cells(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(name)]
    return re.split(r"\s{2,}", line.strip())


def test_table_has_scores_time_reward_and_configuration_differences(runs: list[Path], tmp_path: Path) -> None:
    text = compare(runs, tmp_path / "out" / "picture.png")
    cool = ["cool", "0.500", "0.800", "+0.300", "0.800", "20", "20", "1 min 08 s", "3.4"]
    assert cells(text, "cool")[:9] == cool
    assert cells(text, "hot[1]")[:7] == ["hot[1]", "0.500", "0.440", "-0.060", "0.500", "0", "12"]
    assert cells(text, "optimizer.lr") == ["optimizer.lr", "0.001", "0.003"]
    assert not [line for line in text.splitlines() if line.strip().startswith(("name", "steps", "generator"))]
    assert text.splitlines()[-1] == f"Curves and samples: {tmp_path / 'out' / 'picture.png'}"


def test_picture_holds_curves_and_the_same_prompts(runs: list[Path], tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "picture.png"
    compare(runs, picture)
    with Image.open(picture) as image:
        assert image.width > 900 and image.height > 700
        colors = {color for _, color in image.convert("RGB").getcolors(2**24) or []}
    assert {(0x2A, 0x78, 0xD6), (0xEB, 0x68, 0x34)} <= colors  # a curve for each run


def test_clips_play_side_by_side(tmp_path: Path) -> None:
    import imageio.v2 as imageio
    import numpy as np

    runs = [make_run(tmp_path / side, upto=5, frames=5) for side in ("a", "b")]
    text = compare(runs, tmp_path / "picture.png")
    assert f"Clips: {tmp_path / 'picture.mp4'}" in text.replace("\n/", "/")
    film = list(imageio.get_reader(tmp_path / "picture.mp4").iter_data())
    assert film[0].shape[1] <= 1280
    assert np.abs(film[0].astype(int) - film[4].astype(int)).max() > 100  # the disc has moved


def test_equal_configurations_and_runs_without_anything(tmp_path: Path) -> None:
    empty = [make_run(tmp_path / side, upto=-1) for side in ("a", "b")]
    text = compare(empty, tmp_path / "picture.png")
    assert "The configurations are the same." in text and "No picture" in text
    assert str(empty[0])[-8:] in text.replace("\n", "")  # two runs of one name are told apart by their paths
    assert not (tmp_path / "picture.png").exists()


def test_errors_are_one_line(runs: list[Path], tmp_path: Path) -> None:
    for folder, expected in ((tmp_path / "nothing", "no such directory"), (tmp_path, "is not a run")):
        with pytest.raises(ValueError, match=expected) as caught:
            compare([runs[0], folder])
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="1 to 8 runs, not 9"):
        compare(runs[:1] * 9)
