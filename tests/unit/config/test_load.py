"""What a valid file means."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import pytest

from mic_supervisor.config.diagnostics import InvalidConfig
from mic_supervisor.config.document import GpuKey
from mic_supervisor.config.load import load
from mic_supervisor.errors import ConfigError
from tests.support.waiting import until
from tests.unit.config.fakes import RETURNS, FakeRegistry, ServerOptions, load_text

MODELS = """\
version: 1
backends: {server: {image: img}}
models:
  a: {backend: server, copies: 8}
  b: {backend: command, command: [/bin/b]}
"""


def entries(directory: Path, gpus: str, **drop_ins: str) -> list[tuple[str, str | None]]:
    """("0", "a") for each entry; a group's keys with commas."""
    config = load_text(
        directory,
        f"{MODELS}gpus:\n{gpus}",
        drop_ins={f"{name}.yaml": text for name, text in drop_ins.items()} or None,
    )
    return [(",".join(key.value for key in entry.keys), entry.model) for entry in config.entries]


def rendered(directory: Path, text: str | bytes, **more: object) -> str:
    with pytest.raises(InvalidConfig) as caught:
        load_text(directory, text, **more)  # type: ignore[arg-type]
    return caught.value.rendered.replace(f"{directory}/", "")


# --- gpus ---------------------------------------------------------------------------------------


def test_entries_are_sorted_by_gpu_and_keep_their_places(tmp_path: Path) -> None:
    config = load_text(tmp_path, f"{MODELS}gpus:\n  10: a\n  2: none\n  0: b\n")
    assert [(str(entry.keys[0]), entry.model) for entry in config.entries] == [
        ("GPU 0", "b"),
        ("GPU 2", None),
        ("GPU 10", "a"),
    ]
    assert str(config.entries[0].location) == f"{tmp_path}/gpus.yaml:9:3"


def test_a_range_is_an_entry_for_each_gpu(tmp_path: Path) -> None:
    assert entries(tmp_path, '  "0-2": a\n') == [("0", "a"), ("1", "a"), ("2", "a")]


def test_a_list_is_one_entry_in_its_own_order(tmp_path: Path) -> None:
    assert entries(tmp_path, '  "4, 3": a\n') == [("4,3", "a")]


def test_a_list_kept_empty_is_an_entry_for_each_gpu(tmp_path: Path) -> None:
    assert entries(tmp_path, '  "3,4": none\n') == [("3", None), ("4", None)]


@pytest.mark.parametrize(
    ("written", "kind", "value"),
    [
        ("0", "index", "0"),
        ('"0"', "index", "0"),
        (
            "gpu-F15AE561-7B5C-4A0C-8AB1-3A1E0C2D9F10",
            "uuid",
            "GPU-f15ae561-7b5c-4a0c-8ab1-3a1e0c2d9f10",
        ),
        ("00000000:3B:00.0", "pci", "00000000:3b:00.0"),
        ("0001:3b:00.0", "pci", "00000001:3b:00.0"),
        ('"03:00.0"', "pci", "00000000:03:00.0"),
    ],
)
def test_a_gpu_is_named_in_three_ways(tmp_path: Path, written: str, kind: str, value: str) -> None:
    config = load_text(tmp_path, f"{MODELS}gpus:\n  {written}: a\n")
    assert config.entries[0].keys == (GpuKey(kind, value),)  # type: ignore[arg-type]


def test_spellings_that_only_an_inventory_can_compare_pass(tmp_path: Path) -> None:
    assert len(entries(tmp_path, '  0: a\n  "3b:00.0": b\n')) == 2


# --- models -------------------------------------------------------------------------------------


def test_options_are_the_backends_own(tmp_path: Path) -> None:
    config = load_text(tmp_path, f"{MODELS}gpus: {{0: a}}\n")
    model = config.models["a"]
    assert isinstance(model.options, ServerOptions)
    assert (model.backend, model.options.copies, model.options.start_timeout) == ("server", 8, 900)
    assert str(model.location) == f"{tmp_path}/gpus.yaml:4:3"
    assert list(config.models) == ["a", "b"]


def test_settings_of_a_used_backend_are_there_without_being_listed(tmp_path: Path) -> None:
    config = load_text(tmp_path, f"{MODELS}gpus: {{0: a}}\n")
    assert list(config.backends) == ["command", "server"]
    assert config.backends["server"].memory == 1 << 30  # type: ignore[attr-defined]


def test_defaults_stand_between_a_model_and_its_backend(tmp_path: Path) -> None:
    config = load_text(
        tmp_path,
        """\
version: 1
defaults: {start_timeout: 1m, network: host, rollout: {max_unavailable: 3, rollback: false}}
backends: {server: {image: img}}
models:
  plain: {backend: server}
  own: {backend: server, start_timeout: 2h, rollout: {max_unavailable: 5}}
  other: {backend: command, command: [/bin/x]}
gpus: {0: plain}
""",
    )
    found = {name: model.options for name, model in config.models.items()}
    assert [options.start_timeout for options in found.values()] == [60, 7200, 60]  # type: ignore[attr-defined]
    assert found["plain"].rollout.max_unavailable == 3  # type: ignore[attr-defined]
    assert found["own"].rollout.max_unavailable == 5  # type: ignore[attr-defined]
    assert found["own"].rollout.rollback is False  # type: ignore[attr-defined]
    # A backend that has no use for a default is passed over.
    assert [options.network for options in found.values()] == ["host", "host", "bridge"]  # type: ignore[attr-defined]


