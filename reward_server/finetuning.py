"""What both stages of a judge's training share: the model, TRL's settings, resume, export.

A stage lives in a folder of its own:

    settings.json     what it was begun with, other weights and wordings included; a resume with anything else is refused
    checkpoint-<n>/   model, optimiser, schedule, random states: a run that was killed goes on from the newest whole one
    metrics.jsonl     one object for each logged step
    model/            the finished judge as vLLM serves it: weights, tokenizer, processor, chat template

TRL does the training, on what `examples.py` reads.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# transformers annotates models and processors by their most general classes.
from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)

from reward_server.begun import begun_with, fingerprint, wordings
from reward_server.judge_training import Fit, JudgeTraining
from reward_server.machine import find_model

SETTINGS, METRICS, MODEL = "settings.json", "metrics.jsonl", "model"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pth", "*.gguf")


# ---------------------------------------------------------------- the model


def local_folder(model: str) -> Path:
    """The model's folder on this machine, fetched from the hub if need be. Raises ValueError with the way out."""
    found, offline = find_model(model)
    return Path(found) if Path(found).is_dir() else Path(snapshot_download(found, local_files_only=offline))


def load_model(config: JudgeTraining, folder: Path) -> PreTrainedModel:
    """The model to train: in float32, where small steps are not lost; a frozen one under LoRA in bfloat16 on GPUs."""
    half = config.lora is not None and uses_bfloat16(config)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16 if half else torch.float32)
    if not config.train_vision:
        model.model.visual.requires_grad_(False)
    return model


def uses_bfloat16(config: JudgeTraining) -> bool:
    able = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return able if config.precision == "auto" else config.precision == "bfloat16"


def adapter(config: JudgeTraining) -> LoraConfig | None:
    """LoRA on every linear layer but the output's, or None where all weights are trained."""
    if config.lora is None:
        return None
    return LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules="all-linear",
        exclude_modules=None if config.train_vision else r".*\bvisual\..*",
        task_type="CAUSAL_LM",
    )


# ---------------------------------------------------------------- training


def arguments(config: JudgeTraining, fit: Fit, folder: Path) -> dict[str, Any]:
    """The settings that TRL's stages have in common."""
    half = uses_bfloat16(config)
    return {
        "output_dir": str(folder),
        "learning_rate": fit.lr,
        "per_device_train_batch_size": fit.batch,
        "gradient_accumulation_steps": fit.accumulation,
        "num_train_epochs": fit.epochs,
        "max_steps": fit.steps or -1,
        "warmup_steps": fit.warmup,  # below 1: a share of the steps
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(fit.schedule, fit.schedule),
        "weight_decay": fit.weight_decay,
        "adam_beta2": fit.beta2,
        "max_grad_norm": fit.max_grad_norm,
        "save_strategy": "steps",  # and at the end
        "save_steps": fit.checkpoint_every,
        "save_total_limit": 2,
        "logging_steps": fit.log_every,
        "logging_first_step": True,
        "max_length": None,  # a reply that is cut off teaches to cut off
        "bf16": half,
        "use_cpu": not torch.accelerator.is_available(),
        "gradient_checkpointing": config.gradient_checkpointing,
        "dataloader_num_workers": config.loader_workers,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "remove_unused_columns": False,  # or the paths would go before they are read
        "report_to": [] if wandb_mode(config) == "disabled" else ["wandb"],
        "run_name": f"{config.name}-{folder.name}",
        "seed": config.seed,
    }


