"""Backends of no product, so that the tests of the file's format stand on their own."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field, field_validator

from mic_supervisor.backends import BackendBase
from mic_supervisor.config.diagnostics import InvalidConfig
from mic_supervisor.config.document import Config
from mic_supervisor.config.load import BackendTypes, load
from mic_supervisor.config.options import ModelOptions, Strict, Text
from mic_supervisor.config.types import PositiveDuration, Size
from mic_supervisor.errors import MicError

RETURNS = threading.Event()
LATER = "comes with a later version; remove the key"

MODELS = """\
version: 1
backends: {server: {image: img}}
models:
  a: {backend: server, copies: 8}
  b: {backend: command, command: [/bin/b]}
"""


class ServerSettings(Strict):
    image: Text
    memory: Size = 1 << 30
    mode: Literal["one", "shared"] = "one"

    @field_validator("mode")
    @classmethod
    def _one(cls, value: str) -> str:
        if value == "shared":
            raise ValueError("shared comes with a later version")
        return value


class ServerOptions(ModelOptions):
    unavailable: ClassVar[dict[str, str]] = {"vram": LATER}

    copies: Annotated[int, Field(ge=1, description="How many.")] = 1
    start_timeout: PositiveDuration = 900.0


class CommandSettings(Strict):
    pass


class CommandOptions(ModelOptions):
    unavailable: ClassVar[dict[str, str]] = {
        "vram": LATER,
        "network": "a command has no network of its own",
    }

    command: Annotated[list[Text], Field(min_length=1)]


class Server(BackendBase):
    Settings = ServerSettings
    Options = ServerOptions


class Command(BackendBase):
    Settings = CommandSettings
    Options = CommandOptions


class Fragile(BackendBase):
    """A plug-in whose validators raise what they should not."""

    class Settings(Strict):
        pass

    class Options(ModelOptions):
        @field_validator("user")
        @classmethod
        def _boom(cls, value: str) -> str:
            if value == "waits":
                RETURNS.wait(60)
            if value == "ends":
                raise GeneratorExit
            raise RuntimeError(f"boom {value}")


class FakeRegistry:
    def __init__(self) -> None:
        self._backends: dict[str, BackendTypes] = {
            "server": Server(),
            "command": Command(),
            "fragile": Fragile(),
        }

    def names(self) -> list[str]:
        return [*self._backends, "broken"]

    def get(self, name: str) -> BackendTypes | None:
        if name == "broken":
            raise MicError("cannot use backend broken: it does not load", hint="uninstall it")
        return self._backends.get(name)

    def meant(self, name: str, given: Collection[str | int]) -> str | None:
        return "write `backend: server`" if name == "daemon" else None

    def example(self, name: str) -> str:
        return "{backend: command, command: [/bin/a]}"


def load_text(
    directory: Path,
    text: str | bytes,
    *,
    environ: Mapping[str, str] | None = None,
    drop_ins: Mapping[str, str] | None = None,
) -> Config:
    """Loads `text` as gpus.yaml in `directory`, with drop-ins by their names."""
    path = directory / "gpus.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if drop_ins is not None:
        (directory / "gpus.yaml.d").mkdir()
        for name, content in drop_ins.items():
            (directory / "gpus.yaml.d" / name).write_text(content)
    return load(path, FakeRegistry(), environ=environ or {})


def rendered(directory: Path, text: str | bytes, **more: object) -> str:
    """The report on a file that is refused, with paths below `directory`."""
    with pytest.raises(InvalidConfig) as caught:
        load_text(directory, text, **more)  # type: ignore[arg-type]
    return caught.value.rendered.replace(f"{directory}/", "")
