"""What the file hands over, and what becomes desired of claims on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mic_supervisor.backends.registry import Registry
from mic_supervisor.config.document import Config
from mic_supervisor.config.load import load
from mic_supervisor.desired import FileDesired, desired_state
from mic_supervisor.errors import ConfigError
from mic_supervisor.model import Claim, DesiredState, Ending, GpuInventory, ProcessSpec
from mic_supervisor.views.config import summary
from tests.unit.plan import builders as b
from tests.unit.plan.builders import uuid

THERE = GpuInventory("nvml", b.gpus(4))
MODELS = """\
  a: {backend: process, command: [/bin/a, "${gpu_uuids}"], start_timeout: 7m}
  b: {backend: process, command: [/bin/b], env_file: secrets}
"""


def config(tmp_path: Path, gpus: str, models: str = MODELS, more: str = "") -> Config:
    path = tmp_path / "gpus.yaml"
    text = models.replace("secrets", str(tmp_path / "secrets"))
    path.write_text(f"version: 1\nmodels:\n{text}{more}gpus: {{{gpus}}}\n")
    return load(path, Registry(), environ={})


def claim(token: str, model: str, *indices: int) -> Claim:
    gpus = tuple(uuid(index) for index in indices)
    ids = b.on(model, *indices).id
    return Claim(token, model, len(gpus), 0.0, gpus=gpus, instance=ids, got_at=1.0)


def desired(
    made: Config, *claims: Claim, there: GpuInventory = THERE, tmp_path: Path = Path("/x")
) -> DesiredState:
    found = FileDesired(made, Registry(), tmp_path)
    return found.with_claims(found.state(there, {}), claims, there)


def test_a_range_hands_over_gpus_and_a_group_a_set_of_them(tmp_path: Path) -> None:
    made = config(tmp_path, '0: a, "1-2": fleet, 3: none')
    assert [(e.keys[0].value, e.value) for e in made.entries] == [
        *(("0", "a"), ("1", "fleet"), ("2", "fleet"), ("3", "none"))
    ]
    assert summary(made) == "valid: 4 GPUs, 1 of them kept empty, 2 of them handed over; 2 models"
    found = desired(made)
    assert [(entry.gpus, entry.size) for entry in found.fleet] == [((uuid(1),), 1), ((uuid(2),), 1)]
    assert found.kept_empty == (uuid(1), uuid(2), uuid(3))
    (both,) = desired(config(tmp_path, '"1,3": fleet')).fleet
    assert (both.gpus, both.size, both.digits) == ((uuid(1), uuid(3)), 2, ("bbbbbbbb", "dddddddd"))


def test_a_claim_becomes_an_instance_of_the_files_model(tmp_path: Path) -> None:
    made = config(tmp_path, '0: a, 1: fleet, "2,3": fleet')
    found = desired(made, claim("x", "a", 1), claim("y", "a", 2, 3))
    assert [(one.id, one.origin) for one in found.instances] == [
        ("a-aaaaaaaa", "file"),
        ("a-bbbbbbbb", "claim"),
        ("a-ccccccccx2", "claim"),
    ]
    one = found.instances[1]
    assert (one.gpus, one.start_timeout) == ((uuid(1),), 420.0)
    assert isinstance(one.workload, ProcessSpec) and one.workload.command[0] == "/bin/a"
    assert (found.kept_empty, found.unsatisfiable) == ((), ())
    assert [one.token for one in found.claims] == ["x", "y"]


def test_one_that_waits_or_ends_has_none_and_its_gpu_is_kept_empty(tmp_path: Path) -> None:
    made = config(tmp_path, "0: fleet")
    over = replace(claim("x", "a", 0), ending=Ending("released"))
    found = desired(made, over, Claim("y", "a", 1, 0.0))
    assert (found.instances, found.kept_empty) == ((), (uuid(0),))


def test_what_cannot_be_compiled_blocks_that_claim_alone_until_it_can(tmp_path: Path) -> None:
    made = FileDesired(config(tmp_path, "0: fleet, 1: fleet"), Registry(), tmp_path)
    claims = (claim("x", "b", 0), claim("y", "a", 1))
    state = made.state(THERE, {})
    found = made.with_claims(state, claims, THERE)
    assert [one.id for one in found.instances] == ["a-bbbbbbbb"]
    (bad,) = found.unsatisfiable
    assert (bad.instances, bad.gpus, bad.model) == (("b-aaaaaaaa",), (uuid(0),), "b")
    assert "secrets" in bad.reason
    assert found.kept_empty == ()
    (tmp_path / "secrets").write_text("A=1\n")
    assert len(made.with_claims(state, claims, THERE).instances) == 2


def test_a_claim_on_a_gpu_that_is_gone_is_left_as_it_is(tmp_path: Path) -> None:
    made = FileDesired(config(tmp_path, "0: fleet, 1: fleet"), Registry(), tmp_path)
    bindings = dict(made.state(THERE, {}).bindings)
    left = GpuInventory("nvml", b.gpus(1))
    state = made.state(left, bindings)
    assert [(entry.size, entry.trouble) for entry in state.fleet] == [
        (1, None),
        (1, f"GPU 1 is bound to {uuid(1)}, which is not there"),
    ]
    (named,) = state.unsatisfiable
    assert named.subject == "fleet on GPU 1"
    found = made.with_claims(state, (claim("x", "a", 1),), left)
    (bad,) = found.unsatisfiable
    assert (bad.instances, bad.reason) == (("a-bbbbbbbb",), state.fleet[1].trouble)


def test_what_the_file_lacks_and_nobody_confirmed_goes_on_as_it_was(tmp_path: Path) -> None:
    made = FileDesired(config(tmp_path, "0: fleet, 1: fleet"), Registry(), tmp_path)
    claims = (claim("x", "a", 0),)
    (before,) = made.with_claims(made.state(THERE, {}), claims, THERE).instances
    made.use(config(tmp_path, "1: fleet"))
    found = made.with_claims(made.state(THERE, {}), claims, THERE)
    assert found.instances == (before,)
    assert "the file no longer hands its GPUs over; taking it back waits" in found.warnings[0]
    made.use(config(tmp_path, "0: fleet", "  c: {backend: process, command: [/bin/c]}\n"))
    found = made.with_claims(made.state(THERE, {}), claims, THERE)
    assert found.instances == (before,)
    assert "the file no longer describes a; taking it back waits" in found.warnings[0]
    fresh = desired(
        config(tmp_path, "0: fleet", "  c: {backend: process, command: [/c]}\n"), *claims
    )
    assert [one.instances for one in fresh.unsatisfiable] == [("a-aaaaaaaa",)]


def test_what_a_file_says_that_waits_is_nothing_that_was(tmp_path: Path) -> None:
    made = FileDesired(config(tmp_path, "0: fleet"), Registry(), tmp_path)
    claims = (claim("x", "a", 0),)
    (before,) = made.with_claims(made.state(THERE, {}), claims, THERE).instances
    lacks = config(tmp_path, "0: fleet", "  c: {backend: process, command: [/bin/c]}\n")
    made.use(lacks, config(tmp_path, "0: fleet", MODELS.replace("/bin/a", "/bin/other")))
    assert made.with_claims(made.state(THERE, {}), claims, THERE).instances == (before,)


def test_a_change_of_the_file_is_compiled_for_claims_too(tmp_path: Path) -> None:
    made = FileDesired(config(tmp_path, "0: fleet"), Registry(), tmp_path)
    claims = (claim("x", "a", 0),)
    made.with_claims(made.state(THERE, {}), claims, THERE)
    made.use(config(tmp_path, "0: fleet", MODELS.replace("/bin/a", "/bin/other")))
    (one,) = made.with_claims(made.state(THERE, {}), claims, THERE).instances
    assert isinstance(one.workload, ProcessSpec) and one.workload.command[0] == "/bin/other"


def test_a_file_that_comes_while_the_last_one_is_compiled_is_compiled_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = config(tmp_path, "1: fleet")
    made = FileDesired(config(tmp_path, "0: fleet"), Registry(), tmp_path)
    compile_file = desired_state

    def compiles(*given: Any) -> DesiredState:
        state = compile_file(*given)
        if made.config is not later:
            made.use(later)
        return state

    monkeypatch.setattr("mic_supervisor.desired.desired_state", compiles)
    assert made.state(THERE, {}).config_hash != later.hash
    assert made.state(THERE, {}).config_hash == later.hash


def test_claims_are_compiled_by_the_file_that_the_state_is_of(tmp_path: Path) -> None:
    made = FileDesired(config(tmp_path, "0: fleet"), Registry(), tmp_path)
    state, claims = made.state(THERE, {}), (claim("x", "a", 0),)
    made.use(config(tmp_path, "0: fleet", MODELS.replace("/bin/a", "/bin/other")))
    (one,) = made.with_claims(state, claims, THERE).instances
    assert isinstance(one.workload, ProcessSpec) and one.workload.command[0] == "/bin/a"


def test_a_file_that_waits_shows_what_it_would_do_to_claims(tmp_path: Path) -> None:
    now = config(tmp_path, "0: fleet, 1: fleet")
    later = config(tmp_path, "0: fleet, 1: a", MODELS.replace("/bin/a", "/bin/other"))
    made = FileDesired(now, Registry(), tmp_path, later)
    claims = (claim("x", "a", 0), claim("y", "b", 1))
    waiting = made.with_claims(made.state(THERE, {}), claims, THERE).waiting
    assert waiting is not None
    assert [(one.id, one.origin) for one in waiting.instances] == [
        ("a-aaaaaaaa", "claim"),
        ("a-bbbbbbbb", "file"),
    ]
    assert [one.token for one in waiting.claims] == ["x"]


def test_a_gpu_that_a_server_has_for_itself_is_not_handed_over(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.pbtxt").touch()
    more = (
        f"backends: {{triton: {{image: t, model_repository: {tmp_path}, server: shared, "
        "gpus: [0, 2]}}\n"
    )
    made = config(tmp_path, "0: fleet, 1: fleet, 2: m", "  m: {backend: triton}\n", more)
    found = desired(made)
    (entry, free) = found.fleet
    assert entry.trouble == "its GPU is reserved for triton-shared"
    assert (free.trouble, found.kept_empty) == (None, (uuid(1),))
    assert [one.subject for one in found.unsatisfiable] == ["fleet on GPU 0"]


@pytest.mark.parametrize("model", ["fleet", "none"])
def test_no_model_is_called_as_a_value_is(tmp_path: Path, model: str) -> None:
    with pytest.raises(ConfigError, match="it has a meaning of its own"):
        config(tmp_path, f"0: {model}", f"  {model}: {{backend: process, command: [/bin/a]}}\n")


def test_a_profile_hands_gpus_over_while_it_is_on(tmp_path: Path) -> None:
    profiles = "profiles: {night: {gpus: {0: fleet}}}\nprofile: night\n"
    made = config(tmp_path, "0: a, 1: a", more=profiles)
    assert [(entry.value, entry.profile) for entry in made.entries] == [
        ("fleet", "night"),
        ("a", None),
    ]
