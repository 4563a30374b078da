"""mic.service on a machine that systemd runs: how tight it is, what it can do, how it lives."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.setup.steps import CHECKOUT
from tests.support.systemd import NO_ENGINE, SystemdMachine
from tests.support.waiting import until

pytestmark = pytest.mark.engine

CONFINED = Path(__file__).parent / "systemd" / "confined.py"
RESTARTS = int(os.environ.get("RESTARTS", "10"))  # raise it to look longer
# Makes the loop go round without a pause: a cancellation that gets lost does so as a wait ends.
WAKER = """
import socket
while True:
    with socket.socket(socket.AF_UNIX) as daemon:
        try:
            daemon.settimeout(1)
            daemon.connect("/run/mic/mic.sock")
            daemon.sendall(b'{"version": 1, "method": "retry", "params": {"name": "web"}}\\n')
            while daemon.recv(65536):
                pass
        except OSError:
            pass
"""
HOOK = CHECKOUT / "examples" / "endpoints-changed"
DROP_IN = "/etc/systemd/system/mic.service.d"

GPUS = """\
version: 1
models:
  web:
    backend: process
    command: [/usr/bin/python3, -m, http.server, --bind, 127.0.0.1, "${port}"]
gpus:
  0: web
  1: web
"""


@pytest.fixture(autouse=True)
def clean(systemd_machine: SystemdMachine) -> Iterator[None]:
    yield
    systemd_machine.sh(
        f"systemctl stop mic; systemctl stop 'mic-*.service'; systemctl reset-failed;"
        f"rm -rf {DROP_IN} /etc/mic /var/lib/mic /run/mic; systemctl daemon-reload",
    )


def test_systemd_finds_nothing_wrong_with_it(systemd_machine: SystemdMachine) -> None:
    done = systemd_machine.exec("systemd-analyze", "verify", "/etc/systemd/system/mic.service")
    assert (done.stdout, done.stderr) == ("", "")


def test_its_exposure_is_what_it_says(systemd_machine: SystemdMachine) -> None:
    asked = systemd_machine.exec(
        *("systemd-analyze", "security", "--no-pager", "--offline=true"),
        "/etc/systemd/system/mic.service",
    ).stdout
    found = re.search(r"Overall exposure level for mic.service: ([0-9.]+)", asked)
    assert found is not None, asked
    assert float(found[1]) <= 2.5
    unit = systemd_machine.exec("cat", "/etc/systemd/system/mic.service").stdout
    assert f"gives it {found[1]}, of 10" in unit


def test_it_can_do_its_work_and_nothing_else(systemd_machine: SystemdMachine) -> None:
    machine = systemd_machine
    machine.sh(
        "groupadd --force --gid 4242 mic; chmod 0700 /home/alice; mkdir -p /home/alice/bin;"
        "printf '#!/bin/sh\\necho up\\nexec sleep $1\\n' > /home/alice/bin/serve;"
        "chmod 0700 /home/alice/bin /home/alice/bin/serve;"
        "echo KEY=1 > /home/alice/secret.env; chmod 0600 /home/alice/secret.env;"
        "chown -R alice: /home/alice; echo template > /tmp/template.txt"
    )
    # Open to root alone, as Docker's socket is.
    server = (
        "import os, socket; os.umask(0o117); s = socket.socket(socket.AF_UNIX);"
        "s.bind('/run/docker-like.sock'); s.listen(); s.accept()[0].send(b'hello')"
    )
    machine.exec("systemd-run", "--quiet", "--unit=docker-like", "python3", "-c", server)
    machine.exec("systemd-run", "--quiet", "--uid=bob", "--unit=victim", "sleep", "300")
    until(lambda: machine.exec("test", "-S", "/run/docker-like.sock", rc=None).rc == 0, "a socket")
    victim = machine.show("victim.service", "MainPID")
    machine.write("/opt/confined.py", CONFINED.read_text())
    machine.write(
        f"{DROP_IN}/confined.conf",
        "[Service]\nType=oneshot\nRestart=no\nWatchdogSec=0\nExecStart=\n"
        f"Environment=VICTIM={victim}\nExecStart=/opt/mic/bin/python3 /opt/confined.py\n",
    )
    machine.exec("systemctl", "daemon-reload")
    done = machine.exec("systemctl", "start", "mic", rc=None)
    said = machine.journal("mic.service")
    assert done.rc == 0, said
    [line] = [line for line in said.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(line)
    read_only, forbidden = "Read-only file system", "Operation not permitted"
    assert found == {
        "read a secret in a home": "KEY=1\n",
        "read in /tmp": "template\n",
        "write the state": "written",
        "write the runtime directory": "written",
        "write in /etc": read_only,
        "write in /usr": read_only,
        "write in a home": read_only,
        "reach a socket like Docker's": "hello",
        "listen": "6004 is seen of 6004",
        "ask whose a socket is": True,
        "have a home": "None, then /root",
        "give the socket to its group": forbidden,
        "see PID 1": None,
        "name PID 1": "systemd",
        "check a program of another user": None,
        "become another user": forbidden,
        "open a raw socket": "Address family not supported by protocol",
        "make a device": forbidden,
        "kill another's process": forbidden,
        "set the time": forbidden,
        "mount": 32,
        "run a unit": ["running", True, [0, "alice"], ["up"], 143, 0],
    }
    assert machine.show("victim.service", "ActiveState") == "active"
    machine.sh("systemctl stop victim; groupdel mic")


# --- the hook, and nginx ----------------------------------------------------------------------

SERVED = """\
version: 1
hooks: {on_endpoints_change: [/etc/mic/endpoints-changed], settle: 500ms}
models:
  web:
    backend: process
    command: [/usr/bin/python3, -m, http.server, --bind, 127.0.0.1, "${port}"]
    probe: {http: /, period: 500ms}
