"""A host out of service and back, with the proxy that must know."""

from __future__ import annotations

from tests.fleet.namespaces import answered
from tests.fleet.world import EVERYTHING, Fleet


def test_a_drained_host_serves_nothing_until_it_is_put_back(fleet: Fleet) -> None:
    refused = fleet.play("mic.supervisor.drain", rc=2)
    assert "name those that are meant with --limit" in refused.text
    others = [one for one in EVERYTHING if not one.startswith("gpu2/")]
    only = ("--limit", "gpu2", "-e", "fleet_reason=driver")
    with fleet.load() as counted:
        fleet.play("mic.supervisor.drain", *only)
        assert fleet.upstream() == others
        assert fleet.status("gpu2")["drained"]["reason"] == "driver"
        assert [row["pid"] for row in fleet.status("gpu2")["instances"]] == [None, None]
        again = fleet.play("mic.supervisor.drain", *only)
        assert again.recap("gpu2")["changed"] == 0
        fleet.play("mic.supervisor.undrain", "--limit", "gpu2")
    answered(counted)
    assert fleet.upstream() == EVERYTHING
    assert fleet.status("gpu2")["drained"] is None


def test_hosts_that_are_drained_together_leave_the_proxy_one_after_the_other(fleet: Fleet) -> None:
    """And none of them comes back to it when the next one is drained."""
    only = ("--limit", "gpu1,gpu2")
    with fleet.load() as counted:
        fleet.play("mic.supervisor.drain", *only)
        assert fleet.upstream() == [one for one in EVERYTHING if one.startswith("gpu3/")]
        fleet.play("mic.supervisor.undrain", *only)
    answered(counted)
    assert fleet.upstream() == EVERYTHING
