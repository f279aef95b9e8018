"""A chat server in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from aiohttp import web

Body = Mapping[str, Any]


@contextmanager
def serving(app: web.Application) -> Iterator[str]:
    """Serves an application on a free port and gives its endpoint."""
    loop = asyncio.new_event_loop()
    ended = asyncio.Event()
    begun: list[str] = []
    ready = threading.Event()

    async def serve() -> None:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        begun.append(f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
        ready.set()
        await ended.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield begun[0]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(30)
        loop.close()


def chat_app(answer: Callable[[Body], Mapping[str, Any] | int]) -> web.Application:
    """An application whose chat completions are what ``answer`` says: fields of a choice, or an HTTP status."""

    async def chat(request: web.Request) -> web.Response:
        said = answer(await request.json())
        if isinstance(said, int):
            return web.json_response({"error": {"message": "no"}}, status=said)
        choice = {"index": 0, "finish_reason": "stop", **said}
        return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 5}})

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "stand-in"}]})

    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/v1/models", models)
    return app


def said(text: str) -> dict[str, Any]:
    """A choice with this text."""
    return {"message": {"role": "assistant", "content": text}}
