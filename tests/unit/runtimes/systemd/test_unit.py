"""A launch as a transient unit: the whole of what PID 1 is given, as data."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.errors import PreflightFailed
from mic_supervisor.model import Identity, Launch, Limits, Near, ProcessSpec
from mic_supervisor.runtimes.identity import IDENTITY as VARIABLE
from mic_supervisor.runtimes.identity import OWN_VARIABLES, identity_of, identity_variables
from mic_supervisor.runtimes.systemd import unit as units

IDENTITY = Identity(
    scope="default",
    host="0123456789ab",
    instance="whisper-0",
    model="whisper",
    backend="process",
    gpus=("GPU-a", "GPU-b"),
    ports={"http": 20007},
    spec={"kind": "process", "command": ["serve"], "limits": {"nofile": 9}},
    spec_hash="00112233aabbccdd",
    schema=1,
    origin="file",
)
SPEC = ProcessSpec(("serve", "--port", "20007", "$5"), env=(("KEY", "secret"),))
LAUNCH = Launch("mic-default-whisper-0-00112233", "systemd", IDENTITY, SPEC)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def properties(spec: ProcessSpec = SPEC, launch: Launch = LAUNCH) -> dict[str, tuple[str, Any]]:
    found = units.properties(launch, spec, "/opt/serve", 15, "/run/mic/environ/x")
    assert len({one.name for one in found}) == len(found)
    return {one.name: (one.signature, one.value) for one in found}


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("mic-default-MAM-0-0badcafe", "mic-default-MAM-0-0badcafe.service"),
        ("mic-a-b_c.d:e", "mic-a-b_c.d:e.service"),
        ("mic-a-x@1", "mic-a-x\\x401.service"),
        ("mic-a-\\", "mic-a-\\x5c.service"),
        ("mic-a-ä/ b", "mic-a-\\xc3\\xa4\\x2f\\x20b.service"),
    ],
)
def test_names_are_escaped_as_systemd_does(name: str, unit: str) -> None:
    assert units.unit_name(name) == unit


def test_a_long_name_is_cut_and_stays_its_own() -> None:
    one, other = (units.unit_name("mic-default-" + "ä" * 200 + end) for end in "xy")
    assert one != other
    assert len(one) <= 255
    assert re.fullmatch(r"mic-default-(\\xc3\\xa4)+-[0-9a-f]{16}\.service", one)


@given(TEXTS, TEXTS)
def test_a_name_is_valid_and_unlike_any_other(first: str, second: str) -> None:
    one, other = units.unit_name(first), units.unit_name(second)
    assert re.fullmatch(r"[A-Za-z0-9:_.\\-]*\.service", one)
    assert len(one) <= 255
    assert (one == other) == (first == second)


def test_the_path_of_a_unit_begins_as_its_scope_does_and_leads_back() -> None:
    assert units.path_prefix("a-1") == "/org/freedesktop/systemd1/unit/mic_2da_2d1_2d"
    path = "/org/freedesktop/systemd1/unit/mic_2da_2d1_2dx_5cx40_2eservice"
    assert path.startswith(units.path_prefix("a-1"))
    assert units.name_of(path) == "mic-a-1-x\\x40.service"
    assert units.pattern("a-1") == "mic-a-1-*.service"


# --- identity ---------------------------------------------------------------------------------


def test_a_unit_says_whose_it_is() -> None:
    variables = identity_variables(LAUNCH.name, IDENTITY)
    assert set(variables) == OWN_VARIABLES
    assert {k: v for k, v in variables.items() if k != VARIABLE} == {
        "MIC_SCOPE": "default",
        "MIC_INSTANCE": "whisper-0",
        "MIC_SPEC_HASH": "00112233aabbccdd",
    }
    assert identity_of(variables) == (LAUNCH.name, IDENTITY)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    max_leaves=8,
)


@given(TEXTS, TEXTS, st.lists(TEXTS), st.dictionaries(TEXTS, st.integers()), JSON)
def test_an_identity_comes_back_whole(
    name: str, model: str, gpus: list[str], ports: dict[str, int], value: Any
) -> None:
    identity = replace(
        IDENTITY, model=model, gpus=tuple(gpus), ports=ports, spec={"command": value}
    )
    variables = identity_variables(name, identity)
    assert identity_of(variables) == (name, identity)
    # Other users read it, and PID 1 takes no control characters on some versions.
    assert variables[VARIABLE].isascii()
    assert variables[VARIABLE].isprintable()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "its environment does not name it as ours"),
        ('{"managed_by": "somebody"}', "its environment does not name it as ours"),
        ("{", "its MIC_IDENTITY cannot be read: BadDocument("),
        ("[]", "its MIC_IDENTITY cannot be read: TypeError("),
        ("{}", "its MIC_IDENTITY cannot be read: KeyError('managed_by')"),
        ('{"managed_by": "mic-supervisor"}', "its MIC_IDENTITY cannot be read: KeyError('name')"),
    ],
)
def test_what_does_not_name_itself_is_foreign(text: str | None, reason: str) -> None:
    found = identity_of({} if text is None else {VARIABLE: text})
    assert isinstance(found, str)
    assert found.startswith(reason)


def test_a_specification_that_cannot_be_read_is_unknown() -> None:
    launch = replace(LAUNCH, identity=replace(IDENTITY, spec=None))
    found = identity_of(identity_variables(launch.name, launch.identity))
    assert found == (LAUNCH.name, launch.identity)


# --- the environment --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A.B", "A B", "Ä"])
def test_names_that_systemd_would_drop_are_refused(name: str) -> None:
    with pytest.raises(PreflightFailed) as failed:
        units.check_variables({name: "x"})
    assert str(failed.value) == (
        f"cannot set the variable {name!r}: systemd takes letters, digits and _ only, "
        "and no digit first"
    )


def test_what_is_not_utf_8_is_refused() -> None:
    with pytest.raises(PreflightFailed) as failed:
        units.check_variables({"A": "\udcff"})
    assert str(failed.value) == "cannot set the variable A: systemd takes only UTF-8 as its value"
    with pytest.raises(PreflightFailed) as failed:
        units.check_texts(("run", "\udcff"))
    assert str(failed.value) == "cannot run 'run': systemd takes only UTF-8 as its arguments"


# --- properties -------------------------------------------------------------------------------


def test_a_plain_process() -> None:
    found = properties()
    environment = found.pop("Environment")
    assert found == {
        "Description": ("s", "whisper on GPU-a, GPU-b"),
        "Slice": ("s", "mic.slice"),
        "Type": ("s", "exec"),
        "TimeoutStartUSec": ("t", 30_000_000),
        "ExecStart": ("a(sasb)", [["/opt/serve", ["serve", "--port", "20007", "$$5"], False]]),
        "EnvironmentFiles": ("a(sb)", [["/run/mic/environ/x", False]]),
        "WorkingDirectory": ("s", "/"),
        "RemainAfterExit": ("b", True),
        "Restart": ("s", "no"),
        "KillMode": ("s", "control-group"),
        "KillSignal": ("i", 15),
        "SendSIGKILL": ("b", True),
        "TimeoutStopUSec": ("t", 30_000_000),
        "OOMPolicy": ("s", "kill"),
        "TasksMax": ("t", 2**64 - 1),
        "StandardOutput": ("s", "journal"),
        "StandardError": ("s", "journal"),
        "SyslogIdentifier": ("s", "whisper-0"),
        "LogExtraFields": ("aay", [b"MIC_SCOPE=default", b"MIC_INSTANCE=whisper-0"]),
    }
    signature, values = environment
    assert signature == "as"
    pairs = dict(value.split("=", 1) for value in values)
    assert identity_of(pairs) == (LAUNCH.name, IDENTITY)


def test_no_secret_is_among_the_properties() -> None:
    assert "secret" not in repr(properties())


@pytest.mark.parametrize(
    ("spec", "added"),
    [
        (replace(SPEC, user="alice"), {"User": ("s", "alice")}),
        (replace(SPEC, user="1000:44"), {"User": ("s", "1000"), "Group": ("s", "44")}),
        (replace(SPEC, working_dir="/srv/x"), {"WorkingDirectory": ("s", "/srv/x")}),
        (replace(SPEC, stop_timeout=0.25), {"TimeoutStopUSec": ("t", 250_000)}),
        (
            replace(SPEC, limits=Limits(memory=5 << 30, cpus=2.5)),
            {"MemoryMax": ("t", 5 << 30), "CPUQuotaPerSecUSec": ("t", 2_500_000)},
        ),
        (
            replace(SPEC, limits=Limits(nofile=1024, memlock=-1)),
            {
                "LimitNOFILE": ("t", 1024),
                "LimitNOFILESoft": ("t", 1024),
                "LimitMEMLOCK": ("t", 2**64 - 1),
                "LimitMEMLOCKSoft": ("t", 2**64 - 1),
            },
        ),
    ],
)
def test_what_the_specification_adds(spec: ProcessSpec, added: dict[str, Any]) -> None:
    assert properties(spec) == {**properties(), **added}


def test_it_is_confined_to_what_is_near_its_gpus() -> None:
    launch = replace(LAUNCH, near=Near((0, 9, 16), (1,)))
    assert properties(launch=launch) == {
        **properties(),
        "AllowedCPUs": ("ay", b"\x01\x02\x01"),
        "NUMAPolicy": ("i", 2),
        "NUMAMask": ("ay", b"\x02"),
    }
    alone = properties(launch=replace(LAUNCH, near=Near((7,))))
    assert alone == {**properties(), "AllowedCPUs": ("ay", b"\x80")}


def test_directories_are_made_before_by_root() -> None:
    made = properties(replace(SPEC, user="alice", directories=("/srv/a$b", "/srv/a$b/c")))
    assert made["PermissionsStartOnly"] == ("b", True)
    signature, [[program, arguments, ignored]] = made["ExecStartPre"]
    assert (signature, program, ignored) == ("a(sasb)", sys.executable, False)
    assert arguments[:3] == [sys.executable, "-I", "-c"]
    assert arguments[4:] == ["alice", "/srv/a$$b", "/srv/a$$b/c"]


def test_without_a_gpu() -> None:
    launch = replace(LAUNCH, identity=replace(IDENTITY, gpus=()))
    assert properties(launch=launch)["Description"] == ("s", "whisper")
