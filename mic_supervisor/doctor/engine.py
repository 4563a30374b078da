"""Docker: whether it answers, gives GPUs away, and lets containers live."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from mic_supervisor.config.settings import Settings
from mic_supervisor.doctor import Finding, fail, ok, warn
from mic_supervisor.host.processes import environ, processes
from mic_supervisor.runtimes.docker.engine import Engine
from mic_supervisor.runtimes.docker.runtime import DockerRuntime

_HOOK = "nvidia-container-runtime-hook"


def questions(found: Settings) -> tuple[Callable[[], Mapping[str, Any]], Callable[[str], bool]]:
    """What the engine tells of itself, asked once, and whether it has an image."""
    runtime = DockerRuntime(
        found.scope, "", base_url=found.docker_host, docker_config=None, timeout=10.0
    )
    client = Engine(found.docker_host, timeout=10.0, patience=10.0)

    def has_image(image: str) -> bool:
        return client.image(f"cannot look for the image {image}", image) is not None

    return cache(runtime.version), has_image


def engine(facts: Callable[[], Mapping[str, Any]], *, real_gpus: bool) -> Iterator[Finding]:
    """`facts` is DockerRuntime.version. Raises MicError when the engine cannot be reached."""
    found = facts()
    yield ok(
        "docker",
        f"Engine {found['version'] or '?'} (API {found['api'] or '?'}) answers at "
        f"{found['address']}",
    )
    yield _life(found)
    if not real_gpus:
        return
    cdi = _cdi(found)
    yield _gpus(found, cdi)
    if found["cgroup_driver"] == "systemd" and not cdi:
        yield warn(
            "docker cgroups",
            "`systemctl daemon-reload` takes the GPUs from running containers (legacy mode, "
            "cgroup driver systemd)",
            "use CDI: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml, with Engine 25 or "
            'later; or set "exec-opts": ["native.cgroupdriver=cgroupfs"] in '
            "/etc/docker/daemon.json",
        )
    else:
        yield ok("docker cgroups", f"driver {found['cgroup_driver'] or 'unknown'}")
    if found["default_runtime"] == "nvidia":
        yield warn(
            "docker runtime",
            "nvidia is the default runtime: a container that asks for no GPU may see all of them",
            'remove "default-runtime" from /etc/docker/daemon.json and restart Docker',
        )


def _path_of_dockerd() -> str | None:
    """Where the engine looks for programs; None: as here."""
    for stat in processes().values():
        if stat.name == "dockerd" and (environment := environ(stat.pid)):
            return environment.get("PATH")
    return None


def _life(found: Mapping[str, Any]) -> Finding:
    if found["live_restore"]:
        return ok("docker live-restore", "containers outlive a restart of Docker")
    return warn(
        "docker live-restore",
        "is off: every container ends when Docker is restarted or upgraded",
        'set "live-restore": true in /etc/docker/daemon.json, then: systemctl reload docker',
    )


def _cdi(found: Mapping[str, Any]) -> list[str]:
    return [name for name in found["cdi_devices"] if name.startswith("nvidia.com/gpu=")]


def _gpus(found: Mapping[str, Any], cdi: list[str]) -> Finding:
    if cdi:
        return ok("docker gpus", f"{len(cdi)} CDI devices of nvidia.com/gpu")
    if "nvidia" in (found["runtimes"] or ()):
        return ok("docker gpus", "the NVIDIA runtime is there")
    if shutil.which(_HOOK, path=_path_of_dockerd()):
        return ok("docker gpus", f"{_HOOK} is there; Docker looks for it only when it starts")
    return fail(
        "docker gpus",
        "neither the NVIDIA runtime nor CDI devices are there: no container gets a GPU",
        "install nvidia-container-toolkit, then: nvidia-ctk runtime configure --runtime=docker "
        "and systemctl restart docker",
    )