def processes() -> PartialState:
    """How many processes train together, and which this one is."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        # A judge is exported from a checkpoint, so this has to hold whole weights, whatever the launcher's file says.
        os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"
    # Without `cpu` each of several processes on CPUs would think itself alone. The first call sets how long one waits for
    # the others, of which the main one exports a large judge.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=2))


def begin(config: JudgeTraining, fit: Fit, folder: Path, source: Path, data: Path) -> None:
    """Writes down what the stage is begun with, or compares with what it was begun with.

    Raises:
        ValueError: the folder holds a stage with other settings or other data, or one process sees several GPUs.
    """
    there = processes()
    if there.num_processes == 1 and (seen := torch.cuda.device_count()) > 1 and not finished(folder):
        raise ValueError(
            f"this process sees {seen} GPUs and can use one: set CUDA_VISIBLE_DEVICES=0, or start a process for each, with "
            f"accelerate launch --num_processes {seen} in place of python"
        )
    if not there.is_main_process:
        return
    names = ("image", "video", "questions", "lora", "train_vision", "seed")
    shared = {name: repr(getattr(config, name)) for name in names}
    aside = ("traces", "checkpoint_every", "log_every", "accumulation")
    kept = {k: v for k, v in asdict(fit).items() if k not in aside}
    said = wordings(config.image, config.video, **config.questions)
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    settings = shared | kept | said | {"model": str(source), "weights": fingerprint(source), "data": digest}
    settings |= {"precision": config.precision}
    if not finished(folder):
        settings |= {"processes": processes().num_processes, "accumulation": fit.accumulation}
    begun_with(folder / SETTINGS, settings, f"give the run another name, or remove {folder} to begin anew")


def finished(folder: Path) -> bool:
    """Whether the stage has saved its judge, which it does whole or not at all."""
    return (folder / MODEL / "config.json").is_file()


def fit_and_export(config: JudgeTraining, trainer: Trainer, folder: Path, source: Path) -> Path:
    """Trains, from the newest checkpoint if there is one, and saves the judge; returns its folder.

    Args:
        source: The model folder that the stage began with.
    """
    newest = last_checkpoint(folder)
    if not (newest and _complete(newest)):  # else only the export is missing; the trainer would take one step more
        trainer.add_callback(Recorder(folder, _step(newest)))
        with WandbRun(config, folder):
            trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    trainer.accelerator.wait_for_everyone()
    last = last_checkpoint(folder)
    assert last is not None, "training ends with a checkpoint"
    if trainer.accelerator.is_main_process:
        export(source, last, folder / MODEL)
    trainer.accelerator.wait_for_everyone()
    return folder / MODEL


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; its state is what is written last."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


def _complete(checkpoint: Path) -> bool:
    """Whether it was written after the last step."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return bool(state["global_step"] >= state["max_steps"] > 0)


def _step(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


class Recorder(TrainerCallback):
    """Appends what the trainer logs to metrics.jsonl; what a killed run logged beyond its checkpoint is taken back."""

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / METRICS
        if processes().is_main_process:
            kept = [line for line in read_metrics(folder) if line["step"] <= step]
            self._path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step} | logs) + "\n")


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """What a stage has logged; a last line that was cut off by a kill is passed over."""
    path = folder / METRICS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def wandb_mode(config: JudgeTraining) -> str:
    if config.wandb != "auto":
        return config.wandb
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


class WandbRun:
    """The W&B run of a stage, the same one after a resume; the trainer's own callback finds it and writes to it."""

    def __init__(self, config: JudgeTraining, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._on = wandb_mode(config) != "disabled" and processes().is_main_process

    def __enter__(self) -> None:
        if self._on:
            import wandb

            name, kept = f"{self._config.name}-{self._folder.name}", self._folder / "wandb_id"
            if not kept.exists():
                kept.write_text(secrets.token_hex(5))
            identity = kept.read_text().strip()
            project, mode = os.environ.get("WANDB_PROJECT", "grpo-flex-judge"), wandb_mode(self._config)
            wandb.init(project=project, name=name, id=identity, resume="allow", dir=self._folder, mode=mode)

    def __exit__(self, *_: object) -> None:
        if self._on:
            import wandb

            wandb.finish()


# ---------------------------------------------------------------- export


def export(source: Path, checkpoint: Path, folder: Path) -> None:
    """Writes the judge of a checkpoint as a folder that stands alone.

    Weights have the source's precision, an adapter is merged in float32 before. Tokenizer, processor settings, chat
    template and whatever else lies beside the source's weights is copied as it is.
    """
    adapted = (checkpoint / "adapter_config.json").is_file()
    model = AutoModelForImageTextToText.from_pretrained(source if adapted else checkpoint, dtype=torch.float32)
    if adapted:
        model = PeftModel.from_pretrained(model, str(checkpoint)).merge_and_unload()
    scratch = folder.with_name(folder.name + ".new")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(source, scratch, ignore=shutil.ignore_patterns(*_WEIGHTS, ".*"))
    stored = AutoConfig.from_pretrained(source).dtype or torch.float32
    model.to(stored).save_pretrained(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