gpus: {0: web, 1: web}
"""
ELSEWHERE = "/etc/nginx/mic"


@pytest.mark.parametrize("place", ["/var/lib/mic", ELSEWHERE], ids=["as shipped", "drop-in"])
def test_the_hook_of_the_example_has_nginx_follow(
    systemd_machine: SystemdMachine, place: str
) -> None:
    machine = systemd_machine
    if place == ELSEWHERE:
        machine.sh(f"mkdir -p {ELSEWHERE}")
        machine.write(f"{DROP_IN}/proxy.conf", f"[Service]\nReadWritePaths={ELSEWHERE}\n")
        machine.exec("systemctl", "daemon-reload")
    machine.write("/etc/mic/mic.env", NO_ENGINE)
    machine.write("/etc/mic/gpus.yaml", SERVED)
    machine.write(
        "/etc/mic/endpoints-changed", HOOK.read_text().replace("/var/lib/mic", place), 0o755
    )
    machine.write(
        "/etc/nginx/conf.d/mic.conf",
        f"include {place}/upstreams*.conf;\n"
        "server { listen 127.0.0.1:8088; location / { proxy_pass http://mic_web; } }\n",
    )

    def status() -> dict[str, Any]:
        document: dict[str, Any] = json.loads(
            machine.exec("mic-supervisor", "status", "--json", rc=None).stdout
        )
        return document

    machine.exec("systemctl", "start", "mic")
    try:
        # Nobody is there to be told yet: that is said, and tried again.
        until(lambda: "nginx.service" in str(status()["warnings"]), "a warning", timeout=60)
        machine.exec("systemctl", "start", "nginx")
        until(lambda: not status()["warnings"], "the hook to work", timeout=60)

        def servers() -> int:
            return machine.exec("cat", f"{place}/upstreams.conf").stdout.count("max_fails=0")

        until(lambda: servers() == 2, "both to be told of")
        ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8088/').status)"
        until(lambda: machine.exec("python3", "-c", ask, rc=None).stdout == "200\n", "nginx")
        machine.write("/etc/mic/gpus.yaml", SERVED.replace("1: web", "1: none"))
        until(lambda: len(status()["instances"]) == 1, "one to be gone", timeout=60)
        assert servers() == 1
        assert machine.exec("python3", "-c", ask).stdout == "200\n"
        until(lambda: "remove done" in machine.journal("mic.service"), "its end")
        said = machine.journal("mic.service")
        begun, told, gone = (
            said.rindex(text)
            for text in (
                "remove: the file keeps its GPU empty",
                "on_endpoints_change got: web 1",
                "remove done",
            )
        )
        assert begun < told < gone, said
        assert "although on_endpoints_change failed" not in said
    finally:
        machine.sh(f"systemctl stop nginx; rm -rf {ELSEWHERE} /etc/nginx/conf.d/mic.conf")


# --- with the daemon itself -------------------------------------------------------------------


@pytest.fixture
def running(systemd_machine: SystemdMachine) -> SystemdMachine:
    """The machine with the daemon up, and an instance on each of two simulated GPUs."""
    machine = systemd_machine
    machine.write("/etc/mic/mic.env", NO_ENGINE)
    machine.write("/etc/mic/gpus.yaml", GPUS)
    machine.exec("systemctl", "start", "mic")
    until(lambda: len(pids(machine)) == 2, "two instances")
    return machine


def units(machine: SystemdMachine) -> list[str]:
    listed = machine.exec(
        *("systemctl", "list-units", "--plain", "--no-legend", "--state=running"),
        "mic-default-*",
    ).stdout
    return sorted(line.split()[0] for line in listed.splitlines())


def pids(machine: SystemdMachine) -> dict[str, str]:
    return {unit: machine.show(unit, "MainPID") for unit in units(machine)}


def await_daemon(machine: SystemdMachine, but: str = "0") -> str:
    """The daemon's PID, another one than `but`, once it has said that it is ready."""

    def ready() -> str:
        if machine.show("mic", "SubState") != "running":
            return ""
        found = machine.show("mic", "MainPID")
        return "" if found in (but, "0") else found

    return until(ready, "the daemon to be ready")


