"""Any image: one container per instance."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from mic_supervisor.backends import BackendBase, CompileRequest, common
from mic_supervisor.config.options import ModelOptions, Text
from mic_supervisor.model import Instance


class Options(ModelOptions):
    """`args` are appended to `command`; without both, the image's own command runs."""

    unavailable: ClassVar[dict[str, str]] = {
        "drain_timeout": common.NO_DRAIN,
        "runtime": common.ONE_RUNTIME,
    }

    image: Text = Field(description="The image's name, with a tag or a digest.")
    command: list[str] = Field(
        default=[], description="The command; without it and args, the image's own."
    )
    entrypoint: list[Text] | None = Field(
        default=None, description="Instead of the image's own; [] is none."
    )
    metrics: common.MetricsPath = None

    @model_validator(mode="after")
    def _container_port_needs_a_bridge(self) -> Self:
        common.refuse_container_port_on_host(self)
        return self


class ContainerBackend(BackendBase):
    name = "container"
    Settings = common.NoSettings
    Options = Options
    example = (
        "",
        "  embed:                                           # any image\n"
        "    backend: container\n"
        "    image: ghcr.io/huggingface/text-embeddings-inference:1.8\n"
        '    command: [--port, "${port}", --model-id, BAAI/bge-m3]\n'
        "    probe: {http: /health}\n",
    )

    def compile(self, request: CompileRequest) -> Instance:
        """One container with all the GPUs of the instance. Raises CompileError."""
        options: Options = request.options
        named = common.ports_in(options, *options.command, *(options.entrypoint or ()))
        ports = common.ports(options, also=named)
        filled = common.texts(
            request,
            ports,
            command=[*options.command, *options.args],
            entrypoint=options.entrypoint,
            env=options.env,
            probes=common.probes(options),
        )
        workload = common.container(request, filled, ports, image=options.image)
        return common.instance(request, workload, filled.probes, metrics_path=options.metrics)
