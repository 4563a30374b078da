"""The inventory of the fleet: the files that docs/many-machines.md shows."""

from __future__ import annotations

import re

from tests.fleet.namespaces import GPU_HOSTS
from tests.fleet.world import Fleet
from tests.setup.steps import CHECKOUT

GUIDE = CHECKOUT / "docs" / "many-machines.md"
MODELS = "group_vars/gpu_hosts.yaml"


def shown() -> dict[str, str]:
    """The files of the guide, by name."""
    blocks = re.findall(
        r"^```yml\n# (\S+)\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL
    )
    return dict(blocks)


def write(fleet: Fleet) -> None:
    files = shown()
    for path, text in files.items():
        fleet.write(path, text)
    for host in GPU_HOSTS:
        fleet.write(f"host_vars/{host}.yaml", files["host_vars/gpu1.yaml"])


def release(fleet: Fleet, *args: str) -> None:
    """Another revision of the model, as a commit to the inventory's repository would be."""
    text = shown()[MODELS]
    assert text.count("args: [--model, v1]") == 1
    fleet.write(MODELS, text.replace("[--model, v1]", f"[{', '.join(args)}]"))