def test_instances_are_units_of_their_own(running: SystemdMachine) -> None:
    for unit, pid in pids(running).items():
        assert running.show(unit, "Slice") == "mic.slice"
        groups = running.exec("cat", f"/proc/{pid}/cgroup").stdout
        assert f"mic.slice/{unit}" in groups
        assert "system.slice/mic.service" not in groups


def test_the_socket_is_its_groups_where_there_is_one(running: SystemdMachine) -> None:
    assert running.sh("stat -c '%a %G' /run/mic/mic.sock").stdout == "660 root\n"
    running.sh("groupadd mic && systemctl restart mic")
    assert running.sh("stat -c '%a %G' /run/mic/mic.sock").stdout == "660 mic\n"
    running.sh("systemctl stop mic && groupdel mic && rm -r /run/mic && systemctl start mic")
    assert running.sh("stat -c '%a %G' /run/mic/mic.sock").stdout == "660 root\n"


def test_a_restart_costs_no_instance(running: SystemdMachine) -> None:
    before, daemon = pids(running), await_daemon(running)
    running.exec("systemctl", "restart", "mic")
    assert await_daemon(running, but=daemon) != daemon
    running.exec("mic-supervisor", "apply")
    assert pids(running) == before


def test_a_killed_daemon_is_back_at_once_and_costs_no_instance(running: SystemdMachine) -> None:
    before = pids(running)
    for _ in range(7):  # more than systemd's own limit of quick ends
        daemon = await_daemon(running)
        running.sh(f"kill -KILL {daemon}")
        await_daemon(running, but=daemon)
    running.exec("mic-supervisor", "apply")
    assert pids(running) == before


def test_no_restart_of_many_has_to_kill_it(running: SystemdMachine) -> None:
    """In its life and in its start. One SIGTERM that is lost would take 5 s, and a KILL."""
    before, heard = pids(running), len(running.journal("mic"))
    running.write(f"{DROP_IN}/quick.conf", "[Service]\nTimeoutStopSec=5s\n")
    running.exec("systemctl", "daemon-reload")
    running.exec("systemd-run", "--quiet", "--unit=waker", "python3", "-c", WAKER)
    running.exec(
        *("bash", "-c"),
        f"for turn in $(seq {RESTARTS}); do systemctl $([ $((turn % 2)) = 0 ] || echo --no-block)"
        " restart mic; sleep 0.$((RANDOM % 6)); done",
        timeout=60.0 + 7.0 * RESTARTS,
    )
    running.exec("systemctl", "stop", "waker")
    await_daemon(running)
    said = running.journal("mic")[heard:]
    assert not re.findall(r".*(?:timed out|code=killed|left behind|Traceback).*", said)
    assert said.count("Deactivated successfully") >= RESTARTS // 2  # those that came to be ready
    running.exec("mic-supervisor", "apply")
    assert pids(running) == before


def failed(machine: SystemdMachine) -> dict[str, str]:
    """What is shown of a daemon that could not be started, and is not started again."""
    machine.exec("systemctl", "start", "mic", rc=1)
    assert machine.show("mic", "ActiveState") == "failed"
    assert machine.show("mic", "NRestarts") == "0"
    program = ("/opt/mic/bin/python3", "-m", "mic_supervisor.cli")
    found = machine.exec(*program, "doctor", rc=1).stdout
    return {
        "systemctl": machine.exec("systemctl", "status", "mic", rc=3).stdout,
        "doctor": next(line for line in found.splitlines() if "  mic.service: " in line),
    }


