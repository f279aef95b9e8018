"""Many questions to one chat endpoint at once: bounded, and patient with a server's bad moments."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from reward_server.ask import Answer, chat_url, read_answer, refusal, request_body, request_headers, served_model
from reward_server.families.base import ChatFamily
from reward_server.preferences import Preference, picture_urls

Item = TypeVar("Item")
Result = TypeVar("Result")
NOT_OURS = (401, 403, 404)
"""HTTP statuses that every further question would meet as well."""
MOMENTARY = (408, 409, 425, 429)
"""HTTP statuses after which the same question is worth another try, beside all from 500."""
LONGEST_WAIT_S = 30.0
FEWEST_LOST = 8
"""Questions in a row, at least, whose loss tells of an endpoint that is away."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A judge or teacher behind an OpenAI-compatible chat API, and how it is asked.

    The key, if it wants one, comes from the environment (``GRPO_FLEX_JUDGE_KEY``).
    """

    url: str = "http://127.0.0.1:8000/v1"
    model: str = ""
    """Served name; empty: the first that the server lists."""
    concurrency: int = 16
    """Questions in flight."""
    max_tokens: int = 2048
    temperature: float = 0.0
    timeout_s: float = 300.0
    """Of one try."""
    tries: int = 8
    """How often a question is sent while the server fails; the waits between double from half a second."""
    body: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the request in place of ours; null leaves a field out (e.g. ``response_format``)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        for name in ("concurrency", "max_tokens", "tries"):
            if getattr(self, name) < 1:
                yield name, f"is {getattr(self, name)}; it needs to be at least 1"
        if self.temperature < 0:
            yield "temperature", f"is {self.temperature}; it cannot be negative"
        if not self.timeout_s > 0:
            yield "timeout_s", f"is {self.timeout_s}; it needs to be above 0"


class Unanswered(Exception):
    """The server gave no completion for a question; the message says why."""

    def __init__(self, reason: str, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused
        """The server took the question and will not answer it, now or later."""


class Asker:
    """A connection to an endpoint; an async context manager.

    Raises:
        ValueError: the endpoint is no address; without a model's name also where no judge answers.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._url = chat_url(endpoint.url)
        self.model = endpoint.model or served_model(endpoint.url)
        self.answered = 0
        self._lost = 0  # questions without an answer since the last one that had one
        self._chance = random.Random(0)

    async def __aenter__(self) -> Asker:
        import aiohttp

        connector = aiohttp.TCPConnector(limit=self.endpoint.concurrency)
        timeout = aiohttp.ClientTimeout(total=self.endpoint.timeout_s)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=request_headers())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def ask(self, family: ChatFamily, prompt: str, media: Sequence[Sequence[str]], seed: int = 0) -> Answer:
        """One question, tried again while the server fails. ``media``: data URLs, as ``request_body`` takes them.

        Raises:
            Unanswered: no completion after all tries, or the server refuses this question.
            ValueError: it would refuse every question, or has long answered none.
        """
        end = self.endpoint
        body = request_body(family, self.model, prompt, media, end.max_tokens, end.temperature, seed) | dict(end.body)
        data = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        try:
            answer = await self._patiently(family, data)
        except Unanswered as error:
            if error.refused and self.answered:
                raise  # says something about this question, not about the endpoint
            self._lost += 1
            if self._lost >= max(FEWEST_LOST, end.concurrency):
                raise ValueError(
                    f"{self._lost} questions in a row had no answer; the last: {error}. What is done is kept: see to "
                    "the server and start the same command again"
                ) from error
            raise
        self._lost, self.answered = 0, self.answered + 1
        return answer

    async def _patiently(self, family: ChatFamily, data: bytes) -> Answer:
        for attempt in range(self.endpoint.tries):
            try:
                return await self._once(family, data)
            except Unanswered as error:
                if error.refused or attempt + 1 == self.endpoint.tries:
                    raise
            wait = min(0.5 * 2**attempt, LONGEST_WAIT_S)
            await asyncio.sleep(wait * self._chance.uniform(0.5, 1.0))  # apart, not all at once
        raise AssertionError("unreachable")

    async def _once(self, family: ChatFamily, data: bytes) -> Answer:
        import aiohttp

        url, start = self.endpoint.url, time.monotonic()
        try:
            async with self._session.post(self._url, data=data) as response:
                status, content = response.status, await response.read()
        except TimeoutError as error:
            raise Unanswered(f"no answer in {self.endpoint.timeout_s:g} s") from error
        except aiohttp.ClientConnectorError as error:
            raise Unanswered(f"nobody answers at {url}") from error
        except aiohttp.ClientError as error:
            raise Unanswered(f"the connection broke: {type(error).__name__}") from error
        if status in NOT_OURS:
            raise ValueError(refusal(url, status, content[:2000]))
        if status != 200:
            momentary = status in MOMENTARY or status >= 500
            raise Unanswered(refusal(url, status, content[:2000]), refused=not momentary)
        try:
            return read_answer(content, family, url, time.monotonic() - start)
        except ValueError as error:
            raise Unanswered(str(error)) from error


