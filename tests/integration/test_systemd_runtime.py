"""The systemd runtime against a real PID 1: the tests in systemd/ run inside of a machine.

One run of pytest in there tests all that was asked for out here; each test here tells how its
namesake went.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import docker
import pytest

from tests.setup.steps import CHECKOUT
from tests.support import scopes, systemd

pytestmark = pytest.mark.engine

INSIDE = Path(__file__).parent / "systemd"
SHARED = [
    *(CHECKOUT / "tests" / name for name in ("__init__.py", "integration/__init__.py")),
    *(CHECKOUT / "tests/support" / name for name in ("__init__.py", "commands.py", "waiting.py")),
]
RESULTS = f"{systemd.TESTS}/results.xml"


class Inner(NamedTuple):
    module: str
    name: str

    @property
    def id(self) -> str:
        return f"{self.module}-{self.name.removeprefix('test_')}"


def inner_tests() -> Iterator[Inner]:
    for path in sorted(INSIDE.glob("inside_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield Inner(path.stem, node.name)


Outcomes = dict[Inner, list[str]]
"""How each went: a text for every failure, none for a pass."""


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, engine: docker.APIClient, systemd_image: str
) -> Outcomes:
    wanted = [
        item.callspec.params["test"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and "outcomes" in item.fixturenames
    ]
    with systemd.machine(engine, scopes.new_scope()) as machine:
        machine.install()
        machine.put_tests(*SHARED, INSIDE)
        machine.boot()
        folder = f"{systemd.TESTS}/tests/integration/systemd"
        done = machine.exec(
            *("/opt/mic/bin/python3", "-m", "pytest", "-q", "--tb=short", f"--junitxml={RESULTS}"),
            *("--rootdir", systemd.TESTS, "-p", "no:cacheprovider"),
            *(f"{folder}/{one.module}.py::{one.name}" for one in wanted),
            env={"PYTHONPATH": systemd.TESTS, "PYTHONDONTWRITEBYTECODE": "1"},
            rc=None,
            timeout=600,
        )
        print(done.stdout)
        if done.rc not in (0, 1):
            pytest.fail(f"the tests inside could not be run: {done}", pytrace=False)
        return _read(machine.exec("cat", RESULTS).stdout)


def _read(text: str) -> Outcomes:
    found: Outcomes = {}
    for case in ElementTree.fromstring(text).iter("testcase"):
        module = (case.get("classname") or "").rpartition(".")[2]
        name = (case.get("name") or "").partition("[")[0]
        failures = found.setdefault(Inner(module, name), [])
        for kind in ("failure", "error", "skipped"):
            failures += [f"{case.get('name')}: {kind}: {one.text}" for one in case.iter(kind)]
    return found


@pytest.mark.parametrize("test", [pytest.param(one, id=one.id) for one in inner_tests()])
def test_inside(test: Inner, outcomes: Outcomes) -> None:
    assert test in outcomes, "it did not run"
    if outcomes[test]:
        pytest.fail("\n".join(outcomes[test]), pytrace=False)
