"""The collection in ansible/ as Ansible's own tools see it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fleet.controller import put_collection
from tests.setup import fleet as setup
from tests.setup.steps import CHECKOUT
from tests.support.require import missing

# It gets pip for its environments from the Internet, unless this file is there.
BOOTSTRAP = ".ansible/test/cache/get_pip_24_2.py"
SANITY = ("ansible-doc", "compile", "ignores", "import", "pep8", "validate-modules", "yamllint")


@pytest.fixture
def programs() -> Path:
    """Where Ansible's programs are."""
    if not setup.ready():
        missing("there is no Ansible", "make test-fleet")
    return setup.ansible() / "bin"


def test_the_collection_is_as_ansible_lint_asks(tmp_path: Path, programs: Path) -> None:
    put_collection(tmp_path)
    done = subprocess.run(
        [programs / "ansible-lint", "--offline", "--nocolor", "--profile", "production"],
        cwd=CHECKOUT / "ansible",
        env={
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "ANSIBLE_COLLECTIONS_PATH": str(tmp_path),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_collection_passes_the_sanity_tests_of_ansible(tmp_path: Path, programs: Path) -> None:
    home = programs.parent / "home"
    (home / BOOTSTRAP).parent.mkdir(parents=True, exist_ok=True)
    (home / BOOTSTRAP).write_text("import ensurepip\nensurepip.bootstrap()\n")
    collection = tmp_path / "ansible_collections" / "mic" / "supervisor"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "ansible", collection, ignore=ignored)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = [str(programs / "ansible-test"), "sanity", "--python", python]
    done = subprocess.run(
        [*command, *(word for name in SANITY for word in ("--test", name))],
        cwd=collection,
        env={
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(home),
            "LC_ALL": "C.UTF-8",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in SANITY:
        assert f'Running sanity test "{name}"' in done.stdout + done.stderr


def test_a_drain_that_left_something_running_is_no_drain(tmp_path: Path, programs: Path) -> None:
    """Run again it must not say that all is well: somebody is about to change the driver."""
    put_collection(tmp_path)
    supervisor = tmp_path / "mic-supervisor"
    row = {"id": "m-1", "pid": 77, "endpoints": {}}
    drained = {"since": 1.0, "reason": None, "until_reboot": False}
    status = json.dumps({"instances": [row], "unreadable": [], "drained": drained})
    supervisor.write_text(
        f"#!/bin/sh\n[ $1 = status ] && echo '{status}' && exit\n"
        "echo 'error: cannot stop m-1: it still runs' >&2; exit 1\n"
    )
    supervisor.chmod(0o755)
    done = subprocess.run(
        [
            *(programs / "ansible", "-i", "localhost,", "-c", "local", "localhost"),
            *("-m", "mic.supervisor.drain", "-a", f"executable={supervisor}"),
            *("-e", f"ansible_python_interpreter={sys.executable}"),
        ],
        env={**os.environ, "HOME": str(tmp_path), "ANSIBLE_COLLECTIONS_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "cannot drain the host: error: cannot stop m-1: it still runs" in done.stdout
