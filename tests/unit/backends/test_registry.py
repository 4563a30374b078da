"""Backends by name, and plug-ins that do not work."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from mic_supervisor.backends import BackendBase, CompileRequest
from mic_supervisor.backends.registry import GROUP, Registry
from mic_supervisor.config.options import ModelOptions, Strict
from mic_supervisor.errors import MicError
from mic_supervisor.model import Instance

BUILT_IN = ("comfyui", "container", "process", "triton", "vllm")


class Fitting(BackendBase):
    name = "fitting"
    Settings = Strict
    Options = ModelOptions

    def compile(self, request: CompileRequest) -> Instance:
        raise NotImplementedError


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
    assert type(made.get("fitting")) is Fitting


def test_a_plug_in_cannot_take_a_built_in_name() -> None:
    made = registry(("triton", f"{HERE}:Fitting")).get("triton")
    assert type(made).__module__ == "mic_supervisor.backends.triton"


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
        ("text", "HERE", "calls itself None"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, attribute: str, cause: str) -> None:
    assert refusal(name, (name, f"{HERE}:{attribute}")) == (
        f"cannot use backend {name}: {HERE}:{attribute} {cause}"
    )


def test_two_packages_with_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "other", ModuleType("other"))
    said = refusal("fitting", ("fitting", f"{HERE}:Fitting"), ("fitting", "other:Backend"))
    assert said == (
        f"cannot use backend fitting: two packages bring it, as other:Backend and {HERE}:Fitting"
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_backend_has_a_schema(name: str) -> None:
    backend = Registry().get(name)
    assert backend is not None
    assert {"env", "rollout", "probe"} <= set(backend.Options.model_json_schema()["properties"])
    assert backend.Settings.model_json_schema()["additionalProperties"] is False
