"""doctor, init and kill where systemd is PID 1."""

from __future__ import annotations

import pytest

from tests.support.systemd import SystemdMachine
from tests.support.waiting import until

pytestmark = pytest.mark.engine

SETTINGS = "MIC_GPU_SOURCE=simulated:2\nMIC_DOCKER_HOST=none\n"


def findings(machine: SystemdMachine, rc: int) -> dict[str, list[str]]:
    """Lines by their subject, without it."""
    found: dict[str, list[str]] = {}
    for line in machine.exec("mic-supervisor", "doctor", rc=rc).stdout.splitlines():
        level, _, rest = line.partition("  ")
        subject, _, text = rest.strip().partition(": ")
        found.setdefault(subject, []).append(f"{level.strip()}: {text}")
    return found


def test_from_a_fresh_machine_to_one_that_runs(systemd_machine: SystemdMachine) -> None:
    machine = systemd_machine
    machine.write("/etc/mic/mic.env", SETTINGS)
    fresh = findings(machine, rc=1)
    assert fresh["config"] == [
        "fail: /etc/mic/gpus.yaml does not exist; fix: write a first one with: mic-supervisor init"
    ]
    assert fresh["systemd"][0].startswith("ok: systemd 252 (")
    assert fresh["mic.service"] == [
        "warn: is inactive; fix: start it with: systemctl start mic",
        "warn: is disabled: it does not come back after a boot; "
        "fix: enable it with: systemctl enable mic",
    ]
    assert fresh["daemon"] == [
        "warn: none listens at /run/mic/mic.sock; fix: start it with: systemctl start mic"
    ]

    machine.exec("mic-supervisor", "init")
    machine.exec("systemctl", "enable", "--now", "mic")
    # It serves HTTP a moment after it has told systemd that it is ready.
    until(lambda: "serving HTTP" in machine.journal("mic"), "the daemon")
    running = findings(machine, rc=0)
    assert running["config"] == [
        "ok: /etc/mic/gpus.yaml is valid: 2 GPUs, 2 of them kept empty; 0 models"
    ]
    assert running["mic.service"] == ["ok: runs"]
    assert running["daemon"][0].startswith("ok: answers at /run/mic/mic.sock; ")
    assert running["http"] == ["ok: the daemon answers at 127.0.0.1:6004"]
    assert [line.partition(":")[0] for line in (*running["state"], *running["run"])] == ["ok", "ok"]

    pid = machine.show("mic.service", "MainPID")
    refused = machine.exec("mic-supervisor", "kill", "--yes", "--force", pid, rc=1)
    assert refused.stderr == (
        f"error: cannot kill {pid}: it is the supervisor of scope default (mic-supervisor run)\n"
        "hint: stop it with: systemctl stop mic\n"
    )


def test_a_plain_user_is_told_what_only_root_may_know(systemd_machine: SystemdMachine) -> None:
    """After the first test: a daemon runs, and keeps its state to itself."""
    machine = systemd_machine
    asked = machine.exec("mic-supervisor", "doctor", user="alice", rc=1)
    assert asked.stderr == ""
    assert "cannot be checked" not in asked.stdout
    assert "fail  state: cannot write to /var/lib/mic; fix: run as root" in asked.stdout
    assert (
        "fail  daemon: cannot talk to the daemon at /run/mic/mic.sock: permission denied; "
        "fix: run as root, or add yourself to the group mic\n"
    ) in asked.stdout
    pid = machine.show("mic.service", "MainPID")
    refused = machine.exec("mic-supervisor", "kill", "--yes", pid, user="alice", rc=77)
    assert refused.stderr == (
        "error: cannot find out what is ours: cannot read /var/lib/mic/default/spec.key: "
        "Permission denied\nhint: run as root\n"
    )
    written = machine.exec("mic-supervisor", "init", "--output=/root/x.yaml", user="alice", rc=1)
    assert written.stderr == (
        "error: cannot write /root/x.yaml: Permission denied\n"
        "hint: run as root, or name another file with --output\n"
    )


def test_a_process_of_a_unit_says_whose_it_is(systemd_machine: SystemdMachine) -> None:
    machine = systemd_machine
    machine.write("/etc/mic/mic.env", SETTINGS)
    machine.exec("systemd-run", "--unit=jupyter", "--property=Restart=no", "sleep", "1000")
    pid = machine.show("jupyter.service", "MainPID")
    asked = machine.exec("mic-supervisor", "kill", "--force", pid, rc=1)
    assert asked.stdout.endswith(", of unit jupyter.service: its manager may start it again\n")
    assert "say --yes" in asked.stderr
    assert machine.show("jupyter.service", "ActiveState") == "active"
    machine.exec("mic-supervisor", "kill", "--force", "--yes", pid)
    until(lambda: machine.show("jupyter.service", "ActiveState") != "active", "its end")


def test_install_and_uninstall(systemd_machine: SystemdMachine) -> None:
    machine = systemd_machine
    machine.sh("systemctl disable --now mic; rm /etc/systemd/system/mic.service")
    unit = "/usr/local/lib/systemd/system/mic.service"
    said = machine.exec("mic-supervisor", "install").stdout
    assert said.startswith(f"writes {unit}\n")
    machine.sh("systemd-sysusers && systemctl daemon-reload && systemctl enable --now mic")
    assert machine.show("mic", "FragmentPath") == unit
    assert machine.sh("stat -c '%a %G' /run/mic/mic.sock").stdout == "660 mic\n"
    found = findings(machine, rc=0)
    assert found["program"] == ["ok: /usr/bin/mic-supervisor, version 0.1.0"]
    assert found["schema"] == ["ok: /usr/local/share/mic/gpus.schema.json is that of this version"]
    assert found["group mic"] == ["ok: its members may use the daemon's socket: nobody"]
    assert found["mic.service"] == ["ok: runs"]
    refused = machine.exec("mic-supervisor", "uninstall", rc=1)
    assert refused.stderr == (
        f"error: cannot remove {unit}: the daemon runs, or starts with the machine\n"
        "hint: first: systemctl disable --now mic, which stops no instance\n"
    )
    machine.exec("systemctl", "disable", "--now", "mic")
    machine.exec("mic-supervisor", "uninstall")
    assert machine.sh("find /usr/local -type f").stdout == ""
