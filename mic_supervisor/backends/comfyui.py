"""ComfyUI: one tree of host processes per instance, many instances from one installation.

Seen with ComfyUI 0.3.64; `--database-url` came with 0.3.41, so that nothing older starts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from mic_supervisor.backends import BackendBase, CompileRequest, Recognised, common
from mic_supervisor.config.options import AbsolutePath, ModelOptions, Strict
from mic_supervisor.config.types import SignalName
from mic_supervisor.model import HttpCall, HttpCheck, Instance, Probe, Probes

_CONTAINERS_ONLY = "ComfyUI runs as a host process, without a container; remove the key"
_MODEL_PATHS = "--extra-model-paths-config"  # the one that takes several values
_OWN_FLAGS = {
    "--listen": "use the key listen",
    "--port": "use the key port",
    "--user-directory": "each instance has its own",
    "--temp-directory": "each instance has its own, which every start empties",
    "--database-url": "each instance has its own",
    "--output-directory": "use the key output_directory",
    "--input-directory": "use the key input_directory",
    _MODEL_PATHS: "use the key extra_model_paths",
    "--cuda-device": "the file gives each instance its GPUs",
    "--default-device": "the file gives each instance its GPUs",
    "--tls-keyfile": "an instance is probed over plain HTTP; let a proxy do TLS",
    "--tls-certfile": "an instance is probed over plain HTTP; let a proxy do TLS",
}
# Those that `recognise` makes keys of, and one that stays an argument.
_KEPT = frozenset(
    {"--listen", "--port", "--output-directory", "--input-directory", "--base-directory"}
) | {_MODEL_PATHS}
# One group in ComfyUI's cli_args.py: two of them are an error.
_WHERE_TO_COMPUTE = frozenset(
    {"--gpu-only", "--highvram", "--normalvram", "--lowvram", "--novram", "--cpu"}
)


class Settings(Strict):
    """`backends.comfyui`."""

    path: AbsolutePath = Field(description="The directory that holds main.py.")
    python: AbsolutePath | None = Field(
        default=None, description="The interpreter; PATH/.venv/bin/python by default."
    )
    data: AbsolutePath | None = Field(
        default=None,
        description="Where each instance has a directory of its own, for users' files, database, "
        "temporary files, and inputs and outputs; in the state directory by default.",
    )


class Options(ModelOptions):
    """`args` are ComfyUI's own flags, as in `[--highvram]`."""

    unavailable: ClassVar[dict[str, str]] = {
        "runtime": common.ONE_RUNTIME,
        **dict.fromkeys(common.CONTAINERS_ONLY, _CONTAINERS_ONLY),
        "working_dir": "ComfyUI runs in backends.comfyui.path; remove the key",
    }

    stop_signal: SignalName = "SIGINT"  # to SIGTERM it has no answer but to die
    output_directory: AbsolutePath | None = Field(
        default=None,
        description="Where results go, instead of the instance's own directory. Two instances that "
        "share one may give two results the same name.",
    )
    input_directory: AbsolutePath | None = Field(
        default=None, description="Where inputs are, instead of the instance's own directory."
    )
    extra_model_paths: list[AbsolutePath] = Field(
        default=[], description="Files in the form of extra_model_paths.yaml."
    )

    @model_validator(mode="after")
    def _own_probes(self) -> Self:
        common.refuse_own_startup(
            self, "whether ComfyUI is up, and which instance answers, is checked in its own way"
        )
        common.refuse_engine_probe(self)
        return self

    @model_validator(mode="after")
    def _own_flags(self) -> Self:
        for arg in self.args:
            if (flag := _own_flag(arg)) is not None:
                raise ValueError(f"args: {flag} is set by the supervisor: {_OWN_FLAGS[flag]}")
        return self


