"""Property-based tests on shared machines: no time limit per example, which would fail by load and not by fault."""

from hypothesis import settings

settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")
