"""A component that is missing: a failure in CI, a loud skip with the way out elsewhere."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

WAY_OUT = "make test sets this machine up (as root, on Debian 12)"


def missing(what: str, way_out: str = WAY_OUT) -> NoReturn:
    """Ends the test. `what` is a sentence: "no Docker Engine answers"."""
    reason = f"cannot run: {what}; {way_out}"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def program(name: str, package: str) -> str:
    """The path of a program that a Debian package brings."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        missing(f"{name} is not installed", f"apt-get install {package}")
    return found
