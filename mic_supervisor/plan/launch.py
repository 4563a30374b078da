"""Fills in what was left open in a workload: ports, indices, variables, its name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace

from mic_supervisor import codec
from mic_supervisor.model import ContainerSpec, Identity, Launch, Pairs, Port, Workload
from mic_supervisor.plan import spec as specs
from mic_supervisor.plan.assess import Assessment, Context

_PLACEHOLDER = re.compile(
    r"\$\{(port|gpu_indices)(?::([a-z]+))?\}|\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}"
)


def launch(
    assessment: Assessment,
    ports: Mapping[str, int],
    indices: Mapping[str, int],
    context: Context,
) -> Launch:
    """What to create for an instance, with these host ports. `indices` maps UUIDs to indices."""
    instance = assessment.instance
    numbers = ",".join(str(indices[uuid]) for uuid in instance.gpus if uuid in indices)
    identity = Identity(
        scope=context.scope,
        host=context.host,
        instance=instance.id,
        model=instance.model,
        backend=instance.backend,
        gpus=instance.gpus,
        ports=dict(ports),
        spec=assessment.spec,
        spec_hash=specs.spec_hash(assessment.spec),
        schema=specs.SCHEMA,
        origin=instance.origin,
    )
    return Launch(
        name=given_name(identity),
        runtime=assessment.runtime,
        identity=identity,
        spec=fill(instance.workload, ports, numbers),
    )


def given_name(identity: Identity) -> str:
    """The name that a workload with this identity is created with.

    It follows from what the workload carries, so that a copy is known by having another one. Do not
    change it: what runs since an earlier version would be taken for a copy.
    """
    # The ports are part of the name: where a port had to be chosen anew, the container that
    # recorded the old one may still be there.
    parts = [identity.spec_hash, sorted(identity.ports.items()), list(identity.gpus)]
    unique = hashlib.sha256(codec.canonical(parts).encode()).hexdigest()[:8]
    return f"mic-{identity.scope}-{identity.instance}-{unique}"


def text_of(workload: Workload, value: str, ports: Mapping[str, int], indices: str) -> str:
    """`value` with every `${…}` that belongs to the workload replaced."""
    variables = dict(workload.variables)

    def one(match: re.Match[str]) -> str:
        if match[3]:
            return variables[match[3]]
        if match[1] == "gpu_indices":
            return indices
        return str(ports[match[2] or "http"])

    return _PLACEHOLDER.sub(one, value)


def fill(workload: Workload, ports: Mapping[str, int], indices: str) -> Workload:
    """The workload with every `${…}` replaced and its environment merged.

    A key of `env` wins over the same key in `env_file`.
    """

    def text(value: str) -> str:
        return text_of(workload, value, ports, indices)

    env: Pairs = tuple(
        sorted({**dict(workload.file_env), **{k: text(v) for k, v in workload.env}}.items())
    )
    filled_ports = tuple(
        Port(port.name, ports[port.name], port.container or ports[port.name])
        for port in workload.ports
    )
    command = tuple(text(item) for item in workload.command)
    if isinstance(workload, ContainerSpec):
        entrypoint = workload.entrypoint
        return replace(
            workload,
            command=command,
            entrypoint=None if entrypoint is None else tuple(text(item) for item in entrypoint),
            env=env,
            file_env=(),
            variables=(),
            ports=filled_ports,
        )
    return replace(
        workload, command=command, env=env, file_env=(), variables=(), ports=filled_ports
    )
