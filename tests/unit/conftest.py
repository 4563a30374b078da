"""What holds for all unit tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The checks of types first: without a cache they take half a minute, and whatever of that
    comes last keeps one worker busy alone.
    """
    items.sort(key=lambda item: item.path.stem != "test_quality")
