"""The set-up of the tests, as far as it decides anything without a server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.setup import engine, images, packages, steps
from tests.support import require, scopes
from tests.support.ports import SIZE, PortBlock
from tests.support.waiting import until

# PID_MAX_LIMIT of a 64-bit kernel is 4194304.
NO_PID = 4194999


def test_comments_and_blank_lines_name_no_packages() -> None:
    assert packages.wanted("# a\n\ndocker.io  # the engine\n  gcc\n") == ["docker.io", "gcc"]


def test_every_package_of_the_list_has_a_reason() -> None:
    lines = packages.LIST.read_text().splitlines()
    assert [line for line in lines if line.strip() and "#" not in line] == []


@pytest.mark.skipif(not Path("/usr/bin/dpkg-query").exists(), reason="cannot run: not Debian")
def test_only_packages_that_are_not_there_are_missing() -> None:
    assert packages.missing(["dpkg", "nobody-packaged-this"]) == ["nobody-packaged-this"]


def test_a_fingerprint_changes_with_any_part(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("a")
    seen = {steps.fingerprint("x", file), steps.fingerprint("xy", file), steps.fingerprint(file)}
    file.write_text("b")
    seen.add(steps.fingerprint("x", file))
    assert len(seen) == 4


def test_a_failed_command_says_what_could_not_be_done() -> None:
    with pytest.raises(steps.Missing) as caught:
        steps.run(["sh", "-c", "echo no space left; exit 3"], "unpack it")
    assert str(caught.value) == "cannot unpack it: sh exited with 3:\n    no space left"
    with pytest.raises(steps.Missing, match=r"cannot unpack it: no-such-tool is not installed"):
        steps.run(["no-such-tool"], "unpack it")


DEBIANS = Path("/usr/bin/python3")  # another one has venv and pip in itself
HIDDEN = ("/usr/lib/python3*/ensurepip", "/usr/lib/python3/dist-packages/pip")


@pytest.mark.skipif(os.geteuid() != 0, reason="cannot run: only root can hide directories")
@pytest.mark.skipif(
    not DEBIANS.exists() or not Path("/usr/bin/apt-get").exists(), reason="cannot run: not Debian"
)
def test_without_venv_a_demo_says_what_to_install_and_installs_nothing(tmp_path: Path) -> None:
    """As on a fresh Debian: in a mount namespace of its own, Python has neither venv nor pip."""
    shutil.copytree(steps.CHECKOUT / "tests" / "setup", tmp_path / "tests" / "setup")
    for name in ("pyproject.toml", "tests/__init__.py"):
        shutil.copy(steps.CHECKOUT / name, tmp_path / name)
    hide = f"for one in {' '.join(HIDDEN)}; do ! test -d $one || mount -t tmpfs none $one; done"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", f"{hide}; exec {DEBIANS} -m tests.setup.venv"],
        cwd=tmp_path,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "MIC_TEST_CACHE": str(tmp_path / "cache")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"cannot run: {done.stderr.strip()}")
    assert done.returncode == 1
    assert done.stderr == (
        "setup: error: cannot create .venv: this Python comes without venv\n"
        "setup: hint: as root: apt install python3-venv\n"
    )
    assert "installing" not in done.stdout


def test_a_zombie_runs_nothing() -> None:
    process = subprocess.Popen(["true"])
    stat = Path(f"/proc/{process.pid}/stat")
    until(lambda: ") Z " in stat.read_text(), "a zombie")
    assert engine._program(process.pid) is None
    process.wait()
    assert engine._program(NO_PID) is None
    assert engine._program(os.getpid()) is not None


@pytest.mark.parametrize(
    ("text", "stays"), [(str(NO_PID), False), ("", False), ("what", False), ("own", True)]
)
def test_only_the_pid_file_of_a_running_program_stays(
    tmp_path: Path, text: str, stays: bool
) -> None:
    program = engine._program(os.getpid())
    assert program is not None
    file = tmp_path / "pid"
    file.write_text(str(os.getpid()) if text == "own" else text)
    engine._drop_stale_pidfile(file, "dockerd")
    assert not file.exists()
    file.write_text(str(os.getpid()) if text == "own" else text)
    engine._drop_stale_pidfile(file, program)
    assert file.exists() is stays


def test_an_engine_that_someone_else_started_is_not_ours() -> None:
    assert not engine._ours(os.getpid())
    assert not engine._ours(NO_PID)


@pytest.mark.parametrize(
    ("member", "place"),
    [
        (
            "pytriton/tritonserver/python_backend_stubs/3.11/triton_python_backend_stub",
            "opt/tritonserver/pytriton/tritonserver/backends/python/triton_python_backend_stub",
        ),
        ("pytriton/tritonserver/python_backend_stubs/3.12/triton_python_backend_stub", None),
        ("nvidia_pytriton.libs/libpython3-419a3a08.13.so.1.0", None),
        (
            "nvidia_pytriton.libs/libz-1.so",
            "opt/tritonserver/nvidia_pytriton.libs/libz-1.so",
        ),
        ("pytriton/client/client.py", None),
    ],
)
def test_what_goes_into_the_triton_image(member: str, place: str | None) -> None:
    assert images._triton_path(member) == place


def test_a_missing_component_fails_in_ci_and_skips_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="cannot run: no engine; start one"):
        require.missing("no engine", "start one")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="cannot run: no engine; start one"):
        require.missing("no engine", "start one")


def test_port_blocks_do_not_overlap_and_avoid_ports_in_use() -> None:
    first, second = PortBlock(), PortBlock()
    assert abs(first.first - second.first) >= SIZE
    taken = first.take()
    assert first.first <= taken < first.first + SIZE
    low, _, high = first.range.partition("-")
    assert int(low) == first.first
    assert int(high) < taken
    begin = first.first
    first.close()
    with socket.socket() as user:
        user.bind(("127.0.0.1", begin + 1))
        user.listen()
        third = PortBlock()
        assert third.first != begin
        third.close()
    second.close()


def test_processes_of_a_scope_are_found_and_ended_and_no_others() -> None:
    mine, other = scopes.new_scope(), scopes.new_scope()
    sleepers = {
        name: subprocess.Popen(["sleep", "60"], env={**os.environ, "MIC_SCOPE": name})
        for name in (mine, other)
    }
    try:
        until(lambda: scopes.processes(mine) == [sleepers[mine].pid], "the process")
        begun = time.monotonic()
        scopes.end_processes(mine)
        assert time.monotonic() - begun < 5
        assert sleepers[mine].wait(5) == -9
        assert sleepers[other].poll() is None
    finally:
        for process in sleepers.values():
            process.kill()
            process.wait()
