"""install and uninstall: into a directory of the test's own, as often as one likes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from mic_supervisor.cli import COMMANDS, install
from mic_supervisor.config.schema import json_schema
from tests.support.mic import PROGRAM, Mic

NAMES = {
    "lib/systemd/system/mic.service",
    "lib/sysusers.d/mic.conf",
    "share/mic/gpus.schema.json",
    "share/man/man1/mic-supervisor.1",
    "share/bash-completion/completions/mic-supervisor",
    "share/fish/vendor_completions.d/mic-supervisor.fish",
    "share/zsh/site-functions/_mic-supervisor",
}


@pytest.fixture
def prefix(mic: Mic, tmp_path: Path) -> Path:
    mic.env["MIC_DOCKER_HOST"] = "none"
    return tmp_path / "prefix"


def below(prefix: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(prefix)): (path.stat().st_mtime_ns, path.read_text())
        for path in prefix.rglob("*")
        if path.is_file()
    }


def test_install_writes_what_belongs_to_this_installation_and_twice_changes_nothing(
    mic: Mic, prefix: Path
) -> None:
    said = mic.here("install", "--prefix", prefix, rc=0)
    found = below(prefix)
    assert set(found) >= NAMES
    unit = found["lib/systemd/system/mic.service"][1]
    assert f"ExecStart={PROGRAM} run\n" in unit and f"ExecReload={PROGRAM} reload" in unit
    assert json.loads(found["share/mic/gpus.schema.json"][1]) == mic.here("schema", rc=0).json()
    assert found["lib/sysusers.d/mic.conf"][1].endswith("g mic -\n")
    hook = prefix / "share/doc/mic-supervisor/examples/endpoints-changed"
    assert hook.stat().st_mode & 0o777 == 0o755
    assert "Next: systemd-sysusers, then: systemctl daemon-reload\n" in said.stdout
    again = mic.here("install", "--prefix", prefix, rc=0)
    assert again.stdout == f"All {len(found) - 1} files below {prefix} are as they should be.\n"
    assert below(prefix) == found


def test_a_dry_run_names_the_same_files_and_writes_none(mic: Mic, prefix: Path) -> None:
    said = mic.here("install", "--prefix", prefix, "--dry-run", rc=0).stdout
    assert not prefix.exists()
    names = {line.removeprefix("would write ") for line in said.splitlines() if "would" in line}
    assert names >= {str(prefix / name) for name in NAMES}


def test_a_file_that_was_changed_is_neither_replaced_nor_removed(mic: Mic, prefix: Path) -> None:
    mic.here("install", "--prefix", prefix, rc=0)
    unit = prefix / install.UNIT
    unit.write_text("mine")
    before = below(prefix)
    refused = mic.here("install", "--prefix", prefix, rc=1)
    assert refused.stderr.startswith(f"error: cannot write {unit}: it was changed")
    assert below(prefix) == before
    said = mic.here("uninstall", "--prefix", prefix, rc=0)
    assert f"warning: {unit} was changed, and stays\n" in said.stderr
    assert [*below(prefix)] == [install.UNIT]


def test_a_newer_version_replaces_what_an_older_one_wrote(mic: Mic, prefix: Path) -> None:
    mic.here("install", "--prefix", prefix, rc=0)
    record = prefix / "share/mic/installed.json"
    (prefix / install.UNIT).write_text("old")
    gone = prefix / "share/mic/gone"
    gone.write_text("old")
    digest = install._digest("old")
    record.write_text(json.dumps({install.UNIT: digest, "share/mic/gone": digest}))
    said = mic.here("install", "--prefix", prefix, rc=0).stdout.splitlines()
    assert said[:2] == [f"writes {prefix / install.UNIT}", f"removes {gone}"]
    assert not gone.exists() and "ExecStart" in (prefix / install.UNIT).read_text()


def test_uninstall_removes_what_install_wrote_and_can_be_repeated(mic: Mic, prefix: Path) -> None:
    other = prefix / "share" / "man" / "man1" / "other.1"
    other.parent.mkdir(parents=True)
    other.touch()
    mic.here("install", "--prefix", prefix, rc=0)
    before = below(prefix)
    mic.here("uninstall", "--prefix", prefix, "--dry-run", rc=0)
    assert below(prefix) == before
    said = mic.here("uninstall", "--prefix", prefix, rc=0).stdout
    assert said.startswith("No instance runs here.\n")
    assert [*below(prefix)] == [str(other.relative_to(prefix))]
    left = {str(path.relative_to(prefix)) for path in prefix.rglob("*mic*")}
    assert left == set()
    again = mic.here("uninstall", "--prefix", prefix, rc=0).stdout
    assert again.endswith(f"Nothing below {prefix} was written by `mic-supervisor install`.\n")


def test_uninstall_names_what_runs_on(mic: Mic, prefix: Path) -> None:
    mic.write("""
        version: 1
        models: {idle: {backend: process, command: [/bin/sleep, infinity]}}
        gpus: {0: idle}
    """)
    mic("apply", rc=0)
    said = mic.here("uninstall", "--prefix", prefix, rc=0).stdout.splitlines()
    assert said[:2] == [
        "These go on running: idle-51000000",
        "To end them, once no daemon runs: mic-supervisor down",
    ]
    assert mic.status()["instances"][0]["as_desired"]


def test_a_damaged_record_and_a_directory_that_refuses_are_said(mic: Mic, prefix: Path) -> None:
    record = prefix / "share/mic/installed.json"
    record.parent.mkdir(parents=True)
    for text in ("{", "[]", '{"/etc/x": ""}', '{"../x": ""}'):
        record.write_text(text)
        for command in ("install", "uninstall"):
            refused = mic.here(command, "--prefix", prefix, rc=1).stderr
            assert refused.startswith(f"error: cannot read {record}: ")
    record.unlink()
    (prefix / "lib").touch()
    refused = mic.here("install", "--prefix", prefix, rc=1).stderr
    assert refused.startswith(f"error: cannot read {prefix / install.UNIT}: ")


def test_the_man_page_has_every_command_and_is_clean_roff(tmp_path: Path) -> None:
    page = tmp_path / "mic-supervisor.1"
    page.write_text(install.man_page())
    shown = subprocess.run(
        ["man", "--warnings", "-P", "cat", "-l", str(page)],
        capture_output=True,
        text=True,
        env={"MANWIDTH": "100", "LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"},
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    for name in COMMANDS:
        assert f"\n   {name}" in shown.stdout
    assert "--detailed-exitcode" in shown.stdout
    # No line of a paragraph is set apart, as one that begins with a blank would be.
    assert "is started on it, and nobody who uses it is stopped. Examples" in " ".join(
        shown.stdout.split()
    )
    assert "\n        " not in shown.stdout.partition("COMMANDS")[2].partition("--from-running")[0]


def test_bash_completes_commands(mic: Mic, prefix: Path) -> None:
    mic.here("install", "--prefix", prefix, rc=0)
    script = prefix / "share/bash-completion/completions/mic-supervisor"
    done = subprocess.run(
        [
            "bash",
            "-c",
            f". {script}; COMP_WORDS=(mic-supervisor unin) COMP_CWORD=1; "
            f'_mic_supervisor_completion {PROGRAM}; echo "${{COMPREPLY[@]}}"',
        ],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "uninstall\n", done


def test_the_schema_is_the_one_that_the_command_prints(mic: Mic) -> None:
    from mic_supervisor.backends.registry import Registry

    assert json.loads(install.files("/x")[install.SCHEMA]) == json_schema(Registry())
