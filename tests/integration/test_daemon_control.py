"""What is asked of a daemon: by commands, by two at once, by clients that make no sense."""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import docker
import pytest

from mic_supervisor.host import start_daemon
from tests.integration.daemon_world import (
    DaemonWorld,
    container,
    daemon_world,
    identity,
    process,
)
from tests.support.mic import PROGRAM, Result
from tests.support.require import program
from tests.support.waiting import until

pytestmark = pytest.mark.engine

P0, P1, C2 = identity("p", 0), identity("p", 1), identity("c", 2)
BASE: dict[int | str, str] = {0: "p", 1: "p", 2: "c", 3: "none"}

# Serves /health after DELAY seconds; busybox's own server.
SLOW = (
    '{{backend: container, image: "mic-test/busybox:1", command: [sh, -c, "sleep {delay}; '
    'mkdir -p /w; echo ok > /w/health; exec httpd -f -p ${{port}} -h /w"], '
    "probe: {{http: /health, period: 200ms}}, env: {{TURN: '{turn}'}}, stop_timeout: 1s}}"
)


TALKS = (
    '{backend: container, image: "mic-test/busybox:1", stop_timeout: 1s, '
    'command: [sh, -c, "echo one; echo two; exec sleep 100000"]}'
)


def slow(delay: float, turn: int = 0) -> str:
    return SLOW.format(delay=delay, turn=turn)


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, engine: docker.APIClient, busybox_image: str
) -> Iterator[DaemonWorld]:
    with daemon_world(tmp_path_factory.mktemp("control"), engine) as made:
        made.write(BASE, p=process(), c=container())
        made.mic.run(http=False)
        yield made


@pytest.fixture
def world(running: DaemonWorld) -> DaemonWorld:
    running.models = {"p": process(), "c": container()}
    running.write(BASE)
    assert running.mic("reload", "--wait").rc == 0
    running.converged(P0, P1, C2)
    return running


# --- commands -----------------------------------------------------------------------------------


def test_apply_follows_the_daemon(world: DaemonWorld) -> None:
    world.write({**BASE, 3: "s"}, s=slow(7.0))
    done = world.mic("apply", rc=0)
    name = identity("s", 3)
    assert re.search(rf"s  GPU 3 +{name}: ready", done.stdout), done
    assert done.stdout.splitlines()[-1] == "Apply: 4 as desired."
    world.converged(P0, P1, C2, name)


def test_apply_tells_of_the_one_that_failed(world: DaemonWorld) -> None:
    before = world.marks()
    world.write({**BASE, 3: "bad"}, bad='{backend: container, image: "mic-test/nothing:0"}')
    done = world.mic("apply", "--json")
    document = done.json()
    assert (done.rc, document["exit_code"]) == (3, 3), done
    (failure,) = document["failures"]
    assert failure["instance"] == identity("bad", 3)
    assert "mic-test/nothing:0" in failure["reason"]
    after = world.marks()
    assert after == before


