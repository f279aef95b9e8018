"""A run's numbers and pictures: ``metrics.jsonl``, ``samples/`` and Weights & Biases.

The files in the run's directory are the truth; W&B shows the same numbers. Every key carries its section's
prefix ("reward/mean", "heldout/oracle", "perf/rollout_s"), which is also the name of its panel group in W&B.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from grpo_flex import pictures
from grpo_flex.config import Wandb
from grpo_flex.config_file import to_json
from grpo_flex.types import Sample

if TYPE_CHECKING:
    import numpy as np
    import wandb

Row = dict[str, float | None]
"""One line of metrics.jsonl: "step" and the numbers, None where a number was NaN or infinite."""

METRICS = "metrics.jsonl"
SUMMARIES = {
    "heldout": "max,last",
    "reward": "last",
    "advantage": "mean",
    "policy": "last",
    "steps": "last",
    "judge": "mean",
    "scorer": "mean",
    "perf": "mean",
}
"""W&B section -> which figures of a curve stand for the run in the table of runs."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictRow:
    """One row of the table prompt · picture · score · verdict."""

    prompt: str
    media: np.ndarray
    """uint8 [F, H, W, 3]."""
    score: float
    verdict: str


# ---------------------------------------------------------------- reading


def read_metrics(run_dir: str | Path) -> list[Row]:
    """Every line of a run's metrics.jsonl, in order; empty before the first step.

    A last line that a kill cut short is left out.

    Raises:
        ValueError: ``run_dir`` is no run's directory, or a line other than the last is damaged.
    """
    run_dir = check_run(run_dir)
    path = run_dir / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is not JSON ({error}); remove that line") from error
    return rows


