from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.runtimes.process_world import World


@pytest.fixture
def world(tmp_path: Path, scope: str) -> World:
    """Processes that the fixture `scope` ends after the test, whatever happens in it."""
    return World(tmp_path, scope)
