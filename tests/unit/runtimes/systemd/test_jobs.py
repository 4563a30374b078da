"""What starts leave on disk for PID 1."""

from __future__ import annotations

import os
from pathlib import Path

from mic_supervisor import clocks
from mic_supervisor.runtimes.systemd import jobs as systemd_jobs


def test_only_what_starts_that_were_cut_short_left_is_deleted(tmp_path: Path) -> None:
    """Also while the clock is set: files have their times on the clock that nobody sets."""
    secrets = tmp_path / "secrets"
    systemd_jobs.write_secret(secrets / "under-way", "A=1")
    assert abs((secrets / "under-way").stat().st_mtime - clocks.steady()) < 60
    for name, age in (("left", 3600.0), ("of-an-earlier-boot", -3600.0)):
        (secrets / name).write_text("A=1")
        os.utime(secrets / name, (clocks.steady() - age, clocks.steady() - age))
    systemd_jobs.write_secret(secrets / "new", "A=1")
    assert {item.name for item in secrets.iterdir()} == {"under-way", "new"}
