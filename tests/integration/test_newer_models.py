"""Files of a model that are newer than what a real Triton has loaded: who sees it, and who acts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.job_world import World
from tests.support.ports import PortBlock
from tests.support.triton import infer_request
from tests.support.waiting import http

pytestmark = [pytest.mark.engine, pytest.mark.triton]

MAM = "MAM-51000000"


def answer(job: World, instance: str, model: str) -> float:
    done = http(f"{job.url(instance)}/v2/models/{model}/infer", "POST", infer_request(1.0), 20)
    return float(done.json()["outputs"][0]["data"][0])


def doubled(directory: Path) -> None:
    """Another version of the model is put in its place: it answers with twice what it is given."""
    path = directory / "1" / "model.py"
    path.write_text(
        path.read_text().replace('Tensor("OUTPUT", given)', 'Tensor("OUTPUT", 2 * given)')
    )


def warning(directory: Path, model: str, instance: str, restart: str) -> str:
    return (
        f"warning: {model} in {instance}: the files in {directory} are not those that are loaded; "
        f"load them with: mic-supervisor restart {restart}, or apply --pull\n"
    )


def test_newer_files_of_a_model_are_seen_and_taken_on_demand(job: World, triton_image: str) -> None:
    assert triton_image
    directory = job.repository.model("MAM")
    job.write({0: "MAM"}, MAM="{backend: triton}")
    job.apply()
    job.unchanged()
    before = job.run_of(MAM)
    doubled(directory)
    told = warning(directory, "MAM", MAM, MAM)
    assert job.plan() == f"{told}\nNo changes.\n"
    assert job.plan_json()["warnings"] == [told.removeprefix("warning: ").strip()]
    job.apply()
    assert (job.run_of(MAM), answer(job, MAM, "MAM")) == (before, 1.0), "nobody asked for it"

    plan = job.plan("--pull")
    assert plan.startswith(f"~ restart  {MAM}  GPU 0  asked for\n\n{told}")
    assert "warning: mic-test/triton:1 came from no registry, and none is asked for it\n" in plan
    assert job.run_of(MAM) == before
    job.apply("--pull")
    assert job.run_of(MAM) != before
    assert answer(job, MAM, "MAM") == 2.0
    job.unchanged()


def test_one_model_of_a_server_of_several(job: World, triton_image: str) -> None:
    assert triton_image
    fixed = PortBlock()
    directory = job.repository.model("MAM")
    job.repository.model("web")
    ports = ", ".join(f"{name}: {fixed.take()}" for name in ("http", "grpc", "metrics"))
    job.settings = job.settings.removesuffix("}}") + f", server: shared, ports: {{{ports}}}}}}}"
    job.write({0: "MAM", 1: "web"}, MAM="{backend: triton}", web="{backend: triton}")
    job.mic.run()
    job.apply()
    run = job.run_of("triton-shared")
    doubled(directory)
    told = warning(directory, "MAM", "triton-shared", "MAM")
    assert job.plan() == f"{told}\nNo changes.\n"
    job.mic("restart", "MAM", rc=0)
    assert answer(job, "triton-shared", "MAM") == 2.0
    assert answer(job, "triton-shared", "web") == 1.0
    job.unchanged()
    assert job.run_of("triton-shared") == run
    fixed.close()
