"""What the engine lists, as workloads of ours and foreign ones, and whether it is at rest.

The list (GET /containers/json) is enough for the plan. Exit code and health stand in its `Status`
text only ("Exited (137) 3 seconds ago", "Up 2 minutes (healthy)"), which saves an inspection per
container.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal

from mic_supervisor.errors import MicError, RuntimeUnavailable, WorkloadGone
from mic_supervisor.model import ForeignWorkload, ObservedWorkload, RunState
from mic_supervisor.runtimes.docker.create import (
    HOST,
    INSTANCE,
    MANAGED_BY,
    MANAGER,
    PREFIX,
    SCOPE,
    identity_of,
    ownership,
)
from mic_supervisor.runtimes.docker.engine import refusal
from mic_supervisor.runtimes.identity import GivenName, copies

_STATES = {
    "created": RunState.CREATED,
    "running": RunState.RUNNING,
    # A restart policy is at work: there is a process, or there soon is one.
    "restarting": RunState.RUNNING,
    "paused": RunState.PAUSED,
    "exited": RunState.EXITED,
    "dead": RunState.EXITED,
    "removing": RunState.REMOVING,
}
_EXIT = re.compile(r"^Exited \((-?\d{1,10})\)")
_HEALTH = re.compile(r"\((healthy|unhealthy|health: starting)\)")
_DEAD = "the engine could not remove it completely"
_FRACTION = re.compile(r"\.(\d{1,6})\d*")

ImageLabels = Callable[[str], Mapping[str, str]]
"""The labels of an image, by its id."""


def no_labels(_image: str) -> Mapping[str, str]:
    return {}


def is_a_list(listed: Any) -> bool:
    """Whether it tells of each container which one it is, and whose it may be.

    One that does not may be any of ours: to leave it out would be to take it for absent.
    """
    return isinstance(listed, list) and all(
        isinstance(item, Mapping)
        and isinstance(ref := item.get("Id"), str)
        and ref != ""
        and isinstance(item.get("Labels") or {}, Mapping)
        for item in listed
    )


def split(
    listed: Sequence[Mapping[str, Any]],
    scope: str,
    host: str,
    *,
    images: ImageLabels = no_labels,
    given_name: GivenName | None = None,
    known: Mapping[str, bool] | None = None,
) -> tuple[tuple[ObservedWorkload, ...], tuple[ForeignWorkload, ...]]:
    """The engine's list, which `is_a_list`, as ours and foreign ones, each sorted by name.

    `images` is asked for those with our labels. For `given_name` and `known` see identity.py;
    without `given_name` the labels decide.
    """
    claimed, refused = [], []
    for item in listed:
        labels, image = labels_in(item), item.get("ImageID")
        reason = foreign_reason(labels, scope, host, image, images)
        if reason is None:
            claimed.append((item, _workload(item)))
        else:
            refused.append((item, reason))
    found = [workload for _, workload in claimed]
    copied = copies(found, given_name, known or {}) if given_name is not None else {}
    ours = [workload for workload in found if workload.ref not in copied]
    refused += [(item, copied[one.ref]) for item, one in claimed if one.ref in copied]
    foreign_workloads = [
        _foreign_workload(item, why, scope, host, given_name) for item, why in refused
    ]
    return (
        tuple(sorted(ours, key=lambda one: one.name)),
        tuple(sorted(foreign_workloads, key=lambda one: one.name)),
    )


def claims_of(labels: Mapping[str, str], scope: str, host: str) -> str | None:
    """The instance that a container says it is of, be that true or copied; None: it says nothing
    of ours.
    """
    if not ownership(scope, host).items() <= labels.items():
        return None
    return labels.get(INSTANCE, "")


def foreign_reason(
    labels: Mapping[str, str],
    scope: str,
    host: str,
    image: object = None,
    images: ImageLabels = no_labels,
) -> str | None:
    """Why a container is not ours; None: it is, as far as labels tell.

    The engine lists the labels of its image, whose id is `image`, as the container's. They say what
    the image was made of (`docker commit`), and nothing of the container.
    """
    claimed = claims_of(labels, scope, host) is not None
    of_image = images(str(image)) if claimed and image else {}
    own = {key for key, value in labels.items() if of_image.get(key) != value}
    if any(key.startswith("com.docker.swarm.") for key in own):
        return "it belongs to a Docker Swarm service"
    if "com.docker.compose.container-number" in own:  # what compose builds has others of its labels
        return "it belongs to a Docker Compose project"
    if labels.get(MANAGED_BY) != MANAGER:
        return "it has no labels of ours"
    if is_elsewhere(labels, scope):
        return f"it belongs to scope {labels.get(SCOPE) or '(none)'}"
    if labels.get(HOST) != host:
        return "it was made by the supervisor of another machine"
    if not any(key.startswith(PREFIX) for key in own):
        return "its labels are those of its image, which was made from a container of ours"
    return None


def is_elsewhere(labels: Mapping[str, str], scope: str) -> bool:
    """Whether a container belongs to another scope."""
    return labels.get(MANAGED_BY) == MANAGER and labels.get(SCOPE) != scope


def labels_in(item: Mapping[str, Any]) -> dict[str, str]:
    """The labels of a listed container, or of the `Config` of an inspected one."""
    found = item.get("Labels")
    if not isinstance(found, Mapping):
        return {}
    return {str(key): str(value) for key, value in found.items()}


def detailed(workload: ObservedWorkload, inspected: Mapping[str, Any]) -> ObservedWorkload:
    """The workload with what only an inspection (GET /containers/ID/json) tells."""
    state = _mapping(inspected.get("State"))
    status = str(state.get("Status", ""))
    run_state = _STATES.get(status, RunState.UNKNOWN)
    started = _seconds(state.get("StartedAt"))
    pid = state.get("Pid")
    ended = run_state is RunState.EXITED and started is not None
    health = str(_mapping(state.get("Health")).get("Status", ""))
    return dataclasses.replace(
        workload,
        state=run_state,
        pid=pid if isinstance(pid, int) and pid > 0 else None,
        exit_code=_integer(state.get("ExitCode")) if ended else None,
        created_at=_seconds(inspected.get("Created")) or workload.created_at,
        started_at=started,
        finished_at=_seconds(state.get("FinishedAt")) if ended else None,
        address=_address(inspected) if run_state is RunState.RUNNING else None,
        engine_health=_engine_health(health),
        error=_error(status, state),
        image_id=_text(inspected.get("Image")) or workload.image_id,
    )


def _workload(item: Mapping[str, Any]) -> ObservedWorkload:
    name = _name(item)
    status = str(item.get("Status", ""))
    state = str(item.get("State", ""))
    run_state = _STATES.get(state, RunState.UNKNOWN)
    exited = _EXIT.match(status)
    health = _HEALTH.search(status)
    created = _number(item.get("Created"))
    return ObservedWorkload(
        runtime="docker",
        name=name,
        ref=str(item.get("Id", "")),
        identity=identity_of(labels_in(item), name),
        state=run_state,
        exit_code=int(exited[1]) if exited else None,
        created_at=created,
        address=_address(item) if run_state is RunState.RUNNING else None,
        engine_health=_engine_health(health[1].removeprefix("health: ")) if health else None,
        error=_DEAD if state == "dead" else None,
        image_id=_text(item.get("ImageID")),
    )


def _foreign_workload(
    item: Mapping[str, Any], reason: str, scope: str, host: str, given_name: GivenName | None
) -> ForeignWorkload:
    name, labels = _name(item), labels_in(item)
    claims = claims_of(labels, scope, host)
    ports = item.get("Ports")
    published = {
        number
        for port in (ports if isinstance(ports, Sequence) else ())
        if isinstance(port, Mapping) and port.get("Type", "tcp") == "tcp"
        if isinstance(number := port.get("PublicPort"), int)
    }
    return ForeignWorkload(
        runtime="docker",
        name=name,
        ref=str(item.get("Id", "")),
        ports=tuple(sorted(published)),
        running=item.get("State") in ("running", "paused", "restarting"),
        reason=reason,
        claims=claims,
        has_our_name=claims is not None
        and given_name is not None
        and name == given_name(identity_of(labels, name)),
        elsewhere=is_elsewhere(labels, scope),
    )


def _name(item: Mapping[str, Any]) -> str:
    # A linked container has further names below that of the other one ("/other/alias").
    listed = item.get("Names")
    names = [str(name).removeprefix("/") for name in (listed if isinstance(listed, list) else ())]
    own = [name for name in names if "/" not in name]
    return (own or names or [str(item.get("Id", ""))[:12]])[0]


def _address(item: Mapping[str, Any]) -> str | None:
    networks = _mapping(_mapping(item.get("NetworkSettings")).get("Networks"))
    first = ("bridge", _mapping(item.get("HostConfig")).get("NetworkMode"))
    for name in sorted(networks, key=lambda name: (name not in first, name)):
        network = _mapping(networks[name])
        if address := network.get("IPAddress") or network.get("GlobalIPv6Address"):
            return str(address)
    return None


def _error(status: str, state: Mapping[str, Any]) -> str | None:
    if state.get("OOMKilled") is True:
        return "it used more memory than its limit and was killed"
    if status == "dead":
        return _DEAD
    said = _text(state.get("Error"))
    return refusal(said)[0] if said is not None else None


def _engine_health(text: str) -> Literal["starting", "healthy", "unhealthy"] | None:
    match text:
        case "starting" | "healthy" | "unhealthy":
            return text
        case _:
            return None


def _seconds(stamp: Any) -> float | None:
    """Seconds since the epoch; the engine's "0001-01-01T00:00:00Z" is its way to say never."""
    if not isinstance(stamp, str) or stamp.startswith("0001-"):
        return None
    try:
        # Nanoseconds are more than datetime takes.
        return datetime.fromisoformat(_FRACTION.sub(r".\1", stamp)).timestamp()
    except ValueError:
        return None