def test_a_wrong_default_is_reported_once(tmp_path: Path) -> None:
    text = rendered(
        tmp_path,
        """\
version: 1
defaults: {stop_timeout: 5}
models:
  a: {backend: command, command: [/bin/a]}
  b: {backend: command, command: [/bin/b]}
gpus: {0: a}
""",
    )
    assert text.count("error:") == 1


@pytest.mark.parametrize("name", ["MAM", "7b", '"7"', "换脸", "é", "e\u0301", "मॉडल", "a-b_c.d"])
def test_names_in_any_script(tmp_path: Path, name: str) -> None:
    config = load_text(
        tmp_path,
        f"version: 1\nmodels:\n  {name}: {{backend: command, command: [/bin/a]}}\n"
        f"gpus: {{0: {name}}}\n",
    )
    assert config.entries[0].model in config.models


def test_two_spellings_of_one_name_are_one(tmp_path: Path) -> None:
    config = load_text(
        tmp_path,
        "version: 1\nmodels:\n  e\u0301: {backend: command, command: [/bin/a]}\n"
        "gpus: {0: \u00e9}\n",
    )
    assert config.entries[0].model == "\u00e9"
    assert list(config.models) == ["\u00e9"]


def test_a_plug_in_that_hangs_or_ends_everything_is_an_error_at_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "version: 1\nmodels:\n  a: {backend: fragile, user: %s}\ngpus: {0: a}\n"
    assert "models.a: cannot be checked: GeneratorExit: \n" in rendered(tmp_path, text % "ends")
    try:
        with monkeypatch.context() as patch:
            patch.setattr("mic_supervisor.config.load._VALIDATES_IN", 0.1)
            assert "it does not answer within 0.1 s" in rendered(tmp_path, text % "waits")
        assert "it has not answered since it was last asked" in rendered(tmp_path, text % "x")
    finally:
        RETURNS.set()
    until(lambda: all(one.name != "mic-in-time" for one in threading.enumerate()), "its return")
    assert "RuntimeError: boom x" in rendered(tmp_path, text % "x")


def test_a_plug_in_that_fails_in_its_own_way_is_an_error_at_its_model(tmp_path: Path) -> None:
    text = "version: 1\nmodels:\n  a: {backend: fragile, user: x}\ngpus: {0: a}\n"
    assert rendered(tmp_path, text) == (
        "gpus.yaml:3:3: error: models.a: cannot be checked: RuntimeError: boom x\n"
        "      a: {backend: fragile, user: x}\n"
        "      ^\n"
    )


# --- variables ----------------------------------------------------------------------------------


def test_variables_that_the_file_refers_to_are_collected(tmp_path: Path) -> None:
    config = load_text(
        tmp_path,
        """\
version: 1
models:
  a:
    backend: command
    command: [/bin/a, "${port}", "${port:grpc}", "${gpu_uuids}-${gpu_indices}", "${env:ONE}"]
    env: {T: "${env:TWO}${model}${instance}", S: "$HOME {x}"}
    probe: {exec: [/bin/p, "${env:ONE}"]}
gpus: {0: a}
""",
        environ={"ONE": "s3cret", "TWO": "", "THREE": "3"},
    )
    assert config.variables == {"ONE": "s3cret", "TWO": ""}
    assert "s3cret" not in repr(config)


def test_a_variable_named_like_a_placeholder_gets_the_right_hint(tmp_path: Path) -> None:
    text = MODELS.replace("[/bin/b]", '[/bin/b, "${TOKEN}"]') + "gpus: {0: a}\n"
    assert "write ${env:TOKEN} for the variable" in rendered(
        tmp_path, text, environ={"TOKEN": "secret"}
    )


# --- drop-ins -----------------------------------------------------------------------------------


def test_drop_ins_merge_maps_and_replace_the_rest(tmp_path: Path) -> None:
    config = load_text(
        tmp_path,
        f"{MODELS}gpus:\n  0: a\n",
        drop_ins={
            "20-late.yaml": "models: {a: {copies: 3}}\n",
            "10-early.yaml": "models: {a: {copies: 2, user: me}, b: {command: [/bin/other]}}\n",
            "30-empty.yaml": "# everything is commented out\n",
            "README": "not: [read",
            ".hidden.yaml": "not: [read",
        },
    )
    names = ["gpus.yaml", "10-early.yaml", "20-late.yaml", "30-empty.yaml"]
    assert [path.name for path in config.files] == names
    assert config.models["a"].options.copies == 3  # type: ignore[attr-defined]
    assert config.models["a"].options.user == "me"  # type: ignore[attr-defined]
    assert config.models["b"].options.command == ["/bin/other"]  # type: ignore[attr-defined]


