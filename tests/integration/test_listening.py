"""Who listens on a port, and on which port a container does: real sockets, groups, an engine."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mic_supervisor.converge.listening import is_own
from mic_supervisor.demo import server
from mic_supervisor.host import processes
from mic_supervisor.model import Identity, ObservedWorkload, ProcessSpec, RunState
from tests.integration.job_world import World
from tests.support import require
from tests.support.waiting import http, until

Start = Callable[[str, int], None]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a server in a control group of version 2, as systemd makes one for a unit."""
    tops = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
    top = next((top for top in tops if (top / "cgroup.procs").exists()), None)
    if top is None or not os.access(top, os.W_OK):
        require.missing("no control group of version 2 can be made here")
    around = top / f"mic-test-{uuid.uuid4().hex[:8]}"
    around.mkdir()
    with ExitStack() as left:
        left.callback(around.rmdir)

        def begin(unit: str, port: int) -> None:
            group = around / unit
            group.mkdir()
            left.callback(group.rmdir)
            left.callback(until, lambda: not (group / "cgroup.procs").read_text(), "its end")
            enter = f'echo $$ > "{group}/cgroup.procs" && exec "$@"'
            process = subprocess.Popen(
                ["sh", "-c", enter, "sh", sys.executable, server.__file__],
                env={"PORT": str(port)},
            )
            left.callback(process.wait)
            left.callback(process.kill)
            until(lambda: http(f"http://127.0.0.1:{port}/health").status == 200, "the server")

        yield begin


def test_who_listens_is_told_by_control_groups_where_no_process_may_be_looked_at(
    start: Start, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under mic.service: root without CAP_SYS_PTRACE."""
    ours, foreign = free_port(), free_port()
    start("mic-t-a-0badcafe.service", ours)
    start("nginx.service", foreign)
    identity = Identity("t", "h", "a", "m", "process", (), {"http": ours}, {}, "0")
    ref = "mic-t-a-0badcafe.service"
    workload = ObservedWorkload("systemd", ref, ref, identity, RunState.RUNNING)
    spec = ProcessSpec(("x",))
    assert is_own(workload, spec, foreign)[0] is False
    seen = [one._replace(pid=None) for one in processes.psutil.net_connections("tcp")]
    monkeypatch.setattr(processes.psutil, "net_connections", lambda _: seen)
    assert processes.listener_owners()[foreign].name == "nginx.service"
    assert is_own(workload, spec, ours) == (True, "")
    assert is_own(workload, spec, foreign) == (False, "unit nginx.service")
    assert is_own(workload, spec, free_port()) == (None, "")


@pytest.mark.engine
def test_a_container_that_listens_on_another_port_is_told_so(job: World, server_image: str) -> None:
    entry = f"image: {server_image}, command: [model-server, --port, '9000'], stop_timeout: 1s"
    job.mic.write(f"""
        version: 1
        models: {{m: {{backend: container, {entry}, probe: {{http: /health, period: 300ms}},
          start_timeout: 6s, container_port: 9001}}}}
        gpus: {{0: m}}
        """)
    said = job.mic("apply", rc=1).stdout
    assert "it listens on port 9000: let it listen on ${port}, or write the port" in said
    right = job.mic.config.read_text().replace("9001", "9000")
    job.mic.write(right.replace("probe:", "env: {HOST: 127.0.0.1}, probe:"))
    said = job.mic("apply", rc=1).stdout
    assert "in the container it listens on 127.0.0.1 only: let it listen on 0.0.0.0" in said
    job.mic.write(right)
    job.mic("apply", rc=0)
