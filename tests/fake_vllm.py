"""A stand-in for vLLM's process: takes its command line, answers /v1/models, has helpers that must not be left behind."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from reward_server.serve import VllmJudge

_SCRIPT = """\
#!{python} -IS
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

mode = {mode!r}
words = sys.argv[1:]
flags = dict(zip(words, words[1:]))
helper = subprocess.Popen(["sleep", "300"])
hidden = subprocess.Popen(["sleep", "300"], start_new_session=True)
known = dict(argv=words, environment=dict(os.environ), pids=[os.getpid(), helper.pid, hidden.pid])
with open({folder!r} + "/started_" + flags["--port"] + ".json", "w") as file:
    json.dump(known, file)
if mode == "crash":
    print("(EngineCore pid=7) ERROR 11-21 06:55:31 [core.py:1] OutOfMemoryError: not enough of it")
    print("\\n".join("more" for _ in range(30)))
    sys.exit(3)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "hang":
    time.sleep(300)

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        key = os.environ.get("VLLM_API_KEY")
        good = not key or self.headers.get("Authorization") == "Bearer " + key
        body = json.dumps({{"data": [{{"id": flags["--served-model-name"]}}]}}).encode()
        self.send_response(200 if good else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass

ThreadingHTTPServer((flags["--host"], int(flags["--port"])), Handler).serve_forever()
"""


def fake_judge(folder: Path, mode: str = "", **settings: Any) -> VllmJudge:
    """A judge whose vLLM is the stand-in. ``mode``: "", "crash", "hang" or "stubborn" (ignores SIGTERM)."""
    script, model = folder / "python", folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    script.write_text(_SCRIPT.format(python=sys.executable, mode=mode, folder=str(folder)))
    script.chmod(0o755)
    chosen: dict[str, Any] = {"python": str(script), "model": str(model), "device": "cpu", "ray_address": "none"}
    return VllmJudge(**(chosen | settings))


def started(folder: Path) -> list[dict[str, Any]]:
    """What each stand-in was started with: argv, environment, and its and its helpers' pids."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("started_*.json"))]


def pids(folder: Path) -> list[int]:
    return [pid for known in started(folder) for pid in known["pids"]]


def living(wanted: list[int], within_s: float = 0.0) -> list[int]:
    """Those of the processes that still run; waits up to ``within_s`` for none to."""
    end = time.monotonic() + within_s
    while (found := [pid for pid in wanted if _runs(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def _runs(pid: int) -> bool:
    """A zombie, whose parent has not looked yet, runs no more."""
    if not os.path.isdir("/proc/self"):
        return _exists(pid)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
