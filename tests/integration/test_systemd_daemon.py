"""The daemon as mic.service, with units and containers: edits, failures, restarts, an upgrade."""

from __future__ import annotations

import json
import re
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import pytest

from tests.integration.engine_proxy import engine_socket
from tests.support import scopes, systemd, wheel
from tests.support.systemd import SITE, SystemdMachine
from tests.support.waiting import until

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
CONFIG = "/etc/mic/gpus.yaml"
DROP_IN = "/etc/systemd/system/mic.service.d/test.conf"
ENV = """\
MIC_GPU_SOURCE=simulated:4
MIC_SCOPE={scope}
MIC_RESYNC=1s
"""
GPUS = """\
version: 1
models:
  web:
    backend: process
    command: [/usr/bin/python3, -m, http.server, --bind, 127.0.0.1, "${port}"]
    probe: {http: /, period: 500ms}
  idle: {backend: process, command: [/bin/sleep, infinity], env: {A: b}}
  box:  {backend: container, image: "mic-test/busybox:1", command: [sleep, "100000"]}
gpus:
  0: web
  1: idle
  2: box
  3: none
"""
WEB, IDLE, BOX, MORE = "web-51000000", "idle-51000001", "box-51000002", "idle-51000003"

Mark = tuple[str, ...]


@dataclass
class Service:
    """mic.service on a machine of its own, with this machine's engine."""

    machine: SystemdMachine
    engine: docker.APIClient
    scope: str

    def write(self, text: str) -> None:
        """As an editor does: beside it, and then in its place."""
        self.machine.write(f"{CONFIG}.new", text)
        self.machine.exec("mv", f"{CONFIG}.new", CONFIG)

    def systemctl(self, *words: str, rc: int | None = 0) -> Any:
        return self.machine.exec("systemctl", *words, rc=rc, timeout=120)

    def status(self) -> dict[str, Any]:
        done = self.machine.exec("mic-supervisor", "status", "--json", rc=None)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def converged(self, *names: str, timeout: float = 40.0) -> None:
        rows: list[Any] = []

        def look() -> bool:
            rows[:] = self.status()["instances"]
            return sorted(row["id"] for row in rows) == sorted(names) and all(
                row["as_desired"] for row in rows
            )

        try:
            until(look, f"{names} to be settled", timeout=timeout, period=0.2)
        except AssertionError as error:
            seen = [(row["id"], row["phase"], row["reason"]) for row in rows]
            raise AssertionError(f"{error}\n{seen}\n{self.machine.journal('mic')}") from None

    @property
    def pid(self) -> str:
        return self.machine.show("mic", "MainPID")

    def marks(self) -> dict[str, Mark]:
        """Every run, by instance: another one has another mark."""
        found: dict[str, Mark] = {}
        listed = self.machine.exec(
            *("systemctl", "show", "-p", "Id,MainPID,ExecMainStartTimestampMonotonic,SubState"),
            *("--", f"mic-{self.scope}-*"),
        ).stdout
        for block in listed.strip().split("\n\n"):
            values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
            if values.get("SubState") == "running":
                name = values["Id"].removeprefix(f"mic-{self.scope}-").rsplit("-", 1)[0]
                found[name] = (values["MainPID"], values["ExecMainStartTimestampMonotonic"])
        for item in scopes.containers(self.engine, self.scope):
            instance = item["Labels"].get("io.mic.instance")
            if instance is not None and item["State"] == "running":
                assert instance not in found, f"{instance} runs twice"
                looked = self.engine.inspect_container(item["Id"])["State"]
                found[instance] = (item["Id"], looked["StartedAt"], str(looked["Pid"]))
        return found

    def kill(self, signal: str, pid: str) -> None:
        self.machine.sh(f"kill -{signal} {pid}")

    def await_daemon(self, but: str) -> None:
        """Another daemon than `but`, that has said that it is ready."""

        def ready() -> bool:
            running = self.machine.show("mic", "SubState") == "running"
            return running and self.pid not in ("0", but)

        until(ready, "the daemon to be back")

    def drop_in(self, text: str) -> None:
        self.machine.write(DROP_IN, text)
        self.systemctl("daemon-reload")


