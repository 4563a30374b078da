"""What doctor says of the installation itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mic_supervisor import __version__
from mic_supervisor.cli.doctor import lines
from mic_supervisor.doctor import installation


def command(directory: Path, text: str = "#!/bin/sh\n") -> str:
    directory.mkdir()
    path = directory / "mic-supervisor"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_two_installations_are_said_and_two_links_to_one_are_not(tmp_path: Path) -> None:
    one, other = command(tmp_path / "one"), command(tmp_path / "other")
    (tmp_path / "bin").mkdir()
    link = tmp_path / "bin" / "mic-supervisor"
    link.symlink_to(one)
    path = f"{tmp_path}/bin:{tmp_path}/one:{tmp_path}/none:"
    assert lines([*installation.programs(str(link), path, one)]) == [
        f"ok    program: {link}, version {__version__}"
    ]
    [line] = lines([*installation.programs(one, f"{path}:{tmp_path}/other", other)])
    assert line.startswith(
        f"warn  program: there are 2 installations: {one}, {other}; systemd starts {other}; fix: "
    )


def test_a_program_that_cannot_be_started_has_its_reason(tmp_path: Path) -> None:
    path = Path(command(tmp_path / "bin", f"#!{tmp_path}/python3 -I\n"))
    assert installation.unusable(path) == f"needs {tmp_path}/python3, which is not there"
    (tmp_path / "python3").touch()
    assert installation.unusable(path) is None
    path.write_bytes(b"\x7fELF")
    assert installation.unusable(path) is None
    path.chmod(0o644)
    assert installation.unusable(path) == "cannot be executed"
    os.mkfifo(tmp_path / "fifo", 0o755)
    assert installation.unusable(tmp_path / "fifo") == "cannot be executed"
    path.unlink()
    assert installation.unusable(path) == "is not there"


def test_a_second_unit_file_is_said(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("etc", "lib", "none")]
    for place in places[:2]:
        place.mkdir()
    (places[1] / "mic.service").touch()
    assert not [*installation.unit_files("mic.service", map(str, places))]
    (places[0] / "mic.service").touch()
    [line] = lines([*installation.unit_files("mic.service", map(str, places))])
    assert line.startswith(
        f"warn  mic.service: systemd uses {places[0]}/mic.service, "
        f"and not {places[1]}/mic.service; fix: remove {places[0]}/mic.service if "
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps({"a": 1}), "ok    schema: {path} is that of this version"),
        ("", "warn  schema: {path} is empty: editors complete nothing; fix: {fix}"),
        ("{}", "warn  schema: {path} is of another version, or of other plug-ins; fix: {fix}"),
        ("{", "warn  schema: {path} cannot be read: "),
    ],
)
def test_the_schema(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "gpus.schema.json"
    path.write_text(text)
    [line] = lines([*installation.schema([path, tmp_path / "none"], lambda: {"a": 1})])
    fix = f"write it anew: mic-supervisor schema > {path}"
    assert line.startswith(said.format(path=path, fix=fix))


def test_the_group() -> None:
    assert lines([*installation.group("no-such-group")]) == [
        "warn  group no-such-group: does not exist: only root may use the daemon's socket; "
        "fix: systemd-sysusers, or: groupadd --system no-such-group"
    ]
    [line] = lines([*installation.group("root")])
    assert line.startswith("ok    group root: its members may use the daemon's socket: ")
