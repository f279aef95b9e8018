"""Several judge servers as one: load, failover, and a circuit breaker with a health probe for each.

An endpoint whose last ``breaker_failures`` requests all failed is *open*: nothing is sent to it, while a probe
asks ``GET /v1/models`` every ``probe_s`` seconds; the first answer that lists the judge closes it again.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reward_server.families.chat import base_url, model_names

if TYPE_CHECKING:
    import aiohttp


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointState:
    """What is known of one server at a moment, for ``status``.

    >>> str(EndpointState(url="http://127.0.0.1:8000/v1", healthy=True, in_flight=3, failures=0))
    'healthy, 3 in flight'
    """

    url: str
    healthy: bool
    in_flight: int
    failures: int
    """Failed requests since the last good one."""

    def __str__(self) -> str:
        how = "healthy" if self.healthy else "open: nothing is sent to it until it answers a probe"
        failed = f", {self.failures} failures in a row" if self.failures else ""
        return f"{how}, {self.in_flight} in flight{failed}"


class Endpoint:
    """One server: what is under way there and whether it may be asked."""

    def __init__(self, url: str) -> None:
        self.url = base_url(url)
        self.in_flight = 0
        self.failures = 0
        """Failed requests since the last good one."""
        self.open = False

    def state(self) -> EndpointState:
        return EndpointState(url=self.url, healthy=not self.open, in_flight=self.in_flight, failures=self.failures)


class EndpointPool:
    """Chooses an endpoint for each request; lives in one event loop."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        urls: Sequence[str],
        model: str,
        *,
        breaker_failures: int,
        probe_s: float,
        patience_s: float,
        slack: int,
    ) -> None:
        self.endpoints = [Endpoint(url) for url in urls]
        self.openings = 0
        """How often a breaker has opened."""
        self._session, self._model = session, model
        self._breaker_failures, self._probe_s, self._patience_s = breaker_failures, probe_s, patience_s
        self._slack = slack
        self._closed = asyncio.Event()
        self._closed.set()
        self._down_since = 0.0
        self._probes: set[asyncio.Task[None]] = set()

    @property
    def healthy(self) -> bool:
        """Whether any endpoint may be asked."""
        return any(not e.open for e in self.endpoints)

    def others(self, endpoint: Endpoint | None) -> bool:
        """Whether another endpoint may be asked."""
        return any(not e.open for e in self.endpoints if e is not endpoint)

    async def choose(self, affinity: str, avoid: Endpoint | None, deadline: float) -> Endpoint | None:
        """An endpoint that may be asked, or None when there is none in time.

        Args:
            affinity: Requests with the same pictures carry the same text and prefer the same server, whose
                prefix and picture caches then serve them, as long as it is not much busier than others.
            avoid: Where the last try failed; taken only if there is no other.
            deadline: ``time.monotonic()`` until which to wait. Once every endpoint has been open for
                ``patience_s``, nobody waits any more.
        """
        while not self.healthy:
            end = min(deadline, self._down_since + self._patience_s)
            if time.monotonic() >= end:
                return None
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    await self._closed.wait()
            except TimeoutError:
                return None
        usable = [e for e in self.endpoints if not e.open]
        usable = [e for e in usable if e is not avoid] or usable
        least = min(e.in_flight for e in usable)
        near = [e for e in usable if e.in_flight <= least + self._slack]
        return max(near, key=lambda e: hashlib.blake2b(f"{e.url} {affinity}".encode(), digest_size=8).digest())

    def report(self, endpoint: Endpoint, alive: bool) -> None:
        """Books the outcome of a request: whether the server showed itself alive."""
        if alive:
            endpoint.failures = 0
            return
        endpoint.failures += 1
        if endpoint.failures >= self._breaker_failures and not endpoint.open:
            self._open(endpoint)

    def _open(self, endpoint: Endpoint) -> None:
        endpoint.open = True
        self.openings += 1
        if not self.healthy:
            self._down_since = time.monotonic()
            self._closed.clear()
        probe = asyncio.get_running_loop().create_task(self._probe(endpoint))
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)

    async def _probe(self, endpoint: Endpoint) -> None:
        while endpoint.open and not await is_alive(self._session, endpoint.url, self._model, self._probe_s):
            await asyncio.sleep(self._probe_s)
        self.revive(endpoint)

    def revive(self, endpoint: Endpoint) -> None:
        """Asks an open endpoint again: it has answered a health probe."""
        if not endpoint.open:
            return
        endpoint.open = False
        # On probation: one more failure opens it again.
        endpoint.failures = self._breaker_failures - 1
        self._closed.set()

    async def close(self) -> None:
        """Ends the probes."""
        for probe in list(self._probes):
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)


