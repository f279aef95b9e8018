"""Takes the tiny judge that can compare through the rest of the recipe that trains any judge (docs/train-a-judge.md).

`python -m testbed.refine_judge` does what is missing: the oracle's preferences, its traces of them as a teacher behind an
endpoint, stage 1 (sft), pairs sampled from the judge in vLLM, stage 2 (dpo). It measures the judge before and after each
stage, and puts one of them, with the table of all and its card, into `testbed/tiny_judge`. Everything resumes from
`testbed/.build/refine`. `config()` below is also an experiment for `python -m reward_server sft|pairs|dpo
testbed/refine_judge.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reward_server import dpo, pairs, sft
from reward_server.asking import Endpoint
from reward_server.distill import Distillation, distil, report
from reward_server.families.flex import Flex
from reward_server.judge_training import Dpo, JudgeTraining, Pairs, Sft
from reward_server.preferences import read
from reward_server.serve import VllmJudge
from testbed import train_judge
from testbed.judge_data import Pair
from testbed.judge_preferences import save, training_pairs
from testbed.measure_judge import STAGES_TABLE, card, facts, measure, write_card
from testbed.oracle_judge import OracleJudge
from testbed.train_judge import OUTPUT
from testbed.training import BUILD

SFT_PAIRS, DPO_PAIRS = 6000, 1000
SEEDS = {"sft": 81, "dpo": 82}
"""Of the two sets of preferences, drawn anew from the pictures that `testbed.train_judge` has shown it."""
FIGURES = ("accuracy", "accuracy_clear", "accuracy_near", "parsed", "consistent", "first")


def config(model: Path | None = None, folder: Path = BUILD / "refine") -> JudgeTraining:
    """The tiny judge's training, from what `testbed.train_judge` has made. The learning rates are a small model's, not
    the paper's."""
    model = model or train_judge.result()
    return JudgeTraining(
        name=folder.name,
        output=str(folder.parent),
        model=str(model),
        image=Flex(prompt_file=str(model / "prompt.txt"), structured=False),
        sft=Sft(traces=str(folder / "traces.jsonl"), lr=2e-4, batch=24, accumulation=1, checkpoint_every=50),
        pairs=Pairs(
            preferences=str(folder / "dpo_data" / "preferences.jsonl"),
            endpoint=Endpoint(temperature=0.7, max_tokens=96, concurrency=128),
        ),
        dpo=Dpo(lr=2e-5, batch=12, accumulation=2, beta=0.1, checkpoint_every=25),
        gradient_checkpointing=False,
    )


def refine(training: JudgeTraining, counts: Mapping[str, int], draw: Callable[[int, int], list[Pair]]) -> Path:
    """Does what is missing up to stage 2's judge, and returns its folder.

    Args:
        counts: Preferences for "sft" and "dpo".
        draw: Makes so many pairs with this seed.
    """
    folder = training.folder
    for stage in ("sft", "dpo"):
        data = folder / f"{stage}_data"
        if not (data / "preferences.jsonl").exists():  # written last
            save(data, draw(counts[stage], SEEDS[stage]))
    distil_traces(training, folder / "sft_data" / "preferences.jsonl")
    judge = sft.train(training)
    sample_pairs(training, judge)
    return dpo.train(training)


def distil_traces(training: JudgeTraining, preferences: Path) -> None:
    """The oracle, as a teacher behind an endpoint, writes a trace for each preference."""
    done = training.folder / "distilled.txt"
    if done.exists():
        return
    out = Path(training.sft.traces)
    assert isinstance(training.image, Flex)
    with OracleJudge(style="trace").start(training.folder) as teacher:
        settings = Distillation(
            out=out,
            rejected=out.with_suffix(".rejected.jsonl"),
            endpoint=Endpoint(url=teacher.endpoints[0]),
            family=training.image,
            tries=1,  # the oracle says the same again
        )
        tally = asyncio.run(distil(read(preferences).preferences, settings))
    print(report(tally), flush=True)
    if tally.unanswered:
        raise ValueError("not every preference has a trace: start the same command again")
    done.write_text(report(tally) + "\n")


