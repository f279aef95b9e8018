"""The judge client against real HTTP servers that work, hang, drop, fail, babble, die and come back."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pytest
from aiohttp import web
from PIL import Image

from grpo_flex.config import Judge
from grpo_flex.endpoints import EndpointPool
from grpo_flex.judge_figures import answered, judge_metrics, judged_share, kendall_w, mostly, what_to_mend
from grpo_flex.judging import JudgeClient, JudgeUnreachable, check_endpoints, encode_media, request_seed
from grpo_flex.pairing import RoundRobin, Swiss
from grpo_flex.rewards import Pointwise, Several, WinRate
from grpo_flex.types import GroupMedia, Prompt, Verdict
from grpo_flex.verdicts import drop_from_step, read_verdicts
from reward_server.families.chat import base_url
from reward_server.families.edit import EditPair
from reward_server.families.flex import Flex
from reward_server.families.rank_and_score import RankAndScore
from reward_server.families.reward_dance import RewardDance
from reward_server.families.unified import Unified1Pair, Unified1Point
from testbed.oracle_replies import decode

T = TypeVar("T")
Handler = Callable[["Server", dict[str, Any]], Awaitable[web.StreamResponse]]
FIRST_WINS = '{"categories": [], "reason": "", "winner": "Image 1"}'


def completion(text: str = FIRST_WINS) -> web.Response:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 60}}
    return web.json_response({"choices": [choice], "usage": usage})


class Server:
    """A judge whose answers a test scripts; ``async with`` serves it on a loopback port."""

    def __init__(self, handler: Handler, port: int = 0, model: str = "UnifiedReward") -> None:
        self.handler, self.port, self.model = handler, port, model
        self.bodies: list[dict[str, Any]] = []
        self.now = self.most = 0

    async def __aenter__(self) -> Server:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": self.model}]})

    async def _metrics(self, _: web.Request) -> web.Response:
        asked = len(self.bodies)
        lines = ["# HELP vllm:mm_cache_hits_total Hits.", "vllm:num_requests_running 0.0"]
        lines += ["vllm:prefix_cache_queries_total{} many", "vllm:mm_cache_hits_total"]
        for engine in (0, 1):
            lines += [f'vllm:prefix_cache_queries_total{{engine="{engine}"}} {100.0 * asked}']
            lines += [f'vllm:prefix_cache_hits_total{{engine="{engine}"}} {60.0 * asked}']
        lines += [f'vllm:mm_cache_queries_total{{engine="0"}} {2.0 * asked}', f"vllm:mm_cache_hits_total {asked}"]
        return web.Response(text="\n".join(lines))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return await self.handler(self, {"request": request, **self.bodies[-1]})
        finally:
            self.now -= 1


async def works(_: Server, __: dict[str, Any]) -> web.StreamResponse:
    return completion()


async def hangs(_: Server, __: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(30)
    return completion()


async def drops(_: Server, body: dict[str, Any]) -> web.StreamResponse:
    body["request"].transport.abort()
    return completion()


def status(code: int) -> Handler:
    async def answer(_: Server, __: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no"}}, status=code)

    return answer


def first_then(count: int, before: Handler, after: Handler) -> Handler:
    """``before`` for the first ``count`` requests, ``after`` for the rest."""

    async def answer(server: Server, body: dict[str, Any]) -> web.StreamResponse:
        return await (before if len(server.bodies) <= count else after)(server, body)

    return answer


def group(size: int = 3, step: int = 0, frames: int = 1) -> GroupMedia:
    media = tuple(np.full((frames, 8, 8, 3), 10 * i, np.uint8) for i in range(size))
    return GroupMedia(step=step, prompt=Prompt(id="p", text="a red circle"), media_G=media)


def config(*urls: str, **changes: Any) -> Judge:
    base = Judge(
        family=Flex(),
        pairs=RoundRobin(orders="both"),
        endpoints=urls,
        timeout_s=3.0,
        backoff_s=0.01,
        probe_s=0.05,
        patience_s=0.2,
        step_budget_s=5.0,
    )
    return replace(base, **changes)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


async def ask(path: Path, server: Server, size: int = 3, **changes: Any) -> tuple[list[Verdict], dict[str, float]]:
    async with server, JudgeClient(config(server.url, **changes), path / "v.gz") as client:
        return await client.judge(group(size), 0), client.counters()


def test_every_pair_is_asked_once_and_written_down(tmp_path: Path) -> None:
    server = Server(works)
    verdicts, counters = run(ask(tmp_path, server))
    assert [v.members for v in verdicts] == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert {(v.status, v.winner, v.tokens, v.rationale) for v in verdicts} == {("ok", 0.0, 7, FIRST_WINS)}
    assert all(0 < v.seconds < 5 and v.endpoint == server.url for v in verdicts)
    assert counters == {
        "judge/requests": 6.0,
        "judge/retries": 0.0,
        "judge/breaker_openings": 0.0,
        "judge/prefix_cache_hit_rate": 0.6,
    }
    entries = list(read_verdicts(tmp_path / "v.gz"))
    assert {(e.step, e.prompt_id, e.prompt) for e in entries} == {
        (1, "p", "a red circle")
    }  # counted as in metrics.jsonl
    assert sorted((e.verdict for e in entries), key=lambda v: v.members) == verdicts


def test_the_request_carries_model_sampling_schema_and_pictures_in_order(tmp_path: Path) -> None:
    server = Server(works)
    run(ask(tmp_path, server, size=2, temperature=0.7, seed=3, max_tokens=99))
    by_seed = {body["seed"]: body for body in server.bodies}
    body = by_seed[request_seed(3, 0, "p", (1, 0))]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("UnifiedReward", 0.7, 99)
    assert body["response_format"]["json_schema"]["schema"] == Flex().schema()
    pictures = [p["image_url"]["url"] for p in body["messages"][0]["content"][:2]]
    assert pictures == [encode_media(m, 1)[0] for m in group(2).media_G][::-1]
    assert len(by_seed) == 2


def test_an_edit_is_shown_after_its_source(tmp_path: Path) -> None:
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:48] = 200  # what is left of it when it is cut to a square
    Image.fromarray(wide).save(tmp_path / "source.png")

    async def scenario(reference: dict[str, str]) -> list[str]:
        server = Server(works)
        edited = replace(group(2), prompt=Prompt(id="p", text="make it red", reference=reference))
        changed = config("http://127.0.0.1:1", family=EditPair(), pairs=RoundRobin())
        async with server, JudgeClient(changed, tmp_path / "v.gz", endpoints=[server.url]) as client:
            (verdict,) = await client.judge(edited, 0)
        shown = [p["image_url"]["url"] for p in server.bodies[0]["messages"][0]["content"][:-1]]
        candidates = [encode_media(edited.media_G[i], 1)[0] for i in verdict.members]
        assert shown[1:] == candidates
        return shown

    shown = run(scenario({"source": str(tmp_path / "source.png")}))
    assert decode(shown[0]).shape == decode(shown[1]).shape
    assert np.abs(decode(shown[0]).astype(int) - 200).max() <= 30  # the filter rings at the cut
    with pytest.raises(ValueError, match=r"no reference\['source'\]"):
        run(scenario({}))
    with pytest.raises(ValueError, match=r"none\.png"):
        run(scenario({"source": str(tmp_path / "none.png")}))


def test_one_candidate_at_a_time_is_asked_for_every_sibling(tmp_path: Path) -> None:
    async def scores(_: Server, __: dict[str, Any]) -> web.StreamResponse:
        return completion("Final Score: 4")

    verdicts, _ = run(ask(tmp_path, Server(scores), size=3, family=Unified1Point()))
    assert [(v.members, dict(v.scores)) for v in verdicts] == [((i,), {"final": (4.0,)}) for i in range(3)]
    assert "judge/tie_rate" not in judge_metrics([verdicts])


def test_pairs_and_siblings_are_asked_about_in_their_own_ways(tmp_path: Path) -> None:
    async def either(_: Server, body: dict[str, Any]) -> web.StreamResponse:
        shown = len(body["messages"][0]["content"]) - 1
        return completion("Image 1 is better" if shown == 2 else "Final Score: 4")

    family = RankAndScore(score=Unified1Point(thinking=False))
    server = Server(either)
    verdicts, _ = run(ask(tmp_path, server, size=3, family=family, pairs=RoundRobin()))
    assert len(server.bodies) == 6 and len([b for b in server.bodies if "chat_template_kwargs" in b]) == 3
    assert {v.members: (v.winner, dict(v.scores)) for v in verdicts} == {
        **{(i,): (None, {"final": (4.0,)}) for i in range(3)},
        **{v.members: (0.0, {}) for v in verdicts if len(v.members) == 2},
    }
    reward = Several(names=("rank", "score"), rewards=(WinRate(), Pointwise(criteria=("final",))))
    made = reward(3, verdicts, "p")
    assert not np.isnan(made.breakdown_G["rank"]).any() and np.ptp(made.breakdown_G["score"]) == 0
    figures = judge_metrics([verdicts])
    assert figures["judge/verdicts"] == 6 and figures["judge/first_position_win_rate"] == 1


def test_frames_of_both_kinds_of_question_are_the_familys_own(tmp_path: Path) -> None:
    async def either(_: Server, body: dict[str, Any]) -> web.StreamResponse:
        return completion("Final Score: 4")

    family = RankAndScore(rank=Unified1Pair(medium="video"), score=Unified1Point(medium="video"))

    async def scenario(server: Server) -> list[Verdict]:
        judge = config("http://127.0.0.1:1", family=family, pairs=RoundRobin())
        async with server, JudgeClient(judge, tmp_path / "v.gz", endpoints=[server.url]) as client:
            return await client.judge(group(2, frames=33), 0)

    server = Server(either)
    assert len(run(scenario(server))) == 3
    assert {len(b["messages"][0]["content"]) - 1 for b in server.bodies} == {16}  # 2 × 8, and 1 × 16


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (RankAndScore(rank=Unified1Point()), "rank is Unified1Point.*; it needs to be one that compares two"),
        (RankAndScore(score=Flex()), "score is Flex.*; it needs to be one that scores one"),
        (RankAndScore(score=Unified1Point(medium="video")), "score.medium has medium 'video', but rank has 'image'"),
    ],
)
def test_two_ways_that_do_not_go_together_are_refused(family: RankAndScore, message: str) -> None:
    found = [f"{name} {text}" for name, text in family.problems()]
    assert len(found) == 1 and re.match(message, found[0])


def test_first_token_probabilities_reach_the_family(tmp_path: Path) -> None:
    async def yes(_: Server, body: dict[str, Any]) -> web.StreamResponse:
        assert body["logprobs"] is True and body["max_tokens"] == 1
        likely = [{"token": "yes", "logprob": float(np.log(0.8))}, {"token": "no", "logprob": float(np.log(0.2))}]
        choice = {"message": {"content": "yes"}, "logprobs": {"content": [{"top_logprobs": likely}]}}
        return web.json_response({"choices": [choice]})

    verdicts, _ = run(ask(tmp_path, Server(yes), size=2, family=RewardDance()))
    assert [v.scores["p_yes"] for v in verdicts] == [pytest.approx((0.8, 0.2))] * 2


def test_media_is_encoded_once_per_sibling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[int] = Counter()
    monkeypatch.setattr(
        "grpo_flex.judging.encode_media", lambda media, frames: calls.update([int(media[0, 0, 0, 0])]) or ["data:,x"]
    )
    verdicts, _ = run(ask(tmp_path, Server(works), size=4))
    assert len(verdicts) == 12 and calls == {0: 1, 10: 1, 20: 1, 30: 1}


def test_the_shown_frames_are_uniform_and_pngs_are_lossless() -> None:
    video = np.random.default_rng(0).integers(0, 256, (33, 8, 8, 3), np.uint8)
    shown = encode_media(video, 8)
    assert len(shown) == 8
    np.testing.assert_array_equal(decode(shown[0]), video[0])
    np.testing.assert_array_equal(decode(shown[-1]), video[-1])


def test_concurrency_is_bounded(tmp_path: Path) -> None:
    async def slowly(_: Server, __: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(0.02)
        return completion()

    server = Server(slowly)
    verdicts, _ = run(ask(tmp_path, server, size=5, concurrency=3))
    assert len(verdicts) == 20 and server.most == 3


def test_a_hanging_judge_is_a_timeout_after_its_retries(tmp_path: Path) -> None:
    server = Server(hangs)
    verdicts, _ = run(ask(tmp_path, server, size=2, timeout_s=0.4, retries=2))
    assert {(v.status, v.problem, v.winner) for v in verdicts} == {("timeout", "request timed out", None)}
    assert len(server.bodies) == 6


@pytest.mark.parametrize(
    ("failure", "problem"), [(drops, "connection dropped"), (status(500), "HTTP 500"), (status(503), "HTTP 503")]
)
def test_passing_failures_are_tried_again(tmp_path: Path, failure: Handler, problem: str) -> None:
    del problem
    verdicts, counters = run(ask(tmp_path, Server(first_then(2, failure, works)), size=2))
    assert [v.status for v in verdicts] == ["ok", "ok"] and counters["judge/retries"] == 2


@pytest.mark.parametrize(("failure", "problem"), [(drops, "connection dropped"), (status(500), "HTTP 500")])
def test_lasting_failures_end_as_failed(tmp_path: Path, failure: Handler, problem: str) -> None:
    server = Server(failure)
    verdicts, _ = run(ask(tmp_path, server, size=2, retries=1))
    assert {(v.status, v.problem, v.winner) for v in verdicts} == {("failed", problem, None)}
    assert len(server.bodies) == 4


@pytest.mark.parametrize("code", [400, 413, 422, 429])
def test_a_4xx_is_never_tried_again_and_does_not_open_the_breaker(tmp_path: Path, code: int) -> None:
    server = Server(status(code))
    verdicts, counters = run(ask(tmp_path, server, breaker_failures=1))
    assert {(v.status, v.problem) for v in verdicts} == {("failed", f"HTTP {code}")}
    assert len(server.bodies) == 6 and counters["judge/breaker_openings"] == 0
    assert {v.rationale for v in verdicts} == {"no"}


@pytest.mark.parametrize("code", [401, 403, 404])
def test_who_has_no_such_judge_or_lets_nobody_in_is_left_for_another(tmp_path: Path, code: int) -> None:
    async def scenario() -> tuple[list[Verdict], dict[str, float]]:
        async with (
            Server(status(code), model="Another") as wrong,
            Server(works) as right,
            JudgeClient(config(wrong.url, right.url, breaker_failures=2), tmp_path / "v.gz") as client,
        ):
            verdicts, step = await client.judge(group(3), 0), 0
            while all(state.healthy for state in client.states()):  # which one a group prefers depends on their ports
                verdicts += await client.judge(group(3, step=(step := step + 1)), 0)
            asked = len(wrong.bodies)
            verdicts += await client.judge(group(3, step=step), 0)
            assert len(wrong.bodies) == asked <= 12  # it is not asked again and again
            return verdicts, client.counters()

    verdicts, counters = run(scenario())
    assert {v.status for v in verdicts} == {"ok"} and counters["judge/breaker_openings"] >= 1


@pytest.mark.parametrize("code", [401, 403, 404])
def test_where_there_is_no_other_nothing_is_tried_again(tmp_path: Path, code: int) -> None:
    server = Server(status(code), model="Another")
    verdicts, counters = run(ask(tmp_path, server, breaker_failures=1))
    assert counters["judge/retries"] == 0 and counters["judge/breaker_openings"] == 1
    assert (problem := f"HTTP {code}") in {v.problem for v in verdicts} <= {problem, "no judge reachable"}
    assert f'(mostly: {problem}, "no")' in mostly([verdicts]) and what_to_mend([verdicts])


def test_a_server_with_another_model_stays_away(tmp_path: Path) -> None:
    """Its probe answers, but lists another one."""

    async def scenario() -> bool:
        async with (
            Server(status(404), model="Another") as server,
            JudgeClient(config(server.url, breaker_failures=1), tmp_path / "v.gz") as client,
        ):
            await client.judge(group(2), 0)
            assert not any(state.healthy for state in client.states())
            return await client.wait_until_healthy(0.0, heartbeat=lambda _: None)

    assert not run(scenario())


@pytest.mark.parametrize(
    "body",
    [
        "",
        "<html>",
        "[]",
        "null",
        "{}",
        '{"choices": []}',
        '{"choices": [{"message": null}]}',
        '{"choices": {"a": 1}}',
        '{"choices": [{"message": {"content": 5}}]}',
        '{"choices": [{"message": {"content": [{"type": "text", "text": "a"}]}}]}',
        '{"choices": [{"message": {"content": "a"}}], "usage": {"completion_tokens": 1e999}}',
    ],
)
def test_a_reply_that_is_no_chat_completion_is_failed(tmp_path: Path, body: str) -> None:
    async def babble(_: Server, __: dict[str, Any]) -> web.StreamResponse:
        return web.Response(text=body)

    verdicts, _ = run(ask(tmp_path, Server(babble), size=2))
    assert {(v.status, v.problem) for v in verdicts} == {("failed", "not a chat completion")}


@pytest.mark.parametrize(
    ("text", "problem"), [("Image 1/2", "no JSON object"), ("", "empty reply"), (None, "empty reply")]
)
def test_garbage_from_the_model_is_unparsed_and_kept_as_evidence(tmp_path: Path, text: str, problem: str) -> None:
    async def babble(_: Server, __: dict[str, Any]) -> web.StreamResponse:
        return completion(text)

    server = Server(babble)
    verdicts, _ = run(ask(tmp_path, server, size=2))
    assert {(v.status, v.problem, v.rationale) for v in verdicts} == {("unparsed", problem, text or "")}
    assert len(server.bodies) == 2


def test_the_step_budget_ends_a_slow_step(tmp_path: Path) -> None:
    async def slowly(_: Server, __: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(0.4)
        return completion()

    verdicts, _ = run(ask(tmp_path, Server(slowly), size=5, concurrency=2, step_budget_s=1.5))
    found = Counter((v.status, v.problem) for v in verdicts)
    assert 2 <= found["ok", "no categories"] <= 8
    assert found["timeout", "step budget spent"] >= 10
    assert len(verdicts) == 20


def test_a_key_that_is_given_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To an actor on a cluster that was there before, which has another environment."""
    keys: list[str] = []

    async def look(_: Server, body: dict[str, Any]) -> web.StreamResponse:
        keys.append(body["request"].headers.get("Authorization", ""))
        return completion()

    async def scenario() -> None:
        async with Server(look) as server, JudgeClient(config(server.url), tmp_path / "v.gz", api_key="abc") as client:
            await client.judge(group(2), 0)

    monkeypatch.delenv(config("http://a").api_key_env, raising=False)
    run(scenario())
    assert set(keys) == {"Bearer abc"}


