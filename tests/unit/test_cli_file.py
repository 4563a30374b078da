"""check, models and schema, as a person calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from mic_supervisor.cli.common import table
from tests.support.mic import Result, here

ROOT = Path(__file__).parents[2]
VALID = """\
version: 1
models:
  换脸: {backend: process, command: [/bin/a, "${port}"]}
  whisper: {backend: container, image: img:1, env: {T: "${env:TOKEN}"}, container_port: 80}
  spare: {backend: container, image: img:1, container_port: 80}
gpus: {"0-1": 换脸, "3,4": whisper, 5: none}
"""


def environment(**more: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("MIC_")}
    return {**inherited, **more}


def mic(*arguments: str | Path, **environ: str) -> Result:
    return here(*arguments, env=environment(**environ), cwd=ROOT)


def program(
    *arguments: str | Path, python: Sequence[str] = (), **environ: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python, "-m", "mic_supervisor.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(**environ),
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "gpus.yaml"
    path.write_text(VALID)
    return path


def test_check_says_what_it_read(config: Path) -> None:
    done = mic("check", config, TOKEN="x")
    assert (done.rc, done.stderr) == (0, "")
    assert done.stdout == f"{config}: valid: 5 GPUs, 1 of them kept empty; 3 models\n"
    (config.parent / "gpus.yaml.d").mkdir()
    (config.parent / "gpus.yaml.d" / "x.yaml").write_text("gpus: {5: spare}\n")
    done = mic("check", MIC_CONFIG=str(config), TOKEN="x")
    assert done.stdout == f"{config}: valid: 5 GPUs; 3 models; 1 drop-in\n"


def test_check_validates_settings_before_they_are_in_place(config: Path, tmp_path: Path) -> None:
    """What a daemon would be given: nothing of this shell counts."""
    new = tmp_path / "new.env"
    new.write_text("MIC_RESYNC=5s\nTOKEN=x\n")
    done = mic("check", "--env-file", new, MIC_RESYNC="soon")
    assert (done.rc, done.stdout) == (0, f"{new}: the settings are valid\n")
    done = mic("check", "--env-file", new, config)
    assert done.rc == 0
    assert done.stdout.startswith(f"{new}: the settings are valid\n{config}: valid: 5 GPUs")
    new.write_text("MIC_RESYNK=5s\n")
    done = mic("check", "--env-file", new)
    assert (done.rc, done.stdout) == (1, "")
    assert f"{new}:1: error: MIC_RESYNK: there is no such setting; did you mean" in done.stderr
    assert mic("check", "--env-file", tmp_path / "none").rc == 64


@pytest.mark.parametrize(
    ("instance", "url"),
    [
        ("a", "http://127.0.0.1:99999"),
        ("a", "http://127.0.0.1:x"),
        ("a", "http://[::1"),
        ("a", "http://127.0.0.1"),
        ("a", "x"),
        ("a", "http://h;}evil:80"),
        ("a\nevil;", "http://127.0.0.1:80"),
    ],
)
def test_export_refuses_what_no_daemon_gives(tmp_path: Path, instance: str, url: str) -> None:
    path = tmp_path / "given"
    one = {"instance": instance, "endpoints": {"http": url}}
    path.write_text(json.dumps({"models": {"m": [one]}}))
    done = mic("export", "nginx", "--from", path)
    assert (done.rc, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: cannot read the endpoints in {path}: ")
    path.write_text("[" * 100_000)
    assert mic("export", "nginx", "--from", path).stderr == done.stderr


def test_the_journal_gets_no_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gpus.yaml"
    path.write_text("root:$y$canary:20000:::::\n")
    with (tmp_path / "journal").open("w+") as journal:
        found = os.fstat(journal.fileno())
        for stream in (f"{found.st_dev}:{found.st_ino}", "1:2"):
            environ = {**os.environ, "MIC_CONFIG": str(path), "JOURNAL_STREAM": stream}
            command = [sys.executable, "-m", "mic_supervisor.cli", "check"]
            assert subprocess.run(command, stderr=journal, cwd=ROOT, env=environ).returncode == 1
            journal.seek(0)
            assert ("canary" in journal.read()) == (stream == "1:2")


def test_check_names_what_lies_among_the_drop_ins_and_is_not_read(config: Path) -> None:
    drop_ins = config.parent / "gpus.yaml.d"
    drop_ins.mkdir()
    for name in ("10-a.yaml", "20.yml", "30.YAML", "40.yaml~", ".50.yaml.swp", "60.yaml.bak"):
        (drop_ins / name).write_text("gpus: {5: spare}\n")
    done = mic("check", config, TOKEN="x")
    assert (done.rc, done.stdout.endswith("1 drop-in\n")) == (0, True)
    why = "is not read: the name of a drop-in ends in .yaml, and begins with no dot"
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("warning")] == [
        f"warning: {drop_ins / name} {why}"
        for name in (".50.yaml.swp", "20.yml", "30.YAML", "40.yaml~", "60.yaml.bak")
    ]
    ways_out = [line.split() for line in lines if "rename it: mv " in line]
    assert [Path(way[3]).name for way in ways_out] == ["20.yml", "30.YAML"]
    for way in ways_out:
        subprocess.run(way[2:], check=True)
    assert mic("check", config, TOKEN="x").stdout.endswith("3 drop-ins\n")


def test_check_reports_on_stderr_and_fails(config: Path) -> None:
    done = mic("check", config)
    assert (done.rc, done.stdout) == (1, "")
    assert done.stderr == (
        f"{config}:4:57: error: models.whisper.env.T: ${{env:TOKEN}} is not set\n"
        '      whisper: {backend: container, image: img:1, env: {T: "${env:TOKEN}"}, '
        "container_port: 80}\n"
        "                                                            ^\n"
        "    set it in the environment of mic-supervisor, or in /etc/mic/mic.env\n"
    )


@pytest.mark.parametrize("command", ["schema", "models", "check"])
def test_a_terminal_of_another_encoding_gets_escapes(config: Path, command: str) -> None:
    file = () if command == "schema" else (config,) if command == "check" else ()
    done = program(command, *file, TOKEN="x", MIC_CONFIG=str(config), PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, "")
    if command == "models":
        assert "\\u6362\\u8138" in done.stdout


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {},
            "/etc/mic/gpus.yaml: error: cannot read the file: no such file or directory\n"
            "    run `mic-supervisor init` to write a first one\n",
        ),
        (
            {"MIC_CONFIGS": "x"},
            "environment: error: MIC_CONFIGS: there is no such setting; did you mean MIC_CONFIG?\n",
        ),
    ],
)
def test_what_is_missing_is_said(environ: dict[str, str], message: str) -> None:
    if Path("/etc/mic").exists():
        pytest.skip("this machine has a configuration of its own")
    done = mic("check", **environ)
    assert (done.rc, done.stdout, done.stderr) == (1, "", message)


def test_wrong_usage_is_64(config: Path) -> None:
    assert mic("check", config, config).rc == 64
    assert mic("models", "--jsn").rc == 64
    assert mic("schema", "x").rc == 64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stat"], "there is no command 'stat'; did you mean status?"),
        (["re"], "there is no command 're'\n"),
        (["logs", "-n", "x"], "'x' is not a valid whole number."),
        (["kill", "mic"], "'mic' is not a valid whole number."),
        (["claim", "a", "--gpus", "0"], "0 is not in the range 1<=x<=128."),
    ],
)
def test_wrong_usage_says_what_is_wrong(arguments: list[str], words: str) -> None:
    done = mic(*arguments)
    assert (done.rc, words in done.stderr) == (64, True), done.stderr


def test_models(config: Path) -> None:
    environ = {"MIC_CONFIG": str(config), "TOKEN": "x"}
    done = mic("models", **environ)
    assert (done.rc, done.stderr) == (0, "")
    assert done.stdout == "换脸\tprocess\t0 1\nwhisper\tcontainer\t3,4\nspare\tcontainer\t\n"
    document = json.loads(mic("models", "--json", **environ).stdout)
    assert (document["version"], document["host"]) == (1, os.uname().nodename)
    assert document["models"] == [
        {"name": "换脸", "backend": "process", "gpus": ["0", "1"]},
        {"name": "whisper", "backend": "container", "gpus": ["3,4"]},
        {"name": "spare", "backend": "container", "gpus": []},
    ]


def test_models_fails_as_check_does(config: Path) -> None:
    done = mic("models", "--json", MIC_CONFIG=str(config))
    assert (done.rc, done.stdout) == (1, "")
    assert done.stderr == mic("check", config).stderr


def test_the_table_lines_up_in_every_script(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("换脸", "command", "0"), ("whisper", "command", "-")]
    Console(width=80).print(table("MODEL BACKEND GPUS", rows, gives="MODEL", width=80))
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "MODEL    BACKEND  GPUS",
        "换脸     command  0",
        "whisper  command  -",
    ]


def test_schema_is_one_json_document() -> None:
    done = mic("schema")
    assert (done.rc, done.stderr) == (0, "")
    schema = json.loads(done.stdout)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]["backends"]["properties"]) >= {"container", "process", "triton"}


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["check"], {"pydantic", "pydantic_settings", "asyncio"}),  # the settings bring asyncio
        (["models"], {"pydantic", "pydantic_settings", "asyncio"}),
        (["schema"], {"pydantic"}),
        (["--version"], set()),
        (["--help"], set()),
    ],
)
def test_nothing_heavy_is_imported(config: Path, arguments: list[str], needed: set[str]) -> None:
    done = program(*arguments, python=("-X", "importtime"), MIC_CONFIG=str(config), TOKEN="x")
    assert done.returncode == 0
    found = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert needed <= found
    heavy = {"docker", "pynvml", "starlette", "asyncio", "rich", "pydantic", "pydantic_settings"}
    more = {"httpx", "jinja2", "requests", "tritonclient", "google.protobuf"}
    assert found & (heavy | more) == needed
