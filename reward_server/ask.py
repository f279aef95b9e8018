"""`python -m reward_server judge A B --prompt "…"`: one comparison by a running judge, as a table."""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from reward_server import machine
from reward_server.families.base import FIRST, TIE, ChatFamily, Reply, json_object, side
from reward_server.families.chat import base_url, data_url, frame_indices, model_names, received, said
from reward_server.families.edit import EditPair, EditPoint
from reward_server.families.flex import Flex
from reward_server.families.generic import GenericPair, GenericPoint
from reward_server.families.reward_dance import RewardDance
from reward_server.families.think import Think
from reward_server.families.unified import Unified1Pair, Unified1Point, Unified2Pair, Unified2Point
from reward_server.families.vision_reward import VisionReward

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console
    from rich.table import Table

KEY_NAME = "GRPO_FLEX_JUDGE_KEY"
VIDEO_ENDINGS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")
FAMILIES: Mapping[str, type[ChatFamily]] = {
    "flex": Flex,
    "think": Think,
    "2.0": Unified2Pair,
    "2.0-point": Unified2Point,
    "1.0": Unified1Pair,
    "1.0-point": Unified1Point,
    "edit": EditPair,
    "edit-point": EditPoint,
    "vision-reward": VisionReward,
    "reward-dance": RewardDance,
    "generic": GenericPair,
    "generic-point": GenericPoint,
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the command is asked to do."""

    a: str
    b: str
    prompt: str
    family: str = "flex"
    endpoint: str = "http://127.0.0.1:8000/v1"
    model: str = ""
    """Served name; empty: the first that the server lists."""
    prompt_file: str = ""
    """Another wording of the instruction (``ChatFamily.prompt_file``)."""
    source: str = ""
    """The picture that was edited, for the families that show one."""
    both_orders: bool = False
    max_tokens: int = 2048
    timeout_s: float = 300.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One reply of the judge."""

    reply: Reply
    text: str
    tokens: int
    seconds: float
    prompt_tokens: int = 0
    finish_reason: str = "stop"
    first_token: tuple[tuple[str, float], ...] = ()
    """Likeliest first tokens with their log-probabilities, where the family asked for them."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; ``winner`` is a position of the candidates as they were shown."""

    name: str
    scores: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """A remark about each candidate, or a single one about both."""
    winner: float | None = None
    heading: bool = False


def compare(asked: Comparison, console: Console) -> int:
    """Asks and prints; 0, or 1 if a reply does not say who wins.

    Raises:
        ValueError: a file that cannot be read, or a judge that does not answer; the message is for the user.
    """
    family = family_of(asked)
    shown = [data_urls(path, family.frames) for path in (asked.a, asked.b)]
    sources = _sources(asked, family)
    model = asked.model or served_model(asked.endpoint)
    console.print(f"{model} at {asked.endpoint}, {asked.family}: {asked.prompt}", style="dim")
    if family.candidates == 1:
        return _each(asked, family, model, sources, shown, console)
    orders = [(0, 1), (1, 0)] if asked.both_orders else [(0, 1)]
    winners = []
    for order in orders:
        answer = ask(asked, family, model, [*sources, *(shown[k] for k in order)])
        labels = [f"{'AB'[k]} {Path((asked.a, asked.b)[k]).name}" for k in order]
        if not _show(answer, family, labels, console):
            return 1
        won = answer.reply.winner
        winners.append(won if won is None or order == (0, 1) else 1 - won)
    if asked.both_orders:
        console.print(_agreement(winners))
    return 0


def _agreement(winners: Sequence[float | None]) -> str:
    names = ["nobody" if w is None else "a tie" if w == TIE else "A" if w == FIRST else "B" for w in winners]
    if names[0] == names[1]:
        return f"Both orders agree: {names[0]}."
    return f"The orders disagree: {names[0]} with A first, {names[1]} with B first. The judge goes by position here."


def _each(
    asked: Comparison,
    family: ChatFamily,
    model: str,
    sources: list[list[str]],
    shown: Sequence[list[str]],
    console: Console,
) -> int:
    """Families that score one candidate: each is asked about alone."""
    for label, path, urls in zip("AB", (asked.a, asked.b), shown, strict=True):
        answer = ask(asked, family, model, [*sources, urls])
        if not _show(answer, family, [f"{label} {Path(path).name}"], console):
            return 1
    return 0


def family_of(asked: Comparison) -> ChatFamily:
    """The family, set for pictures or videos. Raises ValueError for a mixture or an unusable wording."""
    videos = [path.lower().endswith(VIDEO_ENDINGS) for path in (asked.a, asked.b)]
    if videos[0] != videos[1]:
        raise ValueError(
            f"{asked.a!r} and {asked.b!r}: one is a picture and one a video; the judge compares like with like"
        )
    family = replace(FAMILIES[asked.family](), medium="video" if videos[0] else "image", prompt_file=asked.prompt_file)
    for name, complaint in family.problems():
        raise ValueError(f"the family's {name} {complaint}")
    return family


def _sources(asked: Comparison, family: ChatFamily) -> list[list[str]]:
    if family.sources and not asked.source:
        raise ValueError(f"the family {asked.family} shows the picture that was edited: give it with --source")
    return [data_urls(asked.source, 1)] if family.sources else []


# ---------------------------------------------------------------- media


def data_urls(path: str, frames: int) -> list[str]:
    """A picture as one data URL (PNG), a video as those of its sampled frames. Raises ValueError if unreadable."""
    if not Path(path).is_file():
        raise ValueError(f"the file {path!r} is not there")
    pictures = read_video(path, frames) if path.lower().endswith(VIDEO_ENDINGS) else [open_picture(path)]
    return [data_url(picture) for picture in pictures]


def open_picture(path: str) -> Image.Image:
    """An RGB picture. Raises ValueError if unreadable."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise ValueError(f"the picture {path!r} cannot be read: {error}") from error


def read_video(path: str, frames: int) -> list[Image.Image]:
    """``frames`` uniformly spaced frames, first and last included, as training samples them.

    Raises:
        ValueError: unreadable, or cut short: half a clip is another clip.
    """
    import imageio.v3 as iio
    import numpy as np
    from PIL import Image

    try:
        clip = [Image.fromarray(np.ascontiguousarray(frame)).convert("RGB") for frame in iio.imiter(path)]
    except (OSError, ValueError, RuntimeError) as error:  # imageio's plugins raise any of these
        raise ValueError(f"the video {path!r} cannot be read: {_why(error)}") from error
    if not clip:
        raise ValueError(f"the video {path!r} has no frames")
    said = iio.immeta(path)
    promised = said.get("fps", 0) * said.get("duration", 0)  # 0 for a GIF, which states no rate
    if len(clip) + 2 < 0.9 * promised:
        raise ValueError(
            f"the video {path!r} was cut short: it holds {len(clip)} of about {promised:.0f} frames; copy it again"
        )
    return [clip[k] for k in frame_indices(len(clip), frames)]


def _why(error: Exception) -> str:
    """ffmpeg's last line without its banner, and what it means where an mp4's end is missing."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return f"{line} (it was cut short: its end, with the index, is missing)" if "moov atom" in str(error) else line


# ---------------------------------------------------------------- asking


def served_model(endpoint: str) -> str:
    """The first model that the server lists. Raises ValueError where nobody answers."""
    url, key = _base(endpoint) + "/models", _key()
    try:
        return model_names(json.loads(machine.get(url, key)))[0]
    except urllib.error.HTTPError as error:
        raise ValueError(_refused(endpoint, error)) from error
    except OSError as error:
        raise ValueError(_unreachable(endpoint, error)) from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{endpoint} answers, but not as a judge's server does: no list of models") from error


def request_body(
    family: ChatFamily,
    model: str,
    prompt: str,
    media: Sequence[Sequence[str]],
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """The chat request. ``media`` holds, for each source and candidate as shown, its frames as data URLs."""
    body = {"model": model, "messages": family.request(prompt, media)}
    return body | {"temperature": temperature, "seed": seed, "max_tokens": max_tokens} | family.options()


def request_headers() -> dict[str, str]:
    """With the key from the environment, if there is one."""
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {_key()}"} if _key() else {})


def chat_url(endpoint: str) -> str:
    """Where chat requests go. Raises ValueError for an endpoint that is no address."""
    return _base(endpoint) + "/chat/completions"


def ask(asked: Comparison, family: ChatFamily, model: str, media: Sequence[Sequence[str]]) -> Answer:
    """One request. Raises ValueError for a judge that cannot be reached, refuses, or answers nonsense."""
    data = json.dumps(request_body(family, model, asked.prompt, media, asked.max_tokens)).encode()
    request = urllib.request.Request(chat_url(asked.endpoint), data=data, headers=request_headers())
    start = time.monotonic()
    try:
        content = machine.fetch(request, asked.timeout_s)
    except urllib.error.HTTPError as error:
        raise ValueError(_refused(asked.endpoint, error)) from error
    except OSError as error:
        raise ValueError(_unreachable(asked.endpoint, error)) from error
    return read_answer(content, family, asked.endpoint, time.monotonic() - start)


def read_answer(content: bytes, family: ChatFamily, endpoint: str, seconds: float) -> Answer:
    """The answer in a server's response. Raises ValueError where that is no chat completion."""
    try:
        got = received(content)
    except ValueError as error:
        raise ValueError(f"{endpoint} answers, but not with a chat completion: {content[:200]!r}") from error
    return Answer(
        reply=family.read(got.completion),
        text=got.completion.text,
        tokens=got.tokens,
        seconds=seconds,
        prompt_tokens=got.prompt_tokens,
        finish_reason=got.completion.finish_reason,
        first_token=got.completion.first_token,
    )


def _base(endpoint: str) -> str:
    """ "http://host:8000" and "http://host:8000/v1/" mean the same. Raises ValueError for what is no address."""
    if not _is_address(endpoint):
        raise ValueError(f"the endpoint {endpoint!r} is no address: --endpoint needs one such as http://HOST:PORT/v1")
    return base_url(endpoint)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        return bool(host and parts.scheme in ("http", "https") and parts.port != 0 and re.fullmatch("[!-~]+", url))
    except ValueError:  # a port that is no number or too large, half of an IPv6 address, a host such as a..b
        return False


def _key() -> str:
    return machine.api_key(KEY_NAME)


def _unreachable(endpoint: str, error: OSError) -> str:
    reason = getattr(error, "reason", error)
    return f"no judge answers at {endpoint} ({reason}): start one (make serve-judge), or name a running one with --endpoint"


def _refused(endpoint: str, error: urllib.error.HTTPError) -> str:
    try:
        content = error.read(2000)
    except (OSError, http.client.HTTPException):
        content = b""  # it broke off: the status is all there is to tell
    return refusal(endpoint, error.code, content)


def refusal(endpoint: str, status: int, content: bytes) -> str:
    """What a server said that refused, for the user."""
    hint = f"; is {KEY_NAME} set to the judge's key?" if status in (401, 403) else ""
    return f"the judge at {endpoint} refuses: HTTP {status} {said(content)}{hint}"


# ---------------------------------------------------------------- showing


def _show(answer: Answer, family: ChatFamily, labels: Sequence[str], console: Console) -> bool:
    """Prints a reply; False for one that does not say who wins, which is printed as it came."""
    if answer.reply.status != "ok":
        console.print(f"The reply says nothing that counts ({answer.reply.problem}). It was:", style="bold red")
        console.print(answer.text or "(empty)", markup=False, highlight=False, soft_wrap=True)
        return False
    console.print(table(answer, family, labels))
    if answer.reply.problem:
        console.print(f"left out: {answer.reply.problem}", style="yellow")
    return True


def table(answer: Answer, family: ChatFamily, labels: Sequence[str]) -> Table:
    """Dimensions, scores, reasons and winners of one reply."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=f"{answer.seconds:.1f} s, {answer.tokens} tokens", title_justify="left", show_lines=False)
    made.add_column("")
    for label in labels:
        made.add_column(Text(label), justify="right")
    made.add_column("winner" if len(labels) == 2 else "")
    made.add_column("why", ratio=1, overflow="fold")
    for row in rows(answer, family):
        scores = [*row.scores, *[""] * len(labels)][: len(labels)]
        named = [
            f"{label[0]}: {note}" if len(row.notes) > 1 else note
            for label, note in zip(labels, row.notes, strict=False)
        ]
        cells = [row.name, *scores, _name(row.winner, labels), "\n".join(named)]
        made.add_row(*[Text(cell) for cell in cells], style="bold" if row.heading else None)
    return made


def _name(winner: float | None, labels: Sequence[str]) -> str:
    if winner is None or len(labels) < 2:
        return ""
    return "tie" if winner == TIE else labels[0 if winner == FIRST else 1][0]


def rows(answer: Answer, family: ChatFamily) -> Iterator[Row]:
    """What to show of a reply: for Flex its own dimensions, for others what the parser found; then the whole."""
    reply = answer.reply
    if isinstance(family, Flex):
        yield from _flex_rows(answer.text)
        return
    for name in dict.fromkeys([*reply.scores, *reply.dimensions]):
        scores = tuple(f"{v:.3g}" for v in reply.scores.get(name, ()))
        yield Row(name=name, scores=scores, winner=reply.dimensions.get(name))
    yield Row(name="overall", winner=reply.winner, notes=(_prose(answer.text),), heading=True)


def _prose(text: str, longest: int = 1200) -> str:
    """The reason in a JSON reply, or the reply itself; no more of it than fits on a screen."""
    found = json_object(text)[0] or {}
    said = _words(found.get("reason") or found.get("reasoning")) or text.strip()
    return said[:longest] + (" …" if len(said) > longest else "")


def _flex_rows(text: str) -> Iterator[Row]:
    """Every category with its dimensions, as the judge wrote them; tolerant, because the parser is."""
    found = json_object(text)[0] or {}
    categories = found.get("categories")
    for category in categories if isinstance(categories, list) else []:
        if not isinstance(category, dict):
            continue
        note = _words(category.get("cat_reason"))
        yield Row(
            name=_words(category.get("name")), notes=(note,), winner=side(category.get("cat_winner")), heading=True
        )
        dims = category.get("dims")
        for dim in dims if isinstance(dims, list) else []:
            if isinstance(dim, dict):
                yield Row(
                    name="  " + _words(dim.get("name")),
                    scores=(_words(dim.get("score_1")), _words(dim.get("score_2"))),
                    notes=(_words(dim.get("reason_1")), _words(dim.get("reason_2"))),
                )
    yield Row(name="overall", winner=side(found.get("winner")), notes=(_words(found.get("reason")),), heading=True)


def _words(value: object) -> str:
    return "" if value is None else str(value)
