"""What every judge family supplies, and the few steps that all their parsers share.

A family turns candidates into one user message and a reply's text into a ``Reply``. Parsers are *total* (any
string gives a ``Reply``, never an exception), *pure* and linear in the length of the text, and they never
guess: an answer that is not plainly there is "unparsed", with the reason in ``problem``.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

FIRST, SECOND, TIE = 0.0, 1.0, 0.5
"""Positions of a winner: the first candidate shown, the second, or a declared tie."""

Medium = Literal["image", "video"]
PROMPTS = Path(__file__).parent / "prompts"
LONGEST_ANSWER = 400
"""Characters. A longer text in a winner's place is an essay, not an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a judge's reply says, without who said it or how long it took.

    ``winner`` and the values of ``dimensions`` are positions: 0.0 first, 1.0 second, 0.5 a declared tie.
    """

    status: Literal["ok", "unparsed"]
    winner: float | None = None
    """None when unparsed, and for families that score one candidate."""
    dimensions: Mapping[str, float] = field(default_factory=dict)
    """Anchor's canonical name -> winner's position. An anchor that was not plainly decided is absent."""
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Criterion -> one finite number per candidate, in the family's own unit."""
    problem: str = ""
    """Unparsed: the reason, in a few words. Ok: what was left out of the verdict as unusable, if anything."""


