from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.unit.converge.probed import Server


@pytest.fixture
def server() -> Iterator[Server]:
    with closing(Server()) as made:
        yield made
