"""Any image: one container per instance."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import ClassVar, Self

from pydantic import Field, model_validator

from mic_supervisor.backends import BackendBase, CompileRequest, common
from mic_supervisor.config.options import Advice, ModelOptions, Text
from mic_supervisor.model import Instance

_MEANT = frozenset(("docker", "podman", "compose", "containerd", "image", "oci", "nvidia-docker"))
# What people take for a backend, and is an image: with the port that it listens on.
_IMAGES = {
    "ollama": ("ollama/ollama:0.12.3", 11434),
    "llama.cpp": ("ghcr.io/ggml-org/llama.cpp:server-cuda", 8080),
    "sglang": ("lmsysorg/sglang:v0.5.3-cu129", 30000),
    "tgi": ("ghcr.io/huggingface/text-generation-inference:3.3.4", 80),
    "tei": ("ghcr.io/huggingface/text-embeddings-inference:1.8", 80),
}
_SPELT = {"llamacpp": "llama.cpp", "llama-cpp": "llama.cpp", "llama-server": "llama.cpp"}


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
    def _fits_together(self) -> Self:
        common.refuse_container_port_on_host(self)
        common.refuse_unprobed_warm_up(self)
        return self

    def advice(self) -> Iterable[Advice]:
        yield from common.advise_tag(self.image)
        yield from common.advise_port(self, *self.command, *(self.entrypoint or ()))


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

    def meant_by(self, name: str, given: Collection[str | int]) -> str | None:
        low = name.lower().replace("_", "-")
        low = _SPELT.get(low, low)
        if low not in _MEANT and low not in _IMAGES:
            return None
        if "image" in given:
            return "write `backend: container`"
        image, port = _IMAGES.get(low, ("REGISTRY/NAME:TAG", 8000))
        return f"write `backend: container` and `image: {image}` and `container_port: {port}`"

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
            probes=common.probes(options, common.metrics_port(ports)),
        )
        workload = common.container(request, filled, ports, image=options.image)
        return common.instance(request, workload, filled.probes, metrics_path=options.metrics)