def unparsed(problem: str) -> Reply:
    """The reply that says nothing, and why."""
    return Reply(status="unparsed", problem=problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One chat completion as a family reads it."""

    text: str
    finish_reason: str = "stop"
    first_token: tuple[tuple[str, float], ...] = ()
    """Most likely first tokens with their log-probabilities (nats), where the family asked for them."""


@runtime_checkable
class Family(Protocol):
    """A judge's protocol. Implementations are frozen dataclasses, fit to stand in a configuration."""

    @property
    def candidates(self) -> int:
        """How many siblings one question shows: 1 (scoring) or 2 (comparing)."""
        ...

    @property
    def sources(self) -> int:
        """Pictures that every question shows before the candidates (the picture to be edited: 1, else 0)."""
        ...

    @property
    def medium(self) -> Medium: ...

    @property
    def frames(self) -> int:
        """Frames shown of each video, uniformly sampled; 1 for images."""
        ...

    def request(self, prompt_text: str, media: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """OpenAI chat messages: one user message, pictures first, then text.

        Args:
            prompt_text: What the generator was asked for.
            media: For each candidate (sources first) its frames as image URLs, usually data URLs.
        """
        ...

    def schema(self) -> dict[str, Any] | None:
        """JSON schema of the reply for structured output, or None where the reply is not JSON."""
        ...

    def options(self) -> dict[str, Any]:
        """Further fields of the request's body."""
        ...

    def read(self, completion: Completion) -> Reply:
        """What the completion says; total."""
        ...


@dataclass(frozen=True, kw_only=True)
class ChatFamily:
    """Common ground of the families: message layout, wording from a file, request options.

    A family names its wording files ``prompts/<name>_image.txt`` and ``prompts/<name>_video.txt``; the text
    ``{prompt}`` in them stands for the generator's prompt.
    """

    name: ClassVar[str]
    # Not annotated, so these are no fields: a family's own, not the user's to set.
    candidates = 2
    sources = 0
    open_ended = False
    """Whether a reply may still change after it looks complete, so that one that was cut off is no answer."""
    anchors: ClassVar[tuple[str, ...]] = ()
    """The dimensions that a verdict on two tells the winner of, beside the overall one; some families have it by medium or keys."""
    decisive: ClassVar[tuple[str, ...]] = ()
    """The scores that say how good a candidate is, where the others are parts of them; empty: all, equally."""

    medium: Medium = "image"
    prompt_file: str = ""
    """A file with another wording, e.g. the one that a released checkpoint was trained on; empty: our own."""
    thinking: bool | None = None
    """Sent as the chat template's ``enable_thinking``; None: not sent."""
    structured: bool = True
    """Whether the server is asked to hold the reply to the family's schema. A judge that was trained on the format needs
    no such help, and a small one on a CPU answers about twice as fast without."""

    @property
    def frames(self) -> int:
        if self.medium == "image":
            return 1
        return 8 if self.candidates == 2 else 16

    def wording(self) -> str:
        """The instruction with its ``{prompt}`` mark. Raises ValueError for an unusable file."""
        path = Path(self.prompt_file) if self.prompt_file else PROMPTS / f"{self.name}_{self.medium}.txt"
        return read_wording(path)

    def request(self, prompt_text: str, media: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        text = self.wording().replace("{prompt}", prompt_text)
        return [user_message(media, text)]

    def schema(self) -> dict[str, Any] | None:
        return None

    def options(self) -> dict[str, Any]:
        body: dict[str, Any] = {}
        schema = self.schema()
        if schema is not None and self.structured:
            wrapped = {"name": self.name, "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": wrapped}
        if self.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.thinking}
        return body

    def parse(self, text: str) -> Reply:
        raise NotImplementedError

    def read(self, completion: Completion) -> Reply:
        reply = self.parse(completion.text)
        if completion.finish_reason == "length" and (self.open_ended or reply.status == "unparsed"):
            return unparsed("cut off at max_tokens")
        return reply

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.medium not in ("image", "video"):
            yield "medium", f"is {self.medium!r}; it needs to be image or video"
            return
        try:
            self.wording()
        except ValueError as error:
            yield "prompt_file", str(error)


@cache
def read_wording(path: Path) -> str:
    """The text of a wording file as this process first read it: a run asks its last question as it asked its first.

    Raises:
        ValueError: an unusable file, which is read again next time; the message says what it lacks.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"is {str(path)!r}, which cannot be read as UTF-8 text: {error}") from error
    if "{prompt}" not in text:
        raise ValueError(f"is {str(path)!r}, without a {{prompt}} mark: the judge would not see the prompt")
    return text


def user_message(media: Sequence[Sequence[str]], text: str) -> dict[str, Any]:
    """One user message: every picture in order, then the text."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for frames in media for url in frames]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


# ---------------------------------------------------------------- reading replies

_NOUN = r"(?:the )?(?:edited )?(?:image|video|picture|answer|candidate|clip)"
_SIDE = re.compile(
    rf"{_NOUN} ?#?([12])"
    r"((?: is| was| looks)?(?: clearly| slightly| significantly)?(?: the)? "
    r"(?:better|best|preferred|winner|wins)(?: one)?"
    rf"(?:(?: than| over) {_NOUN} ?#?([12]))?)?"
)
_TIES = re.compile(
    r"(?:it(?: is|'s) )?(?:a )?(?:tie|draw|tied|equal|equally good|neither(?: is better)?)"
    r"|(?:both|the)(?: edited)?(?: images| videos| pictures| answers| candidates| clips)?(?: are)? "
    r"(?:equally (?:good|bad)|equal|tied|a tie)"
)
_EDGES = " \t\r\n.!;:,*_`'\"()[]<>"


def side(answer: object, sentence: bool = False) -> float | None:
    """The position that an answer names, or None where it does not plainly name one.

    Args:
        sentence: a name alone is no answer; it may be the heading of what is said of that candidate.

    >>> side("Image 1 is better than Image 2"), side("Video 2"), side("Both images are equally good")
    (0.0, 1.0, 0.5)
    >>> side("Image 1/2"), side("Image 1 is better than Image 1"), side(1)
    (None, None, None)
    >>> side("Image 1:", sentence=True), side("Image 1 is better", sentence=True)
    (None, 0.0)
    """
    if not isinstance(answer, str) or len(answer) > LONGEST_ANSWER:
        return None
    words = plain(answer)
    if _TIES.fullmatch(words):
        return TIE
    match = _SIDE.fullmatch(words)
    if match is None or match[1] == match[3] or (sentence and not match[2]):
        return None
    return FIRST if match[1] == "1" else SECOND


def plain(text: str) -> str:
    """Case, full-width forms, edge punctuation and white space taken out; for short texts.

    >>> plain(" **Image 1** is better! ")
    'image 1 is better'
    """
    folded = unicodedata.normalize("NFKC", text).casefold().replace("。", ".").replace("*", "")
    return " ".join(folded.strip(_EDGES).split())


class _Repeated(ValueError):
    """A JSON object gives one key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _Repeated("a key is given twice")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def json_object(text: str) -> tuple[dict[str, Any] | None, str]:
    """The one JSON object of a reply, fenced or with prose around it, or None and the reason why not.

    Only the first brace is tried, so the time is linear. A second object after it means two answers.
    """
    if thinks_on(text):
        return None, "truncated"
    text = after_thinking(text)
    start = text.find("{")
    if start < 0:
        return None, "no JSON object" if text.strip() else "empty reply"
    if text[:start].rstrip().endswith("["):
        return None, "a list, not an object"
    try:
        found, end = _DECODER.raw_decode(text, start)
    except _Repeated:
        return None, "two answers"
    except (ValueError, RecursionError):
        return None, "broken JSON" if text.rstrip().rstrip("`").rstrip().endswith("}") else "truncated JSON"
    if "{" in text[end:]:
        return None, "two answers"
    return found, ""


def after_thinking(text: str) -> str:
    """What follows the last ``</think>``; the whole text where there is none."""
    return text.rpartition("</think>")[2]


def thinks_on(text: str) -> bool:
    """Whether a thought is begun that never ends, so that nothing in the text is an answer."""
    return "<think>" in after_thinking(text)


def plain_lines(text: str) -> Iterator[str]:
    """The lines that say something, each ``plain``; those longer than ``LONGEST_ANSWER`` are passed over.

    None at all where a thought never ends.
    """
    for line in () if thinks_on(text) else after_thinking(text).splitlines():
        if len(line) <= LONGEST_ANSWER and (words := plain(line)):
            yield words


def number(value: object) -> float | None:
    """A finite JSON number as a float, else None (true and false are no numbers)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e12 else None  # false for nan too


# ---------------------------------------------------------------- schemas


def closed(**properties: dict[str, Any]) -> dict[str, Any]:
    """Schema of an object with exactly these keys, in this order."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def short_text(longest: int) -> dict[str, Any]:
    """Schema of a text of bounded length: free texts are where an untrained model runs on."""
    return {"type": "string", "minLength": 1, "maxLength": longest}
