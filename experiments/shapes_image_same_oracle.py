"""`shapes_image.py` with the oracle in place of the tiny judge and nothing else changed: what that judge's mistakes cost.

`shapes_image_oracle.py` is a recipe of its own, with twice as many siblings, all pairs rated by win rates, more steps of half as
many updates, and a pull to the base. For a judge that tosses a coin in a fifth of its verdicts: judge.server.noise=0.2.
"""

from dataclasses import replace

from experiments import shapes_image
from grpo_flex.config import RunConfig
from testbed.oracle_judge import OracleJudge


def config() -> RunConfig:
    base = shapes_image.config()
    assert base.judge is not None
    return replace(base, name="shapes_image_same_oracle", judge=replace(base.judge, server=OracleJudge()))