def test_apply_of_another_file_is_refused(world: DaemonWorld, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(world.text({0: "p"}))
    before = world.marks()
    done = world.mic("apply", other, rc=1)
    assert done.stderr == (
        f"error: cannot apply {other}: the daemon runs {world.mic.config}\n"
        "hint: edit that file; `mic-supervisor plan FILE` compares another one\n"
    )
    # By another name it is the same file.
    link = tmp_path / "link.yaml"
    link.symlink_to(world.mic.config)
    assert world.mic("apply", link).rc == 0
    assert world.marks() == before


def test_apply_and_reload_of_a_broken_file(world: DaemonWorld) -> None:
    before, generation = world.marks(), world.generation
    world.mic.config.write_text("version: 1\nmodels: {p: {backend: nothing}}\ngpus: {0: p}\n")
    for command in (("apply",), ("reload", "--wait")):
        done = world.mic(*command, rc=1)
        assert f"{world.mic.config}:2:23: error: models.p.backend: " in done.stderr, done
    assert f"generation {generation} keeps running" in done.stderr
    assert world.marks() == before


def test_reload_without_wait_only_asks(world: DaemonWorld) -> None:
    world.mic.config.write_text("[")
    done = world.mic("reload", rc=0)
    assert done.stdout == (
        "The daemon reads its file now; `mic-supervisor status` shows the outcome.\n"
    )
    assert str(world.mic.config) in world.rejected()


def test_reload_says_which_generation_runs(world: DaemonWorld) -> None:
    number = world.generation
    world.mic("reload", "--wait", rc=0)  # the watcher may have been faster, and confirms nothing
    assert world.mic("reload", "--wait", rc=0).stdout == (
        f"Generation {number} runs already; nothing changed.\n"
    )
    world.write({**BASE, 3: "p"})
    done = world.mic("reload", "--wait", rc=0).stdout
    # The watcher may have been the faster one.
    assert done in (
        f"Generation {number + 1} accepted.\n",
        f"Generation {number + 1} runs already, and is confirmed now.\n",
    )
    world.converged(P0, P1, C2, identity("p", 3))


def test_plan_and_status_through_the_daemon(world: DaemonWorld) -> None:
    assert world.mic("plan", "--detailed-exitcode", rc=0).stdout == "No changes.\n"
    assert world.mic("status", rc=0).rc == 0
    assert world.mic("status", "p", "--json", rc=0).json()["instances"][0]["id"] == P0
    os.kill(world.marks()[P0][2], signal.SIGSTOP)  # it is alive, and says nothing: no probe asks
    os.kill(world.marks()[P0][2], signal.SIGCONT)
    assert world.mic("status", rc=0).rc == 0


def test_sighup_reads_the_file_and_confirms(world: DaemonWorld) -> None:
    world.write({0: "p", 2: "c"})
    until(lambda: world.phases().get(P1) == "blocked", "the removal to be held")
    world.mic.daemons[-1].process.send_signal(signal.SIGHUP)
    world.converged(P0, C2)


# --- many at once -------------------------------------------------------------------------------


def both(*calls: Any) -> list[Result]:
    """The outcomes of what is called side by side."""
    found: dict[int, Result] = {}

    def one(number: int, call: Any) -> None:
        found[number] = call()

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(len(calls))]


def test_two_applies_and_a_reload_at_once(world: DaemonWorld) -> None:
    before = world.marks()
    began = time.time()
    world.write({**BASE, 3: "s"}, s=slow(0.7))
    calls = [lambda: world.mic("apply"), lambda: world.mic("reload", "--wait")]
    done = both(calls[0], calls[0], calls[1])
    assert [item.rc for item in done] == [0, 0, 0], done
    after = world.marks()
    assert {name: after[name] for name in before} == before
    assert sorted(after) == sorted([*before, identity("s", 3)])
    begun = [
        event
        for event in world.history("begin")
        if event["instance"] == identity("s", 3) and event["at"] > began
    ]
    assert len(begun) == 1


def test_edits_while_it_converges_the_last_one_wins(world: DaemonWorld) -> None:
    before = world.marks()
    for turn in range(6):
        world.write({**BASE, 3: "s"}, s=slow(0.6, turn))
        time.sleep(0.45)
        world.marks()
    done = world.mic("apply", rc=0)
    assert "Apply: 4 as desired." in done.stdout
    after = world.marks()
    assert {name: after[name] for name in before} == before
    assert world.engine is not None
    looked = world.engine.inspect_container(after[identity("s", 3)][0])
    assert "TURN=5" in looked["Config"]["Env"]


def test_an_apply_while_the_file_changes_under_it(world: DaemonWorld) -> None:
    world.write({**BASE, 3: "s"}, s=slow(1.0, 1))

    def edit() -> Result:
        time.sleep(0.5)
        world.write({**BASE, 3: "s"}, s=slow(0.2, 2))
        return world.mic("reload", "--wait")

    done = both(lambda: world.mic("apply"), edit)
    assert [item.rc for item in done] == [0, 0], done
    world.converged(P0, P1, C2, identity("s", 3))
    assert world.engine is not None
    looked = world.engine.inspect_container(world.marks()[identity("s", 3)][0])
    assert "TURN=2" in looked["Config"]["Env"]


# --- clients that make no sense -----------------------------------------------------------------


