"""Two minutes of `make chaos`, with one seed: see tests/chaos."""

from __future__ import annotations

import os

import docker
import pytest

from tests.chaos.play import play

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.usefixtures("device_requests")]

SEED = 16


def test_what_goes_wrong_all_at_once_costs_nothing_that_did_not_change(
    engine: docker.APIClient, busybox_image: str
) -> None:
    if os.geteuid() != 0:
        pytest.skip("cannot run: only root can mount a small disk")
    outcome = play(engine, SEED, 110)
    print("\n".join(outcome.lines()))
    assert outcome.storms >= 2
    assert outcome.looks > outcome.storms
