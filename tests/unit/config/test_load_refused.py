"""What is said of files that cannot be read or hold errors, and to whom."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from mic_supervisor.config.diagnostics import InvalidConfig
from mic_supervisor.config.load import load
from mic_supervisor.errors import ConfigError
from tests.unit.config.fakes import (
    MODELS,
    FakeRegistry,
    load_text,
    rendered,
)

# --- what those see who may not read the file ----------------------------------------------------


def outline(directory: Path, text: str | bytes) -> str:
    with pytest.raises(InvalidConfig) as caught:
        load_text(directory, text)
    return caught.value.outline.replace(f"{directory}/", "")


def test_an_outline_has_locations_and_keys_and_no_values(tmp_path: Path) -> None:
    text = MODELS.replace("/bin/b", "/bin/b, 8372") + "  d: {backend: s3cr3t}\ngpus: {0: d}\n"
    says_why = "is not valid; `mic-supervisor check` says why"
    assert outline(tmp_path, text).splitlines() == [
        f"gpus.yaml:5:43: error: models.b.command[1]: {says_why}",
        f"gpus.yaml:6:16: error: models.d.backend: {says_why}",
    ]
    assert "8372" in rendered(tmp_path, text) and "s3cr3t" in rendered(tmp_path, text)


@pytest.mark.parametrize(
    "secret",
    [
        "root:$y$j9T$CANARY:20000:0:99999:7:::\nbin:*:20000::::::\n",  # shadow: keys of a map
        "CANARY\n",
        "5417000000000000\n",
        "-----BEGIN PRIVATE KEY-----\nCANARY\n-----END PRIVATE KEY-----\n",
        "machine example.com login me password CANARY\n",  # .netrc
        "[default]\naws_secret_access_key = CANARY\n",
        "host:5432:db:me:CANARY\n",  # .pgpass
        '{"auths": {"registry/CANARY": {"auth": "CANARY"}}}',
        "token: CANARY\n",
        "users:\n- user: {token: CANARY}\n",
        "'CANARY\n",
        "*CANARY\n",
        "&CANARY x\n",
        "!CANARY x\n",
        "a: b: CANARY\n",
        "version: CANARY\n",
        "version: 1\nmodels: CANARY\ngpus: {a b CANARY: x, 0: CANARY}\n",
        b"\xffCANARY",
    ],
)
def test_an_outline_of_any_other_file_shows_nothing_of_it(
    tmp_path: Path, secret: str | bytes
) -> None:
    shown = outline(tmp_path, secret)
    assert shown.startswith("gpus.yaml:")
    assert "CANARY" not in shown and "5417" not in shown


def test_an_outline_says_why_a_file_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load(tmp_path / "no.yaml", FakeRegistry(), environ={})
    assert caught.value.outline == f"{caught.value.diagnostics[0].headline}\n"
    assert caught.value.outline.endswith("no such file or directory\n")


# --- files --------------------------------------------------------------------------------------


def message(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, FakeRegistry(), environ={})
    assert isinstance(caught.value, InvalidConfig)
    return caught.value.rendered.replace(str(path), "FILE")


def test_a_missing_file(tmp_path: Path) -> None:
    assert message(tmp_path / "no.yaml") == (
        "FILE: error: cannot read the file: no such file or directory\n"
        "    run `mic-supervisor init` to write a first one\n"
    )


def test_a_directory(tmp_path: Path) -> None:
    assert message(tmp_path) == "FILE: error: cannot read the file: it is a directory\n"


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert message(tmp_path / "fifo") == (
        "FILE: error: cannot read the file: it is not a regular file\n"
    )


def test_a_path_with_a_nul(tmp_path: Path) -> None:
    assert "cannot read the file: its path holds a NUL" in message(tmp_path / "a\0b")


def test_an_unreadable_file() -> None:
    with tempfile.TemporaryDirectory() as directory:  # tmp_path is closed to other users
        Path(directory).chmod(0o755)
        file = Path(directory) / "gpus.yaml"
        file.write_text("")
        file.chmod(0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            found = message(file)
        finally:
            os.seteuid(user)
    assert found == "FILE: error: cannot read the file: permission denied\n"


def test_a_dangling_drop_in(tmp_path: Path) -> None:
    (tmp_path / "gpus.yaml.d").mkdir()
    (tmp_path / "gpus.yaml.d" / "x.yaml").symlink_to("nowhere")
    assert rendered(tmp_path, f"{MODELS}gpus: {{0: a}}\n") == (
        "gpus.yaml.d/x.yaml: error: cannot read the file: no such file or directory\n"
    )


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "---\n...\n", "\ufeff"])
def test_an_empty_file_names_no_gpu(tmp_path: Path, text: str) -> None:
    lines = [line for line in rendered(tmp_path, text).splitlines() if "error" in line]
    assert lines == [
        "gpus.yaml:1:1: error: gpus: names no GPU",
        "gpus.yaml:1:1: error: version: is missing",
    ]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"version: 1\nab: \xff\n", "gpus.yaml:2:5: error: the byte 0xff is not UTF-8"),
        (
            "version: 1\né: ".encode() + b"\xe9\n",
            "gpus.yaml:2:4: error: the byte 0xe9 is not UTF-8",
        ),
        ("version: 1".encode("utf-16"), "gpus.yaml:1:1: error: cannot read the file: it is UTF-16"),
        (b"a: \0\n", "gpus.yaml:1:4: error: the character U+0000 cannot stand here"),
        (b"a: 1\nb: \x1b[0m\n", "gpus.yaml:2:4: error: the character U+001B cannot stand here"),
        (b"a: 1\rb: 2\n", "gpus.yaml:1:5: error: the character U+000D cannot stand here"),
        ("a: 1\u2028b\n".encode(), "gpus.yaml:1:5: error: the character U+2028 cannot stand here"),
        ("a: \ufeffb\n".encode(), "gpus.yaml:1:4: error: the character U+FEFF cannot stand here"),
        (
            b"#" * (256 * 1024 + 1),
            "gpus.yaml: error: cannot read the file: it is larger than 256 KiB",
        ),
    ],
)
def test_what_is_no_text(tmp_path: Path, data: bytes, line: str) -> None:
    text = rendered(tmp_path, data)
    assert text.splitlines()[0] == line
    assert "\x1b" not in text and "\0" not in text


@pytest.mark.parametrize("change", [("\n", "\r\n"), ("version", "\ufeffversion")])
def test_an_editor_of_another_system_is_welcome(tmp_path: Path, change: tuple[str, str]) -> None:
    text = f"{MODELS}gpus:\n  0: a\n"
    config = load_text(tmp_path, text.replace(*change).encode())
    assert config.hash == load_text(tmp_path, text).hash


# --- the report ---------------------------------------------------------------------------------


def test_the_report_is_exact(tmp_path: Path) -> None:
    text = """\
