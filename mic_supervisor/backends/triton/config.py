"""Triton's model configuration: read from the repository, given its instance group, sent as JSON.

Facts about Triton in this file were seen on tritonserver 2.51.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mic_supervisor.backends import CompileRequest
from mic_supervisor.backends.common import cannot, read
from mic_supervisor.errors import CompileError
from mic_supervisor.text import quoted

if TYPE_CHECKING:
    from types import ModuleType

FILES = ("config.pbtxt.template", "config.pbtxt")
PARAMETER = "mic_digest"

_LOCATION = re.compile(r"^\d+:\d+ : ")
# What the generated instance group says itself; the rest of a group is kept.
_GENERATED = ("name", "count", "kind", "gpus")


@dataclass(frozen=True, slots=True)
class Generated:
    """`text` is the whole ModelConfig as JSON. `digest` is over everything but the marker in it."""

    text: str
    digest: str


def group_name(model: str, digest: str) -> str:
    """How the generated instance group is called: its name is also the mark that it is ours.

    Triton fills in many fields of a configuration by itself, and `GET …/config` answers with all of
    them, so what runs cannot be compared with what was sent. The name of an instance group comes
    back as it was sent, and it is no reason for Triton to load anything anew.
    """
    return f"{model}-{digest[:12]}"


def generate(
    request: CompileRequest,
    repository: Path,
    model: str,
    count: int,
    positions: Sequence[int] = (0,),
) -> Generated:
    """The configuration of `model` with `count` instances on each of the GPUs at `positions`.

    A position is that of a GPU among those of the server, as the container sees them.
    `config.pbtxt.template` is read if it is there, `config.pbtxt` otherwise. Raises CompileError.
    """
    path, text = _read(request, repository / model)
    config = _parse(request, path, text)
    if config.name not in ("", model):
        raise cannot(
            request,
            f"{path} names the model {config.name!r}, and Triton wants the name of its directory, "
            f"{model!r}",
            f"write name: {json.dumps(model)} or remove the line",
        )
    config.name = model
    ensemble = config.platform == "ensemble" or config.HasField("ensemble_scheduling")
    if ensemble:
        _refuse_groups(request, path, config, count)
    else:
        _set_group(request, path, config, count, positions)
    digest = hashlib.sha256(_canonical(config).encode()).hexdigest()
    if ensemble:
        config.parameters[PARAMETER].string_value = digest
    else:
        for group in config.instance_group:
            group.name = group_name(model, digest) + group.name
    return Generated(_canonical(config), digest)


def is_ours(config: dict[str, Any], model: str, digest: str) -> bool:
    """Whether a configuration that Triton answers with is the one that was sent with `digest`."""
    groups = config.get("instance_group") or []
    if groups:
        name, _, _ = str(groups[0].get("name")).partition("@")
        return name == group_name(model, digest)
    parameter = (config.get("parameters") or {}).get(PARAMETER) or {}
    return bool(parameter.get("string_value") == digest)


def mark_of(config: dict[str, Any], model: str) -> str | None:
    """What in a configuration says that it was sent by us, whatever the digest; None: nothing."""
    groups = config.get("instance_group") or []
    name = str(groups[0].get("name")) if groups else ""
    if re.fullmatch(re.escape(model) + r"-[0-9a-f]{12}(@\d+)?", name):
        return name
    parameter = (config.get("parameters") or {}).get(PARAMETER) or {}
    return parameter.get("string_value")


def positions_of(config: dict[str, Any]) -> tuple[int, ...]:
    """The positions of the GPUs that a configuration of ours has instances on."""
    positions: list[int] = []
    for group in config.get("instance_group") or []:
        _, at, position = str(group.get("name")).rpartition("@")
        positions += [int(position)] if at and position.isdecimal() else group.get("gpus") or []
    return tuple(sorted({*positions}))


def _read(request: CompileRequest, directory: Path) -> tuple[Path, str]:
    for name in FILES:
        path = directory / name
        try:
            return path, read(request, path, "configuration")
        except CompileError as error:
            if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                raise
    raise cannot(
        request,
        f"neither {FILES[0]} nor {FILES[1]} is in {directory}",
        f"put one there, or set `model:` if the directory in {directory.parent} has another name",
    )


def _parse(request: CompileRequest, path: Path, text: str) -> Any:
    from google.protobuf import text_format

    config = _messages(request).ModelConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as error:
        line, column = error.GetLine() or 1, error.GetColumn() or 1
        said = _LOCATION.sub("", str(error)).strip().removesuffix(".")  # and the line that it is of
        raise cannot(
            request,
            f"{path}:{line}:{column}: {quoted(said)}",
            "correct the file; if the field is right and new, upgrade the package tritonclient",
        ) from error
    return config


def _set_group(
    request: CompileRequest, path: Path, config: Any, count: int, positions: Sequence[int]
) -> None:
    """Count and GPUs are ours, what else the file's groups say is kept.

    Triton makes `count` instances on each GPU of a group. Without GPUs there is nothing in a group
    to tell them apart by: then each position has a group of its own, and its name says which.
    """
    others = []
    for group in config.instance_group:
        rest = type(group)()
        rest.CopyFrom(group)
        for name in _GENERATED:
            rest.ClearField(name)
        others.append(rest)
    if any(rest != others[0] for rest in others):
        raise cannot(
            request,
            f"{path} has instance groups that differ in more than {', '.join(_GENERATED)}",
            "leave one group, or none; instances_per_gpu says how many instances run",
        )
    del config.instance_group[:]
    simulated = any(gpu.simulated for gpu in request.gpus)
    for position in positions if simulated else positions[:1]:
        group = config.instance_group.add()
        if others:
            group.CopyFrom(others[0])
        group.count = count
        if not simulated:
            group.kind = type(group).KIND_GPU
            # Relative to the container, which sees the GPUs of the server and no other.
            group.gpus.extend(positions)
            continue
        group.kind = type(group).KIND_CPU
        if len(request.gpus) > 1:
            group.name = f"@{position}"


def _refuse_groups(request: CompileRequest, path: Path, config: Any, count: int) -> None:
    """An ensemble runs nothing itself: Triton refuses one with instance groups."""
    if count != 1 or config.instance_group:
        raise cannot(
            request,
            f"{path} is an ensemble, which has no instances of its own",
            "remove instances_per_gpu and instance_group; set the groups of the models it uses in "
            "their own config.pbtxt",
        )


def _canonical(config: Any) -> str:
    from google.protobuf import json_format

    plain = json_format.MessageToDict(config, preserving_proto_field_name=True)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _messages(request: CompileRequest) -> ModuleType:
    try:
        return _load_messages()
    except (ImportError, OSError, TypeError) as error:
        raise cannot(
            request,
            f"Triton's message definitions do not load: {type(error).__name__}: {error}",
            "install them: pip install --upgrade tritonclient protobuf",
        ) from error


@cache
def _load_messages() -> ModuleType:
    """tritonclient/grpc/model_config_pb2.py, by itself.

    The package around it imports grpc, which nothing here needs. The generated module needs only
    protobuf. protobuf raises a TypeError for definitions that contradict what is already loaded,
    and its VersionError, for a runtime older than the generated code, is an Exception of its own.
    """
    from importlib.util import find_spec, module_from_spec, spec_from_file_location

    from google.protobuf.runtime_version import VersionError

    package = find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        raise ImportError("the package tritonclient is not installed")
    path = Path(next(iter(package.submodule_search_locations)), "grpc", "model_config_pb2.py")
    spec = spec_from_file_location("mic_supervisor.backends._model_config_pb2", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python module")
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except VersionError as error:
        raise ImportError(str(error)) from error
    return module
