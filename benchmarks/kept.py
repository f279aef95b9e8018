"""Finished measurements, as small JSON files that stay in the repository beside the tables made of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_flex.config import RunConfig
from grpo_flex.config_file import to_json


def digest(config: RunConfig) -> str:
    """Of a configuration as it is now, whatever its seed, with the weights of a judge that lies in the repository: what has
    moved since is another measurement."""
    made = hashlib.sha256(to_json(replace(config, seed=0)).encode())
    weights = Path(getattr(config.judge and config.judge.server, "model", "")) / "model.safetensors"
    if weights.is_file():
        made.update(weights.read_bytes())
    return made.hexdigest()[:12]


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Atomically, so that a file that is there is complete."""
    half = path.with_name(f".{path.name}.part")
    half.write_text(json.dumps(result) + "\n")
    os.replace(half, path)


def read(folder: Path) -> list[dict[str, Any]]:
    """All that is there, in the order of the files' names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*-s*.json"))]


def same(path: Path, expected: Any, key: str) -> bool:
    """Whether the measurement is there; ValueError where it is of something else, so that two are not mixed."""
    if not path.is_file():
        return False
    found = json.loads(path.read_text())[key]
    if found != expected:
        raise ValueError(f"{path} was measured with other settings ({key} {found}); give another --out, or remove it")
    return True
