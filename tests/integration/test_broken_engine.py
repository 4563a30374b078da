"""An engine that is not there, not for us, or gone in the middle; an apply that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import docker
import pytest

from tests.integration.engine_proxy import EngineProxy, Moment
from tests.integration.job_world import World, gated, lines_of, outcome, web, world
from tests.support.mic import PROGRAM
from tests.support.require import program
from tests.support.waiting import until

pytestmark = pytest.mark.engine

START = "start it with: systemctl start docker (MIC_DOCKER_HOST names another socket or address)"


@pytest.fixture
def job(
    tmp_path_factory: pytest.TempPathFactory,
    engine: docker.APIClient,
    busybox_image: str,
    proxy: EngineProxy,
) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("job"), engine) as made:
        made.mic.env["MIC_DOCKER_HOST"] = proxy.url
        yield made


def test_no_engine(job: World) -> None:
    job.write({0: "a", 1: "none"}, a=web())
    job.mic.env["MIC_DOCKER_HOST"] = "unix:///nonexistent"
    cause = "cannot list containers: there is no Docker socket at /nonexistent"
    assert job.plan() == (
        f"! blocked  a-51000000 on GPU 0: what docker runs is unknown: {cause}\n"
        f"    hint: {START}\n"
        "\n"
        "No changes; 1 blocked.\n"
    )
    assert outcome(job.mic("apply", rc=1).stdout) == (
        f"blocked    a-51000000  GPU 0  what docker runs is unknown: {cause}\n"
        f"    hint: {START}\n"
        "Apply: 0 as desired, 1 not.\n"
    )
    done = job.mic("status", rc=1)
    cells = done.stdout.rstrip("\n").split("\t")
    assert cells[:4] == ["0", "a", "blocked", "no"]
    assert cells[5:] == ["0", "-", f"what docker runs is unknown: {cause}"]
    assert done.stderr == f"warning: docker cannot be read: {cause}\n"
    document = job.status(rc=1)
    assert document["unreadable"] == [f"docker cannot be read: {cause}"]
    done = job.mic("down", "--yes", rc=1)
    assert (done.stdout, done.stderr) == (
        "",
        f"error: cannot read what runs: {cause}\nhint: {START}\n",
    )
    done = job.mic("logs", "a-51000000", rc=1)
    assert (done.stdout, done.stderr) == (
        "",
        f"error: cannot look for a-51000000: {cause}\nhint: {START}\n",
    )


def test_an_engine_that_this_user_may_not_use(job: World, proxy: EngineProxy) -> None:
    setpriv = program("setpriv", "util-linux")
    if os.geteuid() != 0:
        pytest.skip("only root can give the socket to another user")
    job.write({0: "a"}, a=web())
    os.chown(proxy.path, 65534, 65534)
    proxy.path.chmod(0o600)
    # Root may open everything by this capability alone.
    command = [setpriv, "--bounding-set", "-dac_override", PROGRAM, "apply"]
    done = subprocess.run(
        command, env=job.mic.environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (1, ""), done
    assert outcome(done.stdout).replace(str(proxy.path), "SOCKET") == (
        "blocked    a-51000000  GPU 0  what docker runs is unknown: cannot list containers: "
        "access to SOCKET is denied\n"
        "    hint: run as root, or add the user to the group docker: usermod -aG docker USER\n"
        "Apply: 0 as desired, 1 not.\n"
    )


def test_an_engine_that_dies_while_apply_waits(job: World, proxy: EngineProxy) -> None:
    gate = job.gate()
    job.write({0: "a", 1: "b"}, a=gated(gate), b=web())
    apply = job.mic.start("apply")
    until(lambda: "a-51000000: starting" in apply.text(), "the start")
    until(lambda: "b-51000001: ready" in apply.text(), "the other one")
    until(lambda: job.memory("a-51000000").get("started"), "the end of its start")
    proxy.cut()
    assert apply.process.wait(60) == 1
    # The list that was under way, or the next one: both are true.
    causes = {
        f"there is no Docker socket at {proxy.path}\n    hint: {START}": "GONE",
        f"the engine at {proxy.path} hung up in the middle of the call\n"
        "    hint: see what it says: systemctl status docker; journalctl -u docker": "GONE",
    }
    text = outcome(apply.text())
    for long, short in causes.items():
        text = text.replace(long, short)
    assert text == (
        "blocked    a-51000000  GPU 0  what docker runs is unknown: cannot list containers: GONE\n"
        "blocked    b-51000001  GPU 1  what docker runs is unknown: cannot list containers: GONE\n"
        "Apply: 0 as desired, 2 not.\n"
    )
    before = job.runs()
    assert sorted(before) == ["a-51000000", "b-51000001"]
    proxy.up()
    (gate / "go").touch()
    job.apply()
    assert job.runs() == before
    job.unchanged()


def test_an_engine_that_dies_before_it_is_asked_to_create(job: World, proxy: EngineProxy) -> None:
    job.write({0: "a"}, a=web())
    proxy.hold("POST .*/containers/create")
    apply = job.mic.start("apply")
    assert proxy.held.wait(60), apply.text()
    proxy.cut()
    assert apply.process.wait(60) == 1
    assert outcome(apply.text()).replace(str(proxy.path), "SOCKET") == (
        "blocked    a-51000000  GPU 0  what docker runs is unknown: cannot list containers: "
        "there is no Docker socket at SOCKET\n"
        "    cannot create container mic-SCOPE-a-51000000-HASH: the engine at SOCKET hung up in "
        "the middle of the call\n"
        "    hint: see what it says: systemctl status docker; journalctl -u docker\n"
        "Apply: 0 as desired, 1 not.\n"
    )
    assert job.containers() == []
    proxy.up()
    job.apply()


CALLS = {
    "create": "POST .*/containers/create",
    "start": "POST .*/start$",
    "kill": "POST .*/kill",
    "wait": "POST .*/wait",
    "remove": "DELETE .*/containers/",
}


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("call", CALLS)
def test_apply_is_killed_in_the_middle(
    job: World, proxy: EngineProxy, call: str, moment: Moment
) -> None:
    """From a on GPU 0 with a predecessor and b on GPU 1, to another a and nothing on GPU 1."""
    job.write({0: "a", 1: "b"}, a=web(), b=web())
    job.apply()
    job.write({0: "a", 1: "b"}, a=web("env: {STEP: '1'}"))
    job.apply()
    job.write({0: "a"}, a=web("env: {STEP: '2'}"))
    proxy.hold(CALLS[call], moment)
    apply = job.mic.start("apply")
    assert proxy.held.wait(60), apply.text()
    apply.stop(signal.SIGKILL)
    proxy.release()
    job.apply("--lock-timeout", "0s")
    assert sorted(job.runs()) == ["a-51000000"]
    assert "STEP=2" in job.one("a-51000000")["Config"]["Env"]
    # The predecessor is kept, and there is nothing else: no duplicate, no leftover.
    assert len(job.containers()) == 2
    job.unchanged()


def test_ctrl_c_leaves_nothing_that_the_next_apply_does_not_finish(
    job: World, proxy: EngineProxy
) -> None:
    gate = job.gate()
    job.write({0: "a"}, a=gated(gate))
    apply = job.mic.start("apply")
    until(lambda: "a-51000000: starting" in apply.text(), "the start")
    assert apply.stop(signal.SIGINT) == 130
    assert lines_of(apply.text(), "interrupted") == ["interrupted"]
    assert "Traceback" not in apply.text()
    before = job.runs()
    assert sorted(before) == ["a-51000000"]
    (gate / "go").touch()
    job.apply()
    assert job.runs() == before
    job.unchanged()


def test_ctrl_c_while_a_step_is_done_lets_it_end(job: World, proxy: EngineProxy) -> None:
    job.write({0: "a"}, a=web())
    proxy.hold(CALLS["create"], "after")
    apply = job.mic.start("apply")
    assert proxy.held.wait(60), apply.text()
    apply.process.send_signal(signal.SIGINT)
    proxy.release()
    assert apply.process.wait(60) == 130
    assert "Traceback" not in apply.text()
    assert len(job.containers()) <= 1
    job.apply()
    assert len(job.containers()) == 1
    job.unchanged()
