"""Whether what runs is what the file asks for."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.model import ContainerSpec, Limits, Mount, Port, ProcessSpec
from mic_supervisor.plan import spec as specs
from mic_supervisor.plan.actions import FieldDiff
from mic_supervisor.plan.spec import SpecKey, differences, normalise, spec_hash

KEY = SpecKey(b"key")
FULL = ContainerSpec(
    image="mam:1",
    command=("serve", "--port", "${port}"),
    entrypoint=("/bin/sh",),
    env=(("TOKEN", "hunter2"),),
    env_file="/etc/mic/mam.env",
    file_env=(("PASSWORD", "swordfish"),),
    variables=(("HOME_OF", "correct-horse"),),
    devices=("GPU-1",),
    mounts=(Mount("/srv/a", "/a", read_only=True), Mount("/srv/b", "/b")),
    ports=(Port("http", 8000, 80), Port("grpc")),
    listen="0.0.0.0",
    network="host",
    shm_size=1 << 30,
    user="1000",
    working_dir="/w",
    limits=Limits(memory=1 << 34, nofile=1024),
    stop_signal="SIGINT",
    stop_timeout=60.0,
    networks=("shop",),
    network_aliases=("mam",),
    ipc="host",
    host_devices=("/dev/fuse:/dev/fuse:rwm",),
    cap_add=("SYS_PTRACE",),
    cap_drop=("ALL",),
    security_opt=("no-new-privileges=true",),
    group_add=("44",),
    extra_hosts=("db:192.0.2.9",),
    dns=("192.0.2.53",),
    tmpfs=("/run:size=64m",),
    ulimits=(("core", "0:0"),),
    read_only=True,
    cpuset="0-3",
    labels=(("a.b", "x"),),
    hostname="mam",
    sysctls=(("net.core.somaxconn", "99"),),
    pull="always",
    digest="sha256:1",
)


def paths(before: object, after: object) -> list[str]:
    assert isinstance(before, ContainerSpec | ProcessSpec)
    assert isinstance(after, ContainerSpec | ProcessSpec)
    return [diff.path for diff in differences(normalise(before, KEY), normalise(after, KEY))]


def recorded(spec: object) -> dict[str, object]:
    """As it comes back from a label."""
    assert isinstance(spec, ContainerSpec | ProcessSpec)
    return dict(json.loads(json.dumps(normalise(spec, KEY))))


def test_only_what_differs_from_a_default_is_written_down() -> None:
    assert normalise(ContainerSpec("mam:1"), KEY) == {"kind": "container", "image": "mam:1"}
    assert normalise(ProcessSpec(("/opt/a",)), KEY) == {"kind": "process", "command": ["/opt/a"]}
    limited = ContainerSpec("mam:1", limits=Limits(cpus=2.0), mounts=(Mount("/s", "/t"),))
    assert normalise(limited, KEY) == {
        "kind": "container",
        "image": "mam:1",
        "limits": {"cpus": 2.0},
        "mounts": {"/t": {"source": "/s"}},
    }


def test_everything_is_written_down_and_comes_back_equal() -> None:
    assert set(normalise(FULL, KEY)) == {"kind", *(f.name for f in dataclasses.fields(FULL))}
    assert differences(recorded(FULL), normalise(FULL, KEY)) == ()
    assert spec_hash(recorded(FULL)) == spec_hash(normalise(FULL, KEY))


def test_no_secret_is_in_the_normalised_text_nor_in_a_repr() -> None:
    everything = json.dumps(normalise(FULL, KEY)) + repr(FULL) + repr(KEY)
    for secret in ("hunter2", "swordfish", "correct-horse", "key'"):
        assert secret not in everything
    assert "TOKEN" in everything


@given(
    st.dictionaries(st.sampled_from("ABC"), st.text().map("§{}".format)),
    st.sampled_from(["env", "file_env", "variables"]),
)
def test_no_value_of_an_environment_is_in_the_normalised_text(
    values: dict[str, str], name: str
) -> None:
    fields: dict[str, Any] = {name: tuple(sorted(values.items()))}
    written = json.dumps(normalise(ContainerSpec("i", **fields), KEY), ensure_ascii=False)
    assert "§" not in written
    assert all(key in written for key in values)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"image": "mam:2"}, ["image"]),
        ({"command": ("serve", "--port", "80")}, ["command[2]"]),
        ({"command": ("serve",)}, ["command"]),
        ({"entrypoint": None}, ["entrypoint"]),
        ({"env": (("TOKEN", "x"),)}, ["env.TOKEN"]),
        ({"env": ()}, ["env.TOKEN"]),
        ({"file_env": (("PASSWORD", "x"), ("B", "y"))}, ["file_env.B", "file_env.PASSWORD"]),
        ({"variables": (("HOME_OF", "x"),)}, ["variables.HOME_OF"]),
        ({"env_file": None}, ["env_file"]),
        ({"devices": ("GPU-2",)}, ["devices[0]"]),
        ({"mounts": (Mount("/srv/a", "/a"), Mount("/srv/b", "/b"))}, ["mounts./a.read_only"]),
        ({"mounts": (Mount("/srv/a", "/a", True),)}, ["mounts./b"]),
        ({"ports": (Port("http", 8000, 81), Port("grpc"))}, ["ports.http.container"]),
        ({"ports": (Port("http", 8000, 80),)}, []),
        ({"listen": "127.0.0.1"}, ["listen"]),
        ({"network": "bridge"}, ["network"]),
        ({"shm_size": None}, ["shm_size"]),
        ({"limits": Limits(memory=1 << 34)}, ["limits.nofile"]),
        ({"stop_signal": "SIGTERM", "stop_timeout": 1.0}, []),
        ({"digest": "sha256:2"}, ["digest"]),
        ({"digest": None}, []),  # any is as good, where nobody asked for the newest
    ],
    ids=str,
)
def test_what_differs_is_named_by_its_path(change: dict[str, object], path: list[str]) -> None:
    assert paths(FULL, dataclasses.replace(FULL, **change)) == path  # type: ignore[arg-type]


def test_the_order_of_what_has_names_is_no_difference() -> None:
    turned = dataclasses.replace(FULL, mounts=FULL.mounts[::-1], ports=FULL.ports[::-1])
    assert paths(FULL, turned) == []
    assert spec_hash(normalise(FULL, KEY)) == spec_hash(normalise(turned, KEY))


def test_a_secret_is_hidden_on_both_sides() -> None:
    other = dataclasses.replace(FULL, env=(("TOKEN", "x"),))
    assert differences(normalise(FULL, KEY), normalise(other, KEY)) == (
        FieldDiff("env.TOKEN", "(hidden)", "(hidden)"),
    )


def test_an_upgrade_that_adds_a_field_with_a_default_replaces_nothing() -> None:
    # What an older version wrote lacks the field, and so does what a newer one writes.
    for field in dataclasses.fields(FULL):
        if field.default is dataclasses.MISSING:
            continue
        plain = dataclasses.replace(FULL, **{field.name: field.default})
        older = {name: value for name, value in recorded(plain).items() if name != field.name}
        assert differences(older, normalise(plain, KEY)) == ()
        assert spec_hash(older) == spec_hash(normalise(plain, KEY))


def test_the_keys_of_containers_are_compared_as_the_file_calls_them() -> None:
    plain = ContainerSpec("i")
    before = recorded(plain)
    assert before == {"kind": "container", "image": "i"}  # as earlier versions have recorded it
    later = dataclasses.replace(
        plain, ipc="host", host_devices=("/dev/a:/dev/a:r",), sysctls=(("net.a", "1"),)
    )
    assert differences(before, normalise(later, KEY)) == (
        FieldDiff("devices", [], ["/dev/a:/dev/a:r"]),
        FieldDiff("ipc", "private", "host"),
        FieldDiff("sysctls", [], {"net.a": "1"}),
    )
    other = dataclasses.replace(later, sysctls=(("net.a", "2"), ("net.b", "1")))
    assert paths(later, other) == ["sysctls.net.a", "sysctls.net.b"]


def test_when_an_image_is_pulled_replaces_nothing() -> None:
    plain = normalise(ContainerSpec("i"), KEY)
    always = normalise(ContainerSpec("i", pull="always"), KEY)
    assert plain != always and spec_hash(plain) == spec_hash(always)
    assert differences(plain, always) == ()


def test_a_field_that_this_version_does_not_know_is_not_compared() -> None:
    newer = {**recorded(FULL), "oom_score": 3, "cgroup": {"parent": "x"}}
    assert differences(newer, normalise(FULL, KEY)) == ()


def test_secrets_digested_with_a_lost_key_are_unknown_and_not_changed() -> None:
    lost = SpecKey(b"lost")
    was = normalise(FULL, lost)
    now = dataclasses.replace(FULL, env=(("TOKEN", "changed too"),))
    assert differences(was, normalise(now, KEY)) == ()
    assert [
        d.path for d in differences(was, normalise(dataclasses.replace(FULL, env=()), KEY))
    ] == ["env.TOKEN"]
    assert specs.keys_of(was) == {lost.id}
    assert specs.keys_of(normalise(ContainerSpec("i"), KEY)) == set()


def test_equal_secrets_under_one_key_are_equal_and_differ_under_another() -> None:
    assert KEY.digest("x") == SpecKey(b"key").digest("x")
    assert KEY.digest("x") != KEY.digest("y")
    assert KEY.digest("x") != SpecKey(b"other").digest("x")


def test_a_container_and_a_process_differ_in_kind_alone() -> None:
    process = ProcessSpec(("/opt/a",))
    assert differences(normalise(FULL, KEY), normalise(process, KEY)) == (
        FieldDiff("kind", "container", "process"),
    )


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    ),
    st.sampled_from(
        [
            "image",
            "env",
            "mounts",
            "ports",
            "limits",
            "kind",
            "stop_timeout",
            "drain",
            "listen",
            "x",
        ]
    ),
)
def test_a_label_that_somebody_edited_stops_nobody(value: object, name: str) -> None:
    odd = {**recorded(FULL), name: value}
    differences(odd, normalise(FULL, KEY))
    specs.keys_of(odd)
    signal, grace = specs.stop_parameters(odd)
    assert isinstance(signal, str)
    assert isinstance(grace, float)
    specs.drain_parameters(odd)
    assert isinstance(specs.listen_address(odd), str)


def test_how_to_stop_what_left_no_record() -> None:
    assert specs.stop_parameters(None) == ("SIGTERM", 30.0)
    assert specs.stop_parameters(recorded(FULL)) == ("SIGINT", 60.0)
