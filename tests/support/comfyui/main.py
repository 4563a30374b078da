#!/usr/bin/env python3
"""A stand-in for ComfyUI 0.3.64: its arguments, its paths, its manners; standard library only.

What the real one was seen to do, and this does, too:
- it empties its temporary directory before anything else, and finds its port taken only at the end;
- no GPU and no --cpu: exit 1; --cpu beside --highvram and its like, or a --user-directory that is
  not there: a usage error, exit 2; a port that is taken: a traceback and exit 1;
- SIGINT: the temporary directory goes, the job that runs is lost, exit 0; SIGTERM: the end at once;
- GET /system_stats has `system.argv`; GET /prompt counts what waits and what runs.

GET /system_stats, /prompt, /queue, /history
POST /prompt    {"prompt": {"seconds": 2.0}}: a job of so many seconds, which writes PROMPT_ID.txt
                into the output directory when it is done
POST /queue     {"clear": true} drops what waits
POST /interrupt ends the running job, POST /free does nothing; both answer 200

Environment:
STANDIN_GPU=1         there is a CUDA device, and no --cpu is needed
STANDIN_START=2.0     seconds from the start until the port is bound
STANDIN_FAIL=1        a custom node that cannot be imported is told of, and nothing else happens
STANDIN_CRASH=FILE    exit 1 after the start's seconds, as long as FILE exists
STANDIN_LATENCY=0.5   seconds that every answer takes
STANDIN_IGNORE=SIGINT,SIGTERM   has no ear for these
STANDIN_TREE=2        so many children, each with a child of its own, in sessions of their own, that
                      ignore SIGTERM, SIGINT and their parent's end; PIDs in USER_DIRECTORY/tree
STANDIN_STRANGER=1    answers /system_stats as somebody else would
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_CHILD = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
os.setsid()
if os.fork() == 0:
    os.setsid()
with open(sys.argv[1], "a") as file:
    file.write(f"{os.getpid()}\\n")
time.sleep(3600)
"""


def log(text: str) -> None:
    print(text, flush=True)


def setting(name: str) -> str:
    return os.environ.get(f"STANDIN_{name}", "")


def existing(path: str) -> str:
    if not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"The path '{path}' does not exist.")
    return path


def arguments() -> argparse.Namespace:
    home = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", default="127.0.0.1", nargs="?", const="0.0.0.0,::")
    parser.add_argument("--port", type=int, default=8188)
    parser.add_argument("--base-directory")
    parser.add_argument("--output-directory", default=str(home / "output"))
    parser.add_argument("--temp-directory", default=str(home))
    parser.add_argument("--input-directory", default=str(home / "input"))
    parser.add_argument("--user-directory", type=existing, default=str(home / "user"))
    parser.add_argument("--database-url", default=f"sqlite:///{home}/user/comfyui.db")
    parser.add_argument("--extra-model-paths-config", nargs="+", action="append", default=[])
    parser.add_argument("--cuda-device", type=int)
    where = parser.add_mutually_exclusive_group()
    for flag in ("--gpu-only", "--highvram", "--normalvram", "--lowvram", "--novram", "--cpu"):
        where.add_argument(flag, action="store_true")
    parser.add_argument("--preview-method", default="none")
    return parser.parse_args()


class Queue:
    """One job after the other, as the real one computes them."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.waiting: list[tuple[str, float]] = []
        self.running: tuple[str, float] | None = None
        self.done: dict[str, Any] = {}
        self.changed = threading.Condition()
        self.interrupted = threading.Event()

    def add(self, seconds: float) -> str:
        prompt = str(uuid.uuid4())
        with self.changed:
            self.waiting.append((prompt, seconds))
            self.changed.notify()
        return prompt

    def remaining(self) -> int:
        with self.changed:
            return len(self.waiting) + (self.running is not None)

    def work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
                prompt, seconds = self.running = self.waiting.pop(0)
                self.interrupted.clear()
            whole = not self.interrupted.wait(seconds)
            if whole:
                self.output.mkdir(parents=True, exist_ok=True)
                (self.output / f"{prompt}.txt").write_text(f"{seconds}\n")
                log(f"Prompt executed in {seconds:.2f} seconds")
            with self.changed:
                self.done[prompt] = {"status": {"status_str": "success" if whole else "error"}}
                self.running = None


class Handler(BaseHTTPRequestHandler):
    queue: Queue

    def do_GET(self) -> None:
        time.sleep(float(setting("LATENCY") or 0))
        if self.path == "/system_stats":
            argv = ["somebody.py"] if setting("STRANGER") else sys.argv
            self._answer({"system": {"comfyui_version": "0.3.64", "argv": argv}, "devices": []})
        elif self.path == "/prompt":
            self._answer({"exec_info": {"queue_remaining": self.queue.remaining()}})
        elif self.path == "/queue":
            running = [self.queue.running[0]] if self.queue.running else []
            waiting = [prompt for prompt, _ in self.queue.waiting]
            self._answer({"queue_running": running, "queue_pending": waiting})
        elif self.path == "/history":
            self._answer(self.queue.done)
        else:
            self._answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", "0"))
        document = json.loads(self.rfile.read(length) or b"{}")
        if self.path == "/prompt":
            prompt = self.queue.add(float(document["prompt"]["seconds"]))
            self._answer({"prompt_id": prompt, "node_errors": {}})
        elif self.path == "/queue" and document.get("clear"):
            with self.queue.changed:
                self.queue.waiting.clear()
            self._answer(None)
        elif self.path == "/interrupt":
            self.queue.interrupted.set()
            self._answer(None)
        elif self.path == "/free":
            self._answer(None)
        else:
            self._answer({"error": "not found"}, 404)

    def _answer(self, document: Any, status: int = 200) -> None:
        data = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        return None


def stopped(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    args = arguments()
    # A shell's `&` has it ignored, and so has whoever is started from there.
    signal.signal(signal.SIGINT, stopped)
    for name in setting("IGNORE").split(","):
        if name:
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if not args.cpu and not setting("GPU"):
        raise RuntimeError("Found no NVIDIA driver on your system.")
    for configs in args.extra_model_paths_config:
        for config in configs:
            Path(config).read_text()
    temporary = Path(args.temp_directory).resolve() / "temp"
    shutil.rmtree(temporary, ignore_errors=True)
    log(f"Setting temp directory to: {temporary}")
    for _ in range(int(setting("TREE") or 0)):
        subprocess.Popen([sys.executable, "-c", _CHILD, str(Path(args.user_directory) / "tree")])
    time.sleep(float(setting("START") or 0))
    if setting("FAIL"):
        log("Cannot import /opt/ComfyUI/custom_nodes/broken module for custom nodes: no module")
        log("   0.0 seconds (IMPORT FAILED): /opt/ComfyUI/custom_nodes/broken")
    if setting("CRASH") and Path(setting("CRASH")).exists():
        raise RuntimeError("told to crash")
    database = Path(args.database_url.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    database.touch()
    Handler.queue = Queue(Path(args.output_directory))
    threading.Thread(target=Handler.queue.work, daemon=True).start()
    temporary.mkdir(parents=True)
    ThreadingHTTPServer.daemon_threads = True
    server = ThreadingHTTPServer((args.listen, args.port), Handler)
    log(f"To see the GUI go to: http://{args.listen}:{args.port}")
    try:
        server.serve_forever(0.05)
    except KeyboardInterrupt:
        log("\nStopped server")
    shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main()