def test_a_group_is_written_down_at_once_when_it_is_complete(tmp_path: Path) -> None:
    """A client that dies before is asked about the whole group again: nothing may stand there twice."""
    written: list[int] = []

    async def count(_: Server, __: dict[str, Any]) -> web.StreamResponse:
        path = tmp_path / "v.gz"
        written.append(len(list(read_verdicts(path))) if path.exists() else 0)
        return completion()

    async def scenario() -> None:
        async with Server(count) as server, JudgeClient(config(server.url, concurrency=1), tmp_path / "v.gz") as client:
            client.log._since = -1e9  # a line would be written as soon as it comes
            await client.judge(group(3), 0)

    run(scenario())
    assert written == [0] * 6 and len(list(read_verdicts(tmp_path / "v.gz"))) == 6


async def _dead_url() -> str:
    async with Server(works) as server:
        return server.url


def test_with_nobody_there_most_questions_fail_unasked(tmp_path: Path) -> None:
    async def scenario() -> list[Verdict]:
        async with JudgeClient(config(await _dead_url(), concurrency=2), tmp_path / "v.gz") as client:
            return await client.judge(group(6), 0)

    verdicts = run(scenario())
    assert {v.status for v in verdicts} == {"failed"} and len(verdicts) == 30
    problems = Counter(v.problem for v in verdicts)
    assert problems.keys() == {"cannot connect", "no judge reachable"} and problems["no judge reachable"] > 15


