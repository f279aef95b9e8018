"""The main job: a tiny FLUX learns to obey its prompts from the verdicts of a tiny judge that vLLM serves, on two cores.

The judge, a Qwen3-VL that `reward_server`'s recipe has trained from nothing, is what is optimised. The oracle's score on held-out
prompts is the truth that nobody optimises. `shapes_image_oracle.py` asks the oracle itself.
"""

from dataclasses import replace

from experiments import shapes_image_oracle
from grpo_flex.config import Judge, RunConfig
from grpo_flex.objectives.nft import Nft
from grpo_flex.pairing import Budgeted
from grpo_flex.rewards import BradleyTerry
from reward_server.families.flex import Flex
from reward_server.serve import VllmJudge


def config() -> RunConfig:
    base = shapes_image_oracle.config()
    return replace(
        base,
        name="shapes_image",
        steps=52,
        # Sampler, judge and learner share two cores: half the siblings, and half the pairs of those, are about an eighth of
        # the oracle recipe's questions.
        sampling=replace(base.sampling, group_size=8),
        judge=Judge(
            family=Flex(prompt_file="testbed/tiny_judge/prompt.txt", structured=False),
            server=VllmJudge(
                model="testbed/tiny_judge",
                max_model_len=512,
                kv_cache_gb=1,
                cpu_threads=1,
                gpu_memory=0.1,  # where there is a GPU, workers and learner may want the rest
                extra=("--dtype", "float32"),
            ),
            pairs=Budgeted(share=0.5),
            max_tokens=96,
            concurrency=128,
        ),
        reward=BradleyTerry(weights=(1.0, 0.5, 0.1)),
        # Four optimiser steps on two groups each cost what two on four do, and learn more; then the pull to the base is not missed
        # (LOG.md, the judge before: +.171 in 52 steps, +.148 in 72 with two and a pull).
        objective=Nft(kl_beta=0.0),
        optimizer=replace(base.optimizer, updates_per_rollout=4),
    )
