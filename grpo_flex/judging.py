"""Asking the judge: one client for a whole run, in one event loop.

A question shows the judge one sibling or an ordered pair. Every question ends as a ``Verdict``: "ok",
"unparsed" (the reply does not plainly say who won), "timeout" or "failed", the last three with a named
problem. Nothing that goes wrong with the judge raises, and nothing becomes a 0 or a ½.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_flex.endpoints import (
    Endpoint,
    EndpointPool,
    EndpointState,
    JudgeUnreachable,
    cache_counters,
    check_endpoints,
    growth,
    hit_rates,
    is_alive,
)
from grpo_flex.judge_figures import answered
from grpo_flex.rewards import overall_answers
from grpo_flex.sources import fitted_source
from grpo_flex.types import GroupMedia, Prompt, Verdict, VerdictStatus
from grpo_flex.verdicts import VerdictLog
from reward_server.families import chat
from reward_server.families.base import Completion
from reward_server.families.rank_and_score import by_candidates

if TYPE_CHECKING:
    from grpo_flex.config import Judge
    from reward_server.families.base import Family

__all__ = ["JudgeClient", "JudgeUnreachable", "check_endpoints"]

SAID_LONGEST = 500
"""Characters that are kept of a server's refusal: vLLM says in them what was wrong with the question."""


@dataclass(slots=True)
class _Clock:
    """The time that a group's questions have, from when its last sibling is there."""

    seconds: float
    until: float = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self, *_: object) -> None:
        self.until = time.monotonic() + self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    step: int
    prompt: Prompt
    members: tuple[int, ...]
    clock: _Clock

    @property
    def deadline(self) -> float:
        """``time.monotonic()`` after which nothing is sent."""
        return self.clock.until


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """One try of one request."""

    status: VerdictStatus
    """ok: a completion came, whatever it says."""
    problem: str = ""
    retry: bool = False
    elsewhere: bool = False
    """The server's own fault, in which it would persist: another one may be asked, this one not again."""
    said: str = ""
    """The beginning of what a server that refused said."""
    completion: Completion | None = None
    tokens: int = 0
    seconds: float = 0.0


