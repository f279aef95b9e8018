"""In-process scorers: what an answer becomes, what a failure costs, and the CLIP family against transformers' numbers."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPProcessor

from grpo_flex.advantages import Gdpo
from grpo_flex.config import ConfigError, RunConfig
from grpo_flex.config_file import from_json, to_json
from grpo_flex.judge_figures import judge_metrics, judged_share
from grpo_flex.overrides import override
from grpo_flex.rewards import BradleyTerry, Consistent, Pointwise, Several, WinRate
from grpo_flex.scorers import Aesthetic, ClipScore, HpsV2, PickScore, label, score_group, scorer_metrics
from grpo_flex.types import Prompt, Verdict
from tests.tiny import save_tiny_clip

PROMPT = Prompt(id="p", text="a red circle")


def pictures(count: int, frames: int = 1, seed: int = 0) -> list[np.ndarray]:
    chance = np.random.default_rng(seed)
    return [chance.integers(0, 256, (frames, 40, 48, 3), np.uint8) for _ in range(count)]


# ---------------------------------------------------------------- any callable


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The picture's mean; a picture darker than ``limit`` breaks it."""

    limit: float = -1.0
    name: str = "mean"

    def __call__(self, media: np.ndarray, prompt: Prompt) -> Mapping[str, float]:
        if media.mean() <= self.limit:
            raise KeyError("too dark")
        return {self.name: float(media.mean())}


@dataclass(frozen=True, kw_only=True)
class Together(Mean):
    given: Any = None

    def batch(self, media_G: list[np.ndarray], prompt: Prompt) -> Any:
        return self.given


def length(media: np.ndarray, prompt: Prompt) -> dict[str, float]:
    return {"length": float(len(media))}


def grey(*levels: int) -> list[np.ndarray]:
    return [np.full((1, 4, 4, 3), level, np.uint8) for level in levels]


def test_every_sibling_gets_a_verdict_of_its_own() -> None:
    given = score_group(Mean(), grey(10, 30), PROMPT)
    assert [(v.members, v.status, dict(v.scores), v.scorer) for v in given] == [
        ((0,), "ok", {"mean": (10.0,)}, "mean"),
        ((1,), "ok", {"mean": (30.0,)}, "mean"),
    ]
    rewarded = Pointwise(criteria=("mean",))(2, given, "p")
    assert rewarded.rewards_G.tolist() == [10.0, 30.0]


def test_a_function_is_a_scorer() -> None:
    assert label(length) == "length"
    assert score_group(length, grey(1), PROMPT)[0].scores == {"length": (1.0,)}


def test_a_scorer_that_raises_masks_its_sibling_only() -> None:
    given = score_group(Mean(limit=15), grey(10, 30, 50), PROMPT)
    assert [v.status for v in given] == ["failed", "ok", "ok"]
    assert given[0].problem == "KeyError" and "too dark" in given[0].rationale
    assert np.isnan(Pointwise(criteria=("mean",))(3, given, "p").rewards_G).tolist() == [True, False, False]
    assert scorer_metrics([given]) == pytest.approx(
        {
            "scorer/verdicts": 3.0,
            "scorer/failed": 1.0,
            "scorer/masked_share": 1 / 3,
            "scorer/seconds_per_sibling": given[0].seconds,
            "scorer/problem/KeyError": 1.0,
            "scorer/mean_mean": 40.0,
        }
    )


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (None, "no mapping of numbers"),
        ({}, "no mapping of numbers"),
        (0.5, "no mapping of numbers"),
        ({"a": "high"}, "no mapping of numbers"),
        ({"a": None}, "no mapping of numbers"),
        ({"a": float("nan")}, "not finite"),
        ({"a": 1.0, "b": float("inf")}, "not finite"),
        ({"a": torch.ones(2)}, "no mapping of numbers"),
        ({"a": 10**400}, "no mapping of numbers"),
    ],
)
def test_an_answer_that_is_no_number_is_named(answer: Any, problem: str) -> None:
    (verdict,) = score_group(lambda media, prompt: answer, grey(1), PROMPT)
    assert (verdict.status, verdict.problem, dict(verdict.scores)) == ("failed", problem, {})


@pytest.mark.parametrize("given", [None, [], [{"a": 1.0}], 7])
def test_a_batch_of_another_length_masks_all(given: Any) -> None:
    verdicts = score_group(Together(given=given), grey(1, 2), PROMPT)
    assert [v.problem for v in verdicts] == ["ValueError"] * 2 and "2 mappings" in verdicts[0].rationale


def test_numpy_and_torch_numbers_are_numbers() -> None:
    answers = [{"a": np.float32(1.5)}, {"a": torch.tensor(2.5)}]
    assert [v.scores["a"] for v in score_group(Together(given=answers), grey(1, 2), PROMPT)] == [(1.5,), (2.5,)]


# ---------------------------------------------------------------- beside a judge


def judged() -> list[Verdict]:
    pairs = [((0, 1), 0.0), ((1, 0), 1.0), ((1, 2), 0.5), ((2, 0), 1.0)]
    dims = {"alignment": 0.0, "quality": 1.0}
    found = [Verdict(members=m, status="ok", winner=w, dimensions=dims, seconds=1.0, tokens=9) for m, w in pairs]
    return [*found, Verdict(members=(0, 2), status="failed", problem="cannot connect")]


