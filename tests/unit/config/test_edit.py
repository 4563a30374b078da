"""Editing changes one entry, and every other byte stays where it is."""

from __future__ import annotations

import difflib
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mic_supervisor.config.document import Config, GpuEntry, GpuKey, parse_gpu_key
from mic_supervisor.config.edit import assign, locked, put_profile
from mic_supervisor.config.load import load
from mic_supervisor.errors import LockHeld, MicError
from tests.unit.config.fakes import FakeRegistry

UUID = "GPU-f15ae561-7b5c-4a0c-8ab1-3a1e0c2d9f10"
MODELS = """\
version: 1
models:
  MAM: {backend: command, command: [/bin/a]}
  face: {backend: command, command: [/bin/b]}
  "on": {backend: command, command: [/bin/c]}
  "1e5": {backend: command, command: [/bin/d]}
"""


def read(text: str) -> Config:
    return load(Path("/nowhere/gpus.yaml"), FakeRegistry(), environ={}, data=text.encode())


def entry_of(text: str, keys: tuple[GpuKey, ...]) -> GpuEntry | None:
    return next((one for one in read(text).entries if set(one.keys) & set(keys)), None)


def put(text: str, key: str, model: str | None) -> str:
    """The whole text after `model` was put on the GPUs that `key` names."""
    keys = parse_gpu_key(key).keys
    return assign(text, entry_of(text, keys), keys, model)


def edited(gpus: str, key: str, model: str | None, before: str = MODELS) -> str:
    """What stands in the place of `gpus` afterwards."""
    after = put(before + gpus, key, model)
    assert after.startswith(before)
    read(after)
    return after.removeprefix(before)


# --- profiles -----------------------------------------------------------------------------------

PROFILES = """\
gpus:
  0: MAM   # by day
  "1-3": MAM
# at night
profile: night   # set by a timer
profiles:
  night:
    gpus:
      0: face   # the large one
      "2-3": face
"""


@pytest.mark.parametrize(
    ("key", "model", "old", "new"),
    [
        ("0", None, "      0: face ", "      0: none "),
        ("3", "MAM", '      "2-3": face\n', "      2: face\n      3: MAM\n"),
        ("1", None, '  "1-3": MAM\n', '  1: none\n  "2-3": MAM\n'),
        ("9", "face", '  "1-3": MAM\n', '  "1-3": MAM\n  9: face\n'),
    ],
)
def test_the_entry_that_counts_changes(key: str, model: str | None, old: str, new: str) -> None:
    assert PROFILES.count(old) == 1
    assert edited(PROFILES, key, model) == PROFILES.replace(old, new)


def test_the_way_out_names_the_profile() -> None:
    text = MODELS + 'gpus: {0: MAM}\nprofile: x\nprofiles: {x: {gpus: {"1,2": face}}}\n'
    with pytest.raises(MicError, match='cannot change GPU 1: the file has "1,2" in one entry'):
        put(text, "1", None)


FLOW = MODELS + "gpus: {0: MAM}\n"
NIGHT = "profiles: {night: {gpus: {0: face}}, on: {}}\n"


@pytest.mark.parametrize(
    ("before", "name", "after"),
    [
        (f"{FLOW}profile: none # x\n{NIGHT}", "night", f"{FLOW}profile: night # x\n{NIGHT}"),
        (f"{FLOW}profile: 'night'\n{NIGHT}", "none", f"{FLOW}profile: 'none'\n{NIGHT}"),
        (f"{FLOW}# x\n{NIGHT}# y\n", "night", f"{FLOW}# x\nprofile: night\n{NIGHT}# y\n"),
        (f"{NIGHT}{FLOW}", "night", f"profile: night\n{NIGHT}{FLOW}"),
        (f"{FLOW}{NIGHT}profile: none", "night", f"{FLOW}{NIGHT}profile: night\n"),
        (f"{FLOW}{NIGHT}", "on", f'{FLOW}profile: "on"\n{NIGHT}'.replace("on: {}", "on: {}")),
        (
            f"{FLOW}{NIGHT}".replace("\n", "\r\n"),
            "night",
            f"{FLOW}profile: night\n{NIGHT}".replace("\n", "\r\n"),
        ),
        (
            '{"version": 1, "gpus": {"0": "none"}, "profiles": {"night": {}}}\n',
            "night",
            '{"profile": "night", "version": 1, "gpus": {"0": "none"}, '
            '"profiles": {"night": {}}}\n',
        ),
        (FLOW, "night", f"{FLOW}profile: night\n"),
        (FLOW.rstrip(), "night", f"{FLOW}profile: night\n"),
    ],
)
def test_the_profile_is_put_on_and_nothing_else_changes(before: str, name: str, after: str) -> None:
    before, after = (text.replace(", on: {}", ', "on": {}') for text in (before, after))
    assert put_profile(before, name) == after
    if "profiles" in after:
        assert (read(after).profile or "none") == name


