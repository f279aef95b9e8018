"""Who may import whom: the core knows nothing of the testbed, and the judge's side nothing of the trainer."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FORBIDDEN = {
    "grpo_flex": ("testbed", "experiments", "reward_server"),
    "reward_server": ("grpo_flex", "testbed", "experiments"),
    "testbed": ("experiments",),
}
ALLOWED = "reward_server.families"


def imported(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_keep_to_their_side(package: str) -> None:
    files = sorted(Path(package).rglob("*.py"))
    assert files
    crossing = {
        (str(file), module)
        for file in files
        for module in imported(file)
        if module.split(".")[0] in FORBIDDEN[package] and not (package == "grpo_flex" and module.startswith(ALLOWED))
    }
    assert not crossing


@pytest.mark.parametrize("package", ["torch", "vllm", "ray"])
def test_families_import_nothing_heavy(package: str) -> None:
    for file in Path("reward_server/families").rglob("*.py"):
        assert package not in {module.split(".")[0] for module in imported(file)}, file
