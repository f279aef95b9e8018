"""Where a run lives: a directory that is new, one that goes on, or one that is brought back from a copy."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from grpo_flex import checkpoint
from grpo_flex.config import ConfigError, RunConfig
from grpo_flex.config_file import from_json
from grpo_flex.copied_run import MANIFEST, Copy, MirrorError, is_copy, locked, newest_step, problem, reason, record
from grpo_flex.overrides import override
from grpo_flex.prompts import fingerprint
from grpo_flex.status import Elsewhere, running_pid
from grpo_flex.types import Prompt

CLAIM_S = 5.0
"""For so long a run that has ended, and whose process has not yet, is waited for."""
SPACE_MB = 256
"""Free space below which no run is started or resumed."""


def resumed_config(run_dir: Path, overrides: Sequence[str]) -> RunConfig:
    """The configuration of an earlier run, with overrides on top.

    Raises:
        ConfigError: the folder is no run.
    """
    path = run_dir / "config.json"
    if not path.is_file():
        raise ConfigError(f"'{run_dir}' is no run directory (it has no config.json); give one like runs/shapes_image")
    return override(from_json(path.read_text()), overrides)


def resumed(where: str, overrides: Sequence[str]) -> tuple[Path, RunConfig]:
    """The directory and the configuration of an earlier run; a copy's directory is not there before ``fetch``.

    Raises:
        ConfigError, MirrorError: ``where`` is neither a run nor a copy of one, or the directory holds something else.
    """
    if not is_copy(where):
        return Path(where), resumed_config(Path(where), overrides)
    for complaint in problem(where):
        raise ConfigError(f"--resume {complaint}")
    copy = Copy.at(where)
    mirror, _, name = copy.url.rpartition("/")
    overrides = [f"checkpoint.mirror={mirror}", *overrides]
    config = override(from_json(copy.config()), overrides)
    run_dir = Path(config.runs_dir) / name
    return run_dir, resumed_config(run_dir, overrides) if copy.is_here(run_dir) else config


def newest(config: RunConfig) -> str:
    """Where the newest run of that name can be resumed: ``runs_dir``, or else the mirror; "" where there is none.

    Raises:
        MirrorError: the mirror cannot be read.
    """
    numbered = re.compile(re.escape(config.name) + r"(?:-(\d+))?")
    there = Path(config.runs_dir)
    runs = [path for path in there.glob("*") if numbered.fullmatch(path.name) and checkpoint.complete(path)]
    here = max(runs, key=lambda path: checkpoint.complete(path)[-1].stat().st_mtime_ns, default=None)
    if not (place := config.checkpoint.mirror):
        return str(here or "")
    copy = Copy.at(place)
    try:
        found = [Path(path).parent.name for path in copy.fs.glob(copy.path(f"{config.name}*/{MANIFEST}"))]
    except Exception as error:  # each back-end has errors of its own
        raise MirrorError(f"{place} cannot be read ({reason(error)})") from error
    copies = {int(match[1] or 1): name for name in found if (match := numbered.fullmatch(name))}
    last = copies[max(copies)] if copies else ""
    match = numbered.fullmatch(here.name) if here else None
    if here is None or match is None or (last and max(copies) > int(match[1] or 1) and not (there / last).exists()):
        return f"{place.rstrip('/')}/{last}" if last else ""
    if here.name in copies.values():
        _set_aside_if_older(here, f"{place.rstrip('/')}/{here.name}")
    return str(here) if here.exists() else f"{place.rstrip('/')}/{here.name}"


def _set_aside_if_older(run_dir: Path, url: str) -> None:
    """Rename a directory whose run has gone on elsewhere, as its copy says: on a node's own disk that is what comes back to it."""
    manifest = Copy.at(url).manifest()
    if manifest is None or record(run_dir).get("run") != manifest.run or newest_step(run_dir) >= manifest.step:
        return
    aside = _make_unused(run_dir.with_name(f"{run_dir.name}.older"), lambda _: False)
    run_dir.rename(aside)
    say(
        f"{run_dir} had come to step {newest_step(aside)}, and its copy {url} to step {manifest.step}: renamed to {aside}"
    )


def fetch(where: str, run_dir: Path) -> None:
    """Bring the run's directory back if ``where`` names a copy and it is not there already."""
    if not is_copy(where):
        return
    if run_dir.exists():
        say(f"{run_dir} is as new as {where}, or newer; nothing has to be brought back")
        return
    say(f"bringing {run_dir} back from {where} …")
    Copy.at(where).bring_back(run_dir)


