"""What an engine, a registry or a socket says, in the words that a person reads."""

from __future__ import annotations

import errno
import re
import socket
from pathlib import Path
from string import Formatter

import pytest
import requests
import urllib3
import yaml
from docker.errors import APIError, DockerException
from hypothesis import given, settings
from hypothesis import strategies as st

from mic_supervisor.errors import MicError, RuntimeUnavailable
from mic_supervisor.runtimes.docker import engine as errors
from mic_supervisor.runtimes.docker.engine import LOG_HINT, START_HINT, explain, refusal, tidy
from mic_supervisor.runtimes.docker.pull import failure
from mic_supervisor.text import LONGEST

RUNC = "OCI runtime create failed: runc create failed: unable to start container process: "
ENDPOINT = "driver failed programming external connectivity on endpoint mic-a (a0ade7edeee2e7e): "


# The messages of 20.10 were recorded; those that say so are quoted from later engines' sources.
@pytest.mark.parametrize(
    ("message", "cause", "hint"),
    [
        (
            'could not select device driver "" with capabilities: [[gpu compute utility]]',
            "the engine cannot hand out GPUs, it has no NVIDIA Container Toolkit",
            "install nvidia-container-toolkit, then: nvidia-ctk runtime configure "
            "--runtime=docker && systemctl restart docker",
        ),
        (
            'could not select device driver "cdi" with capabilities: []',
            "the engine has CDI switched off",
            'put {"features": {"cdi": true}} into /etc/docker/daemon.json and restart docker',
        ),
        (
            # 25 and later
            "CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=GPU-1",
            "the engine's CDI specification has no device nvidia.com/gpu=GPU-1",
            "write it anew: nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml",
        ),
        (
            f"failed to create task for container: {RUNC}error during container init: error "
            "running prestart hook #0: exit status 1, stdout: , stderr: nvidia-container-cli: "
            "device error: GPU-f15ae561-7b5c-4a0c-8ab1-3a1e0c2d9f10: unknown device: unknown",
            "the NVIDIA driver has no GPU GPU-f15ae561-7b5c-4a0c-8ab1-3a1e0c2d9f10",
            "compare with: nvidia-smi -L",
        ),
        (
            f"failed to create shim task: {RUNC}error during container init: error running hook "
            "#0: error running hook: exit status 1, stdout: , stderr: Auto-detected mode as "
            "'legacy'\nnvidia-container-cli: initialization error: nvml error: driver/library "
            "version mismatch: unknown",
            "the NVIDIA Container Toolkit says: “initialization error: nvml error: driver/library "
            "version mismatch”",
            "check the driver with: nvidia-smi",
        ),
        (
            f"{ENDPOINT}Bind for 127.0.0.1:20990 failed: port is already allocated",
            "port 20990 on 127.0.0.1 is already taken by a container",
            "see which: docker ps --filter publish=20990",
        ),
        (
            f"{ENDPOINT}Error starting userland proxy: listen tcp4 127.0.0.1:20991: bind: "
            "address already in use",
            "port 20991 on 127.0.0.1 is already taken",
            "see by whom: ss -ltnp 'sport = :20991'",
        ),
        (
            # 28 and later
            f"failed to set up container networking: {ENDPOINT}failed to bind host port "
            "127.0.0.1:20991/tcp: address already in use",
            "port 20991 on 127.0.0.1 is already taken",
            "see by whom: ss -ltnp 'sport = :20991'",
        ),
        (
            f"failed to create shim task: {RUNC}exec: \"nosuch\": executable file not found in "
            "$PATH: unknown",
            "the image has no program nosuch",
            "check the command and the entrypoint",
        ),
        (
            f'failed to create shim task: {RUNC}exec: "/etc/passwd": permission denied: unknown',
            "/etc/passwd in the image is not an executable file",
            "check the command and the entrypoint",
        ),
        (
            f'failed to create shim task: {RUNC}exec: "docker-init": executable file not found in '
            "$PATH: unknown",
            "the engine has no docker-init, which every container of ours starts with",
            "install the program docker-init next to dockerd (on Debian: apt install tini "
            "docker.io)",
        ),
        (
            f"failed to create task for container: {RUNC}exec /serve: exec format error: unknown",
            "the image's program is for another kind of machine",
            "use an image that is built for this machine's architecture",
        ),
        (
            f"failed to create shim task: {RUNC}error during container init: error setting "
            "rlimits for ready process: error setting rlimit type 8: operation not permitted",
            "the engine may not raise a limit that high",
            "lower limits.nofile or limits.memlock, or raise dockerd's own (LimitNOFILE, "
            "LimitMEMLOCK)",
        ),
        (
            "unable to find group video: no matching entries in group file",
            "the image has no group video",
            "use a number, or a name that the image's /etc/passwd and /etc/group know",
        ),
        (
            "mkdir /var/lib/docker/overlay2/1: no space left on device",
            "the engine's disk is full",
            "see what takes it: docker system df; free some with: docker image prune",
        ),
        ("Minimum memory limit allowed is 6MB", "“Minimum memory limit allowed is 6MB”", None),
        (f"failed to create shim task: {RUNC}what is this: unknown", "“what is this”", None),
        ("", "the engine gives no reason", None),
    ],
)  # fmt: skip
def test_refusals(message: str, cause: str, hint: str | None) -> None:
    assert refusal(message) == (cause, hint)


