"""`shapes_image_oracle.py` with Flow-GRPO: stochastic early steps, and a clipped policy gradient on them."""

from dataclasses import replace

from experiments import shapes_image_oracle
from grpo_flex.config import Optimizer, RunConfig
from grpo_flex.dynamics import FastWindow, FlowSde
from grpo_flex.objectives.grpo import Grpo


def config() -> RunConfig:
    base = shapes_image_oracle.config()
    return replace(
        base,
        name="shapes_image_flow_grpo",
        steps=180,
        sampling=replace(base.sampling, dynamics=FlowSde(a=0.9), window=FastWindow(size=3, last_start=2)),
        objective=Grpo(clip=1e-4),
        optimizer=Optimizer(lr=1e-3, lr_end=0.1, updates_per_rollout=4, ema=0.9),
    )
