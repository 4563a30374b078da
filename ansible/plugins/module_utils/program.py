"""The program mic-supervisor, as the modules of this collection run it."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

ARGUMENTS: dict[str, Any] = {"executable": {"type": "path", "default": "mic-supervisor"}}


class Done(NamedTuple):
    """How a command ended."""

    rc: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """What it said, for a message."""
        return (self.stderr or self.stdout).strip() or f"it exits with {self.rc}"


class Program:
    """Runs commands of the host's own mic-supervisor."""

    def __init__(self, module: Any) -> None:
        self._module = module
        # sshd's PATH may lack what `install` writes to.
        self._path = module.get_bin_path(
            module.params["executable"], required=True, opt_dirs=["/usr/local/bin"]
        )

    def run(self, *arguments: str) -> Done:
        """Run one command to its end."""
        environment = {"NO_COLOR": "1", "COLUMNS": "200"}
        return Done(*self._module.run_command([self._path, *arguments], environ_update=environment))

    def document(self, *arguments: str) -> dict[str, Any]:
        """The JSON document of a command, whatever its exit code says of the instances.

        Ends the module where the command prints none.
        """
        done = self.run(*arguments, "--json")
        try:
            found: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            self._module.fail_json(
                msg=f"cannot run mic-supervisor {' '.join(arguments)}: {done.error}",
                rc=done.rc,
            )
        return found