@pytest.mark.parametrize("by", ["engine", "registry"])
def test_every_refusal_can_be_put_in_words(by: str) -> None:
    path = Path(errors.__file__).with_name("refusals.yaml")
    for row in yaml.safe_load(path.read_text())[by]:
        assert row.keys() == {"says", "cause", "hint"}
        for says in [row["says"]] if isinstance(row["says"], str) else row["says"]:
            words = {
                *re.compile(says).groupindex,
                *(("registry", "said") if by == "registry" else ()),
            }
            for text in (row["cause"], row["hint"]):
                asked = {name for _, name, _, _ in Formatter().parse(text) if name is not None}
                assert asked <= words, says


def test_tidy_keeps_the_first_line() -> None:
    assert tidy("one\ntwo") == "“one”"


LOGIN = "log in with: docker login r.example (MIC_DOCKER_CONFIG names the configuration to use)"


@pytest.mark.parametrize(
    ("message", "cause", "hint"),
    [
        (
            "manifest for r.example/x:1 not found: manifest unknown: manifest unknown",
            "r.example has no such image or tag",
            "check the image's name and tag in gpus.yaml",
        ),
        (
            # the containerd image store
            'failed to resolve reference "r.example/x:1": r.example/x:1: not found',
            "r.example has no such image or tag",
            "check the image's name and tag in gpus.yaml",
        ),
        (
            "pull access denied for r.example/x, repository does not exist or may require "
            "'docker login': denied: requested access to the resource is denied",
            "r.example gives no access to it, or has no such image",
            f"check its name; if it is private, {LOGIN}",
        ),
        (
            'Head "https://r.example/v2/x/manifests/1": unauthorized: authentication required',
            "r.example gives no access to it, or has no such image",
            f"check its name; if it is private, {LOGIN}",
        ),
        (
            "toomanyrequests: You have reached your pull rate limit.",
            "r.example limits how often this machine may pull",
            f"wait, or {LOGIN}",
        ),
        (
            'Get "https://r.example/v2/": dial tcp: lookup r.example on 10.0.0.1:53: no such host',
            'r.example cannot be reached (“Get "https://r.example/v2/": dial tcp: lookup r.example '
            "on 10.0.0.1:53: no such host”)",
            "check the network and the engine's proxy; without a registry: docker load -i FILE",
        ),
        (
            'Get "https://r.example/v2/": x509: certificate signed by unknown authority',
            "the certificate of r.example is not trusted",
            "put its CA into /etc/docker/certs.d/r.example/ca.crt",
        ),
        (
            'Get "https://r.example/v2/": http: server gave HTTP response to HTTPS client',
            "r.example speaks plain HTTP, which the engine does not take",
            'add it to "insecure-registries" in /etc/docker/daemon.json',
        ),
        (
            "failed to register layer: write /usr/lib/x: no space left on device",
            "the engine's disk is full",
            "see what takes it: docker system df; free some with: docker image prune",
        ),
        (
            "no matching manifest for linux/arm64/v8 in the manifest list entries",
            "the image has no variant for this kind of machine",
            "use an image that is built for this machine's architecture",
        ),
        (
            "invalid reference format: repository name must be lowercase",
            "that is not the name of an image",
            "write it as REGISTRY/NAME:TAG, in lower case",
        ),
        ("filesystem layer verification failed", "“filesystem layer verification failed”", None),
    ],
)
def test_failed_pulls(message: str, cause: str, hint: str | None) -> None:
    error = failure("r.example/x:1", message)
    assert (str(error), error.hint) == (f"cannot pull r.example/x:1: {cause}", hint)


