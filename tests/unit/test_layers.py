"""Imports point downwards only, backends and runtimes never meet, and backends stay nameless."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mic_supervisor"

# From the top down: a layer may import what stands below it, and itself.
LAYERS = (
    *("cli", "demo", "doctor", "takeover", "kill", "daemon", "http", "converge", "views", "plan"),
    *("desired", "backends", "runtimes", "gpu", "config", "host", "model", "workloads"),
    *("errors", "clocks", "codec", "text"),
)

NEVER_MEET = {("backends", "runtimes"), ("runtimes", "backends")}

# Decisions are pure: what they need to know is handed to them.
PURE = ("plan/", "desired/bind", "desired/claims", "backends/")
# fmt: off
IMPURE_MODULES = frozenset((
    "asyncio", "docker", "fcntl", "http", "httpx", "logging", "os", "psutil", "pynvml",
    "random", "requests", "secrets", "select", "selectors", "shutil", "signal", "socket",
    "subprocess", "tempfile", "threading", "time", "urllib",
))
# fmt: on
PURE_PARTS = ("urllib.parse", "http.HTTPStatus")

BACKEND_NAMES = re.compile(r"\b(triton|comfyui|vllm)\b", re.IGNORECASE)

# Their own files, and a guided tour, which names what it shows.
MAY_NAME_BACKENDS = ("backends/", "demo/")


class Import(NamedTuple):
    line: int
    module: str


def modules(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def layer_of(module: str) -> str:
    """ "mic_supervisor.plan.spec" -> "plan"; the package itself is ""."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def name_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


tree_of = cache(ast.parse)


@cache
def imports(source: str, module: str, is_package: bool) -> list[Import]:
    """Every import of a module, wherever it stands, as an absolute name.

    `from a import b` counts as a.b: b may be a module. So do `a.b`, `getattr(a, "b")` and
    `import_module("a.b")`, which reach a module by its package; of an f-string its beginning.
    """
    return [*_imports(tree_of(source), module, is_package)]


def _imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[Import]:
    base = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = base[: len(base) - node.level + 1] if node.level else []
            origin = [*prefix, *(node.module.split(".") if node.module else [])]
            yield from (Import(node.lineno, ".".join([*origin, a.name])) for a in node.names)
        elif isinstance(node, ast.Attribute) and _dotted(node).startswith("mic_supervisor."):
            yield Import(node.lineno, _dotted(node))
        elif isinstance(node, ast.Call) and node.args:
            function = _dotted(node.func)
            if function == "getattr":
                stem = f"{_dotted(node.args[0])}."
            elif function.split(".")[-1] in ("import_module", "__import__"):
                stem = ""
            else:
                continue
            texts = (str(c.value) for c in ast.walk(node) if isinstance(c, ast.Constant))
            yield from (Import(node.lineno, f"{stem}{text}") for text in texts)