def dial(world: DaemonWorld) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(15)
    connection.connect(str(world.mic.socket))
    return connection


def say(world: DaemonWorld, data: bytes) -> list[Any]:
    with dial(world) as connection:
        connection.sendall(data)
        with connection.makefile() as stream:
            return [json.loads(line) for line in stream]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\n", "cannot answer: the request is no line of JSON"),
        (b"GET / HTTP/1.1\r\n\r\n", "cannot answer: the request is no line of JSON"),
        (b"\xff\xfe\x00\n", "cannot answer: the request is no line of JSON"),
        (b"[" * 60000 + b"\n", "cannot answer: the request is no line of JSON"),
        (b"[]\n", "cannot answer: the request is no JSON object"),
        (b"{}\n", "cannot answer: this daemon speaks version 1, the request is of None"),
        (
            b'{"version": 2, "method": "apply"}\n',
            "cannot answer: this daemon speaks version 1, the request is of 2",
        ),
        (b'{"version": 1, "method": "halt"}\n', "cannot answer: there is no method 'halt'"),
        (b'{"version": 1}\n', "cannot answer: there is no method 'None'"),
        (
            b'{"version": 1, "method": "apply", "params": []}\n',
            "cannot answer: params is no JSON object",
        ),
        (b"x" * 70000 + b"\n", "cannot answer: the request is too long"),
    ],
)
def test_garbage_is_answered(world: DaemonWorld, data: bytes, message: str) -> None:
    (answer,) = say(world, data)
    assert answer["error"]["message"] == message
    assert world.mic.ask("ping")["result"]["scope"] == world.mic.scope


def test_clients_that_go_stall_or_never_read(world: DaemonWorld) -> None:
    apply = b'{"version": 1, "method": "apply", "params": {}}\n'
    world.write({**BASE, 3: "s"}, s=slow(1.0))
    with closing(dial(world)) as gone:
        gone.sendall(apply)
        time.sleep(0.2)
    stalled = [dial(world) for _ in range(20)]
    for connection in stalled[:10]:
        connection.sendall(b'{"version": 1, ')
    deaf = dial(world)
    deaf.sendall(apply)
    began = time.monotonic()
    assert world.mic.ask("status")["result"]["instances"]
    assert time.monotonic() - began < 5  # a client that says nothing is given 10 s
    # What the first one asked for is done although he did not wait for it.
    world.converged(P0, P1, C2, identity("s", 3))
    for connection in [*stalled, deaf]:
        connection.close()
    assert world.mic("apply").rc == 0
    assert "Traceback" not in world.mic.daemons[-1].text()


def test_the_socket_is_for_root_and_its_group(world: DaemonWorld) -> None:
    found = world.mic.socket.stat()
    assert found.st_mode & 0o7777 == 0o660
    assert found.st_uid == os.geteuid()
    assert world.mic.run_dir.stat().st_mode & 0o002 == 0


def test_a_member_of_the_group_reads_logs_through_the_daemon(world: DaemonWorld) -> None:
    """One who may look neither at the state nor at the engine: here, since both are elsewhere."""
    setpriv = program("setpriv", "util-linux")
    caps = "+dac_override,+dac_read_search"  # for the checkout, and the test's directories
    member = [setpriv, "--reuid=65534", "--clear-groups"]
    member += [f"--inh-caps={caps}", f"--ambient-caps={caps}", PROGRAM]
    nowhere = dict.fromkeys(("MIC_STATE_DIR", "MIC_RUN_DIR", "MIC_CONFIG"), "/nowhere")

    def logs(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*member, "logs", *args],
            env=world.mic.environment() | nowhere,
            capture_output=True,
            text=True,
            timeout=60,
        )

    world.write(BASE | {3: "talks"}, talks=TALKS)
    world.converged(P0, P1, C2, identity("talks", 3))
    until(lambda: world.mic("logs", "talks", rc=0).stdout == "one\ntwo\n", "its lines")
    done = logs("talks")
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\ntwo\n", "")
    assert logs("talks", "-n", "1").stdout == "two\n"
    done = logs("nobody")
    assert done.returncode == 1
    assert "cannot show the log of nobody: there is no such instance" in done.stderr


