"""A hundred faults on the pool, as a seed has them: a GPU never has two owners, and what nobody
claims ends with the grace.

`SEED=7 make test-fleet PYTEST_ARGS='-s -k faults'` repeats a run, as far as a machine can.
"""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.fleet.gpu_hosts import GRACE
from tests.fleet.namespaces import ADDRESSES, GPU_HOSTS
from tests.fleet.pool import Pool, world
from tests.fleet.watcher import Watcher, network_of
from tests.support.waiting import until

FAULTS = 100
LONGEST = GRACE + 20.0  # seconds; drain, hook, stop and release come after the grace
MODELS = ("chat-1", "chat-2")


@dataclass
class Faults:
    """At most one host is without power or cable, and one drained: two managers have to agree."""

    pool: Pool
    watcher: Watcher
    dice: random.Random
    off: str = ""
    cut: str = ""
    drained: str = ""
    done: dict[str, int] = field(default_factory=dict)

    KINDS = (
        *("supervisor", "engine", "containerd", "holder", "holder", "instance", "instance"),
        *("power", "cable", "scale", "change", "drain"),
    )

    def next(self) -> None:
        kind = self.dice.choice(self.KINDS)
        said = getattr(self, kind)()
        self.done[kind] = self.done.get(kind, 0) + 1
        print(f"{time.strftime('%T')} {kind}: {said}", flush=True)
        time.sleep(self.dice.uniform(0, 3))

    @property
    def up(self) -> list[str]:
        return [host for host in GPU_HOSTS if host != self.off]

    def killed(self, pids: list[int]) -> str:
        """One of them."""
        if not pids or not (pid := self.dice.choice(sorted(pids))):
            return "none"
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return str(pid)

    def order(self, *words: str) -> str:
        """Said to any manager that can hear it. While none leads, nobody follows."""
        for host in self.up:
            if host != self.cut and self.pool.try_docker(host, *words, timeout=15):
                return f"{' '.join(words)}: {host} did"
        return f"{' '.join(words)}: nobody did"

    # --- faults ---------------------------------------------------------------------------------

    def supervisor(self) -> str:
        host = self.dice.choice(self.up)
        # Another supervisor gives who vanished another grace.
        self.watcher.excuse(network_of(self.pool.first(host)))
        return f"{host} {self.killed([self.pool.supervisor(host)])}"

    def engine(self) -> str:
        host = self.dice.choice(self.up)
        return f"{host} {self.killed([self.pool.engine(host)])}"

    def containerd(self) -> str:
        host = self.dice.choice(self.up)
        return f"{host} {self.killed([self.pool.service(host, 'containerd', 'containerd')])}"

    def holder(self) -> str:
        return self.killed([pid for host in self.up for pid in self.pool.seen(host).holders])

    def instance(self) -> str:
        return self.killed([one.pid for host in self.up for one in self.pool.seen(host).models])

    def power(self) -> str:
        if self.off:
            host, self.off = self.off, ""
            self.pool.start(host, ADDRESSES[host])
            return f"{host} on"
        self.off = self.cut or self.dice.choice(GPU_HOSTS)
        self.cut = ""
        self.pool.kill(self.off)
        return f"{self.off} off"

    def cable(self) -> str:
        if self.off:
            return "none"
        host, up = self.cut or self.dice.choice(GPU_HOSTS), bool(self.cut)
        self.cut = "" if up else host
        self.pool.connect(host, up=up)
        return f"{host} {'in' if up else 'out'}"

    def scale(self) -> str:
        count = self.dice.randint(3, 8)
        return self.order("service", "scale", "--detach", f"pool_chat={count}")

    def change(self) -> str:
        command = f"claim {self.dice.choice(MODELS)}"
        return self.order("service", "update", "--detach", "--args", command, "pool_chat")

    def drain(self) -> str:
        host, back = self.drained or self.dice.choice(GPU_HOSTS), bool(self.drained)
        self.drained = "" if back else host
        state = "active" if back else "drain"
        return self.order("node", "update", "--availability", state, host)

    def heal(self) -> None:
        if self.off:
            self.power()
        if self.cut:
            self.cable()
        ready = dict.fromkeys(GPU_HOSTS, "Ready")
        until(lambda: self.pool.nodes() == ready, "all hosts to be back", timeout=180)
        for host in GPU_HOSTS:
            self.pool.docker(host, "node", "update", "--availability", "active", host)


def models_of(pool: Pool) -> int:
    return sum(len(pool.seen(host).models) for host in GPU_HOSTS)


def test_a_hundred_faults_give_no_gpu_two_owners_and_leave_nothing_unclaimed(
    tmp_path: Path,
) -> None:
    seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(10**6))
    print(f"SEED={seed}")
    with world(tmp_path) as pool, Watcher() as watcher:
        pool.deploy()
        pool.await_ready(6)
        faults = Faults(pool, watcher, random.Random(seed))
        for _ in range(FAULTS):
            faults.next()
        faults.heal()
        pool.deploy()
        pool.await_ready(6, timeout=300)
        pool.await_running(6)
        until(
            lambda: not any(pool.seen(h).unclaimed for h in GPU_HOSTS),
            "the rest to end",
            timeout=90,
        )
        models = [pair for host in GPU_HOSTS for pair in pool.seen(host).models]
        print(
            f"{faults.done}; {watcher.looks} looks; unclaimed for {watcher.longest:.1f} s at most"
        )
    assert len(models) == 6
    assert watcher.doubled == [], f"SEED={seed}"
    assert watcher.longest < LONGEST, f"SEED={seed}"