BODIES = st.text(st.characters(exclude_categories=()), max_size=200) | st.sampled_from(
    [
        "<html>\n<head><title>502 Bad Gateway</title></head>" * 1000,
        "x" * 5_000_000,
        "manifest for " * 500_000,
        "nvidia-container-cli: " * 500_000,
        "\x00\x1b[2J\u202e\udcff{said}{0}%s",
        '{"errors":[{"code":"UNAUTHORIZED","detail":' + "[" * 10_000,
    ]
)


@settings(deadline=5000)
@given(BODIES)
def test_whatever_a_registry_or_an_engine_says_is_a_failure_in_few_words(said: str) -> None:
    for error in (
        failure("r.example/x:1", said),
        explain("cannot do it", APIError("no", explanation=said), "/d"),
    ):
        for text in (error.message, error.hint or ""):
            assert text.isprintable() and len(text) <= 3 * LONGEST


def test_docker_hub_is_named() -> None:
    assert "docker.io has no such image" in str(failure("busybox:1", "manifest unknown"))
    assert "localhost:5000 has" in str(failure("localhost:5000/b", "manifest unknown"))
    assert "docker.io has" in str(failure("library/busybox", "manifest unknown"))


def connection(cause: Exception) -> Exception:
    """As requests and urllib3 wrap it: the cause stands in `args` alone."""
    return requests.ConnectionError(
        urllib3.exceptions.ProtocolError("Connection aborted.", cause), request=None
    )


@pytest.mark.parametrize(
    ("error", "cause", "hint"),
    [
        (
            connection(FileNotFoundError(errno.ENOENT, "No such file or directory")),
            "there is no Docker socket at /d.sock",
            START_HINT,
        ),
        (
            connection(PermissionError(errno.EACCES, "Permission denied")),
            "access to /d.sock is denied",
            "run as root, or add the user to the group docker: usermod -aG docker USER",
        ),
        (
            connection(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")),
            "no Docker Engine listens at /d.sock",
            START_HINT,
        ),
        (
            connection(socket.gaierror(-2, "Name or service not known")),
            "the host name in /d.sock cannot be resolved",
            "check MIC_DOCKER_HOST",
        ),
        (
            connection(OSError(errno.EMFILE, "Too many open files")),
            "too many files are open",
            "raise LimitNOFILE of mic.service",
        ),
        (
            connection(OSError(errno.EHOSTUNREACH, "No route to host")),
            "there is no route to /d.sock",
            "check MIC_DOCKER_HOST",
        ),
        (
            requests.exceptions.SSLError("bad certificate"),
            "the connection to /d.sock fails (“bad certificate”)",
            LOG_HINT,
        ),
        (
            DockerException("what is this"),
            "the engine at /d.sock cannot be used (“what is this”)",
            "check MIC_DOCKER_HOST",
        ),
        (KeyError("message"), "what answers at /d.sock is not a Docker Engine",
         "check MIC_DOCKER_HOST"),
    ],
)  # fmt: skip
def test_no_answer(error: Exception, cause: str, hint: str) -> None:
    found = explain("cannot list containers", error, "/d.sock")
    assert isinstance(found, RuntimeUnavailable)
    assert (str(found), found.hint) == (f"cannot list containers: {cause}", hint)


def test_an_error_that_has_words_already_keeps_them() -> None:
    error = MicError("cannot x: y")
    assert explain("cannot z", error, "/d.sock") is error
