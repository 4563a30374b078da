"""The lock of a scope: whose it is."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from mic_supervisor.errors import MicError
from mic_supervisor.host.lock import writer


@pytest.mark.parametrize("was", [None, 0o644, 0o666])
def test_nobody_else_can_open_it_even_where_it_was_made_before(
    tmp_path: Path, was: int | None
) -> None:
    path = tmp_path / "run" / "x.lock"
    if was is not None:
        path.parent.mkdir()
        path.touch()
        path.chmod(was)
    with writer(path, "mic-supervisor run", 1.0):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    target, path = tmp_path / "precious", tmp_path / "x.lock"
    target.write_text("precious")
    path.symlink_to(target)
    with pytest.raises(MicError, match="cannot open the lock"), writer(path, "x", 1.0):
        pass
    assert target.read_text() == "precious"
