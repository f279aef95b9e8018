"""`shapes_image.py` with UnifiedReward's way from verdicts to updates: pairs are ranked, winners and losers sifted by
scores of their own, and the one pair that is left of each group goes into online Flow-DPO.

The tiny judge answers both kinds of question, 14 about pairs and 8 about single pictures of a group of 8. Its settings are not tuned:
of the objectives that were compared DPO learnt least (`LOG.md`).
"""

from dataclasses import replace

from experiments import shapes_image, shapes_image_pointwise
from grpo_flex.advantages import BestAndWorst
from grpo_flex.config import RunConfig
from grpo_flex.objectives.dpo import Dpo
from grpo_flex.rewards import Several
from reward_server.families.rank_and_score import RankAndScore


def config() -> RunConfig:
    pairwise, pointwise = shapes_image.config(), shapes_image_pointwise.config()
    assert pairwise.judge is not None and pointwise.judge is not None
    return replace(
        pairwise,
        name="shapes_image_dpo",
        judge=replace(pairwise.judge, family=RankAndScore(rank=pairwise.judge.family, score=pointwise.judge.family)),
        reward=Several(names=("rank", "score"), rewards=(pairwise.reward, pointwise.reward)),
        advantage=BestAndWorst(rank="rank", score="score"),
        objective=Dpo(),
    )
