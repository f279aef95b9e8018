"""One experiment on clusters of different shapes: colocated on one node, or on several nodes that lose processes."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster as Raylets
from ray.exceptions import ObjectLostError

from grpo_flex import placement
from grpo_flex.__main__ import main
from grpo_flex.config import ConfigError, RunConfig
from grpo_flex.fleet import Fleet
from grpo_flex.metrics import read_metrics
from grpo_flex.run import RESUME_ME
from grpo_flex.train import Flight, Trainer
from grpo_flex.verdicts import FILE_NAME, read_verdicts
from testbed.oracle_judge import OracleJudge
from tests.configs import judge_of, tiny_config
from tests.integration.processes import descendants, experiment_file, rows, start_training, wait_for
from tests.integration.test_outages import SLOW
from tests.integration.test_rewards import scored
from tests.integration.test_run import numbers, refused
from tests.one_process import StandInJudge, in_one_process
from tests.unit.test_fleet import lost_with_its_node

STEPS = 4


def placed(folder: Path, **placement: Any) -> RunConfig:
    config = tiny_config(folder, steps=STEPS)
    apart = {"learners": 2, "rollout_workers": 2} | placement
    return replace(config, placement=replace(config.placement, **apart))


@pytest.fixture
def raylets() -> Iterator[Raylets]:
    """Two nodes of two CPUs each: room for two rollout workers and two learners, and for nothing else."""
    nodes = Raylets(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes.add_node(num_cpus=2)
    nodes.wait_for_nodes()
    yield nodes
    ray.shutdown()  # of a test that has joined them
    nodes.shutdown()


def test_where_processes_sit_and_that_one_dies_or_joins_does_not_show_in_the_numbers(
    raylets: Raylets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Apart on two nodes, a third that joins, a learner that is killed: all as colocated on one node that loses groups."""
    config = placed(tmp_path, ray_address=raylets.address, rollout_workers_max=3)
    config = replace(config, judge=replace(judge_of(config), server=SLOW))
    process = start_training(experiment_file(config, tmp_path))
    run_dir = tmp_path / "runs" / "tiny"
    wait_for(lambda: len(rows(run_dir)) >= 2, process)
    # First the kill: while learners start again the new node has the time to come, however fast the steps are.
    os.kill(descendants(os.getpid(), "ray::LearnerActor")[1], signal.SIGKILL)
    raylets.add_node(num_cpus=1)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "a learner died; starting again from the last completed step" in out and "rollout-2 joins" in out
    table = (run_dir / "placement.txt").read_text()
    assert all(
        name in table for name in ("rollout-0", "rollout-1", "learner-0", "learner-1", "judge client", "http://")
    )
    assert len({line.split()[1] for line in table.splitlines() if line.startswith(("rollout-", "learner-"))}) == 2

    other = tmp_path / "colocated"
    other.mkdir()
    lost = losing_groups(monkeypatch)
    assert main(["train", experiment_file(placed(other, colocated=True), other)]) == 0
    assert len(lost) == 2 and "step 2: 2 groups lost with their node; sampling again" in capsys.readouterr().out
    assert "rollout" not in (other / "runs" / "tiny" / "placement.txt").read_text()
    assert numbers(run_dir) == numbers(other / "runs" / "tiny")
    assert questions(run_dir) == questions(other / "runs" / "tiny")  # what was answered was not asked again


