"""Lint, formatting and types as tests; what CI calls; how light the command starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HEAVY = ("docker", "jinja2", "pynvml", "requests", "starlette", "tritonclient", "google.protobuf")


def _cache(name: str) -> str:
    """A linter's cache outside the checkout: a fresh clone does not start from nothing."""
    given = os.environ.get("MIC_TEST_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str((Path(given) if given else Path(base) / "mic-supervisor-tests") / name)


def _clean(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)}:\n{done.stdout}{done.stderr}", pytrace=False)


def test_ruff_finds_nothing() -> None:
    _clean("ruff", "check", ".")


def test_ruff_would_format_nothing() -> None:
    _clean("ruff", "format", "--check", ".")


def test_types_hold() -> None:
    paths = ("mic_supervisor", "tests/setup", "tests/support", "tests/conftest.py", "benchmarks")
    _clean("mypy", "--cache-dir", _cache("mypy"), *paths)


def test_types_of_the_ansible_collection_hold() -> None:
    paths = sorted((ROOT / "ansible" / "plugins").rglob("*.py"))
    _clean("mypy", "--cache-dir", _cache("mypy"), *map(str, paths), "tests/fleet")


def test_types_of_the_example_plug_in_hold() -> None:
    _clean("mypy", "--cache-dir", _cache("mypy"), "examples/plugin/mic_mlserver.py")


def test_every_file_that_is_no_module_is_packaged() -> None:
    package = ROOT / "mic_supervisor"
    files = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packaged = {*project["tool"]["setuptools"]["package-data"]["mic_supervisor"]}
    assert {name for name in files if not name.startswith("share/")} == {
        name for name in packaged if not name.startswith("share/")
    }


def test_ci_calls_make_test_and_nothing_cleverer() -> None:
    script = ROOT / ".ci" / "run"
    assert script.read_text() == (
        "#!/usr/bin/env bash\n"
        "set -euo pipefail\n"
        'cd "$(dirname "${BASH_SOURCE[0]}")/.."\n'
        "exec make test\n"
    )
    assert os.access(script, os.X_OK)


def test_the_workflow_is_valid_and_calls_make_on_every_python() -> None:
    path = ROOT / ".github" / "workflows" / "ci.yml"
    program = Path(sys.executable).with_name("actionlint")
    done = subprocess.run([program, "-no-color", path], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    jobs = yaml.safe_load(path.read_text())["jobs"]
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+(?: [a-z-]+)*):", makefile, re.MULTILINE)
    for step in (step for job in jobs.values() for step in job["steps"] if "run" in step):
        command, *words = step["run"].split()
        assert command == "make", step
        assert {w for w in words if "=" not in w} <= set(" ".join(targets).split())
    assert jobs["check"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def test_a_commit_is_checked_by_what_check_runs_first() -> None:
    [repo] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in repo["hooks"]] == [
        ".venv/bin/ruff check .",
        ".venv/bin/ruff format --check .",
        ".venv/bin/mypy",
    ]


def imported_modules(importtime: str) -> set[str]:
    """The module names in what `python -X importtime` prints on stderr."""
    lines = (line for line in importtime.splitlines() if line.startswith("import time:"))
    return {line.rpartition("|")[2].strip() for line in lines}


def test_what_asks_the_daemon_loads_no_planner() -> None:
    text = "from mic_supervisor.cli import apply, plan, session, status"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", text], cwd=ROOT, capture_output=True, text=True
    )
    loaded = imported_modules(done.stderr)
    assert "mic_supervisor.daemon.client" in loaded, done.stderr
    heavy = {one for one in loaded if one.startswith(("pydantic", "mic_supervisor.plan."))}
    assert heavy <= {"mic_supervisor.plan.words"}


@pytest.mark.parametrize("arguments", ["--help", "check --help", "check examples/gpus.yaml"])
def test_the_command_starts_light(arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mic_supervisor.cli", *arguments.split()],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("MIC_")},
        capture_output=True,
        text=True,
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 0, "\n".join([done.stdout, *said])
    loaded = imported_modules(done.stderr)
    assert "click" in loaded
    assert sorted(loaded.intersection(HEAVY)) == []
