"""What the judge's client and a resume cost on a CPU, beside the plain way of doing the same: `python -m benchmarks.driver_costs`.

*Requests*: a body with two noisy pictures of 750 × 750, whose base64 needs no escaping, against `json.dumps` of the whole.
*Groups*: what the judge is given of a group of FLUX's or Wan's size, of that what the learners are given, and the whole, pickled.
*Verdicts*: going through a file of many gzip members in pieces, against giving zlib the whole rest for each member.
"""

from __future__ import annotations

import json
import pickle
import random
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from grpo_flex.config_file import load_experiment
from grpo_flex.judging import encode_media
from grpo_flex.plan import blank_trajectories
from grpo_flex.types import Prompt, RolloutGroup, Verdict
from grpo_flex.verdicts import GZIP_MEMBER, VerdictLog, gzip_members
from reward_server.families import chat
from reward_server.families.flex import Flex


def _seconds(work: Callable[[], object], times: int) -> float:
    """Median CPU time."""
    found = []
    for _ in range(times):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return median(found)


def requests() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 1, 750, 750, 3), dtype=np.uint8)
    media = [encode_media(picture, 1) for picture in noise]

    def body(shown: list[list[str]]) -> dict[str, Any]:
        return {"model": "judge", "messages": Flex().request("a cat", shown), "seed": 1} | Flex().options()

    def plain() -> bytes:
        return json.dumps(body(media)).encode()

    assert chat.encoded(body, media) == plain()
    ours, theirs = _seconds(lambda: chat.encoded(body, media), 40), _seconds(plain, 40)
    print(
        f"a body of {len(plain()) / 1e6:.1f} MB: {1e3 * ours:.2f} ms, plain {1e3 * theirs:.2f} ms: {theirs / ours:.1f}×"
    )


def groups(experiment: str, latent_shape: tuple[int, int]) -> None:
    config = load_experiment(f"experiments/{experiment}.py")
    generator: Any = config.generator
    frame = (getattr(generator, "frames", 1), generator.height, generator.width, 3)
    whole = RolloutGroup(
        step=0,
        prompt=Prompt(id="p", text="a cat"),
        conditioning={"prompt_embeds": torch.zeros(1, 512, 4096, dtype=torch.bfloat16)},
        media_G=tuple(np.zeros(frame, np.uint8) for _ in range(config.sampling.group_size)),
        trajectories=blank_trajectories(config, latent_shape, config.sampling.group_size, "cpu"),
        seeds_G=tuple(range(config.sampling.group_size)),
        policy_version=0,
    )
    shown, learnt, before = (len(pickle.dumps(part)) / 1e6 for part in (*whole.parted(), whole))
    print(f"{experiment}: to the judge {shown:.0f} MB, to a learner {learnt:.0f} MB, before to both {before:.0f} MB")


def verdicts(folder: Path, members: int) -> None:
    chance, path = random.Random(0), folder / f"{members}.gz"
    log = VerdictLog(path)
    for _ in range(members):
        for _ in range(16):
            words = " ".join(str(chance.random()) for _ in range(120))
            log.add(1, "p", "a cat", Verdict(members=(0, 1), status="ok", winner=0.0, rationale=words))
        log.flush()

    def plain() -> int:
        data, offset, found = path.read_bytes(), 0, 0
        while offset < len(data):
            unpacker = zlib.decompressobj(GZIP_MEMBER)
            found += len(unpacker.decompress(memoryview(data)[offset:]))
            offset = len(data) - len(unpacker.unused_data)
        return found

    ours = _seconds(lambda: sum(len(member.content) for member in gzip_members(path)), 3)
    theirs = _seconds(plain, 3)
    print(f"{path.stat().st_size / 1e6:.0f} MB of verdicts: {ours:.2f} s, plain {theirs:.2f} s: {theirs / ours:.1f}×")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        requests()
        groups("flux1_dev_flex", (45 * 45, 64))
        groups("wan21_14b_flex", (9 * 15 * 26, 64))
        for count in (250, 1000, 4000):
            verdicts(Path(made), count)
