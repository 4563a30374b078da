"""Any command: one tree of host processes per instance."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from mic_supervisor.backends import BackendBase, CompileRequest, common
from mic_supervisor.config.options import Advice, ModelOptions, Text
from mic_supervisor.model import Instance

_CONTAINERS_ONLY = "a host process has no container; remove the key"


class Options(ModelOptions):
    """`args` are appended to `command`, whose first item is the program's absolute path."""

    unavailable: ClassVar[dict[str, str]] = {
        "drain_timeout": common.NO_DRAIN,
        "runtime": common.ONE_RUNTIME,
        **dict.fromkeys(common.CONTAINERS_ONLY, _CONTAINERS_ONLY),
    }

    command: Annotated[list[Text], Field(min_length=1)] = Field(
        description="The program's absolute path and its arguments."
    )
    metrics: common.MetricsPath = None

    @model_validator(mode="after")
    def _runs_on_the_host(self) -> Self:
        program = self.command[0]
        if not program.startswith("/"):
            raise ValueError(
                f"command: the program {program!r} is not an absolute path; "
                "write where it is, as in /usr/bin/python3"
            )
        common.refuse_engine_probe(self)
        common.refuse_unprobed_warm_up(self)
        return self

    def advice(self) -> Iterable[Advice]:
        return common.advise_port(self, *self.command)


class ProcessBackend(BackendBase):
    name = "process"
    Settings = common.NoSettings
    Options = Options
    example = (
        "",
        "  whisper:                                         # any command\n"
        "    backend: process\n"
        '    command: [/opt/whisper/bin/serve, --port, "${port}"]\n'
        "    env_file: /etc/mic/whisper.env                 # secrets stay out of this file\n"
        "    probe: {http: /health}\n",
    )

    def meant_by(self, name: str, given: Collection[str | int]) -> str | None:  # noqa: ARG002
        meant = ("command", "cmd", "exec", "shell", "script", "program", "systemd", "host")
        return "write `backend: process`" if name.lower() in meant else None

    def compile(self, request: CompileRequest) -> Instance:
        """One process tree that sees the GPUs of the instance and no other. Raises CompileError.

        CUDA_VISIBLE_DEVICES holds UUIDs, which mean the same GPU whatever the driver's order is
        today; `env` and `env_file` may set it otherwise.
        """
        options: Options = request.options
        ports = common.ports(options, also=common.ports_in(options, *options.command))
        filled = common.texts(
            request,
            ports,
            command=[*options.command, *options.args],
            env={**common.visible_gpus(request), **options.env},
            probes=common.probes(options, common.metrics_port(ports)),
        )
        workload = common.process(request, filled, ports)
        return common.instance(request, workload, filled.probes, metrics_path=options.metrics)