def test_a_drop_in_whose_settings_are_commented_out_changes_nothing(tmp_path: Path) -> None:
    config = load_text(
        tmp_path,
        f"{MODELS}gpus:\n  0: a\n",
        drop_ins={"x.yaml": "backends:\n  server:\n    # image: other\nmodels:\ngpus:\n"},
    )
    assert config.backends["server"].image == "img"  # type: ignore[attr-defined]
    assert len(config.models) == 2
    assert len(config.entries) == 1


def test_a_drop_in_replaces_one_gpu_of_a_range(tmp_path: Path) -> None:
    gpus = '  "0-2": a\n  "3,4": b\n'
    assert entries(tmp_path, gpus, x='gpus: {1: none, "4,3": a, 9: b}\n') == [
        ("0", "a"),
        ("1", None),
        ("2", "a"),
        ("4,3", "a"),
        ("9", "b"),
    ]


def test_a_drop_in_that_takes_part_of_a_group_is_refused(tmp_path: Path) -> None:
    text = rendered(
        tmp_path, f'{MODELS}gpus: {{"3,4": a}}\n', drop_ins={"x.yaml": "gpus:\n  3: none\n"}
    )
    assert text == (
        "gpus.yaml.d/x.yaml:2:3: error: gpus.3: GPU 3 is named twice, "
        'first in gpus.yaml:6:8 as gpus."3,4"\n'
        "      3: none\n"
        "      ^\n"
        '    to replace that entry, use its key: "3,4"\n'
    )


def test_a_bad_value_is_reported_in_the_file_it_came_from(tmp_path: Path) -> None:
    text = rendered(
        tmp_path,
        f"{MODELS}gpus: {{0: c}}\n",
        drop_ins={
            "b.yaml": "models: {a: {copies: 0}}\n",
            "a.yaml": "version: 2\nmodels: {a: {bad: 1}}\n",
        },
    )
    assert [line.split(": error")[0] for line in text.splitlines() if ": error" in line] == [
        "gpus.yaml:6:11",
        "gpus.yaml.d/a.yaml:1:10",
        "gpus.yaml.d/a.yaml:2:14",
        "gpus.yaml.d/b.yaml:1:22",
    ]


def test_syntax_errors_of_all_files_are_reported_together(tmp_path: Path) -> None:
    text = rendered(tmp_path, "a: [\n", drop_ins={"x.yaml": "\tb", "y.yaml": "[]\n"})
    assert [line.split(": error")[0] for line in text.splitlines() if ": error" in line] == [
        "gpus.yaml:1:4",
        "gpus.yaml.d/x.yaml:1:1",
        "gpus.yaml.d/y.yaml:1:1",
    ]


# --- hash ---------------------------------------------------------------------------------------


def test_comments_order_and_spelling_do_not_enter_the_hash(tmp_path: Path) -> None:
    one = load_text(tmp_path, f'{MODELS}gpus: {{"0-1": a, "3b:00.0": b}}\n')
    lines = MODELS.splitlines()
    text = "\n".join(
        [
            "# moved",
            "gpus:",
            '  "0000:3B:00.0": b',
            "  1: a  # one",
            '  "0": a',
            *lines[2:],
            *lines[:2],
        ]
    )
    two = load_text(tmp_path, text + "\n")
    assert one.hash == two.hash
    assert len(one.hash) == 64


@pytest.mark.parametrize(
    "change", [("copies: 8", "copies: 9"), ("0: a", "0: b"), ("image: img", "image: other")]
)
def test_values_enter_the_hash(tmp_path: Path, change: tuple[str, str]) -> None:
    text = f"{MODELS}gpus:\n  0: a\n"
    assert load_text(tmp_path, text).hash != load_text(tmp_path, text.replace(*change)).hash


def test_the_document_is_plain_merged_and_expanded(tmp_path: Path) -> None:
    config = load_text(tmp_path, f'{MODELS}gpus: {{"0-1": a, "4,3": none}}\n')
    assert config.document == {
        "version": 1,
        "backends": {"server": {"image": "img"}},
        "models": {
            "a": {"backend": "server", "copies": 8},
            "b": {"backend": "command", "command": ["/bin/b"]},
        },
        "gpus": {"0": "a", "1": "a", "4,3": "none"},
    }


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


# --- short forms ----------------------------------------------------------------------------------


def test_a_short_mount_is_the_map_that_it_stands_for(tmp_path: Path) -> None:
    config = load_text(
        tmp_path,
        MODELS.replace(
            "copies: 8",
            'mounts: [/a:/b, "/c:/d:ro", {source: /e, target: /f, read_only: true}, "/g:/h:rw"]',
        )
        + "gpus: {0: a}\n",
    )
    options = config.models["a"].options
    assert isinstance(options, ServerOptions)
    assert [(one.source, one.target, one.read_only) for one in options.mounts] == [
        *[("/a", "/b", False), ("/c", "/d", True), ("/e", "/f", True), ("/g", "/h", False)]
    ]
