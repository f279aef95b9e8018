"""The same as `judge_flex_qwen3vl_8b.py` for a judge of 2B parameters."""

from reward_server.asking import Endpoint
from reward_server.judge_training import Dpo, JudgeTraining, Pairs, Sft


def config() -> JudgeTraining:
    return JudgeTraining(
        name="judge_flex_qwen3vl_2b",
        model="Qwen/Qwen3-VL-2B-Instruct",
        sft=Sft(lr=2.5e-6, batch=2, accumulation=2, warmup=0.1),
        pairs=Pairs(endpoint=Endpoint(temperature=0.7)),
        dpo=Dpo(beta=0.1),
        train_vision=False,
        loader_workers=4,
    )
