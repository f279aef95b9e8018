"""Clips on a GPU: bfloat16 with parts that stay in float32, and classifier-free guidance."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import measure, plans, save
from benchmarks.gpu_wan import config as benchmark
from benchmarks.gpu_wan import shrunk
from grpo_flex.generators.blank import describe
from grpo_flex.generators.wan import Wan

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def test_rollout_and_update_agree_in_bfloat16(tmp_path: Path) -> None:
    """With the same weights and batch, log p differs by rounding at the most: the clip range is 1e-4."""
    small = save(shrunk(describe(MODEL)), tmp_path)
    clip = Wan(model=small, height=32, width=32, frames=5, max_sequence_length=16, guidance=5.0, dtype="bfloat16")
    config = benchmark(clip, group_size=4, steps=6)
    assert measure(config, plans(config), "", DEVICE).largest_gap < 1e-4
