"""What a piece of work was begun with: written down once, and compared whenever the work goes on.

Long work is resumed from its files. Were the settings other ones meanwhile, old and new results would stand side by side
with nobody knowing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reward_server.families.base import ChatFamily

PIECE = 1 << 20
"""Bytes that are read at each of three places of a file with weights."""


def begun_with(path: Path, settings: Mapping[str, Any], way_out: str) -> None:
    """Writes the settings to ``path``, or compares them with those that are there.

    Raises:
        ValueError: naming each setting that differs, and the way out.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f".{path.name}.part")
        half.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        os.replace(half, path)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): {way_out}") from error
    now = json.loads(json.dumps(settings))
    # A setting that an earlier version did not write down is not compared.
    other = [f"{k} is {now[k]!r}, not {before[k]!r}" for k in now if k in before and now[k] != before[k]]
    if other:
        raise ValueError(f"{path.parent} was begun otherwise ({'; '.join(other)}): {way_out}")


def wordings(*families: ChatFamily, **named: ChatFamily) -> dict[str, str]:
    """A digest of what each says in its medium, or as a question of that name, whatever file it is from."""
    said = {family.medium: family.wording() for family in families}
    said |= {f"question {name!r}": family.wording() for name, family in named.items()}
    return {f"wording of {about}": hashlib.sha256(text.encode()).hexdigest()[:12] for about, text in said.items()}


def fingerprint(folder: Path) -> str:
    """Of a model's folder: names, sizes, and three pieces of each file with weights; other files whole."""
    digest = hashlib.sha256()
    files = (path for path in folder.rglob("*") if path.is_file())
    for file in sorted(f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts)):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}".encode())
        with file.open("rb") as content:
            for start in (0, size // 2, size - PIECE) if size > 3 * PIECE else ():
                content.seek(start)
                digest.update(content.read(PIECE))
            if size <= 3 * PIECE:
                digest.update(content.read())
    return digest.hexdigest()[:12]
