"""The judges' benchmark: every run is the recipe's but for what its name says, and the table says what was measured."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import judges as bench
from grpo_flex.advantages import GroupRelative
from grpo_flex.config import RunConfig
from grpo_flex.config_file import load_experiment, to_json
from grpo_flex.overrides import override
from reward_server.families.chat import data_url
from reward_server.families.flex import Flex
from testbed.oracle_judge import OracleJudge
from testbed.oracle_replies import Judging
from tests.configs import judge_of

RECIPE = "experiments/shapes_image.py"


def configuration(variant: str, runs: Path, seed: int = 0) -> RunConfig:
    """What the variant's command line trains."""
    words = bench.command(variant, seed, runs, ["steps=5"])
    assert words is not None and words[1:4] == ["-m", "grpo_flex", "train"]
    return override(load_experiment(words[4]), words[5:])


def differences(one: Any, two: Any, name: str = "") -> set[str]:
    """Dotted names of the fields in which two configurations differ; what is of another class counts as a whole."""
    if one == two:
        return set()
    if not is_dataclass(one) or type(one) is not type(two):
        return {name}
    parts = (differences(getattr(one, f.name), getattr(two, f.name), f"{name}.{f.name}") for f in fields(one))
    return {part.lstrip(".") for found in parts for part in found}


@pytest.mark.parametrize(
    ("variant", "changed"),
    [
        ("flex", set()),
        ("flex-overall", {"advantage.alpha"}),
        ("flex-dimensions", {"advantage.alpha"}),
        ("pointwise", {"judge.family", "reward"}),
        ("oracle", {"judge.server"}),
        ("oracle-noisy", {"judge.server"}),
    ],
)
def test_a_variant_differs_from_the_recipe_in_what_it_is_named_after(
    variant: str, changed: set[str], tmp_path: Path
) -> None:
    made = configuration(variant, tmp_path, seed=3)
    made.validate()
    recipe = override(load_experiment(RECIPE), [f"name={made.name}", f"runs_dir={tmp_path}", "seed=3", "steps=5"])
    assert differences(made, recipe) == changed


def test_the_variants_are_all_tested_and_set_what_they_say(tmp_path: Path) -> None:
    made = {variant: configuration(variant, tmp_path) for variant in bench.VARIANTS}
    assert list(made) == ["flex", "flex-overall", "flex-dimensions", "pointwise", "oracle", "oracle-noisy"]
    for name, alpha in (("flex", 0.7), ("flex-overall", 0.0), ("flex-dimensions", 1.0)):
        assert made[name].advantage == GroupRelative(alpha=alpha, scale="batch")
    assert judge_of(made["oracle"]).server == OracleJudge()
    assert judge_of(made["oracle-noisy"]).server == OracleJudge(noise=0.2)


def test_the_oracle_answers_what_the_tiny_judge_is_asked(tmp_path: Path) -> None:
    family = judge_of(configuration("oracle", tmp_path)).family
    assert isinstance(family, Flex)
    urls = [[data_url(Image.fromarray(np.full((64, 64, 3), shade, np.uint8)))] for shade in (255, 0)]
    asked = {"messages": family.request("a red circle on a white background", urls)}
    reply = family.parse(Judging(OracleJudge()).reply(asked))
    assert (reply.status, reply.winner) == ("ok", 0.0)


def seed_of(name: str) -> int:
    return int(name.rsplit("-s", 1)[1])


def kept_run(out: Path, name: str, scores: dict[int, float]) -> None:
    """The file of a measurement: variant-sSEED.json."""
    variant, seed = name.rsplit("-s", 1)
    others = {"heldout/composition": 0.9, "heldout/exact": seed_of(name) / 10}
    curve = [{"step": step, bench.SCORE: score} | others for step, score in scores.items()]
    out.mkdir(exist_ok=True)
    bench.kept.write(out / f"{name}.json", {"variant": variant, "seed": int(seed), "recipe": "a", "curve": curve})