def _dotted(node: ast.expr) -> str:
    """ "a.b.c"; "" for what is no plain name."""
    if isinstance(node, ast.Attribute) and (stem := _dotted(node.value)):
        return f"{stem}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def circle(sources: dict[str, tuple[str, bool]]) -> list[str]:
    """Modules that import each other, for types too, in a row; none where there is no circle.

    `sources` maps a module to its text and whether it is a package.
    """
    graph: dict[str, set[str]] = {}
    for module, (source, is_package) in sources.items():
        targets = graph[module] = set()
        for _, target in imports(source, module, is_package):
            while target and target not in sources:
                target = target.rpartition(".")[0]
            targets.add(target)
        targets -= {module, ""}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def upward(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module, one sentence each."""
    mine = layer_of(module)
    if mine == "":
        known: tuple[str, ...] = ()
    elif mine not in LAYERS:
        return [f"{module} belongs to no layer; the layers are {', '.join(LAYERS)}"]
    else:
        known = LAYERS[LAYERS.index(mine) :]
    wrong = []
    for line, target in imports(source, module, is_package):
        theirs = layer_of(target)
        if not target.startswith("mic_supervisor.") or theirs not in LAYERS:
            continue
        if theirs not in known:
            wrong.append(f"{module}:{line} imports {target}: {theirs} is above {mine or 'all'}")
        elif (mine, theirs) in NEVER_MEET:
            wrong.append(f"{module}:{line} imports {target}: {mine} and {theirs} must not meet")
    return wrong


def impure(source: str, module: str, is_package: bool = False) -> list[str]:
    return [
        f"{module}:{line} imports {target}: {layer_of(module)} is pure"
        for line, target in imports(source, module, is_package)
        if target.split(".")[0] in IMPURE_MODULES
        and not f"{target}.".startswith(tuple(f"{part}." for part in PURE_PARTS))
    ]


def backends_named(source: str, module: str, is_package: bool = False) -> list[str]:
    """Backends' names in code or strings; comments and docstrings are prose and may have them."""
    tree = tree_of(source)
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
        and isinstance(node.body[0].value, ast.Constant)
    }
    wrong = []
    for node in ast.walk(tree):
        texts: list[str] = []
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            texts = [node.value]
        elif isinstance(node, ast.Name):
            texts = [node.id]
        elif isinstance(node, ast.Attribute):
            texts = [node.attr]
        elif isinstance(node, ast.alias):
            texts = [node.name, node.asname or ""]
        elif isinstance(node, ast.arg | ast.keyword):
            texts = [node.arg or ""]
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            texts = [node.name]
        elif isinstance(node, ast.ImportFrom):
            texts = [node.module or ""]
        line = getattr(node, "lineno", 0)
        for text in texts:
            # In a name, `_` parts words; \b would take tritonclient's neighbours for one word.
            if found := BACKEND_NAMES.search(text.replace("_", " ")):
                wrong.append(f"{module}:{line} names the backend {found[0]}")
    return wrong


def _findings(
    check: Callable[[str, str, bool], list[str]], applies: Callable[[str], bool]
) -> list[str]:
    """What `check` finds in every module whose path below the package `applies` takes."""
    wrong = []
    for path in modules(PACKAGE):
        if applies(path.relative_to(PACKAGE).as_posix()):
            is_package = path.name == "__init__.py"
            wrong += check(path.read_text(), name_of(path, PACKAGE), is_package)
    return wrong


def test_imports_point_downwards() -> None:
    assert len(modules(PACKAGE)) > 5
    assert _findings(upward, lambda path: True) == []


def test_the_architecture_lists_every_layer() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("| Layer | Holds |")[2].partition("\n\n")[0]
    firsts = [row.split("|")[1] for row in table.splitlines()[2:]]
    assert tuple(re.findall(r"`(\w+)`", " ".join(firsts))) == LAYERS


def test_no_modules_import_each_other() -> None:
    sources = {
        name_of(path, PACKAGE): (path.read_text(), path.name == "__init__.py")
        for path in modules(PACKAGE)
    }
    assert circle(sources) == []


def test_modules_are_chosen_by_name_in_two_places() -> None:
    """The commands, and the backends: what is imported there, no test can follow.

    The HTTP client names one module, which is not to be imported.
    """
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in modules(PACKAGE)
        if re.search(r"\b(import_module|__import__|sys\.modules)\b", path.read_text())
    }
    assert found == {"cli/__init__.py", "backends/registry.py", "converge/http_calls.py"}


def test_decisions_and_translations_are_pure() -> None:
    assert _findings(impure, lambda path: path.startswith(PURE)) == []


def test_nothing_outside_the_backends_names_one() -> None:
    assert _findings(backends_named, lambda path: not path.startswith(MAY_NAME_BACKENDS)) == []


