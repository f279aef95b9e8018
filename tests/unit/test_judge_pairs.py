"""Pairs for a judge's second stage: every outcome of two samples, the judge of reasoning, and going on after a kill."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reward_server import pairs
from reward_server.asking import Endpoint
from reward_server.families.reasoning import Reasoning
from reward_server.judge_training import JudgeTraining, Pairs
from reward_server.preferences import picture_urls

PROMPTS = ("one right", "none right", "both right", "same text", "no label", "one right, video")
BETTER = 1  # of the candidates as the file gives them


class Stub:
    """A judge whose replies follow from the prompt, and a judge of reasoning that likes the word "good"."""

    def __init__(self, folder: Path) -> None:
        self.samples: Counter[str] = Counter()
        self.seeds: list[tuple[int, float]] = []
        self._better = picture_urls([str(folder / "better.png")], 1)[0]

    def reply(self, body: dict[str, Any]) -> str:
        *shown, text = body["messages"][-1]["content"]
        urls = [part["image_url"]["url"] for part in shown]
        if "Answer 1:" in text["text"]:
            first = text["text"].partition("Answer 2:")[0]
            return json.dumps({"reason": "", "winner": "Answer 1" if "good" in first else "Answer 2"})
        prompt = text["text"].rpartition("Prompt: ")[2].strip()
        number = self.samples[prompt]
        self.samples[prompt] += 1
        self.seeds.append((body["seed"], body["temperature"]))
        noun = "Video" if prompt.endswith("video") else "Image"
        right, wrong = (1, 2) if urls[0] == self._better else (2, 1)
        winners = {"one": (right, wrong), "non": (wrong, 0), "bot": (right, right), "sam": (right, right)}[prompt[:3]]
        reason = "" if prompt.startswith("same") else ("bad", "good")[number % 2]
        return json.dumps({"reason": reason, "winner": f"{noun} {winners[number % 2]}"})


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[tuple[Stub, str]]:
    for name, colour in (("better", "white"), ("worse", "black")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    stub = Stub(tmp_path)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": "judge"}]})

        def do_POST(self) -> None:
            text = stub.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._send({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})

        def _send(self, found: dict[str, Any]) -> None:
            content = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield stub, f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def training(folder: Path, url: str) -> JudgeTraining:
    lines = []
    for prompt in PROMPTS:
        frames = 3 if prompt.endswith("video") else 1
        candidates = [[f"{name}.png"] * frames for name in ("worse", "better")]
        label = None if prompt == "no label" else BETTER
        medium = "video" if frames > 1 else "image"
        lines.append({"id": prompt, "prompt": prompt, "candidates": candidates, "label": label, "medium": medium})
    (folder / "preferences.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = Pairs(
        preferences=str(folder / "preferences.jsonl"), endpoint=Endpoint(url=url, temperature=0.7, concurrency=1)
    )
    return JudgeTraining(name="judge", model="x", pairs=asked, output=str(folder))


def records(config: JudgeTraining) -> dict[str, dict[str, Any]]:
    lines = (config.folder / pairs.FILE).read_text().splitlines()
    return {record["id"]: record for record in map(json.loads, lines)}


def test_every_outcome_is_counted_and_a_reasoning_judge_decides_later(tmp_path: Path, stub: tuple[Stub, str]) -> None:
    judge, url = stub
    config = training(tmp_path, url)
    counts = asyncio.run(pairs.build(config))
    assert {k: v for k, v in counts.items() if v} == {
        "instances": 5, "pairs": 2, pairs.ONE_RIGHT: 2, pairs.SAME: 1, pairs.NOT_ASKED: 1, pairs.NONE_RIGHT: 1,
        "replies": 10, "replies parsed": 9, "replies right": 6, "without a label": 1,
    }  # fmt: skip
    assert json.loads((config.folder / pairs.COUNTS).read_text()) == counts
    assert len(set(judge.seeds)) == 10 and {t for _, t in judge.seeds} == {0.7}
    kept = records(config)["one right"]
    assert kept["chosen"] == kept["replies"][0] and kept["rejected"] == kept["replies"][1]
    assert Path(kept["media"][kept["label"]][0]).name == "better.png"
    assert len(records(config)["one right, video"]["media"][0]) == 3

    asked = sum(judge.samples.values())
    config = replace(config, pairs=replace(config.pairs, reasoning=Endpoint(url=url)))
    counts = asyncio.run(pairs.build(config))
    assert (counts["pairs"], counts[pairs.BY_REASONING], counts[pairs.NOT_ASKED]) == (3, 1, 0)
    assert '"good"' in records(config)["both right"]["chosen"]
    assert sum(judge.samples.values()) == asked


def test_asking_goes_on_after_a_kill(tmp_path: Path, stub: tuple[Stub, str]) -> None:
    judge, url = stub
    config = training(tmp_path, url)
    whole = asyncio.run(pairs.build(config))
    path = config.folder / pairs.FILE
    path.write_text(path.read_text()[:-20])  # the last record was half written
    asked = sum(judge.samples.values())
    assert asyncio.run(pairs.build(config)) == whole
    assert sum(judge.samples.values()) == asked + 2


def test_an_endpoint_that_is_away_is_said(tmp_path: Path, stub: tuple[Stub, str]) -> None:
    with pytest.raises(ValueError, match="no judge answers"):
        asyncio.run(pairs.build(training(tmp_path, "http://127.0.0.1:9/v1")))


@pytest.mark.parametrize(
    ("text", "winner"),
    [
        ('{"reason":"a","winner":"Answer 2"}', 1.0),
        ('{"winner":"Answer 1/2"}', None),
        ('{"winner":"Answer 1"} {"winner":"Answer 2"}', None),
        ("", None),
        ('["Answer 1"]', None),
    ],
)
def test_the_verdict_on_reasoning_is_read_strictly(text: str, winner: float | None) -> None:
    assert Reasoning().parse(text).winner == winner


def test_a_mark_within_an_answer_stays_what_it_is() -> None:
    family = Reasoning(answers=("{answer_2}", "second"))
    text = family.request("{answer_1}", [["a"], ["b"]])[0]["content"][-1]["text"]
    assert text.count("second") == 1 and "{answer_2}" in text and "Prompt: {answer_1}" in text
    assert not list(family.problems()) and not list(replace(family, medium="video").problems())
