"""The judge's command line; further commands stand in `commands.py` and `training_commands.py`. Imports wait until needed."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

from reward_server import commands as preference_commands
from reward_server import training_commands
from reward_server.presets import PRESETS
from reward_server.serve import Hosted, VllmJudge, command, from_settings, refuse, start_here

DEFAULTS = VllmJudge()
PORT = 8000


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    # argparse would take vLLM's own flags, which follow "--", for this program's.
    own, _, extra = _split(given)
    arguments = _parser().parse_args(own)
    try:
        return arguments.run(arguments, extra)
    except ValueError as error:  # every message to the user is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a missing permission, a folder where a file was meant
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _split(words: list[str]) -> tuple[list[str], str, list[str]]:
    at = words.index("--") if "--" in words else len(words)
    return words[:at], "--", words[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m reward_server", description="Host a judge, or ask one.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _serve_arguments(commands.add_parser("serve", help="start vLLM with a judge, print its endpoint, stop on Ctrl-C"))
    _judge_arguments(commands.add_parser("judge", help="compare two pictures or videos and print a table"))
    preference_commands.add(commands)
    training_commands.add(commands)
    return parser


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Starts vLLM with the right flags for a judge. Words after -- go to vLLM as they are."
    parser.add_argument("--preset", default="", metavar="NAME", help=f"a released judge: {', '.join(PRESETS)}")
    parser.add_argument("--model", default="", help="a model folder or hub id, in place of the preset's")
    parser.add_argument("--served-name", default=DEFAULTS.served_name, help="the name that requests use (%(default)s)")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="servers, each with the whole model")
    parser.add_argument("--tensor-parallel", type=int, default=0, metavar="N", help="GPUs of one replica")
    parser.add_argument("--gpu", default="", metavar="0,1", help="which GPUs; without it the first that are needed")
    parser.add_argument("--device", default="auto", help="gpu, cpu, or auto: gpu where nvidia-smi is installed")
    parser.add_argument(
        "--host", default=DEFAULTS.host, help=f"beyond {DEFAULTS.host} only with ${DEFAULTS.api_key_env}"
    )
    parser.add_argument("--port", type=int, default=PORT, help="of the first replica (%(default)s); 0: any free ones")
    parser.add_argument("--max-model-len", type=int, default=0, metavar="N", help="tokens of a request and its reply")
    parser.add_argument(
        "--kv-cache-gb", type=int, default=DEFAULTS.kv_cache_gb, metavar="GB", help="on a CPU (%(default)s)"
    )
    parser.add_argument(
        "--cpu-threads", type=int, default=0, metavar="N", help="of a replica on a CPU; 1 for a tiny judge on few cores"
    )
    parser.add_argument(
        "--gpu-memory", type=float, default=DEFAULTS.gpu_memory, metavar="SHARE", help="on GPUs (%(default)s)"
    )
    parser.add_argument("--python", default=DEFAULTS.python, help="the Python that has vLLM (%(default)s)")
    parser.add_argument(
        "--ray-address", default="", metavar="HOST:PORT", help="make the replicas actors of this Ray cluster"
    )
    parser.add_argument(
        "--wait-s", type=float, default=DEFAULTS.wait_s, metavar="S", help="how long that cluster may take to have room"
    )
    parser.add_argument(
        "--start-s", type=float, default=DEFAULTS.start_s, metavar="S", help="how long the start may take"
    )
    parser.add_argument("--log-dir", default="", help="where vLLM's output goes; without it a new temporary folder")
    parser.add_argument("--dry-run", action="store_true", help="print vLLM's command line and stop")
    parser.add_argument("--settings", default="", help=argparse.SUPPRESS)  # a whole VllmJudge, from serve.py
    parser.add_argument("--ready-file", default="", help=argparse.SUPPRESS)
    parser.set_defaults(run=_serve)


def _judge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Asks a running judge which of two pictures or videos serves a prompt better."
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--prompt", required=True, help="what the generator was asked for")
    parser.add_argument("--family", default="flex", help="how the judge is asked (%(default)s); e.g. think, 2.0, edit")
    parser.add_argument("--endpoint", default=f"http://127.0.0.1:{PORT}/v1", metavar="URL", help="(%(default)s)")
    parser.add_argument("--model", default="", metavar="NAME", help="the served name; without it the first one listed")
    parser.add_argument("--prompt-file", default="", metavar="FILE", help="another wording of the instruction")
    parser.add_argument("--source", default="", metavar="FILE", help="the picture that was edited (family edit)")
    parser.add_argument(
        "--both-orders", action="store_true", help="ask again with B first: does the judge stay with it?"
    )
    parser.add_argument("--max-tokens", type=int, default=2048, metavar="N", help="longest reply (%(default)s)")
    parser.set_defaults(run=_judge)


# ---------------------------------------------------------------- judge


def _judge(arguments: argparse.Namespace, extra: list[str]) -> int:
    from reward_server.ask import FAMILIES, Comparison, compare

    if extra:
        raise ValueError(f"what is {extra[0]!r}? judge takes two files")
    if arguments.family not in FAMILIES:
        raise ValueError(f"no family {arguments.family!r}; there are {', '.join(FAMILIES)}")
    names = ("a", "b", "prompt", "family", "endpoint", "model", "prompt_file", "source", "both_orders", "max_tokens")
    return compare(Comparison(**{name: getattr(arguments, name) for name in names}), preference_commands.console())


# ---------------------------------------------------------------- serve


def _serve(arguments: argparse.Namespace, extra: list[str]) -> int:
    judge = from_settings(arguments.settings) if arguments.settings else _wanted(arguments, extra)
    refuse(judge)
    if arguments.dry_run:
        print(shlex.join(command(judge, judge.model or judge.settings().model, judge.port, judge.on_gpu())))
        return 0
    log_dir = Path(arguments.log_dir or tempfile.mkdtemp(prefix="grpo-flex-judge-"))
    _note(f"starting {judge.model or judge.settings().model}; vLLM's output goes to {log_dir}/judge_*.log")
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a background job of a shell is started deaf to it
        signal.signal(number, signal.default_int_handler)
    start = time.monotonic()
    hosted = _host(judge, log_dir)
    try:
        _announce(hosted, judge, arguments.ready_file, time.monotonic() - start)
        while hosted.alive():
            for loss in hosted.tend():
                _note(loss)
            time.sleep(1)
    except KeyboardInterrupt:
        _note("stopping")
        return 0
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave half a stop
        hosted.stop()
    raise ValueError("\n".join(["no replica is left", *hosted.tend()]))


def _wanted(arguments: argparse.Namespace, extra: list[str]) -> VllmJudge:
    shared = (
        "preset", "model", "served_name", "replicas", "tensor_parallel", "device", "host", "port", "max_model_len",
        "kv_cache_gb", "cpu_threads", "gpu_memory", "python", "ray_address", "wait_s", "start_s",
    )  # fmt: skip
    gpus = tuple(part.strip() for part in arguments.gpu.split(",") if part.strip())
    return VllmJudge(**{name: getattr(arguments, name) for name in shared}, gpus=gpus, extra=tuple(extra))


def _host(judge: VllmJudge, log_dir: Path) -> Hosted:
    if not judge.ray:
        return start_here(judge, log_dir)
    from reward_server.on_ray import RayJudge

    return RayJudge(judge, log_dir)


def _announce(hosted: Hosted, judge: VllmJudge, ready_file: str, seconds: float) -> None:
    """The endpoints go to standard output, one a line; everything else to standard error."""
    print("\n".join(hosted.endpoints), flush=True)
    one, *others = hosted.endpoints
    given = shlex.quote(str(hosted.endpoints)) if others else one
    _note(
        f"ready after {seconds:.0f} s. To ask it: python -m reward_server judge A.png B.png --prompt … --endpoint {one} "
        f"--family {judge.settings().family}. To train with it: judge.server=none judge.endpoints={given} "
        f"judge.model={judge.served_name}. Ctrl-C stops it."
    )
    if ready_file:
        part = Path(ready_file + ".part")
        part.write_text("\n".join(map(" ".join, zip(hosted.endpoints, hosted.reserved, strict=True))))
        os.replace(part, ready_file)  # whoever waits for the file finds it whole


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
