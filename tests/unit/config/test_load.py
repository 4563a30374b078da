"""What a valid file means."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from mic_supervisor.config.document import GpuKey
from tests.support.waiting import until
from tests.unit.config.fakes import (
    MODELS,
    RETURNS,
    ServerOptions,
    load_text,
    rendered,
)


def entries(directory: Path, gpus: str, **drop_ins: str) -> list[tuple[str, str | None]]:
    """("0", "a") for each entry; a group's keys with commas."""
    config = load_text(
        directory,
        f"{MODELS}gpus:\n{gpus}",
        drop_ins={f"{name}.yaml": text for name, text in drop_ins.items()} or None,
    )
    return [(",".join(key.value for key in entry.keys), entry.model) for entry in config.entries]


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