@pytest.fixture(scope="module")
def booted(engine: docker.APIClient, systemd_image: str, busybox_image: str) -> Iterator[Service]:
    scope, path = scopes.new_scope(), engine_socket()
    assert path is not None, "the engine is not reached through a unix socket"
    with systemd.machine(engine, scope, docker_socket=path) as machine:
        machine.install()
        machine.boot()
        machine.write("/etc/mic/mic.env", ENV.format(scope=scope))
        machine.write(CONFIG, GPUS)
        made = Service(machine, engine, scope)
        yield made
        with suppress(AssertionError):
            machine.exec("systemctl", "stop", "mic", timeout=60)
    scopes.remove_containers(engine, scope)


@pytest.fixture
def service(booted: Service) -> Iterator[Service]:
    """The service up, and what GPUS names running. A test that fails leaves its journal."""
    booted.write(GPUS)
    booted.machine.write("/etc/mic/mic.env", ENV.format(scope=booted.scope))
    if booted.machine.exec("test", "-e", DROP_IN, rc=None).rc == 0:
        booted.machine.exec("rm", "-r", DROP_IN)
        booted.systemctl("daemon-reload")
        booted.systemctl("restart", "mic")
    booted.systemctl("start", "mic")
    booted.systemctl("reload", "mic")
    booted.converged(WEB, IDLE, BOX)
    yield booted


def test_an_edit_and_a_reload(service: Service) -> None:
    before = service.marks()
    assert sorted(before) == sorted([WEB, IDLE, BOX])
    service.write(GPUS.replace("3: none", "3: idle"))
    service.systemctl("reload", "mic")
    service.converged(WEB, IDLE, BOX, MORE)
    after = service.marks()
    assert {name: after[name] for name in before} == before
    service.write(GPUS.replace("  2: box\n", ""))
    time.sleep(1)  # the watcher alone removes nothing
    assert BOX in service.marks()
    service.systemctl("reload", "mic")
    service.converged(WEB, IDLE)
    assert sorted(service.marks()) == sorted([WEB, IDLE])


def test_a_broken_file(service: Service) -> None:
    before, generation = service.marks(), service.status()["config"]["generation"]
    service.write(GPUS.replace("2: box", "2: bax"))
    done = service.systemctl("reload", "mic", rc=None)
    assert done.rc != 0
    assert service.machine.show("mic", "ActiveState") == "active"
    place = f"{CONFIG}:12:6: error: gpus.2: "
    said = service.machine.journal("mic")
    assert place in said
    assert "bax" not in said  # what stands there is for who may read the file
    assert f"generation {generation} keeps running" in said
    shown = service.systemctl("status", "mic").stdout
    [status] = [line for line in shown.splitlines() if line.strip().startswith("Status:")]
    assert f"3/3 ready; config generation {generation}; the file has errors" in status
    assert place in status
    assert service.marks() == before
    # It is this file's fault alone: a crash is mended, and a restart of the daemon keeps all.
    service.kill("KILL", before[IDLE][0])
    until(lambda: service.marks().get(IDLE, before[IDLE]) != before[IDLE], "it to be back")
    before = service.marks()
    service.systemctl("restart", "mic")
    service.converged(WEB, IDLE, BOX)
    assert service.marks() == before
    assert service.status()["config"]["generation"] == generation
    service.write(GPUS)
    service.systemctl("reload", "mic")
    assert service.marks() == before


def test_with_the_setting_a_save_only_shows_what_would_change(service: Service) -> None:
    before, env = service.marks(), ENV.format(scope=service.scope)
    service.machine.write("/etc/mic/mic.env", f"{env}MIC_WATCH=plan\n")
    service.systemctl("restart", "mic")
    service.write(GPUS.replace("3: none", "3: idle"))
    wanted = f"{CONFIG} is not applied yet (MIC_WATCH=plan); it would create {MORE}"
    for restart in (False, True):  # over a restart, too
        if restart:
            service.systemctl("restart", "mic")
        until(lambda: wanted in service.systemctl("status", "mic").stdout, wanted)
        assert service.marks() == before
    service.systemctl("reload", "mic")
    service.converged(WEB, IDLE, BOX, MORE)
    after = service.marks()
    assert {name: after[name] for name in before} == before
    service.machine.write("/etc/mic/mic.env", env)
    service.systemctl("restart", "mic")


