from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.daemon.files import ORDERS, Files


@pytest.fixture
def files(tmp_path: Path) -> Files:
    found = Files(tmp_path)
    found.path.write_text(ORDERS["GPUs last"])
    return found