def test_a_layout_that_is_not_understood_is_left_to_people() -> None:
    with pytest.raises(MicError) as caught:
        put_profile(f"{FLOW}...\n", "night")
    assert caught.value.hint == "edit it by hand: write `profile: night`"


# --- one entry ----------------------------------------------------------------------------------

BLOCK = """\
# before
gpus:   # what runs where
  # the first two
  0: MAM    # since May
  1:   'MAM'

  "2-5": face  # all the same
  GPU-F15AE561-7b5c-4a0c-8ab1-3a1e0c2d9f10: none
  "7,8": face
  "0000:3b:00.0": none
# after

defaults: {stop_timeout: 5s}
"""


@pytest.mark.parametrize(
    ("key", "model", "old", "new"),
    [
        ("0", None, "  0: MAM    # since May\n", "  0: none    # since May\n"),
        ("1", "face", "  1:   'MAM'\n", "  1:   'face'\n"),
        (UUID, "MAM", "9f10: none\n", "9f10: MAM\n"),
        ("3b:00.0", "MAM", '"0000:3b:00.0": none\n', '"0000:3b:00.0": MAM\n'),
        ("7,8", None, '"7,8": face\n', '"7,8": none\n'),
        ("0", "on", "0: MAM ", '0: "on" '),
        ("0", "1e5", "0: MAM ", '0: "1e5" '),
        (
            "2",
            None,
            '  "2-5": face  # all the same\n',
            '  2: none  # all the same\n  "3-5": face\n',
        ),
        (
            "3",
            "MAM",
            '  "2-5": face  # all the same\n',
            '  2: face  # all the same\n  3: MAM\n  "4-5": face\n',
        ),
        (
            "4",
            None,
            '  "2-5": face  # all the same\n',
            '  "2-3": face  # all the same\n  4: none\n  5: face\n',
        ),
        (
            "5",
            None,
            '  "2-5": face  # all the same\n',
            '  "2-4": face  # all the same\n  5: none\n',
        ),
        ("9", "MAM", '00.0": none\n', '00.0": none\n  9: MAM\n'),
        ("65:00.0", "MAM", '00.0": none\n', '00.0": none\n  "00000000:65:00.0": MAM\n'),
        ("10,11", "MAM", '00.0": none\n', '00.0": none\n  "10,11": MAM\n'),
    ],
)
def test_one_entry_changes(key: str, model: str | None, old: str, new: str) -> None:
    assert BLOCK.count(old) == 1
    assert edited(BLOCK, key, model) == BLOCK.replace(old, new)


@pytest.mark.parametrize(
    ("gpus", "key", "model", "after"),
    [
        ("gpus: {0: MAM}\n", "0", None, "gpus: {0: none}\n"),
        ("gpus: {0: MAM, 1: face}", "2", "MAM", "gpus: {0: MAM, 1: face, 2: MAM}\n"),
        (
            "gpus: {0: MAM,\n       1: face,}\n",
            "2",
            "MAM",
            "gpus: {0: MAM,\n       1: face, 2: MAM,}\n",
        ),
        ("gpus: {'0-2': MAM}\n", "1", None, "gpus: {0: MAM, 1: none, 2: MAM}\n"),
        ("gpus: {0-3: MAM}\n", "0", None, "gpus: {0: none, 1-3: MAM}\n"),
        ("gpus: {0: MAM}", UUID, "face", f"gpus: {{0: MAM, {UUID}: face}}\n"),
        ("gpus:\n  0: MAM", "1", "face", "gpus:\n  0: MAM\n  1: face\n"),
        ("gpus:\n      0: MAM # x", "1", "face", "gpus:\n      0: MAM # x\n      1: face\n"),
        ("gpus:\n  0:\n    MAM\n", "0", None, "gpus:\n  0:\n    none\n"),
        ("gpus:\n  0-1:\n    MAM # x\n", "0", None, "gpus:\n  0:\n    none # x\n  1: MAM\n"),
        ("gpus:\n  ? 0\n  : MAM\n", "0", None, "gpus:\n  ? 0\n  : none\n"),
        ("gpus:\n  3-3: MAM\n", "3", None, "gpus:\n  3-3: none\n"),
    ],
)
def test_layouts(gpus: str, key: str, model: str | None, after: str) -> None:
    assert edited(gpus, key, model) == after


