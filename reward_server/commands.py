"""The command lines of the work on preferences: distill, benchmark, fit-weights. Heavy imports come when one runs."""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from reward_server.asking import Endpoint
    from reward_server.families.base import ChatFamily
    from reward_server.preferences import Preference

LAYOUT_NAMES = ("ours", "genai-bench", "mmrb2", "mj-bench-video")


def add(commands: Any) -> None:
    """Adds the commands to the subparsers of ``python -m reward_server``."""
    _distill_arguments(commands.add_parser("distill", help="let a teacher write traces for preferences"))
    _benchmark_arguments(commands.add_parser("benchmark", help="measure a judge on preferences"))
    _weights_arguments(commands.add_parser("fit-weights", help="learn VisionReward's weights from preferences"))


def _distill_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Asks a teacher, behind any OpenAI-compatible endpoint, for a Flex trace about each preference. Started again, it "
        "goes on where it stopped."
    )
    _preference_arguments(parser)
    _endpoint_arguments(parser, temperature=0.7, max_tokens=4096)
    parser.add_argument("--out", required=True, metavar="FILE", help="traces, JSON lines")
    parser.add_argument("--rejected", default="", metavar="FILE", help="instances without a trace (OUT.rejected.jsonl)")
    parser.add_argument("--tries", type=int, default=3, metavar="N", help="replies until one is a trace (%(default)s)")
    parser.set_defaults(run=_distill)


def _benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Asks a judge about every preference and compares its verdicts with people's."
    _preference_arguments(parser)
    _endpoint_arguments(parser, temperature=0.0, max_tokens=2048)
    parser.add_argument("--family", nargs="+", default=["flex"], metavar="NAME", help="how it is asked (flex)")
    parser.add_argument("--checklist-file", default="", metavar="FILE", help="for the family vision-reward")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where replies.jsonl and benchmark.json go")
    parser.add_argument("--one-order", action="store_true", help="half the questions, without consistency under swap")
    parser.add_argument("--resume", action="store_true", help="go on with the replies of the same judge that are there")
    parser.set_defaults(run=_benchmark)


def _weights_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Asks a judge VisionReward's checklist and fits its weights to the preferences."
    _preference_arguments(parser)
    _endpoint_arguments(parser, temperature=0.0, max_tokens=512)
    parser.add_argument("--checklist-file", default="", metavar="FILE", help="the questions; without it our own")
    parser.add_argument("--out", required=True, metavar="FILE", help="the checklist with its new weights, JSON")
    parser.add_argument("--ridge", type=float, default=1.0, metavar="R", help="of ½‖w‖² (%(default)s)")
    parser.add_argument("--nonnegative", action="store_true", help='no "yes" may speak against a candidate')
    parser.add_argument("--resume", action="store_true", help="go on with the replies in OUT.replies.jsonl")
    parser.set_defaults(run=_fit_weights)


def _preference_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preferences", metavar="PREFERENCES", help="JSON lines, JSON, Parquet, or a folder of Parquet")
    parser.add_argument("--layout", default="ours", choices=LAYOUT_NAMES, help="(%(default)s)")
    parser.add_argument("--media", default="", metavar="FOLDER", help="where relative paths start (the file's folder)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only N of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of orders, draws and replies (%(default)s)")


