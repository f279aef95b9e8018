"""Score an adapter against the base model on the held-out prompts: a table and a before-and-after grid."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_flex.config import Adapter as AdapterConfig
from grpo_flex.config import ConfigError, Full, Placement, RunConfig
from grpo_flex.config_file import from_json, load_experiment
from grpo_flex.generators.base import LORA_FILE, SECOND_LORA_FILE
from grpo_flex.metrics import mean_scores
from grpo_flex.prompts import read_prompts
from grpo_flex.types import Adapter, Prompt, Sample

if TYPE_CHECKING:
    from grpo_flex.rollout import RolloutWorker


def evaluate(run_dir: str | None, adapter: str | None, experiment: str | None, out: Path | None) -> int:
    """Print held-out scores of base model and adapter and write a grid; returns the exit status.

    Raises:
        ConfigError: neither a run nor an experiment, or no adapter where one was named.
    """
    config = _config(run_dir, experiment)
    path, tensors, trained = _result(config, run_dir, adapter)
    heldout = read_prompts(config.prompts.heldout, "prompts.heldout")
    from grpo_flex.rollout import UNTRAINED, RolloutWorker
    from grpo_flex.run import quieten

    quieten()
    worker = RolloutWorker(replace(config, adapter=trained), _device(config.placement))
    worker.model.prepare(heldout)
    before = _samples(worker, heldout, UNTRAINED)
    after = _samples(worker, heldout, Adapter(version=1, tensors=tensors))
    _print_table(before, after, path)
    _write_grid(
        before,
        after,
        config,
        out or Path(run_dir or ".") / ("samples/evaluate.png" if run_dir else "evaluate.png"),
    )
    return 0


def _device(placement: Placement) -> str:
    """Where the run samples: colocated learners do it, and rollout_gpus is not used."""
    gpus = placement.learner_gpus if placement.colocated else placement.rollout_gpus
    return "cuda" if gpus else "cpu"


def _config(run_dir: str | None, experiment: str | None) -> RunConfig:
    if experiment:
        config = load_experiment(experiment)
    elif run_dir:
        file = Path(run_dir) / "config.json"
        if not file.is_file():
            raise ConfigError(f"'{run_dir}' is no run directory (it has no config.json)")
        config = from_json(file.read_text())
    else:
        raise ConfigError("evaluate what? Give a run directory, or --adapter PATH with --experiment FILE")
    config.validate()
    return config


def _result(
    config: RunConfig, run_dir: str | None, adapter: str | None
) -> tuple[Path, dict[str, Any], AdapterConfig | Full]:
    """Where the trained weights are, what they are, and what they are of."""
    if adapter is None and isinstance(config.adapter, Full):
        path = Path(run_dir or ".") / Full.folder
        return path, read_weights(path), config.adapter
    path = _adapter_file(run_dir, adapter)
    return path, *read_lora(path)


def read_weights(folder: Path) -> dict[str, Any]:
    """What full fine-tuning wrote: tensors by the names that rollout workers know.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    denoisers = sorted(path for path in folder.glob("transformer*") if path.is_dir())
    if not denoisers:
        raise ConfigError(f"no weights at '{folder}'; a run writes them when it ends or is stopped")
    found: dict[str, Any] = {}
    for path in denoisers:
        prefix = f"{path.name}." if len(denoisers) > 1 else ""
        try:
            found |= {prefix + k: t for file in path.glob("*.safetensors") for k, t in load_file(file).items()}
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"'{path}' holds no readable weights: {error}") from error
    return found


def _adapter_file(run_dir: str | None, adapter: str | None) -> Path:
    path = Path(adapter) if adapter else Path(run_dir or ".") / "adapter"
    path = path / LORA_FILE if path.is_dir() or not path.suffix else path
    if not path.is_file():
        raise ConfigError(f"no adapter at '{path}'; a run writes it when it ends or is stopped")
    return path


def read_lora(path: Path) -> tuple[dict[str, Any], AdapterConfig]:
    """Tensors (peft's names) and shape of a LoRA file that the trainer, or diffusers, wrote.

    A second expert's file beside it belongs to the same adapter.

    Raises:
        ConfigError: not a LoRA file of a transformer.
    """
    tensors, alpha = _read_file(path)
    second = path.with_name(SECOND_LORA_FILE)
    if second.is_file() and second != path:
        experts = {"transformer": tensors, "transformer_2": _read_file(second)[0]}
        tensors = {f"{expert}.{k}": t for expert, own in experts.items() for k, t in own.items()}
    ranks = {t.shape[0] for k, t in tensors.items() if k.endswith("lora_A.weight")}
    if len(ranks) != 1:
        raise ConfigError(f"'{path}' has no LoRA layers of one rank for the transformer (found ranks {sorted(ranks)})")
    rank = ranks.pop()
    targets = tuple(sorted({k.split(".lora_")[0] for k in tensors}))
    return tensors, AdapterConfig(rank=rank, alpha=float(rank if alpha is None else alpha), targets=targets)


def _read_file(path: Path) -> tuple[dict[str, Any], float | None]:
    """A transformer's tensors, and the alpha that is noted with them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {
                k.removeprefix("transformer."): file.get_tensor(k)
                for k in list(file.keys())
                if k.startswith("transformer.")
            }
            metadata = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"'{path}' is no readable LoRA file: {error}") from error
    return tensors, metadata.get("transformer.lora_alpha")


def _samples(worker: RolloutWorker, prompts: Sequence[Prompt], adapter: Adapter) -> list[Sample]:
    size = worker.heldout_together
    chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    return [sample for chunk in chunks for sample in worker.evaluate(chunk, adapter)]


def _print_table(before: Sequence[Sample], after: Sequence[Sample], path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(after)} held-out samples, adapter {path}")
    for column in ("score", "base", "adapter", "change"):
        table.add_column(column, justify="left" if column == "score" else "right")
    base, tuned = mean_scores(before), mean_scores(after)
    for name in (name for name in base if name in tuned):
        table.add_row(name, f"{base[name]:.3f}", f"{tuned[name]:.3f}", f"{tuned[name] - base[name]:+.3f}")
    Console().print(table)


def _write_grid(before: Sequence[Sample], after: Sequence[Sample], config: RunConfig, out: Path) -> None:
    from grpo_flex import pictures

    out.parent.mkdir(parents=True, exist_ok=True)
    count, fps = config.evaluation.grid, pictures.fps_of(config.generator)
    pairs = pictures.match(before[:count], after[:count])
    for path in pictures.write_before_after(out.with_suffix(""), pairs, "base · with the adapter", fps):
        print(f"pictures: {path}")
