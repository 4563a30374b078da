"""Backends by name, and plug-ins that do not work."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
from pydantic import BaseModel, ConfigDict

from mic_supervisor.backends import BackendBase, CompileRequest
from mic_supervisor.backends.registry import GROUP, Registry
from mic_supervisor.config.options import ModelOptions, Strict
from mic_supervisor.config.schema import json_schema
from mic_supervisor.errors import MicError
from mic_supervisor.model import Instance

BUILT_IN = ("comfyui", "container", "process", "triton", "vllm")


class Fitting(BackendBase):
    name = "fitting"
    Settings = Strict
    Options = ModelOptions

    def compile(self, request: CompileRequest) -> Instance:
        raise NotImplementedError


class Twin(Fitting):
    name = "twin"


class OtherName(Fitting):
    name = "something else"


class LooseOptions(Fitting):
    name = "loose"
    Options = Strict  # type: ignore[assignment]


class NoCompile(BackendBase):
    name = "half"
    Settings = Strict
    Options = ModelOptions


class Explodes(Fitting):
    def __init__(self) -> None:
        raise RuntimeError("no licence")


class Exits(Fitting):
    def __init__(self) -> None:
        sys.exit("wrong machine")


class Ends(Fitting):
    def __init__(self) -> None:
        raise asyncio.CancelledError


class TakesAnything(Fitting):
    name = "lax"
    Settings = type("Lax", (BaseModel,), {})  # type: ignore[assignment]


class Unspeakable(ModelOptions):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    thing: Callable[[], None]


class NoSchema(Fitting):
    name = "mute"
    Options = Unspeakable


class BadReasons(ModelOptions):
    unavailable: ClassVar[dict[str, str]] = {"mounts": 1}  # type: ignore[dict-item]


class NoReasons(Fitting):
    name = "gruff"
    Options = BadReasons


class OldMeans:
    """Fits the protocol as it was, without BackendBase."""

    name = "old"
    Settings = Strict
    Options = ModelOptions

    def compile(self, request: CompileRequest) -> Instance:
        raise NotImplementedError


def registry(*entries: tuple[str, str]) -> Registry:
    return Registry(lambda: [EntryPoint(name, value, GROUP) for name, value in entries])


def refusal(name: str, *entries: tuple[str, str]) -> str:
    with pytest.raises(MicError) as caught:
        registry(*entries).get(name)
    assert caught.value.hint
    return str(caught.value)


HERE = __name__


def test_built_in_backends_need_no_look_at_installed_packages() -> None:
    def installed() -> list[EntryPoint]:
        raise AssertionError("looked")

    for name in BUILT_IN:
        backend = Registry(installed).get(name)
        assert backend is not None and backend.name == name


def test_importing_the_registry_imports_no_backend() -> None:
    code = (
        "import sys, mic_supervisor.backends.registry\n"
        "heavy = ('google', 'docker', 'tritonclient', 'importlib.metadata',"
        " 'mic_supervisor.backends.triton', 'mic_supervisor.backends.common')\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "import mic_supervisor.backends.triton\n"
        "print([name for name in heavy[:3] if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[1] == "[]"
    assert "mic_supervisor.backends.triton" not in done.stdout


def test_names_are_sorted_and_hold_the_plug_ins() -> None:
    names = registry(("fitting", f"{HERE}:Fitting")).names()
    assert names == tuple(sorted((*BUILT_IN, "fitting")))


def test_an_unknown_name_is_none() -> None:
    assert registry(("fitting", f"{HERE}:Fitting")).get("fittin") is None


def test_a_plug_in_is_made_once() -> None:
    made = registry(("fitting", f"{HERE}:Fitting"))
    assert made.get("fitting") is made.get("fitting")
    found = made.get("fitting")
    assert found is not None and (found.name, found.Options) == ("fitting", ModelOptions)


def test_a_plug_in_cannot_take_a_built_in_name() -> None:
    made = registry(("triton", f"{HERE}:Fitting")).get("triton")
    assert type(made).__module__ == "mic_supervisor.backends.triton"
    assert registry(("triton", f"{HERE}:Fitting")).plug_ins() == ("triton",)


def test_a_broken_plug_in_is_an_error_about_itself_only() -> None:
    entries = (("gone", "no_such_module_at_all:X"), ("fitting", f"{HERE}:Fitting"))
    assert refusal("gone", *entries) == (
        "cannot use backend gone: no_such_module_at_all:X does not load: "
        "ModuleNotFoundError: No module named 'no_such_module_at_all'"
    )
    assert registry(*entries).get("fitting") is not None
    assert "gone" in registry(*entries).names()


@pytest.mark.parametrize(
    ("name", "attribute", "cause"),
    [
        ("loud", "Explodes", "does not load: RuntimeError: no licence"),
        ("mine", "OtherName", "calls itself 'something else'"),
        ("loose", "LooseOptions", "has no Options that derives from ModelOptions"),
        ("half", "NoCompile", "has no method compile"),
        ("old", "OldMeans", "has no method placement_state"),
        ("quits", "Exits", "does not load: SystemExit: wrong machine"),
        ("ends", "Ends", "does not load: CancelledError"),
        (
            "absent",
            "Nowhere",
            f"does not load: AttributeError: module '{HERE}' has no attribute 'Nowhere'",
        ),
        (
            "lax",
            "TakesAnything",
            "has Settings that take unknown keys; derive them from config.options.Strict",
        ),
        (
            "mute",
            "NoSchema",
            "has Options that no schema can be made of: "
            "PydanticInvalidForJsonSchema: Cannot generate a JsonSchema for "
            "core_schema.CallableSchema",
        ),
        ("gruff", "NoReasons", "has Options whose `unavailable` is no map from keys to reasons"),
        ("a/b", "Fitting", "has a name that no file can use; it takes letters, digits, - and _"),
        ("text", "HERE", "calls itself None"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, attribute: str, cause: str) -> None:
    said = refusal(name, (name, f"{HERE}:{attribute}"))
    # pydantic adds an address to its own words.
    assert said.partition(" For further")[0] == (
        f"cannot use backend {name}: {HERE}:{attribute} {cause}"
    )


def test_two_packages_with_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "other", ModuleType("other"))
    said = refusal("fitting", ("fitting", f"{HERE}:Fitting"), ("fitting", "other:Backend"))
    assert said == (
        f"cannot use backend fitting: two packages bring it, as other:Backend and {HERE}:Fitting"
    )


def test_it_is_tried_once_whether_or_not_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(Explodes, "__init__", lambda self: tried.append("x") or sys.exit(3))
    made = registry(("loud", f"{HERE}:Explodes"))
    for _ in range(3):
        with pytest.raises(MicError, match="does not load: SystemExit: 3"):
            made.get("loud")
    assert tried == ["x"]


def test_a_package_whose_metadata_cannot_be_parsed_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package, text in (
        ("bad", "[console_scripts]\nno equals sign\n"),
        ("good", f"[{GROUP}]\nfitting = {HERE}:Fitting\n"),
    ):
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    made = Registry()
    assert made.plug_ins() == ("fitting",)
    assert made.origin("fitting") == f"good 1.0 ({HERE}:Fitting)"
    assert made.get("fitting") is not None


def test_one_schema_that_cannot_be_made_spoils_no_other() -> None:
    made = registry(("mute", f"{HERE}:NoSchema"), ("fitting", f"{HERE}:Fitting"))
    backends = json_schema(made)["properties"]["backends"]["properties"]
    assert "fitting" in backends and "mute" not in backends


def test_backends_that_share_their_options_have_a_schema_each() -> None:
    made = registry(("fitting", f"{HERE}:Fitting"), ("twin", f"{HERE}:Twin"))
    definitions = json_schema(made)["$defs"]
    for name in ("fitting", "twin"):
        assert definitions[f"{name}_options"]["properties"]["backend"]["const"] == name
        assert definitions[f"{name}_settings"]["properties"] == {}


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_backend_has_a_schema(name: str) -> None:
    backend = Registry().get(name)
    assert backend is not None
    assert {"env", "rollout", "probe"} <= set(backend.Options.model_json_schema()["properties"])
    assert backend.Settings.model_json_schema()["additionalProperties"] is False
