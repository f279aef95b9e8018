"""Objectives × samplers on the testbed, each with the same training time: which learns fastest, and what it costs.

Every run is a process of its own without Ray: one rollout worker, one learner and the oracle judge's rules, one thread
each, taking turns. A run that is finished has its JSON in the output directory and is not run again, so the script can be
stopped and started as one likes; those in ``benchmarks/results/objectives`` are what the README's table was made of.
Held-out scoring is not counted as training time.

    python -m benchmarks.objectives --clock cpu --seconds 400 --every 80 --only nft-ode guard-flow_sde grpo-flow_sde-flash \
        grpo-flow_sde-mix awm-ode grpo-flow_sde grpo-cps dpo-ode grpo-dance                # the README's table; hours
    python -m benchmarks.objectives --only grpo-flow_sde nft-ode --seeds 0 --out runs/mine
    python -m benchmarks.objectives --table                                          # what there is so far, and the plot
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import kept
from benchmarks.plots import Curves, plot
from grpo_flex.advantages import BestAndWorst
from grpo_flex.config import RunConfig
from grpo_flex.config_file import load_experiment
from grpo_flex.dynamics import AllButLast, Cps, Dance, Multistep, Ode, SlidingWindow
from grpo_flex.objectives.awm import Awm
from grpo_flex.objectives.base import Objective
from grpo_flex.objectives.dpo import Dpo
from grpo_flex.objectives.guard import Guard
from grpo_flex.objectives.nft import Nft
from grpo_flex.overrides import override
from grpo_flex.types import Verdict

if TYPE_CHECKING:
    from grpo_flex.learner import Learner
    from grpo_flex.rollout import RolloutWorker
    from grpo_flex.types import Prompt, RolloutGroup
    from testbed.oracle import Score

EXPERIMENT, DEFAULT = "experiments/shapes_image_flow_grpo.py", "experiments/shapes_image_oracle.py"
GOAL = 0.15
"""The gain in held-out score whose cost the table tells."""
RESULTS = Path("benchmarks/results/objectives")
KEPT = ("verdicts", "policy/diversity_pixel")
"""What a result keeps of every training step's metrics."""
ENDS = 3
"""Training steps at either end of a run over which diversity is averaged."""

Change = Callable[[RunConfig], RunConfig]


def _sampled(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, sampling=replace(config.sampling, **changes))


def _on_steps(objective: Objective | None = None, **sampling: Any) -> Change:
    """What is not given stays the recipe's."""
    return lambda config: replace(_sampled(config, **sampling), objective=objective or config.objective)


def _on_samples(objective: Nft | Awm | Dpo, **sampling: Any) -> Change:
    def change(config: RunConfig) -> RunConfig:
        config = replace(_sampled(config, same_noise=False, **sampling), objective=objective)
        return replace(config, advantage=BestAndWorst()) if isinstance(objective, Dpo) else config

    return change


def _default(config: RunConfig) -> RunConfig:
    """The tuned recipe."""
    made = load_experiment(DEFAULT)
    return _sampled(replace(made, seed=config.seed, placement=config.placement), lookahead=0)


SDES: dict[str, dict[str, Any]] = {
    "flow_sde": {},
    "dance": {"dynamics": Dance(eta=0.3)},
    "cps": {"dynamics": Cps(a=0.7)},
}
"""Flow-SDE as in the recipe."""
CONFIGURATIONS: dict[str, Change] = {
    **{f"grpo-{name}": _on_steps(**sde) for name, sde in SDES.items()},
    **{f"guard-{name}": _on_steps(Guard(clip=1e-4), **sde) for name, sde in SDES.items() if name != "cps"},
    "grpo-flow_sde-all": _on_steps(window=AllButLast()),
    "grpo-flow_sde-mix": _on_steps(window=SlidingWindow(size=4)),
    "grpo-flow_sde-flash": _on_steps(window=SlidingWindow(size=4, flash=0.5), solver=Multistep()),
    "nft-ode": _on_samples(Nft(), dynamics=Ode()),
    "nft-ode2": _on_samples(Nft(), dynamics=Ode(), solver=Multistep()),
    "nft-flow_sde": _on_samples(Nft()),
    "awm-ode": _on_samples(Awm(), dynamics=Ode()),
    "awm-flow_sde": _on_samples(Awm()),
    "dpo-ode": _on_samples(Dpo(), dynamics=Ode()),
    "dpo-flow_sde": _on_samples(Dpo()),
    "default": _default,
}
"""All but the default are the Flow-GRPO recipe with another objective or sampler, at its learning rate and number of updates."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one run is measured; all but the recipe is the same in one output directory."""

    seconds: float
    """Training time of each run."""
    every: float
    """Training seconds between two evaluations."""
    steps: int
    """Most training steps; a bound for trying the script out."""
    clock: str
    """wall, or cpu: the process's own time, which other work on the machine does not lengthen."""
    overrides: tuple[str, ...]
    """On top of every configuration."""
    recipe: str
    """Digest of the configuration: one that has moved since is another measurement."""


