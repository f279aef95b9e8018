"""The oracle judge as a process of its own, asked as any judge is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_flex.judging import encode_media
from reward_server.families.base import ChatFamily, Reply
from reward_server.families.flex import ANCHORS, Flex
from reward_server.families.unified import Unified2Point
from testbed import clips, oracle, render, scenes
from testbed.oracle_judge import OracleJudge
from testbed.oracle_replies import Judging, prompt_of
from testbed.preference import winners

CAPTION = "a red circle left of a blue square on a white background"
RIGHT, SWAPPED, OTHER = (
    CAPTION,
    "a red circle right of a blue square on a white background",
    "a green cross on a black background",
)


def picture(caption: str, seed: int = 0) -> list[str]:
    scene = scenes.sample_scene(np.random.default_rng(seed), scenes.parse(caption))
    return encode_media(render.render(scene)[None], 1)


def body(family: ChatFamily, shown: Sequence[list[str]], prompt: str = CAPTION, seed: int = 0) -> dict[str, Any]:
    return {"model": "UnifiedReward", "seed": seed, "messages": family.request(prompt, shown)}


def ask(settings: OracleJudge, shown: Sequence[list[str]], family: ChatFamily | None = None, seed: int = 0) -> Reply:
    family = family or Flex()
    return family.parse(Judging(settings).reply(body(family, shown, seed=seed)))


@pytest.mark.parametrize("worse", [SWAPPED, OTHER])
def test_the_better_picture_wins_in_either_order(worse: str) -> None:
    for shown, winner in (([RIGHT, worse], 0.0), ([worse, RIGHT], 1.0)):
        reply = ask(OracleJudge(), [picture(c) for c in shown])
        assert (reply.status, reply.winner, reply.dimensions["alignment"], reply.problem) == ("ok", winner, winner, "")
        assert set(reply.dimensions) == set(ANCHORS)


def test_where_alignment_is_equal_quality_decides() -> None:
    clean = picture(RIGHT)
    scene = scenes.sample_scene(np.random.default_rng(0), scenes.parse(RIGHT))
    rough = render.render(scene).astype(int) + np.random.default_rng(1).integers(-12, 13, (64, 64, 3))
    noisy = encode_media(np.clip(rough, 0, 255).astype(np.uint8)[None], 1)
    reply = ask(OracleJudge(), [noisy, clean])
    assert reply.winner == 1.0 and reply.dimensions["quality"] == 1.0


def test_an_anchor_without_a_difference_goes_with_the_overall_winner() -> None:
    one, two = (oracle.Score(attributes={"count": True}, quality=1.0, composition=c, legible=True) for c in (0.2, 0.9))
    assert winners(one, two, 0) == (1, 1, 1, 1) and winners(two, one, 1) == (0, 0, 0, 0)
    assert winners(one, one, 0) == (0, 0, 0, 0) and winners(one, one, 1) == (1, 1, 1, 1)


def test_a_still_world_clip_is_judged_by_its_last_frames() -> None:
    shown = [picture(OTHER) * 7 + picture(RIGHT), picture(RIGHT) * 7 + picture(OTHER)]
    assert ask(OracleJudge(), shown, Flex(medium="video")).winner == 0.0


MOVING = "a red circle slowly moving right past a blue square moving left on a white background"


def clip(caption: str, order: Sequence[int] = range(9)) -> list[str]:
    """The frames that the judge is shown of a true clip whose frames are put in ``order``."""
    moving = clips.sample_clip(np.random.default_rng(0), clips.parse(caption))
    return encode_media(clips.render_clip(moving)[list(order)], 8)


@pytest.mark.parametrize(
    "worse",
    [
        clip(MOVING.replace("slowly", "quickly")),
        clip(MOVING.replace("red", "green")),
        clip(MOVING, range(8, -1, -1)),  # the other way
        clip(MOVING, [4] * 9),  # frozen
        clip(MOVING, [0, 1, 0, 3, 2, 5, 6, 5, 8]),  # all as told, but it jerks
    ],
    ids=["speed", "colour", "direction", "frozen", "jerks"],
)
def test_a_clip_is_judged_by_what_moves_in_it(worse: list[str]) -> None:
    family, better = Flex(medium="video"), clip(MOVING)
    for shown, winner in (([better, worse], 0.0), ([worse, better], 1.0)):
        reply = family.parse(Judging(OracleJudge()).reply(body(family, shown, MOVING)))
        assert (reply.status, reply.winner) == ("ok", winner)


def test_eight_frames_show_a_true_clip_to_be_smooth() -> None:
    """Eight of nine frames are not evenly spaced; taken for even, the motion would seem to jump."""
    family, caption = Unified2Point(medium="video"), MOVING.replace("slowly", "quickly")
    text = Judging(OracleJudge()).reply(body(family, [clip(caption)], caption))
    marks = family.parse(text).scores
    assert marks["alignment"] == (5.0,) and min(m for scores in marks.values() for m in scores) > 4.9


def test_single_candidates_are_scored_from_one_to_five() -> None:
    good, bad = (ask(OracleJudge(), [picture(c)], Unified2Point()).scores for c in (RIGHT, OTHER))
    assert good["alignment"] == (5.0,) and bad["alignment"][0] < 3
    clip = ask(OracleJudge(), [picture(OTHER) * 15 + picture(RIGHT)], Unified2Point(medium="video"))
    assert clip.scores["alignment"] == (5.0,)


def test_position_bias_favours_the_first_and_noise_tosses_coins() -> None:
    shown = [picture(OTHER), picture(RIGHT)]
    assert {ask(OracleJudge(position_bias=1.0), shown, seed=s).winner for s in range(20)} == {0.0}
    tossed = Counter(ask(OracleJudge(noise=1.0), shown, seed=s).winner for s in range(100))
    assert 30 < tossed[0.0] < 70
    half = Counter(ask(OracleJudge(noise=0.5), shown, seed=s).winner for s in range(200))
    assert 30 < half[0.0] < 70


def test_the_same_question_has_the_same_answer() -> None:
    shown = [picture(OTHER), picture(RIGHT)]
    judge = OracleJudge(noise=0.7)
    assert [ask(judge, shown, seed=s) for s in range(9)] == [ask(judge, shown, seed=s) for s in range(9)]
    assert len({ask(replace(judge, seed=k), shown).winner for k in range(20)}) == 2


def test_the_prompt_is_found_in_any_wording() -> None:
    assert prompt_of('Judge.\nPrompt: "a dog"\n') == "a dog"
    with pytest.raises(ValueError, match="Prompt:"):
        prompt_of("which one?")


# ---------------------------------------------------------------- as a server


def post(url: str, data: bytes) -> tuple[int, Any]:
    request = urllib.request.Request(url + "/chat/completions", data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_it_serves_refuses_nonsense_and_stops(tmp_path: Path) -> None:
    with OracleJudge().start(tmp_path) as judge:
        (url,) = judge.endpoints
        status, reply = post(url, json.dumps(body(Flex(), [picture(OTHER), picture(RIGHT)])).encode())
        assert status == 200 and Flex().parse(reply["choices"][0]["message"]["content"]).winner == 1.0
        assert reply["usage"]["completion_tokens"] > 0
        nonsense = [
            b"{",
            b"[]",
            b"{}",
            json.dumps(body(Flex(), [["data:image/png;base64,xx"]] * 2)).encode(),
            json.dumps(body(Flex(), [picture(RIGHT)] * 3)).encode(),
            json.dumps(body(Flex(), [picture(RIGHT)] * 2, prompt="two dogs")).encode(),
        ]
        for data in nonsense:
            status, reply = post(url, data)
            assert status == 400 and reply["error"]["message"]
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        post(url, b"{}")
    judge.stop()


@pytest.mark.parametrize(
    ("settings", "expected"), [(OracleJudge(failure_rate=1.0), 500), (OracleJudge(drop_rate=1.0), None)]
)
def test_it_fails_as_it_is_told(tmp_path: Path, settings: OracleJudge, expected: int | None) -> None:
    with settings.start(tmp_path) as judge:
        if expected is None:
            with pytest.raises((urllib.error.URLError, ConnectionError)):
                post(judge.endpoints[0], b"{}")
        else:
            assert post(judge.endpoints[0], b"{}")[0] == expected


def test_garbage_is_no_verdict(tmp_path: Path) -> None:
    with OracleJudge(garbage_rate=1.0).start(tmp_path) as judge:
        _, reply = post(judge.endpoints[0], json.dumps(body(Flex(), [picture(RIGHT)] * 2)).encode())
        assert Flex().parse(reply["choices"][0]["message"]["content"]).status == "unparsed"


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except FileNotFoundError:
        return False


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys, time; from testbed.oracle_judge import OracleJudge\n"
        "judge = OracleJudge().start(sys.argv[1]); print(judge.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 10
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(pid)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with OracleJudge().start(tmp_path) as judge:
        port = int(judge.endpoints[0].split(":")[2].split("/")[0])
        with pytest.raises(ValueError, match="address already in use"):
            OracleJudge(port=port).start(tmp_path / "second")


def test_impossible_settings_are_complaints() -> None:
    assert [f for f, _ in OracleJudge(noise=2.0, latency_s=-1.0).problems()] == ["noise", "latency_s"]


def test_many_verdicts_a_second() -> None:
    """A loose bound, far below what was measured, against a reading of each picture for each pair."""
    shown = [picture(CAPTION, seed=k) for k in range(12)]
    judging = Judging(OracleJudge())
    start = time.process_time()
    for i in range(12):
        for j in range(12):
            judging.reply(body(Flex(), [shown[i], shown[j]]))
    assert 144 / (time.process_time() - start) > 300
