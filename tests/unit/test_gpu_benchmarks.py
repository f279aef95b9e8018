"""The GPU benchmarks run where Ray, vLLM and W&B are not installed; their tiny versions here."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

from benchmarks import gpu, gpu_flux

BLOCKED = """
import sys
for name in ("ray", "vllm", "wandb", "aiohttp", "rich", "matplotlib"):
    sys.modules[name] = None
"""
RUN = """
from benchmarks import gpu_flux, gpu_wan
arguments = ["--tiny", "--group-size", "2", "--steps", "3", "--no-compile"]
rows = [row for benchmark in (gpu_flux, gpu_wan) for row in benchmark.main(arguments)]
for row in rows:
    print(row.gap, row.rollout_tflops, row.update_tflops, row.update_hardware_tflops, row.planned_gib, row.rollout_planned_gib, row.decode_planned_gib)
"""


def test_they_and_all_that_they_need_run_without_ray() -> None:
    """One process for all, because it is imports that take the time."""
    modules = (
        "generators.flux", "generators.flux2", "generators.wan", "generators.blank", "dynamics", "objectives.grpo",
        "objectives.guard", "objectives.nft", "objectives.awm", "objectives.dpo", "learner", "rollout", "plan", "plan_report",
    )  # fmt: skip
    code = BLOCKED + "".join(f"import grpo_flex.{module}\n" for module in modules) + RUN
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    for line in ended.stdout.splitlines()[-2:]:
        gap, *others = map(float, line.split())
        assert 0 <= gap < 1e-2
        assert all(math.isfinite(value) and value > 0 for value in others)
        _, model, hardware, *_ = others
        assert (
            1.3 * model < hardware < 1.55 * model
        )  # beside a frozen base forward and back cost the same; and forward again


def test_a_setting_that_fails_takes_nothing_from_the_one_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers: dict[str, Any] = {field.name: 1.0 for field in fields(gpu.Row)}
    printed: list[str] = []

    def measure(config: Any, planned: Any, name: str, device: str) -> gpu.Row:
        if config.generator.memory.compile:
            printed.append(capsys.readouterr().out)
            raise RuntimeError("no compiler")
        numbers["name"] = name
        return gpu.Row(**numbers)

    monkeypatch.setattr(gpu, "plans", lambda _: None)
    monkeypatch.setattr(gpu, "measure", measure)
    assert [row.name for row in gpu_flux.main(["--tiny"])] == ["all blocks recomputed"]
    assert "update of a group" in printed[0]
    said = capsys.readouterr()
    assert "recomputed, compiled: failed" in said.out and "no compiler" in said.err
