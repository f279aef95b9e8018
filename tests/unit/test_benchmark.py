"""The benchmark's figures against known values: by hand, by the oracle's settings, and with every family."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reward_server import asking
from reward_server.__main__ import main
from reward_server.ask import FAMILIES
from reward_server.asking import Endpoint
from reward_server.benchmark import DEFINITIONS, Case, Questions, benchmark, figures
from reward_server.families.base import ChatFamily, Reply
from reward_server.families.flex import Flex
from reward_server.families.generic import GenericPair
from reward_server.preferences import Preference, read, shown_order
from testbed.judge_preferences import render_pairs, save
from testbed.oracle_judge import OracleJudge, application
from testbed.oracle_replies import decode
from tests.serving import Body, chat_app, said, serving

PAIRS = 60


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    save(folder, render_pairs(PAIRS, seed=2))
    return folder / "preferences.jsonl"


@pytest.fixture
def preferences(file: Path) -> list[Preference]:
    return list(read(file).preferences)


def run(preferences: list[Preference], families: Mapping[str, ChatFamily], url: str, folder: Path, **more: Any) -> Any:
    endpoint = Endpoint(url=url, tries=more.pop("tries", 8))
    asked = Questions(families=families, replies=folder / "replies.jsonl", endpoint=endpoint, **more)
    return asyncio.run(benchmark(preferences, asked))


def judged(folder: Path, preferences: list[Preference], **settings: Any) -> dict[str, Any]:
    with serving(application(OracleJudge(**settings))) as url:
        return run(preferences, {"flex": Flex()}, url, folder)["families"]["flex"]


# ---------------------------------------------------------------- figures by hand


def case(label: int | None, winner: float | None, swapped: float | None, tie: bool = False) -> Case:
    """A pair shown in order 0, 1 and then swapped; 10 tokens and 2 s each."""
    about = Preference(id="", prompt="", candidates=(("a",), ("b",)), label=label, tie=tie)  # pyright: ignore[reportArgumentType]
    positions = (winner, None if swapped is None else 1 - swapped)
    replies = tuple(Reply(status="unparsed" if p is None else "ok", winner=p) for p in positions)
    record = {"tokens": 10, "prompt_tokens": 100, "seconds": 2.0}
    anchors = {} if winner is None else {"quality": 1 - winner}
    return Case(
        preference=about, winner=winner, swapped=swapped, both=True, anchors=anchors, records=(record,) * 2, replies=replies
    )  # fmt: skip


def test_figures_of_a_few_cases() -> None:
    some = [
        case(0, 0.0, 0.0),  # right, consistent
        case(0, 1.0, 0.0),  # wrong, by position
        case(1, 0.5, 0.5),  # a tie where people saw none, consistent
        case(1, None, 1.0),  # unreadable
        case(None, 0.5, 1.0, tie=True),  # a tie where people saw one
        case(None, 1.0, 0.0),  # nobody's opinion, by position
    ]
    found = figures(some, 2)
    expected = {
        "pairs": 6, "decided": 4, "ties": 1, "accuracy": 1 / 4, "accuracy_tie_half": 1.5 / 4, "accuracy_with_ties": 2 / 5,
        "consistent": 2 / 6, "first": 3 / 8, "parsed": 11 / 12, "tokens": 10, "prompt_tokens": 100, "seconds": 2.0,
        "anchors": {"quality": 1 / 2},
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found["accuracy_low"] == pytest.approx(0.0456, abs=1e-4)  # by hand: (0.7302 ∓ 0.6408) / 1.9604
    assert found["accuracy_high"] == pytest.approx(0.6994, abs=1e-4)
    empty = figures([], 2)
    assert empty["pairs"] == 0 and empty["accuracy"] is None and empty["tokens"] is None
    json.dumps([found, empty], allow_nan=False)


# ---------------------------------------------------------------- a judge of known quality


def test_the_oracle_is_always_right(tmp_path: Path, preferences: list[Preference]) -> None:
    found = judged(tmp_path, preferences)
    assert found["all"]["accuracy"] == found["all"]["consistent"] == found["all"]["parsed"] == 1.0
    assert found["all"]["first"] == 0.5 and found["all"]["unanswered"] == 0
    assert sum(some["pairs"] for some in found["categories"].values()) == PAIRS
    assert set(found["categories"]) == {"clear", "near"}


def test_a_judge_that_goes_by_position(tmp_path: Path, preferences: list[Preference]) -> None:
    found = judged(tmp_path, preferences, position_bias=1.0)["all"]
    first = [p.label == shown_order(p, 0)[0] for p in preferences]
    assert found["accuracy"] == np.mean(first) and 0.2 < found["accuracy"] < 0.8
    assert (found["consistent"], found["first"]) == (0.0, 1.0)


def test_a_judge_that_tosses_coins_and_babbles(tmp_path: Path, preferences: list[Preference]) -> None:
    def near(share: float, expected: float, asked: int) -> bool:
        return abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / asked)

    noisy = judged(tmp_path / "noise", preferences, noise=0.4)["all"]
    assert near(noisy["accuracy"], 0.8, PAIRS) and near(noisy["consistent"], 0.8**2 + 0.2**2, PAIRS)
    babble = judged(tmp_path / "babble", preferences, garbage_rate=0.3)["all"]
    assert near(babble["parsed"], 0.7, 2 * PAIRS) and near(babble["accuracy"], 0.7, PAIRS)
    assert near(babble["consistent"], 0.49, PAIRS)


def test_what_the_server_refuses_is_left_out(tmp_path: Path, preferences: list[Preference]) -> None:
    count = iter(range(1000))
    with serving(chat_app(lambda body: 400 if next(count) >= 40 else said('{"winner": "Image 1"}'))) as url:
        found = run(preferences, {"flex": Flex()}, url, tmp_path)
    assert found["families"]["flex"]["all"]["pairs"] + found["families"]["flex"]["all"]["unanswered"] == PAIRS
    assert 15 < found["families"]["flex"]["all"]["pairs"] <= 40
    assert any("HTTP 400" in reason for reason in found["unanswered"])


# ---------------------------------------------------------------- every family


def bright(url: str) -> int:
    return int(decode(url).mean())


FLEX = '{{"categories": [], "reason": "r", "winner": "Image {better}"}}'
AXES = "Alignment Score (1-5): {five}\nCoherence Score (1-5): {five}\nStyle Score (1-5): {five}"
BLOCKS = "Alignment Score:\n Image 1: {one}\n Image 2: {two}\n\nCoherence Score:\n Image 1: {one}\n Image 2: {two}\n\nStyle Score:\n Image 1: {one}\n Image 2: {two}"
REPLIES = {
    "flex": FLEX,
    "think": "<think>Image 1 or Image 2?</think><answer>Image {better} is better</answer>",
    "2.0": BLOCKS,
    "2.0-point": AXES,
    "1.0": "Image {better} is better",
    "1.0-point": "car (object): 1\nFinal Score: {five}",
    "edit": "Edited image {better} is better",
    "edit-point": '{{"reasoning": "r", "score": [{five}, {five}]}}',
    "vision-reward": "\n".join(f"{k}: {{{'yes' if k == 1 else 'no'}}}" for k in range(1, 9)),
    "reward-dance": "",
    "generic": '{{"winner": "Image {better}"}}',
    "generic-point": '{{"reason": "r", "score": {five}}}',
}


def answer_as(name: str, sources: int) -> Any:
    """A judge that prefers the brighter picture and speaks as the family does."""

    def answer(body: Body) -> dict[str, Any]:
        parts = body["messages"][0]["content"]
        shown = [bright(p["image_url"]["url"]) for p in parts if p["type"] == "image_url"][sources:]
        first = shown[0] > shown[-1]
        share = 0.8 if first else 0.2
        values = {"better": 1 if first else 2, "one": share, "two": round(1 - share, 1), "five": 1 + shown[0] / 64}
        text = REPLIES[name].format(**values, yes="yes" if shown[0] > 128 else "no", no="no")
        likeliest = [
            {"token": "yes", "logprob": float(np.log(share))},
            {"token": "no", "logprob": float(np.log(1 - share))},
        ]
        return said(text) | {"logprobs": {"content": [{"top_logprobs": likeliest}]}}

    return answer


@pytest.fixture(scope="module")
def shades(tmp_path_factory: pytest.TempPathFactory) -> list[Preference]:
    """Pairs of a bright and a dark picture, the brighter one first or second."""
    folder = tmp_path_factory.mktemp("shades")
    for shade in (20, 100, 220):
        Image.new("RGB", (8, 8), (shade,) * 3).save(folder / f"{shade}.png")
    paths = [str(folder / f"{shade}.png") for shade in (20, 220)]
    return [
        Preference(
            id=str(k), prompt="p", label=k % 2, source=str(folder / "100.png"),  # pyright: ignore[reportArgumentType]
            candidates=((paths[1 - k % 2],), (paths[k % 2],)),
        )
        for k in range(6)
    ]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_measured(tmp_path: Path, shades: list[Preference], name: str) -> None:
    family = FAMILIES[name]()
    with serving(chat_app(answer_as(name, family.sources))) as url:
        found = run(shades, {name: family}, url, tmp_path)["families"][name]["all"]
    assert (found["accuracy"], found["parsed"], found["pairs"]) == (1.0, 1.0, 6)
    assert found["tokens"] == (5 if family.candidates == 2 else 10)  # a verdict on two scores takes two replies
    assert (found["consistent"], found["first"]) == ((1.0, 0.5) if family.candidates == 2 else (None, None))


def test_a_family_that_shows_the_source_needs_one(tmp_path: Path, preferences: list[Preference]) -> None:
    with pytest.raises(ValueError, match="no source"):
        run(preferences, {"edit": FAMILIES["edit"]()}, "http://127.0.0.1:9/v1", tmp_path)


# ---------------------------------------------------------------- going on, and the command


def test_it_goes_on_only_if_told_to(tmp_path: Path, shades: list[Preference]) -> None:
    asked: list[Body] = []
    reply = answer_as("generic", 0)

    def answer(body: Body) -> dict[str, Any]:
        asked.append(body)
        return reply(body)

    families = {"generic": GenericPair()}
    with serving(chat_app(answer)) as url:
        run(shades[:4], families, url, tmp_path)
        with pytest.raises(ValueError, match=r"8 replies of an earlier run.*--resume"):
            run(shades, families, url, tmp_path)
        assert len(asked) == 8
        found = run(shades, families, url, tmp_path, resume=True)
    assert len(asked) == 12 and found["families"]["generic"]["all"]["pairs"] == 6


def test_the_command_prints_a_table_and_keeps_the_figures(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "180")
    monkeypatch.setattr(asking, "LONGEST_WAIT_S", 0.0)
    with serving(application(OracleJudge(failure_rate=0.2))) as url:
        words = ["--endpoint", url, "--family", "flex", "2.0-point", "--out", str(tmp_path), "--limit", "20"]
        assert main(["benchmark", str(file), *words]) == 0
    printed = capsys.readouterr().out
    assert "2.0-point" in printed and "1.000" in printed and DEFINITIONS["accuracy_with_ties"] in printed
    kept = json.loads((tmp_path / "benchmark.json").read_text())
    assert kept["families"]["flex"]["all"]["pairs"] == 20 and kept["models"] == ["UnifiedReward"]
    assert kept["families"]["2.0-point"]["all"]["first"] is None
    assert main(["benchmark", str(file), "--family", "fix", "--out", str(tmp_path)]) == 2
    assert "no family 'fix'" in capsys.readouterr().err
