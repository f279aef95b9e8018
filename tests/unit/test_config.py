"""Configuration: strict overrides, complaints that name the field, a round trip through JSON."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from grpo_flex.config import Adapter, ConfigError, Full, RunConfig
from grpo_flex.config_file import from_json, load_experiment, to_json
from grpo_flex.config_rules import rules_between_parts
from grpo_flex.dynamics import Cps, FastWindow, FlowSde, Ode
from grpo_flex.generators.flux import Flux
from grpo_flex.generators.memory import Memory
from grpo_flex.overrides import override
from grpo_flex.pairing import Calibrated, Pivots, Swiss
from grpo_flex.prompts import PromptStream, read_prompts
from grpo_flex.rewards import BradleyTerry, Consistent, Pointwise, Several
from reward_server.families.rank_and_score import RankAndScore
from reward_server.families.unified import Unified1Pair, Unified1Point, Unified2Pair, Unified2Point
from reward_server.serve import VllmJudge
from tests.configs import Brightness, judge_of

# Those that train a judge are another kind (reward_server.judge_training).
RECIPES = sorted(p for p in Path("experiments").glob("[!_]*.py") if not p.name.startswith("judge_"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid_and_survives_json_and_pickle(path: Path) -> None:
    config = load_experiment(path)
    config.validate()
    assert from_json(to_json(config)) == config
    assert pickle.loads(pickle.dumps(config)) == config
    prompts = read_prompts(config.prompts.train, "prompts.train")
    assert len(PromptStream(prompts, config.prompts.per_step, config.seed).batch(0)) == config.prompts.per_step


RECIPE = "experiments/shapes_image_flow_grpo.py"


def test_overrides_are_typed() -> None:
    config = load_experiment(RECIPE)
    changed = override(
        config,
        [
            "optimizer.lr=1e-5",
            "steps=7",
            "sampling.same_noise=true",
            "name=other",
            "optimizer.betas=(0.8, 0.9)",
            "sampling.dynamics.a=1",
        ],
    )
    assert changed.optimizer.lr == 1e-5 and changed.steps == 7 and changed.sampling.same_noise is True
    assert changed.name == "other" and changed.optimizer.betas == (0.8, 0.9)
    assert isinstance(changed.sampling.dynamics, FlowSde) and changed.sampling.dynamics.a == 1.0


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optmizer.lr=1e-5", "no config field 'optmizer'; did you mean 'optimizer'?"),
        ("optimizer.learning=1", "no config field 'optimizer.learning'; known here: optimizer.lr, "),
        ("optimizer.l=1", "did you mean 'optimizer.lr'?"),
        ("steps=many", "steps=many: 'steps' needs a whole number"),
        ("steps=1.5", "'steps' needs a whole number"),
        ("steps=true", "'steps' needs a whole number"),
        ("sampling.same_noise=1", "'sampling.same_noise' needs true or false"),
        ("optimizer.betas=(0.9,)", "'optimizer.betas' needs"),
        ("objective=Nft", "'objective' is a Grpo object; set one of its fields (objective."),
        ("steps.more=3", "'steps.more' goes too deep"),
        ("steps", "'steps' is not an override; write field=value"),
        ("objective.kl_form=other", "'objective.kl_form' needs one of exact, flow_grpo"),
    ],
)
def test_bad_overrides_say_what_is_wrong(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        override(load_experiment(RECIPE), [assignment])
    assert message in str(error.value)


def _flux(config: RunConfig) -> Flux:
    assert isinstance(config.generator, Flux)
    return config.generator


def test_an_optional_part_can_be_switched_off() -> None:
    changed = override(load_experiment(RECIPE), ["judge.server=none", "judge.endpoints=http://h:1/v1"])
    assert judge_of(changed).server is None and judge_of(changed).endpoints == ("http://h:1/v1",)
    changed.validate()
    two = override(changed, ["judge.endpoints=http://a:1/v1, http://b:1/v1", "adapter.targets=to_q,to_v"])
    assert judge_of(two).endpoints == ("http://a:1/v1", "http://b:1/v1")
    assert isinstance(two.adapter, Adapter) and two.adapter.targets == ("to_q", "to_v")
    served = replace(changed, judge=replace(judge_of(changed), server=VllmJudge(preset="think")))
    server: Any = judge_of(
        override(served, ["judge.server.gpus=0,1", 'judge.server.extra=--hf-overrides={"a":1,"b":2}'])
    ).server
    assert server.gpus == ("0", "1") and server.extra == ('--hf-overrides={"a":1,"b":2}',)
    with pytest.raises(ConfigError, match="put an object there in the experiment file"):
        override(changed, ["judge.server.port=7"])
    with pytest.raises(ConfigError, match="'objective' is a Grpo object"):
        override(changed, ["objective=none"])


def invalid(config: RunConfig) -> list[tuple[RunConfig, str]]:
    sampling, optimizer = config.sampling, config.optimizer
    return [
        (replace(config, steps=0), "steps is 0; a run needs at least 1"),
        (replace(config, name="a/b"), "name is 'a/b'; it names a directory"),
        (
            replace(config, runs_dir="s3://b/runs"),
            "runs_dir is 's3://b/runs'; a run works in a folder of a file system",
        ),
        (replace(config, scorers=(Brightness(),)), "scorers give numbers that nothing would read: reward WinRate"),
        (replace(config, scorers=cast(Any, Brightness())), "needs to be a tuple, such as (one,)"),
        (replace(config, sampling=replace(sampling, group_size=1)), "sampling.group_size is 1; group-relative"),
        (replace(config, sampling=replace(sampling, eval_steps=0)), "sampling.eval_steps is 0"),
        (
            replace(config, sampling=replace(sampling, dynamics=Cps(a=1.2))),
            "sampling.dynamics.a is 1.2; for CPS it needs to lie between 0",
        ),
        (replace(config, sampling=replace(sampling, window=FastWindow(size=9))), "sampling.window.size is 9; a window"),
        (
            replace(config, sampling=replace(sampling, dynamics=FlowSde(a=0.0))),
            "sampling.same_noise is true with a deterministic sampler",
        ),
        (replace(config, optimizer=replace(optimizer, lr=-1.0)), "optimizer.lr is -1.0; it needs to be above 0"),
        (
            replace(config, optimizer=replace(optimizer, updates_per_rollout=9)),
            "optimizer.updates_per_rollout is 9, more than the 2 groups",
        ),
        (
            replace(config, judge=replace(judge_of(config), server=None)),
            "judge.endpoints is empty and judge.server is not set",
        ),
        (
            replace(config, judge=replace(judge_of(config), server=None, endpoints=("localhost:80",))),
            "each needs to be a URL",
        ),
        (
            replace(config, judge=replace(judge_of(config), server=None, endpoints=("http://[::1:80/v1",))),
            "each needs to be a URL",
        ),
        (
            replace(config, judge=replace(judge_of(config), server=None, endpoints=("http://me:secret@host/v1",))),
            "judge.endpoints holds a name or a password before an @",
        ),
        (
            replace(config, checkpoint=replace(config.checkpoint, mirror="s3://me:secret@bucket/runs")),
            "checkpoint.mirror holds a name or a password before an @",
        ),
        (replace(config, judge=replace(judge_of(config), temperature=-1.0)), "judge.temperature is -1.0"),
        (replace(config, judge=replace(judge_of(config), model="")), "judge.model is empty"),
        (
            replace(config, judge=replace(judge_of(config), family=Unified2Pair())),
            "judge.family Unified2Pair compares ('alignment', 'coherence', 'style')",
        ),
        (
            replace(config, judge=replace(judge_of(config), pairs=Pivots(count=1))),
            "reward is WinRate, but judge.pairs Pivots leaves out some of the 6 pairs",
        ),
        (
            replace(
                config,
                judge=replace(judge_of(config), pairs=Swiss()),
                reward=Several(names=("a",), rewards=(Consistent(),)),
            ),
            "reward.rewards.0.inner is WinRate, but judge.pairs Swiss",
        ),
        (replace(config, generator=replace(_flux(config), height=30)), "generator.height is 30; Flux packs"),
        (
            replace(config, generator=replace(_flux(config), model="./nowhere")),
            "generator.model is './nowhere', which is no folder",
        ),
        (
            replace(config, judge=replace(judge_of(config), family=Unified2Point())),
            "reward is WinRate, which counts wins, but",
        ),
        (
            replace(config, sampling=replace(sampling, dynamics=Ode(), same_noise=False)),
            "sampling.dynamics has no noise",
        ),
        (replace(config, steps="3"), "steps is '3'; it needs to be a whole number"),  # type: ignore[arg-type]
    ]


def test_dimensions_that_the_judge_has_and_incomplete_plans_are_taken(config: RunConfig) -> None:
    judge = replace(judge_of(config), family=Unified2Pair(), pairs=Pivots(count=1))
    replace(config, judge=judge, reward=BradleyTerry(anchors=("style", "alignment"))).validate()
    replace(config, judge=replace(judge_of(config), family=Unified1Pair())).validate()  # the overall winner alone
    of_16 = replace(config.sampling, group_size=16)
    replace(config, judge=replace(judge_of(config), pairs=Calibrated()), sampling=of_16).validate()


def test_a_name_in_a_mirrors_url_is_no_secret(config: RunConfig) -> None:
    mirror = "abfs://container@account.dfs.core.windows.net/runs"
    said = [text for _, text in replace(config.checkpoint, mirror=mirror).problems()]
    assert not any("password" in text for text in said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout_gpus": -1.0}, "placement.rollout_gpus is -1.0; it cannot be negative"),
        ({"scorer_cpus": -0.5}, "placement.scorer_cpus is -0.5; it cannot be negative"),
        ({"learner_gpus": 1.5}, "placement.learner_gpus is 1.5; Ray gives a part of one GPU, below 1, or a whole number"),
        ({"learners": 2, "learner_gpus": 0.5}, "placement.learner_gpus is 0.5 with placement.learners=2: two of them"),
        ({"broadcast": True, "learner_gpus": 0.5, "rollout_gpus": 0.5}, "placement.broadcast is true with placement.learn"),
        ({"broadcast": True, "rollout_workers": 2, "learner_gpus": 1.0, "rollout_gpus": 0.4}, "set both to 1, or broadca"),
        ({"base_bits": 4}, "base_bits is 4, which works on CUDA only, but no process has a GPU; set it to 0, or placement.l"),
        ({"base_bits": 8, "colocated": True, "rollout_gpus": 1.0}, "or placement.learner_gpus above 0"),
        ({"base_bits": 8, "shard_base": True, "learners": 2, "learner_gpus": 1.0}, "base_bits is 8 with placement.shard_base"),
        ({"learners": 2, "learner_gpus": 0.6, "rollout_gpus": 0.4, "learner_cpus": 1.5}, ""),
        ({"broadcast": True, "rollout_workers": 2, "learner_gpus": 2.0, "rollout_gpus": 0.6}, ""),
        ({"base_bits": 8, "learner_gpus": 1.0, "rollout_gpus": 1.0}, ""),
    ],
)  # fmt: skip
def test_what_processes_ask_for_is_what_they_can_use(config: RunConfig, changes: dict[str, Any], message: str) -> None:
    memory = Memory(base_bits=changes.get("base_bits", 0))
    placement = replace(config.placement, **{name: value for name, value in changes.items() if name != "base_bits"})
    adapter = Full() if placement.broadcast else config.adapter
    generator = replace(_flux(config), memory=memory)
    placed = replace(config, adapter=adapter, placement=placement, generator=generator)
    problems = [*((f"placement.{name}", text) for name, text in placement.problems()), *rules_between_parts(placed)]
    said = "\n".join(f"{name} {text}" for name, text in problems)
    assert message in said if message else not said


def test_invalid_configurations_are_refused_by_name(config: RunConfig) -> None:
    for broken, message in invalid(config):
        with pytest.raises(ConfigError) as error:
            broken.validate()
        assert message in str(error.value)


def test_all_complaints_come_at_once(config: RunConfig) -> None:
    with pytest.raises(ConfigError) as error:
        replace(config, steps=0, adapter=replace(config.adapter, rank=0)).validate()
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("def config(:", "makes no configuration: SyntaxError"), ("x = 1", "has no function config()"),
     ("def config(): return 3", "returns int; it needs to return a RunConfig"),
     ("from nowhere import x", "ModuleNotFoundError")],
)  # fmt: skip
def test_broken_experiments_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_experiment(file)
    assert message in str(error.value)


def test_a_misspelt_experiment_gets_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'experiments/shapes_image\.py'"):
        load_experiment("experiments/shape_image.py")


@pytest.mark.parametrize(
    "text", ["{", '{"type": "grpo_flex.config:Gone"}', '{"type": "grpo_flex.config:Prompts", "colour": 3}']
)
def test_a_config_file_of_another_version_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="does not fit this version"):
        from_json(text)


def test_nothing_heavy_is_imported_to_check_a_configuration() -> None:
    code = (
        "import sys; from grpo_flex.__main__ import main; status = main(['train', 'experiments/shapes_image.py', 'optmizer.lr=1']);"
        "heavy = {'torch', 'ray', 'diffusers', 'transformers', 'wandb', 'matplotlib', 'aiohttp'} & set(sys.modules);"
        "print(status, sorted(heavy))"
    )
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "2 []", done.stdout + done.stderr
    assert done.stderr == "error: no config field 'optmizer'; did you mean 'optimizer'?\n"


@pytest.mark.parametrize("wrong", ["512", None])
def test_a_mistyped_size_of_held_out_samples_is_one_complaint(config: RunConfig, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"^evaluation\.height is .*; it needs to be a whole number$"):
        replace(config, evaluation=replace(config.evaluation, height=wrong)).validate()


@pytest.mark.parametrize(
    ("family", "reward", "field"),
    [
        (Unified1Point(), Pointwise(), "reward.criteria"),
        (
            RankAndScore(),
            Several(names=("a", "b"), rewards=(BradleyTerry(anchors=()), Pointwise())),
            "reward.rewards.1.criteria",
        ),
    ],
)
def test_which_of_several_kinds_of_scores_count_has_to_be_said(
    config: RunConfig, family: Any, reward: Any, field: str
) -> None:
    made = replace(config, judge=replace(judge_of(config), family=family), reward=reward)
    with pytest.raises(ConfigError, match=rf"{field} is empty.*give Pointwise\(criteria=\('final',\)\)"):
        made.validate()