def test_a_dead_endpoint_is_replaced_by_a_living_one(tmp_path: Path) -> None:
    async def scenario() -> list[Verdict]:
        dead = await _dead_url()
        async with Server(works) as server, JudgeClient(config(dead, server.url), tmp_path / "v.gz") as client:
            verdicts = await client.judge(group(6), 0)
            assert {v.endpoint for v in verdicts} == {server.url}
            assert client.counters()["judge/breaker_openings"] == 1
            return verdicts

    assert {v.status for v in run(scenario())} == {"ok"}


def test_one_group_keeps_to_one_server_until_that_is_much_busier() -> None:
    async def scenario() -> None:
        pool = EndpointPool(
            cast(Any, None),
            ["http://a", "http://b"],
            "UnifiedReward",
            breaker_failures=1,
            probe_s=1,
            patience_s=1,
            slack=3,
        )
        chosen = [await pool.choose(f"group {k}", None, 0.0) for k in range(20) for _ in range(2)]
        assert chosen[::2] == chosen[1::2] and set(chosen) == set(pool.endpoints)
        favourite = chosen[0]
        assert favourite is not None
        favourite.in_flight = 3
        assert await pool.choose("group 0", None, 0.0) is favourite
        favourite.in_flight = 4
        assert await pool.choose("group 0", None, 0.0) is not favourite
        favourite.in_flight = 0
        assert await pool.choose("group 0", favourite, 0.0) is not favourite

    run(scenario())