# --- the checks themselves --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("mic_supervisor.plan.x", "from mic_supervisor.model import Gpu", []),
        ("mic_supervisor.plan.x", "import mic_supervisor.errors", []),
        ("mic_supervisor.plan.x", "import json", []),
        (
            "mic_supervisor.plan.x",
            "\nfrom mic_supervisor.converge import apply",
            [
                "mic_supervisor.plan.x:2 imports mic_supervisor.converge.apply: "
                "converge is above plan"
            ],
        ),
        (
            "mic_supervisor.plan.x",
            "def f():\n    from mic_supervisor import cli",
            ["mic_supervisor.plan.x:2 imports mic_supervisor.cli: cli is above plan"],
        ),
        (
            "mic_supervisor.plan.x",
            "from ..daemon import loop",
            ["mic_supervisor.plan.x:1 imports mic_supervisor.daemon.loop: daemon is above plan"],
        ),
        (
            "mic_supervisor.backends.x",
            "from mic_supervisor.runtimes import Runtime",
            [
                "mic_supervisor.backends.x:1 imports mic_supervisor.runtimes.Runtime: "
                "backends and runtimes must not meet"
            ],
        ),
        (
            "mic_supervisor.runtimes.x",
            "import mic_supervisor.backends",
            [
                "mic_supervisor.runtimes.x:1 imports mic_supervisor.backends: "
                "backends is above runtimes"
            ],
        ),
        (
            "mic_supervisor.plan.x",
            'import_module(f"mic_supervisor.cli.{name}")',
            ["mic_supervisor.plan.x:1 imports mic_supervisor.cli.: cli is above plan"],
        ),
        (
            "mic_supervisor.plan.x",
            'import mic_supervisor\nx = getattr(mic_supervisor, "daemon")',
            ["mic_supervisor.plan.x:2 imports mic_supervisor.daemon: daemon is above plan"],
        ),
        (
            "mic_supervisor.plan.x",
            "import mic_supervisor.errors\nmic_supervisor.cli",
            ["mic_supervisor.plan.x:2 imports mic_supervisor.cli: cli is above plan"],
        ),
        (
            "mic_supervisor.utils",
            "",
            [f"mic_supervisor.utils belongs to no layer; the layers are {', '.join(LAYERS)}"],
        ),
    ],
)
def test_upward_finds(module: str, source: str, wrong: list[str]) -> None:
    assert upward(source, module) == wrong


@pytest.mark.parametrize(
    ("b", "found"),
    [
        ("import a", ["a", "b", "a"]),
        ("def f():\n    from a import x", ["a", "b", "a"]),
        ("from importlib import import_module\nimport_module('a')", ["a", "b", "a"]),
        ("if TYPE_CHECKING:\n    from a import X", ["a", "b", "a"]),
        ("import c", []),
    ],
)
def test_circle_finds(b: str, found: list[str]) -> None:
    sources = {"a": ("import b", False), "b": (b, False), "c": ("", False)}
    assert circle(sources) in (found, ["b", "a", "b"][: len(found)])


def test_relative_imports_of_a_package_start_at_itself() -> None:
    source = "from . import spec\nfrom .. import daemon"
    assert upward(source, "mic_supervisor.plan", is_package=True) == [
        "mic_supervisor.plan:2 imports mic_supervisor.daemon: daemon is above plan"
    ]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import time", True),
        ("from subprocess import run", True),
        ("import os.path", True),
        ("from urllib.request import urlopen", True),
        ("from urllib.parse import quote", False),
        ("from http import HTTPStatus", False),
        ("import http.client", True),
        ("from datetime import datetime", False),
    ],
)
def test_impure_finds(source: str, found: bool) -> None:
    assert bool(impure(source, "mic_supervisor.plan.x")) is found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = 'triton'", True),
        ("x = f'the {y} vLLM server'", True),
        ("def start_comfyui(): pass", True),
        ("from mic_supervisor.backends.triton import Triton", True),
        ("x.triton = 1", True),
        ("f(vllm=1)", True),
        ("# triton is loved", False),
        ('"""Triton is one."""', False),
        ("def f():\n    'As Triton does.'", False),
        ("import tritonclient", False),
        ("x = 'patriton'", False),
    ],
)
def test_backends_named_finds(source: str, found: bool) -> None:
    assert bool(backends_named(source, "mic_supervisor.plan.x")) is found


def test_nothing_waits_with_what_swallows_a_cancellation() -> None:
    """asyncio.wait_for of Python 3.11 loses one that comes as its awaitable ends; timeout does not.

    asyncio.run waits without an end for threads that hang, which only a command that runs once may.
    """
    found = {
        f"{path.relative_to(PACKAGE)}: {node.attr}"
        for path in modules(PACKAGE)
        for node in ast.walk(tree_of(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in ("wait_for", "run")
        and ast.unparse(node.value) == "asyncio"
    }
    assert found == {"cli/session.py: run", "cli/status.py: run", "http/server.py: run"}
