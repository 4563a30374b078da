"""The forms that Compose has for the keys of containers, and the one that they are brought into."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from mic_supervisor.backends.container import ContainerBackend
from mic_supervisor.backends.process import ProcessBackend
from mic_supervisor.backends.vllm import VllmBackend
from mic_supervisor.config.container import KEYS, ContainerOptions, cpus_of
from mic_supervisor.config.options import ModelOptions
from mic_supervisor.errors import CompileError
from mic_supervisor.model import ContainerSpec
from tests.unit.backends.support import request

BACKEND = ContainerBackend()


def spec(**keys: Any) -> ContainerSpec:
    made = BACKEND.compile(request(BACKEND, {"image": "a/b:1", **keys})).workload
    assert isinstance(made, ContainerSpec)
    return made


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("devices", ["/dev/a"], ("/dev/a:/dev/a:rwm",)),
        ("devices", ["/dev/a:r", "/dev/a:/dev/b:rw"], ("/dev/a:/dev/a:r", "/dev/a:/dev/b:rw")),
        ("cap_add", ["cap_sys_ptrace", "IPC_LOCK"], ("IPC_LOCK", "SYS_PTRACE")),
        ("cap_drop", ["all", "CAP_ALL"], ("ALL",)),
        ("security_opt", ["no-new-privileges"], ("no-new-privileges=true",)),
        ("security_opt", ["no-new-privileges:false"], ("no-new-privileges=false",)),
        ("security_opt", ["label:type:x_t", "label=disable"], ("label=type:x_t", "label=disable")),
        ("security_opt", ["seccomp:/etc/x.json"], ("seccomp=/etc/x.json",)),
        ("group_add", [44, "video"], ("44", "video")),
        ("extra_hosts", ["a:1.2.3.4", "b=[::1]"], ("a:1.2.3.4", "b:::1")),
        ("extra_hosts", {"here": "host-gateway"}, ("here:host-gateway",)),
        ("dns", "1.1.1.1", ("1.1.1.1",)),
        ("tmpfs", "/run", ("/run",)),
        (
            *("tmpfs", ["/run:size=10%,mode=1777,noexec", "/tmp:"]),
            ("/run:size=10%,mode=1777,noexec", "/tmp"),
        ),
        (
            *("ulimits", {"nproc": 5, "core": {"soft": 0, "hard": -1}, "stack": -1}),
            (("core", "0:-1"), ("nproc", "5:5"), ("stack", "-1:-1")),
        ),
        ("labels", {"on": True, "n": 5, "t": "x"}, (("n", "5"), ("on", "true"), ("t", "x"))),
        ("labels", ["b=x=y", "a"], (("a", ""), ("b", "x=y"))),
        ("sysctls", {"net.core.somaxconn": 9}, (("net.core.somaxconn", "9"),)),
        ("sysctls", ["kernel.shmmax=1"], (("kernel.shmmax", "1"),)),
        ("cpuset", "0-3,8", "0-3,8"),
        ("read_only", True, True),
        ("hostname", "api.example", "api.example"),
        ("pull", "always", "always"),
        ("ipc", "host", "host"),
    ],
)
def test_each_form_becomes_one(key: str, given: Any, expected: Any) -> None:
    assert getattr(spec(**{key: given}), {"devices": "host_devices"}.get(key, key)) == expected


def test_a_model_has_its_name_in_its_networks_as_a_service_of_compose_has() -> None:
    made = spec(networks=["shop"], network_aliases=["chat", "MAM"])
    assert (made.networks, made.network_aliases) == (("shop",), ("MAM", "chat"))
    assert spec().network_aliases == ()


def test_shared_memory_of_the_host_has_no_size_of_a_backend() -> None:
    vllm = VllmBackend()
    for ipc, size in (("host", None), ("none", None), ("private", 8 << 30), ("shareable", 8 << 30)):
        made = vllm.compile(request(vllm, {"model": "a/b", "ipc": ipc})).workload
        assert isinstance(made, ContainerSpec) and made.shm_size == size


def test_a_model_without_any_of_them_is_what_it_was() -> None:
    assert spec() == ContainerSpec("a/b:1", devices=spec().devices, ports=spec().ports)


def test_a_process_has_none_of_them_whatever_its_backend_says() -> None:
    values = {"networks": ["a"], "read_only": True, "cpuset": "0"}
    for key in KEYS:
        assert "a host process has no container" in ProcessBackend.Options.unavailable[key]

    class Careless(ProcessBackend):
        class Options(ProcessBackend.Options):
            unavailable: ClassVar[dict[str, str]] = {}

    careless = Careless()
    for key, value in values.items():
        with pytest.raises(CompileError, match=f"{key} is a key of containers"):
            careless.compile(request(careless, {"command": ["/bin/a"], key: value}))


def test_the_keys_come_after_those_of_every_model_and_each_is_in_the_specification() -> None:
    assert tuple(ModelOptions.model_fields)[-len(KEYS) :] == KEYS
    assert ContainerOptions().model_fields_set == set()


def test_cpus() -> None:
    assert cpus_of("0-2,8") == {0, 1, 2, 8}
    for wrong in ("", "a", "1-", "3-1", "0,,1", "99999", "-1"):
        with pytest.raises(ValueError, match="no set of CPUs"):
            cpus_of(wrong)
