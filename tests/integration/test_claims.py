"""Claims against the real daemon: containers and processes on GPUs of the mock NVML."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import docker
import pytest

from tests.integration.daemon_world import (
    DaemonWorld,
    Mark,
    container,
    daemon_world,
    process,
)
from tests.mock_nvml import GIB, MockGpu, MockNvml, MockProcess
from tests.support.mic import Daemon
from tests.support.waiting import http, until

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("device_requests")]

KILLS = int(os.environ.get("KILLS", "20"))
SERVER = Path(__file__).parents[2] / "mic_supervisor" / "demo" / "server.py"
SERVES = f'{{backend: process, command: [{sys.executable}, {SERVER}, --port, "${{port}}"], ' + (
    "probe: {http: /health, period: 200ms}, env: {HOLDS: x}}"
)


class World(DaemonWorld):
    """Four GPUs that the file hands over, a daemon, and holders."""

    nvml: MockNvml

    def claim(self, model: str, *args: str) -> Daemon:
        return self.mic.start("claim", model, *args)

    def ready(self, *holders: Daemon) -> None:
        for holder in holders:
            until(partial(_is_ready, holder), "a claim to be ready")

    def claims(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.status()["claims"]
        return found

    def states(self) -> dict[str, str]:
        """The state of each claim, by what its holder calls itself."""
        return {claim["holder"]: claim["state"] for claim in self.claims()}

    def has(self, *states: str) -> None:
        """Waits until there are these claims and no others."""
        until(lambda: sorted(self.states().values()) == sorted(states), f"claims: {states}")

    def kill_daemon(self) -> None:
        (daemon,) = (one for one in self.mic.daemons if one.process.args[-1] == "run"
                     and one.process.poll() is None)  # fmt: skip
        daemon.process.kill()
        daemon.process.wait()


def _last(holder: Daemon) -> str:
    """The phase in the last line of a holder; how it ended, where it has."""
    if (code := holder.process.poll()) is not None:
        raise AssertionError(f"exit {code}:\n{holder.text()}")
    lines = holder.text().splitlines()
    found = re.search(r" s  .{7,}  \S+: (\w+)", lines[-1]) if lines else None
    return found[1] if found is not None else ""


def _is_ready(holder: Daemon) -> bool:
    return _last(holder) in ("ready", "unprobed")


def ended(holder: Daemon, code: int, timeout: float = 30.0) -> str:
    """What a holder said, which ends by itself."""
    until(lambda: holder.process.poll() is not None, "the holder to end", timeout=timeout)
    assert holder.process.returncode == code, holder.text()
    return holder.text()


def error_of(holder: Daemon, code: int) -> str:
    return "\n".join(
        line for line in ended(holder, code).splitlines() if line.startswith(("error", "hint"))
    )


@pytest.fixture
def world(tmp_path: Path, engine: docker.APIClient, busybox_image: str) -> Iterator[World]:
    nvml = MockNvml(tmp_path)
    nvml.set([MockGpu() for _ in range(4)])
    with daemon_world(tmp_path, engine, nvml=nvml) as made:
        found = World(made.mic, made.engine)
        found.nvml = nvml
        found.mic.env |= {"XDG_RUNTIME_DIR": str(tmp_path)}
        found.write({"0-3": "fleet"}, p=process(), c=container("stop_timeout: 2s"))
        yield found


# --- turns --------------------------------------------------------------------------------------


def test_six_claims_on_four_gpus_take_turns(world: World) -> None:
    world.mic.run()
    holders = [world.claim("cp"[n % 2], "--holder", f"h{n}") for n in range(6)]
    world.has(*["ready"] * 4, *["waiting"] * 2)
    assert len(world.marks()) == 4
    page = http(f"{world.mic.url}/", "GET").text
    metrics = http(f"{world.mic.url}/metrics").text
    assert 'mic_claims{state="waiting"} 2.0' in metrics
    assert "ok" in page
    have = [n for n in range(6) if world.states()[f"h{n}"] == "ready"]
    wait = [n for n in range(6) if n not in have]
    for done, n in enumerate(have[:2]):
        before = world.marks()
        assert holders[n].stop() == 0
        world.has(*["ready"] * 4, *["waiting"] * (1 - done))
        after = world.marks()
        same = {name for name in before if before[name] == after.get(name)}
        assert (len(after), len(same)) == (4, 3)
    for n in (*have[2:], *wait):
        assert holders[n].stop() == 0
    world.has()
    assert world.marks() == {}
    ordered = [(event["text"], event["by"]) for event in world.history("order")]
    assert ordered.count(("release its claim of c (h0)", "root")) == 1
    assert sorted(ordered)[0] == ("claim c (h0)", "root")


def test_a_group_is_claimed_as_a_whole(world: World) -> None:
    world.write({"0,1": "fleet", 2: "fleet"})
    world.mic.run(http=False)
    both, one = world.claim("c", "--gpus", "2"), world.claim("c")
    world.ready(both, one)
    assert sorted(world.marks()) == ["c-a0000000x2", "c-a0000002"]
    assert both.stop() == 0
    assert sorted(world.marks()) == ["c-a0000002"]


# --- TERM ---------------------------------------------------------------------------------------


def test_term_while_it_waits_starts_and_is_ready(world: World) -> None:
    gate = world.mic.home / "gate"
    slow = f"probe: {{exec: [test, -e, {gate}], period: 100ms}}"
    world.write({0: "fleet"}, slow=process(slow))
    world.mic.run(http=False)
    starting, waiting = world.claim("slow", "--holder", "s"), None
    until(lambda: world.states() == {"s": "starting"}, "a start")
    waiting = world.claim("p", "--holder", "w")
    until(lambda: world.states() == {"s": "starting", "w": "waiting"}, "one that waits")
    assert waiting.stop() == 0
    world.has("starting")
    assert starting.stop() == 0
    world.has()
    assert world.marks() == {}
    gate.touch()
    ready = world.claim("slow")
    world.ready(ready)
    assert ready.stop(signal.SIGINT) == 0
    assert world.marks() == {}


def test_it_ends_only_when_the_driver_has_let_the_gpu_go(world: World) -> None:
    world.write({0: "fleet"})
    world.mic.run(http=False)
    holder = world.claim("c")
    world.ready(holder)
    ((*_, pid, _),) = world.marks().values()
    world.nvml.change(0, processes=[MockProcess(pid, 4 * GIB)], memory_used=4 * GIB)
    until(lambda: world.status()["gpus"][0]["holders"], "the driver to list it")
    holder.process.terminate()
    until(lambda: not world.marks(), "the container to be gone")
    time.sleep(1.5)
    assert holder.process.poll() is None
    assert [claim["state"] for claim in world.claims()] == ["releasing"]
    world.nvml.change(0, processes=[], memory_used=0)
    assert "its claim was released" in ended(holder, 0)


def test_term_while_the_daemon_is_away_waits_for_it(world: World) -> None:
    world.mic.run(http=False)
    holder = world.claim("p")
    world.ready(holder)
    before = world.marks()
    world.kill_daemon()
    holder.process.terminate()
    time.sleep(2.0)
    assert (holder.process.poll(), world.marks()) == (None, before)
    world.mic.run(http=False)
    ended(holder, 0)
    assert world.marks() == {}


# --- holders that vanish ------------------------------------------------------------------------


def test_what_a_killed_holder_had_is_taken_over_as_it_runs(world: World) -> None:
    world.mic.run(http=False)
    for model in "cp":
        first = world.claim(model, "--holder", "first")
        world.ready(first)
        before = world.marks()
        first.process.kill()
        until(lambda: world.states() == {"first": "vanished"}, "it to be noticed")
        second = world.claim(model, "--holder", "second")
        world.ready(second)
        assert (world.states(), world.marks()) == ({"second": "ready"}, before)
        assert second.stop() == 0
    said = [event["text"] for event in world.history("claim")]
    assert said.count("taken over by root (second), as it runs") == 2


def test_after_the_grace_it_is_stopped(world: World) -> None:
    world.mic.env["MIC_CLAIM_GRACE"] = "2s"
    world.mic.run(http=False)
    holder, stays = world.claim("c"), world.claim("p")
    world.ready(holder, stays)
    holder.process.kill()
    until(lambda: len(world.marks()) == 1, "the grace to be over")
    until(lambda: len(world.claims()) == 1, "the claim to be gone")
    (event,) = [e for e in world.history("begin") if e["phase"] == "remove"]
    assert event["text"].startswith("its holder vanished ")
    (left,) = [e for e in world.history("claim") if "the holder of its claim vanished" in e["text"]]
    assert event["at"] - left["at"] > 1.9
    assert stays.stop() == 0


@pytest.mark.slow
def test_a_supervisor_that_is_killed_again_and_again_touches_nothing(world: World) -> None:
    probed = process("probe: {exec: ['true'], period: 200ms}")
    world.write({"0-2": "fleet", 3: "c"}, p=probed)
    world.mic.run(http=False)
    files = [world.mic.home / f"ready-{n}" for n in range(2)]
    holders = []
    for n, file in enumerate(files):
        holders.append(world.claim("cp"[n], "--ready-file", str(file), "--holder", f"h{n}"))
        world.ready(holders[n])
    world.converged("c-a0000000", "c-a0000003", "p-a0000001")
    before = world.marks()
    for turn in range(KILLS):
        world.kill_daemon()
        if turn % 3 == 0:
            time.sleep(1.2)
        world.mic.run(http=False)
        assert world.marks() == before, turn
        for file in files:
            world.mic("claim", "--check", "--ready-file", file, rc=0)
    until(lambda: world.states() == {"h0": "ready", "h1": "ready"}, "the claims to be held again")
    assert world.marks() == before
    for holder in holders:
        lines = holder.text().splitlines()
        came = next(n for n, line in enumerate(lines) if line.endswith(("ready", "healthy")))
        away = f"no daemon answers at {world.mic.socket}; trying again every second"
        rest = [one for one in lines[came:] if not one.endswith(("ready", "healthy", away))]
        assert rest == [], "a restart made it look as if it was not ready"
    assert [holder.stop() for holder in holders] == [0, 0]
    assert [*world.marks()] == ["c-a0000003"]


# --- the file -----------------------------------------------------------------------------------


def test_the_file_takes_a_gpu_back_and_gives_it_again(world: World) -> None:
    world.write({0: "fleet"})
    world.mic.run(http=False)
    holder = world.claim("p", "--holder", "h")
    world.ready(holder)
    world.write({0: "c", 1: "none", "2,3": "fleet"})
    assert "error: cannot claim p: the file hands over 2 at a time, not 1" in error_of(holder, 78)
    world.converged("c-a0000000")
    world.write({0: "c", 1: "fleet"})
    world.accepted(3)
    holder = world.claim("p", "--holder", "h")
    world.ready(holder)
    world.write({0: "fleet", 1: "c"})
    world.converged("c-a0000001", "p-a0000000")
    assert sorted(world.marks()) == ["c-a0000001", "p-a0000000"]
    world.ready(holder)
    assert holder.stop() == 0


def test_a_missing_entry_waits_for_a_word(world: World) -> None:
    world.write({0: "fleet", 1: "c"})
    world.mic.run(http=False)
    holder = world.claim("p", "--holder", "h")
    world.ready(holder)
    world.converged("c-a0000001", "p-a0000000")
    before = world.marks()
    world.write({1: "c"})
    until(lambda: "waits to be confirmed" in str(world.status()["warnings"]), "a warning")
    assert (world.marks(), world.states()) == (before, {"h": "ready"})
    world.kill_daemon()
    world.mic.run(http=False)
    until(lambda: world.states() == {"h": "ready"}, "the claim to be held again")
    assert world.marks() == before
    world.mic("reload", "--wait", rc=0)
    assert "the file hands no GPU over" in error_of(holder, 78)
    until(lambda: len(world.marks()) == 1, "it to be stopped")


def test_a_change_of_the_model_is_followed(world: World) -> None:
    world.mic.run(http=False)
    holders = [world.claim("p"), world.claim("p")]
    world.ready(*holders)
    before = world.marks()
    world.write({"0-3": "fleet"}, p=process().replace("100000", "100001"))

    def replaced() -> bool:
        after = world.marks()
        return sorted(after) == sorted(before) and not {*after.values()} & {*before.values()}

    until(replaced, "both to be replaced")
    world.ready(*holders)
    assert [holder.stop() for holder in holders] == [0, 0]


# --- what cannot be had ---------------------------------------------------------------------------


def test_what_can_never_be_had_here_ends_with_78(world: World) -> None:
    world.mic.run(http=False)
    assert world.mic("claim", "q", rc=78).stderr.startswith(
        "error: cannot claim q: the file has no"
    )
    assert "not 2" in world.mic("claim", "p", "--gpus", "2", rc=78).stderr
    world.mic.env["MIC_SCOPE"] = "other"
    assert "not of other" in world.mic("claim", "p", rc=78).stderr
    world.mic.env["MIC_SCOPE"] = world.mic.scope
    assert "Missing argument 'MODEL'" in world.mic("claim", rc=64).stderr
    world.write({0: "p", 1: "none"})
    until(lambda: world.status()["config"]["generation"] == 2, "the file to be read")
    assert "the file hands no GPU over" in world.mic("claim", "p", rc=78).stderr
    world.write({0: "p", 1: "fleet"})  # it is read before anything is refused for good
    world.ready(world.claim("p"))


def test_a_model_that_never_gets_ready_ends_with_1_and_says_that_its_budget_is_spent(
    world: World,
) -> None:
    never = process("probe: {exec: ['false'], period: 100ms}", "start_timeout: 2s")
    world.write({"0-3": "fleet"}, never=never, broken=process().replace("/bin/sleep", "/bin/false"))
    world.mic.run(http=False)
    said = error_of(world.claim("never"), 1)
    assert said.startswith("error: cannot serve never: its start failed: not up within 2 s: ")
    said = error_of(world.claim("broken"), 1)
    said = said.replace("after it had been ready, ", "")  # it runs for a moment, and has no probe
    assert said.startswith("error: cannot serve broken: its start failed: ")
    world.has()
    assert world.marks() == {}


def test_what_was_ready_is_restarted_and_given_up_when_that_fails(world: World) -> None:
    gate = world.mic.home / "gate"
    gate.touch()
    command = f"[/bin/sh, -c, 'test -e {gate} && exec /bin/sleep 100000']"
    model = process().replace('[/bin/sleep, "100000"]', command)
    world.write({"0-3": "fleet"}, shaky=model)
    world.mic.run(http=False)
    holder = world.claim("shaky")
    world.ready(holder)
    until(world.marks, "it to run")  # it is /bin/sh at first
    (first,) = world.marks().values()
    os.kill(first[2], signal.SIGKILL)
    until(lambda: [m for m in world.marks().values() if m != first], "a restart")
    world.ready(holder)
    gate.unlink()
    (second,) = world.marks().values()
    os.kill(second[2], signal.SIGKILL)
    assert "after it had been ready, its start failed" in error_of(holder, 1)


def test_what_is_in_the_way_for_longer_than_a_start_ends_it(world: World) -> None:
    world.write({0: "fleet"}, p=process("start_timeout: 2s"))
    world.nvml.change(0, processes=[MockProcess(os.getpid(), 4 * GIB)], memory_used=4 * GIB)
    world.mic.env["MIC_RESYNC"] = "1s"
    world.mic.run(http=False)
    said = error_of(world.claim("p"), 1)
    assert "it could not start for its start_timeout of 2 s: GPU 0 is held by PID" in said


def test_a_drained_host_sends_everybody_elsewhere(world: World) -> None:
    world.write({0: "fleet"})
    world.mic.run(http=False)
    holder = world.claim("c", "--holder", "h")
    world.ready(holder)
    waits = world.claim("p")
    until(lambda: len(world.claims()) == 2, "one that waits")
    world.mic("drain", "--yes", "--reason", "a new riser", rc=0)
    for one in (holder, waits):
        assert "the host is drained since" in error_of(one, 1)
    assert world.marks() == {}
    refused = world.mic("claim", "p", rc=1).stderr
    assert "(a new riser)" in refused and "hint: mic-supervisor undrain" in refused
    world.mic("undrain", rc=0)
    again = world.claim("p")
    world.ready(again)
    assert again.stop() == 0


# --- without a daemon -----------------------------------------------------------------------------


def test_plan_and_apply_alone_touch_nothing_that_is_claimed(world: World) -> None:
    daemon = world.mic.run(http=False)
    holders = [world.claim("c", "--holder", "h"), world.claim("p", "--holder", "i")]
    world.ready(*holders)
    before = world.marks()
    assert daemon.stop() == 0
    assert world.mic("plan", "--detailed-exitcode", rc=0).stdout == "No changes.\n"
    world.mic("apply", rc=0)
    world.write({"0-3": "fleet"}, p=process().replace("100000", "100001"))
    said = world.mic("plan", rc=0).stdout
    assert "it is claimed, and only the daemon knows by whom; would replace" in said
    world.mic("apply")
    assert world.marks() == before
    rows = world.mic("status", "--json").json()
    assert [claim["state"] for claim in rows["claims"]] == ["vanished", "vanished"]
    world.write({"0-3": "fleet"}, p=process())
    world.mic.run(http=False)
    until(lambda: world.states() == {"h": "ready", "i": "ready"}, "the claims to be held again")
    assert world.marks() == before
    assert [holder.stop() for holder in holders] == [0, 0]


def test_down_removes_what_is_claimed(world: World) -> None:
    daemon = world.mic.run(http=False)
    holder = world.claim("c")
    world.ready(holder)
    assert daemon.stop() == 0
    assert "Removed 1." in world.mic("down", "--yes", rc=0).stdout
    assert world.marks() == {}
    assert holder.process.poll() is None


def test_a_daemon_that_stops_its_instances_stops_what_is_claimed(world: World) -> None:
    world.mic.env["MIC_ON_STOP"] = "stop"
    daemon = world.mic.run(http=False)
    holder = world.claim("c")
    world.ready(holder)
    assert daemon.stop() == 0
    assert (world.marks(), holder.process.poll()) == ({}, None)


def test_a_pause_holds_what_is_claimed(world: World) -> None:
    world.mic.run(http=False)
    holder = world.claim("p", "--holder", "h")
    world.ready(holder)
    before: dict[str, Mark] = world.marks()
    world.mic("pause", "p", rc=0)
    holder.process.terminate()
    until(lambda: world.states() == {"h": "releasing"}, "the release to be asked for")
    time.sleep(1.0)
    assert (world.marks(), holder.process.poll()) == (before, None)
    world.mic("resume", "p")
    ended(holder, 0)
    assert world.marks() == {}


# --- the ready file -------------------------------------------------------------------------------


def test_the_ready_file_is_there_exactly_while_it_is_ready(world: World) -> None:
    world.write({0: "fleet"}, web=SERVES)
    path = world.mic.home / "ready.json"

    def check(code: int) -> str:
        return world.mic("claim", "--check", "--ready-file", path, rc=code).stderr

    assert check(1) == f"error: not ready: {path} is not there\n"
    world.mic.run(http=False)
    holder = world.claim("web", "--ready-file", str(path))
    world.ready(holder)
    check(0)
    document = json.loads(path.read_text())
    (row,) = world.status()["instances"]
    assert document["endpoints"] == row["endpoints"]
    assert (document["instance"], document["pid"]) == (row["id"], holder.pid)
    assert path.stat().st_mode & 0o777 == 0o644
    second = world.mic("claim", "web", "--ready-file", path, rc=78).stderr
    assert second.startswith(f"error: cannot use {path}: another claim that is held has it\n")
    os.kill(row["pid"], signal.SIGSTOP)
    try:
        until(lambda: not path.exists(), "it to be gone")
    finally:
        os.kill(row["pid"], signal.SIGCONT)
    until(path.exists, "it to be there again")
    holder.process.kill()
    holder.process.wait()
    assert check(1) == f"error: not ready: the holder of the claim, PID {holder.pid}, is gone\n"
