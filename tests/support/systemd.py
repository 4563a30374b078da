"""A machine that systemd runs, in a container: one at a time, booted in a few seconds.

With version 1 of the control groups it shares the host's, so that two at once would share their
units' groups, too. There may be no CAP_SYS_RESOURCE: limits can be lowered and not raised.
"""

from __future__ import annotations

import fcntl
import io
import os
import subprocess
import tarfile
import time
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import docker
from docker.errors import APIError, NotFound

from tests.setup.steps import CHECKOUT, cache_dir
from tests.support import wheel
from tests.support.require import missing
from tests.support.scopes import LABEL
from tests.support.waiting import until

IMAGE = "mic-test/systemd:1"
SITE = "/opt/mic/lib/python3.11/site-packages"
TESTS = "/opt/mic-tests"
NO_ENGINE = "MIC_GPU_SOURCE=simulated:2\nMIC_DOCKER_HOST=none\nMIC_RESYNC=1s\n"  # mic.env
UNIT_FILE = CHECKOUT / "systemd" / "mic.service"

_BOOT_TIMEOUT = 90.0  # seconds
_CGROUPS = Path("/sys/fs/cgroup")
_ONE_TREE = (_CGROUPS / "cgroup.controllers").exists()  # version 2
_HOST_SYSTEMD = Path("/run/systemd/system")
_TOP_GROUPS = ("mic.slice", "system.slice", "user.slice", "machine.slice", "init.scope")
_PROGRAM = """\
#!/opt/mic/bin/python3
import sys
from mic_supervisor.cli import main
sys.exit(main())
"""


class Done(NamedTuple):
    """`rc` as the shell shows it; the streams as text."""

    rc: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        return f"exit {self.rc}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


class SystemdMachine:
    """One such machine, with the project installed in /opt/mic and mic.service in place.

    It has the users alice and bob, and `mic-supervisor` on its PATH. With `docker_socket`, the
    path of an engine's socket, it has that engine as its own.
    """

    def __init__(
        self,
        engine: docker.APIClient,
        scope: str,
        *,
        docker_socket: str | None = None,
        image: str = IMAGE,
    ) -> None:
        self._engine = engine
        privileges = _privileges()
        if docker_socket is not None:
            binds = privileges.setdefault("binds", [])
            binds.append(f"{docker_socket}:/var/run/docker.sock")
        self.id = str(
            engine.create_container(
                image,
                name=f"mic-test-machine-{uuid.uuid4().hex[:8]}",
                hostname="machine",
                labels={LABEL: scope},
                host_config=engine.create_host_config(
                    tmpfs={"/run": "", "/run/lock": "", "/tmp": "exec"},
                    # A later systemd takes no part of the host's groups for the whole.
                    cgroupns="private" if image == IMAGE or _ONE_TREE else "host",
                    **privileges,
                ),
            )["Id"]
        )

    # --- power ----------------------------------------------------------------------------

    def boot(self) -> None:
        """Returns when systemd says that the machine is up."""
        self._engine.start(self.id)
        begun = time.monotonic()

        def state() -> str:
            asked = self.exec("systemctl", "is-system-running", rc=None)
            said = asked.stdout.strip()
            if said == "degraded":
                failed = self.exec("systemctl", "--failed", "--no-legend").stdout
                raise AssertionError(f"the machine came up degraded:\n{failed}")
            return said

        until(lambda: state() == "running", "the machine to boot", timeout=_BOOT_TIMEOUT)
        self.boot_seconds = time.monotonic() - begun

    def reboot(self) -> None:
        """Shut down in good order, and boot again; what is on disk stays."""
        self.shut_down()
        self.boot()

    def shut_down(self, timeout: int = 60) -> None:
        self._engine.stop(self.id, timeout=timeout)

    def cut_power(self) -> None:
        self._engine.kill(self.id)
        self._engine.wait(self.id, timeout=30)
        remove_groups()

    def close(self) -> None:
        with suppress(NotFound):
            self._engine.remove_container(self.id, force=True, v=True)
        remove_groups()

    # --- inside ---------------------------------------------------------------------------

    def exec(
        self,
        *argv: str,
        rc: int | None = 0,
        stdin: bytes | str = b"",
        user: str | None = None,
        env: dict[str, str] | None = None,
        timeout: float = 60.0,
    ) -> Done:
        """Runs a command. Another exit code than `rc` fails the test; None takes any."""
        command = ["docker", "exec", "--interactive"]
        command += ["--user", user] if user else []
        for name, value in (env or {}).items():
            command += ["--env", f"{name}={value}"]
        done = subprocess.run(
            [*command, self.id, *argv],
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            timeout=timeout,
        )
        result = Done(
            done.returncode,
            done.stdout.decode(errors="replace"),
            done.stderr.decode(errors="replace"),
        )
        if rc is not None and result.rc != rc:
            raise AssertionError(f"{' '.join(argv)}: wanted exit {rc}, got {result}")
        return result

    def sh(self, script: str, *, rc: int | None = 0, timeout: float = 60.0) -> Done:
        return self.exec("sh", "-c", script, rc=rc, timeout=timeout)

    def write(self, path: str, text: str | bytes, mode: int = 0o644) -> None:
        """Through a shell inside: what the engine copies would land beneath a tmpfs."""
        self.exec(
            *("sh", "-c", 'mkdir -p "$(dirname "$1")" && cat > "$1" && chmod "$2" "$1"', "sh"),
            *(path, f"{mode:o}"),
            stdin=text,
        )

    def journal(self, unit: str) -> str:
        """Everything about a unit, oldest first, messages only."""
        self.exec("journalctl", "--sync")
        return self.exec(
            *("journalctl", "--quiet", "--no-pager", "--output=cat", "--unit", unit)
        ).stdout

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.exec("systemctl", "show", "--value", "-p", name, unit).stdout.rstrip("\n")

    # --- what is in it --------------------------------------------------------------------

    def install(self) -> None:
        """The project as it is now, and its unit file. Before the first boot."""
        with zipfile.ZipFile(wheel.build()) as archive:
            members = {f"{SITE}/{name}": archive.read(name) for name in archive.namelist()}
        members["/opt/mic/bin/mic-supervisor"] = _PROGRAM.encode()
        members["/etc/systemd/system/mic.service"] = UNIT_FILE.read_bytes()
        links = {"/usr/bin/mic-supervisor": "/opt/mic/bin/mic-supervisor"}
        self._put(members, links, executable=frozenset({"/opt/mic/bin/mic-supervisor"}))

    def put_tests(self, *paths: Path) -> None:
        """Files and folders of the checkout, below TESTS. Before the first boot."""
        found = [
            file
            for path in paths
            for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))
        ]
        self._put({f"{TESTS}/{f.relative_to(CHECKOUT)}": f.read_bytes() for f in found})

    def _put(
        self,
        members: dict[str, bytes],
        links: dict[str, str] | None = None,
        executable: frozenset[str] = frozenset(),
    ) -> None:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, data in members.items():
                entry = tarfile.TarInfo(name.lstrip("/"))
                entry.size, entry.mode = len(data), 0o755 if name in executable else 0o644
                entry.mtime = int(time.time())
                archive.addfile(entry, io.BytesIO(data))
            for name, target in (links or {}).items():
                entry = tarfile.TarInfo(name.lstrip("/"))
                entry.type, entry.linkname = tarfile.SYMTYPE, target
                archive.addfile(entry)
        self._engine.put_archive(self.id, "/", packed.getvalue())