# --- one daemon per scope -----------------------------------------------------------------------


def test_a_second_daemon_is_refused(world: DaemonWorld) -> None:
    lock = next(world.mic.run_dir.glob("*.lock"))
    holder = json.loads(lock.read_text())
    assert holder["command"] == "mic-supervisor run"
    assert holder["pid"] == world.mic.daemons[-1].pid
    # The daemon itself would wait for a minute; a one-shot that finds no socket shows the same.
    world.mic.env["MIC_SOCKET"] = str(world.mic.run_dir / "other.sock")
    try:
        done = world.mic("apply", "--lock-timeout", "0s", rc=1)
    finally:
        world.mic.env["MIC_SOCKET"] = str(world.mic.socket)
    user = os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name
    assert re.fullmatch(
        rf"error: cannot converge: PID {holder['pid']} \(mic-supervisor run, started by {user}\) "
        r"is converging since \d\d:\d\d:\d\d\n"
        r"hint: wait for it, or set a longer --lock-timeout\n",
        done.stderr,
    ), done


def test_the_socket_of_a_killed_daemon(world: DaemonWorld) -> None:
    before = world.marks()
    first = world.mic.daemons[-1]
    first.process.kill()
    first.process.wait()
    assert world.mic.socket.exists()
    # Nobody listens there: commands do the work themselves.
    assert world.mic("status").rc == 0
    assert world.mic("reload", rc=1).stderr == (
        f"error: cannot reload: no daemon listens on {world.mic.socket}\n"
        f"hint: start it with: {start_daemon()}\n"
    )
    assert world.mic("apply").rc == 0
    world.mic.run(http=False)
    world.converged(P0, P1, C2)
    assert world.marks() == before


def test_a_daemon_waits_for_an_apply_and_takes_over(world: DaemonWorld) -> None:
    world.mic.daemons[-1].stop()
    assert not world.mic.socket.exists()
    before = world.marks()
    world.write({**BASE, 3: "s"}, s=slow(1.0))
    one_shot = world.mic.start("apply")
    until(lambda: "starting" in one_shot.text(), "the apply to be at work")
    world.mic.run(http=False)
    assert one_shot.process.wait(60) == 0
    world.converged(P0, P1, C2, identity("s", 3))
    after = world.marks()
    assert {name: after[name] for name in before} == before


# --- what systemd is told -----------------------------------------------------------------------


def test_what_systemd_is_told(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    with daemon_world(tmp_path_factory.mktemp("notify"), None) as made:
        made.write({0: "p"}, p=process())
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listener.bind(str(tmp_path / "notify"))
        told: list[str] = []

        def listen() -> None:
            """At all times, as systemd does: the kernel keeps eleven, then the daemon waits."""
            while data := listener.recv(65536):
                told.append(data.decode())

        def hear() -> list[str]:
            return told

        threading.Thread(target=listen, daemon=True).start()

        made.mic.env |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1500000"}
        daemon = made.mic.run(http=False)
        made.converged(P0)
        until(lambda: "STATUS=1/1 ready; config generation 1" in hear(), "the status")
        assert told.index("READY=1") > 0  # a sign of life or the status came first: it had looked
        assert "WATCHDOG=1" in told

        told.clear()
        made.mic.write("version: 1\ngpus: {0: nobody}\n")
        made.rejected()
        first = made.status()["config"]["error"].splitlines()[0]
        wanted = (
            "STATUS=1/1 ready; config generation 1; the file has errors and is not used: " + first
        )
        until(lambda: wanted in hear(), wanted)
        kinds = [text.split("=")[0] for text in told if text[0] in "R"]
        assert kinds == ["RELOADING", "READY"]
        assert re.search(r"^MONOTONIC_USEC=\d+$", told[0], re.MULTILINE) or any(
            "MONOTONIC_USEC=" in text for text in told
        )

        told.clear()
        time.sleep(2)
        assert hear().count("WATCHDOG=1") >= 3

        told.clear()
        assert daemon.stop() == 0
        until(lambda: "STOPPING=1" in hear(), "the end")
        listener.shutdown(socket.SHUT_RD)
        listener.close()
