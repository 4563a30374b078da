"""Whose a process is, by name."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys

import pytest

from mic_supervisor.host import user_name, who_asks
from tests.support.require import missing


def test_a_user_without_a_name_has_a_number() -> None:
    assert user_name(0) == "root"
    assert user_name(4_000_000) == "user 4000000"


def test_a_process_that_is_gone_has_its_user_all_the_same() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert who_asks(0, ended.pid) == "root"


def test_the_login_counts_and_what_the_environment_says_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if os.getuid() != 0:
        missing("root, who may set as whom somebody logged in")
    monkeypatch.setenv("SUDO_USER", "mallory")
    text = "echo 65534 > /proc/self/loginuid && echo done && read wait"
    with subprocess.Popen(
        ["sh", "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as shell:
        assert shell.stdout is not None
        assert shell.stdout.readline() == "done\n"
        nobody = pwd.getpwuid(65534).pw_name
        assert who_asks(0, shell.pid) == f"root (logged in as {nobody})"
        assert who_asks(65534, shell.pid) == nobody
        shell.communicate("\n")
