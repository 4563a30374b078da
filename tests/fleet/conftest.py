"""The fleet that the tests of this folder share. Each leaves it with every instance serving."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet import inventory
from tests.fleet.controller import Controller
from tests.fleet.machine import SITE
from tests.fleet.namespaces import make_key
from tests.fleet.world import Fleet, world
from tests.setup import fleet as setup
from tests.support.require import missing


@pytest.fixture(scope="package")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three hosts that serve a first revision behind nginx."""
    with world(tmp_path_factory.mktemp("fleet")) as made:
        inventory.write(made)
        made.play("site.yaml")
        with made.nginx():
            made.play("mic.supervisor.apply")
            made.serves("v1")
            yield made


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    """Ansible, with a playbook for the role `supervisor`."""
    if not setup.ready():
        missing("there is no OpenSSH server, or no Ansible", "make test-fleet")
    made = Controller(tmp_path)
    made.configure()
    make_key(tmp_path / "host_key")
    made.write("site.yaml", SITE)
    return made