def test_stops_restarts_and_kills_cost_no_instance(service: Service) -> None:
    before = service.marks()
    service.systemctl("restart", "mic")
    assert service.marks() == before
    service.systemctl("stop", "mic")
    assert service.marks() == before
    service.systemctl("start", "mic")
    service.converged(WEB, IDLE, BOX)
    for _ in range(3):
        pid = service.pid
        service.kill("KILL", pid)
        service.await_daemon(but=pid)
    service.converged(WEB, IDLE, BOX)
    assert service.marks() == before


def test_a_daemon_that_hangs_is_started_anew(service: Service) -> None:
    before = service.marks()
    service.drop_in("[Service]\nWatchdogSec=4s\n")
    service.systemctl("restart", "mic")
    pid = service.pid
    service.kill("STOP", pid)
    service.await_daemon(but=pid)
    service.converged(WEB, IDLE, BOX)
    assert service.marks() == before
    assert "Watchdog timeout" in service.machine.journal("mic")
    # And one that does not hang is let be.
    pid = service.pid
    time.sleep(8)  # two times the watchdog's
    assert service.pid == pid


def test_with_the_setting_a_stop_stops_all(service: Service) -> None:
    service.machine.write(
        "/etc/mic/mic.env", ENV.format(scope=service.scope) + "MIC_ON_STOP=stop\n"
    )
    service.systemctl("restart", "mic")
    before = service.marks()
    assert sorted(before) == sorted([WEB, IDLE, BOX])
    service.systemctl("stop", "mic")
    assert service.machine.show("mic", "Result") == "success"
    assert service.marks() == {}
    service.systemctl("start", "mic")
    service.converged(WEB, IDLE, BOX)
    service.machine.write("/etc/mic/mic.env", ENV.format(scope=service.scope))
    service.systemctl("kill", "--kill-whom=main", "--signal=KILL", "mic")
    service.converged(WEB, IDLE, BOX)


def test_d_bus_gone_and_back(service: Service) -> None:
    before = service.marks()
    service.systemctl("stop", "dbus.socket", "dbus.service", rc=None)
    try:

        def troubled() -> bool:
            return bool(service.status()["unreadable"])

        until(troubled, "systemd to be unreadable")
        shown = service.status()
        by_id = {row["id"]: row for row in shown["instances"]}
        assert by_id[BOX]["phase"] == "unprobed"  # it is Docker's, and does not care
        assert by_id[IDLE]["phase"] != "unprobed"
        time.sleep(2)
    finally:
        service.systemctl("start", "dbus.socket", "dbus.service")
    service.converged(WEB, IDLE, BOX)
    assert service.marks() == before
    service.write(GPUS.replace("3: none", "3: idle"))
    service.systemctl("reload", "mic")
    service.converged(WEB, IDLE, BOX, MORE)


def test_history_tells_the_story(service: Service) -> None:
    service.write(GPUS.replace("3: none", "3: idle"))
    service.systemctl("reload", "mic")
    service.converged(WEB, IDLE, BOX, MORE)
    first = service.marks()[MORE]
    service.kill("KILL", first[0])
    until(lambda: service.marks().get(MORE, first) != first, "a restart")
    service.converged(WEB, IDLE, BOX, MORE)
    [row] = [row for row in service.status()["instances"] if row["id"] == MORE]
    assert row["restarts"] == 1, service.machine.exec("mic-supervisor", "history").stdout
    service.write(GPUS)
    service.systemctl("reload", "mic")
    service.converged(WEB, IDLE, BOX)
    shown = service.machine.exec("mic-supervisor", "history").stdout.splitlines()
    times = [line[:19] for line in shown]
    assert times == sorted(times)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", at) for at in times)
    story = [line[21:] for line in shown if MORE in line or " configuration: " in line]
    wanted = [
        r"configuration: generation \d+ accepted \(.+\)(, by root)?",
        rf"{MORE}: create begins: nothing runs for it yet",
        rf"{MORE}: create done \(\d+\.\d s\): nothing runs for it yet",
        rf"{MORE}: start(ing)? .*(SIGKILL|137).*|{MORE}: start begins: .*SIGKILL.*",
        rf"{MORE}: start done \(\d+\.\d s\): .*",
        r"configuration: generation \d+ accepted \(.+\)(, by root)?",
        rf"{MORE}: remove begins: the file keeps its GPU empty",
        rf"{MORE}: remove done \(\d+\.\d s\): the file keeps its GPU empty",
    ]
    place = next(i for i, line in reversed([*enumerate(story)]) if re.fullmatch(wanted[1], line))
    rest = iter(story[place - 3 :])
    for pattern in wanted:
        assert any(re.fullmatch(pattern, line) for line in rest), f"{pattern} in\n" + "\n".join(
            story
        )


