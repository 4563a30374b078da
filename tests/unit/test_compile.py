"""From models and GPUs to instances."""

from __future__ import annotations

from pathlib import Path

from mic_supervisor.backends.registry import Registry
from mic_supervisor.config.load import load
from mic_supervisor.desired import desired_state
from mic_supervisor.model import DesiredState, Gpu, GpuInventory

FIRST, SECOND = (f"MIG-f15ae56{n}-7b5c-5a0c-8ab1-3a1e0c2d9f10" for n in range(2))
SLICED = GpuInventory(
    "nvml",
    (
        Gpu("GPU-a", 0, "A100", mig=True),
        Gpu(FIRST, 0, "A100 MIG 1g.5gb", parent="GPU-a"),
        Gpu(SECOND, 0, "A100 MIG 1g.5gb", parent="GPU-a"),
    ),
)


def state(tmp_path: Path, server: str, *slices: str, more: str = "") -> DesiredState:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.pbtxt").touch()
    path = tmp_path / "gpus.yaml"
    path.write_text(
        "version: 1\n"
        "backends:\n"
        f"  triton: {{image: 'triton:1', model_repository: {tmp_path}, server: {server}}}\n"
        "models: {m: {backend: triton}}\n"
        f"gpus: {{{', '.join(f'{one}: m' for one in slices)}}}\n{more}"
    )
    registry = Registry()
    return desired_state(load(path, registry, environ={}), SLICED, {}, registry, tmp_path)


def test_a_server_cannot_have_several_slices(tmp_path: Path) -> None:
    (refused,) = state(tmp_path, "shared", FIRST, SECOND).unsatisfiable
    assert refused.subject == "triton-shared"
    assert "CUDA shows a process one slice" in refused.reason
    assert refused.hint == "set `server: per-gpu` under backends.triton"


def test_each_slice_can_have_a_server(tmp_path: Path) -> None:
    found = state(tmp_path, "per-gpu", FIRST, SECOND)
    assert found.unsatisfiable == ()
    assert [one.gpus for one in found.instances] == [(FIRST,), (SECOND,)]
    assert [one.id for one in found.instances] == ["m-f15ae560", "m-f15ae561"]


def test_one_slice_is_enough_for_a_shared_server(tmp_path: Path) -> None:
    (made,) = state(tmp_path, "shared", FIRST).instances
    assert made.gpus == (FIRST,)


def test_a_server_is_known_where_only_a_profile_that_is_off_has_its_model(tmp_path: Path) -> None:
    more = f"profiles: {{night: {{gpus: {{{SECOND}: m}}}}}}\n"
    found = state(tmp_path, "shared", FIRST, more=more)
    assert found.aside == ((SECOND, "m"), (SECOND, "triton-shared"))
    (made,) = found.instances
    assert made.model == "triton-shared"  # as what runs there says