def is_new(item: Mapping[str, Any]) -> bool:
    """Whether a listed container has run for less than a minute: "Up 5 seconds"."""
    return "second" in str(item.get("Status", ""))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    """None also where it is larger than any that an engine gives: not every integer is a float."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e15 else None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


# --- what is at rest ----------------------------------------------------------------------------
#
# An engine lists a container as created, or exited, until its start has come to an end, and the
# start goes on although whoever asked for it was killed (seen on Engine 20.10: with a port, the
# listener is there long before the list says "running"). It holds the container's lock meanwhile,
# and an inspection waits for that. So what is inactive by the list is inspected before it is
# believed, once. The inspection also tells what the list does not: that it was killed for its
# memory, or could not be started.

INSPECT_TIMEOUT = 1.0  # seconds that a look waits for all the inspections that it begins
INACTIVE = frozenset({RunState.CREATED, RunState.EXITED})

Inspect = Callable[[ObservedWorkload], ObservedWorkload]


class InactiveContainers:
    """Which containers are inactive when the list says so. Thread-safe.

    `inspect` looks at one more closely; it raises WorkloadGone, or another MicError.
    """

    def __init__(self, inspect: Inspect) -> None:
        self._inspect = inspect
        self._lock = threading.Lock()
        self._errors: dict[str, str | None] = {}  # by id, of what is inactive: what went wrong
        self._starting: set[str] = set()  # by id: we start it, and know how that ends
        # By id: what rests by the list, and was not told yet.
        self._asked: dict[str, Future[ObservedWorkload]] = {}

    @contextmanager
    def starting(self, ref: str) -> Iterator[None]:
        """While we start it. How that ended is not believed, but looked at."""
        with self._lock:
            self._errors.pop(ref, None)
            self._asked.pop(ref, None)
            self._starting.add(ref)
        try:
            yield
        finally:
            with self._lock:
                self._starting.discard(ref)

    def sure(self, listed: Iterable[ObservedWorkload]) -> tuple[ObservedWorkload, ...]:
        """The workloads as they are; what cannot be told in time is in an unknown state."""
        listed = tuple(listed)
        # One that was waited for before is not again: others would wait with it, look by look.
        wait(self._ask(listed), INSPECT_TIMEOUT)
        with self._lock:
            found = [self._classify(item) for item in listed]
        return tuple(item for item in found if item is not None)

    def _ask(self, listed: Iterable[ObservedWorkload]) -> list[Future[ObservedWorkload]]:
        with self._lock:
            inactive = {item.ref: item for item in listed if item.state in INACTIVE}
            self._errors = {ref: one for ref, one in self._errors.items() if ref in inactive}
            self._asked = {ref: one for ref, one in self._asked.items() if ref in inactive}
            unknown = inactive.keys() - self._errors.keys() - self._starting - self._asked.keys()
            fresh = {ref: _inspection(self._inspect, inactive[ref]) for ref in unknown}
            self._asked |= fresh
            return [*fresh.values()]

    def _classify(self, item: ObservedWorkload) -> ObservedWorkload | None:
        asked = self._asked.get(item.ref)
        if asked is None:
            return replace(item, error=self._errors.get(item.ref) or item.error)
        if not asked.done():
            return replace(item, state=RunState.UNKNOWN, error="it is being started or removed")
        del self._asked[item.ref]
        try:
            found = asked.result()
        except WorkloadGone:
            return None
        except MicError as error:
            return replace(item, state=RunState.UNKNOWN, error=error.message)
        if found.state not in INACTIVE:
            return found
        if item.ref not in self._starting:
            self._errors[item.ref] = found.error
        return replace(item, error=found.error or item.error)


class StartTimes:
    """When running containers were started, which the list does not tell. Thread-safe.

    Nobody waits for the inspections that this takes: a look has what earlier ones asked for, so a
    command, which looks once, asks for nothing. A container that somebody restarts is new again.
    """

    def __init__(self, inspect: Inspect) -> None:
        self._inspect = inspect
        self._lock = threading.Lock()
        self._known: dict[str, float | None] = {}  # by id, of what runs
        self._asked: dict[str, Future[ObservedWorkload]] = {}

    def added(
        self, listed: Sequence[ObservedWorkload], new: Collection[str]
    ) -> tuple[ObservedWorkload, ...]:
        """The workloads with what is known of them; `new` are the ids of those that may have been
        started since the last look.
        """
        running = {item.ref: item for item in listed if item.state is RunState.RUNNING}
        with self._lock:
            self._known = {ref: at for ref, at in self._known.items() if ref in running}
            self._asked = {ref: one for ref, one in self._asked.items() if ref in running}
            for ref, item in running.items():
                self._ask(item, ref in new)
            return tuple(
                replace(item, started_at=item.started_at or self._known.get(item.ref))
                for item in listed
            )

    def _ask(self, item: ObservedWorkload, new: bool) -> None:
        asked = self._asked.get(item.ref)
        if asked is not None and asked.done():
            del self._asked[item.ref]
            if asked.exception() is None:
                self._known[item.ref] = asked.result().started_at
        if item.ref not in self._known:
            self._known[item.ref] = None
        elif (new or self._known[item.ref] is None) and item.ref not in self._asked:
            self._asked[item.ref] = _inspection(self._inspect, item)


def _inspection(inspect: Inspect, item: ObservedWorkload) -> Future[ObservedWorkload]:
    """In a thread that nobody waits for: it takes as long as a start may take."""
    found: Future[ObservedWorkload] = Future()

    def run() -> None:
        try:
            found.set_result(inspect(item))
        except MicError as error:
            found.set_exception(error)
        except BaseException:
            found.set_exception(RuntimeUnavailable("its inspection failed"))
            raise

    threading.Thread(target=run, name="docker-rest", daemon=True).start()
    return found
