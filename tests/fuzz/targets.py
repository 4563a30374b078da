"""The readers, each as a function of bytes. What it raises is a defect."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mic_supervisor import codec
from mic_supervisor.backends.registry import Registry
from mic_supervisor.cli import daemon, status
from mic_supervisor.config.env_file import format_env_file, parse_env_file
from mic_supervisor.config.load import load
from mic_supervisor.converge.session import Emit
from mic_supervisor.converge.state import StateDir
from mic_supervisor.daemon import generations, log
from mic_supervisor.daemon.control import ControlServer
from mic_supervisor.errors import ConfigError
from mic_supervisor.gpu.nvml import NvmlSource
from mic_supervisor.host.lock import LockHolder, lock_holder
from mic_supervisor.model import RunState
from mic_supervisor.plan.look import look
from mic_supervisor.runtimes import identity
from mic_supervisor.runtimes.docker import create, view
from mic_supervisor.runtimes.keeper import records
from mic_supervisor.views.status import ConfigInUse, status_document
from tests.mock_nvml import GIB, MockGpu, MockMig, MockNvml, MockProcess, Rules
from tests.unit.plan import builders

ROOT = Path(__file__).parents[2]
FOUND = ROOT / "tests" / "corpus" / "fuzz"
"""What was found, by target: each file made it raise once."""

_STATES = ROOT / "tests" / "fixtures" / "state-before-codec"


class Target(NamedTuple):
    """`seeds` are what the changes begin with: good files, and bad ones that were thought of."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


