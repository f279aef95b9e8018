"""Real vLLM on the CPU, started as a run starts its judge, asked by the trainer's own client.

The model is random, so its verdicts mean nothing; that they have the form which was asked for does. The tiny judges of
the repository are in `test_main_jobs.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grpo_flex.config import Judge
from grpo_flex.endpoints import check_endpoints
from grpo_flex.judge_figures import judge_metrics
from grpo_flex.judging import JudgeClient
from grpo_flex.pairing import RoundRobin
from grpo_flex.types import Prompt, Verdict
from reward_server.__main__ import main
from reward_server.families.base import Family, Medium
from reward_server.families.flex import Flex
from reward_server.families.generic import GenericPair
from reward_server.families.think import Think
from reward_server.machine import gpu_build
from reward_server.presets import PRESETS
from reward_server.serve import RunningJudge, VllmJudge, command
from tests.fake_vllm import living
from tests.tiny_vlm import MAX_LENGTH, save_tiny_vlm, tokenizer

HASTE = {str(tokenizer().get_vocab()[symbol]): 50 for symbol in '"]'}
"""A logit bias: a random model ends its texts and lists as soon as the schema lets it."""
PYTHON = Path(".venv-judge/bin/python")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists() or gpu_build(str(PYTHON)),
        reason="needs the judge's environment for CPUs: make setup-judge JUDGE=cpu",
    ),
]


class HastyFlex(Flex):
    def options(self) -> dict[str, Any]:
        return super().options() | {"logit_bias": HASTE}


class HastyPair(GenericPair):
    def options(self) -> dict[str, Any]:
        return super().options() | {"logit_bias": HASTE}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningJudge]:
    """vLLM with a random Qwen3-VL, up within a minute; afterwards none of its processes may be left."""
    folder = tmp_path_factory.mktemp("judge")
    settings = VllmJudge(
        model=save_tiny_vlm(folder / "model"),
        device="cpu",
        kv_cache_gb=1,
        cpu_threads=1,
        max_model_len=MAX_LENGTH,
        ray_address="none",
        start_s=400.0,
    )
    running = settings.start(folder)
    tree = descendants(running.pid)
    try:
        assert len(tree) >= 2, "vLLM's server and its engine"
        yield running
        assert running.alive()
    finally:
        running.stop()
    assert living([running.pid, *tree]) == []


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(p): int(q) for p, q in (line.split() for line in listed.splitlines())}
    found = [pid]
    for one in found:
        found += [p for p, q in parents.items() if q == one]
    return found[1:]


def picture(seed: int, frames: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 64, 64, 3), dtype=np.uint8)


def settings(family: Family, url: str, **changes: object) -> Judge:
    fields: dict[str, object] = {"max_tokens": 1500, "timeout_s": 500.0, "retries": 0} | changes
    return Judge(family=family, endpoints=(url,), pairs=RoundRobin(), **fields)  # pyright: ignore[reportArgumentType]


async def ask(
    judge: Judge, folder: Path, groups: Sequence[int], siblings: int, frames: int = 1, text: str = "a red circle"
) -> dict[str, object]:
    """Verdicts of several groups asked about at the same time, and the client's figures."""

    async def media(seed: int) -> np.ndarray:
        return picture(seed, frames)

    async with JudgeClient(judge, folder / "verdicts.jsonl.gz") as client:
        await client.cache_hit_rates()
        asked = [
            client.judge_as_ready(
                Prompt(id=f"p{g}", text=text, reference={}, tags=()),
                0,
                [media(100 * g + k) for k in range(siblings)],
                seed=g,
            )
            for g in groups
        ]
        verdicts = await asyncio.gather(*asked)
        return {"verdicts": verdicts, **client.counters(), **await client.cache_hit_rates()}


def run(*words: object, **named: object) -> tuple[list[list[Verdict]], dict[str, float]]:
    found = asyncio.run(ask(*words, **named))  # pyright: ignore[reportArgumentType]
    verdicts: list[list[Verdict]] = found.pop("verdicts")  # pyright: ignore[reportAssignmentType]
    return verdicts, found  # pyright: ignore[reportReturnType]


