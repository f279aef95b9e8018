"""The prompt stream: shuffled anew each epoch, a pure function of (seed, step), and therefore resumable for free."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

from grpo_flex.config import ConfigError
from grpo_flex.readers import KINDS, Unreadable, read
from grpo_flex.types import Prompt


class PromptStream:
    """Batches of P different prompts, from epochs that are shuffled independently.

    An epoch consists of whole batches, so that no prompt ever meets itself in one; those left over (fewer than P) sit
    out that epoch, other ones in the next.

    >>> stream = PromptStream([Prompt(id=str(i), text="") for i in range(4)], per_step=3, seed=0)
    >>> len({p.id for p in stream.batch(0)})
    3

    Raises:
        ConfigError: fewer prompts than a step needs.
    """

    def __init__(self, prompts: Sequence[Prompt], per_step: int, seed: int) -> None:
        if per_step > len(prompts):
            raise ConfigError(
                f"prompts.per_step is {per_step}, but prompts.train holds {len(prompts)}: a prompt would meet itself in a "
                "step; give more prompts, or a smaller prompts.per_step"
            )
        self.prompts, self.per_step, self.seed = prompts, per_step, seed
        self._epoch, self._order = -1, list[int]()

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of a training step; a pure function of (seed, step)."""
        epoch, place = divmod(step, len(self.prompts) // self.per_step)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.prompts)))
            random.Random(seed_for(self.seed, "epoch", epoch)).shuffle(self._order)
        return [self.prompts[i] for i in self._order[place * self.per_step : (place + 1) * self.per_step]]


def seed_for(*parts: object) -> int:
    """A 63-bit seed that depends on every part, stable across processes, machines and Python versions.

    Used as seed_for(run seed, purpose, step, prompt id, sibling): the same media whichever worker samples it.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """What a run remembers of its prompts: how many, and a digest of their ids, texts and references, in their order."""
    lines = [[p.id, p.text, p.reference, p.tags] for p in prompts]
    digest = hashlib.sha256(json.dumps(lines, sort_keys=True, default=str).encode()).hexdigest()
    return f"{len(prompts)} prompts with the digest {digest[:16]}"


def read_prompts(path: str, field: str) -> list[Prompt]:
    """Read a file or folder of prompts: plain text, JSON lines, CSV, Parquet or a dataset (``readers.py``).

    Args:
        field: the configuration's name for it, for the message.

    Raises:
        ConfigError: no such file, no prompts in it, or a line that is no prompt (with its number).
    """
    file = Path(path)
    if not (file.is_file() or file.is_dir()):
        raise ConfigError(f"{field} is '{path}', which is not there; give a file of {KINDS}")
    try:
        prompts = read(file)
    except Unreadable as error:
        raise ConfigError(f"{field}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}: '{path}' cannot be read: {error}") from error
    if not prompts:
        raise ConfigError(f"{field}: '{path}' holds no prompts; it needs at least one line")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ConfigError(
                f"{field}: '{path}' has the id '{prompt.id}' twice; seeds depend on ids, so each needs to be unique"
            )
        seen.add(prompt.id)
    return prompts