@pytest.mark.parametrize(
    ("gpus", "key", "told"),
    [
        ('gpus:\n  "0,1": MAM\n', "1", 'GPU 1: the file has "0,1" in one entry'),
        ('gpus:\n  "0,1": none\n', "0", 'GPU 0: the file has "0,1" in one entry'),
        ('gpus:\n  "0,1": none\n', "0,1,2", 'GPU 0, GPU 1, GPU 2: the file has "0,1" in'),
        ("gpus:\n  0-3: MAM\n", "0,1", 'GPU 0, GPU 1: the file has "0-3" in one entry'),
        ("gpus:\n  0: MAM\n", "0,1", 'GPU 0, GPU 1: the file has "0" in one entry'),
    ],
)
def test_a_part_of_a_group_is_left_to_people(gpus: str, key: str, told: str) -> None:
    with pytest.raises(MicError) as caught:
        edited(gpus, key, "face")
    assert str(caught.value).startswith(f"cannot change {told}")
    assert caught.value.hint == "edit it by hand, in line 8"


def test_a_file_that_is_json_stays_json() -> None:
    head = '{"version": 1, "models": {"MAM": {"backend": "command", "command": ["/a"]}}, "gpus":'
    text = head + ' {"0-2":"MAM"}}'
    after = put(text, "1", None)
    assert after == head + ' {"0":"MAM", "1":"none", "2":"MAM"}}\n'
    assert put(after, "7", "MAM") == after[:-3] + ', "7": "MAM"}}\n'


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_that_changes_ends_with_a_line_end(end: str) -> None:
    text = (MODELS + "gpus:\n  0: MAM\n  1: face").replace("\n", end)
    assert put(text, "0", None) == text.replace("0: MAM", "0: none") + end
    assert put(text, "0", "MAM") == text


def test_line_ends_of_another_world_stay() -> None:
    before = (MODELS + "gpus:\n  0-1: MAM\n").replace("\n", "\r\n")
    assert put(before, "1", None) == before.replace("0-1: MAM", "0: MAM") + "  1: none\r\n"
    assert put(before, "2", "MAM") == before + "  2: MAM\r\n"


@pytest.mark.parametrize(
    ("gpus", "after"),
    [
        ("", "gpus:\n  0: MAM\n"),
        ("gpus:\n", "gpus:\n  0: MAM\n"),
        ("gpus: # later\n# x\n", "gpus: # later\n  0: MAM\n# x\n"),
        ("gpus: {}\n", "gpus: {0: MAM}\n"),
        ("gpus: { }\n", "gpus: {0: MAM }\n"),
    ],
)
def test_a_first_entry_beside_drop_ins_that_have_others(gpus: str, after: str) -> None:
    assert assign(MODELS + gpus, None, parse_gpu_key("0").keys, "MAM") == MODELS + after


def test_without_a_line_end_before_it() -> None:
    text = MODELS.rstrip("\n")
    assert assign(text, None, parse_gpu_key("0").keys, "MAM") == text + "\ngpus:\n  0: MAM\n"


@pytest.mark.parametrize(
    ("gpus", "key"),
    [
        ("gpus:\n  ? 0-2\n  : MAM\n", "1"),  # lines below would not be entries
        ("gpus:\n  ? 0\n  : MAM\n", "1"),
        ("gpus:\n  0: MAM\n...\n# the end\n", "1"),
    ],
)
def test_what_is_not_understood_is_left_to_people(gpus: str, key: str) -> None:
    try:
        after = edited(gpus, key, None)
    except MicError as error:
        assert str(error) == (
            "cannot edit the file: the way its `gpus:` is laid out is not understood"
        )
        assert error.hint == f"edit it by hand: under gpus:, set GPU {key} to none"
    else:
        assert "..." in gpus, after


# --- any file -----------------------------------------------------------------------------------

NAMES = st.sampled_from(["MAM", "face", "none", '"MAM"', "'face'", '"on"'])
COMMENTS = st.sampled_from(["", "  # 模型", " # a: b", "   "])
GAPS = st.sampled_from(["", "", "\n", "  # alone\n", "# 0: MAM\n", "\r\n"])