class JudgeClient:
    """Asks a judge; use it from one event loop, with ``async with`` or a final ``await close()``.

    Args:
        judge: The configuration's judge part.
        verdict_path: Where every verdict is appended (``verdicts.jsonl.gz``).
        endpoints: Base URLs; None: ``judge.endpoints``.
        api_key: None: what the variable holds that ``judge.api_key_env`` names.
    """

    def __init__(
        self,
        judge: Judge,
        verdict_path: str | Path,
        endpoints: Sequence[str] | None = None,
        api_key: str | None = None,
    ) -> None:
        self.judge_config = judge
        self._urls = tuple(endpoints if endpoints is not None else judge.endpoints)
        self._key = os.environ.get(judge.api_key_env, "") if api_key is None else api_key
        self.log = VerdictLog(verdict_path)
        self._families = by_candidates(judge.family)
        self._options = {candidates: family.options() for candidates, family in self._families.items()}
        self._counts: Counter[str] = Counter()
        self._caches: dict[str, dict[str, float]] = {}
        self._session: Any = None
        self._pool: EndpointPool | None = None
        self._slots = asyncio.Semaphore(judge.concurrency)

    async def __aenter__(self) -> JudgeClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Writes the last verdicts and closes the connections."""
        self.log.flush()
        if self._pool is not None:
            await self._pool.close()
            await self._session.close()
            self._session = self._pool = None

    # ------------------------------------------------------------ asking

    async def judge(self, group: GroupMedia, seed: int, previous: Sequence[Verdict] = ()) -> list[Verdict]:
        """Verdicts of a finished group, ordered by members.

        Args:
            group: G siblings of one prompt.
            seed: Chooses the pairs and their orders; the same seed asks the same questions.
            previous: Verdicts of an earlier call: its answers are kept, and only the other questions are asked.
        """
        ready = [_done(media) for media in group.media_G]
        return await self.judge_as_ready(group.prompt, group.step, ready, seed, previous)

    async def compare(
        self, prompt: Prompt, step: int, seed: int, one: np.ndarray, two: np.ndarray, about: str
    ) -> list[Verdict]:
        """Verdicts on two media of one prompt, members 0 and 1.

        Args:
            about: Which sample, for the record.
        """
        return await self.judge_as_ready(prompt, step, [_done(one), _done(two)], seed, about=about)

    async def judge_as_ready(
        self,
        prompt: Prompt,
        step: int,
        media_G: Sequence[Awaitable[np.ndarray]],
        seed: int,
        previous: Sequence[Verdict] = (),
        about: str = "",
    ) -> list[Verdict]:
        """The same for siblings that are still being made: each pair is asked as soon as both exist.

        Args:
            media_G: Awaitables of uint8 [F, H, W, 3]; each is encoded once, for all its questions with as many frames.
        """
        known = {v.members: v for v in previous if answered(v)}
        said: list[Verdict] = []
        coming = [asyncio.ensure_future(media) for media in media_G]
        shown = {family.frames for family in self._families.values()}
        encoded = {n: [asyncio.ensure_future(self._encoded(media, n)) for media in coming] for n in shown}
        sources = await self._sources(prompt, coming)
        clock = _Clock(self.judge_config.step_budget_s)
        for media in coming:
            media.add_done_callback(clock.start)
        try:
            members = self.judge_config.questions(len(coming), seed)
            while members:
                new = [m for m in members if m not in known]
                questions = [_Question(step=step, prompt=prompt, members=m, clock=clock) for m in new]
                async with asyncio.TaskGroup() as tasks:
                    asked = [tasks.create_task(self._verdict(q, sources, encoded)) for q in questions]
                told = [task.result() for task in asked]
                said += told
                known |= {v.members: v for v in told}
                # Rounds that an earlier call answered are gone through again, without asking.
                following = self._more_questions(len(coming), seed, list(known.values()))
                members = following if new or any(m not in known for m in following) else []
        finally:
            for sibling in (sibling for siblings in encoded.values() for sibling in siblings):
                sibling.cancel()
        # All at once: a client that dies before is asked again about the whole group, and nothing is to stand there twice.
        for verdict in said:
            self.log.add(step + 1, prompt.id, prompt.text, verdict, about)
        self.log.flush()
        return [known[m] for m in sorted(known)]

    async def wait_until_healthy(
        self, timeout_s: float, heartbeat: Callable[[float], None], every_s: float = 5.0
    ) -> bool:
        """Waits until a server answers; calls ``heartbeat(seconds waited)`` every ``every_s``."""
        start = time.monotonic()
        pool = self._connected()
        while True:
            model = self.judge_config.model
            said = await asyncio.gather(*(is_alive(self._session, e.url, model, 2.0) for e in pool.endpoints))
            alive = [e for e, answers in zip(pool.endpoints, said, strict=True) if answers]
            for endpoint in alive:
                pool.revive(endpoint)
            waited = time.monotonic() - start
            if alive or waited > timeout_s:
                return bool(alive)
            heartbeat(waited)
            await asyncio.sleep(min(every_s, max(0.1, timeout_s - waited)))

    def counters(self) -> dict[str, float]:
        """``judge/…`` counts of the client itself since the last call, then zeroed.

        Requests sent, retries, breakers opened, and, where the server reports them, the share of prompt
        tokens that its prefix cache served.
        """
        counts, self._counts = self._counts, Counter()
        found = {f"judge/{name}": float(counts[name]) for name in ("requests", "retries")}
        if self._pool is not None:
            found["judge/breaker_openings"] = float(self._pool.openings)
            self._pool.openings = 0
        if counts["prompt_tokens"] and "cached_tokens" in counts:
            found["judge/prefix_cache_hit_rate"] = counts["cached_tokens"] / counts["prompt_tokens"]
        return found

    async def cache_hit_rates(self) -> dict[str, float]:
        """``judge/prefix_cache_hit_rate`` and ``judge/mm_cache_hit_rate`` since the last call, over all servers.

        vLLM's own counts; empty where no server shows them.
        """
        pool = self._connected()
        there = [e.url for e in pool.endpoints if not e.open]  # one that is away would only cost its timeout
        readings = await asyncio.gather(*(cache_counters(self._session, url) for url in there))
        grown = [growth(self._caches.get(url, {}), reading) for url, reading in zip(there, readings, strict=True)]
        total = {name: sum(g.get(name, 0.0) for g in grown) for g in grown for name in g}
        self._caches |= {url: reading for url, reading in zip(there, readings, strict=True) if reading}
        return {f"judge/{name}": rate for name, rate in hit_rates(total).items()}

    def states(self) -> list[EndpointState]:
        """What is known of each server at this moment."""
        return [endpoint.state() for endpoint in self._connected().endpoints]

    # ------------------------------------------------------------ which questions

    def _more_questions(self, group_size: int, seed: int, verdicts: Sequence[Verdict]) -> list[tuple[int, ...]]:
        if 2 not in self._families:
            return []
        return list(self.judge_config.pairs.more(group_size, seed, overall_answers(verdicts)))

    # ------------------------------------------------------------ media

    async def _encoded(self, media: Awaitable[np.ndarray], frames: int) -> list[str]:
        return await asyncio.to_thread(encode_media, await media, frames)

    async def _sources(self, prompt: Prompt, media_G: Sequence[Awaitable[np.ndarray]]) -> list[list[str]]:
        """Pictures that stand before the candidates: what an editing prompt edits, in the size in which it was edited."""
        if not self.judge_config.family.sources:
            return []
        height, width = (await media_G[0]).shape[1:3]
        return [[chat.data_url(await asyncio.to_thread(fitted_source, prompt, width, height))]]

    # ------------------------------------------------------------ one question

    async def _verdict(
        self,
        question: _Question,
        sources: list[list[str]],
        encoded: Mapping[int, Sequence[asyncio.Future[list[str]]]],
    ) -> Verdict:
        frames = self._family(question).frames
        media = [*sources, *[await encoded[frames][i] for i in question.members]]
        affinity = f"{question.step} {question.prompt.id}"  # a server keeps the pictures of the groups it sees
        spent = 0.0
        endpoint: Endpoint | None = None
        outcome = _Outcome(status="timeout", problem="step budget spent")
        for attempt in range(self.judge_config.retries + 1):
            if attempt:
                self._counts["retries"] += 1
                if outcome.retry:
                    await self._back_off(attempt, question.deadline)
            tried, endpoint = await self._try(question, media, affinity, endpoint)
            if tried is None:  # out of time or out of endpoints; keep what the last real try said
                outcome = outcome if attempt else self._no_try(question)
                break
            outcome = tried
            spent += tried.seconds
            if not (outcome.retry or (outcome.elsewhere and self._connected().others(endpoint))):
                break
        url = endpoint.url if endpoint else ""
        return replace(self._read(question, outcome), endpoint=url, seconds=spent)

    def _no_try(self, question: _Question) -> _Outcome:
        if time.monotonic() >= question.deadline:
            return _Outcome(status="timeout", problem="step budget spent")
        return _Outcome(status="failed", problem="no judge reachable")

    async def _back_off(self, attempt: int, deadline: float) -> None:
        """Full jitter: a uniformly random wait below base · 2^(attempt-1), so that retries spread out."""
        longest = self.judge_config.backoff_s * 2 ** (attempt - 1)
        await asyncio.sleep(max(0.0, min(random.uniform(0, longest), deadline - time.monotonic())))

    async def _try(
        self, question: _Question, media: list[list[str]], affinity: str, last: Endpoint | None
    ) -> tuple[_Outcome | None, Endpoint | None]:
        """One request, or (None, last) when there is no time or nobody to send it to."""
        try:
            async with asyncio.timeout(question.deadline - time.monotonic()):
                await self._slots.acquire()
        except TimeoutError:
            return None, last
        try:
            pool = self._connected()
            endpoint = await pool.choose(affinity, last, question.deadline)
            left = min(self.judge_config.timeout_s, question.deadline - time.monotonic())
            if endpoint is None or left <= 0:
                return None, last
            endpoint.in_flight += 1
            start = time.monotonic()
            try:
                outcome = await self._post(endpoint, self._body(question, media), left)
            finally:
                endpoint.in_flight -= 1
            pool.report(endpoint, alive=not (outcome.retry or outcome.elsewhere))
            return replace(outcome, seconds=time.monotonic() - start), endpoint
        finally:
            self._slots.release()

    def _connected(self) -> EndpointPool:
        if self._pool is None:
            import aiohttp

            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # the slots bound the requests
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            )
            self._pool = EndpointPool(
                self._session,
                self._urls,
                self.judge_config.model,
                breaker_failures=self.judge_config.breaker_failures,
                probe_s=self.judge_config.probe_s,
                patience_s=self.judge_config.patience_s,
                slack=max(1, self.judge_config.concurrency // max(1, 2 * len(self._urls))),
            )
        return self._pool

    def _body(self, question: _Question, media: list[list[str]]) -> bytes:
        config, family = self.judge_config, self._family(question)
        body = {
            "model": config.model,
            "temperature": config.temperature,
            "seed": request_seed(config.seed, question.step, question.prompt.id, question.members),
            "max_tokens": config.max_tokens,
        } | self._options[len(question.members)]
        return chat.encoded(lambda shown: body | {"messages": family.request(question.prompt.text, shown)}, media)

    def _family(self, question: _Question) -> Family:
        return self._families[len(question.members)]

    async def _post(self, endpoint: Endpoint, body: bytes, timeout_s: float) -> _Outcome:
        import aiohttp

        self._counts["requests"] += 1
        headers = {"Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.post(endpoint.url + "/chat/completions", data=body, headers=headers) as response,
            ):
                content = await response.read()
        except TimeoutError:
            return _Outcome(status="timeout", problem="request timed out", retry=True)
        except aiohttp.ClientConnectorError:
            return _Outcome(status="failed", problem="cannot connect", retry=True)
        except aiohttp.ClientError:
            return _Outcome(status="failed", problem="connection dropped", retry=True)
        if response.status != 200:
            # A 4xx is our own fault and would be answered the same way again; but whether there is such a model, and who may
            # ask it, is the server's.
            return _Outcome(
                status="failed",
                problem=f"HTTP {response.status}",
                retry=response.status >= 500,
                elsewhere=response.status in (401, 403, 404),
                said=chat.said(content)[:SAID_LONGEST],
            )
        return self._completed(content)

    def _completed(self, content: bytes) -> _Outcome:
        try:
            got = chat.received(content)
        except ValueError:
            said = chat.said(content)[:SAID_LONGEST]
            return _Outcome(status="failed", problem="not a chat completion", elsewhere=True, said=said)
        self._counts["prompt_tokens"] += got.prompt_tokens
        if got.cached_tokens is not None:
            self._counts["cached_tokens"] += got.cached_tokens
        return _Outcome(status="ok", completion=got.completion, tokens=got.tokens)

    def _read(self, question: _Question, outcome: _Outcome) -> Verdict:
        if outcome.completion is None:
            return Verdict(
                members=question.members, status=outcome.status, problem=outcome.problem, rationale=outcome.said
            )
        reply = self._family(question).read(outcome.completion)
        return Verdict(
            members=question.members,
            status=reply.status,
            winner=reply.winner,
            dimensions=dict(reply.dimensions),
            scores=dict(reply.scores),
            rationale=outcome.completion.text,
            problem=reply.problem,
            tokens=outcome.tokens,
        )


async def _done(media: np.ndarray) -> np.ndarray:
    return media


def request_seed(seed: int, step: int, prompt_id: str, members: tuple[int, ...]) -> int:
    """A 31-bit sampling seed of its own for each question, the same in every run."""
    digest = hashlib.blake2b(f"{seed} {step} {prompt_id} {members}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def encode_media(media: np.ndarray, frames: int) -> list[str]:
    """Data URLs (PNG) of ``frames`` uniformly spaced frames of uint8 [F, H, W, 3], or of all if there are fewer."""
    from PIL import Image

    chosen = chat.frame_indices(len(media), frames)
    return [chat.data_url(Image.fromarray(np.ascontiguousarray(media[i]))) for i in chosen]
