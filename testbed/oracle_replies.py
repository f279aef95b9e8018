"""What the oracle judge says: from a chat request's prompt and pictures to the text of its reply."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import random
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from reward_server.families.flex import category_names
from testbed.preference import Score, Watched, frame_times, watched, winners

if TYPE_CHECKING:
    import numpy as np

    from testbed.oracle_judge import OracleJudge

_ANSWERS = re.compile(r"\nAnswer 1:\n(.*)\n\nAnswer 2:\n(.*)\n\nReply with", re.DOTALL)
CACHED_SCORES = 20_000


class Judging:
    """Turns chat requests into replies. Scores are cached by content, so a candidate is read once."""

    def __init__(self, settings: OracleJudge) -> None:
        self.settings = settings
        self._scores: OrderedDict[bytes, Score] = OrderedDict()

    def reply(self, body: Mapping[str, Any]) -> str:
        """The reply's text. Raises ValueError for a request that this judge cannot read."""
        text, urls = _content(body)
        caption = prompt_of(text)
        candidates = _candidates(urls, single="score the" in text.casefold())
        scores = [self._score(frames, caption) for frames in candidates]
        rng = self._rng(body, [frames[-1] for frames in candidates])
        if len(scores) == 1:
            return point_reply(scores[0], rng if rng.random() < self.settings.noise else None)
        if self.settings.style == "trace":
            answers = _ANSWERS.search(text)
            own = self._trace(caption, candidates, rng)
            return own if answers is None else reasoning_reply(own, answers.groups())
        winners = self._winners(scores[0], scores[1], rng)
        return flex_reply(scores[0], scores[1], winners, "video" if len(urls) > 2 else "image")

    def _trace(self, caption: str, candidates: Sequence[Sequence[str]], rng: random.Random) -> str:
        """The trace that a tiny judge learns; noise and bias change the overall winner only, against the evidence."""
        pieces, deciding = (_clip_trace if " moving " in caption else _picture_trace)(caption, candidates)
        noisy, biased = rng.random() < self.settings.noise, rng.random() < self.settings.position_bias
        if noisy or biased:
            pieces[-1] = deciding[0 if biased else rng.randrange(2)]
        return "".join(pieces)

    def _rng(self, body: Mapping[str, Any], urls: Sequence[str]) -> random.Random:
        """Chance that depends on the question alone, so that a run can be repeated."""
        about = f"{self.settings.seed} {body.get('seed')} " + " ".join(str(hash_of(u)) for u in urls)
        return random.Random(about)

    def _score(self, urls: Sequence[str], caption: str) -> Score:
        key = b"".join(map(hash_of, urls)) + caption.encode()
        if key not in self._scores:
            self._scores[key] = look(urls, caption)
            if len(self._scores) > CACHED_SCORES:
                self._scores.popitem(last=False)
        return self._scores[key]

    def _winners(self, one: Score, two: Score, rng: random.Random) -> tuple[int, int, int, int]:
        """Winners (0 or 1) by alignment, quality, aesthetics and overall."""
        noisy, biased = rng.random() < self.settings.noise, rng.random() < self.settings.position_bias
        tosses = [rng.randrange(2) for _ in range(4)]
        if biased:
            return (0, 0, 0, 0)
        if noisy:
            return (tosses[0], tosses[1], tosses[2], tosses[3])
        return winners(one, two, tosses[3])


def reasoning_reply(own: str, answers: Sequence[str]) -> str:
    """Which of two traces has more in common with the teacher's own; "neither" where both have as much."""
    first, second = (
        SequenceMatcher(None, own.split('"'), answer.split('"'), autojunk=False).ratio() for answer in answers
    )
    winner = "neither" if first == second else f"Answer {1 if first > second else 2}"
    return json.dumps({"reason": "It is nearer to what the oracle sees.", "winner": winner})


def _picture_trace(caption: str, candidates: Sequence[Sequence[str]]) -> tuple[list[str], tuple[str, str]]:
    """The pieces of a trace, and those that name the winner."""
    from testbed import oracle, scenes
    from testbed.judge_trace import Judged, overall_winners, trace

    if len(candidates[0]) != 1:
        raise ValueError(f"a trace is about two pictures, not {2 * len(candidates[0])}")
    reference = scenes.reference(scenes.parse(caption))
    images = (decode(url) for [url] in candidates)
    one, two = (Judged(reading=oracle.read(i), score=oracle.score(i, reference)) for i in images)
    return trace(reference, one, two), overall_winners()


def _clip_trace(caption: str, candidates: Sequence[Sequence[str]]) -> tuple[list[str], tuple[str, str]]:
    """The same about two clips."""
    from testbed import clips, video_oracle
    from testbed.video_judge_trace import judged, overall_winners, trace

    reference = clips.reference(clips.parse(caption))
    readings = (video_oracle.read_clip(_frames(urls), frame_times(len(urls))) for urls in candidates)
    one, two = (judged(reading, reference) for reading in readings)
    return trace(reference, one, two), overall_winners()