def test_an_upgrade_that_knows_more_fields(service: Service) -> None:
    before = service.marks()
    path = f"{SITE}/mic_supervisor/workloads.py"
    old = service.machine.exec("cat", path).stdout
    new = old
    for name in ("ContainerSpec", "ProcessSpec"):
        head, _, rest = new.partition(f"class {name}:")
        # The last field of the class, and one more after it, with a default.
        body, sep, tail = rest.partition("\n\n\n")
        new = f"{head}class {name}:{body}\n    colour: str = 'blue'{sep}{tail}"
    with zipfile.ZipFile(wheel.build()) as archive:
        assert archive.read("mic_supervisor/workloads.py").decode() == old
    service.machine.write(path, new)
    try:
        asked = "from mic_supervisor.model import *; print(ContainerSpec('i').colour)"
        python = ("/opt/mic/bin/python3", "-c", asked)
        assert service.machine.exec(*python).stdout == "blue\n"
        service.systemctl("restart", "mic")
        service.converged(WEB, IDLE, BOX)
        assert service.machine.exec("mic-supervisor", "plan").stdout == "No changes.\n"
        assert service.marks() == before
        # What is made now knows it, and goes back to the old version without a restart, too.
        service.write(GPUS.replace("3: none", "3: idle"))
        service.systemctl("reload", "mic")
        service.converged(WEB, IDLE, BOX, MORE)
        before = service.marks()
    finally:
        service.machine.write(path, old)
    service.systemctl("restart", "mic")
    service.converged(WEB, IDLE, BOX, MORE)
    assert service.marks() == before


def test_a_unit_holds_a_claim(service: Service) -> None:
    """examples/claim.service as it is, but for the model."""
    service.write(GPUS.replace("3: none", "3: fleet"))
    text = (ROOT / "examples" / "claim.service").read_text()
    text = text.replace("claim MAM", "claim idle")
    service.machine.write("/etc/systemd/system/claim-idle.service", text)
    service.systemctl("daemon-reload")
    service.systemctl("start", "claim-idle")
    before = service.marks()
    assert MORE in before
    check = "mic-supervisor claim --check --ready-file /run/claim-idle/ready.json"
    service.machine.sh(check)
    status = service.machine.show("claim-idle", "StatusText")
    assert "it has no probe" in status
    (claim,) = service.status()["claims"]
    assert (claim["holder"], claim["state"]) == ("claim-idle.service", "ready")

    service.systemctl("restart", "mic")
    service.machine.sh(check)
    service.converged(WEB, IDLE, BOX, MORE)
    assert service.marks() == before

    service.systemctl("stop", "claim-idle")
    assert service.marks() == {name: before[name] for name in (WEB, IDLE, BOX)}
    assert service.machine.show("claim-idle", "Result") == "success"

    broken = text.replace("claim idle", "claim nosuch")
    service.machine.write("/etc/systemd/system/claim-idle.service", broken)
    service.systemctl("daemon-reload")
    service.systemctl("start", "claim-idle", rc=1)
    assert service.machine.show("claim-idle", "ExecMainStatus") == "78"
    assert service.machine.show("claim-idle", "SubState") == "failed"


def test_a_reboot_brings_all_back_by_itself(service: Service) -> None:
    """Last: the machine comes up with nothing but what is on its disk."""
    service.systemctl("enable", "mic")
    before = service.marks()
    service.machine.cut_power()
    service.engine.kill(before[BOX][0])  # on one machine, the power is off for both
    service.machine.boot()
    service.converged(WEB, IDLE, BOX)
    after = service.marks()
    assert sorted(after) == sorted(before)
    assert after[BOX][0] == before[BOX][0]  # the same container, started again
    assert after[BOX] != before[BOX]
    # With a broken file it would be the last good one.
    service.write("version: 1\ngpus: [")
    service.machine.reboot()
    service.converged(WEB, IDLE, BOX)
    assert CONFIG in service.status()["config"]["error"]
