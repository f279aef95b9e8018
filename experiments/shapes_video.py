"""The main job for video: a tiny Wan learns to obey its prompts from the verdicts of a tiny judge of clips that vLLM serves, on two cores.

The path is that of `shapes_image.py`: the judge, which sees eight frames of each clip, is what is optimised, and the oracle's
score on held-out prompts is the truth that nobody optimises. `shapes_video_oracle.py` asks the oracle itself.
"""

from dataclasses import replace

from experiments import shapes_video_oracle
from grpo_flex.config import Judge, RunConfig
from grpo_flex.objectives.nft import Nft
from grpo_flex.pairing import Budgeted
from grpo_flex.rewards import BradleyTerry
from reward_server.families.flex import Flex
from reward_server.serve import VllmJudge


def config() -> RunConfig:
    base = shapes_video_oracle.config()
    return replace(
        base,
        name="shapes_video",
        steps=52,
        # Sampler, judge and learner share two cores: half the siblings, and half the pairs of those, are about an eighth of
        # the oracle recipe's questions.
        sampling=replace(base.sampling, group_size=8),
        judge=Judge(
            family=Flex(medium="video", prompt_file="testbed/tiny_video_judge/prompt.txt", structured=False),
            server=VllmJudge(
                model="testbed/tiny_video_judge",
                max_model_len=512,
                kv_cache_gb=1,
                cpu_threads=1,
                extra=("--dtype", "float32"),
            ),
            pairs=Budgeted(share=0.5),
            max_tokens=128,
            concurrency=128,
        ),
        reward=BradleyTerry(weights=(1.0, 0.5, 0.1)),
        # As in `shapes_image.py`.
        objective=Nft(kl_beta=0.0),
        optimizer=replace(base.optimizer, updates_per_rollout=4),
    )
