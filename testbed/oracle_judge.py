"""A judge that knows the truth: an HTTP server with OpenAI's chat API whose verdicts come from the oracle.

It sees what any judge sees, the prompt's text and the pictures (of a clip: its sampled frames), and replies in the Flex
format (two candidates) or with 1-5 scores (one candidate). Noise, position bias, latency and failures can be set, which
makes it the perfect and the broken judge of tests and ablations.

`python -m testbed.oracle_judge --port 0` serves on a free loopback port and prints its endpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from reward_server.families.flex import category_names

if TYPE_CHECKING:
    import numpy as np
    from aiohttp import web

    from testbed.video_oracle import ClipScore

_ANSWERS = re.compile(r"\nAnswer 1:\n(.*)\n\nAnswer 2:\n(.*)\n\nReply with", re.DOTALL)
MODEL = "UnifiedReward"
CACHED_SCORES = 20_000
NEAR = 0.02  # smaller differences of one measure are none
LOOKS = 0.05  # nor are smaller ones of quality and composition together; who is to win then is a coin toss
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


# ---------------------------------------------------------------- judging


class Score(Protocol):
    """What an oracle finds in one candidate; numbers in [0, 1]."""

    @property
    def attributes(self) -> Mapping[str, bool]: ...
    @property
    def alignment(self) -> float: ...
    @property
    def quality(self) -> float: ...
    @property
    def composition(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A clip's score: it looks good where things stay what they are and move evenly, and is well made where it is steady."""

    attributes: Mapping[str, bool]
    alignment: float
    quality: float
    composition: float


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


def frame_times(count: int) -> list[float]:
    """When each of so many uniformly sampled frames of a clip is, from 0 to 1."""
    import numpy as np

    from testbed import clips

    return (np.linspace(0, clips.FRAMES - 1, count).round() / (clips.FRAMES - 1)).tolist()


def watched(found: ClipScore) -> Watched:
    """What counts of a clip's score."""
    return Watched(
        attributes=found.attributes,
        alignment=found.alignment,
        quality=(found.quality + found.kept + found.smooth) / 3,
        composition=found.steady,
    )


def winners(one: Score, two: Score, toss: int) -> tuple[int, int, int, int]:
    """A faultless judge's winners (0 or 1) by alignment, quality, aesthetics and overall; a coin ``toss`` where all is equal.

    The format knows no ties: an anchor without a difference goes with the overall winner, either order.
    """
    overall = _better(*merit(one, two), toss)
    alignment = _better(one.alignment, two.alignment, overall)
    quality = _better(one.quality, two.quality, overall)
    return (alignment, quality, _better(one.composition, two.composition, overall), overall)


def merit(one: Score, two: Score) -> tuple[float, float]:
    """What decides overall: alignment, or quality and composition where alignment is as good as equal.

    Equal numbers where those are as good as equal, too: a judge that ranks what nobody can tell apart hands
    group-relative advantages a signal that is none.
    """
    if abs(one.alignment - two.alignment) >= NEAR:
        return one.alignment, two.alignment
    looks = one.quality + one.composition, two.quality + two.composition
    return looks if abs(looks[0] - looks[1]) >= LOOKS else (0.0, 0.0)


def _better(one: float, two: float, toss: int) -> int:
    return toss if abs(one - two) < NEAR else int(two > one)


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


# ---------------------------------------------------------------- replies


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