def test_two_endpoints_share_the_load(tmp_path: Path) -> None:
    async def slowly(_: Server, __: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(0.01)
        return completion()

    async def scenario() -> tuple[list[Verdict], int, int]:
        async with (
            Server(slowly) as one,
            Server(slowly) as two,
            JudgeClient(config(one.url, two.url, concurrency=8), tmp_path / "v.gz") as client,
        ):
            return await client.judge(group(9), 0), len(one.bodies), len(two.bodies)

    verdicts, one, two = run(scenario())
    assert len(verdicts) == one + two == 72 and min(one, two) >= 18


def test_a_judge_that_dies_and_comes_back_is_found_again(tmp_path: Path) -> None:
    async def scenario() -> tuple[list[Verdict], list[Verdict]]:
        first = Server(works)
        async with first, JudgeClient(config(first.url, patience_s=3.0, retries=4), tmp_path / "v.gz") as client:
            await first.__aexit__()
            asking = asyncio.create_task(client.judge(group(6), 0))
            await asyncio.sleep(0.4)
            async with Server(works, port=first.port):
                during = await asking
                return during, await client.judge(group(4, step=1), 0)

    during, after = run(scenario())
    assert {v.status for v in after} == {"ok"}
    assert {v.status for v in during} == {"ok"}, "questions wait out a short absence"


def test_a_second_call_asks_only_what_is_missing(tmp_path: Path) -> None:
    async def scenario() -> tuple[list[Verdict], list[Verdict], int]:
        server = Server(first_then(2, status(400), works))
        async with server, JudgeClient(config(server.url, concurrency=1), tmp_path / "v.gz") as client:
            some = await client.judge(group(), 0)
            return some, await client.judge(group(), 0, previous=some), len(server.bodies)

    some, whole, requests = run(scenario())
    assert judged_share(some) == pytest.approx(4 / 6) and judged_share(whole) == 1.0
    assert requests == 8 and len(whole) == 6


def test_asking_again_has_the_whole_budget_again(tmp_path: Path) -> None:
    async def scenario() -> list[str]:
        async with (
            Server(first_then(2, hangs, works)) as server,
            JudgeClient(config(server.url, step_budget_s=1.0, retries=0), tmp_path / "v.gz") as client,
        ):
            spent = await client.judge(group(2), 0)
            again = await client.judge(group(2), 0, previous=spent)
            return [v.status for v in [*spent, *again]]

    assert run(scenario()) == ["timeout", "timeout", "ok", "ok"]


def test_the_budget_is_for_judging_and_not_for_sampling(tmp_path: Path) -> None:
    """Groups of a step that come late, and siblings that are still being made, find it whole."""

    async def made(after_s: float) -> np.ndarray:
        await asyncio.sleep(after_s)
        return np.zeros((1, 8, 8, 3), np.uint8)

    async def scenario() -> list[Verdict]:
        async with (
            Server(works) as server,
            JudgeClient(config(server.url, step_budget_s=1.0), tmp_path / "v.gz") as client,
        ):
            verdicts = await client.judge(group(2), 0)
            await asyncio.sleep(1.1)
            verdicts += await client.judge(group(2), 0)
            prompt = Prompt(id="p", text="a red circle")
            return verdicts + await client.judge_as_ready(prompt, 0, [made(0.0), made(1.1)], 0)

    assert [v.status for v in run(scenario())] == ["ok"] * 6


def test_waiting_for_a_judge_beats_and_ends(tmp_path: Path) -> None:
    async def scenario() -> tuple[bool, bool, list[float]]:
        beats: list[float] = []
        server = Server(works)
        async with server, JudgeClient(config(server.url), tmp_path / "v.gz") as client:
            there = await client.wait_until_healthy(5.0, beats.append)
            assert not beats
            await server.__aexit__()
            return there, await client.wait_until_healthy(1.0, beats.append, every_s=0.1), beats

    there, gone, beats = run(scenario())
    assert there and not gone and 2 <= len(beats) <= 12


def test_pairs_are_asked_as_soon_as_both_siblings_exist(tmp_path: Path) -> None:
    async def scenario() -> list[tuple[int, ...]]:
        server = Server(works)
        last: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        media = group().media_G

        async def at_once(i: int) -> np.ndarray:
            return media[i]

        async with server, JudgeClient(config(server.url), tmp_path / "v.gz") as client:
            coming = [at_once(0), at_once(1), last]
            asking = asyncio.create_task(client.judge_as_ready(group().prompt, 0, coming, 0))
            await asyncio.sleep(0.2)
            assert len(server.bodies) == 2 and not asking.done()
            last.set_result(media[2])
            return [v.members for v in await asking]

    assert len(run(scenario())) == 6


def test_a_plan_in_rounds_is_followed_to_its_end(tmp_path: Path) -> None:
    verdicts, _ = run(ask(tmp_path, Server(works), size=8, pairs=Swiss(rounds=3)))
    assert len(verdicts) == 12


def test_a_plan_in_rounds_ends_when_the_judge_is_broken(tmp_path: Path) -> None:
    verdicts, _ = run(ask(tmp_path, Server(status(400)), size=8, pairs=Swiss(rounds=3)))
    assert [v.status for v in verdicts] == ["failed"] * 4


def test_the_servers_cache_hits_are_shown_since_the_last_look(tmp_path: Path) -> None:
    async def scenario() -> list[dict[str, float]]:
        async with Server(works) as server, JudgeClient(config(server.url), tmp_path / "v.gz") as client:
            await client.judge(group(), 0)
            return [await client.cache_hit_rates(), await client.cache_hit_rates()]

    assert run(scenario()) == [{"judge/prefix_cache_hit_rate": 0.6, "judge/mm_cache_hit_rate": 0.5}, {}]


def test_cache_hits_of_a_server_that_began_anew_count_from_its_beginning(tmp_path: Path) -> None:
    async def scenario() -> list[dict[str, float]]:
        server = Server(works)
        async with server, JudgeClient(config(server.url), tmp_path / "v.gz") as client:
            await client.judge(group(), 0)
            before = await client.cache_hit_rates()
            server.bodies.clear()
            await client.judge(group(2), 0)
            return [before, await client.cache_hit_rates()]

    before, after = run(scenario())
    assert before == after == {"judge/prefix_cache_hit_rate": 0.6, "judge/mm_cache_hit_rate": 0.5}


def test_the_state_of_every_server_is_known_while_it_works(tmp_path: Path) -> None:
    async def scenario() -> tuple[list[str], list[str]]:
        dead = await _dead_url()
        async with (
            Server(hangs) as server,
            JudgeClient(config(dead, server.url, timeout_s=20.0), tmp_path / "v.gz") as client,
        ):
            asking = asyncio.create_task(client.judge(group(6), 0))
            while server.now < 30 or client.states()[0].healthy:
                await asyncio.sleep(0.01)
            during = [str(s) for s in client.states()]
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            return during, [str(s) for s in client.states()]

    (gone, busy), after = run(scenario())
    assert gone.startswith("open: nothing is sent to it until it answers a probe, 0 in flight")
    assert busy == "healthy, 30 in flight" and after[1] == "healthy, 0 in flight"


def test_a_judge_that_answers_a_probe_is_asked_again_at_once(tmp_path: Path) -> None:
    async def scenario() -> tuple[set[str], set[str]]:
        server = Server(works)
        async with server, JudgeClient(config(server.url, probe_s=60.0, patience_s=0.0), tmp_path / "v.gz") as client:
            await server.__aexit__()
            before = await client.judge(group(), 0)
            async with Server(works, port=server.port):
                assert await client.wait_until_healthy(1.0, lambda _: None)
                after = await client.judge(group(), 0, previous=before)
                return {v.status for v in before}, {v.status for v in after}

    assert run(scenario()) == ({"failed"}, {"ok"})


def test_the_key_is_taken_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    async def look(_: Server, body: dict[str, Any]) -> web.StreamResponse:
        seen.append(body["request"].headers.get("Authorization", ""))
        return completion()

    monkeypatch.setenv("MY_KEY", "s3cret")
    run(ask(tmp_path, Server(look), size=2, api_key_env="MY_KEY"))
    assert seen == ["Bearer s3cret"] * 2


# ---------------------------------------------------------------- the start of a run


def test_an_unreachable_judge_is_one_clear_message() -> None:
    url = run(_dead_url())
    with pytest.raises(JudgeUnreachable) as caught:
        check_endpoints([url], "UnifiedReward", timeout_s=1)
    message = str(caught.value)
    assert url in message and "refused" in message.lower() and "judge.endpoints=" in message


def test_the_check_names_a_wrong_model_and_tolerates_one_dead_endpoint() -> None:
    async def scenario() -> None:
        async with Server(works) as server:
            dead = await _dead_url()
            assert await asyncio.to_thread(check_endpoints, [server.url], "UnifiedReward") == []
            (complaint,) = await asyncio.to_thread(check_endpoints, [server.url, dead], "UnifiedReward")
            assert dead in complaint
            with pytest.raises(JudgeUnreachable, match="serves UnifiedReward, not 'Other'"):
                await asyncio.to_thread(check_endpoints, [server.url], "Other")

    run(scenario())


def test_base_urls() -> None:
    assert base_url("http://h:1") == base_url("http://h:1/") == base_url("http://h:1/v1/") == "http://h:1/v1"
    assert base_url("https://h/judge/v1") == "https://h/judge/v1"


# ---------------------------------------------------------------- the record


def test_a_torn_record_loses_its_last_batch_only_and_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "v.gz"
    run(ask(tmp_path, Server(works)))
    whole = path.stat().st_size
    run(ask(tmp_path, Server(works), size=2))
    os.truncate(path, path.stat().st_size - 5)
    assert len(list(read_verdicts(path))) == 6
    verdicts, _ = run(ask(tmp_path, Server(works), size=2))
    assert len(list(read_verdicts(path))) == 6 + len(verdicts)
    assert path.stat().st_size > whole
    assert len(gzip.decompress(path.read_bytes()).splitlines()) == 8


def test_the_steps_after_a_checkpoint_are_dropped(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Server(works) as server, JudgeClient(config(server.url), tmp_path / "v.gz") as client:
            for step in range(4):
                await client.judge(group(2, step=step), 0)

    run(scenario())
    assert drop_from_step(tmp_path / "v.gz", 3) == 4
    assert [e.step for e in read_verdicts(tmp_path / "v.gz")] == [1, 1, 2, 2]
    assert drop_from_step(tmp_path / "missing.gz", 2) == 0


# ---------------------------------------------------------------- figures


def test_judge_figures_by_hand() -> None:
    def v(i: int, j: int, winner: float | None, **more: Any) -> Verdict:
        return Verdict(members=(i, j), status="ok", winner=winner, **more)

    groups = [
        [v(0, 1, 0.0, seconds=1.0, tokens=10), v(1, 0, 0.0, seconds=3.0, tokens=30), v(0, 2, 0.0), v(2, 0, 1.0)],
        [v(0, 1, 0.5), Verdict(members=(1, 0), status="unparsed", problem="no winner")],
        [Verdict(members=(0, 1), status="timeout", problem="request timed out")] * 2,
    ]
    found = judge_metrics(groups)
    assert found["judge/verdicts"] == 8 and found["judge/masked_share"] == 3 / 8
    assert found["judge/parse_rate"] == 5 / 6 and found["judge/tokens_per_verdict"] == 40 / 6
    assert found["judge/order_consistency"] == 0.5
    assert found["judge/tie_rate"] == 1 / 5
    assert found["judge/first_position_win_rate"] == 3 / 4
    assert found["judge/problem/no_winner"] == 1 and found["judge/problem/request_timed_out"] == 2
    # Of the two that were sent.
    assert found["judge/latency_p50"] == 2.0 and found["judge/latency_p95"] == pytest.approx(1 + 2 * 0.95)
    assert found["judge/without_winner"] == 0
    assert judge_metrics([]) == {} and judge_metrics([[]]) == {}


def test_a_reply_that_leaves_the_winner_open_is_no_answer() -> None:
    open_ended = Verdict(members=(0, 1), status="ok", problem="scores do not add up", dimensions={"style": 0.0})
    told = Verdict(members=(1, 0), status="ok", winner=0.0)
    assert judged_share([open_ended, told]) == 0.5 and judged_share([told]) == 1
    assert judge_metrics([[open_ended, told]])["judge/without_winner"] == 1
    assert judged_share([Verdict(members=(0,), status="ok", scores={"a": (1.0,)})]) == 1
    assert what_to_mend([[open_ended]]) and not what_to_mend([[told]])


def test_a_winner_that_was_left_open_is_asked_about_again(tmp_path: Path) -> None:
    async def scenario() -> list[Verdict]:
        async with Server(works) as server, JudgeClient(config(server.url), tmp_path / "v.gz") as client:
            first = await client.judge(group(2), 0)
            left_open = [replace(first[0], winner=None, problem="scores do not add up"), *first[1:]]
            again = await client.judge(group(2), 0, left_open)
            assert len(server.bodies) == 3
            return again

    assert all(map(answered, run(scenario())))


def test_agreement_is_among_the_dimensions_that_there_are() -> None:
    def v(i: int, j: int, style: float) -> Verdict:
        return Verdict(members=(i, j), status="ok", winner=0.0, dimensions={"style": style})

    alike, unlike = [v(0, 1, 0.0), v(0, 2, 0.0), v(1, 2, 0.0)], [v(0, 1, 1.0), v(0, 2, 1.0), v(1, 2, 1.0)]
    assert judge_metrics([alike])["judge/kendall_w"] == 1 and judge_metrics([unlike])["judge/kendall_w"] == 0


def test_kendalls_w_by_hand() -> None:
    alike = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    assert kendall_w(alike) == pytest.approx(1.0)
    # Rank sums 4, 4, 4: no agreement at all.
    assert kendall_w(np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])) == pytest.approx(0.0)
    # Ranks (1, 2.5, 2.5) and (1, 2, 3): sums 2, 4.5, 5.5, S = 6.5; 12·6.5 / (4·24 - 2·6) = 78/84.
    assert kendall_w(np.array([[1.0, 2.0, 2.0], [1.0, 2.0, 3.0]])) == pytest.approx(78 / 84)
    assert kendall_w(np.ones((2, 3))) is None


def test_kendalls_w_of_a_group_whose_anchors_agree() -> None:
    verdicts = [
        Verdict(members=(i, j), status="ok", winner=w, dimensions={"alignment": w, "quality": 1 - w})
        for i, j, w in [(0, 1, 0.0), (0, 2, 0.0), (1, 2, 0.0)]
    ]
    # Ranks 3 2 1, 3 2 1, 1 2 3: sums 7, 6, 5, S = 2; 12·2 / (9·24) = 1/9.
    assert judge_metrics([verdicts])["judge/kendall_w"] == pytest.approx(1 / 9)


def test_the_record_is_plain_json_lines(tmp_path: Path) -> None:
    run(ask(tmp_path, Server(works), size=2))
    lines = gzip.decompress((tmp_path / "v.gz").read_bytes()).splitlines()
    assert len(lines) == 2
    assert set(json.loads(lines[0])) >= {"step", "prompt_id", "members", "winner", "rationale", "seconds", "endpoint"}
