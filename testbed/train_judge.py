"""Trains the tiny judge from nothing, by the recipe that trains any judge (docs/train-a-judge.md).

`python -m testbed.train_judge` does what is missing. It draws the pictures and writes down what the oracle says of them; an
untrained Qwen3-VL then goes through stage 1 (`reward_server.sft`) three times: it learns to describe one picture, then to
compare two in the Flex format and to score one in UnifiedReward 2.0's, and at last the same with more pairs, mostly of the
tiny FLUX's own samples. `testbed.refine_judge` goes on from there. Everything resumes from `testbed/.build/judge`.

`config()` is also an experiment for `python -m reward_server sft testbed/train_judge.py`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from reward_server import sft
from reward_server.begun import begun_with
from reward_server.families.flex import Flex
from reward_server.families.unified import Unified2Point
from reward_server.finetuning import MODEL
from reward_server.judge_training import JudgeTraining, Sft
from testbed import judge_examples, judge_trace
from testbed.judge_data import Draw, Material, draw_renders, load_bank, training_texts
from testbed.judge_model import new_model, save
from testbed.training import BUILD

OUTPUT = Path(__file__).parent / "tiny_judge"
STAGES = ("describe", "compare", "practise")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How much there is to learn from: prompts with pictures, and examples of each kind.

    `seed` is that of the weights and of the samples; renders, and each stage's pairs and scores, have the five after it.
    """

    seed: int = 41
    build: Path = BUILD
    sampled_prompts: int = 8000
    rendered_prompts: int = 5000
    pairs: int = 128_000
    scored: int = 64_000
    more_pairs: int = 224_000
    more_scored: int = 64_000

    @property
    def folder(self) -> Path:
        return self.build / "judge"


_SHARED: dict[str, Any] = {"warmup": 0.08, "weight_decay": 0.05, "beta2": 0.98, "checkpoint_every": 100}
FITS = {
    "describe": Sft(lr=2e-3, batch=48, accumulation=2, steps=3000, **_SHARED),
    "compare": Sft(lr=1.5e-3, batch=24, accumulation=2, **_SHARED),
    "practise": Sft(lr=1e-3, batch=24, accumulation=2, steps=4000, **_SHARED),
}
"""Of the stages, in one process. Two take a batch each instead of one after the other."""


@lru_cache(maxsize=1)
def material(config: JudgeConfig) -> Material:
    """The pictures to learn from, drawn where they are missing."""
    sampled = training_texts(config.sampled_prompts, config.seed)
    rendered = training_texts(config.rendered_prompts, config.seed + 1, novel=0.15)
    return Material(
        samples=load_bank(config.build / "judge_samples", sampled, flux_draw(), config.seed),
        renders=load_bank(config.build / "judge_renders", rendered, draw_renders, config.seed + 1),
    )


def flux_draw() -> Draw:
    """Draws with the tiny FLUX as it is saved; loads it when it is first needed."""
    pipelines = []

    def draw(rng: np.random.Generator, texts: Sequence[str]) -> np.ndarray:
        from testbed.measure_flux import load, sample

        if not pipelines:
            pipelines.append(load())
        return sample(pipelines[0], texts, seed=int(rng.integers(2**31)))

    return draw


def config(stage: str = STAGES[-1], about: JudgeConfig | None = None, processes: int = 1) -> JudgeTraining:
    """A stage as the recipe takes it; it begins with the untrained model, or with what the stage before has saved."""
    folder, fit = (about or JudgeConfig()).folder, FITS[stage]
    begun = STAGES.index(stage)
    wording = folder / "untrained" / "prompt.txt"
    return JudgeTraining(
        name=stage,
        output=str(folder),
        model=str(folder / STAGES[begun - 1] / "sft" / MODEL if begun else folder / "untrained"),
        image=Flex(prompt_file=str(wording), structured=False),
        questions={
            judge_examples.DESCRIBE: Unified2Point(prompt_file=str(folder / "describe.txt")),
            judge_examples.SCORE: Unified2Point(prompt_file=str(wording.with_name("prompt_point.txt"))),
        },
        sft=replace(fit, traces=str(folder / f"{stage}.jsonl"), accumulation=fit.accumulation // processes),
        precision="float32",
        gradient_checkpointing=False,
        wandb="disabled",
    )


def result(about: JudgeConfig | None = None) -> Path:
    """The folder of the judge that the last stage saves."""
    return config(STAGES[-1], about).folder / "sft" / MODEL


def prepare(about: JudgeConfig) -> None:
    """Writes the examples of all stages and the untrained model, where they are missing."""
    folder = about.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "describe.txt").write_text(judge_trace.DESCRIBE + "{prompt}")  # there is no prompt
    if not (folder / "untrained" / "prompt.txt").exists():
        save(new_model(about.seed), folder / "untrained")
    begun_with(
        folder / "examples.json",
        {name: value for name, value in asdict(about).items() if name != "build"},
        f"remove {folder} to begin anew, or give another --build",
    )
    if all((folder / f"{stage}.jsonl").exists() for stage in STAGES):
        return
    pictures = material(about)
    judge_examples.write(folder / "describe.jsonl", judge_examples.descriptions(pictures))
    print(f"wrote {folder / 'describe.jsonl'}", flush=True)
    for stage, seed, shares, counts in (
        ("compare", about.seed + 2, judge_examples.SHARES, (about.pairs, about.scored)),
        ("practise", about.seed + 4, judge_examples.LATER_SHARES, (about.more_pairs, about.more_scored)),
    ):
        pairs = judge_examples.comparisons(pictures, counts[0], seed, shares)
        scores = judge_examples.scorings(pictures, counts[1], seed + 1)
        judge_examples.write(folder / f"{stage}.jsonl", chain(pairs, scores))
        print(f"wrote {folder / f'{stage}.jsonl'}", flush=True)


def train_all(about: JudgeConfig, processes: int) -> Path:
    """All stages, each from where the one before ends; the folder of the last one's judge."""
    prepare(about)
    for stage in STAGES:
        if processes == 1:
            sft.train(config(stage, about))
        else:
            _launch(stage, about, processes)
    return result(about)


def _launch(stage: str, about: JudgeConfig, processes: int) -> None:
    """Trains a stage in several processes, which average their gradients. Raises ValueError where that fails."""
    # Most of a step are small operations, at each of which two threads of one process would wait for each other.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "testbed.train_judge", f"--stage={stage}", f"--build={about.build}"]
    ended = subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if ended:
        raise ValueError(f"the stage {stage!r} ended with status {ended}; start the same command again to go on")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=2, help="that train together (%(default)s)")
    parser.add_argument("--draw", action="store_true", help="make the examples and stop")
    parser.add_argument("--stage", choices=STAGES, help="train this stage alone, as one of accelerate's processes")
    parser.add_argument("--build", type=Path, default=BUILD, help="where progress is kept (%(default)s)")
    options = parser.parse_args()
    about = JudgeConfig(build=options.build)
    if options.stage:
        sft.train(config(options.stage, about, int(os.environ.get("WORLD_SIZE", "1"))))
    elif options.draw:
        prepare(about)
    else:
        try:
            print(train_all(about, options.processes))
        except ValueError as error:
            parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
