"""Wan2.1-T2V at its true size with random weights on one GPU: speed, memory against the plan, precision.

    python -m benchmarks.gpu_wan --size 14B --group-size 2 --peak-tflops 989

On the CPU: ``--tiny``. The weights are random, so what is drawn means nothing; time and memory do not depend on it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu import Row, parser, run, save
from experiments import flux1_dev_flex
from grpo_flex.config import RunConfig
from grpo_flex.dynamics import AllButLast
from grpo_flex.generators.blank import Description, describe
from grpo_flex.generators.wan import Wan


def main(argv: Sequence[str] | None = None) -> list[Row]:
    made = parser("Wan2.1-T2V at its true size with random weights on one GPU")
    made.add_argument("--size", choices=("1.3B", "14B"), default="1.3B")
    arguments = made.parse_args(argv)
    model = f"Wan-AI/Wan2.1-T2V-{arguments.size}-Diffusers"
    with tempfile.TemporaryDirectory() as folder:
        generator = Wan(model=model, height=240, width=416, frames=33, dtype="bfloat16")
        if arguments.tiny:
            small = save(shrunk(describe(model)), Path(folder))
            generator = replace(generator, model=small, height=32, width=32, frames=5, max_sequence_length=16)
        return run(config(generator, arguments.group_size, arguments.steps), arguments)


def shrunk(described: Description) -> Description:
    """The same pipeline with a layer or two of a few channels."""
    small = {
        "transformer": {
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "ffn_dim": 64,
            "text_dim": 32,
        },
        "vae": {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        "text_encoder": {"d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": 64},
    }
    parts = {name: {**part, **small.get(name, {})} for name, part in described.parts.items()}
    return Description(index=described.index, parts=parts)


def config(generator: Wan, group_size: int, steps: int) -> RunConfig:
    """An adapter of the published rank, with a group and a schedule that a benchmark can afford."""
    base = flux1_dev_flex.config()
    sampling = replace(base.sampling, group_size=group_size, steps=steps, window=AllButLast(), same_noise=False)
    return replace(base, generator=generator, sampling=sampling)


if __name__ == "__main__":
    main()
