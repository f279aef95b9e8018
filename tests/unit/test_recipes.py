"""The recipes for public models have the settings that were published for them."""

from __future__ import annotations

import pytest

from grpo_flex.advantages import GroupRelative
from grpo_flex.config import Adapter, Full
from grpo_flex.config_file import load_experiment
from grpo_flex.dynamics import FlowSde, RandomFraction
from grpo_flex.generators.flux import Flux
from grpo_flex.generators.flux2 import Flux2Klein, Flux2KleinEdit
from grpo_flex.generators.wan import Wan
from grpo_flex.objectives.guard import Guard
from grpo_flex.prompts import read_prompts
from grpo_flex.rewards import WinRate
from grpo_flex.sources import fitted_source
from reward_server.families.edit import EditPair
from reward_server.families.flex import Flex
from tests.configs import judge_of


@pytest.mark.parametrize(
    ("recipe", "model", "guidance", "lr"),
    [
        ("wan21_14b_flex", "Wan-AI/Wan2.1-T2V-14B-Diffusers", (5.0, None), 3e-5),
        ("wan21_1_3b_flex", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", (5.0, None), 3e-5),  # the large model's
        ("wan22_a14b_flex", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", (4.0, 3.0), 4e-5),
    ],
)
def test_the_wan_recipes_have_the_papers_settings(
    recipe: str, model: str, guidance: tuple[float, float | None], lr: float
) -> None:
    made = load_experiment(f"experiments/{recipe}.py")
    made.validate()
    clip, sampled, fit, pull = made.generator, made.sampling, made.optimizer, made.objective
    assert isinstance(clip, Wan) and isinstance(pull, Guard) and isinstance(sampled.window, RandomFraction)
    assert (clip.model, clip.guidance, clip.guidance_2) == (model, *guidance)
    assert (clip.height, clip.width, clip.frames, clip.shift) == (240, 416, 33, 3)
    assert clip.boundary is None  # the model's own
    assert (sampled.group_size, sampled.same_noise, sampled.steps, sampled.eval_steps) == (6, True, 20, 30)
    assert (sampled.dynamics, sampled.window.fraction) == (FlowSde(a=0.7), 0.8)
    assert (pull.clip, pull.kl_beta, pull.kl_target > 0) == (1e-4, 0.004, "wan22" in recipe)  # 2.2: β adapts itself
    assert pull.kl_form == "flow_grpo"
    assert made.adapter == Adapter(rank=64, alpha=128)
    assert (fit.lr, fit.lr_end, fit.weight_decay, fit.max_grad_norm) == (lr, 1, 1e-4, 1)
    assert made.advantage == GroupRelative(alpha=0.7, clip=5) and made.reward == WinRate()
    assert (made.evaluation.height, made.evaluation.width) == (480, 832)
    asked = judge_of(made).pairs.pairs(6, 0)
    assert len(asked) == 20 and len(set(map(frozenset, asked))) == 15  # all pairs, five of them in both orders


@pytest.mark.parametrize(
    ("recipe", "generator", "steps", "guidance", "lr"),
    [
        ("flux1_dev_flex", Flux, (15, 30), 3.5, None),
        ("flux1_dev_flex_full", Flux, (15, 30), 3.5, 3e-6),
        ("one_gpu_80gb", Flux, (15, 30), 3.5, None),
        ("flux2_klein_flex", Flux2Klein, (25, 30), 4.0, 5e-5),
        ("one_gpu_24gb", Flux2Klein, (25, 30), 4.0, 5e-5),
    ],
)
def test_the_flux_recipes_have_the_papers_settings(
    recipe: str, generator: type, steps: tuple[int, int], guidance: float, lr: float | None
) -> None:
    """No rate is published for FLUX.1's adapter, only a range."""
    made = load_experiment(f"experiments/{recipe}.py")
    made.validate()
    picture, sampled, fit, pull = made.generator, made.sampling, made.optimizer, made.objective
    assert isinstance(picture, Flux | Flux2Klein) and isinstance(picture, generator)
    assert isinstance(pull, Guard) and isinstance(sampled.window, RandomFraction)
    assert (picture.height, picture.width, picture.guidance, picture.shift) == (720, 720, guidance, 3)
    assert (sampled.group_size, sampled.same_noise, sampled.steps, sampled.eval_steps) == (9, True, *steps)
    assert (sampled.dynamics, sampled.window.fraction) == (FlowSde(a=0.7), 0.6)
    assert (pull.clip, pull.kl_beta) == (1e-4, 0)
    assert made.adapter == (Full(state_each_step=False) if recipe.endswith("_full") else Adapter(rank=64, alpha=128))
    assert fit.lr == lr or (lr is None and 1e-5 <= fit.lr <= 3e-4)
    assert (fit.lr_end, fit.weight_decay, fit.max_grad_norm, fit.updates_per_rollout) == (1, 1e-4, 1, 3)
    assert made.advantage == GroupRelative(alpha=0.7, clip=5) and made.reward == WinRate()
    assert picture.dtype == "bfloat16" and judge_of(made).family == Flex()


def test_the_editing_recipe_has_pictures_to_edit() -> None:
    made = load_experiment("experiments/flux2_klein_edit.py")
    made.validate()
    assert isinstance(made.generator, Flux2KleinEdit) and judge_of(made).family == EditPair()
    for name in ("train", "heldout"):
        prompts = read_prompts(getattr(made.prompts, name), name)
        assert len(prompts) >= (made.prompts.per_step if name == "train" else 1)
        assert {fitted_source(prompt, 72, 48).size for prompt in prompts} == {(72, 48)}


@pytest.mark.parametrize(
    ("recipe", "update"),
    [
        ("wan21_14b_flex", 2_376_511),
        ("wan22_a14b_flex", 2_376_511),
        ("wan21_1_3b_flex", 299_494),
        ("flux1_dev_flex", 281_944),
        ("flux1_dev_flex_full", 348_719),
        ("flux2_klein_flex", 999_515),
        ("flux2_klein_edit", 493_187),
    ],
)
def test_no_update_is_taken_for_a_hang(recipe: str, update: int) -> None:
    """``update``: TFLOP of a step by the plan. An A100 may sustain 180 TFLOP/s, and may be half as fast as was thought."""
    place = load_experiment(f"experiments/{recipe}.py").placement
    assert place.update_timeout_s > 2 * update / 180 / place.learners
