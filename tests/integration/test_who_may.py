"""Who may do what: a user of the machine, a member of group mic, a container with the socket.

The table in SECURITY.md names these tests, row by row.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from tests.integration.daemon_world import DaemonWorld, daemon_world, process
from tests.support.systemd import NO_ENGINE, SystemdMachine
from tests.support.waiting import until

pytestmark = pytest.mark.engine

GPUS = """\
version: 1
models:
  a: {backend: process, command: [/bin/sleep, "1000"], env: {KEY: s3cret}, user: nobody}
gpus: {0: a, 1: none}
"""
OTHER = GPUS.replace("/bin/sleep", "/usr/bin/id")


@pytest.fixture(scope="module")
def machine(systemd_machine: SystemdMachine) -> SystemdMachine:
    """An installed daemon with one model, a group mic with bob in it, and alice, who is in none."""
    one = systemd_machine
    one.write("/etc/mic/mic.env", NO_ENGINE)
    one.write("/etc/mic/gpus.yaml", GPUS)
    one.sh("groupadd mic && usermod -aG mic bob && systemctl start mic")
    until(lambda: "serving HTTP" in one.journal("mic"), "the daemon")
    one.exec("mic-supervisor", "apply")
    return one


def instance(machine: SystemdMachine) -> str:
    found = json.loads(machine.exec("mic-supervisor", "status", "--json").stdout)
    (row,) = found["instances"]
    assert row["phase"] == "unprobed"
    return str(row["pid"])


def get(machine: SystemdMachine, user: str, path: str, method: str = "GET") -> tuple[int, str]:
    """The status code, and the body."""
    code = (
        "import sys, urllib.error, urllib.request as r\n"
        "asked = r.Request('http://127.0.0.1:6004' + sys.argv[1], method=sys.argv[2])\n"
        "try:\n    a = r.urlopen(asked)\n    print(a.status, a.read().decode())\n"
        "except urllib.error.HTTPError as e:\n    print(e.code)\n"
    )
    done = machine.exec("python3", "-c", code, path, method, user=user)
    status, _, body = done.stdout.partition(" ")
    return int(status), body


# --- a user without rights ----------------------------------------------------------------------


def test_a_plain_user_sees_the_state_over_http_and_no_secret(machine: SystemdMachine) -> None:
    assert "unprobed" in machine.exec("mic-supervisor", "status", user="alice").stdout
    for path in ("/", "/api/v1/status", "/api/v1/plan", "/metrics"):
        status, body = get(machine, "alice", path)
        assert status == 200, path
        assert body, path
        assert "s3cret" not in body, path


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_a_plain_user_changes_nothing_over_http(machine: SystemdMachine, method: str) -> None:
    for path in ("/", "/api/v1/status", "/api/v1/plan"):
        assert get(machine, "alice", path, method)[0] == 405


@pytest.mark.parametrize(
    "command",
    [
        "apply",
        "reload",
        "restart a",
        "retry a",
        "pause a",
        "resume a",
        "stop --gpu 0",
        "start a --gpu 1",
    ],
)
def test_a_plain_user_orders_nothing(machine: SystemdMachine, command: str) -> None:
    before = instance(machine)
    done = machine.exec("mic-supervisor", *command.split(), user="alice", rc=None)
    assert done.rc != 0, done
    assert "ermission denied" in done.stderr, done
    assert instance(machine) == before


@pytest.mark.parametrize("path", ["/var/lib/mic/default/spec.key", "/var/lib/mic"])
def test_a_plain_user_reads_no_state(machine: SystemdMachine, path: str) -> None:
    done = machine.exec("cp", "-r", path, "/tmp/copy", user="alice", rc=1)
    assert "ermission denied" in done.stderr


def test_a_plain_user_does_not_reach_the_socket(machine: SystemdMachine) -> None:
    code = "import socket; socket.socket(socket.AF_UNIX).connect('/run/mic/mic.sock')"
    done = machine.exec("python3", "-c", code, user="alice", rc=1)
    assert "Permission denied" in done.stderr


@pytest.mark.parametrize("user", ["alice", "bob"])
def test_nobody_but_root_writes_where_root_reads(machine: SystemdMachine, user: str) -> None:
    for path in ("/etc/mic", "/run/mic", "/var/lib/mic", "/etc/systemd/system"):
        done = machine.exec("touch", f"{path}/new", user=user, rc=1)
        assert "ermission denied" in done.stderr
    done = machine.exec("sh", "-c", "echo >> /etc/mic/gpus.yaml", user=user, rc=2)
    assert "ermission denied" in done.stderr


@pytest.mark.parametrize("user", ["alice", "bob"])
def test_nobody_but_root_ends_a_process_through_it(machine: SystemdMachine, user: str) -> None:
    pid = instance(machine)
    refused = machine.exec("mic-supervisor", "kill", "--yes", "--force", pid, user=user, rc=77)
    assert refused.stderr.startswith("error: cannot find out what is ours: ")
    assert instance(machine) == pid


# --- a member of group mic ----------------------------------------------------------------------


def test_a_member_looks_and_orders_what_the_file_allows(machine: SystemdMachine) -> None:
    before = instance(machine)
    for command in ("status", "plan", "history", "logs a", "apply", "reload"):
        machine.exec("mic-supervisor", *command.split(), user="bob")
    assert instance(machine) == before
    machine.exec("mic-supervisor", "pause", "a", user="bob")
    assert "paused" in machine.exec("mic-supervisor", "status", rc=3).stdout
    machine.exec("mic-supervisor", "resume", "a", user="bob")
    machine.exec("mic-supervisor", "restart", "a", user="bob")
    assert instance(machine) != before


def test_a_member_has_it_run_no_other_file(machine: SystemdMachine) -> None:
    """Neither one that is named, nor one that a request names, nor a definition in a request."""
    before = instance(machine)
    machine.write("/home/bob/gpus.yaml", OTHER)
    done = machine.exec(
        *("mic-supervisor", "apply"),
        user="bob",
        rc=None,
        env={"MIC_CONFIG": "/home/bob/gpus.yaml"},
    )
    assert done.rc != 0, done
    for params in (
        {"path": "/home/bob/gpus.yaml"},
        {"config": OTHER, "text": OTHER, "models": {"a": {"command": ["/usr/bin/id"]}}},
    ):
        asked = json.dumps({"version": 1, "method": "apply", "params": params})
        code = (
            "import socket, sys\ns = socket.socket(socket.AF_UNIX)\n"
            "s.connect('/run/mic/mic.sock')\ns.sendall(sys.argv[1].encode() + b'\\n')\n"
            "print(s.makefile().read())"
        )
        machine.exec("python3", "-c", code, asked, user="bob")
    assert instance(machine) == before


def test_a_member_reads_no_secret(machine: SystemdMachine) -> None:
    for command in ("status --json", "plan --json", "history --json", "export a"):
        done = machine.exec("mic-supervisor", *command.split(), user="bob", rc=None)
        assert "s3cret" not in done.stdout + done.stderr, command
    machine.exec("cat", "/var/lib/mic/default/spec.key", user="bob", rc=1)


def test_a_member_writes_no_file_by_start_and_stop(machine: SystemdMachine) -> None:
    before = machine.exec("cat", "/etc/mic/gpus.yaml").stdout
    for command in ("stop a", "start a 1"):
        done = machine.exec("mic-supervisor", *command.split(), user="bob", rc=None)
        assert done.rc != 0, done
    assert machine.exec("cat", "/etc/mic/gpus.yaml").stdout == before


# --- a container with the socket mounted --------------------------------------------------------

ASK = """
import json, socket, sys
s = socket.socket(socket.AF_UNIX)
try:
    s.connect("/run/mic/mic.sock")