def test_refused_settings_end_the_restarts_and_are_the_status(
    systemd_machine: SystemdMachine,
) -> None:
    systemd_machine.write("/etc/mic/mic.env", f"{NO_ENGINE}MIC_RESYNCS=1s\n")
    shown = failed(systemd_machine)
    assert "code=exited, status=78" in shown["systemctl"]
    assert re.search(r'Status: "cannot run: .*MIC_RESYNCS', shown["systemctl"]), shown
    assert "MIC_RESYNCS" in shown["doctor"]
    # Every other command refuses them as well.
    assert "MIC_RESYNCS" in systemd_machine.exec("mic-supervisor", "doctor", rc=1).stdout
    systemd_machine.write("/etc/mic/mic.env", NO_ENGINE)
    systemd_machine.exec("systemctl", "start", "mic")


def test_an_option_that_there_is_not_ends_the_restarts(systemd_machine: SystemdMachine) -> None:
    systemd_machine.write("/etc/mic/mic.env", NO_ENGINE)
    systemd_machine.write(
        f"{DROP_IN}/option.conf",
        "[Service]\nExecStart=\nExecStart=/usr/bin/mic-supervisor run --fast\n",
    )
    systemd_machine.exec("systemctl", "daemon-reload")
    assert "code=exited, status=64" in failed(systemd_machine)["systemctl"]


def test_a_program_that_is_not_there_ends_the_restarts(systemd_machine: SystemdMachine) -> None:
    machine = systemd_machine
    machine.write("/etc/mic/mic.env", NO_ENGINE)
    machine.exec("mv", "/usr/bin/mic-supervisor", "/root/")
    try:
        shown = failed(machine)
    finally:
        machine.exec("mv", "/root/mic-supervisor", "/usr/bin/")
    assert "status=203/EXEC" in shown["systemctl"]
    assert shown["doctor"] == (
        "fail  mic.service: starts /usr/bin/mic-supervisor, which is not there; "
        "fix: install it anew: mic-supervisor install"
    )
    machine.exec("systemctl", "start", "mic")


def test_what_a_restart_may_repair_is_tried_again_with_its_reason(
    systemd_machine: SystemdMachine,
) -> None:
    machine = systemd_machine
    machine.write("/etc/mic/mic.env", f"{NO_ENGINE}MIC_RUN_DIR=/var/lib/mic/late/run\n")
    machine.write("/var/lib/mic/late", "not yet a directory")
    machine.exec("systemctl", "start", "--no-block", "mic")
    until(lambda: int(machine.show("mic", "NRestarts")) > 3, "restarts")

    def reason() -> str:
        found = machine.exec("mic-supervisor", "doctor", rc=1).stdout
        return next((one for one in found.splitlines() if "does not stay up" in one), "")

    assert "/var/lib/mic/late" in until(reason, "its reason")
    machine.exec("rm", "/var/lib/mic/late")
    await_daemon(machine)


def test_it_answers_once_systemd_calls_it_started(running: SystemdMachine) -> None:
    ask = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:6004/healthz').status)"
    for _ in range(3):
        said = running.sh(f'systemctl restart mic && mic-supervisor status; python3 -c "{ask}"')
        assert "200" in said.stdout.split()


def test_a_stopped_daemon_leaves_its_instances(running: SystemdMachine) -> None:
    before = pids(running)
    running.exec("systemctl", "stop", "mic")
    assert pids(running) == before


def test_a_reload_takes_a_good_file_and_fails_for_a_bad_one(running: SystemdMachine) -> None:
    before = pids(running)
    running.write("/etc/mic/gpus.yaml", "gpus: [")
    done = running.exec("systemctl", "reload", "mic", rc=None)
    assert done.rc == 1
    assert running.show("mic", "ActiveState") == "active"
    assert "/etc/mic/gpus.yaml:1:" in running.journal("mic")
    assert pids(running) == before
    running.write("/etc/mic/gpus.yaml", GPUS.replace("1: web", "1: none"))
    running.exec("systemctl", "reload", "mic")
    until(lambda: len(units(running)) == 1, "one instance to go")
    [(unit, pid)] = pids(running).items()
    assert before[unit] == pid


def test_a_crashed_instance_is_started_again(running: SystemdMachine) -> None:
    before = pids(running)
    unit, pid = next(iter(before.items()))
    running.sh(f"kill -KILL {pid}")

    def back() -> bool:
        now = pids(running)
        return now.keys() == before.keys() and now[unit] != pid

    until(back, "the instance to be back")
    other = next(name for name in before if name != unit)
    assert pids(running)[other] == before[other]


def test_after_a_reboot_everything_runs_again(running: SystemdMachine) -> None:
    before = pids(running)
    running.exec("systemctl", "enable", "mic")
    running.reboot()
    until(lambda: units(running) == [*before], "both instances")
    running.exec("systemctl", "disable", "mic")
