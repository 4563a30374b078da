"""One storm after another, until the time is up."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import docker

from tests.chaos.judge import converge, first, judge, paused
from tests.chaos.machine import machine
from tests.chaos.script import Kind, storms


@dataclass
class Outcome:
    """What a run did, for who writes it down; `seconds` are those until each storm was over."""

    seed: int
    storms: int = 0
    acts: dict[Kind, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    looks: int = 0
    minutes: float = 0.0

    def lines(self) -> list[str]:
        taken = sorted(self.seconds) or [0.0]
        counts = sorted(self.acts.items(), key=lambda item: (-item[1], item[0]))
        return [
            f"Seed {self.seed}: {self.storms} storms of {sum(self.acts.values())} disturbances in "
            f"{self.minutes:.0f} minutes,",
            f"and {self.looks} looks at who holds which GPU. After a storm it converged within "
            f"{taken[len(taken) // 2]:.1f} s",
            f"in the middle of all cases, {taken[-1]:.1f} s at most.",
            "",
            "| Disturbance | Times |",
            "|---|---|",
            *(f"| {kind} | {count} |" for kind, count in counts),
        ]


def play(engine: docker.APIClient, seed: int, seconds: float) -> Outcome:
    """Storms for as long. Raises AssertionError, with the storm and the seed in its notes."""
    outcome, begun = Outcome(seed), time.monotonic()
    print(f"seed {seed}", flush=True)
    with machine(engine) as made:
        quiet = first(made)
        for storm in storms(seed):
            if time.monotonic() > begun + seconds:
                break
            try:
                print(f"storm {storm.number}: {'; '.join(map(str, storm.acts))}", flush=True)
                for act in storm.acts:
                    made.disturb(act)
                paused(made, storm)
                made.calm(storm.last)
                took = converge(made, storm)
                quiet = judge(made, storm, quiet)
            except BaseException as error:
                error.add_note(f"seed {seed}, storm {storm.number}; the log ends:\n{made.log()}")
                raise
            print(f"  converged after {took:.1f} s", flush=True)
            outcome.storms += 1
            outcome.seconds.append(took)
            for act in storm.acts:
                outcome.acts[act.kind] = outcome.acts.get(act.kind, 0) + 1
        outcome.looks = made.driver.looks
    outcome.minutes = (time.monotonic() - begun) / 60
    return outcome
