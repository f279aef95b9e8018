"""Verdicts a second of a small judge that vLLM serves on a CPU: one process or two, with the reply's grammar or without.

    python -m benchmarks.judge_throughput [testbed/tiny_judge]
    python -m benchmarks.judge_throughput --reply-tokens 1 22 44 88 176 352     # what a longer reply costs

Each server answers the same questions, pairs of renders for random prompts; those of the first round only warm it up.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from reward_server.asking import Endpoint
from reward_server.families.flex import Flex
from reward_server.serve import VllmJudge
from testbed.judge_preferences import render_pairs
from testbed.measure_judge import Question, answers

WARM_UP = 16
SEED = 5


def rates(
    server: VllmJudge, families: Sequence[Flex], concurrencies: Sequence[int], questions: Sequence[Question]
) -> list[str]:
    """A line for each family and concurrency."""
    lines = []
    with tempfile.TemporaryDirectory() as logs, server.start(logs) as running:
        endpoint = Endpoint(url=running.endpoints[0], model=server.served_name, max_tokens=96, concurrency=WARM_UP)
        answers(endpoint, families[0], questions[:WARM_UP])
        for family in families:
            for concurrency in concurrencies:
                found = measured(replace(endpoint, concurrency=concurrency), family, questions)
                lines.append(f"{server.cpu_threads or 'two':>9}{family.structured!s:>9}{concurrency:>13}{found}")
                print(lines[-1], flush=True)
    return lines


def measured(endpoint: Endpoint, family: Flex, questions: Sequence[Question]) -> str:
    """Verdicts a second, tokens a reply and the share that could be read, as the end of a line."""
    start = time.monotonic()
    read = answers(endpoint, family, questions)
    spent = time.monotonic() - start
    parsed = np.mean([reply.status == "ok" for reply, _ in read])
    tokens = np.mean([count for _, count in read])
    return f"{len(read) / spent:>12.1f}{tokens:>9.0f}{parsed:>9.3f}"


def lengths(server: VllmJudge, family: Flex, tokens: Sequence[int], questions: Sequence[Question]) -> None:
    """A line for each length of the reply, which the server holds to whatever the judge would say."""
    print(f"{'verdicts/s':>12}{'tokens':>9}{'parsed':>9}", flush=True)
    with tempfile.TemporaryDirectory() as logs, server.start(logs) as running:
        url, most = running.endpoints[0], len(questions)
        endpoint = Endpoint(url=url, model=server.served_name, max_tokens=max(tokens), concurrency=most)
        answers(endpoint, family, questions[:WARM_UP])
        for count in tokens:
            held = {"ignore_eos": True, "min_tokens": count}
            print(measured(replace(endpoint, max_tokens=count, body=held), family, questions), flush=True)


def main() -> None:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judge_throughput", description=about)
    parser.add_argument("model", nargs="?", type=Path, default=Path("testbed/tiny_judge"))
    parser.add_argument("--questions", type=int, default=224)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--reply-tokens", type=int, nargs="+", default=[], help="instead: replies of such lengths")
    options = parser.parse_args()
    questions = [(pair.text, pair.images) for pair in render_pairs(options.questions, SEED)]
    flex = Flex(prompt_file=str(options.model / "prompt.txt"))
    families = (flex, replace(flex, structured=False))
    plain = VllmJudge(model=str(options.model), max_model_len=512, kv_cache_gb=1, extra=("--dtype", "float32"))
    if options.reply_tokens:
        lengths(replace(plain, cpu_threads=1), families[1], options.reply_tokens, questions)
        return
    head = f"{'threads':>9}{'grammar':>9}{'concurrency':>13}{'verdicts/s':>12}{'tokens':>9}{'parsed':>9}"
    print(head, flush=True)
    table = [
        rates(server, families, options.concurrency, questions) for server in (plain, replace(plain, cpu_threads=1))
    ]
    print("\n".join(["", head, *(line for lines in table for line in lines)]))


if __name__ == "__main__":
    main()
