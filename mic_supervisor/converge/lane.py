"""Changes that are being carried out together, and how far each instance among them is.

Whoever looks at the machine meanwhile sees it from here: `status`, `/readyz`, the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

from mic_supervisor.plan.actions import Change
from mic_supervisor.plan.health import Activity, Phase
from mic_supervisor.plan.memory import Floor


@dataclass(frozen=True, slots=True)
class Lane:
    """Its steps are carried out one after the other, but for those inside a server."""

    instances: frozenset[str]
    gpus: frozenset[str]
    activities: dict[str, Activity] = field(default_factory=dict, compare=False)  # by instance
    # By instance, what its GPUs held when they were released for it.
    floors: dict[str, Mapping[str, Floor]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, changes: Iterable[Change]) -> Self:
        """As it is before its first step."""
        changes = [*changes]
        instances = frozenset(change.instance for change in changes)
        gpus = frozenset(uuid for change in changes for uuid in change.gpus)
        return cls(instances, gpus, dict.fromkeys(instances, Activity(Phase.PENDING)))

    def overlaps(self, other: Lane) -> bool:
        return bool(self.instances & other.instances or self.gpus & other.gpus)

    def enters(self, instance: str, phase: Phase) -> None:
        """A step begins for it, and whoever has not begun yet waits for that."""
        self.activities[instance] = Activity(phase)
        for name, activity in self.activities.items():
            if name != instance and activity.phase is Phase.PENDING:
                said = f"waits for {instance}, which is {phase.value}"
                self.activities[name] = Activity(Phase.PENDING, said)

    def reports(self, instance: str, text: str) -> None:
        """What the step that is under way waits for, or how far it is."""
        self.activities[instance] = self.activities[instance]._replace(reason=text)
