from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mic_supervisor.gpu.nvml import NvmlSource
from tests.mock_nvml import MockNvml


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def in_another_process(program: str, env: dict[str, str]) -> str:
    """What a program printed that has the driver's library for itself."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done
    return done.stdout.strip()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def mock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MockNvml:
    """The NVML of this process, without GPUs until a test sets some."""
    nvml = MockNvml(tmp_path)
    nvml.load(monkeypatch.setenv)
    return nvml


@pytest.fixture
def open_nvml(mock: MockNvml, clock: Clock) -> Iterator[Callable[..., NvmlSource]]:
    """Opens sources on the mock and, at the end, gives every reference to the library back."""
    sources: list[NvmlSource] = []

    def open_one(**options: float) -> NvmlSource:
        sources.append(NvmlSource(clock=clock, **options))  # type: ignore[arg-type]
        return sources[-1]

    yield open_one
    mock.set()  # lets go of what hangs
    deadline = time.monotonic() + 10
    while any(thread.name == "nvml" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a call into the mock never returned"
        time.sleep(0.005)
    for source in sources:
        source.close()


@pytest.fixture
def source(open_nvml: Callable[..., NvmlSource]) -> NvmlSource:
    return open_nvml()
