"""Extends the tiny judge of pictures to clips and saves the result to `testbed/tiny_video_judge`.

`python -m testbed.train_video_judge` draws the clips, then trains what is missing: first to describe one clip, then to
compare two in the Flex format, with the oracle as the teacher. It begins with `testbed/tiny_judge`'s weights and learns from
renders and, where `testbed/tiny_wan` is there, from the tiny Wan's samples. Everything resumes from `testbed/.build`.
`--export` only saves the present weights. `--compile` takes some minutes and a C++ compiler, and makes steps faster.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3VLForConditionalGeneration

from testbed import video_judge_trace
from testbed.judge_data import Draw, load_images
from testbed.judge_loop import Batch, Stage, collate, fit, present_model
from testbed.judge_model import CLIPS, PICTURES, extended, new_model, reply_ids, request_ids, save, token_ids
from testbed.train_judge import OUTPUT as PICTURES_JUDGE
from testbed.training import BUILD
from testbed.video_judge_data import SEEN, ClipBank, ClipMaterial, draw_renders, training_texts

OUTPUT = Path(__file__).parent / "tiny_video_judge"
WAN = Path(__file__).parent / "tiny_wan"


@dataclass(frozen=True, kw_only=True)
class VideoJudgeConfig:
    """What both stages share: the weights' seed, how many prompts have clips, where progress is kept, and whether the
    model is compiled. Without a model in the folder `wan` there are no samples."""

    seed: int = 51
    build: Path = BUILD
    compile: bool = False
    sampled_prompts: int = 2500
    rendered_prompts: int = 2500
    wan: Path = WAN


STAGES = (
    Stage(name="video_judge_describe", candidates=1, seed=52, steps=1600, batch=48, peak_lr=2e-3),
    Stage(name="video_judge_compare", candidates=2, seed=53, steps=3600, batch=32, peak_lr=1.5e-3),
)


@lru_cache(maxsize=1)
def material(config: VideoJudgeConfig) -> ClipMaterial:
    """The clips to learn from, drawn where they are missing."""
    rendered = training_texts(config.rendered_prompts, config.seed + 1, novel=0.15)
    renders = load_bank(config.build / "video_judge_renders", rendered, draw_renders, config.seed + 1)
    if not has_wan(config):
        print(f"no model in {config.wan}: renders only", flush=True)
        return ClipMaterial(renders=renders)
    sampled = training_texts(config.sampled_prompts, config.seed)
    samples = load_bank(config.build / "video_judge_samples", sampled, wan_draw(config.wan), config.seed)
    return ClipMaterial(renders=renders, samples=samples)


def has_wan(config: VideoJudgeConfig) -> bool:
    return (config.wan / "model_index.json").exists()


def load_bank(folder: Path, texts: Sequence[str], draw: Draw, seed: int) -> ClipBank:
    """The bank of clips kept in `folder`; what is missing is drawn and kept."""
    return ClipBank(texts=texts, images=load_images(folder, texts, draw, seed))


def wan_draw(folder: Path = WAN) -> Draw:
    """Draws with the tiny Wan as it is saved; loads it when it is first needed."""
    pipelines = []

    def draw(rng: np.random.Generator, texts: Sequence[str]) -> np.ndarray:
        from testbed.measure_wan import load, sample

        if not pipelines:
            pipelines.append(load(folder))
        return sample(pipelines[0], texts, seed=int(rng.integers(2**31)))[:, SEEN]

    return draw


def make_batch(stage: Stage, drawn: ClipMaterial, step: int) -> Batch:
    """The batch of a step; the same for the same step."""
    rng = np.random.default_rng((stage.seed, step))
    examples = [(_described, _compared)[stage.candidates - 1](drawn, rng) for _ in range(stage.batch)]
    images, requests, replies = zip(*examples, strict=True)
    return collate(np.concatenate(images), requests, [reply_ids(r, CLIPS) for r in replies])


Example = tuple[np.ndarray, list[int], list[str]]
"""Frames [k, side, side, 3], the request's ids, and the reply's pieces."""


def _described(drawn: ClipMaterial, rng: np.random.Generator) -> Example:
    frames, reading = drawn.clip(rng)
    return frames, request_ids(1, form=CLIPS), video_judge_trace.description(reading)


def _compared(drawn: ClipMaterial, rng: np.random.Generator) -> Example:
    pair = drawn.pair(rng)
    reply = video_judge_trace.trace(pair.reference, *pair.judged)
    return np.concatenate(pair.images), request_ids(2, pair.text, CLIPS), reply


def train(
    model: Qwen3VLForConditionalGeneration, stage: Stage, config: VideoJudgeConfig, stop_at: int | None = None
) -> None:
    """Trains, or resumes, a stage in place; its state is `<build>/<stage>.pt`."""
    drawn = material(config)
    winners = [token_ids(CLIPS)[piece] for piece in video_judge_trace.overall_winners()]
    origin = digest(PICTURES_JUDGE / "model.safetensors") if stage == STAGES[0] else ""
    path = state_path(stage, config)
    fit(path, model, stage, lambda step: make_batch(stage, drawn, step), winners, stop_at, origin, config.compile)


def state_path(stage: Stage, config: VideoJudgeConfig) -> Path:
    return config.build / f"{stage.name}.pt"


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def train_all(config: VideoJudgeConfig) -> None:
    """Both stages, each from where the one before ends; the first from what the judge of pictures knows."""
    model = extended(new_model(config.seed, CLIPS), CLIPS, PICTURES_JUDGE, PICTURES)
    for stage in STAGES:
        train(model, stage, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export", action="store_true", help="save the present weights and stop")
    parser.add_argument("--compile", action="store_true", help="compile the model")
    parser.add_argument("--draw", action="store_true", help="draw the clips and stop")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = VideoJudgeConfig(compile=options.compile)
    if options.draw:
        material(config)
        return
    if not options.export:
        train_all(config)
    save(present_model([state_path(stage, config) for stage in STAGES], config.seed), options.output, CLIPS)


if __name__ == "__main__":
    main()