def _endpoint_arguments(parser: argparse.ArgumentParser, temperature: float, max_tokens: int) -> None:
    local = "http://127.0.0.1:8000/v1"
    parser.add_argument("--endpoint", default=local, metavar="URL", help="(%(default)s); key: $GRPO_FLEX_JUDGE_KEY")
    parser.add_argument("--model", default="", metavar="NAME", help="the served name; without it the first one listed")
    parser.add_argument("--prompt-file", default="", metavar="FILE", help="another wording of the instruction")
    parser.add_argument("--concurrency", type=int, default=16, metavar="N", help="questions in flight (%(default)s)")
    parser.add_argument("--temperature", type=float, default=temperature, metavar="T", help="(%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help="longest reply (%(default)s)")
    parser.add_argument("--timeout-s", type=float, default=300.0, metavar="S", help="of one try (%(default)s)")
    parser.add_argument(
        "--body", default="{}", metavar="JSON", help="fields of the request in place of ours; null leaves one out"
    )


# ---------------------------------------------------------------- what they share


def console() -> Console:
    """Standard output for tables: texts as they are, nothing in them is markup; what it cannot encode is escaped."""
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(markup=False, emoji=False, highlight=False)


def _endpoint(arguments: argparse.Namespace) -> Endpoint:
    from reward_server.asking import Endpoint

    try:
        body = json.loads(arguments.body)
    except ValueError as error:
        raise ValueError(f"--body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError(f'--body needs to be an object such as {{"response_format": null}}, not {arguments.body}')
    names = ("model", "concurrency", "temperature", "max_tokens", "timeout_s")
    endpoint = Endpoint(url=arguments.endpoint, body=body, **{name: getattr(arguments, name) for name in names})
    for name, complaint in endpoint.problems():
        raise ValueError(f"--{name.replace('_', '-')} {complaint}")
    return endpoint


def _preferences(arguments: argparse.Namespace) -> list[Preference]:
    from reward_server.preferences import read
    from reward_server.readers import LAYOUTS

    found = read(arguments.preferences, LAYOUTS[arguments.layout], arguments.media)
    for reason, count in found.left_out.items():
        _note(f"{count:,} rows left out: {reason}")
    listed = list(found.preferences)
    if 0 < arguments.limit < len(listed):
        chosen = set(random.Random(f"limit {arguments.seed}").sample(range(len(listed)), arguments.limit))
        listed = [p for k, p in enumerate(listed) if k in chosen]
    return listed


def _family(name: str, arguments: argparse.Namespace) -> ChatFamily:
    from reward_server.ask import FAMILIES

    if name not in FAMILIES:
        raise ValueError(f"no family {name!r}; there are {', '.join(FAMILIES)}")
    family = replace(FAMILIES[name](), prompt_file=arguments.prompt_file)
    if any(f.name == "checklist_file" for f in fields(family)):
        return replace(family, checklist_file=arguments.checklist_file)  # pyright: ignore[reportCallIssue]
    return family


def _check_wording(arguments: argparse.Namespace, preferences: Sequence[Preference]) -> None:
    media = {preference.medium for preference in preferences}
    if arguments.prompt_file and len(media) > 1:
        raise ValueError(
            "--prompt-file has one wording, but the preferences are of pictures and of videos: ask about them in two files"
        )


def _refuse(extra: Sequence[str]) -> None:
    if extra:
        raise ValueError(f"what is {extra[0]!r}?")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the commands


def _distill(arguments: argparse.Namespace, extra: list[str]) -> int:
    from reward_server.asking import run_until_interrupted
    from reward_server.distill import Distillation, distil, report
    from reward_server.families.flex import Flex

    _refuse(extra)
    out = Path(arguments.out)
    settings = Distillation(
        out=out,
        rejected=Path(arguments.rejected) if arguments.rejected else out.with_suffix(".rejected.jsonl"),
        endpoint=_endpoint(arguments),
        family=Flex(prompt_file=arguments.prompt_file),
        tries=arguments.tries,
        seed=arguments.seed,
    )
    preferences = _preferences(arguments)
    _check_wording(arguments, preferences)
    tally = run_until_interrupted(distil(preferences, settings))
    _note(report(tally))
    return 1 if tally.unanswered else 0


def _benchmark(arguments: argparse.Namespace, extra: list[str]) -> int:
    from reward_server.asking import run_until_interrupted
    from reward_server.benchmark import DEFINITIONS, FIGURES, REPLIES, Questions, benchmark, table

    _refuse(extra)
    out = Path(arguments.out)
    asked = Questions(
        families={name: _family(name, arguments) for name in arguments.family},
        replies=out / REPLIES,
        endpoint=_endpoint(arguments),
        seed=arguments.seed,
        both_orders=not arguments.one_order,
        resume=arguments.resume,
    )
    preferences = _preferences(arguments)
    _check_wording(arguments, preferences)
    measured = run_until_interrupted(benchmark(preferences, asked))
    figures = json.dumps(measured, indent=1, ensure_ascii=False) + "\n"
    (out / FIGURES).write_text(figures, encoding="utf-8", errors="backslashreplace")
    console().print(table(measured))
    for name in ("accuracy", "accuracy_tie_half", "accuracy_with_ties"):
        print(f"{name}: {DEFINITIONS[name]}")
    for reason, count in measured["unanswered"].items():
        _note(f"{count:,} unanswered, --resume asks again: {reason}")
    return 1 if measured["unanswered"] else 0


def _fit_weights(arguments: argparse.Namespace, extra: list[str]) -> int:
    from reward_server import checklist_weights
    from reward_server.asking import run_until_interrupted
    from reward_server.benchmark import Questions, collect
    from reward_server.families.vision_reward import VisionReward

    _refuse(extra)
    out = Path(arguments.out)
    family = VisionReward(prompt_file=arguments.prompt_file, checklist_file=arguments.checklist_file)
    replies = out.with_suffix(".replies.jsonl")
    asked = Questions(
        families={"vision-reward": family}, replies=replies, endpoint=_endpoint(arguments), resume=arguments.resume
    )
    preferences = [p for p in _preferences(arguments) if p.label is not None]
    _check_wording(arguments, preferences)
    records, unanswered = run_until_interrupted(collect(preferences, asked))
    fitted = checklist_weights.fit(preferences, records, family, arguments.ridge, arguments.nonnegative)
    checklist_weights.write(out, fitted)
    print(checklist_weights.report(fitted))
    for reason, count in unanswered.items():
        _note(f"{count:,} unanswered, --resume asks again: {reason}")
    return 0
