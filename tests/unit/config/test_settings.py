"""The MIC_* variables and the file that may hold them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from mic_supervisor.config.diagnostics import InvalidConfig
from mic_supervisor.config.settings import (
    VARIABLES,
    Address,
    GpuSourceSetting,
    PortRange,
    Settings,
    load_settings,
)
from mic_supervisor.errors import ConfigError


def errors(environ: dict[str, str], env_file: Path) -> list[str]:
    with pytest.raises(InvalidConfig) as caught:
        load_settings(environ, env_file)
    assert isinstance(caught.value, ConfigError)
    return caught.value.rendered.splitlines()


def test_without_anything_the_defaults_hold(tmp_path: Path) -> None:
    found = load_settings({}, tmp_path / "none")
    assert found == Settings()
    assert found.config == Path("/etc/mic/gpus.yaml")
    assert found.listen == Address("127.0.0.1", 6004)
    assert found.socket == Path("/run/mic/mic.sock")
    assert found.scope_state_dir == Path("/var/lib/mic/default")
    assert found.lock_path == Path("/run/mic/default.lock")
    assert found.gpu_source == GpuSourceSetting("nvml")
    assert found.port_range == PortRange(20000, 20999)
    assert (found.resync, found.scope, found.on_stop) == (10.0, "default", "keep")
    assert (found.process_runtime, found.docker_host, found.prune_on_watch) == ("auto", None, False)
    assert (found.log_level, found.log_format, found.unread) == ("info", "text", None)


def test_each_scope_has_a_socket_of_its_own(tmp_path: Path) -> None:
    def socket(**environ: str) -> str:
        return str(load_settings(environ, tmp_path / "none").socket)

    assert socket() == socket(MIC_SCOPE="default") == "/run/mic/mic.sock"
    assert socket(MIC_SCOPE="lab") == "/run/mic/lab.sock"
    assert socket(MIC_SCOPE="lab", MIC_SOCKET="/run/x") == "/run/x"


def test_every_variable_of_the_contract_is_there() -> None:
    names = """
        CONFIG LISTEN SOCKET STATE_DIR RUN_DIR DOCKER_HOST GPU_SOURCE PROCESS_RUNTIME PORT_RANGE
        RESYNC SCOPE ON_STOP DOCKER_CONFIG HTTP_TOKEN_FILE HTTP_OPEN HTTP_HOSTS
        PRUNE_ON_WATCH CLAIM_GRACE WATCH LOG_LEVEL LOG_FORMAT
    """
    assert set(VARIABLES) == {f"MIC_{name}" for name in names.split()}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("CONFIG", "/a/b.yaml", Path("/a/b.yaml")),
        ("LISTEN", "0.0.0.0:80", Address("0.0.0.0", 80)),
        ("LISTEN", "[::1]:6004", Address("::1", 6004)),
        ("HTTP_HOSTS", "gpu-01.Example.com, status", ("gpu-01.example.com", "status")),
        ("GPU_SOURCE", "none", GpuSourceSetting("none")),
        ("GPU_SOURCE", "simulated:4", GpuSourceSetting("simulated", 4)),
        ("PORT_RANGE", "1-65535", PortRange(1, 65535)),
        ("RESYNC", "500ms", 0.5),
        ("SCOPE", "demo-2", "demo-2"),
        ("SCOPE", "a" * 31, "a" * 31),
        ("DOCKER_HOST", "unix:///run/x.sock", "unix:///run/x.sock"),
        ("DOCKER_HOST", "tcp://h:2376", "tcp://h:2376"),
        ("DOCKER_CONFIG", "/root/.docker", Path("/root/.docker")),
        ("PRUNE_ON_WATCH", "TRUE", True),
        ("PRUNE_ON_WATCH", "0", False),
        ("WATCH", "apply", "apply"),
        ("WATCH", "plan", "plan"),
        ("LOG_LEVEL", "debug", "debug"),
        ("LOG_FORMAT", "json", "json"),
        ("PROCESS_RUNTIME", "systemd", "systemd"),
    ],
)
def test_values(tmp_path: Path, name: str, text: str, value: object) -> None:
    found = load_settings({f"MIC_{name}": text}, tmp_path / "none")
    assert getattr(found, name.lower()) == value


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("CONFIG", "", "is empty: give it a value, or remove it"),
        ("LISTEN", "6004", "'6004' is no address and port: "),
        ("LISTEN", "localhost:6004", "'localhost:6004' is no address and port: "),
        ("LISTEN", "::1:6004", "'::1:6004' is no address and port: "),
        ("LISTEN", "[127.0.0.1]:6004", "'[127.0.0.1]:6004' is no address and port: "),
        ("LISTEN", "127.0.0.1:0", "'127.0.0.1:0' is no address and port: "),
        ("LISTEN", "127.0.0.1:65536", "'127.0.0.1:65536' is no address and port: "),
        ("SOCKET", "mic.sock", "'mic.sock' is not an absolute path: begin it with /"),
        ("STATE_DIR", "", "'' is not an absolute path: begin it with /"),
        ("DOCKER_HOST", "/run/docker.sock", "'/run/docker.sock' is no address of an engine: "),
        *(
            (
                "DOCKER_HOST",
                address,
                f"'{address}' is no address of an engine that is used (GPUs and processes are "
                "looked at on this machine alone): write it as in unix:///run/docker.sock or ",
            )
            for address in ("ssh://me@h", "https://h:2376", "http://h:2375")
        ),
        ("GPU_SOURCE", "simulated", "'simulated' is no source of GPUs: "),
        ("GPU_SOURCE", "simulated:0", "'simulated:0' is no source of GPUs: "),
        ("GPU_SOURCE", "simulated:65", "'simulated:65' is no source of GPUs: "),
        ("PORT_RANGE", "20000", "'20000' is no range of ports: "),
        ("PORT_RANGE", "20999-20000", "'20999-20000' is no range of ports: "),
        ("PORT_RANGE", "0-10", "'0-10' is no range of ports: "),
        ("PORT_RANGE", "1-65536", "'1-65536' is no range of ports: "),
        ("RESYNC", "10", "'10' is not a duration: a number needs a unit: write `10s` or `10m`"),
        ("RESYNC", "0s", "0s is no time at all: "),
        ("SCOPE", "", "'' is no scope: "),
        ("SCOPE", "-a", "'-a' is no scope: "),
        ("SCOPE", "Prod", "'Prod' is no scope: "),
        ("SCOPE", "a/b", "'a/b' is no scope: "),
        ("SCOPE", "a\n", "'a\\n' is no scope: "),
        ("SCOPE", "a" * 32, f"'{'a' * 32}' is no scope: "),
        ("ON_STOP", "kill", "'kill' is not known: write keep or stop"),
        ("PROCESS_RUNTIME", "x", "'x' is not known: write auto, systemd or subprocess"),
        ("PRUNE_ON_WATCH", "maybe", "'maybe' is neither true nor false"),
        ("WATCH", "show", "'show' is not known: write apply or plan"),
        ("LOG_LEVEL", "LOUD", "'LOUD' is not known: write debug, info, warning or error"),
        ("LOG_FORMAT", "xml", "'xml' is not known: write text or json"),
    ],
)
def test_an_invalid_value_is_one_sentence(
    tmp_path: Path, name: str, text: str, sentence: str
) -> None:
    (line,) = errors({f"MIC_{name}": text}, tmp_path / "none")
    assert line.startswith(f"environment: error: MIC_{name}: {sentence}")
    (tmp_path / "env").write_text(f'# first\nMIC_{name}="{text}"\n')
    (line,) = errors({}, tmp_path / "env")
    assert line.startswith(f"{tmp_path}/env:2: error: MIC_{name}: {sentence}")


def test_an_unknown_name_is_an_error_with_a_guess(tmp_path: Path) -> None:
    assert errors({"MIC_PORTRANGE": "1", "MIC_ZZZZZZ": "1", "PATH": "/bin"}, tmp_path / "none") == [
        "environment: error: MIC_PORTRANGE: there is no such setting; did you mean MIC_PORT_RANGE?",
        "environment: error: MIC_ZZZZZZ: there is no such setting",
    ]


def test_only_the_exact_name_is_a_setting(tmp_path: Path) -> None:
    assert load_settings({"mic_scope": "a", "scope": "b"}, tmp_path / "none").scope == "default"
    assert errors({"MIC_scope": "a", "MIC_UNREAD": "b"}, tmp_path / "none") == [
        "environment: error: MIC_UNREAD: there is no such setting; did you mean MIC_RUN_DIR?",
        "environment: error: MIC_scope: there is no such setting; did you mean MIC_SCOPE?",
    ]


def test_no_value_is_read_as_json(tmp_path: Path) -> None:
    (line,) = errors({"MIC_LISTEN": '["127.0.0.1", 80]'}, tmp_path / "none")
    assert "is no address and port" in line


def test_a_shell_inside_an_instance_is_no_mistake(tmp_path: Path) -> None:
    load_settings({"MIC_INSTANCE": "a", "MIC_RUN_ID": "b"}, tmp_path / "none")


def test_all_errors_come_at_once_and_the_message_counts_them(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("MIC_SCOPE=A\n" + "\n" * 8 + "MIC_X=1\nnonsense\n")
    with pytest.raises(InvalidConfig) as caught:
        load_settings({"MIC_RESYNC": "1"}, tmp_path / "env")
    places = [line.split(": error")[0] for line in caught.value.rendered.splitlines()]
    file = f"{tmp_path}/env"
    assert places == [f"{file}:1", f"{file}:10", f"{file}:11", "environment"]
    assert str(caught.value).startswith(f"cannot read the settings: {file}:1: MIC_SCOPE: 'A' is no")
    assert str(caught.value).endswith(" (and 3 more)")


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("MIC_SCOPE=file\nMIC_RESYNC=5s\nTOKEN=a\nHOME=/x\n")
    found = load_settings({"MIC_SCOPE": "env", "HOME": "/root"}, tmp_path / "env")
    assert (found.scope, found.resync) == ("env", 5.0)
    assert found.environ["TOKEN"] == "a"
    assert found.environ["HOME"] == "/root"
    assert "TOKEN" not in repr(found)


def test_a_file_that_cannot_be_read_is_said_and_not_fatal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "env"
    file.mkdir()
    found = load_settings({"MIC_SCOPE": "env"}, file)
    assert found.unread == f"cannot read {file}: is a directory"
    assert found.scope == "env"


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "env").write_bytes(b"A=\xff")
    assert errors({}, tmp_path / "env") == [
        f"{tmp_path}/env: error: cannot read the file: byte 2 is not UTF-8"
    ]


def test_a_relative_config_is_meant_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings({"MIC_CONFIG": "x.yaml"}, tmp_path / "none").config == tmp_path / "x.yaml"


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings().scope = "other"


@pytest.mark.parametrize(
    ("address", "text", "loopback"),
    [
        (Address("127.0.0.1", 1), "127.0.0.1:1", True),
        (Address("::1", 2), "[::1]:2", True),
        (Address("0.0.0.0", 3), "0.0.0.0:3", False),
    ],
)
def test_addresses(address: Address, text: str, loopback: bool) -> None:
    assert (str(address), address.is_loopback) == (text, loopback)
