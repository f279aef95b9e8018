"""`wan21_14b_flex.py` with Wan2.1's small model: one learner and three rollout workers on four GPUs.

Nobody has run this recipe yet; the learning rate is the large model's.
"""

from experiments import wan21_14b_flex
from grpo_flex.config import RunConfig
from grpo_flex.overrides import override


def config() -> RunConfig:
    changes = (
        "name=wan21_1_3b_flex",
        "generator.model=Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "placement.rollout_workers=3",
        "placement.update_timeout_s=7200",
    )
    return override(wan21_14b_flex.config(), changes)
