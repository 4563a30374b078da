"""Requests to compile, and the answers of a real tritonserver."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mic_supervisor.backends import Backend, CompileRequest
from mic_supervisor.model import Gpu

REAL = Gpu("GPU-11111111-2222-3333-4444-555555555555", 0, "NVIDIA H200")
SECOND = Gpu("GPU-66666666-7777-8888-9999-000000000000", 1, "NVIDIA H200")
SIMULATED = Gpu("GPU-5eed0000-0000-0000-0000-000000000000", 0, "simulated", simulated=True)

ANSWERS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "triton-2.51.json").read_text()
)
"""By scenario: status and body of a load call, the log that went with it, and what it says.

tests/integration/test_triton_server.py plays each scenario again and compares `says`.
"""


def reader(files: Mapping[str, str | OSError | UnicodeDecodeError]) -> Callable[[Path], str]:
    """A `read_text` over these files; any other is not found."""

    def read_text(path: Path) -> str:
        found = files.get(str(path))
        if found is None:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        if isinstance(found, Exception):
            raise found
        return found

    return read_text


def request(
    backend: Backend,
    options: Mapping[str, Any],
    *,
    model: str = "MAM",
    instance: str = "mam-gpu0",
    settings: Mapping[str, Any] | None = None,
    gpus: tuple[Gpu, ...] = (REAL,),
    files: Mapping[str, str | OSError | UnicodeDecodeError] | None = None,
    read_text: Callable[[Path], str] | None = None,
    variables: Mapping[str, str] | None = None,
) -> CompileRequest:
    """What the supervisor would ask for, with options and settings as the file writes them."""
    return CompileRequest(
        model=model,
        instance=instance,
        options=backend.Options.model_validate({"backend": backend.name, **options}),
        settings=backend.Settings.model_validate(dict(settings or {})),
        gpus=gpus,
        read_text=read_text or reader(files or {}),
        variables=variables or {},
    )
