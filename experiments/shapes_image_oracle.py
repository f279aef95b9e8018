"""A tiny FLUX learns to obey its prompts from the oracle's pairwise verdicts, on a plain two-core machine.

DiffusionNFT, because it learnt about twice as much a step as Flow-GRPO here (`LOG.md`); `shapes_image_flow_grpo.py` is the
same run with Flow-GRPO's clipped policy gradient.
"""

from grpo_flex.advantages import GroupRelative
from grpo_flex.config import Adapter, Checkpoint, Evaluation, Judge, Optimizer, Placement, Prompts, RunConfig, Sampling
from grpo_flex.dynamics import AllButLast, Ode
from grpo_flex.generators.flux import Flux
from grpo_flex.objectives.nft import Nft
from grpo_flex.pairing import RoundRobin
from grpo_flex.rewards import WinRate
from reward_server.families.flex import Flex
from testbed.oracle import ShapesOracle
from testbed.oracle_judge import OracleJudge


def config() -> RunConfig:
    return RunConfig(
        name="shapes_image_oracle",
        steps=84,
        generator=Flux(model="testbed/tiny_flux", height=64, width=64, shift=3.0, max_sequence_length=16),
        prompts=Prompts(
            train="testbed/prompts/shapes_train.jsonl", heldout="testbed/prompts/shapes_heldout.jsonl", per_step=8
        ),
        sampling=Sampling(
            group_size=16,
            steps=10,
            eval_steps=10,
            dynamics=Ode(),
            window=AllButLast(),
            same_noise=False,
            lookahead=1,  # the next groups are sampled while the learner learns: a fifth less time a step
        ),
        judge=Judge(family=Flex(), server=OracleJudge(), pairs=RoundRobin()),
        reward=WinRate(weights=(1.0, 0.5, 0.1)),
        advantage=GroupRelative(alpha=0.7, scale="batch"),
        objective=Nft(kl_beta=0.06),
        adapter=Adapter(rank=16, alpha=32),
        optimizer=Optimizer(lr=1e-3, lr_end=0.1, updates_per_rollout=2, ema=0.9),
        evaluation=Evaluation(every=10, scorer=ShapesOracle(), samples_per_prompt=2),
        placement=Placement(learner_threads=1),  # a second one gains little, and loses much beside other work
        checkpoint=Checkpoint(every=10),
    )