@cache
def _home() -> Path:
    made = tempfile.TemporaryDirectory(prefix="mic-fuzz-")
    _KEPT.append(made)
    return Path(made.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def _contents(*patterns: str) -> list[bytes]:
    return [path.read_bytes() for pattern in patterns for path in sorted(ROOT.glob(pattern))]


# --- the file -----------------------------------------------------------------------------------


@cache
def _registry() -> Registry:
    return Registry()


def check(data: bytes) -> None:
    """A Config or a ConfigError, whose text can be shown. All backends are there."""
    path = _home() / "gpus.yaml"
    path.write_bytes(data)
    try:
        config = load(path, _registry(), environ={"HOME": "/root"})
    except ConfigError as error:
        _shown(error.rendered, lines=True)
        _shown(error.outline, lines=True)
        return
    for warning in config.warnings:
        _shown(str(warning), lines=True)


def _shown(text: str, *, lines: bool = False) -> None:
    text.encode()
    bad = [char for char in text if not (char.isprintable() or (lines and char == "\n"))]
    assert text.strip() and not bad, text


def env_file(data: bytes) -> None:
    """What is read of a file comes back when it is written."""
    found, bad = parse_env_file(data.decode(errors="replace"))
    count = data.decode(errors="replace").count("\n") + 1
    assert all(1 <= one.line <= count for one in [*found, *bad])
    for one in bad:
        _shown(str(one))
    if not bad:
        values = {one.name: one.value for one in found}
        again, bad = parse_env_file(format_env_file(values))
        assert ({one.name: one.value for one in again}, bad) == (values, [])


# --- the socket ---------------------------------------------------------------------------------


@cache
def _served() -> Path:
    """A server of a thread of its own, which lives as long as the process."""
    path, ready = _home() / "mic.sock", threading.Event()

    async def echo(params: Mapping[str, Any], _emit: Emit) -> Any:
        return dict(params)

    async def serve() -> None:
        await ControlServer(path, lambda _by: {"echo": echo}, "fuzz").start()
        ready.set()
        await asyncio.Event().wait()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    assert ready.wait(10)
    return path


def request(data: bytes) -> None:
    """Whatever is asked is answered in one line of JSON, or not at all where nothing was asked."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(_served()))
        try:
            connection.sendall(data)
            if b"\n" not in data:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            return  # a request that is too long is not read to its end
        answer = b""
        try:
            while not answer.endswith(b"\n") and (part := connection.recv(1 << 16)):
                answer += part
        except ConnectionResetError:
            return  # bytes after the request's line were not read
    if answer or data:
        document = json.loads(answer)
        assert document.keys() in ({"result"}, {"error"}), document
        assert "error" not in document or "defect" not in str(document)
        assert "Error" not in str(document.get("error", {}).get("message")), document


# --- what workloads carry -----------------------------------------------------------------------


def labels(data: bytes) -> None:
    """A list of containers, and one that is inspected: an engine, and who labelled them, may have
    said anything.
    """
    try:
        listed = codec.parse(data)
    except codec.BadDocument:
        return
    if not view.is_a_list(listed):
        return
    ours, foreign = view.split(
        listed,
        "prod",
        "0123456789ab",
        images=lambda _image: {},
        given_name=lambda one: f"mic-{one.instance}",
        known={},
    )
    assert len(ours) + len(foreign) == len(listed)
    for workload in ours:
        for item in listed:
            view.detailed(workload, item)
        hash(workload.identity.instance)
        create.labels(workload.identity)


def variables(data: bytes) -> None:
    """The environment of a process, which everybody copies."""
    found = identity.identity_of({identity.IDENTITY: data.decode(errors="surrogateescape")})
    if not isinstance(found, str):
        name, read = found
        again = identity.identity_variables(name, read)
        assert identity.identity_of(again) == (name, read)


# --- state files --------------------------------------------------------------------------------


def state(data: bytes) -> None:
    """One content for every file that is kept. What is good of it is read, and written again."""
    scope = _home() / "state"
    scope.mkdir(exist_ok=True)
    for name in ("memory.json", "history.jsonl", "generation.json", "spec.key", "lock"):
        (scope / name).write_bytes(data)
    (scope / "memory.json.old").unlink(missing_ok=True)
    host = StateDir(scope)
    memory = host.memory()
    if memory.lost is not None:
        _shown(memory.lost)
    host.key(create=False)
    host.save_memory(memory)
    assert StateDir(scope).memory().lost is None
    for event in log.read(scope / "history.jsonl"):
        for text in (event.instance, event.text, event.cause):
            assert not text or text.isprintable(), event
        log._sentence(event)
        daemon._line(asdict(event))
    kept = log.History(scope / "history.jsonl")
    kept.add(log.Event("begin", 1.0, "a", "b"))
    assert kept.newest()[0].text == "b"
    generations.number_of(host, "a")
    held = lock_holder(scope / "lock")
    assert held is None or isinstance(held, LockHolder)
    for path in scope.glob("*.damaged-*"):
        path.unlink()


def plan(data: bytes) -> None:
    """What a memory says of instances that are there: it is planned with, and shown."""
    scope = _home() / "plan"
    scope.mkdir(exist_ok=True)
    (scope / "memory.json").write_bytes(data)
    memory = StateDir(scope).memory()
    entries = [*memory.instances.values()]
    up, down = builders.on("MAM", 0), builders.on("MAM", 1)
    for name, entry in zip((up.id, down.id), entries * 2, strict=False):
        memory = memory.with_instance(name, entry)
    seen = look(
        builders.desired(up, down),
        builders.observed(builders.workload(up), builders.workload(down, RunState.EXITED)),
        memory,
        builders.NOW,
        builders.CONTEXT,
        offset=1.8e9,
    )
    seen, _ = seen.reported()
    shown = seen.in_wall()
    _shown(builders.text(shown.plan), lines=True)
    document = status_document(shown, ConfigInUse("a", "", None, None, True, None, None), "host")
    text = json.dumps(asdict(document), allow_nan=False)
    assert json.loads(text)
    for row in document.instances:
        _shown(f"{row.id} {row.reason}", lines=True)
    with contextlib.redirect_stdout(io.StringIO()):
        status.show(json.loads(text))


def record(data: bytes) -> None:
    """The record of a host process, and how it ended."""
    path = _home() / "record"
    path.mkdir(exist_ok=True)
    (path / records.RECORD).write_bytes(data)
    (path / records.EXIT).write_bytes(data)
    try:
        found = records.load(path)
        if found is not None:
            records.read_exit(path, found.run_id)
            records.as_workload(path, found, locked=False)
    except records.BadRecord as error:
        _shown(str(error))


# --- NVML ---------------------------------------------------------------------------------------


class _Bytes:
    """Numbers and names out of bytes; what is missing is 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def take(self, size: int) -> bytes:
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    def number(self, size: int = 8) -> int:
        return int.from_bytes(self.take(size), "little")

    def maybe(self, size: int = 8) -> int | None:
        return None if self.number(1) % 8 == 0 else self.number(size)

    def name(self) -> str:
        """Without what ends a word in the mock's state file."""
        text = self.take(self.number(1) % 90).translate(None, b"\0\n ")
        return text.decode(errors="surrogateescape")


@cache
def _nvml() -> tuple[MockNvml, NvmlSource]:
    mock = MockNvml(_home())
    mock.load(os.environ.__setitem__)
    return mock, NvmlSource()


def nvml(data: bytes) -> None:
    """Rows of a driver that says anything: numbers of any size, names of any bytes, any code."""
    mock, source = _nvml()
    left, gpus = _Bytes(data), []
    for _ in range(left.number(1) % 4):
        gpus.append(
            MockGpu(
                uuid=left.name() or None,
                name=left.name() or None,
                pci_bus_id=left.name() or None,
                memory_total=left.maybe(),
                memory_reserved=left.number(),
                memory_used=left.number(),
                processes=[
                    MockProcess(left.number(4), left.maybe()) for _ in range(left.number(1) % 3)
                ],
                power_draw=left.number(3) / 1000,
                utilization=left.maybe(4),
                temperature=left.maybe(2),
                ecc_errors=(left.number(), left.number()),
                clocks_event_reasons=left.maybe(),
                recovery_action=left.maybe(8),
                mig_mode=(left.number(1) % 3, left.number(1) % 3),
                mig_devices=[
                    MockMig(left.name() or "MIG-0", left.number(), left.number())
                    for _ in range(left.number(1) % 2)
                ],
                lost=left.number(1) % 16 == 1,
                open_error=left.maybe(2) if left.number(1) % 16 == 1 else None,
                rules=Rules(
                    errors={"nvmlDeviceGetMemoryInfo_v2": left.number(2)}
                    if left.number(1) % 16 == 1
                    else {}
                ),
            )
        )
    mock.set(gpus, driver_version=left.name() or None, cuda_version=left.maybe(4))
    found = source.observe()
    json.dumps(codec.encode(found))
    for gpu in found.gpus:
        assert gpu.memory is None or gpu.memory.total >= 0


def _rows() -> list[bytes]:
    one = bytes([1, 5]) + b"GPU-1" + bytes([4]) + b"A100" + bytes([0, 1])
    return [b"", bytes(4), one + (40 * GIB).to_bytes(8, "little") + bytes(range(200))]


_RECORDS: list[dict[str, Any]] = [
    {
        "version": 1,
        "name": "record",
        "run_id": "r1",
        "boot_id": "b",
        "pid_namespace": "pid:[1]",
        "created_at": 1.8e9,
        "keeper": {"pid": 4711, "start_time": 3},
        "child": {"pid": 4712, "start_time": 4},
        "identity": {
            "scope": "prod",
            "host": "0123456789ab",
            "instance": "FACE-bbbbbbbb",
            "model": "FACE",
            "backend": "process",
            "gpus": ["GPU-b"],
            "ports": {"http": 9000},
            "spec": {"kind": "process"},
            "spec_hash": "0123456789abcdef",
        },
    },
    {"run_id": "r1", "exit_code": None, "signal": 9, "finished_at": 1.8e9},
]


# --- all of them --------------------------------------------------------------------------------


def _listed() -> list[bytes]:
    item = {
        "Id": "a" * 64,
        "Names": ["/mic-a"],
        "ImageID": "sha256:1",
        "State": "exited",
        "Status": "Exited (137) 3 seconds ago",
        "Created": 1_800_000_000,
        "Ports": [{"PublicPort": 80, "Type": "tcp"}],
        "Labels": json.loads((_STATES / "labels.json").read_text()),
        "NetworkSettings": {"Networks": {"bridge": {"IPAddress": "172.17.0.2"}}},
    }
    return [json.dumps([item]).encode(), b"[]", b"[null]", b'[{"Id": 1}]']


TARGETS: dict[str, Target] = {
    "check": Target(check, lambda: _contents("examples/**/*.yaml", "tests/corpus/bad/*.yaml")),
    "env_file": Target(
        env_file,
        lambda: [*_contents("examples/**/*.env"), b'A=1\n# c\nB="a b\\""\nC=\'x\'\nD=a\\\nb\n'],
    ),
    "request": Target(
        request,
        lambda: [
            b'{"version": 1, "scope": "fuzz", "method": "echo", "params": {"names": ["a"]}}\n',
            b'{"version": 1, "method": "status"}\n',
            b"",
        ],
    ),
    "labels": Target(labels, _listed),
    "variables": Target(
        variables,
        lambda: [json.loads((_STATES / "unit.json").read_text())[identity.IDENTITY].encode()],
    ),
    "state": Target(
        state,
        lambda: [path.read_bytes() for path in sorted(_STATES.iterdir()) if path.is_file()],
    ),
    "plan": Target(plan, lambda: _contents("tests/fixtures/*/memory.json")),
    "record": Target(
        record,
        lambda: [json.dumps(one).encode() for one in _RECORDS],
    ),
    "nvml": Target(nvml, _rows),
}


def found(name: str) -> list[Path]:
    """What made a target raise once."""
    return sorted((FOUND / name).glob("*"))