@pytest.mark.parametrize("reward", [WinRate(), BradleyTerry(), Consistent()])
def test_scores_do_not_disturb_rewards_from_pairs(reward: Any) -> None:
    alone = reward(3, judged(), "p")
    beside = reward(3, [*judged(), *score_group(Mean(limit=15), grey(10, 30, 50), PROMPT)], "p")
    assert alone.breakdown_G.keys() == beside.breakdown_G.keys()
    for name, values in alone.breakdown_G.items():
        assert np.array_equal(values, beside.breakdown_G[name], equal_nan=True)


def test_several_sets_win_rates_and_scores_side_by_side() -> None:
    reward = Several(names=("judge", "scores"), rewards=(WinRate(), Pointwise(criteria=("mean",))))
    made = reward(3, [*judged(), *score_group(Mean(), grey(10, 30, 50), PROMPT)], "p")
    assert made.breakdown_G["judge"].tolist() == WinRate()(3, judged(), "p").rewards_G.tolist()
    assert made.breakdown_G["scores"].tolist() == [10.0, 30.0, 50.0]
    (advantages,), _ = Gdpo(parts=("judge", "scores"))([made])
    assert np.isfinite(advantages).all()


def test_figures_of_the_judge_are_of_the_judge() -> None:
    assert judge_metrics([judged()])["judge/parse_rate"] == 1.0 and judged_share(judged()) == 0.8


# ---------------------------------------------------------------- configuration


