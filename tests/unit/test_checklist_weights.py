"""VisionReward's weights: known ones are found again, from data and through a judge, and the family reads the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reward_server.__main__ import main
from reward_server.checklist_weights import fit, regress
from reward_server.families.base import Completion
from reward_server.families.vision_reward import VisionReward
from reward_server.preferences import Preference, write
from testbed.oracle_replies import decode
from tests.serving import Body, chat_app, said, serving

TRUTH = np.array([2.0, 1.0, 0.5, 0.0])
CHECKLIST = [
    {"id": "red", "axis": "colour", "question": "Is it red?", "weight": 0.1},
    {"id": "deep", "axis": "colour", "question": "Is the red deep?", "weight": 5.0, "needs": "red"},
    {"id": "green", "axis": "other", "question": "Is it green?", "weight": 1.0},
    {"id": "there", "axis": "other", "question": "Is there a picture?", "weight": 1.0},
]


def drawn(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    differences = rng.integers(0, 2, (count, 4)) - rng.integers(0, 2, (count, 4))
    chance = 1 / (1 + np.exp(-differences @ TRUTH))
    return differences.astype(float), (rng.random(count) < chance).astype(float)


def test_known_weights_are_found() -> None:
    differences, labels = drawn(20_000)
    found = regress(differences, labels, ridge=1e-3)
    np.testing.assert_allclose(found, TRUTH, atol=0.12)  # four standard errors are 0.11
    margins = (2 * labels - 1)[:, None] * differences
    gradient = 1e-3 * found - (margins / (1 + np.exp(margins @ found))[:, None]).sum(0)
    assert np.abs(gradient).max() < 1e-1  # of 20,000 summands


def test_first_and_second_are_alike() -> None:
    differences, labels = drawn(300)
    np.testing.assert_allclose(
        regress(differences, labels, ridge=1.0), regress(-differences, 1 - labels, ridge=1.0), atol=1e-4
    )


def test_separable_useless_and_contrary_answers() -> None:
    differences, _ = drawn(300)
    differences[:, 3] = 0
    labels = (differences[:, 0] - differences[:, 1] * 0.5 > 0).astype(float)
    found = regress(differences, labels, ridge=1.0)
    assert np.isfinite(found).all() and found[0] > 1 and found[1] < 0 and found[3] == 0
    assert regress(differences, labels, ridge=1.0, nonnegative=True).min() == 0
    assert np.linalg.norm(regress(differences, labels, ridge=100.0)) < np.linalg.norm(found)


# ---------------------------------------------------------------- through a judge


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """Pictures of red, deep red or green in all pairs; green wins, then red, and its depth does not count."""
    colours = {"red": (140, 0, 0), "deep": (250, 0, 0), "green": (0, 200, 0), "black": (0, 0, 0)}
    worth = {"red": 1, "deep": 1, "green": 2, "black": 0}
    for name, colour in colours.items():
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    pairs = [(a, b) for a in worth for b in worth if worth[a] != worth[b]] * 4
    preferences = [
        Preference(
            id=str(k), prompt="p", label=0 if worth[a] > worth[b] else 1,
            candidates=((str(tmp_path / f"{a}.png"),), (str(tmp_path / f"{b}.png"),)),
        )
        for k, (a, b) in enumerate(pairs)
    ]  # fmt: skip
    write(tmp_path / "p.jsonl", preferences)
    (tmp_path / "checklist.json").write_text(json.dumps(CHECKLIST))
    return tmp_path


def answers(body: Body) -> dict[str, Any]:
    """A judge that answers by colour; it calls green "deep", which does not count because green is not red."""
    red, green, _ = decode(body["messages"][0]["content"][0]["image_url"]["url"])[0, 0]
    said_yes = (red > 100, red > 200 or green > 100, green > 100, True)
    return said("\n".join(f"{k}: {'yes' if yes else 'no'}" for k, yes in enumerate(said_yes, start=1)))


def fit_weights(folder: Path, url: str, *words: str) -> int:
    common = ["--endpoint", url, "--checklist-file", str(folder / "checklist.json"), "--out", str(folder / "new.json")]
    return main(["fit-weights", str(folder / "p.jsonl"), *common, *words])


def test_a_judges_answers_give_weights_that_the_family_reads(
    coloured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(chat_app(answers)) as url:
        assert fit_weights(coloured, url) == 0
        first = (coloured / "new.json").read_text()
        assert fit_weights(coloured, url) == 2 and "--resume" in capsys.readouterr().err
    assert fit_weights(coloured, url, "--model", "stand-in", "--resume") == 0  # all replies are there: nobody is asked
    assert (coloured / "new.json").read_text() == first
    printed = capsys.readouterr().out
    assert "held-out pairs in order 1.000" in printed and "by the old weights 0.8" in printed
    family = VisionReward(checklist_file=str(coloured / "new.json"))
    assert not list(family.problems())
    weights = {q.id: q.weight for q in family.checklist()}
    assert weights["green"] > weights["red"] > 0.5 and weights["there"] == 0 and abs(weights["deep"]) < 0.3
    assert [q.needs for q in family.checklist()] == ["", "red", "", ""]
    reply = family.read(Completion(text="1: no\n2: yes\n3: yes\n4: yes"))
    assert reply.scores["checklist"] == (weights["green"],)


def test_too_little_and_mixed_data_are_refused(coloured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(chat_app(lambda body: said("1: maybe"))) as url:
        assert fit_weights(coloured, url) == 2
    assert "0 labelled pairs have readable answers" in capsys.readouterr().err
    one = Preference(id="1", prompt="p", candidates=(("a",), ("b",)), label=0)
    with pytest.raises(ValueError, match="checklists of their own"):
        fit([one, replace(one, medium="video")], [], VisionReward())