except PermissionError:
    sys.exit("permission denied")
s.sendall(json.dumps({"version": 1, "method": sys.argv[1], "params": {}}).encode() + b"\\n")
print("result" in json.loads(s.makefile().read().splitlines()[-1]))
"""


@pytest.fixture
def world(engine: docker.APIClient, python_image: str) -> Iterator[DaemonWorld]:
    """A daemon whose socket has a group, as where there is a group mic."""
    with tempfile.TemporaryDirectory(prefix="mic-who-") as home:
        Path(home).chmod(0o755)
        with daemon_world(Path(home), engine, gpus=1) as made:
            made.write({0: "p"}, p=process())
            made.mic.run(http=False)
            made.mic.socket.chmod(0o660)
            yield made


GROUP = 54242


@pytest.mark.parametrize(
    ("user", "groups", "allowed"),
    [
        pytest.param("0:0", [], True, id="root"),
        pytest.param("1000:1000", [], False, id="another user"),
        pytest.param("1000:1000", [str(GROUP)], True, id="another user in its group"),
    ],
)
@pytest.mark.parametrize("method", ["status", "reload"])
def test_a_container_with_the_socket_is_who_it_runs_as(
    world: DaemonWorld,
    engine: docker.APIClient,
    python_image: str,
    user: str,
    groups: list[str],
    allowed: bool,
    method: str,
) -> None:
    os.chown(world.mic.socket, -1, GROUP)
    config = engine.create_host_config(
        binds={str(world.mic.run_dir): {"bind": "/run/mic", "mode": "ro"}},
        group_add=groups,
        network_mode="none",
    )
    made = engine.create_container(
        python_image,
        ["python3", "-c", ASK, method],
        user=user,
        host_config=config,
        labels={"io.mic.scope": world.mic.scope},
    )["Id"]
    engine.start(made)
    ended = engine.wait(made, timeout=60)["StatusCode"]
    said = engine.logs(made).decode()
    assert (ended, said) == ((0, "True\n") if allowed else (1, "permission denied\n"))