def sample_pairs(training: JudgeTraining, judge: Path) -> None:
    """Serves stage 1's judge by vLLM and samples two traces for each preference; the oracle is the judge of reasoning."""
    counts = training.folder / pairs.COUNTS
    if counts.exists() and not json.loads(counts.read_text())["unanswered"]:
        asyncio.run(pairs.build(training))  # asks nothing, and refuses another judge's pairs
        return
    # vLLM computes half precision on a CPU in bfloat16; the card's numbers are float32's.
    server = VllmJudge(model=str(judge), max_model_len=2048, kv_cache_gb=1, cpu_threads=1, extra=("--dtype", "float32"))
    teacher = OracleJudge(style="trace")
    with server.start(training.folder / "vllm") as running, teacher.start(training.folder) as reasoning:
        endpoint = replace(training.pairs.endpoint, url=running.endpoints[0], model=server.served_name)
        asked = replace(
            training, pairs=replace(training.pairs, endpoint=endpoint, reasoning=Endpoint(url=reasoning.endpoints[0]))
        )
        print(json.dumps(asyncio.run(pairs.build(asked)), indent=1), flush=True)


def measured(name: str, judge: Path, folder: Path) -> dict[str, Any]:
    """The judge's figures on held-out pairs, measured once and kept as `measured_<name>.json`."""
    path = folder / f"measured_{name}.json"
    if not path.exists() or json.loads(path.read_text()).get("weights") != facts(judge)["weights"]:
        path.write_text(json.dumps(measure(judge), indent=1) + "\n")
    return json.loads(path.read_text())


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """One row for each stage and kind of picture, as Markdown."""
    rows = [
        f"| {stage} | {kind} | " + " | ".join(f"{figures[kind][name]:.3f}" for name in FIGURES) + " |"
        for stage, figures in found.items()
        for kind in ("samples", "renders")
    ]
    return "\n".join(["| stage | pictures | " + " | ".join(FIGURES) + " |", "|---" * (len(FIGURES) + 2) + "|", *rows])


def made(counts: Mapping[str, int]) -> str:
    """Where stage 2's pairs came from."""
    return (
        f"`sft` learnt from {SFT_PAIRS:,} pairs' traces. Of {counts['instances']:,} pairs, drawn anew as well, {counts['pairs']} gave `dpo` an "
        f"example: in {counts[pairs.ONE_RIGHT]} one of two sampled traces named the right winner, in "
        f"{counts[pairs.BY_REASONING]} both did and the oracle said which is nearer to its own."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--model", type=Path, default=train_judge.result(), help="the judge to begin with (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument(
        "--stage",
        choices=("sft", "dpo"),
        default="dpo",
        help="whose judge to keep (%(default)s)",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    training = config(options.model)
    last = refine(training, {"sft": SFT_PAIRS, "dpo": DPO_PAIRS}, training_pairs)
    stages = {train_judge.STAGES[-1]: options.model, "sft": training.folder / "sft" / "model", "sft + dpo": last}
    found = {name: measured(name.replace(" ", ""), judge, training.folder) for name, judge in stages.items()}
    counts = json.loads((training.folder / pairs.COUNTS).read_text())
    kept = "sft + dpo" if options.stage == "dpo" else "sft"
    about = f"{made(counts)} The weights here are those of {kept!r}."
    (training.folder / "stages.md").write_text(f"{table(found)}\n\n{about}\n")
    print(table(found))
    shutil.copytree(stages[kept], options.output, dirs_exist_ok=True)
    shutil.copy(training.folder / "stages.md", options.output / STAGES_TABLE)
    write_card(options.output, found[kept], card(found[kept], (options.output / STAGES_TABLE).read_text().rstrip()))


if __name__ == "__main__":
    main()
