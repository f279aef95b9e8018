"""Stage 2 of a judge's training: direct preference optimisation on pairs of the judge's own traces, by TRL's DPOTrainer.

With r = β·(log π(reply) − log π_ref(reply)), summed over the reply's tokens, the loss is −log σ(r_chosen − r_rejected)
(arXiv 2305.18290, eq. 7): ln 2 at the start, where the judge is its own reference. Pairs come from ``pairs.py``.
"""

# pyright: reportArgumentType=false
from __future__ import annotations

from pathlib import Path

from trl import DPOConfig, DPOTrainer

from reward_server import examples, finetuning
from reward_server.judge_training import JudgeTraining
from reward_server.pairs import FILE


def train(config: JudgeTraining) -> Path:
    """Trains, or goes on, and returns the folder of the judge; at once where that is there already.

    Raises:
        ValueError: no pairs, no judge of stage 1, or a folder that was begun with other settings.
    """
    folder, data = config.folder / "dpo", config.folder / FILE
    model = Path(config.dpo.model or config.folder / "sft" / finetuning.MODEL)
    if not config.dpo.model and not finetuning.finished(config.folder / "sft"):
        raise ValueError(f"there is no judge in {model}: run the sft stage first, or name another with dpo.model=…")
    if not data.is_file():
        raise ValueError(f"there are no pairs in {data}: serve {model} and run the pairs stage first")
    source = finetuning.local_folder(str(model))
    finetuning.begin(config, config.dpo, folder, source, data)
    if finetuning.finished(folder):
        return folder / finetuning.MODEL
    rows = [row for row in examples.read_lines(data, ("prompt",)) if row.get("chosen")]
    return finetuning.fit_and_export(config, trainer(config, folder, source, rows), folder, source)


def trainer(config: JudgeTraining, folder: Path, source: Path, rows: list[dict]) -> DPOTrainer:
    """TRL's trainer for these rows; the reference is the source, or the model without its adapter."""
    processor = examples.load_processor(source)
    given = [{name: row[name] for name in ("prompt", "media", "chosen", "rejected")} for row in rows]
    model = finetuning.load_model(config, source)
    return DPOTrainer(
        model=model,
        ref_model=None if config.lora else finetuning.load_model(config, source).requires_grad_(False),
        args=DPOConfig(**finetuning.arguments(config, config.dpo, folder), beta=config.dpo.beta),
        train_dataset=examples.dataset(config, processor, given),
        processing_class=processor,
        peft_config=finetuning.adapter(config),
    )