def test_two_groups_at_once_obey_the_schema(server: RunningJudge, tmp_path: Path) -> None:
    (url,) = server.endpoints
    assert check_endpoints((url,), "UnifiedReward") == []
    family = HastyPair(dimension_keys=("colour",), score_keys=("marks",))
    groups, figures = run(settings(family, url), tmp_path, groups=(1, 2), siblings=3)
    assert [len(group) for group in groups] == [3, 3]
    for verdict in (v for group in groups for v in group):
        assert verdict.status == "ok", (verdict.problem, verdict.rationale)
        reply = json.loads(verdict.rationale)
        assert list(reply) == ["reason", "marks", "colour", "winner"]  # the schema's keys in the schema's order
        assert verdict.winner in (0.0, 1.0) and set(verdict.dimensions) == {"colour"}
        assert 1 <= len(reply["reason"]) <= 600 and verdict.tokens > len(reply)
        # No white space between tokens: there an untrained model would lose itself.
        assert (
            verdict.rationale == json.dumps(reply, separators=(",", ":"), ensure_ascii=False)
            or "\\" in verdict.rationale
        )
    assert judge_metrics(groups)["judge/parse_rate"] == 1.0
    assert figures["judge/requests"] == 6 and figures["judge/retries"] == 0
    # Each picture stands in two questions and is processed for the first only.
    assert figures["judge/mm_cache_hit_rate"] == pytest.approx(0.5)


def test_what_was_asked_before_comes_from_the_cache(server: RunningJudge, tmp_path: Path) -> None:
    judge = settings(HastyPair(), server.endpoints[0])
    first, _ = run(judge, tmp_path / "1", groups=(5,), siblings=2)
    again, figures = run(judge, tmp_path / "2", groups=(5,), siblings=2)
    assert figures["judge/prefix_cache_hit_rate"] > 0.5 and figures["judge/mm_cache_hit_rate"] == 1.0
    assert [v.rationale for v in first[0]] == [v.rationale for v in again[0]]  # greedy, so repeatable


@pytest.mark.parametrize("medium", ["image", "video"])
def test_flex_gets_its_long_reply(server: RunningJudge, tmp_path: Path, medium: Medium) -> None:
    """With a seed, a temperature and a prompt of more than 2,048 tokens, which once killed the engine."""
    judge = settings(HastyFlex(medium=medium), server.endpoints[0], temperature=1.0)
    ((verdict,),), _ = run(judge, tmp_path, groups=(7,), siblings=2, frames=1 if medium == "image" else 8)
    assert (verdict.status, verdict.problem) == ("ok", "category without winner"), verdict.rationale
    reply = json.loads(verdict.rationale)
    assert reply["winner"] in (f"{medium.capitalize()} 1", f"{medium.capitalize()} 2")
    assert 3 <= len(reply["categories"]) <= 4
    assert all(0 <= dim["score_1"] <= 10 for category in reply["categories"] for dim in category["dims"])


def test_a_family_without_a_schema_fails_by_name(server: RunningJudge, tmp_path: Path) -> None:
    ((verdict,),), _ = run(settings(Think(), server.endpoints[0], max_tokens=40), tmp_path, groups=(1,), siblings=2)
    assert (verdict.status, verdict.problem, verdict.tokens) == ("unparsed", "cut off at max_tokens", 40)


def test_a_question_that_is_too_long_is_a_failed_verdict(server: RunningJudge, tmp_path: Path) -> None:
    judge = settings(Think(), server.endpoints[0], max_tokens=40)
    ((verdict,),), figures = run(judge, tmp_path, groups=(1,), siblings=2, text="a" * MAX_LENGTH)
    assert (verdict.status, verdict.problem) == ("failed", "HTTP 400") and figures["judge/requests"] == 1


def test_the_judge_command_prints_a_table(
    server: RunningJudge, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for name in "ab":
        Image.fromarray(picture(ord(name))[0]).save(tmp_path / f"{name}.png")
    words = [
        "judge",
        str(tmp_path / "a.png"),
        str(tmp_path / "b.png"),
        "--prompt",
        "a red circle",
        "--family",
        "generic",
    ]
    assert main([*words, "--endpoint", server.endpoints[0]]) == 0
    printed = capsys.readouterr().out
    assert "UnifiedReward at" in printed and "A a.png" in printed and "overall" in printed


def test_vllm_knows_every_flag_of_every_preset() -> None:
    """The presets' command lines, read by the installed vLLM's own parser."""
    lines = [command(VllmJudge(preset=name), "m", 8000, on_gpu)[3:] for name in PRESETS for on_gpu in (True, False)]
    code = (
        "import json, sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = make_arg_parser(FlexibleArgumentParser())\n"
        "read = [parser.parse_args(line) for line in json.loads(sys.argv[1])]\n"
        "print(json.dumps([[a.default_chat_template_kwargs, a.enable_prompt_tokens_details] for a in read]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(PYTHON), "-c", code, json.dumps(lines)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    read = json.loads(done.stdout.splitlines()[-1])
    thinking = [PRESETS[name].chat_template_kwargs or None for name in PRESETS for _ in range(2)]
    assert read == [[kwargs, True] for kwargs in thinking]
