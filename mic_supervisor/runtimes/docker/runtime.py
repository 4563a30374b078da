"""Containers of a Docker Engine, by its API.

What only acts is imported where it acts: `plan` and `status` look, and pay for every import.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mic_supervisor.errors import (
    MicError,
    PreflightFailed,
    RuntimeRefused,
    RuntimeUnavailable,
    WorkloadGone,
)
from mic_supervisor.model import ContainerSpec, Launch, ObservedWorkload, RuntimeView
from mic_supervisor.runtimes import Progress
from mic_supervisor.runtimes.copies import GivenName, known_from
from mic_supervisor.runtimes.docker.create import (
    CDI_KIND,
    INSTANCE,
    MADE,
    container_config,
    ownership,
)
from mic_supervisor.runtimes.docker.create import labels as labels_of
from mic_supervisor.runtimes.docker.endings import Endings, as_ended
from mic_supervisor.runtimes.docker.engine import Engine, an_object
from mic_supervisor.runtimes.docker.pull import Puller
from mic_supervisor.runtimes.docker.rests import Rests
from mic_supervisor.runtimes.docker.view import (
    claims_of,
    detailed,
    labels_in,
    split,
    stranger_reason,
)

if TYPE_CHECKING:
    from docker import APIClient

T = TypeVar("T")

_DEVICES_FOR = 60.0  # seconds for which the engine's list of CDI devices is believed
_NAME_TAKEN = "is already in use by container"
_NEVER = "0001-01-01T00:00:00Z"  # the engine's StartedAt of a container that never ran


class DockerRuntime:
    """Containers of one scope and host. Fits the protocol `Runtime`; thread-safe.

    `base_url` None is unix:///var/run/docker.sock. `docker_config` is the file or directory with
    registry credentials, None the client's own ($DOCKER_CONFIG, ~/.docker). In seconds,
    `timeout` bounds a plain question, `patience` a call that makes the engine work, and `kill_wait`
    the end of a killed container (freeing GPU memory takes a while). Nothing is opened before the
    first call. `given_name` and `known` tell copies of our containers from ours: see copies.py.
    """

    name = "docker"
    creates_ahead = True

    def __init__(
        self,
        scope: str,
        host: str,
        *,
        base_url: str | None,
        docker_config: Path | None,
        timeout: float = 10.0,
        patience: float = 120.0,
        kill_wait: float = 30.0,
        given_name: GivenName | None = None,
        known: Mapping[str, bool] | None = None,
    ) -> None:
        self._scope = scope
        self._host = host
        self._given_name = given_name
        self._known = known or {}
        self._images: dict[str, Mapping[str, str]] = {}  # image id -> its labels
        self._engine = Engine(base_url, timeout=timeout, patience=patience)
        self._kill_wait = kill_wait
        self._endings = Endings(self._settle)
        self._rests = Rests(self._look)
        self._puller = Puller(self._engine, docker_config)
        self._devices: tuple[float, frozenset[str]] | None = None

    def close(self) -> None:
        """Drop pooled connections. Idempotent; a later call opens new ones."""
        self._engine.close()

    # --- Looking ------------------------------------------------------------------------------

    def observe(self) -> RuntimeView:
        """One list call: pid, started_at and finished_at stay None. What is listed as at rest is
        inspected as well, once: see rests.py. And one call for each image of a container
        with our labels, the first time.
        """
        what = "cannot list containers"
        endings = self._endings.now()
        try:
            listed = self._engine.peek(what, "/containers/json?all=1")
            if listed is None:
                listed = self._call(what, lambda api: api.containers(all=True))
        except MicError as error:
            return RuntimeView(self.name, error=error.message, hint=error.hint)
        if not isinstance(listed, list):
            return RuntimeView(
                self.name,
                error=f"{what}: what answers at {self._engine.address} is not a Docker Engine",
                hint="check MIC_DOCKER_HOST",
            )
        try:
            images = self._images_of(listed)
        except MicError as error:
            return RuntimeView(self.name, error=error.message, hint=error.hint)
        workloads, strangers = split(
            listed,
            self._scope,
            self._host,
            images=images,
            given_name=self._given_name,
            known=self._known,
        )
        view = RuntimeView(self.name, as_ended(self._rests.sure(workloads), endings), strangers)
        self._known = known_from(view)
        return view

    def _images_of(self, listed: list[Any]) -> Mapping[str, Mapping[str, str]]:
        """The labels of the images of those listed containers that carry our labels."""
        images = {
            str(item["ImageID"])
            for item in listed
            if isinstance(item, Mapping)
            and item.get("ImageID")
            and claims_of(labels_in(item), self._scope, self._host) is not None
        }
        return {image: self._image_labels(image) for image in images}

    def _image_labels(self, image: str) -> Mapping[str, str]:
        """The labels of an image, by its id; none where that cannot be looked at. Then a copy is
        known by its name alone.
        """
        if image in self._images:
            return self._images[image]
        what = f"cannot inspect image {image}"

        def ask(api: APIClient) -> dict[str, Any] | None:
            from docker.errors import NotFound

            try:
                return an_object(api.inspect_image(image))  # type: ignore[no-untyped-call]
            except NotFound:
                return None  # removed by force, while a container of it was stopped

        try:
            found = self._engine.peek(what, f"/images/{image}/json")
            if not isinstance(found, Mapping):
                found = self._call(what, ask)
        except RuntimeRefused:
            found = None  # a socket proxy that does not let it through
        config = found.get("Config") if found is not None else None
        self._images[image] = labels_in(config) if isinstance(config, Mapping) else {}
        return self._images[image]

    def inspect(self, workload: ObservedWorkload) -> ObservedWorkload:
        """The workload with all that one inspection tells: pid, times, error of the engine.

        RuntimeRefused when it is gone.
        """
        what = f"cannot inspect container {workload.name}"
        found = self._inspect(what, workload.ref)
        if found is None:
            raise RuntimeRefused(f"{what}: it no longer exists")
        return detailed(workload, found)

    def version(self) -> dict[str, Any]:
        """What doctor shows of the engine. Keys: version, api, root, driver, cgroup_driver,
        cgroup_version, runtimes, default_runtime, cdi_devices, live_restore, address; a value that
        the engine does not tell is None.
        """
        what = "cannot ask for the engine's version"
        info = self._engine.newest(what, "/info")
        version = self._engine.newest(what, "/version")
        runtimes = info.get("Runtimes")
        return {
            "address": self._engine.address,
            "version": version.get("Version"),
            "api": version.get("ApiVersion"),
            "root": info.get("DockerRootDir"),
            "driver": info.get("Driver"),
            "cgroup_driver": info.get("CgroupDriver"),
            "cgroup_version": info.get("CgroupVersion"),
            "runtimes": sorted(runtimes) if isinstance(runtimes, Mapping) else None,
            "default_runtime": info.get("DefaultRuntime"),
            "cdi_devices": sorted(_cdi_devices(info)),
            "live_restore": info.get("LiveRestoreEnabled"),
        }

    # --- Starting -----------------------------------------------------------------------------

    def prepare(self, launch: Launch, progress: Progress) -> None:
        spec = _container(launch, "prepare")
        # The engine's file system can be looked at only where it is also ours.
        missing = [m.source for m in spec.mounts if self._engine.local and _absent(m.source)]
        if missing:
            raise PreflightFailed(
                f"cannot prepare {launch.name}: the mount source {', '.join(missing)} "
                f"{'does' if len(missing) == 1 else 'do'} not exist",
                hint=f"create it with: mkdir -p {' '.join(missing)}",
            )
        self._puller.ensure(spec.image, progress)

    def create(self, launch: Launch) -> None:
        from mic_supervisor.runtimes.docker.program import check_program

        spec = _container(launch, "create")
        what = f"cannot create container {launch.name}"
        discovered = self._discovered(what) if spec.devices else frozenset()
        config = container_config(launch, spec, discovered)
        config["Labels"][MADE] = uuid.uuid4().hex
        give_up = time.monotonic() + self._engine.patience
        while True:
            try:
                ref = self._call(what, lambda api: _create(api, launch.name, config), patient=True)
                found = self._inspect(what, ref)
                break
            except RuntimeRefused as error:
                # Who asked for it, or for its removal, may have been killed: that goes on.
                if _NAME_TAKEN not in error.message:
                    raise
                found = self._inspect(what, launch.name)
                if found is not None and self._is_new(found, launch):
                    break
                going = found is None or (self._is(found, launch) and _is_going(found))
                if not going or time.monotonic() > give_up:
                    raise self._name_taken(what, launch, found) from error
                time.sleep(0.05)
            except RuntimeUnavailable:
                # It may have been created all the same.
                self._discard(launch)
                raise
        try:
            check_program(self._engine, what, found or {})
        except MicError as error:
            raise self._discarded(launch, error) from error

    def start(self, launch: Launch) -> None:
        what = f"cannot start container {launch.name}"
        found = self._inspect(what, launch.name)
        if found is None:
            raise WorkloadGone(f"{what}: it does not exist", hint="apply again")
        if not self._is(found, launch):
            raise RuntimeRefused(
                f"{what}: the container of that name is not ours ({self._whose(found)})",
                hint=f"rename it: docker rename {launch.name} OTHER",
            )
        first = _state(found).get("StartedAt", _NEVER) == _NEVER
        try:
            self._start(what, str(found["Id"]))
        except RuntimeRefused as error:
            self._devices = None
            if not first:
                raise
            raise self._discarded(launch, error) from error

    def restart(self, workload: ObservedWorkload) -> None:
        self._start(f"cannot start container {workload.name}", workload.ref)

    def _start(self, what: str, ref: str) -> None:
        def ask(api: APIClient) -> bool:
            from docker.errors import APIError, NotFound

            try:
                api.start(ref)
            except NotFound as error:
                if "no such container" not in str(error.explanation).lower():
                    raise
                return False
            except APIError as error:
                if "marked for removal" in str(error.explanation):
                    return False
                # "cannot start a paused container, try unpause instead"
                if error.status_code != 409 or "paused" not in str(error.explanation):
                    raise
                api.unpause(ref)
            return True

        self._endings.starting(ref)
        try:
            with self._rests.starting(ref):
                there = self._call(what, ask, patient=True)
        except MicError:
            self._endings.refused(ref)
            raise
        if not there:
            self._endings.refused(ref)
            raise WorkloadGone(f"{what}: it no longer exists", hint="apply again")
        self._endings.runs(ref)

    # --- Ending -------------------------------------------------------------------------------

    def stop(self, workload: ObservedWorkload, *, signal: str, grace: float) -> None:
        from mic_supervisor.runtimes.docker.end import stop

        stop(self._engine, workload, signal, grace, self._kill_wait)

    def remove(self, workload: ObservedWorkload) -> None:
        from mic_supervisor.runtimes.docker.end import remove

        remove(self._engine, f"cannot remove container {workload.name}", workload.ref)

    # --- Following ----------------------------------------------------------------------------

    def logs(
        self, workload: ObservedWorkload, *, tail: int | None = None, follow: bool = False
    ) -> Iterator[str]:
        """Opened by the first `next`; a followed log ends with the container."""
        from mic_supervisor.runtimes.docker.follow import log_lines

        return log_lines(self._engine, workload, tail, follow)

    def previous_logs(
        self,
        workload: ObservedWorkload,
        *,
        tail: int | None = None,  # noqa: ARG002
    ) -> Iterator[str]:
        """Always refused: the engine appends every run of a container to one log."""
        raise RuntimeRefused(
            f"cannot tell the run before of {workload.name} apart",
            hint="a container that is started again goes on in the same log: leave --previous out",
        )

    def events(self, stop: threading.Event) -> Iterator[str]:
        """A line per event of a container of ours, until `stop` is set.

        The first line says that events are being listened for: whoever wants to miss nothing looks
        at everything once then. RuntimeUnavailable when the stream breaks.
        """
        from mic_supervisor.runtimes.docker.follow import event_lines

        labels, endings = ownership(self._scope, self._host), self._endings
        return event_lines(self._engine, labels, stop, endings.started, endings.ended)

    def run_check(
        self, workload: ObservedWorkload, command: tuple[str, ...], timeout: float
    ) -> tuple[int, str]:
        """Run a command inside the container: (exit code, output), 124 when it takes too long.

        RuntimeRefused when the container does not run. See exec.run_check.
        """
        from mic_supervisor.runtimes.docker.exec import run_check

        return run_check(self._engine, workload, command, timeout)

    # --- Below --------------------------------------------------------------------------------

    def _call(self, what: str, ask: Callable[[APIClient], T], *, patient: bool = False) -> T:
        return self._engine.call(what, ask, patient=patient)

    def _settle(self, ref: str) -> None:
        """Wait until the engine has written down that a container ended, or cannot be asked."""
        with suppress(MicError):
            self._inspect("cannot inspect a container that ended", ref)

    def _look(self, workload: ObservedWorkload) -> ObservedWorkload | None:
        """The workload as an inspection without the SDK shows it; None: it is gone."""
        what = f"cannot inspect container {workload.name}"
        found = self._engine.peek(what, f"/containers/{workload.ref}/json")
        if not isinstance(found, Mapping):
            found = self._inspect(what, workload.ref)
        return None if found is None else detailed(workload, found)

    def _inspect(self, what: str, ref: str) -> dict[str, Any] | None:
        """The engine's description of a container; None: there is none."""

        def ask(api: APIClient) -> dict[str, Any] | None:
            from docker.errors import NotFound

            try:
                return an_object(api.inspect_container(ref))
            except NotFound:
                return None

        return self._call(what, ask)

    def _discovered(self, what: str) -> frozenset[str]:
        """The CDI devices that the engine knows; engines before 28.2 do not tell."""
        now = time.monotonic()
        known = self._devices
        if known is None or now - known[0] > _DEVICES_FOR:
            try:
                known = (now, _cdi_devices(self._engine.newest(what, "/info")))
            except RuntimeRefused:
                # A socket proxy that does not let /info through: the older way is left.
                known = (now, frozenset())
            self._devices = known
        return known[1]

    def _is(self, found: Mapping[str, Any], launch: Launch) -> bool:
        """Whether a container is ours and of the launch's instance."""
        labels = labels_in(found.get("Config") or {})
        ours = self._stranger_reason(found, labels) is None
        return ours and labels.get(INSTANCE) == launch.identity.instance

    def _stranger_reason(self, found: Mapping[str, Any], labels: Mapping[str, str]) -> str | None:
        image: Mapping[str, str] = {}
        if claims_of(labels, self._scope, self._host) is not None and found.get("Image"):
            image = self._image_labels(str(found["Image"]))
        return stranger_reason(labels, self._scope, self._host, image)

    def _whose(self, found: Mapping[str, Any]) -> str:
        config = found.get("Config") or {}
        labels = labels_in(config)
        about = f"{str(found.get('Id', ''))[:12]}, image {config.get('Image', 'unknown')}"
        reason = self._stranger_reason(found, labels)
        return f"{about}: {reason or 'it runs instance ' + labels.get(INSTANCE, 'unknown')}"

    def _is_new(self, found: Mapping[str, Any], launch: Launch) -> bool:
        """Whether a container is what the launch would create, and was not started yet."""
        there = labels_in(found.get("Config") or {})  # those of the image, too
        return (
            labels_of(launch.identity).items() <= there.items()
            and _state(found).get("Status") == "created"
        )

    def _name_taken(self, what: str, launch: Launch, found: Mapping[str, Any] | None) -> MicError:
        """The engine's refusal in better words."""
        if found is None:
            return RuntimeRefused(
                f"{what}: another container had its name until just now", hint="apply again"
            )
        return RuntimeRefused(
            f"{what}: its name is taken by container {self._whose(found)}",
            hint=f"see it with: docker inspect {launch.name}; then rename or remove it",
        )

    def _discard(self, launch: Launch) -> str | None:
        """Remove what a failed create or first start left; the reason when that fails too."""
        from mic_supervisor.runtimes.docker.end import remove

        what = f"cannot remove container {launch.name}"
        try:
            found = self._inspect(what, launch.name)
            if found is not None and self._is(found, launch):
                remove(self._engine, what, str(found["Id"]), force=True)
        except MicError as error:
            return error.message
        return None

    def _discarded(self, launch: Launch, error: MicError) -> MicError:
        left = self._discard(launch)
        if left is None:
            return error
        return type(error)(f"{error.message}; and {left}", hint=error.hint)


