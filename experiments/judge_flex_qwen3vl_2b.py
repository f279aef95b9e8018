"""The same as `judge_flex_qwen3vl_8b.py` for a judge of 2B parameters. Nobody has run this recipe at full size yet."""

from dataclasses import replace

from experiments import judge_flex_qwen3vl_8b
from reward_server.judge_training import JudgeTraining


def config() -> JudgeTraining:
    base = judge_flex_qwen3vl_8b.config()
    return replace(base, name="judge_flex_qwen3vl_2b", model="Qwen/Qwen3-VL-2B-Instruct")
