"""A judge that knows the truth: an HTTP server with OpenAI's chat API whose verdicts come from the oracle.

It sees what any judge sees, the prompt's text and the pictures (of a clip: its sampled frames), and replies in the Flex
format (two candidates) or with 1-5 scores (one candidate). Noise, position bias, latency and failures can be set, which
makes it the perfect and the broken judge of tests and ablations.

`python -m testbed.oracle_judge --port 0` serves on a free loopback port and prints its endpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.oracle_replies import Judging

if TYPE_CHECKING:
    from aiohttp import web

MODEL = "UnifiedReward"
START_S = 60.0


@dataclass(frozen=True, kw_only=True)
class OracleJudge:
    """Settings of the oracle judge; ``start`` runs it as a process of its own."""

    noise: float = 0.0
    """Probability that a reply's winners are coin tosses."""
    position_bias: float = 0.0
    """Probability that a reply favours the first candidate, whatever it shows."""
    latency_s: float = 0.0
    failure_rate: float = 0.0
    """Probability of an HTTP 500."""
    hang_rate: float = 0.0
    """Probability that a request is never answered."""
    drop_rate: float = 0.0
    """Probability that the connection is closed without an answer."""
    garbage_rate: float = 0.0
    """Probability of a reply that is no verdict."""
    style: str = "flex"
    """ "trace": two pictures or clips are answered with a tiny judge's trace (`testbed.judge_trace`, `video_judge_trace`),
    as by its teacher; a pair without a better one is refused. Of two such traces it says which is nearer to its own
    (`reward_server.families.reasoning`)."""
    seed: int = 0
    port: int = 0
    """0: any free port."""

    def problems(self) -> Iterator[tuple[str, str]]:
        for name in ("noise", "position_bias", "failure_rate", "hang_rate", "drop_rate", "garbage_rate"):
            if not 0 <= getattr(self, name) <= 1:
                yield name, f"is {getattr(self, name)}; it is a probability, between 0 and 1"
        if self.style not in ("flex", "trace"):
            yield "style", f"is {self.style!r}; it needs to be flex or trace"
        if not 0 <= self.port <= 65535:
            yield "port", f"is {self.port}; it needs to be 0 (any free one) … 65535"
        if self.latency_s < 0:
            yield "latency_s", f"is {self.latency_s}; it cannot be negative"

    def start(self, log_dir: str | Path) -> RunningJudge:
        """Starts the server and waits until it answers; its output goes to ``log_dir/oracle_judge.log``.

        Raises ValueError, with the log's end, if it does not come up within a minute.
        """
        log = Path(log_dir) / "oracle_judge.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        options = [f"--{f.name.replace('_', '-')}={getattr(self, f.name)}" for f in fields(self)]
        command = [sys.executable, "-m", "testbed.oracle_judge", *options, f"--parent={os.getpid()}"]
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=file,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C at the terminal is the run's, which still needs its judge
                env={**os.environ, "PYTHONPATH": path},
            )
        return RunningJudge(process, _endpoint(process, log))


class RunningJudge:
    """A started oracle judge: ``endpoints``, ``pid``, ``alive()`` and ``stop()``; also a context manager."""

    def __init__(self, process: subprocess.Popen[bytes], endpoint: str) -> None:
        self._process = process
        self.endpoints: tuple[str, ...] = (endpoint,)
        self.pid = process.pid

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends the process; harmless when it has ended."""
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> RunningJudge:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _endpoint(process: subprocess.Popen[bytes], log: Path) -> str:
    """The endpoint that a starting server prints, once it is healthy."""
    assert process.stdout is not None
    endpoint = process.stdout.readline().decode().strip()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + START_S
    while endpoint and process.poll() is None and time.monotonic() < end:
        try:
            with opener.open(endpoint + "/models", timeout=5):
                return endpoint
        except urllib.error.URLError:
            time.sleep(0.05)
    process.kill()
    process.wait()
    raise ValueError(f"the oracle judge did not start; the end of {log}:\n{log.read_text()[-2000:]}")


# ---------------------------------------------------------------- server


def application(settings: OracleJudge) -> web.Application:
    """The HTTP application: /v1/models, /v1/chat/completions, /health."""
    from aiohttp import web

    judging = Judging(settings)
    chance = random.Random(f"failures {settings.seed}")

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def chat(request: web.Request) -> web.Response:
        failure = await _fail(request, settings, chance)
        if failure is not None:
            return failure
        try:
            body = json.loads(await request.read())
            garbage = chance.random() < settings.garbage_rate
            text = "I like both. Image 1/2!" if garbage else judging.reply(body)
        except ValueError as error:
            return web.json_response({"error": {"message": str(error), "type": "BadRequestError"}}, status=400)
        return web.json_response(completion(text, body.get("model", MODEL)))

    app = web.Application(client_max_size=256 * 2**20)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/health", models)
    app.router.add_post("/v1/chat/completions", chat)
    return app


async def _fail(request: web.Request, settings: OracleJudge, chance: random.Random) -> web.Response | None:
    from aiohttp import web

    if settings.latency_s:
        await asyncio.sleep(settings.latency_s)
    if chance.random() < settings.failure_rate:
        return web.json_response({"error": {"message": "simulated failure"}}, status=500)
    if chance.random() < settings.drop_rate and request.transport is not None:
        request.transport.abort()
    if chance.random() < settings.hang_rate:
        await asyncio.sleep(3600)
    return None


def completion(text: str, model: str) -> dict[str, Any]:
    """A chat completion with rough token counts (four characters each)."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "oracle",
        "object": "chat.completion",
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 0, "completion_tokens": max(1, len(text) // 4)},
    }


async def serve(settings: OracleJudge, parent: int | None) -> None:
    """Serves until cancelled, or until the process ``parent`` is no longer this one's parent."""
    from aiohttp import web

    runner = web.AppRunner(application(settings), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", settings.port)
    await site.start()
    host, port = runner.addresses[0][:2]
    print(f"http://{host}:{port}/v1", flush=True)
    while parent is None or os.getppid() == parent:
        await asyncio.sleep(0.5)
    await runner.cleanup()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m testbed.oracle_judge", description=__doc__)
    defaults = asdict(OracleJudge())
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--parent", type=int, default=None, help=argparse.SUPPRESS)
    options = vars(parser.parse_args(arguments))
    parent = options.pop("parent")
    settings = OracleJudge(**options)
    for name, complaint in settings.problems():
        parser.error(f"--{name.replace('_', '-')} {complaint}")
    try:
        asyncio.run(serve(settings, parent))
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