def losing_groups(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Just before its update the second step loses all groups, which the judge has seen; these groups."""
    learn, lost = Trainer.learn, []

    def learn_without(self: Trainer, flight: Flight, *given: Any) -> dict[str, float]:
        if self.step == 1 and not lost:
            lost.extend(flight.groups)
            for job in flight.jobs:
                job.results = [lost_with_its_node.remote() for _ in job.results]
        return learn(self, flight, *given)

    monkeypatch.setattr(Trainer, "learn", learn_without)
    return lost


def questions(run_dir: Path) -> Counter[tuple[Any, ...]]:
    return Counter((e.step, e.prompt_id, e.verdict.members) for e in read_verdicts(run_dir / FILE_NAME))


class Maker:
    def ready(self) -> None: ...

    @ray.method(num_returns=2)
    def make(self, n: int) -> tuple[float, np.ndarray]:
        """So much that it stays on its node until somebody fetches it."""
        return 0.0, np.full(100_000, n)


@ray.remote(num_cpus=0)
def first_of(result: np.ndarray) -> int:
    return int(result[0])


def test_what_a_node_takes_along_is_made_again(raylets: Raylets) -> None:
    doomed = raylets.add_node(num_cpus=1, resources={"doomed": 1})
    ray.init(address=raylets.address, log_to_driver=False)
    said: list[str] = []
    maker: Any = ray.remote(Maker)
    start = lambda _, lost: maker.options(num_cpus=0, resources={} if lost else {"doomed": 1}).remote()  # noqa: E731
    fleet = Fleet(start, ["a"], timeout_s=60.0, restarts=1, say=said.append)
    followed: list[Any] = []
    job = fleet.submit("make", 7, follow=followed.append)
    fleet.wait([job])
    raylets.remove_node(doomed)
    with pytest.raises(ObjectLostError):  # as the judge's call, a scorer's or a learner's
        ray.get(first_of.remote(followed[0]))
    assert fleet.fetch(job)[0] == ray.get(first_of.remote(followed[-1])) == 7
    assert said == ["a died; starting it again"]


def test_sampling_ahead_is_stale_by_so_much_and_a_resume_equals_the_run_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster, stopped and gone on with in one process, and in one process and never stopped."""
    config = scored(tmp_path, steps=STEPS)
    config = replace(config, sampling=replace(config.sampling, lookahead=1))
    process = start_training(file := experiment_file(config, tmp_path))
    stopped = tmp_path / "runs" / "tiny"
    wait_for(lambda: len(rows(stopped)) >= 2, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    in_one_process(monkeypatch, StandInJudge(lambda _: 0))
    if process.returncode == RESUME_ME:  # it may have been at its last step
        assert main(["train", "--resume", str(stopped)]) == 0
    assert main(["train", file]) == 0
    straight = tmp_path / "runs" / "tiny-2"
    assert [row["policy/staleness"] for row in read_metrics(straight)[1:]] == [0, 1, 1, 1]
    # At staleness 0 sampler and learner agree bit for bit; at 1 the first ratio tells how far an update went.
    away = [row["policy/first_log_ratio_abs"] for row in read_metrics(straight)[1:]]
    assert away[0] == 0 and all(a is not None and a > 0 for a in away[1:])
    assert numbers(stopped) == numbers(straight), out


def test_what_a_cluster_does_not_offer_is_refused_before_anything_starts(
    raylets: Raylets, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "RESERVE_S", 3.0)
    monkeypatch.setattr(OracleJudge, "start", lambda *_: pytest.fail("the judge was started"))
    there = {"ray_address": raylets.address, "wait_s": 0.0}
    message = refused(placed(tmp_path, rollout_workers=5, **there), tmp_path, capsys)
    assert "placement needs 7 CPUs" in message and "has 4" in message and "placement.rollout_workers" in message
    wide = placed(tmp_path, learner_cpus=0.5, rollout_workers=1, rollout_cpus=3, **there)
    message = refused(wide, tmp_path, capsys)
    assert "no arrangement on these nodes holds" in message and "rollout-0 3 CPU" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learners": 3}, r"placement.learners is 3, but an update has 2 groups"),
        ({"learners": 1, "shard_base": True}, r"placement.shard_base is true with placement.learners=1"),
        ({"colocated": True, "shard_base": True}, r"placement.shard_base is true with placement.colocated"),
        ({"rollout_workers": 3, "rollout_workers_max": 2}, r"placement.rollout_workers_max is 2, less than"),
        ({"rollout_timeout_s": 0.0}, r"placement.rollout_timeout_s is 0.0"),
    ],
)
def test_what_no_cluster_could_do(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(ConfigError, match=message):
        replace(config, placement=replace(config.placement, **changes)).validate()
