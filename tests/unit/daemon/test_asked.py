"""A real daemon without Docker, asked on its socket: anything at all, and by who may do no more."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.mic import PROGRAM, Daemon, Mic
from tests.support.require import program
from tests.support.waiting import until

METHODS = (
    *("ping", "status", "endpoints", "plan", "apply", "reload", "edited", "restart", "retry"),
    *("pause", "resume", "history", "logs", "claim", "release"),
)
NAMES = (
    *("name", "names", "path", "lines", "targets", "previous", "reason", "hash", "rebind"),
    *("config", "scope", "version", "model", "token", "gpus", "instance", "holder", "waited"),
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["a", "0", "9", "a-51000000", "GPU-51000000", "/etc/passwd", "\ud800", "-"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def ask(mic: Mic, method: str, params: Any) -> list[dict[str, Any]] | None:
    """The answer's lines; None: it goes on waiting, as `pause` may for what is under way."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1)
        connection.connect(str(mic.socket))
        request = json.dumps({"version": 1, "method": method, "params": params})
        connection.sendall(request.encode() + b"\n")
        try:
            with connection.makefile() as stream:
                return [json.loads(line) for line in stream.readlines()]
        except TimeoutError:
            return None


@pytest.fixture
def daemon(mic: Mic) -> Daemon:
    mic.env |= {"MIC_DOCKER_HOST": "none", "MIC_GPU_SOURCE": "simulated:2"}
    mic.write("""
        version: 1
        models: {a: {backend: process, command: [/bin/sleep, "1000"]}}
        gpus: {0: a, 1: none}
    """)
    return mic.run(timeout=60, http=False)


@pytest.mark.slow
def test_whatever_is_asked_is_answered_and_no_defect(mic: Mic, daemon: Daemon) -> None:
    @settings(
        max_examples=150,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(
        method=st.sampled_from(METHODS),
        params=st.dictionaries(st.sampled_from(NAMES), values, max_size=4) | values,
    )
    def asked(method: str, params: Any) -> None:
        lines = ask(mic, method, params)
        if lines is not None:
            assert lines[-1].keys() in ({"result"}, {"error"}), lines
            assert all(line.keys() == {"event"} for line in lines[:-1]), lines
            said = lines[-1].get("error", {})
            assert "the daemon's log has more" not in str(said.get("hint")), (method, params, said)

    asked()
    assert daemon.process.poll() is None
    assert "Traceback" not in daemon.text()
    assert "result" in mic.ask("status")


def test_who_may_not_read_the_history_asks_for_it(mic: Mic, daemon: Daemon) -> None:
    """As a member of the group mic: the state directory is root's alone."""
    if os.geteuid() != 0:
        pytest.skip("cannot run: only root can give up the right to read everything")

    def history() -> subprocess.CompletedProcess[str]:
        setpriv = program("setpriv", "util-linux")
        bounds = "-dac_override,-dac_read_search"
        return subprocess.run(
            [setpriv, "--bounding-set", bounds, PROGRAM, "history"],
            env=mic.environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )

    until(lambda: "a-51000000: create done" in mic.here("history").stdout, "the start", timeout=60)
    kept = mic.state_dir / mic.scope / "history.jsonl"
    os.chown(kept, 65534, 65534)
    kept.chmod(0o600)
    asked = history()
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout == mic.here("history").stdout
    daemon.stop()
    refused = history()
    assert refused.returncode == 1
    assert f"cannot read {kept}: Permission denied" in refused.stderr
