"""`mic-supervisor doctor`: what each check finds, and that none stands in another's way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mic_supervisor.cli.doctor import lines, table
from mic_supervisor.config.settings import Settings
from mic_supervisor.doctor import (
    Check,
    Finding,
    checks,
    examine,
    ok,
    warn,
)
from mic_supervisor.errors import RuntimeUnavailable
from tests.support.mic import Mic


def said(findings: Iterator[Finding] | list[Finding]) -> list[str]:
    return lines([*findings])


# --- the checks as a whole --------------------------------------------------------------------


def test_one_that_hangs_raises_or_refuses_leaves_the_others() -> None:
    release = threading.Event()

    def hangs() -> Iterator[Finding]:
        release.wait(30)
        yield ok("a", "too late")

    def raises() -> Iterator[Finding]:
        yield ok("b", "half of it")
        raise ZeroDivisionError("a defect")

    def refuses() -> Iterator[Finding]:
        raise RuntimeUnavailable("cannot reach it: it is gone", hint="start it")

    began = time.monotonic()
    found = examine(
        [
            Check("a", hangs),
            Check("b", raises),
            Check("c", refuses),
            Check("d", lambda: [ok("d", "well"), warn("d", "ill", "rest")]),
        ],
        bound=2.0,
    )
    assert time.monotonic() - began < 20
    release.set()
    assert lines(found) == [
        "fail  a: cannot be checked: no answer within 2 s",
        "fail  b: cannot be checked: ZeroDivisionError: a defect",
        "fail  c: cannot reach it: it is gone; fix: start it",
        "ok    d: well",
        "warn  d: ill; fix: rest",
    ]


def test_a_table_of_eighty_columns() -> None:
    findings = [
        ok("gpus", "4 of them (NVIDIA A100), driver 575.57.08"),
        warn(
            "docker live-restore",
            "is off: every container ends when Docker is restarted or upgraded",
            'set "live-restore": true in /etc/docker/daemon.json, then: systemctl reload docker',
        ),
    ]
    assert table(findings, 80) == [
        "\x1b[32mok  \x1b[0m  gpus                 4 of them (NVIDIA A100), driver 575.57.08",
        "\x1b[33mwarn\x1b[0m  docker live-restore  "
        "is off: every container ends when Docker is restarted",
        "                           or upgraded",
        '                           fix: set "live-restore": true in',
        "                                /etc/docker/daemon.json, then: systemctl reload",
        "                                docker",
    ]


def test_a_table_without_colours() -> None:
    assert table([ok("gpus", "4 of them")], 80, colours=False) == ["ok    gpus  4 of them"]


# --- files ------------------------------------------------------------------------------------


def test_directories(tmp_path: Path) -> None:
    state, run = tmp_path / "state", tmp_path / "run"
    settings = Settings(state_dir=state, run_dir=run)
    found = said(checks.directories(settings))
    assert all("it is made with the first start" in line for line in found)
    state.mkdir(mode=0o700)
    run.mkdir()
    run.chmod(0o777)
    found = said(checks.directories(settings))
    assert found[0].startswith(("ok    state: ", "warn  state: "))
    assert found[1] == (f"warn  run: {run} is open to others (mode 777); fix: chmod go-w {run}")
    state.chmod(0o755)
    assert said(checks.directories(settings))[0] == (
        f"warn  state: {state} is open to others (mode 755); fix: chmod 700 {state}"
    )
    scope = state / settings.scope
    scope.mkdir()
    (scope / "memory.json").write_text("{")
    state.chmod(0o700)
    assert any(
        line.startswith(
            f"warn  state: {scope / 'memory.json'} was damaged, and what it held is lost"
        )
        for line in said(checks.directories(settings))
    )
    (scope / "memory.json").unlink()
    scope.rmdir()
    state.rmdir()
    state.write_text("")
    assert said(checks.directories(settings))[0] == (
        f"fail  state: cannot write to {state}; fix: run as root, or point MIC_STATE_DIR to a "
        "directory you may write to"
    )


# --- the command ------------------------------------------------------------------------------


def tree(home: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in sorted(home.rglob("*"))
    }


def test_it_finds_what_is_wrong_with_a_configuration_and_changes_nothing(
    mic: Mic, tmp_path: Path
) -> None:
    mic.env["MIC_DOCKER_HOST"] = "none"
    secrets = tmp_path / "whisper.env"
    secrets.write_text("TOKEN=s3cret\n")
    secrets.chmod(0o644)
    mic.write(
        f"""
        version: 1
        models:
          good: {{backend: process, command: [/bin/sleep, "9"], env_file: {secrets}}}
          bad: {{backend: process, command: [/bin/sleep, "9"], env_file: /no/such.env}}
        gpus: {{0: good, 1: bad}}
        """
    )
    mic.state_dir.chmod(0o700)
    before = tree(mic.home)
    done = mic.here("doctor", rc=1)
    assert tree(mic.home) == before
    assert done.stderr == ""
    assert "s3cret" not in done.stdout
    found = done.stdout.splitlines()
    assert f"ok    settings: scope {mic.scope}" in found
    assert f"ok    config: {mic.config} is valid: 2 GPUs; 2 models" in found
    assert (
        "fail  models: bad on GPU 1: cannot configure bad: its env_file /no/such.env cannot be "
        "read: No such file or directory; fix: create /no/such.env, or name another file"
    ) in found
    assert (
        f"warn  models: {secrets} can be read by users other than its owner; "
        f"fix: chmod 600 {secrets}"
    ) in found
    assert "ok    models: 1 instance can be configured" in found
    assert "ok    gpus: 4 simulated by MIC_GPU_SOURCE" in found

    secrets.chmod(0o600)
    mic.write("{version: 1, models: {g: {backend: process, command: [/bin/true]}}, gpus: {0: g}}")
    document = mic.here("doctor", "--json", rc=0).json()
    assert document["version"] == 1
    assert document["ok"] is True
    assert {"level", "subject", "text", "mend"} == set(document["findings"][0])
    assert {item["level"] for item in document["findings"]} == {"ok", "warn"}


def test_an_invalid_file_and_none_at_all(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = "none"
    found = mic.here("doctor", rc=1).stdout.splitlines()
    assert (
        f"fail  config: {mic.config} does not exist; "
        "fix: write a first one with: mic-supervisor init"
    ) in found
    mic.write("{version: 1, gpus: {0: nothing}}")
    found = mic.here("doctor", rc=1).stdout.splitlines()
    (line,) = [line for line in found if "  config: " in line]
    assert line.endswith("; fix: see all of its errors: mic-supervisor check")


def test_settings_that_cannot_be_read(mic: Mic) -> None:
    mic.env["MIC_RESYNC"] = "soon"
    done = mic.here("doctor", rc=1)
    assert done.stdout.startswith("fail  settings: cannot read the settings: environment: MIC_RES")


def test_an_engine_that_is_away_is_said_once(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = "unix:///no/such.sock"
    mic.write("{version: 1, models: {g: {backend: container, image: x}}, gpus: {0: g}}")
    found = mic.here("doctor", rc=1).stdout.splitlines()
    (line,) = [line for line in found if "/no/such.sock" in line]
    assert line.startswith("fail  docker: cannot ask for the engine's version: ")


@pytest.mark.engine
def test_images_of_the_file(mic: Mic, busybox_image: str) -> None:
    mic.write(
        f"""
        version: 1
        models:
          a: {{backend: container, image: "{busybox_image}"}}
          b: {{backend: container, image: "mic-test/nowhere:1"}}
        gpus: {{0: a, 1: b}}
        """
    )
    found = mic.here("doctor", rc=0).stdout.splitlines()
    assert [line for line in found if "  images: " in line] == [
        f"ok    images: {busybox_image} is here",
        "warn  images: mic-test/nowhere:1 is not here: the next start pulls it first; "
        "fix: pull it now with: docker pull mic-test/nowhere:1",
    ]


@pytest.mark.slow
def test_beside_a_running_daemon(mic: Mic) -> None:
    from tests.support.waiting import until

    mic.env["MIC_DOCKER_HOST"] = "none"
    mic.write(
        "{version: 1, models: {g: {backend: process, command: [/bin/sleep, '9']}}, gpus: {0: g}}\n"
    )
    daemon = mic.run()
    found = mic.here("doctor", rc=0).stdout.splitlines()
    assert f"ok    http: the daemon answers at {mic.listen}" in found
    (line,) = [line for line in found if "  daemon: " in line]
    assert line.startswith(
        f"ok    daemon: answers at {mic.socket}; the lock is held by PID {daemon.pid} "
        "(mic-supervisor run, by "
    )
    mic.write("{version: 2}")
    rejected = f"warn  daemon: rejected {mic.config} as it is now; what was good before keeps "
    until(lambda: rejected in mic.here("doctor", rc=1).stdout, "the rejection")
    assert daemon.stop() == 0