@st.composite
def files(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A file's text, and keys: each names one GPU of it, or one that is new."""
    names, keys, number = [], [], 0
    for _ in range(draw(st.integers(1, 5))):
        width = draw(st.integers(1, 4))
        kind = draw(st.sampled_from(["each", "each", "range", "group"]))
        if kind == "range" or (kind == "group" and width > 1):
            sign = "-" if kind == "range" else ","
            last = number + width - 1
            listed = ",".join(map(str, range(number, last + 1)))
            name = f"{number}-{last}" if kind == "range" else listed
            names.append(draw(st.sampled_from([f'"{name}"', f"'{name}'"])))
            keys += [listed] if sign == "," else [str(one) for one in range(number, last + 1)]
            number = last + 1
        else:
            names.append(draw(st.sampled_from([str(number), f'"{number}"'])))
            keys.append(str(number))
            number += 1
    keys.append(str(number))
    if draw(st.booleans()):
        pairs = [f"{name}: {draw(NAMES)}" for name in names]
        comma = draw(st.sampled_from([", ", ",\n   ", " ,"]))
        gpus = f"gpus: {{{comma.join(pairs)}}}{draw(COMMENTS)}"
    else:
        indent = " " * draw(st.integers(1, 5))
        lines = [f"{draw(GAPS)}{indent}{name}: {draw(NAMES)}{draw(COMMENTS)}" for name in names]
        gpus = "gpus:\n" + "\n".join(lines)
    tail = draw(st.sampled_from(["", "\n", "\n# end", "\ndefaults: {stop_timeout: 5s}\n"]))
    return MODELS + gpus + tail, keys


def meaning(text: str) -> dict[str, str | None]:
    return {key.value: one.model for one in read(text).entries for key in one.keys}


@pytest.mark.slow
@settings(max_examples=200)
@given(files(), st.data())
def test_any_file_keeps_every_line_but_one(
    made: tuple[str, list[str]], data: st.DataObject
) -> None:
    text, keys = made
    key = data.draw(st.sampled_from(keys))
    model = data.draw(st.sampled_from(["MAM", "face", "on", None]))
    after = put(text, key, model)
    wanted = meaning(text) | dict.fromkeys(key.split(","), model)
    assert meaning(after) == wanted
    # What changes ends with a line end; that a last line gets one is no change of it.
    before, now = text.splitlines(), after.splitlines()
    assert after.endswith("\n") or after == text
    changes = [
        block
        for block in difflib.SequenceMatcher(None, before, now).get_opcodes()
        if block[0] != "equal"
    ]
    gone = sum(end - start for _, start, end, _, _ in changes)
    assert gone <= 1 and len(changes) <= 1, (text, after)
    assert put(after, key, model) == after


# --- the file -----------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "gpus.yaml"
    made.write_bytes(b"\xef\xbb\xbfversion: 1\r\n")
    return made


def test_it_is_replaced_as_it_was(path: Path) -> None:
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 12, 34)
    os.setxattr(path, "user.note", b"kept")
    before = path.stat()
    with locked(path) as file:
        assert file.text == "version: 1\r\n"
        file.replace(file.encode("version: 2\r\n"))
    after = path.stat()
    assert path.read_bytes() == b"\xef\xbb\xbfversion: 2\r\n"
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )
    assert stat.S_IMODE(after.st_mode) == 0o640
    assert os.getxattr(path, "user.note") == b"kept"
    assert after.st_ino != before.st_ino
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(path)
    with locked(link) as file:
        file.replace(b"other")
    assert link.is_symlink()
    assert path.read_bytes() == b"other"


def test_an_editor_that_was_faster_wins(path: Path) -> None:
    with locked(path) as file:
        path.write_text("by hand")
        with pytest.raises(MicError, match="it was changed meanwhile"):
            file.replace(b"other")
    assert path.read_text() == "by hand"
    assert list(path.parent.iterdir()) == [path]


def test_many_edits_at_once_lose_nothing(path: Path) -> None:
    path.write_text("")

    def add(number: int) -> None:
        with locked(path) as file:
            file.replace(file.encode(f"{file.text}{number}\n"))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.read_text().split()) == [str(number) for number in range(8)]


def test_the_wait_for_another_edit_has_an_end(path: Path) -> None:
    with locked(path), pytest.raises(LockHeld, match="another edit holds it"), locked(path, 0.1):
        pass


@pytest.mark.parametrize("make", [None, Path.mkdir])
def test_what_is_no_file_is_told(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "none.yaml"
    if make is not None:
        make(path)
    with pytest.raises(MicError, match=r"cannot (edit|read) .*none\.yaml: "), locked(path):
        pass


def test_a_directory_that_cannot_be_written_is_told(path: Path, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise PermissionError(13, "Permission denied")

    with locked(path) as file, monkeypatch.context() as patched:
        patched.setattr(os, "fchmod", refuse)
        with pytest.raises(MicError) as caught:
            file.replace(b"other")
    assert str(caught.value) == f"cannot write {path}: permission denied"
    assert caught.value.hint == "run as root, or as the user that the file belongs to"
    assert path.read_bytes() == b"\xef\xbb\xbfversion: 1\r\n"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_a_mount_of_its_own_is_told_with_the_way_out(
    path: Path, monkeypatch: Any
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(16, "Device or resource busy")  # what rename(2) says of a mount

    with locked(path) as file, monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refuse)
        with pytest.raises(MicError) as caught:
            file.replace(b"other")
    assert str(caught.value) == f"cannot write {path}: device or resource busy"
    assert caught.value.hint == (
        f"{path} is mounted by itself, and nothing replaces a mount: mount {path.parent} instead"
    )
    assert list(path.parent.iterdir()) == [path]
