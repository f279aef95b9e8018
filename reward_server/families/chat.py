"""OpenAI's chat API as far as clients of a judge need it: addresses, pictures in requests, and what replies hold."""

from __future__ import annotations

import base64
import io
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from reward_server.families.base import Completion

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A chat completion, and what the server counted for it."""

    completion: Completion
    tokens: int
    prompt_tokens: int
    cached_tokens: int | None
    """Of the prompt's, those that its prefix cache served; None where the server does not say."""


def base_url(url: str) -> str:
    """The API's root: "http://host:8000" becomes "http://host:8000/v1"."""
    url = url.rstrip("/")
    return url if url.partition("://")[2].count("/") else url + "/v1"


def model_names(listed: object) -> list[str]:
    """The names in a parsed reply to ``GET /models``; none where it is no such reply."""
    entries = listed.get("data") if isinstance(listed, dict) else None
    entries = entries if isinstance(entries, list) else []
    return [str(m["id"]) for m in entries if isinstance(m, dict) and "id" in m]


def encoded(body: Callable[[list[list[str]]], Mapping[str, Any]], media: Sequence[Sequence[str]]) -> bytes:
    """A request's JSON. Pictures are megabytes that need no escaping, so they are set into the text of the rest.

    Args:
        body: Makes the request of what stands for each source's and candidate's frames.
        media: Data URLs of those frames.
    """
    urls = [url for shown in media for url in shown]
    numbers = count()
    text = json.dumps(body([[f"{_MARK}{next(numbers)};" for _ in shown] for shown in media]))
    pieces = re.split(rf"{_MARK}(\d+);", text)
    return "".join(urls[int(piece)] if k % 2 else piece for k, piece in enumerate(pieces)).encode()


_MARK = uuid.uuid4().hex  # which no prompt holds


def received(content: bytes) -> Received:
    """Reads a server's response. Raises ValueError where that is no chat completion."""
    try:
        reply = json.loads(content)
        choice = reply["choices"][0]
        text, finish_reason = choice["message"].get("content") or "", choice.get("finish_reason") or ""
        if not (isinstance(text, str) and isinstance(finish_reason, str)):
            raise TypeError("the reply is no text")
        likeliest = ((choice.get("logprobs") or {}).get("content") or [{"top_logprobs": []}])[0]["top_logprobs"]
        first_token = tuple((str(t["token"]), float(t["logprob"])) for t in likeliest)
        usage = reply.get("usage") or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Received(
            completion=Completion(text=text, finish_reason=finish_reason, first_token=first_token),
            tokens=int(usage.get("completion_tokens") or 0),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            cached_tokens=None if cached is None else int(cached),
        )
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError("no chat completion") from error


def said(content: bytes) -> str:
    """What a server that refused said: the message in OpenAI's form of an error, or else whatever was sent."""
    text = content.decode(errors="replace")
    with suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
        parsed = json.loads(text)
        text = str((parsed.get("error") or parsed)["message"])
    return text


def frame_indices(available: int, wanted: int) -> list[int]:
    """Uniformly spaced frame numbers, first and last included, or all if there are fewer.

    >>> frame_indices(33, 8), frame_indices(5, 1), frame_indices(3, 8)
    ([0, 5, 9, 14, 18, 23, 27, 32], [2], [0, 1, 2])
    """
    if wanted == 1:
        return [available // 2]
    count = min(wanted, available)
    return sorted({round(k * (available - 1) / max(1, count - 1)) for k in range(count)})


def data_url(image: Image.Image) -> str:
    """The picture as PNG, in the form in which chat requests carry it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # speed: the judge is near, and noise does not compress
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