def stand_in(runs: Path, name: str, scores: dict[int, float], steps: int) -> None:
    """A run's folder with nothing in it but what the benchmark reads; each second step has no held-out score."""
    (runs / name).mkdir(parents=True)
    variant = name.removeprefix("judges_").rpartition("_s")[0]
    config = bench.configuration(variant, [f"name={name}", f"runs_dir={runs}", f"steps={steps}"])
    (runs / name / "config.json").write_text(to_json(config))
    (runs / f"{name}.recipe").write_text(bench.kept.digest(bench.configuration(variant, [f"steps={steps}"])))
    rows = [row for step, s in scores.items() for row in ({"step": step, bench.SCORE: s}, {"step": step + 1})]
    (runs / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))


def test_the_table_says_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept_run(tmp_path, "flex-s0", {0: 0.5, 10: 0.6})
    kept_run(tmp_path, "flex-s1", {0: 0.5, 10: 0.7})
    kept_run(tmp_path, "oracle-s0", {0: 0.5, 10: 0.8, 20: 0.75})
    bench.main(["--out", str(tmp_path), "--table"])
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert rows[:-1] == [
        "| oracle | 20 | 0.500 → 0.750 | +0.250 | +0.250 | 0.900 | 0.000 |",
        "| flex | 10 | 0.500 → 0.600, 0.500 → 0.700 | +0.150 | +0.100 | 0.900 | 0.050 |",
    ]
    assert (tmp_path / "judges.png").stat().st_size > 1000


def test_a_finished_run_is_left_alone_and_a_stopped_one_goes_on(tmp_path: Path) -> None:
    stand_in(tmp_path, "judges_flex_s0", {0: 0.5, 10: 0.6}, steps=10)
    stand_in(tmp_path, "judges_flex_s1", {0: 0.5}, steps=10)
    assert bench.command("flex", 0, tmp_path, []) is None
    going_on = bench.command("flex", 1, tmp_path, [])
    assert going_on is not None and going_on[-2:] == ["--resume", str(tmp_path / "judges_flex_s1")]


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds nothing"):
        bench.main(["--out", str(tmp_path), "--table"])


def test_what_a_finished_run_measured_is_kept_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    out.mkdir()
    stand_in(runs, "judges_flex_s0", {0: 0.5, 10: 0.6}, steps=10)
    started: list[list[str]] = []

    def trained(words: list[str], check: bool) -> None:
        started.append(words)
        stand_in(runs, "judges_oracle_s0", {0: 0.5, 10: 0.7}, steps=10)

    monkeypatch.setattr(bench.subprocess, "run", trained)
    for _ in range(2):
        bench.run_all(["flex", "oracle"], [0], runs, out, ["steps=10"])
    assert [words[4] for words in started] == ["experiments/shapes_image_same_oracle.py"]
    assert bench.curves(out) == {"flex": [[(0, 0.5), (10, 0.6)]], "oracle": [[(0, 0.5), (10, 0.7)]]}
    with pytest.raises(ValueError, match="with other settings"):
        bench.run_all(["flex"], [0], runs, out, ["optimizer.lr=1e-5"])
    stand_in(runs, "judges_pointwise_s0", {0: 0.5, 10: 0.7}, steps=10)
    with pytest.raises(ValueError, match="judges_pointwise_s0 is of another configuration"):
        bench.run_all(["pointwise"], [0], runs, out, ["steps=20"])
    (runs / "judges_pointwise_s0.recipe").unlink()  # nobody knows by which judge
    with pytest.raises(ValueError, match="judges_pointwise_s0 is of another configuration or judge"):
        bench.run_all(["pointwise"], [0], runs, out, ["steps=10"])


def test_another_judges_weights_are_another_recipe(tmp_path: Path) -> None:
    config = bench.configuration("flex", [f"judge.server.model={tmp_path}"])
    found = {bench.kept.digest(config)}
    for weights in (b"before", b"after"):
        (tmp_path / "model.safetensors").write_bytes(weights)
        found.add(bench.kept.digest(config))
    assert len(found) == 3
    assert bench.kept.digest(bench.configuration("oracle", [])) == bench.kept.digest(
        bench.configuration("oracle", ["seed=7"])
    )
