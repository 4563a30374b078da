"""A container that loses its GPU while it runs: the daemon, a real engine, the mock NVML.

What `systemctl daemon-reload` does to a container in legacy mode shows inside alone, as an
`nvidia-smi` that fails. Here that is a script on a mount, which a test has fail.
"""

from __future__ import annotations

from pathlib import Path

import docker
import pytest

from tests.integration.daemon_world import container, daemon_world
from tests.mock_nvml import MockGpu, MockNvml
from tests.support.waiting import until

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("device_requests")]

FAILS = "Failed to initialize NVML: Unknown Error"
NVIDIA_SMI = f"""#!/bin/sh
if test -e /gpu/$HOSTNAME; then echo '{FAILS}'; exit 255; fi
echo 'GPU 0: Mock A100 (UUID: GPU-a0000000)'
"""


def test_a_container_that_lost_its_gpu_is_made_anew_and_its_neighbour_is_not(
    tmp_path: Path, engine: docker.APIClient, busybox_image: str
) -> None:
    assert busybox_image
    tool, lost = tmp_path / "nvidia-smi", tmp_path / "gpu"
    tool.write_text(NVIDIA_SMI)
    tool.chmod(0o755)
    lost.mkdir()
    nvml = MockNvml(tmp_path)
    nvml.set([MockGpu(), MockGpu(), MockGpu()])
    mounts = (
        f"mounts: [{{source: {tool}, target: /bin/nvidia-smi, read_only: true}}, "
        f"{{source: {lost}, target: /gpu, read_only: true}}]"
    )
    with daemon_world(tmp_path / "world", engine, nvml=nvml) as world:
        world.write({0: "a", 1: "a", 2: "blank"}, a=container(mounts), blank=container())
        daemon = world.mic.run()
        names = ("a-a0000000", "a-a0000001", "blank-a0000002")
        world.converged(*names)
        before = {name: row["container_id"] for name, row in world.rows().items()}

        (lost / before["a-a0000001"][:12]).touch()

        cause = (
            "it lost its GPU inside the container, as a systemd daemon-reload does in legacy mode: "
            f"nvidia-smi says there: “{FAILS}”"
        )
        until(lambda: f"a-a0000001: replace: {cause}" in daemon.text(), "that", timeout=180)
        until(
            lambda: world.rows()["a-a0000001"]["container_id"] != before["a-a0000001"],
            "another container",
        )
        world.converged(*names)
        now = {name: row["container_id"] for name, row in world.rows().items()}
        # One has it yet; of the other image nobody can tell, and it is left alone.
        assert {**now, "a-a0000001": ""} == {**before, "a-a0000001": ""}
        assert world.rows()["a-a0000001"]["restarts"] == 0
        assert daemon.stop() == 0
