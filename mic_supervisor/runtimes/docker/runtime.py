"""Containers of a Docker Engine, by the Docker SDK."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from docker import APIClient
from docker.errors import APIError

from mic_supervisor.errors import (
    MicError,
    PreflightFailed,
    RuntimeRefused,
    RuntimeUnavailable,
    StopFailed,
    WorkloadGone,
)
from mic_supervisor.host.processes import in_group
from mic_supervisor.model import (
    ContainerSpec,
    Doubt,
    Launch,
    ObservedWorkload,
    RunState,
    RuntimeView,
)
from mic_supervisor.runtimes import Progress
from mic_supervisor.runtimes.docker import networks
from mic_supervisor.runtimes.docker.container import event_lines, log_lines, remove, run_check, stop
from mic_supervisor.runtimes.docker.create import (
    CDI_KIND,
    INSTANCE,
    MADE,
    check_program,
    container_config,
    ownership,
)
from mic_supervisor.runtimes.docker.create import labels as labels_of
from mic_supervisor.runtimes.docker.engine import ADDRESS_HINT, NO_ENGINE, Engine, refused
from mic_supervisor.runtimes.docker.keys import with_profiles
from mic_supervisor.runtimes.docker.pull import Puller
from mic_supervisor.runtimes.docker.view import (
    INACTIVE,
    InactiveContainers,
    StartTimes,
    detailed,
    foreign_reason,
    is_a_list,
    is_new,
    labels_in,
    split,
)
from mic_supervisor.runtimes.identity import GivenName, known_from

_DEVICES_FOR = 60.0  # seconds for which the engine's list of CDI devices is believed
_NAME_TAKEN = "is already in use by container"
_NEVER = "0001-01-01T00:00:00Z"  # the engine's StartedAt of a container that never ran


class DockerRuntime:
    """Containers of one scope and host. Fits the protocol `Runtime`; thread-safe.

    `base_url` None is unix:///var/run/docker.sock. `docker_config` is the file or directory with
    registry credentials, None the client's own ($DOCKER_CONFIG, ~/.docker). In seconds,
    `timeout` bounds a plain question, `work_timeout` a call that makes the engine work, and
    `kill_wait` the end of a killed container (freeing GPU memory takes a while). Nothing is opened
    before the first call. `given_name` and `known` tell copies of our containers from ours: see
    identity.py.
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
        work_timeout: float = 120.0,
        kill_wait: float = 30.0,
        given_name: GivenName | None = None,
        known: Mapping[str, bool] | None = None,
    ) -> None:
        self._scope = scope
        self._host = host
        self._given_name = given_name
        self._known = known or {}
        self._images: dict[str, Mapping[str, str]] = {}  # image id -> its labels
        self._engine = Engine(base_url, timeout=timeout, work_timeout=work_timeout)
        self._kill_wait = kill_wait
        self._inactive = InactiveContainers(self._look_at_inactive)
        self._starts = StartTimes(self.inspect)
        self._puller = Puller(self._engine, docker_config)
        self._devices: tuple[float, frozenset[str]] | None = None

    def close(self) -> None:
        """Idempotent; a later call connects anew."""
        self._engine.close()

    # --- Looking ------------------------------------------------------------------------------

    def observe(self) -> RuntimeView:
        """One list call: pid and finished_at stay None. What is listed as inactive is inspected as
        well, once, and what runs in the background: see view.py. And one call for each image of a
        container with our labels, the first time.
        """
        what = "cannot list containers"
        try:
            listed = self._engine.call(what, lambda api: api.containers(all=True))
            if not is_a_list(listed):
                cause = NO_ENGINE.format(address=self._engine.address)
                raise RuntimeUnavailable(f"{what}: {cause}", hint=ADDRESS_HINT)
            workloads, foreign_workloads = split(
                listed,
                self._scope,
                self._host,
                images=self._image_labels,
                given_name=self._given_name,
                known=self._known,
            )
        except MicError as error:
            return RuntimeView(self.name, error=error.message, hint=error.hint)
        new = {str(item["Id"]) for item in listed if is_new(item)}
        workloads = self._starts.added(self._inactive.sure(workloads), new)
        view = RuntimeView(
            self.name, workloads, foreign_workloads, ignores_gpus=self._engine.podman
        )
        self._known = known_from(view)
        return view

    def _image_labels(self, image: str) -> Mapping[str, str]:
        """The labels of an image, by its id; none where that cannot be looked at. Then a copy is
        known by its name alone.
        """
        if image not in self._images:
            try:
                # None: it was removed by force, while a container of it was stopped.
                found = self._engine.image(f"cannot inspect image {image}", image) or {}
            except RuntimeRefused:
                found = {}  # a socket proxy that does not let it through
            self._images[image] = labels_in(found.get("Config") or {})
        return self._images[image]

    def inspect(self, workload: ObservedWorkload) -> ObservedWorkload:
        """The workload with all that one inspection tells: pid, times, error of the engine.

        WorkloadGone when it is gone.
        """
        what = f"cannot inspect container {workload.name}"
        found = self._engine.container(what, workload.ref)
        if found is None:
            raise WorkloadGone(f"{what}: it no longer exists")
        return detailed(workload, found)

    def _look_at_inactive(self, workload: ObservedWorkload) -> ObservedWorkload:
        """As `inspect`. The engine may have lost what still runs: then it is in doubt."""
        found = self.inspect(workload)
        pid = self._running_in(workload) if found.state in INACTIVE else None
        if pid is None:
            return found
        reason = f"the engine takes it for {found.state.value}, and PID {pid} in it runs"
        doubt = Doubt(reason, f"end it: kill {pid}; or see why: journalctl -u docker")
        return replace(found, state=RunState.UNKNOWN, pid=pid, error=reason, doubt=doubt)

    def _running_in(self, workload: ObservedWorkload) -> int | None:
        """A process of a container by the kernel, where the engine shares this machine's."""
        whole = len(workload.ref) == 64  # digits of an id, which is in no other path
        return in_group(workload.ref) if self._engine.local and whole else None

    def version(self) -> dict[str, Any]:
        """What doctor shows of the engine. Keys: version, api, root, driver, cgroup_driver,
        cgroup_version, runtimes, default_runtime, cdi_devices, live_restore, address, podman,
        rootless; a value that the engine does not tell is None.
        """
        what = "cannot ask for the engine's version"
        info = self._engine.newest(what, lambda api: api.info())
        version = self._engine.newest(what, lambda api: api.version())
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
            "podman": self._engine.podman,
            "rootless": "name=rootless" in (info.get("SecurityOptions") or ()),
        }

    # --- Starting -----------------------------------------------------------------------------

    def prepare(self, launch: Launch, progress: Progress) -> None:
        spec = _container(launch, "prepare")
        what = f"cannot prepare {launch.name}"
        # The engine's file system can be looked at only where it is also ours.
        missing = [m.source for m in spec.mounts if self._engine.local and _absent(m.source)]
        if missing:
            raise PreflightFailed(
                f"{what}: the mount source {', '.join(missing)} "
                f"{'does' if len(missing) == 1 else 'do'} not exist",
                hint=f"create it with: mkdir -p {' '.join(missing)}",
            )
        sources = [one.rsplit(":", 2)[0] for one in spec.host_devices]
        if gone := [one for one in sources if self._engine.local and _absent(one)]:
            raise PreflightFailed(
                f"{what}: this machine has no {gone[0]}",
                hint="load the driver that makes it, or remove it from devices",
            )
        with_profiles(spec)
        networks.check(self._engine, what, spec.networks)
        pull = spec.pull
        if pull == "always" and self._engine.container(what, launch.name) is not None:
            pull = "missing"  # it is started again, and not made anew
        self._puller.ensure(spec.image, progress, pull)

    def registry_digest(self, image: str) -> str:
        return self._puller.registry_digest(image)

    def digests(self, image: str) -> tuple[str, ...]:
        return self._puller.digests(image)

    def pull(self, image: str, progress: Progress) -> None:
        self._puller.renew(image, progress)

    def create(self, launch: Launch) -> None:
        spec = _container(launch, "create")
        what = f"cannot create container {launch.name}"
        discovered = self._discovered(what) if spec.devices else frozenset()
        config = container_config(launch, with_profiles(spec), discovered)
        config["Labels"][MADE] = uuid.uuid4().hex
        give_up = time.monotonic() + self._engine.work_timeout

        def ask(api: APIClient) -> str:
            made = api.create_container_from_config(config, launch.name)  # type: ignore[no-untyped-call]
            return str(made["Id"])

        while True:
            try:
                ref = self._engine.call(what, ask, patient=True)
                found = self._engine.container(what, ref)
                break
            except RuntimeRefused as error:
                # Who asked for it, or for its removal, may have been killed: that goes on.
                if _NAME_TAKEN not in error.message:
                    raise
                found = self._engine.container(what, launch.name)
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
            networks.join(self._engine, what, launch.name, spec.networks, spec.network_aliases)
        except MicError as error:
            raise self._discarded(launch, error) from error

    def start(self, launch: Launch) -> None:
        what = f"cannot start container {launch.name}"
        found = self._engine.container(what, launch.name)
        if found is None:
            raise WorkloadGone(f"{what}: it does not exist", hint="apply again")
        if not self._is(found, launch):
            raise RuntimeRefused(
                f"{what}: the container of that name is not ours ({self._whose(found)})",
                hint=f"rename it: docker rename {launch.name} OTHER",
            )
        spec = _container(launch, "start")
        networks.join(self._engine, what, launch.name, spec.networks, spec.network_aliases)
        first = _state(found).get("StartedAt", _NEVER) == _NEVER
        try:
            self._start(what, str(found["Id"]))
        except RuntimeRefused as error:
            self._devices = None
            if not first:
                raise
            raise self._discarded(launch, error) from error

    def restart(self, workload: ObservedWorkload) -> None:
        what, recorded = f"cannot start container {workload.name}", workload.identity.spec or {}
        names, aliases = recorded.get("networks"), recorded.get("network_aliases")
        if isinstance(names, list) and isinstance(aliases, list):
            networks.join(self._engine, what, workload.ref, names, aliases)
        self._start(what, workload.ref)

    def _start(self, what: str, ref: str) -> None:
        def ask(api: APIClient) -> bool:
            try:
                api.start(ref)
            except APIError as error:
                status, said = refused(error)
                if "o such container" in said or "marked for removal" in said:
                    return False
                # "cannot start a paused container, try unpause instead"
                if status != 409 or "paused" not in said:
                    raise
                api.unpause(ref)
            return True

        with self._inactive.starting(ref):
            there = self._engine.call(what, ask, patient=True)
        if not there:
            raise WorkloadGone(f"{what}: it no longer exists", hint="apply again")

    # --- Ending -------------------------------------------------------------------------------

    def stop(self, workload: ObservedWorkload, *, signal: str, grace: float) -> None:
        stop(self._engine, workload, signal, grace, self._kill_wait)
        if (pid := self._running_in(workload)) is not None:
            raise StopFailed(
                f"cannot stop container {workload.name}: the engine says that it does not run, and "
                f"PID {pid} in it does",
                hint=f"end it: kill {pid}; or see why: journalctl -u docker",
            )

    def remove(self, workload: ObservedWorkload) -> None:
        remove(self._engine, f"cannot remove container {workload.name}", workload.ref)

    # --- Following ----------------------------------------------------------------------------

    def logs(
        self, workload: ObservedWorkload, *, tail: int | None = None, follow: bool = False
    ) -> Iterator[str]:
        """Opened by the first `next`; a followed log ends with the container."""
        return log_lines(self._engine, workload, tail, follow)

    def previous_logs(
        self,
        workload: ObservedWorkload,
        *,
        tail: int | None = None,  # noqa: ARG002
    ) -> Iterator[str]:
        """Always refused: the engine appends every run of a container to one log."""
        raise RuntimeRefused(
            f"cannot tell apart the earlier runs of {workload.name}",
            hint="a container that is started again goes on in the same log: leave --previous out",
        )

    def events(self, stop: threading.Event) -> Iterator[str]:
        """A line per event of a container of ours, until `stop` is set.

        The first line says that events are being listened for: whoever wants to miss nothing looks
        at everything once then. RuntimeUnavailable when the stream breaks.
        """
        return event_lines(self._engine, ownership(self._scope, self._host), stop)

    def run_check(
        self, workload: ObservedWorkload, command: tuple[str, ...], timeout: float
    ) -> tuple[int, str]:
        """Run a command inside the container: (exit code, output), 124 when it takes too long.

        RuntimeRefused when the container does not run. See container.run_check.
        """
        return run_check(self._engine, workload, command, timeout)

    # --- Below --------------------------------------------------------------------------------

    def _discovered(self, what: str) -> frozenset[str]:
        """The CDI devices that the engine knows; engines before 28.2 do not tell."""
        now = time.monotonic()
        known = self._devices
        if known is None or now - known[0] > _DEVICES_FOR:
            try:
                known = (now, _cdi_devices(self._engine.newest(what, lambda api: api.info())))
            except RuntimeRefused:
                # A socket proxy that does not let /info through: the older way is left.
                known = (now, frozenset())
            self._devices = known
        return known[1]

    def _is(self, found: Mapping[str, Any], launch: Launch) -> bool:
        """Whether a container is ours and of the launch's instance."""
        labels = labels_in(found.get("Config") or {})
        ours = self._foreign_reason(found, labels) is None
        return ours and labels.get(INSTANCE) == launch.identity.instance

    def _foreign_reason(self, found: Mapping[str, Any], labels: Mapping[str, str]) -> str | None:
        image = found.get("Image")
        return foreign_reason(labels, self._scope, self._host, image, self._image_labels)

    def _whose(self, found: Mapping[str, Any]) -> str:
        config = found.get("Config") or {}
        labels = labels_in(config)
        about = f"{str(found.get('Id', ''))[:12]}, image {config.get('Image', 'unknown')}"
        reason = self._foreign_reason(found, labels)
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
        what = f"cannot remove container {launch.name}"
        try:
            found = self._engine.container(what, launch.name)
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
