"""An instance that has just ended, while its runtime still tidies up after it."""

from __future__ import annotations

import pytest

from mic_supervisor.model import Listener, RunState
from tests.unit.plan.builders import observed, on, plan_for, steps, workload


@pytest.mark.parametrize("closing", [True, False])
def test_its_ports_are_no_strangers(closing: bool) -> None:
    item = on("MAM", 0)
    ended = workload(item, RunState.EXITED, closing=closing)
    (port,) = ended.identity.ports.values()
    plan = plan_for([item], observed(ended, listeners=[Listener(port)]))
    words = {step.split()[0] for step in steps(plan)}
    # The engine's proxy listens on for a moment. It is the very container that is started again.
    assert ("restart" in words) is closing
