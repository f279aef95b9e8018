"""The command line: train, plan, evaluate, compare, report, verdicts, status."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_flex.config import ConfigError, RunConfig
from grpo_flex.config_file import load_experiment, to_json
from grpo_flex.overrides import override


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    sys.path.insert(0, str(Path.cwd()))  # experiments and testbed are imported from the working directory
    try:
        return arguments.run(arguments)
    except ValueError as error:  # every message to the user is a ValueError: ConfigError, CheckpointError, …
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a missing permission
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once; steps after the last checkpoint are not saved", file=sys.stderr)
        return 130


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """argparse takes positional words only in one run; overrides may also stand behind --resume or --dry-run."""
    arguments, rest = _parser().parse_known_args(argv)
    words = getattr(arguments, "experiment_and_overrides", None)
    if rest and (words is None or any(word.startswith("-") for word in rest)):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.experiment_and_overrides = [*(words or []), *rest]
    return arguments


def _train(arguments: argparse.Namespace) -> int:
    from grpo_flex.run import train
    from grpo_flex.run_dir import newest, resumed

    words = [w for w in arguments.experiment_and_overrides if w]
    if arguments.resume == "":
        raise ConfigError("--resume names no run; give one like runs/shapes_image, or leave --resume out to begin anew")
    where = arguments.resume or ""
    if arguments.resume_if_there:
        config = _experiment(words, _model(arguments))
        config.validate()
        where = newest(config)
    if where:
        words = words if not words or "=" in words[0] else words[1:]
        resume, config = resumed(where, [*_model(arguments), *words])
    else:
        resume, config = None, _experiment(words, _model(arguments))
    config.validate()
    if arguments.dry_run:
        return _dry_run(config)
    return train(config, resume, where)


def _experiment(words: list[str], first: Sequence[str] = ()) -> RunConfig:
    """The experiment that ``words`` name, with ``first`` and then their own overrides."""
    if not words or "=" in words[0]:
        raise ConfigError("which experiment? e.g. python -m grpo_flex train experiments/shapes_image.py")
    return override(load_experiment(words[0]), [*first, *words[1:]])


def _model(arguments: argparse.Namespace) -> list[str]:
    """--model PATH is short for generator.model=PATH."""
    return [f"generator.model={arguments.model}"] if arguments.model is not None else []


def _plan(arguments: argparse.Namespace) -> int:
    from grpo_flex.plan import make_plan
    from grpo_flex.plan_report import report
    from grpo_flex.run import quieten

    a = arguments
    config = _experiment([w for w in a.experiment_and_overrides if w], _model(a))
    config.validate()
    _check_hardware(config, a)
    quieten()
    for line in report(make_plan(config), a.gpus, a.gpu_memory, a.tflops, a.judge_rate):
        print(line, flush=True)
    return 0


def _check_hardware(config: RunConfig, arguments: argparse.Namespace) -> None:
    """Refuse numbers that a plan cannot be compared with."""
    for name in ("gpus", "gpu_memory", "tflops", "judge_rate"):
        value = getattr(arguments, name)
        if not 0 <= value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it needs to be a number of 0 or more")
    if (arguments.gpus > 0) != (arguments.gpu_memory > 0):
        raise ConfigError("--gpus and --gpu-memory belong together: how many cards, and the GiB of each")
    place = config.placement
    if arguments.gpus and not (place.rollout_gpus or place.learner_gpus):
        raise ConfigError(
            "placement.rollout_gpus and placement.learner_gpus are 0, so this experiment runs on CPUs and no GPU would hold "
            "anything; set them, or leave out --gpus and --gpu-memory"
        )


def _dry_run(config: RunConfig) -> int:
    """Everything that can be checked without starting anything."""
    from grpo_flex.prompts import PromptStream, read_prompts
    from grpo_flex.run import quieten

    quieten()
    read = {name: read_prompts(getattr(config.prompts, name), f"prompts.{name}") for name in ("train", "heldout")}
    PromptStream(read["train"], config.prompts.per_step, config.seed)
    counts = {name: len(prompts) for name, prompts in read.items()}
    here = Path(getattr(config.generator, "model", "")).is_dir()
    if here:
        config.generator.check([prompt for prompts in read.values() for prompt in prompts])
    print(to_json(config))
    if memory := getattr(config.generator, "memory", None):
        try:
            memory.check_installed()
        except ValueError as error:  # the machines that will run it may have it
            print(f"\nwarning: not on this machine: {error}")
    print(
        f"\n{config.name}: {config.steps} steps of {config.prompts.per_step} prompts × {config.sampling.group_size} siblings, "
        f"{_work_per_step(config)}; {counts['train']} training and {counts['heldout']} held-out prompts. "
        f"Valid; nothing was started.{'' if here else ' How long prompts may be is not checked: the model is not here.'}"
    )
    return 0


def _work_per_step(config: RunConfig) -> str:
    """What judge and scorers have to do, e.g. "192 verdicts a step and scores of clip"."""
    from grpo_flex.scorers import label

    parts = []
    if config.judge is not None:
        questions = len(config.judge.questions(config.sampling.group_size, 0))
        parts.append(f"{config.prompts.per_step * questions} verdicts a step")
    if config.scorers:
        parts.append(f"scores of {', '.join(map(label, config.scorers))}")
    return " and ".join(parts)


def _evaluate(arguments: argparse.Namespace) -> int:
    from grpo_flex.evaluate import evaluate

    return evaluate(
        arguments.run_dir, arguments.adapter, arguments.experiment, Path(arguments.out) if arguments.out else None
    )


def _compare(arguments: argparse.Namespace) -> int:
    from grpo_flex.compare import compare

    runs = [Path(r) for r in arguments.runs]
    print(compare(runs, runs[0].parent / "comparison.png"))
    return 0


def _verdicts(arguments: argparse.Namespace) -> int:
    from grpo_flex.verdicts import main as read

    a = arguments
    read(a.run_dir, step=a.step, prompt=a.prompt or "", show=a.show, limit=a.limit, full=a.full)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from grpo_flex.report import write_report

    print(write_report(Path(arguments.run_dir)))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from grpo_flex.status import status

    status(arguments.run_dir)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grpo_flex", description="RL for image and video generators, judged by a vision-language model."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run an experiment, or resume one")
    train.add_argument(
        "experiment_and_overrides",
        nargs="*",
        metavar="EXPERIMENT [field=value …]",
        help="e.g. experiments/shapes_image.py optimizer.lr=1e-4",
    )
    again = train.add_mutually_exclusive_group()
    again.add_argument("--resume", metavar="RUN", help="continue runs/NAME, or a copy like s3://bucket/runs/NAME")
    again.add_argument(
        "--resume-if-there",
        action="store_true",
        help="continue the experiment's newest run that has a checkpoint, in runs_dir or else in the mirror; without one, "
        "start anew: for jobs that are started again by the same command",
    )
    train.add_argument("--dry-run", action="store_true", help="check and print the configuration, start nothing")
    train.set_defaults(run=_train)

    train.add_argument("--model", metavar="PATH", help="a saved pipeline or a Hub id: short for generator.model=PATH")

    plan = commands.add_parser("plan", help="what an experiment needs: memory, FLOPs, judge calls; without a GPU")
    plan.add_argument("experiment_and_overrides", nargs="*", metavar="EXPERIMENT [field=value …]")
    plan.add_argument("--model", metavar="PATH", help="a saved pipeline or a Hub id: short for generator.model=PATH")
    plan.add_argument("--gpus", type=int, default=0, metavar="N", help="cards that there are")
    plan.add_argument("--gpu-memory", type=float, default=0.0, metavar="GIB", help="of each card")
    plan.add_argument("--tflops", type=float, default=0.0, metavar="X", help="what one GPU sustains, 10¹² a second")
    plan.add_argument("--judge-rate", type=float, default=0.0, metavar="X", help="verdicts a second")
    plan.set_defaults(run=_plan)

    evaluate = commands.add_parser("evaluate", help="score a run's adapter, or any, on the held-out prompts")
    evaluate.add_argument("run_dir", nargs="?", metavar="RUN", help="a run directory")
    evaluate.add_argument("--adapter", metavar="PATH", help="a LoRA file or folder instead of the run's own")
    evaluate.add_argument("--experiment", metavar="FILE", help="the experiment that says how, when no RUN is given")
    evaluate.add_argument("--out", metavar="PNG", help="where the grid goes")
    evaluate.set_defaults(run=_evaluate)

    compare = commands.add_parser("compare", help="runs side by side: table and pictures")
    compare.add_argument("runs", nargs="+", metavar="RUN")
    compare.set_defaults(run=_compare)

    verdicts = commands.add_parser(
        "verdicts", help="read a run's verdicts: by step, by prompt, disagreements, unparsed"
    )
    verdicts.add_argument("run_dir", metavar="RUN")
    verdicts.add_argument("--step", type=int, help="only this training step")
    verdicts.add_argument("--prompt", metavar="ID", help="only this prompt")
    verdicts.add_argument("--show", choices=("all", "disagreements", "unparsed", "masked"), default="all")
    verdicts.add_argument("--limit", type=_count, default=20, help="rows at the most")
    verdicts.add_argument("--full", action="store_true", help="whole rationales")
    verdicts.set_defaults(run=_verdicts)

    for name, function, text in (
        ("report", _report, "write RUN/report.html anew"),
        ("status", _status, "what a run is doing"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("run_dir", metavar="RUN")
        command.set_defaults(run=function)
    return parser


def _count(text: str) -> int:
    """For argparse, which makes a message of the ValueError."""
    if (number := int(text)) < 0:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
