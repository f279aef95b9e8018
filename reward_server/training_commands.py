"""The command lines of a judge's training: sft, pairs, dpo. Heavy imports come when one runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

HELP = {
    "sft": "stage 1: fine-tune a judge on a teacher's traces",
    "pairs": "before stage 2: sample two traces for each preference and choose",
    "dpo": "stage 2: direct preference optimisation on those pairs",
}


def add(commands: Any) -> None:
    """Adds the commands to the subparsers of ``python -m reward_server``."""
    for stage, line in HELP.items():
        parser = commands.add_parser(stage, help=line)
        parser.description = f"{line}. Started again, it goes on where it stopped."
        parser.add_argument("experiment", metavar="EXPERIMENT", help="Python file with def config() -> JudgeTraining")
        parser.add_argument("assignments", metavar="field=value", nargs="*", help=f"e.g. {stage}.{_EXAMPLES[stage]}")
        parser.set_defaults(run=_pairs if stage == "pairs" else _train, stage=stage)


_EXAMPLES = {"sft": "traces=traces.jsonl", "pairs": "preferences=preferences.jsonl", "dpo": "beta=0.05"}


def _train(arguments: argparse.Namespace, extra: list[str]) -> int:
    from reward_server.judge_training import load

    config = load(arguments.experiment, [*arguments.assignments, *extra])
    try:
        stage = importlib.import_module(f"reward_server.{arguments.stage}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error}: training a judge needs more packages, pip install -e '.[judge-training]'"
        ) from error
    print(stage.train(config))
    return 0


def _pairs(arguments: argparse.Namespace, extra: list[str]) -> int:
    from reward_server.asking import run_until_interrupted
    from reward_server.judge_training import load
    from reward_server.pairs import build

    config = load(arguments.experiment, [*arguments.assignments, *extra])
    counts = run_until_interrupted(build(config))
    print("\n".join(f"{count:>8,} {name}" for name, count in counts.items()))
    if not counts["pairs"]:
        print("no pair was made: stage 2 has nothing to learn from", file=sys.stderr)
    return 1 if counts["unanswered"] else 0
