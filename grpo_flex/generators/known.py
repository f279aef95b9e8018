"""What this machine knows of a model on the Hub without asking it: files in the Hub's cache, and public configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KNOWN = Path(__file__).parent / "configs"
"""Public configurations by Hub id, each with a note where its numbers come from."""


def cached(model: str) -> Path | None:
    """The folder of a Hub model's files on this machine, if they are there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "model_index.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def public() -> dict[str, dict[str, Any]]:
    """Hub id -> the ``index`` (model_index.json) and ``parts`` (each component's configuration) of a released pipeline."""
    return {entry["hub"]: entry for entry in (json.loads(file.read_text()) for file in sorted(KNOWN.glob("*.json")))}


def index_of(model: str) -> dict[str, Any] | None:
    """The model_index.json of a folder, or of what is known of a Hub id; None where nothing is, or it is damaged."""
    folder = Path(model) if Path(model).is_dir() else None
    if folder is None and (released := public().get(model)):
        return released["index"]
    folder = folder or cached(model)
    try:
        said = json.loads((folder / "model_index.json").read_text()) if folder else None
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None