class ComfyUIBackend(BackendBase):
    """What makes many instances of one installation safe:

    1. Each has its own directories for users, temporary files, inputs and outputs, and its own
       database: a start empties the temporary directory *before* it finds its port taken, and two
       that number their outputs in one directory overwrite each other's.
    2. It is stopped with SIGINT, which it answers in about 2 s, after its queue is empty
       (`drain_timeout`): it has no mode in which it takes no more work.
    3. A port may be answered by a foreign process, or by another instance: /system_stats tells the
       arguments of who answers, and the users' directory among them is nobody else's.
    """

    name = "comfyui"
    Settings = Settings
    Options = Options
    example = (
        "  comfyui:\n"
        "    path: /opt/ComfyUI                             # the directory that holds main.py\n",
        "  change_face: {backend: comfyui, args: [--highvram]}\n",
    )

    def recognise(
        self, command: Sequence[str], directory: str, exists: Callable[[str], bool]
    ) -> Recognised | None:
        main = next((n for n, arg in enumerate(command) if Path(arg).name == "main.py"), None)
        if main is None:
            return None
        path = str((PurePosixPath(directory) / command[main]).parent)
        if not (exists(f"{path}/comfy") and exists(f"{path}/nodes.py")):
            return None
        given, rest = _split(command[main + 1 :])
        last = {flag: values[-1] if values else "" for flag, values in given.items()}
        entry: dict[str, Any] = {}
        notes = ["Users' files and the database begin anew: each instance has its own."]
        if last.get("--port", "").isdigit():
            entry["port"] = int(last["--port"])
        if listen := last.get("--listen"):
            entry["listen"], _, more = listen.partition(",")
            if more:
                notes.append(f"It listens on {more}, too, and `listen` is one address.")
        elif "--listen" in given:
            entry["listen"] = "0.0.0.0"
        base = last.get("--base-directory") or path
        entry["output_directory"] = last.get("--output-directory") or f"{base}/output"
        entry["input_directory"] = last.get("--input-directory") or f"{base}/input"
        if paths := given.get(_MODEL_PATHS):
            entry["extra_model_paths"] = paths
        if base != path:  # it holds models and custom nodes, too
            rest += ["--base-directory", base]
        if rest:
            entry["args"] = rest
        if main > 1:
            notes.append(f"{' '.join(command[1:main])} is left out: Python gets no options.")
        notes += [f"{flag} is left out: {_OWN_FLAGS[flag]}." for flag in given if flag not in _KEPT]
        settings = {"path": path, "python": command[0]}
        return Recognised("comfyui", "comfyui", entry, settings, tuple(notes))

    def compile(self, request: CompileRequest) -> Instance:
        """One process tree that sees the GPUs of the instance and no other. Raises CompileError."""
        options: Options = request.options
        settings: Settings = request.settings
        path = Path(settings.path)
        common.read(request, path / "main.py", "program")
        for file in options.extra_model_paths:
            common.read(request, Path(file), "extra_model_paths")
        own = request.directory if settings.data is None else Path(settings.data, request.instance)
        ports = common.ports(options)
        filled = common.texts(
            request,
            ports,
            command=_command(settings, options, own, request),
            env={
                # What custom nodes print would otherwise stand in the log much later, or never.
                **common.unless_in_file(request, {"PYTHONUNBUFFERED": "1"}),
                **common.visible_gpus(request),
                **options.env,
            },
            probes=_probes(options, own),
        )
        workload = replace(
            common.process(request, filled, ports),
            working_dir=settings.path,
            directories=tuple(map(str, _directories(options, own))),
        )
        drain = HttpCall("GET", "/prompt") if options.drain_timeout > 0 else None
        return common.instance(request, workload, filled.probes, drain=drain)

    def is_drained(self, status: int, body: str) -> bool:
        """Reads `GET /prompt`, whose count holds what waits and what is being computed."""
        if status != 200:
            return False
        try:
            return bool(json.loads(body)["exec_info"]["queue_remaining"] == 0)
        except (ValueError, KeyError, TypeError):
            return False


def _command(settings: Settings, options: Options, own: Path, request: CompileRequest) -> list[str]:
    python = settings.python or f"{settings.path.rstrip('/')}/.venv/bin/python"
    command = [python, "main.py", "--listen", options.listen, "--port", "${port}"]
    for flag, value in (
        ("--user-directory", own / "user"),
        ("--temp-directory", own),  # it makes a directory `temp` in there
        ("--database-url", f"sqlite:///{own / 'comfyui.db'}"),
        ("--output-directory", options.output_directory or own / "output"),
        ("--input-directory", options.input_directory or own / "input"),
    ):
        command += [flag, str(value)]
    if options.extra_model_paths:
        command += ["--extra-model-paths-config", *options.extra_model_paths]
    if all(gpu.simulated for gpu in request.gpus):
        # Without CUDA and without --cpu, ComfyUI ends with 1.
        rest = [arg for arg in options.args if arg not in _WHERE_TO_COMPUTE]
        return [*command, "--cpu", *rest]
    return [*command, *options.args]


def _directories(options: Options, own: Path) -> list[Path]:
    directories = [own, own / "user"]
    if options.output_directory is None:
        directories.append(own / "output")
    if options.input_directory is None:
        directories.append(own / "input")
    return directories


def _probes(options: Options, own: Path) -> Probes:
    # Answers take half a second under load, and many more while a large model is read: a restart
    # for that would lose the job that is being computed.
    check = HttpCheck("/system_stats", listed=(("system.argv", str(own / "user")),))
    given = common.probes(options)
    return Probes(
        startup=Probe(check, period=1.0, timeout=10.0),
        liveness=common.over(given.liveness, Probe(check, period=10.0, timeout=30.0)),
        readiness=common.over(given.readiness, Probe(check, period=5.0, timeout=10.0)),
    )


def _split(arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The flags that are not the model's to give, with their values, and the rest as it is."""
    given: dict[str, list[str]] = {}
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        flag, equals, value = waiting.pop(0).partition("=")
        if flag not in _OWN_FLAGS and flag != "--base-directory":
            rest.append(flag + equals + value)
            continue
        values = [value] if equals else []
        most = len(waiting) if flag == _MODEL_PATHS else 1
        while not equals and len(values) < most and waiting and not waiting[0].startswith("--"):
            values.append(waiting.pop(0))
        given.setdefault(flag, []).extend(values)
    return given, rest


def _own_flag(arg: str) -> str | None:
    """The flag of ours that an argument means. argparse takes `--por` for `--port`, too."""
    name = arg.partition("=")[0]
    if not name.startswith("--") or len(name) < 4:
        return None
    return next((flag for flag in _OWN_FLAGS if flag.startswith(name)), None)