def check_run(run_dir: str | Path) -> Path:
    """The directory as a Path.

    Raises:
        ValueError: it does not exist, or holds neither config.json nor metrics.jsonl.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"there is no run '{run_dir}': no such directory")
    if not any((run_dir / name).is_file() for name in ("config.json", METRICS)):
        raise ValueError(f"'{run_dir}' is not a run: it holds neither config.json nor {METRICS}")
    return run_dir


def read_settings(run_dir: Path) -> dict[str, Any]:
    """The run's config.json as it stands there, whatever classes it names; {} without one.

    Raises:
        ValueError: it holds something else than an object.
    """
    path = run_dir / "config.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is no configuration of a run: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"'{path}' is no configuration of a run: it holds no object")
    return settings


def curve(rows: Iterable[Row], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, without the steps that lack it."""
    points = [(int(row["step"] or 0), value) for row in rows if (value := row.get(key)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def keys_of(rows: Iterable[Row], section: str = "") -> list[str]:
    """Names of all metrics (of a section), in order of appearance."""
    found = {key: None for row in rows for key in row if key != "step" and key.startswith(section)}
    return list(found)


def headline_key(rows: Iterable[Row]) -> str | None:
    """The held-out score that stands for the run: heldout/oracle, or else the first there is."""
    scores = {key.removeprefix("heldout/"): 0.0 for key in keys_of(rows, "heldout/")}
    name = pictures.main_score(scores)
    return None if name is None else f"heldout/{name}"


def step_seconds(row: Row) -> float | None:
    """Wall-clock seconds of a step: perf/step_s where it was measured, else the sum of the phases."""
    if row.get("perf/step_s") is not None:
        return row["perf/step_s"]
    phases = phase_seconds(row)
    return sum(phases.values()) if phases else None


def phase_seconds(row: Row | Mapping[str, float]) -> dict[str, float]:
    """Phase -> seconds, of one step; the step as a whole is no phase."""
    found = {k[len("perf/") : -2]: v for k, v in row.items() if k.startswith("perf/") and k.endswith("_s")}
    return {name: value for name, value in found.items() if value is not None and name != "step"}


# ---------------------------------------------------------------- writing


class RunLog:
    """Writes a run's metrics and samples as they come.

    Args:
        run_dir: The run's directory; made if it is missing.
        config: The RunConfig. ``wandb`` and ``evaluation.grid`` are read, the whole is shown in W&B.
        resume_step: The checkpoint's step when a run continues: later lines are dropped, because the run
            takes those steps again. None for a new run.
        fps: Frames per second of clips in mp4 files.
        pending: Whether the checkpoint's step is still to get its line.

    W&B that cannot start, or fails later, costs a warning, never the run.

    Raises:
        ValueError: a new run in a directory that has metrics already.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: Any,
        resume_step: int | None = None,
        fps: float = pictures.FPS,
        pending: bool = False,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._fps = fps
        self._grid: int = config.evaluation.grid
        path = self.run_dir / METRICS
        # W&B keeps what it was sent. Steps that a killed run took beyond its checkpoint are taken again, with
        # the same numbers, so sending them twice would only double the points.
        self._sent = last_logged(path) if resume_step is not None else -1
        if resume_step is not None:
            truncate(path, resume_step)
        self._last = last_logged(path)
        last = (resume_step or 0) - pending
        if resume_step is not None and self._last < last:
            missing = f"{self._last + 1} to {last}" if self._last + 1 < last else f"{last}"
            _log.warning(
                "%s has no line of step %s: lost, before it reached the disk; curves have a gap", path, missing
            )
        if resume_step is None and self._last >= 0:
            raise ValueError(f"'{run_dir}' holds a run already; resume it, or give this one another name")
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._wandb = _WandbRun.start(self.run_dir, config)

    @property
    def last_step(self) -> int:
        """The last step that has its line; -1 before the first."""
        return self._last

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append one line: {"step": step, **numbers}. NaN and infinity become null, which JSON can hold.

        The line is on the disk afterwards, so that a loss of power leaves no checkpoint whose steps have none.

        Raises:
            ValueError: ``step`` already has its line.
            OSError: no space or no permission.
        """
        if step <= self._last:
            raise ValueError(f"step {step} is already in {METRICS} (last: {self._last}); a step has one line")
        row = {"step": step} | {key: _finite(value) for key, value in numbers.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._last = step
        self._send(step, lambda: {key: value for key, value in row.items() if value is not None})

    def samples(self, step: int, samples: Sequence[Sample], baseline: Sequence[Sample] | None = None) -> None:
        """Write samples/step_<n>.png and, against the base model's samples, samples/before_after.png.

        Clips are also written as mp4. ``baseline`` may be left out: the run's first samples, which are kept
        in samples/before/, stand in, also after a resume. At most ``evaluation.grid`` samples are drawn.
        """
        samples = samples[: self._grid]
        if not samples:
            return
        folder = self.run_dir / "samples"
        path = folder / f"step_{step:05d}"
        media = {"media/samples": pictures.write_samples(path, samples, f"step {step}", self._fps)[0]}
        pairs = pictures.match(self._before(folder, step, samples, baseline), samples)
        if pairs:
            pictures.save_set(folder, "after", samples)
            title = f"before training · after step {step}"
            drawn = pictures.write_before_after(folder / "before_after", pairs, title, self._fps)
            media["media/before_after"] = drawn[0]
        self._send(step, lambda: {key: self._medium(path) for key, path in media.items()})

    def _before(
        self, folder: Path, step: int, samples: Sequence[Sample], baseline: Sequence[Sample] | None
    ) -> Sequence[Sample]:
        """The base model's samples; none when ``samples`` are those themselves."""
        if step > 0 and baseline is None and (kept := pictures.load_set(folder, "before")):
            return kept
        first = samples if baseline is None else baseline[: self._grid]
        pictures.save_set(folder, "before", first)
        return [] if baseline is None else first

    def verdict_table(self, step: int, rows: Sequence[VerdictRow]) -> None:
        """Show a table prompt · picture · score · verdict in W&B (the run's directory has every verdict)."""
        if rows:
            self._send(step, lambda: {"media/verdicts": self._table(rows)})

    def close(self) -> None:
        """Finish the W&B run; the log takes no more lines."""
        with suppress(OSError):  # only a line whose writing has failed before is still to be written
            self._file.close()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:  # as in ``_send``
                self._lose(error)
            self._wandb = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, step: int, values: Callable[[], Mapping[str, Any]]) -> None:
        """Show values in W&B, which is only for a reader: once it fails, the run goes on without it."""
        if self._wandb is None or step <= self._sent:
            return
        try:
            self._wandb.log(step, values())
        except Exception as error:  # each of its layers has errors of its own
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        """Its process may be dead: whoever stops a job, as ``ray job stop`` does, may send SIGTERM to that one too."""
        _log.warning("W&B has failed (%s); going on without it, see %s for the numbers", _reason(error), METRICS)
        if self._wandb is not None:
            self._wandb.abandon()
            self._wandb = None

    def _table(self, rows: Sequence[VerdictRow]) -> Any:
        import wandb

        data: list[Any] = [[row.prompt, self._picture(row.media), _finite(row.score), row.verdict] for row in rows]
        return wandb.Table(columns=["prompt", "picture", "score", "verdict"], data=data)

    def _medium(self, path: Path) -> Any:
        import wandb

        return wandb.Video(str(path), format="mp4") if path.suffix == ".mp4" else wandb.Image(str(path))

    def _picture(self, media: np.ndarray) -> Any:
        import numpy as np
        import wandb

        if len(media) == 1:
            return wandb.Image(pictures.scaled(media[0]))
        half = self.run_dir / "samples" / ".verdict.mp4"
        half.parent.mkdir(exist_ok=True)
        frames = [np.asarray(pictures.scaled(frame)) for frame in media]
        pictures.write_mp4(half, [f[: len(f) // 2 * 2, : f.shape[1] // 2 * 2] for f in frames], self._fps)
        film = io.BytesIO(half.read_bytes())
        half.unlink()
        return wandb.Video(film, format="mp4")


def truncate(path: Path, step: int) -> None:
    """Atomically reduce a metrics file to the lines of steps up to ``step``; a damaged last line goes too."""
    if not path.is_file():
        return
    kept = [json.dumps(row) + "\n" for row in read_metrics(path.parent) if (row["step"] or 0) <= step]
    half = path.with_name(f".{path.name}.part")
    with half.open("w", encoding="utf-8") as file:
        file.write("".join(kept))
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)


def last_logged(path: Path) -> int:
    """The step of the last line of a metrics.jsonl; -1 where there is none."""
    rows = read_metrics(path.parent) if path.is_file() else []
    return int(rows[-1]["step"] or 0) if rows else -1


def _finite(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------- Weights & Biases


class _WandbRun:
    """One W&B run whose axis is the training step and whose files stay in the run's directory."""

    def __init__(self, run: wandb.Run, staging: str):
        self._run = run
        self._staging = staging
        run.define_metric("step", hidden=True)
        for section, summary in SUMMARIES.items():
            run.define_metric(f"{section}/*", step_metric="step", summary=summary)
        run.define_metric("media/*", step_metric="step")

    @classmethod
    def start(cls, run_dir: Path, config: Any) -> _WandbRun | None:
        """The run in the configured mode, offline where online fails, None where W&B cannot start at all."""
        mode = wandb_mode(config.wandb)
        for attempt in {"online": ("online", "offline"), "disabled": ()}.get(mode, ("offline",)):
            try:
                return cls._start(run_dir, config, attempt)
            except Exception as error:  # each of its layers has errors of its own
                way_out = "logging offline instead" if attempt == "online" else f"see {METRICS} for the numbers"
                _log.warning("W&B cannot start %s (%s); %s", attempt, _reason(error), way_out)
                _end_service()
        return None

    @classmethod
    def _start(cls, run_dir: Path, config: Any, mode: str) -> _WandbRun:
        import wandb

        # Tables are staged in a folder that only the environment can name. One that the user named stays.
        staging = str((run_dir / "wandb").resolve())
        os.environ.setdefault("WANDB_DATA_DIR", staging)
        wandb.setup(settings=wandb.Settings(silent=True))  # what init says before it has read its settings
        run = wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity or None,
            name=config.name,
            id=_wandb_id(run_dir),
            resume="allow" if mode == "online" else None,  # offline runs of one id are joined by `wandb sync`
            dir=str(run_dir),
            config=json.loads(to_json(config)),
            mode=mode,  # pyright: ignore[reportArgumentType]
            settings=wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=30),
        )
        return cls(run, staging)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **values})

    def finish(self) -> None:
        self._run.finish()
        self._forget_staging()

    def abandon(self) -> None:
        """Instead of ``finish`` after a failure; without it, W&B would try that again as the interpreter exits."""
        _end_service()
        self._forget_staging()

    def _forget_staging(self) -> None:
        if os.environ.get("WANDB_DATA_DIR") == self._staging:
            del os.environ["WANDB_DATA_DIR"]


def _end_service() -> None:
    """An attempt that failed leaves its run's id taken in W&B's background process: the next needs a new one."""
    with suppress(Exception, SystemExit):  # it would exit with the status of a process that was killed
        import wandb

        wandb.teardown()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def wandb_mode(config: Wandb) -> str:
    """What "auto" means here: WANDB_MODE if the user set it, online with a key, else offline."""
    if config.mode != "auto":
        return config.mode
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


def _wandb_id(run_dir: Path) -> str:
    """The run's id, made once and kept beside its metrics, so that a resume goes on with the same W&B run."""
    path = run_dir / "wandb_id"
    if not path.is_file():
        path.write_text(os.urandom(5).hex(), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def mean_scores(samples: Sequence[Sample]) -> dict[str, float]:
    """Mean of every figure of ``evaluation.scorer`` over the samples that have it: what does not apply to one is left out."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in sample.scores.items():
            found.setdefault(name, []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}
