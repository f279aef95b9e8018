"""From a configuration to a finished run directory: checks first, then the place in Ray, the models and the judge, and the loop."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from grpo_flex import checkpoint, verdicts
from grpo_flex.config import ConfigError, Judge, RunConfig
from grpo_flex.config_file import to_json
from grpo_flex.copied_run import check_writable, is_copy, reason
from grpo_flex.generators.encodings import report
from grpo_flex.metrics import METRICS, last_logged
from grpo_flex.mirror import Mirror
from grpo_flex.prompts import PromptStream, read_prompts
from grpo_flex.room import apart, check_room
from grpo_flex.run_dir import (
    basis_of,
    check_alone,
    check_basis,
    check_space,
    claimed,
    fetch,
    has_metrics,
    new_run_dir,
    rewrite,
    say,
)
from grpo_flex.types import Adapter

if TYPE_CHECKING:
    from ray.exceptions import RayError

    from grpo_flex.cluster import Cluster
    from grpo_flex.console import Console
    from grpo_flex.fleet import Stranded
    from grpo_flex.judge_server import JudgeServer
    from grpo_flex.train import Trainer
    from grpo_flex.types import Prompt

RESUME_ME = 75
"""Exit status of an interrupted run (EX_TEMPFAIL): everything is saved, start it again with --resume."""
MEND_FIRST = 1
"""Exit status of a run that gave up: everything is saved, but with --resume alone it would end so again."""


def train(config: RunConfig, resume: Path | None = None, where: str = "") -> int:
    """Run an experiment to its end, or until it is interrupted. Returns the process's exit status.

    Args:
        resume: the directory of the run that goes on.
        where: what names that run; if it is a copy, it is brought back first.

    Raises:
        ConfigError, CheckpointError, MirrorError: nothing was started and nothing is left behind.
        KeyboardInterrupt: a Ctrl-C outside of the loop, or a SIGTERM where nothing can be resumed.
    """
    signals = _Signals()
    signals.heed()
    try:
        if resume and where:
            fetch(where, resume)
        with ExitStack() as held:
            if resume:
                held.enter_context(claimed(resume))
            return _train(config, resume, signals, held)
    except KeyboardInterrupt:
        there = resume if resume and checkpoint.complete(resume) else where if where and is_copy(where) else None
        if not (signals.terminated and there):
            raise
        say(f"stopped on request; the last checkpoint stands: python -m grpo_flex train --resume {there}")
        return RESUME_ME
    finally:
        signals.leave()


def _train(config: RunConfig, resume: Path | None, signals: _Signals, held: ExitStack) -> int:
    config.validate()
    to_json(config)  # refuses, before anything is started, what a resume could not read back
    heldout = read_prompts(config.prompts.heldout, "prompts.heldout")
    training = read_prompts(config.prompts.train, "prompts.train")
    prompts = PromptStream(training, config.prompts.per_step, config.seed)
    if resume:
        check_alone(resume)
    done, state = checkpoint.load(resume) if resume else (0, None)
    basis = basis_of(config, prompts.prompts, heldout)
    if resume and state:
        check_basis(resume, done, state.get("basis", {}), basis)  # checkpoints of earlier versions hold none
    if resume and state and last_logged(resume / METRICS) >= done:  # it was evaluated after that checkpoint
        state.pop(checkpoint.PENDING, None)
    over = done >= config.steps and checkpoint.PENDING not in (state or {})
    if over and resume and _is_exported(resume, config):
        raise ConfigError(f"{resume} has completed its {done} steps; to go on, give a larger number: steps={2 * done}")
    if resume:
        check_space(resume, "then --resume")
    quieten()
    config.generator.check([*training, *heldout])
    check_room(config, say)
    if place := config.checkpoint.mirror:
        check_writable(place)
    with ExitStack() as stack:
        run_dir = resume or stack.enter_context(new_run_dir(config))
        if not resume:
            held.enter_context(claimed(run_dir))
        mirror = stack.enter_context(Mirror(place, run_dir, say)) if place else None
        if over:
            assert state is not None
            say(
                f"{run_dir} has completed its {done} steps, but its {config.adapter.folder} is missing or older; exporting …"
            )
            _export_only(stack, config, run_dir, done, state, signals)
            status = 0
        else:
            say(f"{'resuming' if resume else 'starting'} {run_dir}: judge, rollout workers and learner …")
            trainer = _assemble(stack, config, run_dir, prompts, heldout, done, state, basis, signals)
            if mirror is not None:
                trainer.mirror, mirror.say = mirror, trainer.console.note
            status = _run_to_the_end(trainer)
        signals.over = True
    _finish(run_dir, config, status, mirror)
    return status


class _Signals:
    """Outside of the loop, which has its own handlers, a SIGTERM unwinds like a Ctrl-C and leaves nothing half made."""

    def __init__(self) -> None:
        self.terminated = False
        """Whether it was a SIGTERM: Ray replaces an exception that meets it by a plain KeyboardInterrupt."""
        self.over = False
        """Whether the run ends anyhow: then a SIGTERM asks for nothing more."""
        self._before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]

    def heed(self) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell is started deaf to it
        signal.signal(signal.SIGTERM, self._terminate)

    def leave(self) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if not self.over:
            self.terminated = True
            raise KeyboardInterrupt


def _assemble(
    stack: ExitStack,
    config: RunConfig,
    run_dir: Path,
    prompts: PromptStream,
    heldout: Sequence[Prompt],
    done: int,
    state: dict[str, Any] | None,
    basis: Mapping[str, str],
    signals: _Signals,
) -> Trainer:
    """Start everything; the stack stops it again in reverse order. Heavy imports happen here."""
    from grpo_flex.cluster import Cluster
    from grpo_flex.console import Console
    from grpo_flex.fleet import DIED, Stranded
    from grpo_flex.judge_server import gpus_of
    from grpo_flex.metrics import RunLog
    from grpo_flex.pictures import fps_of
    from grpo_flex.placement import Reservation, in_all, seats
    from grpo_flex.train import Trainer

    judge, endpoints = config.judge, ()
    if judge is not None and judge.server is None:
        endpoints = _check_judge(judge, judge.endpoints)
    taken, needed = gpus_of(judge), in_all(seats(config), "GPU")
    left = apart(config, taken, needed, say)
    reserved = stack.enter_context(Reservation(config, left))  # before a judge is started, which takes minutes
    signals.heed()  # Ray has its own idea of SIGTERM
    start = partial(_judge_server, judge, run_dir)
    # On a GPU of the others' a judge comes first, because it takes a share of what it finds free; else they load beside it.
    # One that does not say which it takes may take any.
    shares = not left and (taken or (judge is not None and not hasattr(judge.server, "gpus_here")))
    first = stack.enter_context(start()) if needed and shares else None
    cluster = stack.enter_context(Cluster(config, reserved))
    server = first or stack.enter_context(start())
    if judge is not None and server is not None:
        endpoints = _check_judge(judge, server.endpoints)
    cluster.ask(endpoints, run_dir)
    try:
        cluster.wait_until_ready()
        cluster.prepare([*prompts.prompts, *heldout])
    except (*DIED, Stranded) as error:
        then = f"python -m grpo_flex train --resume {run_dir}" if state is not None else "start the run anew"
        raise ValueError(f"{_died(error)}\nonce the cause is gone: {then}") from error
    if kept := config.generator.memory.encodings:
        say(report(kept))
    if state is not None:  # a checkpoint that does not fit is refused here, before any file is touched
        cluster.load_learner_state(state)
    pending = (state or {}).get(checkpoint.PENDING)
    evaluation = done + 1 if pending is None else done
    verdicts.drop_from_step(run_dir / verdicts.FILE_NAME, done + 1, evaluation)
    rewrite(run_dir / "config.json", to_json(config))
    at = done if state else None
    log = stack.enter_context(RunLog(run_dir, config, at, fps_of(config.generator), pending is not None))
    shown = done if pending is None else done - 1
    console = stack.enter_context(Console(config.steps, shown, run_dir.name, run_dir=run_dir))
    cluster.say = console.note
    judges = zip(endpoints, server.reserved if server else ["-"] * len(endpoints), strict=True)
    _show_seating([*cluster.seating(), *(("judge", *judge) for judge in judges)], run_dir, console)
    ahead = [Adapter(version=version, tensors=tensors) for version, tensors in (state or {}).get("ahead", ())]
    return Trainer(
        config, cluster, log, console,
        prompts=prompts, heldout=heldout, step=done, server=server, ahead=ahead, basis=basis,
        pending=pending,
    )  # fmt: skip


def _export_only(
    stack: ExitStack, config: RunConfig, run_dir: Path, done: int, state: dict[str, Any], signals: _Signals
) -> None:
    """Write what a completed run did not come to write; of its processes only the learners are started.

    Raises:
        ValueError: a learner failed.
    """
    from ray.exceptions import RayError

    from grpo_flex.cluster import Cluster
    from grpo_flex.console import Console
    from grpo_flex.placement import Reservation

    place = replace(config.placement, rollout_workers=0, rollout_workers_max=0)
    alone = replace(config, judge=None, placement=place, scorers=(), sampling=replace(config.sampling, batch_tokens=0))
    reserved = stack.enter_context(Reservation(alone))
    signals.heed()  # Ray has its own idea of SIGTERM
    cluster = stack.enter_context(Cluster(alone, reserved))
    console = stack.enter_context(Console(config.steps, done, run_dir.name, run_dir=run_dir))
    cluster.say = console.note
    try:
        cluster.wait_until_ready()
        cluster.load_learner_state(state)
        _export(cluster, run_dir, config)
    except RayError as error:
        again = f"python -m grpo_flex train --resume {run_dir}"
        raise ValueError(f"{_died(error)}\nnothing was exported; once the cause is gone: {again}") from error


def _export(cluster: Cluster, run_dir: Path, config: RunConfig) -> None:
    """Write the result's files, as a whole or not at all: what is there already is whole."""
    folder = run_dir / config.adapter.folder
    aside = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        cluster.save_adapter(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_exported(run_dir: Path, config: RunConfig) -> bool:
    """Whether the result is that of the newest checkpoint, which is written first."""
    written = [file.stat().st_mtime_ns for file in (run_dir / config.adapter.folder).rglob("*") if file.is_file()]
    saved = [file.stat().st_mtime_ns for file in checkpoint.complete(run_dir)[-1].iterdir()]
    return min(written, default=0) >= max(saved)


def _show_seating(seating: Sequence[tuple[str, str, str]], run_dir: Path, console: Console) -> None:
    """Print who sits where, and keep it in placement.txt."""
    rows = [("process", "node", "reserved"), *seating]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = "\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows)
    (run_dir / "placement.txt").write_text(table + "\n")
    console.note(table)


def _run_to_the_end(trainer: Trainer) -> int:
    """The exit status.

    Raises:
        _Failure: a process of the run failed, or its files cannot be written; what could be saved is saved.
        Exception: what the experiment's own code raised, after the same.
    """
    try:
        return _to_the_end(trainer)
    except OSError as error:  # a full disk, a permission that was lost
        raise _failure(trainer, error) from error
    except _Failure:
        raise
    except Exception:
        if trainer.step:
            trainer.console.note(_kept(trainer))
        raise


def _to_the_end(trainer: Trainer) -> int:
    from ray.exceptions import RayError

    from grpo_flex.fleet import Stranded
    from grpo_flex.judge_server import JudgeAway, JudgeUseless
    from grpo_flex.train import SIGNAL_S, Interrupted, Starved, signals

    status = 0
    with signals(trainer):
        try:
            trainer.run()
            _export(trainer.cluster, trainer.log.run_dir, trainer.config)
        except (Interrupted, JudgeAway, Starved, Stranded) as reason:
            trainer.console.note(f"stopped: {reason}" if str(reason) else "stopped on request")
            hopeless = isinstance(reason, Starved | Stranded | JudgeUseless) and not trainer.stopping(SIGNAL_S)
            status = MEND_FIRST if hopeless else RESUME_ME
        except RayError as error:
            if not trainer.stopping(SIGNAL_S):
                raise _failure(trainer, error) from error
            trainer.console.note("stopped on request")
            status = RESUME_ME
        if status and not _saved(trainer):
            return status
        trainer.cluster.close_judge()
    return status


def _saved(trainer: Trainer) -> bool:
    """Save the completed steps and export the adapter; False where the processes that this needs have ended, or are busy."""
    from ray.exceptions import RayError

    try:
        where = trainer.save()
    except RayError:
        trainer.console.note("the learner has ended too; the last checkpoint stands")
        return False
    try:
        _export(trainer.cluster, trainer.log.run_dir, trainer.config)
    except RayError:
        trainer.console.note(
            f"the learner has ended too, or is busy; {where} is complete, the exported adapter is an older one"
        )
        return False
    return True


class _Failure(ValueError):
    """A run that ended; the message says why, what is kept and how to go on."""


def _failure(trainer: Trainer, error: RayError | OSError) -> _Failure:
    """What the user is told of what ended the run; the completed steps are saved where that is possible."""
    return _Failure(f"{_died(error)}\n{_kept(trainer)}")


def _died(error: RayError | OSError | Stranded) -> str:
    """What went wrong, in words."""
    from ray.exceptions import ObjectLostError, RayError, RayTaskError

    from grpo_flex.fleet import Stranded

    if isinstance(error, Stranded):
        return str(error)
    cause = error.cause if isinstance(error, RayTaskError) else error
    died = isinstance(cause, RayError)
    what = f"a process of the run died: {_first_line(cause)}" if died else f"{type(cause).__name__}: {cause}"
    if isinstance(cause, ObjectLostError):
        what = "a node has ended with something on it that nobody else has: an adapter, or the learners' newest state"
    return what


def _kept(trainer: Trainer) -> str:
    """Save the completed steps, if that is possible; what is kept, and how to go on."""
    from ray.exceptions import RayError

    run_dir = trainer.log.run_dir
    try:
        trainer.save()
        kept = "the completed steps are kept"
        if trainer.evaluates_on_resume:
            kept += f" (step {trainer.step} is still to be evaluated)"
        elif trainer.log.last_step < trainer.step:
            kept += f" (the line of step {trainer.step} in metrics.jsonl is lost)"
    except (RayError, checkpoint.CheckpointError, OSError):  # nobody has the state any more, or it cannot be written
        kept = "nothing more could be saved; the last checkpoint stands"
    if not (has_metrics(run_dir) and checkpoint.complete(run_dir)):
        return "no step was saved; once the cause is gone, start the run anew"
    then = " exports the result" if trainer.step >= trainer.config.steps else ""
    return f"{kept}; once the cause is gone: python -m grpo_flex train --resume {run_dir}{then}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _finish(run_dir: Path, config: RunConfig, status: int, mirror: Mirror | None) -> None:
    from grpo_flex.report import write_report
    from grpo_flex.status import summary

    try:
        write_report(run_dir)
    except Exception as error:  # the run is complete or saved, whatever its pictures are like
        say(f"the report could not be written ({reason(error)}); python -m grpo_flex report {run_dir} makes it")
    if mirror is not None:
        mirror.finish()
    again = f"python -m grpo_flex train --resume {run_dir}"
    summary(run_dir, again + (f" steps={2 * config.steps}" if status == 0 else ""), stopped=status != 0)


def _judge_server(judge: Judge | None, run_dir: Path) -> AbstractContextManager[JudgeServer | None]:
    """The judge that the run starts for itself, if it does."""
    from grpo_flex.judge_server import JudgeServer

    return (
        nullcontext() if judge is None or judge.server is None else JudgeServer(judge.server, run_dir, judge.restarts)
    )


def _check_judge(judge: Judge, endpoints: tuple[str, ...]) -> tuple[str, ...]:
    """These endpoints; each was asked once for its models.

    Raises:
        JudgeUnreachable: none can be used.
    """
    from grpo_flex.judging import check_endpoints

    for complaint in check_endpoints(endpoints, judge.model, _auth(judge)):
        say(f"warning: {complaint}; going on with the other judges")
    return endpoints


def _auth(judge: Judge) -> dict[str, str]:
    key = os.environ.get(judge.api_key_env, "")
    if not re.fullmatch("[!-~]*", key):  # the client's own complaint would show it
        raise ConfigError(
            f"the environment variable {judge.api_key_env} (judge.api_key_env) holds a space, the end of a line or another "
            "character that no API key has"
        )
    return {"Authorization": f"Bearer {key}"} if key else {}


def quieten() -> None:
    """Libraries' progress bars and hints are not this program's; they inherit to Ray's workers."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of a call that is made again; all others are raised where they are waited for
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray announces a coming change of this default on every start
    "WANDB_SILENT": "true",
}