# ---------------------------------------------------------------- one run


def configuration(name: str, seed: int, overrides: Sequence[str]) -> RunConfig:
    """A configuration of the table, on one thread."""
    base = load_experiment(EXPERIMENT)
    base = replace(base, seed=seed, placement=replace(base.placement, threads_per_worker=1, learner_threads=1))
    base = _sampled(base, lookahead=0)  # worker and learner take turns
    config = override(CONFIGURATIONS[name](base), overrides)
    config.validate()
    return config


def recipe(name: str, overrides: Sequence[str] = ()) -> str:
    """Digest of a configuration as it is now, whatever its seed."""
    return kept.digest(configuration(name, 0, overrides))


def run(name: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train one configuration; returns what its JSON holds."""
    from grpo_flex.learner import Learner
    from grpo_flex.prompts import PromptStream, read_prompts
    from grpo_flex.rollout import RolloutWorker

    config = configuration(name, seed, settings.overrides)
    worker, learner = RolloutWorker(config), Learner(config)
    forwards = _counted(worker.model, learner.model)
    heldout = read_prompts(config.prompts.heldout, "prompts.heldout")
    stream = PromptStream(read_prompts(config.prompts.train, "prompts.train"), config.prompts.per_step, seed)
    now = time.perf_counter if settings.clock == "wall" else time.process_time
    spent, step, used, next_look = 0.0, 0, 0, settings.every
    curve = [_point(0, 0.0, 0, heldout_scores(worker, learner, heldout))]
    steps: list[dict[str, float]] = []
    while spent < settings.seconds and step < settings.steps:
        began, before = now(), forwards[0]
        if spent:  # the learning rate falls with the time that is spent: as far at the end of every run
            learner.config = replace(config, steps=max(2, round(1 + step * settings.seconds / spent)))
        steps.append(train_step(config, worker, learner, stream.batch(step), step))
        spent, used, step = spent + now() - began, used + forwards[0] - before, step + 1
        if spent >= min(next_look, settings.seconds) or step == settings.steps:
            curve.append(_point(step, spent, used, heldout_scores(worker, learner, heldout)))
            next_look = spent + settings.every
            print(f"{name} seed {seed}: {json.dumps(curve[-1])}", flush=True)
    return {
        "name": name,
        "seed": seed,
        "settings": asdict(settings),
        "curve": curve,
        "steps": [_kept(s) for s in steps],
    }


def train_step(
    config: RunConfig, worker: RolloutWorker, learner: Learner, prompts: Sequence[Prompt], step: int
) -> dict[str, float]:
    """Rollouts, verdicts, advantages and update of one step; its metrics."""
    adapter = learner.adapter()
    groups = [worker.generate(step, prompt, adapter) for prompt in prompts]
    verdicts = [ask(config, group, step) for group in groups]
    rewarded = [
        config.reward(config.sampling.group_size, said, group.prompt.id)
        for said, group in zip(verdicts, groups, strict=True)
    ]
    advantages, numbers = config.advantage(rewarded)
    asked = {"verdicts": float(sum(map(len, verdicts)))}
    return numbers | asked | dict(learner.update(groups, advantages, step).metrics)


def ask(config: RunConfig, group: RolloutGroup, step: int) -> list[Verdict]:
    """What a faultless oracle judge says of a group, without the HTTP in between."""
    from grpo_flex.prompts import seed_for
    from testbed import oracle

    assert config.judge is not None
    seed = seed_for(config.seed, "pairs", step, group.prompt.id)
    rng = np.random.default_rng(seed)
    scores = [oracle.score(media[-1], group.prompt.reference) for media in group.media_G]
    pairs = config.judge.pairs.pairs(len(scores), seed)
    return [compare((i, j), scores[i], scores[j], int(rng.integers(2))) for i, j in pairs]


def compare(members: tuple[int, int], one: Score, two: Score, toss: int) -> Verdict:
    """A faultless oracle judge's verdict."""
    from testbed.preference import winners

    *dimensions, overall = map(float, winners(one, two, toss))
    named: dict[str, float] = dict(zip(("alignment", "quality", "aesthetics"), dimensions, strict=True))
    return Verdict(members=members, status="ok", winner=overall, dimensions=named)


def heldout_scores(worker: RolloutWorker, learner: Learner, heldout: Sequence[Prompt]) -> dict[str, float]:
    """Means over the held-out samples, with the adapter that a run would evaluate."""
    from grpo_flex.metrics import mean_scores

    adapter, size = learner.evaluation_adapter(), worker.heldout_together
    chunks = [heldout[i : i + size] for i in range(0, len(heldout), size)]
    return mean_scores([sample for chunk in chunks for sample in worker.evaluate(chunk, adapter)])


def _kept(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: round(metrics[key], 6) for key in KEPT if key in metrics}


def _point(step: int, seconds: float, forwards: int, scores: Mapping[str, float]) -> dict[str, float]:
    return {"step": step, "seconds": round(seconds, 2), "forwards": forwards, **scores}


def _counted(*models: Any) -> list[int]:
    """A counter of the latents that go through the transformers from now on."""
    total = [0]

    def counting(velocity: Callable[..., Any]) -> Callable[..., Any]:
        def counted(x: Any, *rest: Any) -> Any:
            total[0] += len(x)
            return velocity(x, *rest)

        return counted

    for model in models:
        model.velocity = counting(model.velocity)
    return total


# ---------------------------------------------------------------- all runs


def run_all(names: Sequence[str], seeds: Sequence[int], settings: Settings, out: Path) -> None:
    """Every run that is not there yet, one process after the other; seeds outermost, so that a table fills evenly."""
    for seed in seeds:
        for name in names:
            path = out / f"{name}-s{seed}.json"
            asked = asdict(replace(settings, recipe=recipe(name, settings.overrides)))
            if kept.same(path, json.loads(json.dumps(asked)), "settings"):
                continue
            command = [sys.executable, "-m", "benchmarks.objectives", "--one", name, "--seeds", str(seed)]
            subprocess.run([*command, *_arguments(settings), "--out", str(out)], check=True)


def _arguments(settings: Settings) -> list[str]:
    named = [f"--{key}={getattr(settings, key)}" for key in ("seconds", "every", "steps", "clock")]
    return [*named, *(f"--set={text}" for text in settings.overrides)]


# ---------------------------------------------------------------- table and plot


def summary(result: Mapping[str, Any]) -> dict[str, float]:
    """One run's figures of the table; NaN for a goal that it did not reach."""
    curve, steps = result["curve"], result["steps"]
    first, last = curve[0], curve[-1]
    goal = first["oracle"] + GOAL
    spread = [s["policy/diversity_pixel"] for s in steps if "policy/diversity_pixel" in s]
    return {
        "oracle": last["oracle"],
        "gain": last["oracle"] - first["oracle"],
        "steps": last["step"],
        "goal_steps": reached(curve, goal, "step"),
        "goal_seconds": reached(curve, goal, "seconds"),
        "forwards": last["forwards"],
        "diversity": float(np.mean(spread[-ENDS:]) / np.mean(spread[:ENDS])) if spread else np.nan,
    }


def reached(curve: Sequence[Mapping[str, float]], goal: float, axis: str) -> float:
    """Where a curve first meets the goal, by straight lines between its evaluations; NaN where it does not."""
    for before, after in pairwise(curve):
        if after["oracle"] >= goal:
            share = (goal - before["oracle"]) / (after["oracle"] - before["oracle"])
            return before[axis] + share * (after[axis] - before[axis])
    return np.nan


def judged(result: Mapping[str, Any]) -> np.ndarray:
    """[points of the curve] verdicts that were asked for until then."""
    total = np.cumsum([0.0, *(s["verdicts"] for s in result["steps"])])
    return total[[int(point["step"]) for point in result["curve"]]]


def at_budget(result: Mapping[str, Any], verdicts: float) -> float:
    """The held-out score after so many verdicts, between two evaluations by a straight line."""
    return float(np.interp(verdicts, judged(result), [point["oracle"] for point in result["curve"]]))


def results(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The finished runs by configuration, best mean first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in kept.read(out):
        found.setdefault(result["name"], []).append(result)
    return dict(sorted(found.items(), key=lambda item: -float(np.mean([summary(r)["oracle"] for r in item[1]]))))


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: mean over seeds, with the range of the held-out score; also at the judge budget that every run has used."""
    budget = min(judged(run)[-1] for runs in found.values() for run in runs)
    head = (
        f"objective-sampler | seeds | held-out oracle | gain | at {budget / 1000:.1f} k verdicts | steps "
        "| steps to +0.15 | s to +0.15 | forwards (k) | diversity left"
    )
    lines = [f"| {head} |", "|---" + "|---:" * head.count("|") + "|"]
    for name, runs in found.items():
        rows = [summary(r) for r in runs]
        values = {key: np.array([row[key] for row in rows], float) for key in rows[0]}
        oracle = f"{values['oracle'].mean():.3f} ({values['oracle'].min():.3f}–{values['oracle'].max():.3f})"
        cells = [
            name, str(len(rows)), oracle, f"{values['gain'].mean():+.3f}",
            f"{np.mean([at_budget(run, budget) for run in runs]):.3f}",
            f"{values['steps'].mean():.0f}", _of_those(values["goal_steps"]), _of_those(values["goal_seconds"]),
            f"{values['forwards'].mean() / 1000:.0f}", f"{values['diversity'].mean():.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _of_those(values: np.ndarray) -> str:
    """The mean over the runs that reached the goal, and how many did."""
    there = values[~np.isnan(values)]
    return f"{there.mean():.0f} ({len(there)}/{len(values)})" if len(there) else f"– (0/{len(values)})"


def panels(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Curves]:
    """(training seconds, held-out score) of every run, by configuration; objectives on steps and on samples apart."""
    made = {name: [[(p["seconds"], p["oracle"]) for p in run["curve"]] for run in runs] for name, runs in found.items()}
    on_steps = {name: curves for name, curves in made.items() if name.startswith(("grpo", "guard"))}
    on_samples = {name: curves for name, curves in made.items() if name not in on_steps}
    titled = {"policy gradient on noisy steps": on_steps, "learning from noised samples": on_samples}
    return {title: curves for title, curves in titled.items() if curves}


# ---------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.objectives", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--out", type=Path, default=RESULTS)
    made.add_argument("--seconds", type=float, default=300.0, help="training time of each run")
    made.add_argument("--every", type=float, default=30.0, help="training seconds between two evaluations")
    made.add_argument("--steps", type=int, default=100_000, help="most training steps of each run")
    made.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--only", nargs="+", choices=sorted(CONFIGURATIONS), default=list(CONFIGURATIONS))
    made.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="an override for every run")
    made.add_argument("--table", action="store_true", help="run nothing")
    made.add_argument("--one", choices=sorted(CONFIGURATIONS), help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    settings = Settings(
        seconds=options.seconds, every=options.every, steps=options.steps, clock=options.clock,
        overrides=tuple(options.set), recipe=recipe(options.one, options.set) if options.one else "",
    )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one:
        for seed in options.seeds:
            kept.write(options.out / f"{options.one}-s{seed}.json", run(options.one, seed, settings))
        return
    if not options.table:
        run_all(options.only, options.seeds, settings, options.out)
    found = results(options.out)
    if not found:
        raise SystemExit(f"{options.out} holds no finished run yet")
    print(table(found))
    plot(panels(found), options.out / "objectives.png", "training time, s")
    print(f"plot: {options.out / 'objectives.png'}")


if __name__ == "__main__":
    main()