def _create(api: APIClient, name: str, config: dict[str, Any]) -> str:
    made = api.create_container_from_config(config, name)  # type: ignore[no-untyped-call]
    return str(made["Id"])


def _container(launch: Launch, verb: str) -> ContainerSpec:
    if isinstance(launch.spec, ContainerSpec):
        return launch.spec
    raise RuntimeRefused(f"cannot {verb} {launch.name}: Docker runs containers, not processes")


def _absent(path: str) -> bool:
    try:
        return not Path(path).exists()
    except OSError:
        return False  # it cannot be seen from here: the engine will tell


def _state(inspected: Mapping[str, Any]) -> Mapping[str, Any]:
    state = inspected.get("State")
    return state if isinstance(state, Mapping) else {}


def _is_going(inspected: Mapping[str, Any]) -> bool:
    return _state(inspected).get("Status") == "removing"


def _cdi_devices(info: Mapping[str, Any]) -> frozenset[str]:
    """Names of NVIDIA devices in `DiscoveredDevices` (Engine 28.2, API 1.50)."""
    found = info.get("DiscoveredDevices")
    names = {
        str(device.get("ID") or device.get("Name") or "")
        for device in (found if isinstance(found, list) else ())
        if isinstance(device, Mapping) and device.get("Source") == "cdi"
    }
    return frozenset(name for name in names if name.startswith(CDI_KIND))