def test_scorers_survive_json_pickle_and_overrides(config: RunConfig, tmp_path: Path) -> None:
    clip = save_tiny_clip(tmp_path / "clip")
    scored = replace(config, scorers=(ClipScore(model=clip), length), judge=None, reward=Pointwise())
    scored.validate()
    assert from_json(to_json(scored)) == scored == pickle.loads(pickle.dumps(scored))
    assert override(scored, ["scorers.0.frames=3"]).scorers == (ClipScore(model=clip, frames=3), length)
    assert override(config, ["scorers=()", "judge=none"]).judge is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": None}, "judge is none and scorers is empty"),
        ({"judge": None, "scorers": (length,)}, "reward is WinRate, which counts wins, but judge is none"),
        (
            {
                "judge": None,
                "scorers": (length,),
                "reward": Several(names=("a", "b"), rewards=(WinRate(), Pointwise())),
            },
            "reward is Several, which counts wins, but judge is none",
        ),
        ({"scorers": ("clip",)}, "scorers.0 is 'clip'; it needs to be callable"),
        ({"scorers": length}, "scorers is <function"),
        ({"scorers": (Mean(), Mean(limit=3))}, "scorers holds two that are called 'mean'"),
        ({"scorers": (ClipScore(model="./nowhere"),)}, "scorers.0.model is './nowhere', which is no folder"),
        ({"scorers": (ClipScore(frames=0),)}, "scorers.0.frames is 0"),
        ({"scorers": (Aesthetic(head="head.txt"),)}, "scorers.0.head is 'head.txt'; it needs to be a file here"),
    ],
)
def test_what_cannot_work_is_refused_by_name(config: RunConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        replace(config, **changes).validate()
    assert message in str(error.value)


def test_a_scorer_that_a_resume_could_not_import_is_refused(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="cannot be imported again"):
        to_json(replace(config, scorers=(lambda media, prompt: {"a": 1.0},)))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("scorers.1.frames=3", "no config field 'scorers.1.frames'; known here: scorers.0.model"),
        ("scorers.0=3", "no config field 'scorers.0'"),
        ("scorers.0.frame=3", "did you mean 'scorers.0.frames'?"),
        ("scorers.0.frames=x", "'scorers.0.frames' needs a whole number"),
    ],
)
def test_bad_overrides_of_a_scorer(config: RunConfig, assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        override(replace(config, scorers=(ClipScore(),)), [assignment])
    assert message in str(error.value)


def test_a_configuration_with_scorers_imports_nothing_heavy() -> None:
    code = (
        "import sys; from grpo_flex.scorers import *; from grpo_flex.config import *;"
        "s = (ClipScore(), PickScore(), HpsV2()); [list(x.problems()) for x in s];"
        "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# ---------------------------------------------------------------- the CLIP family


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


def own_numbers(folder: str, media_G: list[np.ndarray], text: str) -> Any:
    """transformers' own output for the siblings' first frames."""
    processor: Any = CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=[text], images=[m[0] for m in media_G], return_tensors="pt", padding=True)
    with torch.no_grad():
        return CLIPModel.from_pretrained(folder)(**inputs)


def test_clip_scores_are_transformers_own(clip: str) -> None:
    media = pictures(5)
    own = own_numbers(clip, media, PROMPT.text).logits_per_image[:, 0]
    scale = float(CLIPModel.from_pretrained(clip).logit_scale.detach().exp())
    assert scale != pytest.approx(1) and float(own.std()) > 1e-3
    for scorer, expected in (
        (ClipScore(model=clip), own / scale),
        (HpsV2(model=clip, processor=""), own / scale),
        (PickScore(model=clip, processor=clip), own),
    ):
        given = [v.scores[scorer.name][0] for v in score_group(scorer, media, PROMPT)]
        assert given == pytest.approx(expected.tolist(), abs=1e-5)
        assert scorer(media[2], PROMPT)[scorer.name] == pytest.approx(given[2], abs=1e-5)


def test_a_clip_of_frames_scores_the_mean_of_evenly_spaced_ones(clip: str) -> None:
    scorer, (film,) = ClipScore(model=clip, frames=3), pictures(1, frames=9)
    (found,) = scorer.batch([film], PROMPT)
    single = [scorer(film[i : i + 1], PROMPT)["clip"] for i in (0, 4, 8)]
    assert found["clip"] == pytest.approx(np.mean(single), abs=1e-6)


def test_more_pictures_than_one_pass_takes(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    media = pictures(5, frames=2)
    whole = ClipScore(model=clip).batch(media, PROMPT)
    monkeypatch.setattr("grpo_flex.scorers.IMAGES_AT_ONCE", 3)
    parts = ClipScore(model=clip).batch(media, PROMPT)
    assert [p["clip"] for p in parts] == pytest.approx([w["clip"] for w in whole], abs=1e-6)


def test_a_prompt_longer_than_the_model_is_cut(clip: str) -> None:
    long = replace(PROMPT, text="a red circle " * 50)
    assert np.isfinite(ClipScore(model=clip)(pictures(1)[0], long)["clip"])


def head(sizes: list[int]) -> dict[str, torch.Tensor]:
    """Named as LAION's predictor names its layers, dropouts counted."""
    torch.manual_seed(1)
    numbers = [0, 2, 4, 6, 7][: len(sizes) - 1]
    found = {}
    for n, (wide, narrow) in zip(numbers, pairwise(sizes), strict=True):
        layer = torch.nn.Linear(wide, narrow)
        found |= {f"layers.{n}.weight": layer.weight.detach(), f"layers.{n}.bias": layer.bias.detach()}
    return found


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_aesthetic_predictor_is_its_layers_on_the_unit_embedding(clip: str, tmp_path: Path, suffix: str) -> None:
    weights, media = head([8, 1024, 128, 64, 16, 1]), pictures(4)
    path = tmp_path / f"head{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    x = own_numbers(clip, media, "x").image_embeds
    for n in (0, 2, 4, 6, 7):
        x = torch.nn.functional.linear(x, weights[f"layers.{n}.weight"], weights[f"layers.{n}.bias"])
    given = [found["aesthetic"] for found in Aesthetic(model=clip, head=str(path)).batch(media, PROMPT)]
    assert given == pytest.approx(x[:, 0].tolist(), abs=1e-5)


def test_the_linear_predictor(clip: str, tmp_path: Path) -> None:
    path = tmp_path / "linear.pth"
    torch.save({"weight": torch.ones(1, 8), "bias": torch.tensor([5.0])}, path)
    (media,) = pictures(1)
    embedding = own_numbers(clip, [media], "x").image_embeds
    assert Aesthetic(model=clip, head=str(path))(media, PROMPT)["aesthetic"] == pytest.approx(
        float(embedding.sum()) + 5, abs=1e-5
    )


def test_a_head_of_another_size_or_that_is_none(clip: str, tmp_path: Path) -> None:
    for sizes in ([9, 1], [8, 1024, 128, 64, 16, 2], [8, 32, 1]):
        path = tmp_path / "head.safetensors"
        path = path.with_name(f"{'_'.join(map(str, sizes))}.safetensors")
        save_file(head(sizes), path)
        with pytest.raises(ValueError, match=r"layers of other sizes .* 8 → 1024 → 128 → 64 → 16 → 1"):
            Aesthetic(model=clip, head=str(path)).load()
    nothing = tmp_path / "nothing.pth"
    nothing.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="no readable file of weights"):
        Aesthetic(model=clip, head=str(nothing)).load()


def test_a_model_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for model in ("somebody/not-downloaded", str(tmp_path / "empty")):
        with pytest.raises(ValueError, match=r"cannot be loaded: (.|\n)*pass its path"):
            ClipScore(model=model).load()
    (verdict,) = score_group(ClipScore(model="somebody/not-downloaded"), grey(1), PROMPT)
    assert verdict.problem == "ValueError" and "cannot be loaded" in verdict.rationale


def test_a_checkpoint_of_another_kind_or_with_holes(clip: str, tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="of type 't5'; this scorer needs one of type 'clip'"):
        ClipScore(model=str(tmp_path / "t5")).load()
    model = CLIPModel.from_pretrained(clip)
    CLIPProcessor.from_pretrained(clip).save_pretrained(tmp_path / "holes")
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("text_projection")}
    model.save_pretrained(tmp_path / "holes", state_dict=kept)
    with pytest.raises(ValueError, match=r"lacks 1 of its weights, e\.g\. text_projection"):
        ClipScore(model=str(tmp_path / "holes")).load()