def look(urls: Sequence[str], caption: str) -> Score:
    """What the oracle says of one candidate: of a clip, if the caption tells of moving things, else of its last frame.

    Raises ValueError for a picture that cannot be read, or a caption of neither world.
    """
    from testbed import clips, oracle, scenes

    if " moving " in caption:
        return _watch(urls, clips.reference(clips.parse(caption)))
    return oracle.score(decode(urls[-1]), scenes.reference(scenes.parse(caption)))


def _watch(urls: Sequence[str], reference: Mapping[str, Any]) -> Watched:
    """A clip of the testbed by its sampled frames, whose times follow from how the trainer samples them."""
    from testbed import video_oracle

    return watched(video_oracle.score(_frames(urls), reference, frame_times(len(urls))))


def _frames(urls: Sequence[str]) -> np.ndarray:
    """uint8 [F, H, W, 3]."""
    import numpy as np

    return np.stack([decode(url) for url in urls])


def hash_of(url: str) -> bytes:
    """Content hash of a picture's data URL."""
    return hashlib.blake2b(url.encode(), digest_size=16).digest()


def decode(url: str) -> np.ndarray:
    """uint8 [H, W, 3] of a data URL. Raises ValueError for anything else."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    head, _, data = url.partition(",")
    if not head.startswith("data:image/"):
        raise ValueError("pictures must be data URLs")
    try:
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    except (UnidentifiedImageError, binascii.Error, OSError) as error:
        raise ValueError(f"a picture cannot be read: {error}") from error


def prompt_of(text: str) -> str:
    """The generator's prompt in an instruction: what follows its last "Prompt:".

    Raises ValueError where there is none.
    """
    _, found, prompt = text.rpartition("Prompt:")
    if not found:
        raise ValueError('the instruction has no line that begins with "Prompt:"')
    return prompt.strip().strip('"').splitlines()[0].strip() if prompt.strip() else ""


def _content(body: Mapping[str, Any]) -> tuple[str, list[str]]:
    try:
        parts = body["messages"][-1]["content"]
        text = "\n".join(p["text"] for p in parts if p["type"] == "text")
        urls = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"not a chat request with pictures: {error!r}") from error
    return text, urls


def _candidates(urls: Sequence[str], single: bool) -> list[Sequence[str]]:
    """The pictures of each candidate, in order."""
    if not urls:
        raise ValueError("the request shows no picture")
    if single or len(urls) == 1:
        return [urls]
    if len(urls) % 2:
        raise ValueError(f"{len(urls)} pictures do not make two candidates")
    return [urls[: len(urls) // 2], urls[len(urls) // 2 :]]


# ---------------------------------------------------------------- formats


def flex_reply(one: Score, two: Score, winners: tuple[int, int, int, int], medium: str) -> str:
    """The Flex family's JSON with the oracle's findings as reasons."""
    noun = medium.capitalize()
    values = [(one.alignment, two.alignment), (one.quality, two.quality), (one.composition, two.composition)]
    findings = [(_misses(one), _misses(two)), ("", ""), ("", "")]
    labels = ("Attributes of the prompt", "Sharpness and cleanness", "Composition")
    categories = []
    for k, name in enumerate(category_names(medium)):
        first = _share(values[k], winners[k])
        dim = {
            "name": labels[k],
            "reason_1": findings[k][0] or f"measures {values[k][0]:.2f}",
            "reason_2": findings[k][1] or f"measures {values[k][1]:.2f}",
            "score_1": first,
            "score_2": 10 - first,
        }
        categories.append(
            {
                "name": f"{'ABC'[k]}. {name}",
                "dims": [dim],
                "cat_reason": f"{noun} {winners[k] + 1} measures better.",
                "cat_winner": f"{noun} {winners[k] + 1}",
            }
        )
    reason = "Alignment first; quality and composition where it is equal."
    answer = {"categories": categories, "reason": reason, "winner": f"{noun} {winners[3] + 1}"}
    return json.dumps(answer, separators=(",", ":"))


def _misses(score: Score) -> str:
    wrong = [name for name, holds in score.attributes.items() if not holds]
    return "misses " + ", ".join(wrong) if wrong else "shows everything asked for"


def _share(values: tuple[float, float], winner: int) -> int:
    """The first candidate's points out of 10: more than 5 exactly if it wins."""
    lead = min(4, round(4 * abs(values[0] - values[1])))
    return 6 + lead if winner == 0 else 4 - lead


def point_reply(score: Score, noise: random.Random | None) -> str:
    """Three axes from 1 to 5, as UnifiedReward 2.0 writes them."""
    values = (score.alignment, score.quality, score.composition)
    marks = [1 + 4 * (noise.random() if noise else v) for v in values]
    names = ("Alignment", "Coherence", "Style")
    return "\n".join(f"{n} Score (1-5): {m:.2f}" for n, m in zip(names, marks, strict=True))
