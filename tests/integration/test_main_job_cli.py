"""The command line against what runs: status, logs, down, JSON documents and exit codes."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from typing import Any

import docker
import pytest

from tests.integration.job_world import (
    World,
    gated,
    lines_of,
    outcome,
    server,
    simulated,
    web,
    world,
)
from tests.support.mic import PROGRAM
from tests.support.waiting import http, until

pytestmark = pytest.mark.engine

LONG = "a-model-with-a-name-of-40-characters-tot"
MODELS = {
    "a": server(),
    LONG: web(),
    "plain": "{backend: container, image: mic-test/busybox:1, command: [sleep, '600']}",
}
GPUS: dict[int | str, str] = {0: "a", 1: LONG, 2: "plain", 3: "none"}
ID = ["a-51000000", f"{LONG}-51000001", "plain-51000002"]


@pytest.fixture(scope="module")
def ready(
    tmp_path_factory: pytest.TempPathFactory,
    engine: docker.APIClient,
    busybox_image: str,
    server_image: str,
) -> Iterator[World]:
    """Three ready instances that no test of this module changes."""
    with world(tmp_path_factory.mktemp("ready"), engine) as made:
        made.write(GPUS, **MODELS)
        made.apply()
        yield made


@pytest.fixture(scope="module")
def other(
    tmp_path_factory: pytest.TempPathFactory,
    engine: docker.APIClient,
    busybox_image: str,
    server_image: str,
) -> Iterator[World]:
    """A world for tests that change it."""
    with world(tmp_path_factory.mktemp("other"), engine) as made:
        yield made


@pytest.fixture
def one(other: World) -> World:
    other.models.clear()
    other.write({0: "a"}, a=web())
    other.apply()
    return other


def on_terminal(
    job: World, *args: str, columns: int = 80, interrupt_at: str | None = None
) -> tuple[int, str]:
    """(exit code, text without colours) of a command that writes to a terminal.

    `interrupt_at`: Ctrl-C is pressed as soon as this text is seen.
    """
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = job.mic.environment() | {"TERM": "xterm"}
    environment.pop("COLUMNS")
    process = subprocess.Popen(
        [PROGRAM, *args],
        env=environment,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            data = os.read(leader, 4096)
        except OSError:  # how a terminal says that nobody writes to it any more
            break
        if not data:
            break
        seen += data
        if interrupt_at is not None and interrupt_at.encode() in seen:
            os.write(leader, b"\x03")
            interrupt_at = None
    os.close(leader)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    return process.wait(60), text.replace("\r\n", "\n")


# --- status -----------------------------------------------------------------------------------


def test_status_in_a_pipe_is_a_line_of_fields_per_instance(ready: World) -> None:
    done = ready.mic("status", rc=0)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    for row in rows:
        assert re.fullmatch(r"\d+s|\dm", row.pop(4))
    assert rows == [
        ["0", "a", "ready", "yes", "0", ready.url(ID[0]), ""],
        ["1", LONG, "ready", "yes", "0", ready.url(ID[1]), ""],
        ["2", "plain", "unprobed", "yes", "0", ready.url(ID[2]),
         "it has no probe: nothing can say whether it is healthy"],
    ]  # fmt: skip
    assert done.stderr == ""


def test_status_on_a_terminal_of_80_columns(ready: World) -> None:
    code, text = on_terminal(ready, "status")
    lines = text.splitlines()
    assert code == 0
    assert lines[0].split() == ["GPU", "MODEL", "PHASE", "SYNC", "SINCE", "RST", "ENDPOINT"]
    assert max(map(len, lines)) <= 80, text
    assert ready.url(ID[1]) in text  # an address that is cut is of no use
    folded = [line.split()[0] for line in lines[3:] if line.startswith(" ")]
    assert f"{lines[2].split()[1]}{''.join(folded[:1])}" == LONG, text


def test_status_of_one_model(ready: World) -> None:
    assert len(ready.mic("status", "a", rc=0).stdout.splitlines()) == 1
    assert len(ready.mic("status", ID[2], rc=0).stdout.splitlines()) == 1
    done = ready.mic("status", "nobody", rc=1)
    assert done.stdout == ""
    assert done.stderr == (
        "error: cannot show nobody: neither the file nor this machine has an instance of it\n"
        f"hint: there is a, {LONG}, plain\n"
    )


def test_status_as_json_field_by_field(ready: World) -> None:
    document = ready.status(rc=0)
    assert set(document) >= {"version", "host", "config", "instances", "gpus"}
    assert document["version"] == 1
    assert document["host"] == socket.gethostname()
    config = document["config"]
    assert (config["path"], config["last_reload_ok"], config["error"]) == (
        str(ready.mic.config),
        True,
        None,
    )
    assert re.fullmatch(r"[0-9a-f]{64}", config["hash"])
    assert abs(config["loaded_at"] - time.time()) < 10

    row = dict(document["instances"][0])
    assert abs(row.pop("since") - time.time()) < 300
    assert re.fullmatch(r"[0-9a-f]{16}", row.pop("spec_hash"))
    run = ready.run_of(ID[0])
    assert row.pop("pid") in (None, run.pid)  # the engine's list does not tell it
    assert row == {
        "id": ID[0],
        "origin": "file",
        "model": "a",
        "backend": "container",
        "gpus": [{"uuid": simulated(0), "index": 0}],
        "phase": "ready",
        "sync": "in_sync",
        "health": "healthy",
        "reason": None,
        "code": None,
        "restarts": 0,
        "next_retry": None,
        "endpoints": {"http": ready.url(ID[0])},
        "container_id": run.id,
        "unit": None,
        "serving": True,
        "models": [],
        "as_desired": True,
        "openai_model": None,
    }
    unprobed = document["instances"][2]
    assert (unprobed["phase"], unprobed["health"]) == ("unprobed", "unknown")
    assert document["gpus"] == [
        {
            "uuid": simulated(index),
            "index": index,
            "pci_bus_id": f"00005100:{index:02X}:00.0",
            "name": "Simulated GPU",
            "instance": ID[index] if index < 3 else None,
            "state": "managed" if index < 3 else "kept_empty",
            "trouble": None,
            "holders": [],
            "parent": None,
        }
        for index in range(4)
    ]


def test_status_exits_with_3_when_something_is_not_ready(one: World) -> None:
    one.write({0: "a", 1: "a"})
    done = one.mic("status", rc=3)
    assert done.stdout.splitlines()[1].split("\t") == [
        *("1", "a", "pending", "no", "-", "0", "-", "nothing runs for it yet")
    ]
    assert one.instances()["a-51000001"]["health"] == "missing"


# --- plan and apply ---------------------------------------------------------------------------


def test_plan_as_json_for_every_kind_of_change(one: World) -> None:
    one.write({0: "a", 1: "b", 2: "c", 7: "a"}, b=web(), c=web())
    one.apply(rc=3)
    one.engine.kill(one.run_of("b-51000001").id)
    until(lambda: "b-51000001" not in one.runs(), "its end")
    one.write({0: "a", 1: "b", 3: "b", 7: "a"}, a=web("env: {STEP: '1'}"))
    document = one.plan_json()
    assert set(document) == {
        *("version", "host", "config_hash", "changes", "actions", "blocked", "left_out"),
        *("warnings", "profile"),
    }
    assert (document["version"], document["host"]) == (1, socket.gethostname())
    assert document["changes"] == len(document["actions"]) == 4
    actions: dict[str, dict[str, Any]] = {item["instance"]: item for item in document["actions"]}
    for action in actions.values():
        assert set(action) == {
            *("action", "instance", "model", "backend", "gpus", "cause", "code", "waits"),
            *("diff", "steps"),
        }
    summary = {name: (item["action"], item["cause"]) for name, item in actions.items()}
    assert summary == {
        "a-51000000": ("replace", "its specification changed: env.STEP"),
        "b-51000001": ("start", "it exited with 137 (SIGKILL)"),
        "b-51000003": ("create", "nothing runs for it yet"),
        "c-51000002": ("remove", "the file no longer names it"),
    }
    assert actions["a-51000000"]["diff"] == [
        {"path": "env.STEP", "before": None, "after": "(hidden)"}
    ]
    assert actions["c-51000002"]["gpus"] == [simulated(2)]
    (blocked,) = document["blocked"]
    assert (blocked["instance"], blocked["reason"]) == (
        "a on GPU 7",
        "there is no GPU 7; this machine has GPU 0,1,2,3",
    )
    assert one.mic("plan", "--detailed-exitcode").rc == 2


def test_plan_of_another_file_changes_nothing(one: World) -> None:
    path = one.mic.home / "another.yaml"
    path.write_text(one.text({0: "none"}))
    assert "the file keeps its GPU empty" in one.mic("plan", path, rc=0).stdout
    one.unchanged()


def test_apply_as_json(one: World) -> None:
    one.write({0: "a", 1: "b"}, b="{backend: container, image: 'localhost:1/none:1'}")
    done = one.mic("apply", "--json", rc=3)
    document = done.json()
    assert (document["version"], document["exit_code"]) == (1, 3)
    assert [(row["id"], row["phase"]) for row in document["instances"]] == [
        ("a-51000000", "ready"),
        ("b-51000001", "backoff"),
    ]
    (failure,) = document["failures"]
    assert failure["instance"] == "b-51000001"
    assert failure["reason"].startswith("cannot pull localhost:1/none:1: ")
    assert [item["instance"] for item in document["remaining"]["blocked"]] == ["b-51000001"]


def test_an_invalid_file_stops_nothing(one: World) -> None:
    before = one.runs()
    one.mic.write("version: 1\nmodels: {a: {backend: container, imag: x}}\ngpus: {0: a}\n")
    for command in ("plan", "apply", "status"):
        done = one.mic(command, rc=1)
        assert done.stdout == ""
        assert "imag" in done.stderr
        assert "did you mean image?" in done.stderr
    assert one.mic("plan", "--detailed-exitcode").rc == 1
    one.mic.config.unlink()
    for command in ("plan", "apply", "status"):
        done = one.mic(command, rc=1)
        assert lines_of(done.stderr, "error: ", str(one.mic.config)) or done.stderr == ""
    assert one.runs() == before


def test_apply_on_a_terminal_draws_and_ends_with_the_outcome(one: World) -> None:
    one.write({0: "a"}, a=web("env: {STEP: '1'}"))
    code, text = on_terminal(one, "apply")
    assert code == 0
    assert outcome("\n".join(text.splitlines()[-2:])) == (
        "ready      a-51000000  GPU 0  http://127.0.0.1:PORT\nApply: 1 as desired.\n"
    )


def test_ctrl_c_on_a_terminal(other: World) -> None:
    other.models.clear()
    gate = other.gate()
    other.write({0: "a"}, a=gated(gate))
    code, text = on_terminal(other, "apply", interrupt_at="starting")
    assert code == 130
    assert text.splitlines()[-1] == "interrupted"
    assert "Traceback" not in text
    before = other.runs()
    (gate / "go").touch()
    other.apply()
    assert other.runs() == before


# --- logs and down ----------------------------------------------------------------------------


def test_logs(ready: World) -> None:
    url = ready.url("a-51000000")
    http(f"{url}/one")
    http(f"{url}/two")

    def logged() -> list[str]:
        return ready.mic("logs", "a-51000000", rc=0).stdout.splitlines()

    until(lambda: "GET /two 404" in logged(), "the engine to have the line")
    whole = logged()
    assert re.fullmatch(r"starting, PID \d+", whole[0])
    assert re.fullmatch(r"listening on \d+ after \d+\.\d s", whole[1])
    told = [line for line in whole if line in ("GET /one 404", "GET /two 404")]
    assert told == ["GET /one 404", "GET /two 404"]
    # By model, and its last lines; the probes of other tests may come in between.
    assert len(ready.mic("logs", "a", "-n", "3", rc=0).stdout.splitlines()) == 3
    assert ready.mic("logs", "a", "-n", "0", rc=0).stdout == ""


def test_logs_of_nobody(ready: World) -> None:
    done = ready.mic("logs", "nobody", rc=1)
    assert done.stderr == (
        "error: cannot show the log of nobody: there is no such instance\n"
        f"hint: there is {', '.join(ID)}\n"
    )
    done = ready.mic("logs", "--previous", "plain", rc=1)
    name = ready.one("plain-51000002")["Name"].lstrip("/")
    assert done.stderr == (
        f"error: cannot tell apart the earlier runs of {name}\n"
        "hint: a container that is started again goes on in the same log: leave --previous out\n"
    )
    assert ready.mic("logs", "-f", "--previous", "plain", rc=64).stdout == ""


def test_logs_follow_until_the_container_ends(other: World) -> None:
    other.models.clear()
    other.write({0: "a"}, a=server())
    other.apply()
    logs = other.mic.start("logs", "-f", "a")
    until(lambda: "listening on" in logs.text(), "the log")
    http(f"{other.url('a-51000000')}/follow-me")
    until(lambda: "GET /follow-me 404" in logs.text(), "the line")
    http(f"{other.url('a-51000000')}/exit?code=0", "POST")
    assert logs.process.wait(60) == 0
    assert logs.text().splitlines()[-1] == "exiting with 0"
    again = other.mic.start("logs", "-f", "a")
    assert again.process.wait(60) == 0


def test_logs_follow_ends_with_ctrl_c(ready: World) -> None:
    logs = ready.mic.start("logs", "-f", "a")
    until(lambda: "listening on" in logs.text(), "the log")
    assert logs.stop(signal.SIGINT) == 130
    assert "Traceback" not in logs.text()


def test_logs_into_a_closed_pipe_end_quietly(ready: World) -> None:
    done = subprocess.run(
        ["bash", "-c", f"'{PROGRAM}' logs a | true; exit ${{PIPESTATUS[0]}}"],
        env=ready.mic.environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_logs_of_the_predecessor(one: World) -> None:
    one.write({0: "a"}, a="{backend: container, image: mic-test/busybox:1, command: "
              "[sh, -c, 'echo first; sleep 600']}")  # fmt: skip
    one.apply()

    def logged() -> str:  # a container counts as up before its program has said a word
        return one.mic("logs", "a", rc=0).stdout

    until(lambda: logged() == "first\n", "its word")
    one.write({0: "a"}, a="{backend: container, image: mic-test/busybox:1, command: "
              "[sh, -c, 'echo second; sleep 600']}")  # fmt: skip
    one.apply()
    until(lambda: logged() == "second\n", "its word")
    assert one.mic("logs", "--previous", "a", rc=0).stdout == "first\n"


def test_down(one: World) -> None:
    one.write({0: "a", 1: "a"})
    one.apply()
    done = one.mic("down", rc=1)
    assert done.stderr == (
        "error: cannot ask whether to go on: this is no terminal\nhint: say --yes\n"
    )
    assert sorted(one.runs()) == ["a-51000000", "a-51000001"]
    done = one.mic("down", "--yes", rc=0)
    assert outcome(done.stdout) == "To be removed: a-51000000, a-51000001\nRemoved 2.\n"
    assert one.containers() == []
    assert one.mic("down", "--yes", rc=0).stdout == "Nothing of ours runs here.\n"
    one.apply()
    assert sorted(one.runs()) == ["a-51000000", "a-51000001"]


def test_down_removes_the_predecessors_too(one: World) -> None:
    one.write({0: "a"}, a=web("env: {STEP: '1'}"))
    one.apply()
    assert len(one.containers()) == 2
    one.mic("down", "--yes", rc=0)
    assert one.containers() == []


# --- usage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "last"),
    [
        (["aply"], "Error: there is no command 'aply'; did you mean apply?"),
        (["xyzzy"], "Error: there is no command 'xyzzy'"),
        (["plan", "--jsn"], "Error: No such option"),
        (["retry"], "Error: Missing argument 'INSTANCE|MODEL|GPU'."),
        (["logs", "-n", "-1", "a"], "Error: Invalid value for '-n' / '--lines': "),
        (["status", "a", "b"], "Error: Got unexpected extra argument (b)"),
    ],
)
def test_wrong_usage_exits_with_64(ready: World, args: list[str], last: str) -> None:
    done = ready.mic(*args, rc=64)
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(last)


def test_every_json_document_is_one_document(ready: World) -> None:
    for command in (["plan", "--json"], ["status", "--json"], ["apply", "--json"]):
        document = json.loads(ready.mic(*command, rc=0).stdout)
        assert (document["version"], document["host"]) == (1, socket.gethostname())
