"""`wan21_14b_flex.py` with Wan2.2-T2V-A14B: an adapter for each of its two experts, and a pull to the base that adapts itself.

The boundary between the experts is the model's own, 0.875. Nobody has run this recipe yet; ``kl_target`` is our guess. The
learners share out both experts, so all groups of a step train the same noise levels; a worker holds both beside the text
encoder, which leaves room for three clips at once
(`python -m grpo_flex plan experiments/wan22_a14b_flex.py --gpus 8 --gpu-memory 80`).
"""

from experiments import wan21_14b_flex
from grpo_flex.config import RunConfig
from grpo_flex.overrides import override


def config() -> RunConfig:
    changes = (
        "name=wan22_a14b_flex",
        "generator.model=Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "generator.guidance=4.0",
        "generator.guidance_2=3.0",
        "sampling.window.shared=true",
        "sampling.micro_batch=3",
        "objective.kl_target=1e-5",
        "optimizer.lr=4e-5",
        "placement.learners=2",
        "placement.shard_base=true",
        "placement.rollout_workers=6",
    )
    return override(wan21_14b_flex.config(), changes)
