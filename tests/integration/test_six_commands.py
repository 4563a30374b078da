"""The README's way from a package to a served model, timed, on machines that systemd runs."""

from __future__ import annotations

import re
import time

import docker
import pytest

from tests.integration.engine_proxy import engine_socket
from tests.setup import debs
from tests.support import systemd, wheel
from tests.support.require import missing

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# As the README's first model. It is asked from inside: its port is published where the engine
# runs, which is another network than this machine's.
HELLO = """\
version: 1
models:
  hello:
    backend: container
    image: mic-test/busybox:1
    command: [httpd, -f, -p, "${port}", -h, /etc]
    env: {PORT: "${port}"}
    probe: {exec: [sh, -c, "wget -qO- http://127.0.0.1:$PORT/passwd"], period: 500ms, timeout: 20s}
gpus:
  0: hello
  1: none
"""


def test_six_commands_lead_from_a_package_to_a_served_model(
    debian: tuple[str, str], engine: docker.APIClient, busybox_image: str, scope: str
) -> None:
    socket = engine_socket()
    if socket is None:
        missing("the engine is not reached through a unix socket")
    image, python = debian
    package = debs.build(wheel.build(), python, "0.1.0").read_bytes()
    taken: dict[str, float] = {}
    with systemd.machine(engine, scope, docker_socket=socket, image=image) as machine:
        machine.boot()
        machine.write("/root/mic.deb", package)
        machine.write("/etc/mic/mic.env", f"MIC_GPU_SOURCE=simulated:2\nMIC_SCOPE={scope}\n")

        def typed(*words: str) -> str:
            begun = time.monotonic()
            done = machine.exec(*words, timeout=120)
            taken[" ".join(words)] = time.monotonic() - begun
            return done.stdout

        typed("dpkg", "--force-unsafe-io", "--force-confold", "--install", "/root/mic.deb")
        assert "/etc/mic/gpus.yaml" in typed("mic-supervisor", "init")
        machine.write("/etc/mic/gpus.yaml", HELLO)  # the editor
        assert re.search(r"^\+ create +hello-51000000  GPU 0", typed("mic-supervisor", "plan"))
        assert "Apply: 1 as desired." in typed("mic-supervisor", "apply")
        assert typed("mic-supervisor", "status").startswith("0\thello\tready\tyes\t")
        (container,) = engine.containers(filters={"name": f"mic-{scope}-hello-"})
        typed("systemctl", "enable", "--now", "mic")
        assert "No changes." in machine.exec("mic-supervisor", "plan").stdout
        assert engine.inspect_container(container["Id"])["State"]["Running"]  # adopted
        machine.sh("systemctl stop mic && mic-supervisor down --yes")
    print("\n".join(f"{seconds:5.1f} s  {words}" for words, seconds in taken.items()))
    assert len(taken) == 6
