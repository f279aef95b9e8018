"""Actors are made in the tests' own process here."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def gpus_come_back() -> Iterator[None]:
    """An actor without GPUs hides them from its process, in which later tests may want them."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    yield
    if before is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = before
    else:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
