"""What a profile makes of `gpus:`, and what is wrong with one although it is off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mic_supervisor.config.diagnostics import InvalidConfig
from mic_supervisor.config.document import Config
from mic_supervisor.config.load import load
from mic_supervisor.desired import desired_state
from mic_supervisor.errors import MicError
from mic_supervisor.gpu.source import SimulatedSource
from tests.unit.config.fakes import FakeRegistry, load_text

HEAD = """\
version: 1
models:
  a: {backend: command, command: [/bin/a]}
  b: {backend: command, command: [/bin/b]}
  fixed: {backend: command, command: [/bin/c], port: 8000}
"""


def entries(config: Config) -> dict[str, str | None]:
    return {",".join(key.value for key in one.keys): one.model for one in config.entries}


def errors(directory: Path, text: str) -> list[str]:
    """ "LINE:COLUMN: message / hint" of each."""
    with pytest.raises(InvalidConfig) as caught:
        load_text(directory, HEAD + text)
    return [
        f"{one.location.line}:{one.location.column}: {one.path}: {one.message} / {one.hint}"
        for one in caught.value.diagnostics
    ]


@pytest.mark.parametrize(
    ("gpus", "night", "found"),
    [
        ('"0-2": a', "1: b", {"0": "a", "1": "b", "2": "a"}),
        ('"0-2": a', '"1-2": b', {"0": "a", "1": "b", "2": "b"}),
        ("0: a", "0: none", {"0": None}),
        ("0: a", "1: b", {"0": "a", "1": "b"}),
        ('"0-2": a', '"0,1": b', {"0,1": "b", "2": "a"}),
        ('"0,1": a', "{0: b, 1: none}", {"0": "b", "1": None}),
        ('"0,1": a', '"1,0": b', {"1,0": "b"}),
    ],
)
def test_entries_of_a_profile_take_the_place_of_those_with_their_gpus(
    tmp_path: Path, gpus: str, night: str, found: dict[str, str | None]
) -> None:
    over = night if night.startswith("{") else f"{{{night}}}"
    text = f"{HEAD}gpus: {{{gpus}}}\nprofiles: {{night: {{gpus: {over}}}, late: }}\n"
    config = load_text(tmp_path, text + "profile: night\n")
    assert entries(config) == found
    assert (config.profile, config.profiles) == ("night", ("late", "night"))
    assert {one.profile for one in config.entries} <= {None, "night"}
    without = load_text(tmp_path, text)
    assert (without.profile, without.hash != config.hash) == (None, True)
    assert load_text(tmp_path, text + "profile: none\n").hash == without.hash


def test_a_file_without_profiles_has_the_hash_that_it_always_had(tmp_path: Path) -> None:
    config = load_text(tmp_path, HEAD + "gpus: {0: a}\n")
    assert set(config.document) == {"version", "models", "gpus"}


def test_a_drop_in_adds_to_a_profile_and_may_put_it_on(tmp_path: Path) -> None:
    config = load_text(
        tmp_path,
        HEAD + "gpus: {0: a, 1: a}\nprofiles: {night: {gpus: {0: b}}}\nprofile: none\n",
        drop_ins={"x.yaml": "profiles: {night: {gpus: {1: b}}}\nprofile: night\n"},
    )
    assert entries(config) == {"0": "b", "1": "b"}
    assert config.profile_at is not None and config.profile_at.file.endswith("/x.yaml")


def test_gpus_of_profiles_that_are_off_are_known(tmp_path: Path) -> None:
    text = HEAD + "gpus: {0: a}\nprofiles: {x: {gpus: {0: b, '4,5': b}}, m: {gpus: {5: a}}}\n"
    config = load_text(tmp_path, text)
    assert sorted((key.value, one.model) for one in config.aside for key in one.keys) == [
        ("4", "b"),
        ("5", "a"),
        ("5", "b"),
    ]
    assert load(config.path, FakeRegistry(), environ={}, profile="x").aside == ()


def test_another_profile_than_the_files_can_be_asked_for(tmp_path: Path) -> None:
    config = load_text(tmp_path, HEAD + "gpus: {0: a}\nprofiles: {x: {gpus: {0: b}}}\nprofile: x\n")
    ask = lambda name: load(config.path, FakeRegistry(), environ={}, profile=name)  # noqa: E731
    assert entries(ask("none")) == {"0": "a"}
    assert replace(ask("x"), texts=()) == replace(config, texts=())
    with pytest.raises(MicError) as caught:
        ask("m")
    assert (str(caught.value), caught.value.hint) == (
        f"cannot use profile m: {config.path} has no profile 'm'",
        "known are x",
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "gpus: {0: a}\nprofiles: {x: {gpus: {0: bb}}}\n",
            ["7:26: profiles.x.gpus.0: unknown model 'bb' / did you mean b?"],
        ),
        (
            "gpus: {0: a}\nprofiles: {x: {gpus: {x1: b}}}\n",
            [
                "7:23: profiles.x.gpus.x1: this names no GPU / write an index (0), a range "
                '("0-3"), a group ("3,4"), a whole UUID or a PCI bus id'
            ],
        ),
        (
            'gpus: {"0,1": a}\nprofiles: {x: {gpus: {0: b}}}\n',
            [
                "7:23: profiles.x.gpus.0: takes GPU 0 out of 0,1, in FILE:6:8, and the profile "
                "does not name GPU 1 / name it in the profile as well: add `1: none`"
            ],
        ),
        (
            "gpus: {0: a}\nprofiles: {x: {gpu: {0: b}}}\n",
            ["7:16: profiles.x.gpu: unknown key: a profile has only gpus / did you mean gpus?"],
        ),
        (
            "gpus: {0: fixed}\nprofiles: {x: {gpus: {1: fixed}}}\n",
            [
                "5:54: models.fixed.port: the port 8000 fits one instance only, and fixed has 2 "
                "with profile x / leave it out: each instance then gets a port of its own"
            ],
        ),
        (
            "gpus: {0: a}\nprofiles: {none: {gpus: {0: b}}}\n",
            [
                "7:12: profiles.none: none cannot be a profile's name: under profile: it has a "
                "meaning of its own / None"
            ],
        ),
        (
            "gpus: {0: a}\nprofiles: {x: [b]}\n",
            [
                "7:15: profiles.x: must be a map with the key gpus, not a list / "
                "write `{gpus: {0: none}}`"
            ],
        ),
        (
            "gpus: {0: a}\nprofiles: {night: }\nprofile: nigth\n",
            ["8:10: profile: unknown profile 'nigth' / did you mean night?"],
        ),
        (
            "gpus: {0: a}\nprofile: night\n",
            ["7:10: profile: unknown profile 'night' / add `profiles: {night: {gpus: {0: none}}}`"],
        ),
        (
            "gpus: {0: a}\nprofile: 周末\n",
            [
                "7:10: profile: unknown profile '周末' / "
                'add `profiles: {"周末": {gpus: {0: none}}}`'
            ],
        ),
        (
            "gpus: {0: a}\nprofile:\n",
            ["7:1: profile: has no value / write `profile: none` for no profile"],
        ),
        (
            "gpus: {0: a}\nprofile: [x]\n",
            ["7:10: profile: must be the name of a profile / known are none"],
        ),
    ],
)
def test_errors_say_where_and_what_to_write(tmp_path: Path, text: str, found: list[str]) -> None:
    said = [one.replace(f"{tmp_path}/gpus.yaml", "FILE") for one in errors(tmp_path, text)]
    assert said == found


def test_what_an_error_says_to_add_is_accepted(tmp_path: Path) -> None:
    add = "profiles: {night: {gpus: {0: none}}}"
    assert load_text(tmp_path, f"{HEAD}gpus: {{0: a}}\nprofile: night\n{add}\n").profile == "night"


def test_a_gpu_of_a_profile_that_is_off_keeps_its_binding(tmp_path: Path) -> None:
    """It comes back to the same card, although the driver has counted anew meanwhile."""
    config = load_text(tmp_path, HEAD + "gpus: {0: a}\nprofiles: {x: {gpus: {3: b}}}\n")
    inventory = SimulatedSource(4).observe()
    uuids = [one.uuid for one in inventory.gpus]
    state = desired_state(config, inventory, {"3": uuids[2]}, FakeRegistry(), tmp_path)
    assert state.aside == ((uuids[2], "b"),)
    assert dict(state.bindings) == {"0": uuids[0], "3": uuids[2]}
    gone = desired_state(config, SimulatedSource(2).observe(), {}, FakeRegistry(), tmp_path)
    said = {one.subject for one in gone.unsatisfiable}
    assert (gone.aside, said) == ((), {"a on GPU 0"})  # nothing is missed while it is off


def test_a_profile_that_is_off_is_known_to_hand_a_gpu_over(tmp_path: Path) -> None:
    config = load_text(tmp_path, HEAD + "gpus: {0: a}\nprofiles: {x: {gpus: {1: fleet}}}\n")
    inventory = SimulatedSource(2).observe()
    state = desired_state(config, inventory, {}, FakeRegistry(), tmp_path)
    assert state.aside == ((inventory.gpus[1].uuid, "fleet"),)
    assert state.fleet == ()