async def shown_urls(family: ChatFamily, preference: Preference) -> tuple[list[list[str]], list[list[str]]]:
    """Data URLs of the sources that the family shows, and of both candidates as given.

    Raises:
        Unanswered: a file that cannot be read.
    """

    def encode() -> tuple[list[list[str]], list[list[str]]]:
        sources = [picture_urls([preference.source], 1)] if family.sources else []
        return sources, [picture_urls(paths, family.frames) for paths in preference.candidates]

    try:
        return await asyncio.to_thread(encode)
    except ValueError as error:
        raise Unanswered(str(error), refused=True) from error


def check(preferences: Sequence[Preference], families: Sequence[ChatFamily]) -> None:
    """Raises ValueError for what every question would meet: missing files or sources, an unusable family."""
    if not preferences:
        raise ValueError("there are no preferences to ask about")
    for family in families:
        for medium in {p.medium for p in preferences}:
            for name, complaint in replace(family, medium=medium).problems():
                raise ValueError(f"the family {family.name}'s {name} {complaint}")
        sourceless = [p.id for p in preferences if not p.source] if family.sources else []
        if sourceless:
            raise ValueError(
                f"the family {family.name} shows the edited picture, and {len(sourceless)} preferences have no source, "
                f"{sourceless[0]!r} first"
            )
    paths = [path for p in preferences for candidate in p.candidates for path in candidate]
    missing = [path for path in dict.fromkeys(paths) if not Path(path).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(paths)} files are missing, {missing[0]!r} first; --media names their folder"
        )


async def for_each(items: Iterable[Item], work: Callable[[Item], Awaitable[None]], workers: int) -> None:
    """Does the work on every item, ``workers`` at a time, in order of the start. The first error stops all."""
    remaining = iter(items)

    async def worker() -> None:
        for item in remaining:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(worker())
    except ExceptionGroup as several:
        raise several.exceptions[0] from None


def run_until_interrupted(work: Coroutine[Any, Any, Result]) -> Result:
    """``asyncio.run`` that a Ctrl-C ends also where a shell started us deaf to it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return asyncio.run(work)


class ProgressLine:
    """One line about how far a work is: rewritten on a terminal, else printed every half minute."""

    def __init__(self, total: int, describe: Callable[[], str]) -> None:
        self._total, self._describe = total, describe
        self._done, self._start, self._last = 0, time.monotonic(), time.monotonic()
        self._live = sys.stderr.isatty()

    def step(self) -> None:
        """One item more is done."""
        self._done += 1
        now = time.monotonic()
        if now - self._last >= (0.2 if self._live else 30.0):
            self._last = now
            print(self._text(now), end="\r" if self._live else "\n", file=sys.stderr, flush=True)

    def _text(self, now: float) -> str:
        left_s = (now - self._start) / self._done * (self._total - self._done)
        line = f"{self._done:,} of {self._total:,}, {left_s / 60:.0f} min left; {self._describe()}"
        return line.ljust(110) if self._live else line