def check_alone(run_dir: Path) -> None:
    """Refuse to go on beside a process that works on the run. Where its host may be gone, wait for another sign of it.

    Raises:
        ConfigError: it goes on.
    """
    try:
        pid = running_pid(run_dir)
    except Elsewhere as error:  # a scheduler that starts a lost job again does so at once
        say(f"{run_dir} gave a sign on another host a moment ago; waiting {error.left_s:.0f} s for another one …")
        time.sleep(error.left_s + 1)
        try:
            pid = running_pid(run_dir)
        except Elsewhere as later:
            if later.sign != error.sign:
                raise
            pid = None
    if pid:
        raise ConfigError(f"{run_dir} is still running (process {pid}); stop it first, or wait until it has ended")


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Hold a run's directory, from before anything is started to the last copy: of two processes here one is refused.

    Raises:
        ConfigError: another process holds it.
    """
    handle = os.open(run_dir, os.O_RDONLY)
    try:
        until = time.monotonic() + CLAIM_S
        while not locked(handle):
            check_alone(run_dir)  # which knows the process, once the run has told where it stands
            if time.monotonic() > until:
                raise ConfigError(
                    f"another process is starting or ending {run_dir}; stop it first, or wait until it has ended"
                )
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def basis_of(config: RunConfig, train: Sequence[Prompt], heldout: Sequence[Prompt]) -> dict[str, str]:
    """What every step of a run has to have in common, by field: with another, a resume would be another run."""
    return {
        "seed": str(config.seed),
        "generator.model": Path(getattr(config.generator, "model", "")).name,  # it may lie elsewhere on another machine
        **_spelt("generator", config.generator, SAMPLED),
        "adapter": type(config.adapter).__name__,
        **_spelt("adapter", config.adapter, SHAPED),
        "prompts.per_step": str(config.prompts.per_step),
        "prompts.train": fingerprint(train),
        "prompts.heldout": fingerprint(heldout),
    }


SAMPLED = ("height", "width", "frames", "guidance", "guidance_2", "boundary", "negative")
"""Of a generator: with others its samples are not those that the adapter was trained on."""
SHAPED = ("rank", "alpha", "targets")
"""Of an adapter: with others the weights of a checkpoint do not fit, or mean something else."""


def _spelt(name: str, part: object, names: Sequence[str]) -> dict[str, str]:
    values = {f"{name}.{of}": getattr(part, of) for of in names if hasattr(part, of)}
    # 64 and 64.0 are one number, whoever wrote it: an experiment, a command line, a JSON file.
    return {of: f"{value:.12g}" if isinstance(value, int | float) else repr(value) for of, value in values.items()}


def check_basis(resume: Path, done: int, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to go on with other prompts, seeds or weights than a checkpoint was made with.

    Raises:
        ConfigError: with every field that differs.
    """
    changed = [f"{name} is now {now[name]}, and was {old}" for name, old in before.items() if now.get(name, old) != old]
    if changed:
        changed.append(
            f"the {done} steps of {resume} were made with the old, so with the new it would be another run under the same "
            "name: give it what it had, or start a new run, without --resume"
        )
        raise ConfigError("\n".join(changed))


@contextmanager
def new_run_dir(config: RunConfig) -> Iterator[Path]:
    """runs/<name>, or runs/<name>-2 … if that exists, here or in the mirror; removed again if no step 0 was ever logged in it.

    Raises:
        ConfigError: no permission or too little space below ``runs_dir``.
    """
    parent = Path(config.runs_dir)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        check_space(parent, "or give another place with runs_dir=…")
        run_dir = _make_unused(parent / config.name, partial(_is_copied, config.checkpoint.mirror))
    except OSError as error:
        raise ConfigError(
            f"runs_dir '{parent}' cannot be written to ({error.strerror}); give another place with runs_dir=…"
        ) from error
    try:
        yield run_dir
    finally:
        if not has_metrics(run_dir):
            shutil.rmtree(run_dir)


def check_space(folder: Path, way_out: str) -> None:
    """Raise ConfigError where a run would soon have no room."""
    free = shutil.disk_usage(folder).free // 2**20
    if free < SPACE_MB:
        raise ConfigError(
            f"runs_dir: '{folder}' has {free} MB free; a run needs at least {SPACE_MB} MB for pictures, verdicts and "
            f"checkpoints: free some, {way_out}"
        )


def rewrite(path: Path, text: str) -> None:
    """Replace a file as a whole: after a kill or on a full disk it is the old one. It stays where nothing changes."""
    if path.is_file() and path.read_text() == text:
        return
    half = path.with_name(f".{path.name}.part")
    with half.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def has_metrics(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0


def _is_copied(mirror: str, name: str) -> bool:
    """Whether the mirror has a run of that name, which a new one would take the place of."""
    return bool(mirror) and Copy.at(f"{mirror.rstrip('/')}/{name}").manifest() is not None


def _make_unused(path: Path, taken: Callable[[str], bool]) -> Path:
    """Make ``path``, or path-2, path-3 …, whichever is free first; safe against a run that starts at the same moment."""
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        if taken(candidate.name):
            continue
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("count never ends")


def say(text: str) -> None:
    """To whoever started the run, before there is a console."""
    print(text, flush=True)
