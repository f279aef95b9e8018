"""UnifiedReward-Flex's own training of an 8B judge: distilled traces, then DPO on the judge's own pairs.

Give the data with sft.traces=… and pairs.preferences=…; `docs/train-a-judge.md` has the commands. The paper's learning
rate, batch and warm-up; β 0.1; two samples at temperature 0.7. The picture encoder is left as it is, as in
UnifiedReward's public configuration of Qwen2.5-VL; whether Flex's training did so too is not known to us. Nobody has run
this recipe at full size yet.
"""

from reward_server.asking import Endpoint
from reward_server.judge_training import Dpo, JudgeTraining, Pairs, Sft


def config() -> JudgeTraining:
    return JudgeTraining(
        name="judge_flex_qwen3vl_8b",
        model="Qwen/Qwen3-VL-8B-Instruct",
        sft=Sft(lr=2.5e-6, batch=2, accumulation=2, warmup=0.1),
        pairs=Pairs(endpoint=Endpoint(temperature=0.7)),
        dpo=Dpo(beta=0.1),
        train_vision=False,
        loader_workers=4,
    )
