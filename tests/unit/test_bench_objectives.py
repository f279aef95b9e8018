"""The objectives' benchmark: its configurations can run, its judge is the oracle judge, its table says what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import objectives as bench
from grpo_flex.config_file import load_experiment
from testbed.oracle import Score
from testbed.oracle_judge import OracleJudge
from testbed.oracle_replies import Judging


@pytest.mark.parametrize("name", bench.CONFIGURATIONS)
def test_every_configuration_is_valid(name: str) -> None:
    config = bench.configuration(name, 3, ["optimizer.lr=1e-5"])
    assert config.seed == 3 and config.optimizer.lr == 1e-5
    assert config.objective.needs_noise <= config.sampling.dynamics.stochastic


def score(alignment: float, quality: float, composition: float) -> Score:
    held = {str(i): i < round(alignment * 50) for i in range(50)}
    return Score(attributes=held, quality=quality, composition=composition, legible=True)


def test_the_judge_in_process_rules_as_the_judge_over_http() -> None:
    import random

    rng = np.random.default_rng(0)
    for seed in range(200):
        one, two = (score(*rng.integers(0, 3, 3) / 2) for _ in range(2))
        chance = random.Random(seed)
        theirs = Judging(OracleJudge())._winners(one, two, random.Random(seed))
        _ = chance.random(), chance.random()  # noise and position bias
        tosses = [chance.randrange(2) for _ in range(4)]
        verdict = bench.compare((0, 1), one, two, tosses[3])
        assert (*(verdict.dimensions[k] for k in ("alignment", "quality", "aesthetics")), verdict.winner) == theirs


def result(name: str, seed: int, scores: list[float], diversity: list[float]) -> dict[str, Any]:
    """Evaluated at equal distances; a diversity for each step."""
    every = len(diversity) // (len(scores) - 1)
    curve = [
        {"step": every * i, "seconds": 30.0 * i, "forwards": 5000 * i, "oracle": value}
        for i, value in enumerate(scores)
    ]
    return {"name": name, "seed": seed, "settings": {}, "curve": curve,
            "steps": [{"policy/diversity_pixel": d, "verdicts": 960.0} for d in diversity]}  # fmt: skip


def test_summary_by_hand() -> None:
    row = bench.summary(result("a", 0, [0.4, 0.5, 0.6, 0.58], [0.2, 0.2, 0.2, 0.1, 0.1, 0.1]))
    assert row == pytest.approx(
        {"oracle": 0.58, "gain": 0.18, "steps": 6, "goal_steps": 3, "goal_seconds": 45,
         "forwards": 15000, "diversity": 0.5}
    )  # fmt: skip


def test_table_and_plot(tmp_path: Path) -> None:
    ten = [1.0] * 10
    runs = [result("slow", 0, [0.4, 0.41], ten), result("fast", 0, [0.4, 0.7], ten), result("fast", 1, [0.4, 0.5], ten)]
    for one in runs:
        bench.kept.write(tmp_path / f"{one['name']}-s{one['seed']}.json", one)
    found = bench.results(tmp_path)
    assert list(found) == ["fast", "slow"]
    fast, slow = bench.table(found).splitlines()[2:]
    assert fast.startswith("| fast | 2 | 0.600 (0.500–0.700) | +0.200 | 0.600 | 10 | 5 (1/2) | 15 (1/2) | 5 | 1.00 |")
    assert "– (0/1)" in slow
    assert bench.at_budget(runs[1], 4800) == pytest.approx(0.55)
    few = bench.table({"few": [result("few", 0, [0.4, 0.6], ten[:5])], "slow": runs[:1]})
    assert "at 4.8 k verdicts" in few and "| 0.405 |" in few
    assert list(bench.panels(found | {"grpo-cps": runs[:1]}).values()) == [
        {"grpo-cps": [[(0.0, 0.4), (30.0, 0.41)]]},
        {"fast": [[(0.0, 0.4), (30.0, 0.7)], [(0.0, 0.4), (30.0, 0.5)]], "slow": [[(0.0, 0.4), (30.0, 0.41)]]},
    ]
    bench.plot(bench.panels(found), tmp_path / "plot.png", "seconds")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_published_table_is_what_was_measured_and_the_default_recipe_is_its_winner() -> None:
    found = bench.results(bench.RESULTS)
    assert {len(runs) for runs in found.values()} == {3}
    for page in ("README.md", "experiments/LOG.md"):
        assert bench.table(found) in Path(page).read_text(encoding="utf-8"), page
    winner = bench.configuration(next(iter(found)), 0, [])
    for recipe in ("shapes_image", "shapes_image_oracle", "shapes_video", "shapes_video_oracle"):
        made = load_experiment(f"experiments/{recipe}.py")
        assert type(made.objective) is type(winner.objective)
        assert made.sampling.dynamics == winner.sampling.dynamics and made.sampling.solver == winner.sampling.solver


def test_what_was_measured_otherwise_is_not_mixed_in(tmp_path: Path) -> None:
    settings = bench.Settings(seconds=1, every=1, steps=1, clock="wall", overrides=("optimizer.lr=1.0",), recipe="a")
    path = tmp_path / "a-s0.json"
    path.write_text(json.dumps({"settings": bench.asdict(settings)}))
    expected = json.loads(path.read_text())["settings"]
    assert bench.kept.same(path, expected, "settings") and not bench.kept.same(
        tmp_path / "b-s0.json", expected, "settings"
    )
    for other in ({"seconds": 2}, {"recipe": "b"}):
        with pytest.raises(ValueError, match="with other settings"):
            bench.kept.same(path, expected | other, "settings")
    assert len({bench.recipe("nft-ode"), bench.recipe("nft-ode", ["optimizer.lr=1e-5"]), bench.recipe("nft-ode2")}) == 3