async def is_alive(session: aiohttp.ClientSession, url: str, model: str, timeout_s: float) -> bool:
    """Whether ``GET url/models`` answers within ``timeout_s`` (at least a second) and lists the model."""
    import aiohttp

    try:
        async with asyncio.timeout(max(1.0, timeout_s)), session.get(url + "/models") as response:
            return response.status == 200 and model in model_names(json.loads(await response.read()))
    except (TimeoutError, aiohttp.ClientError, ValueError, RecursionError):
        return False


_CACHES = ("prefix_cache", "mm_cache")


async def cache_counters(session: aiohttp.ClientSession, url: str, timeout_s: float = 2.0) -> dict[str, float]:
    """vLLM's own counts of its prefix cache (tokens) and picture cache (pictures): "…_queries", "…_hits".

    Read from ``/metrics`` beside the API, summed over engines; empty for a server that shows none.
    """
    import aiohttp

    try:
        async with asyncio.timeout(timeout_s), session.get(url.removesuffix("/v1") + "/metrics") as response:
            text = await response.text() if response.status == 200 else ""
    except (TimeoutError, aiohttp.ClientError, UnicodeDecodeError):
        return {}
    found: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0].removeprefix("vllm:").removesuffix("_total")
        if name in {f"{cache}_{kind}" for cache in _CACHES for kind in ("queries", "hits")}:
            with suppress(ValueError):  # a line that is cut off, or another program's
                found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    return {name: value for name, value in found.items() if math.isfinite(value)}


def growth(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What was counted between two readings of one server; all of ``after`` where it began anew in between."""
    if any(value < before.get(name, 0.0) for name, value in after.items()):
        before = {}
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def hit_rates(grown: Mapping[str, float]) -> dict[str, float]:
    """ "prefix_cache_hit_rate" and "mm_cache_hit_rate" of what was counted, where there were queries."""
    asked = [cache for cache in _CACHES if grown.get(f"{cache}_queries", 0.0) > 0]
    return {f"{cache}_hit_rate": grown.get(f"{cache}_hits", 0.0) / grown[f"{cache}_queries"] for cache in asked}


# ---------------------------------------------------------------- at the start of a run


class JudgeUnreachable(ValueError):
    """No judge can be asked. The message names the URLs, what was tried and the way out."""


def check_endpoints(
    urls: Sequence[str], model: str, headers: Mapping[str, str] | None = None, timeout_s: float = 5.0
) -> list[str]:
    """Asks each endpoint once for its models, before anything expensive starts; blocking, ``timeout_s`` at most.

    Returns:
        A complaint for each endpoint that cannot be used while another one can.

    Raises:
        JudgeUnreachable: none can be used.
    """
    with ThreadPoolExecutor(max(1, len(urls))) as together:
        said = list(together.map(lambda url: _complaint(url, model, headers, timeout_s), urls))
    complaints = [f"{base_url(url)}: {complaint}" for url, complaint in zip(urls, said, strict=True) if complaint]
    if len(complaints) < len(urls):
        return complaints
    tried = "\n".join(f"  {c}" for c in complaints) or "  no endpoint is configured"
    raise JudgeUnreachable(
        f"the judge cannot be reached. Asked GET …/models with a {timeout_s:g} s limit:\n{tried}\n"
        "Start a judge, or name a running one with judge.server=none judge.endpoints=http://HOST:PORT/v1 "
        f"and the model it serves with judge.model=NAME (now {model!r})."
    )


def _complaint(url: str, model: str, headers: Mapping[str, str] | None, timeout_s: float) -> str:
    # Judges are named by address; a proxy for the outer world would only hide them.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(base_url(url) + "/models", headers=dict(headers or {}))
        with opener.open(request, timeout=timeout_s) as response:
            listed = json.load(response)
    except urllib.error.HTTPError as error:
        hint = "; is the API key right?" if error.code in (401, 403) else ""
        return f"HTTP {error.code} {error.reason}{hint}"
    except (urllib.error.URLError, OSError) as error:
        return str(getattr(error, "reason", error))
    except http.client.InvalidURL as error:
        return str(error)
    except (ValueError, RecursionError, http.client.HTTPException):
        return "answers, but not as an OpenAI-compatible server does"
    names = model_names(listed)
    return "" if model in names else f"serves {', '.join(names) or 'no model'}, not {model!r}"
