"""Whole runs as processes of their own, which a test can watch and kill."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_flex.config import RunConfig
from grpo_flex.config_file import to_json
from grpo_flex.metrics import read_metrics


def experiment_file(config: RunConfig, folder: Path) -> str:
    """An experiment file for the command line, which imports a file and not an object."""
    file, saved = folder / f"exp_{config.name}.py", folder / f"exp_{config.name}.json"
    saved.write_text(to_json(config))
    file.write_text(
        f"from pathlib import Path\nfrom grpo_flex.config_file import from_json\ndef config(): return from_json(Path({str(saved)!r}).read_text())\n"
    )
    return str(file)


def start_training(*words: str) -> subprocess.Popen[str]:
    """``python -m grpo_flex train …`` at the head of a process group of its own."""
    command = [sys.executable, "-m", "grpo_flex", "train", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def rows(run_dir: Path) -> list[Any]:
    return read_metrics(run_dir) if (run_dir / "metrics.jsonl").is_file() else []


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], limit_s: float = 300) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise AssertionError(f"the run ended, or did not come so far:\n{process.communicate()[0]}")
        time.sleep(0.05)


def descendants(pid: int, words: str) -> list[int]:
    """Processes below ``pid`` whose command line holds ``words``."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _read(entry / "stat")):
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
            names[int(entry.name)] = _read(entry / "cmdline").replace("\0", " ")
    return sorted(p for p, name in names.items() if words in name and pid in _line(p, parents))


def _line(pid: int, parents: dict[int, int]) -> list[int]:
    above = []
    while (pid := parents.get(pid, 0)) > 1:
        above.append(pid)
    return above


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # it has ended in between
        return ""