@contextmanager
def machine(
    engine: docker.APIClient,
    scope: str,
    *,
    docker_socket: str | None = None,
    image: str = IMAGE,
) -> Iterator[SystemdMachine]:
    """A machine that has not been booted; removed afterwards, with the groups that it leaves."""
    with (cache_dir() / "systemd-machine.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # that of whoever was killed is free
        _remove_stale(engine)
        remove_groups()
        one = SystemdMachine(engine, scope, docker_socket=docker_socket, image=image)
        try:
            yield one
        finally:
            one.close()


def _remove_stale(engine: docker.APIClient) -> None:
    """Machines of whoever held the lock before and was killed."""
    for found in engine.containers(all=True, filters={"name": "mic-test-machine-"}):
        with suppress(NotFound, APIError):
            engine.remove_container(found["Id"], force=True, v=True)


def _privileges() -> dict[str, Any]:
    """What systemd needs as PID 1 of a container.

    With version 2 of the control groups, a privileged container has a tree of its own to write to.
    With version 1 it has not: it is given the host's, which must not be another systemd's.
    """
    if _ONE_TREE:
        return {"privileged": True}
    if _HOST_SYSTEMD.is_dir():
        missing("systemd in a container would share the control groups of this machine's own")
    return {
        "cap_add": ["SYS_ADMIN", "DAC_READ_SEARCH"],
        "security_opt": ["seccomp=unconfined", "apparmor=unconfined"],
        "binds": ["/sys/fs/cgroup:/sys/fs/cgroup:rw"],
    }


def remove_groups() -> None:
    """The control groups that a machine has left on this host, those that are empty."""
    if _HOST_SYSTEMD.is_dir():
        return
    controllers = [_CGROUPS, *(path for path in _CGROUPS.iterdir() if path.is_dir())]
    for controller in controllers:
        for name in _TOP_GROUPS:
            top = controller / name
            for directory, _, _ in os.walk(top, topdown=False):
                with suppress(OSError):  # in use: it is not ours
                    Path(directory).rmdir()
