"""Actors are made in the tests' own process here."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

OWN = ("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF")


@pytest.fixture(autouse=True)
def environment_comes_back() -> Iterator[None]:
    """What an actor settles for its process; of GPUs that it hides later tests may want one."""
    before = {name: os.environ.get(name) for name in OWN}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
