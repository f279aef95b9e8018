"""A model on the Hub that cannot be had: licence, name and network each get their own way out."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from grpo_flex.generators.base import load_pipeline

client: Any = importlib.import_module(HTTPError.__module__.partition(".")[0])
"""The Hub's HTTP client: httpx or its successor, by version."""
NAME = "black-forest-labs/FLUX.1-dev"
ANSWER = client.Response(403, request=client.Request("GET", f"https://huggingface.co/{NAME}"))


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (
            GatedRepoError("403", response=ANSWER),
            rf"Accept its licence at https://huggingface.co/{NAME}, then set HF_TOKEN",
        ),
        (RepositoryNotFoundError("404", response=ANSWER), "knows no such model, or it is private"),
        (LocalEntryNotFoundError("not cached"), "cannot be reached from here: download the model where it can be"),
        (OfflineModeIsEnabled("offline"), "cannot be reached from here"),
        (client.ConnectError("no route to host"), "cannot be reached from here"),
        (OSError("model_index.json is damaged"), "Give a folder written by FluxPipeline.save_pretrained"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_each_cause_has_its_way_out(
    error: Exception, way_out: str, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``wrapped``: as diffusers passes on what the Hub's client raised."""

    def refuses(*_: Any, **__: Any) -> None:
        if not wrapped:
            raise error
        raise OSError("Cannot load model") from error

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuses)
    with pytest.raises(ValueError, match=way_out):
        load_pipeline("FluxPipeline", NAME)
