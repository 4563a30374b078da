"""Claims that a Docker Swarm holds, on three engines, with requests through nginx meanwhile.

`make test-fleet PYTEST_ARGS=-s` shows how long each thing took.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from tests.fleet.gpu_hosts import GPUS
from tests.fleet.namespaces import GPU_HOSTS, answered
from tests.fleet.pool import Pool, timed, world
from tests.fleet.watcher import Seen, Watcher, look, network_of
from tests.support.waiting import until

CLAIMS = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with world(tmp_path_factory.mktemp("pool")) as pool:
        pool.deploy()
        pool.await_ready(CLAIMS)
        pool.await_proxy(CLAIMS)
        with pool.nginx():
            yield pool


@pytest.fixture
def pool(made: Pool) -> Iterator[Pool]:
    """Six claims of chat-1 that are ready, two on each host, as far as the hosts are there."""
    made.deploy()
    made.await_running(CLAIMS)
    made.await_ready(CLAIMS)
    made.await_proxy(CLAIMS)
    with Watcher() as watcher:
        yield made
    assert watcher.doubled == [] and watcher.looks > 0


def spread(found: dict[str, int]) -> Counter[str]:
    return Counter(name.partition("/")[0] for name in found)


def test_six_claims_have_a_gpu_each_and_a_thirteenth_waits_at_the_scheduler(pool: Pool) -> None:
    pool.deploy(replicas=0)
    until(lambda: not any(pool.seen(host).models for host in GPU_HOSTS), "nothing to run")
    pool.deploy()
    print(f"deploy: {timed(lambda: pool.await_ready(CLAIMS)):.1f} s")
    assert spread(pool.ready()) == dict.fromkeys(GPU_HOSTS, 2)
    everything = len(GPU_HOSTS) * GPUS
    pool.deploy(replicas=everything + 1)
    pool.await_ready(everything)
    (waiting,) = [task for task in pool.tasks() if task.state.startswith("Pending")]
    assert "insufficient resources" in waiting.error
    for host in GPU_HOSTS:
        assert len(pool.seen(host).models) == len(pool.seen(host).holders) == GPUS


def test_another_model_replaces_the_first_one_claim_after_the_other_and_fails_no_request(
    pool: Pool,
) -> None:
    with pool.load() as counted:
        pool.deploy(model="chat-2")
        print(f"rolling change: {timed(lambda: pool.await_update('completed')):.1f} s")
        pool.await_ready(CLAIMS, model="chat-2")
    assert answered(counted) > 100
    # And back, by the fixture of the next test, in the same way.


def test_a_model_that_does_not_get_ready_is_taken_back_and_five_claims_never_know(
    pool: Pool,
) -> None:
    before = pool.ready()
    with pool.load() as counted:
        pool.deploy(model="broken")
        took = timed(lambda: pool.await_update("rollback_completed"))
        print(f"taken back: {took:.1f} s")
        after = pool.await_ready(CLAIMS)
    answered(counted)
    assert len(before.items() & after.items()) == CLAIMS - 1
    failed = [task for task in pool.tasks() if task.state.startswith("Failed")]
    assert failed and all("non-zero exit (1)" in task.error for task in failed)


def test_a_host_without_power_loses_its_claims_to_the_others_and_comes_back_empty(
    pool: Pool,
) -> None:
    pool.balance()
    others = GPU_HOSTS[:2]
    stayed = pool.ready(*others)
    with patient_proxy(pool), pool.load() as counted:
        pool.kill("gpu3")
        took = timed(lambda: pool.await_ready(CLAIMS, *others))
        print(f"ready elsewhere: {took:.1f} s")
    print(f"requests: {counted.pop('200')}, and failed: {sum(counted.values())}")
    assert stayed.items() <= pool.ready(*others).items()
    back = timed(lambda: pool.start_again("gpu3"))
    print(f"back: {back:.1f} s")
    assert pool.seen("gpu3") == Seen()
    pool.deploy(replicas=3 * GPUS)
    assert spread(pool.await_ready(3 * GPUS)) == dict.fromkeys(GPU_HOSTS, GPUS)


def test_a_host_that_the_scheduler_drains_hands_over_and_fails_no_request(pool: Pool) -> None:
    pool.balance()
    with pool.load() as counted:
        pool.docker("gpu1", "node", "update", "--availability", "drain", "gpu3")
        try:
            took = timed(lambda: pool.await_ready(CLAIMS, *GPU_HOSTS[:2]))
            print(f"drained: {took:.1f} s")
            until(lambda: pool.seen("gpu3") == Seen(), "nothing to run on gpu3")
        finally:
            pool.docker("gpu1", "node", "update", "--availability", "active", "gpu3")
    answered(counted)


def test_a_supervisor_that_is_killed_twenty_times_touches_no_instance(pool: Pool) -> None:
    pool.balance()
    before, tasks = pool.ready(), pool.containers()
    with pool.load() as counted:
        for turn in range(20):
            host = GPU_HOSTS[turn % len(GPU_HOSTS)]
            pool.kill_supervisor(host)
            if turn % 2:  # the others are killed again while they look for what runs
                until(partial(pool.all_claims_ready, host), "its claims", timeout=60)
        until(lambda: all(map(pool.all_claims_ready, GPU_HOSTS)), "all claims", timeout=60)
    answered(counted)
    assert pool.ready() == before
    assert pool.containers() == tasks


def test_a_host_that_is_cut_off_serves_on_until_it_is_back(pool: Pool) -> None:
    pool.balance()
    cut_off = pool.seen("gpu3")
    pool.connect("gpu3", up=False)
    try:
        pool.await_ready(CLAIMS, *GPU_HOSTS[:2])
        # More copies than asked for: who is cut off cannot be told, and nobody else may say.
        assert pool.seen("gpu3").models == cut_off.models and len(cut_off.models) == 2
    finally:
        pool.connect("gpu3")
    took = timed(lambda: until(lambda: pool.seen("gpu3") == Seen(), "an end", timeout=120))
    print(f"surplus copies gone after the cable is back: {took:.1f} s")
    assert len(pool.ready()) == CLAIMS


def test_an_engine_that_is_killed_costs_its_holders_and_no_more_than_the_claims_there(
    pool: Pool,
) -> None:
    pool.balance()
    others = pool.ready("gpu1", "gpu3")
    engine, holders = pool.engine("gpu2"), {*pool.seen("gpu2").holders}
    os.kill(engine, signal.SIGKILL)
    until(lambda: pool.engine("gpu2") not in (0, engine), "another engine")
    # Without live-restore it ends what ran, once it is back.
    until(lambda: not holders & {*pool.seen("gpu2").holders}, "an end of its holders", timeout=60)

    def recovered() -> bool:
        seen = [pool.seen(host) for host in GPU_HOSTS]
        count = sum(len(one.models) for one in seen)
        return count == CLAIMS and not any(one.unclaimed for one in seen)

    took = timed(lambda: until(recovered, "six that somebody claims", timeout=120))
    print(f"as before, after the holders ended: {took:.1f} s")
    pool.await_running(CLAIMS)
    assert others.items() <= pool.await_ready(CLAIMS).items()


def test_the_watcher_sees_two_owners_and_an_instance_that_nobody_claims(made: Pool) -> None:
    pool = made  # without the fixture's own watcher, which must see nothing of the kind
    made.deploy()
    made.await_ready(CLAIMS)
    network = network_of(pool.first("gpu1"))
    gpu = look()[network].models[0].gpu
    command = [*pool.within("gpu1", "-a"), "env", f"OWNED={gpu}"]
    with Watcher() as watcher, pool.another([*command, "/opt/chat/serve", "--port", "0"]):
        until(lambda: watcher.doubled and watcher.longest > 1, "the watcher")
    assert gpu in watcher.doubled[0]


@contextmanager
def patient_proxy(pool: Pool) -> Iterator[None]:
    """nginx as it is by default: a request whose server is not there goes to the next one."""
    usual, never = "proxy_next_upstream error timeout non_idempotent;", "proxy_next_upstream off;"
    for following in (usual, never):
        program = ["sh", "-c", "cat > /etc/nginx/nginx.conf && pkill -HUP -o -x nginx"]
        pool.run([*pool.within("proxy", "-a"), *program], given=pool.nginx_conf(following))
        if following == usual:
            yield
