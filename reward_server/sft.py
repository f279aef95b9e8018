"""Stage 1 of a judge's training: supervised fine-tuning on a teacher's traces, by TRL's SFTTrainer.

Only the reply's tokens are learned. The loss is the mean cross-entropy over the reply tokens of an optimiser step.
"""

# pyright: reportArgumentType=false
from __future__ import annotations

from pathlib import Path

from trl import SFTConfig, SFTTrainer

from reward_server import examples, finetuning
from reward_server.judge_training import JudgeTraining


def train(config: JudgeTraining) -> Path:
    """Trains, or goes on, and returns the folder of the judge; at once where that is there already.

    Raises:
        ValueError: traces or a model that cannot be used, or a folder that was begun with other settings.
    """
    if not config.sft.traces:
        raise ValueError("sft.traces is not set: give the file that distill wrote, sft.traces=FILE")
    folder = config.folder / "sft"
    rows = examples.read_lines(config.sft.traces, ("prompt", "reply"), config.questions)
    source = finetuning.local_folder(config.model)
    finetuning.begin(config, config.sft, folder, source, Path(config.sft.traces))
    if finetuning.finished(folder):
        return folder / finetuning.MODEL
    return finetuning.fit_and_export(config, trainer(config, folder, source, rows), folder, source)


def trainer(config: JudgeTraining, folder: Path, source: Path, rows: list[dict]) -> SFTTrainer:
    """TRL's trainer for these rows, from the source's weights."""
    processor = examples.load_processor(source)
    names = {"prompt": "prompt", "media": "media", "question": "question", "reply": "completion"}
    given = [{new: row.get(old) for old, new in names.items()} for row in rows]
    return SFTTrainer(
        model=finetuning.load_model(config, source),
        args=SFTConfig(**finetuning.arguments(config, config.sft, folder), completion_only_loss=True),
        train_dataset=examples.dataset(config, processor, given),
        processing_class=processor,
        peft_config=finetuning.adapter(config),
    )
