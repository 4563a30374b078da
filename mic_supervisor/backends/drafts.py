"""For a first gpus.yaml: an example of each backend, and how to know a server that runs already.

Beside the backends, since only they name themselves. A backend that is not here is proposed
without an example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

EXAMPLES: dict[str, tuple[str, str]] = {
    "triton": (
        "  triton:\n"
        "    image: nvcr.io/nvidia/tritonserver:25.04-py3\n"
        "    model_repository: /srv/triton/model_repository\n"
        "    shm_size: 2g\n",
        "  MAM: {backend: triton, instances_per_gpu: 8}     # a directory of the repository\n",
    ),
    "comfyui": (
        "  comfyui:\n"
        "    path: /opt/ComfyUI                             # the directory that holds main.py\n",
        "  change_face: {backend: comfyui, args: [--highvram]}\n",
    ),
    "vllm": (
        "  vllm:\n    cache: /srv/cache                              # of downloaded models\n",
        "  qwen: {backend: vllm, model: Qwen/Qwen3-8B}\n",
    ),
    "container": (
        "",
        "  embed:                                           # any image\n"
        "    backend: container\n"
        "    image: ghcr.io/huggingface/text-embeddings-inference:1.8\n"
        '    command: [--port, "${port}", --model-id, BAAI/bge-m3]\n'
        "    probe: {http: /health}\n",
    ),
    "process": (
        "",
        "  whisper:                                         # any command\n"
        "    backend: process\n"
        '    command: [/opt/whisper/bin/serve, --port, "${port}"]\n'
        "    env_file: /etc/mic/whisper.env                 # secrets stay out of this file\n"
        "    probe: {http: /health}\n",
    ),
}
"""Backend -> YAML below `backends:` and below `models:`."""

# Flags that the backend sets itself, each followed by a value.
_COMFYUI_OWN = frozenset(
    {
        *("--listen", "--port", "--user-directory", "--temp-directory", "--database-url"),
        *("--output-directory", "--input-directory", "--extra-model-paths-config"),
        *("--cuda-device", "--default-device", "--base-directory"),
        *("--tls-keyfile", "--tls-certfile"),
    }
)


def examples(names: Sequence[str]) -> str:
    """The examples of these backends, as YAML with the keys `backends:` and `models:`."""
    known = [EXAMPLES[name] for name in names if name in EXAMPLES]
    others = [name for name in names if name not in EXAMPLES]
    settings = "".join(settings for settings, _ in known)
    models = "".join(model for _, model in known)
    plugins = "".join(f"  # {name}: see the documentation of that plug-in\n" for name in others)
    return (f"backends:\n{settings}" if settings else "") + f"models:\n{models}{plugins}"


@dataclass(frozen=True, slots=True)
class Recognised:
    """A command of a server that a backend knows.

    `entry` are the model's keys without `backend`; `settings` those below `backends:`.
    """

    backend: str
    name: str
    entry: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def recognise(
    command: Sequence[str], directory: str, exists: Callable[[str], bool]
) -> Recognised | None:
    """`command` begins with an absolute path; `directory` is where it was started."""
    return _comfyui(command, directory, exists) or _vllm(command)


def _comfyui(
    command: Sequence[str], directory: str, exists: Callable[[str], bool]
) -> Recognised | None:
    place = next((i for i, arg in enumerate(command) if PurePosixPath(arg).name == "main.py"), None)
    if place is None:
        return None
    path = str((PurePosixPath(directory) / command[place]).parent)
    if not (exists(f"{path}/comfy") and exists(f"{path}/nodes.py")):
        return None
    given, rest = _split(command[place + 1 :], _COMFYUI_OWN)
    entry: dict[str, Any] = {}
    if given.get("--port", "").isdigit():
        entry["port"] = int(given["--port"])
    if listen := given.get("--listen"):
        entry["listen"] = listen.partition(",")[0]
    elif "--listen" in given:
        entry["listen"] = "0.0.0.0"
    base = given.get("--base-directory") or path
    entry["output_directory"] = given.get("--output-directory") or f"{base}/output"
    entry["input_directory"] = given.get("--input-directory") or f"{base}/input"
    if paths := given.get("--extra-model-paths-config"):
        entry["extra_model_paths"] = [paths]
    if rest:
        entry["args"] = rest
    return Recognised(
        "comfyui",
        "comfyui",
        entry,
        {"path": path, "python": command[0]},
        ("Users' files and the database begin anew: each instance has its own.",),
    )


def _vllm(command: Sequence[str]) -> Recognised | None:
    """It goes on as a host process: whether an image would serve the same model nobody knows."""
    programs = [PurePosixPath(arg).name for arg in command[:3]]
    if "vllm" not in programs or "serve" not in command[:4]:
        return None
    model = command[command.index("serve") + 1 :][:1]
    name = PurePosixPath(model[0]).name if model and not model[0].startswith("-") else "vllm"
    return Recognised("process", name, {"start_timeout": "15m", "probe": {"http": "/health"}})


def _split(arguments: Sequence[str], own: frozenset[str]) -> tuple[dict[str, str], list[str]]:
    """The own flags with their values, and the rest as it is."""
    given: dict[str, str] = {}
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        flag, equals, value = waiting.pop(0).partition("=")
        if flag not in own:
            rest.append(flag + equals + value)
        elif equals or not waiting or waiting[0].startswith("--"):
            given[flag] = value
        else:
            given[flag] = waiting.pop(0)
    return given, rest
