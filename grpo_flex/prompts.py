"""The prompt stream: shuffled anew each epoch, a pure function of (seed, step), and therefore resumable for free."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

from grpo_flex.config import ConfigError
from grpo_flex.types import Prompt


class PromptStream:
    """Batches of P prompts. Every prompt comes once an epoch; epochs are shuffled independently.

    >>> stream = PromptStream([Prompt(id=str(i), text="") for i in range(4)], per_step=3, seed=0)
    >>> len({p.id for p in stream.batch(0)})
    3
    """

    def __init__(self, prompts: Sequence[Prompt], per_step: int, seed: int) -> None:
        self.prompts, self.per_step, self.seed = prompts, per_step, seed
        self._orders: dict[
            int, list[int]
        ] = {}  # the last two epochs', so that a large file is not shuffled anew for each prompt

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of a training step: positions step·P … step·P + P − 1 of the endless shuffled stream."""
        first = step * self.per_step
        return [self._at(position) for position in range(first, first + self.per_step)]

    def _at(self, position: int) -> Prompt:
        epoch, index = divmod(position, len(self.prompts))
        if epoch not in self._orders:
            order = list(range(len(self.prompts)))
            random.Random(seed_for(self.seed, "epoch", epoch)).shuffle(order)
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: order}
        return self.prompts[self._orders[epoch][index]]


def seed_for(*parts: object) -> int:
    """A 63-bit seed that depends on every part, stable across processes, machines and Python versions.

    Used as seed_for(run seed, purpose, step, prompt id, sibling): the same media whichever worker samples it.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def read_prompts(path: str, field: str) -> list[Prompt]:
    """Read a JSON-lines file of prompts.

    Args:
        field: the configuration's name for this file, for the message.

    Raises:
        ConfigError: no such file, no prompts in it, or a line that is no prompt (with its number).
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(
            f'{field} is \'{path}\', which is not there; give a JSON-lines file with one {{"id", "text"}} a line'
        )
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}: '{path}' cannot be read: {error}") from error
    prompts = [_prompt(line, f"{path}:{number}", field) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ConfigError(f"{field}: '{path}' holds no prompts; it needs at least one line")
    if len({p.id for p in prompts}) < len(prompts):
        twice = next(p.id for i, p in enumerate(prompts) if p.id in {q.id for q in prompts[:i]})
        raise ConfigError(
            f"{field}: '{path}' has the id '{twice}' twice; seeds depend on ids, so each needs to be unique"
        )
    return prompts


def _prompt(line: str, where: str, field: str) -> Prompt:
    try:
        entry = json.loads(line)
        text = entry["text"]
        if not isinstance(text, str) or not text.strip():
            raise ValueError('"text" is empty')
        return Prompt(
            id=str(entry.get("id", where.rpartition(":")[2])),
            text=text,
            reference=entry.get("reference") or {},
            tags=tuple(entry.get("tags") or ()),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{field}: {where} is no prompt ({error}); each line needs to be like {{"id": "p1", "text": "a red circle"}}'
        ) from error
