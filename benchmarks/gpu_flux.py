"""FLUX.1-dev at its true size with random weights on one GPU: speed, memory against the plan, precision.

    python -m benchmarks.gpu_flux --group-size 9 --peak-tflops 989

On the CPU: ``--tiny``. The weights are random, so what is drawn means nothing; time and memory do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.gpu import Row, parser, run
from experiments import flux1_dev_flex
from grpo_flex.config import RunConfig
from grpo_flex.dynamics import AllButLast
from grpo_flex.generators.flux import Flux


def main(argv: Sequence[str] | None = None) -> list[Row]:
    arguments = parser("FLUX.1-dev at its true size with random weights on one GPU").parse_args(argv)
    return run(config(arguments.tiny, arguments.group_size, arguments.steps), arguments)


def config(tiny: bool, group_size: int, steps: int) -> RunConfig:
    """The recipe's generator and adapter, with a group and a schedule that a benchmark can afford."""
    base = flux1_dev_flex.config()
    small = Flux(model="testbed/tiny_flux", height=64, width=64, max_sequence_length=16, dtype="bfloat16")
    sampling = replace(base.sampling, group_size=group_size, steps=steps, window=AllButLast(), same_noise=False)
    adapter = replace(base.adapter, rank=4) if tiny else base.adapter
    return replace(base, generator=small if tiny else base.generator, sampling=sampling, adapter=adapter)


if __name__ == "__main__":
    main()
