"""Instances start side by side: many take no longer than one, beyond what the cores are for."""

from __future__ import annotations

import time
from collections.abc import Iterator

import docker
import pytest

from tests.integration.job_world import World, server, world

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture
def job(tmp_path_factory: pytest.TempPathFactory, engine: docker.APIClient) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("job"), engine, gpus=8) as made:
        yield made


def seconds(job: World) -> float:
    begun = time.monotonic()
    job.apply()
    return time.monotonic() - begun


def test_eight_servers_that_take_3_s_are_ready_within_6(job: World, server_image: str) -> None:
    """On the idle machine that this is measured on; elsewhere, against one of them."""
    job.write({0: "a"}, a=server(START_DELAY=3))
    one = seconds(job)
    job.mic("down", "--yes", rc=0)
    job.write({"0-7": "a"})
    eight = seconds(job)
    print(f"one {one:.1f} s, eight {eight:.1f} s")
    assert len(job.runs()) == 8
    # One after the other they would take 24 s.
    assert eight < max(6.0, 2 * one)


@pytest.mark.triton
def test_four_triton_models_take_less_than_twice_the_time_of_one(
    job: World, triton_image: str
) -> None:
    job.repository.model("MAM", initialise_seconds=2)
    times = []
    for count in (1, 4):
        job.write(dict.fromkeys(range(count), "MAM"), MAM="{backend: triton}")
        times.append(seconds(job))
        assert len(job.runs()) == count
        job.mic("down", "--yes", rc=0)
    one, four = times
    print(f"one {one:.1f} s, four {four:.1f} s")
    assert four < 2 * one


def test_a_slow_instance_delays_no_other(job: World, server_image: str) -> None:
    job.write({0: "slow", 1: "a"}, slow=server(START_DELAY=4), a=server())
    begun = time.monotonic()
    apply = job.mic.start("apply")
    while "a-51000001: ready" not in apply.text():
        assert apply.process.poll() is None, apply.text()
        time.sleep(0.05)
    assert time.monotonic() - begun < 4
    assert apply.process.wait(30) == 0