version: 1
models:
  模型: {backend: comand, command: [/bin/a]}
  b: {backend: command, command: [/bin/b], port: "80"}
gpus:
  0: bb
"""
    assert rendered(tmp_path, text) == (
        "gpus.yaml:3:17: error: models.模型.backend: unknown backend 'comand'\n"
        "      模型: {backend: comand, command: [/bin/a]}\n"
        "                      ^\n"
        "    did you mean command?\n"
        "gpus.yaml:4:50: error: models.b.port: must be a whole number, not '80'\n"
        '      b: {backend: command, command: [/bin/b], port: "80"}\n'
        "                                                     ^\n"
        "    remove the quotes\n"
        "gpus.yaml:6:6: error: gpus.0: unknown model 'bb'\n"
        "      0: bb\n"
        "         ^\n"
        "    did you mean b?\n"
    )


def test_the_message_is_the_first_error_and_how_many_follow(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, "version: 3\nx: 1\n")
    path = tmp_path / "gpus.yaml"
    assert str(caught.value) == (f"cannot load {path}: {path}:1:1: gpus: names no GPU (and 2 more)")


def test_what_is_not_meant_is_not_suggested(tmp_path: Path) -> None:
    assert "did you mean" not in rendered(tmp_path, f"{MODELS}gpus: {{0: entirely-different}}\n")


def test_a_terminal_is_never_told_anything(tmp_path: Path) -> None:
    text = rendered(
        tmp_path, f'{MODELS}gpus:\n  "\\e]0;x\\a": a\n  1: "\\e[31m"\n  2: \u202eevil\n'
    )
    assert text.count("error:") == 3
    assert all(char.isprintable() or char == "\n" for char in text)


def test_a_flood_of_errors_is_counted(tmp_path: Path) -> None:
    gpus = "".join(f"  x{number}: a\n" for number in range(500))
    text = rendered(tmp_path, f"{MODELS}gpus:\n{gpus}")
    assert text.count("error:") == 100
    assert text.endswith("… and 400 more errors\n")
