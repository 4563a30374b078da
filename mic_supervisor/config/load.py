"""From gpus.yaml to a Config, or to every error in it at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from mic_supervisor.config.checks import BackendSource, Checker
from mic_supervisor.config.diagnostics import Report
from mic_supervisor.config.document import Config
from mic_supervisor.config.merge import read_merged


def load(
    path: Path,
    registry: BackendSource,
    *,
    environ: Mapping[str, str],
    data: bytes | None = None,
    tolerant: bool = False,
) -> Config:
    """The configuration in `path` and its drop-ins, `path`.d/*.yaml.

    `environ` is where `${env:NAME}` is looked up. `data` stands for what is in `path`, as it would
    be after a change that is only planned. `tolerant`: a backend that cannot be used is the fault
    of the models that name it, and no error. Raises InvalidConfig, a ConfigError, with every error
    of all files. Reads files and nothing else.
    """
    report = Report(f"load {path}")
    merged = read_merged(path, report, data)
    if merged is None:
        report.fail()
    checker = Checker(merged, registry, environ, report, tolerant=tolerant)
    checker.check()
    if report:
        report.fail()
    document = merged.plain()
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return Config(
        path=path,
        files=tuple(merged.files),
        hash=hashlib.sha256(canonical.encode()).hexdigest(),
        entries=checker.entries,
        models=checker.models,
        backends=checker.backends,
        hooks=checker.hooks,
        servers=checker.servers,
        variables=dict(sorted(checker.variables.items())),
        document=document,
        texts=tuple("\n".join(report.lines[str(file)]) for file in merged.files),
    )
