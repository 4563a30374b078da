#!/usr/bin/python
# Copyright: the mic-supervisor authors
# Apache License 2.0 (see LICENSE)
"""Make the GPUs of a host run what its file says."""

from __future__ import annotations

DOCUMENTATION = r"""
module: apply
short_description: Make the GPUs of a host run what its file says
version_added: 0.1.0
description:
  - Places C(gpus.yaml) and a drop-in, converges, and waits until every instance is as they say.
  - Everything is tried on a draft first. A file with errors, or a change that cannot be made, fails
    the task before anything on the host is changed.
  - In check mode nothing is changed, and the plan tells what would be. With C(--diff) the plan is
    shown as people read it. The text of the files is not, since it may hold secrets.
  - An instance that fails is taken back to its last good specification by the supervisor, where
    there is one, and the task fails. The files stay as they were asked for. Correct them and run it
    again.
  - An instance that a person has paused is left as it is, and does not fail the task.
author:
  - The mic-supervisor authors (@mic-supervisor)
attributes:
  check_mode:
    description: Tells what would change, by C(mic-supervisor plan).
    support: full
  diff_mode:
    description: Shows the plan.
    support: full
options:
  content:
    description:
      - What stands in the file. Without it the file stays as it is.
    type: str
  drop_in:
    description:
      - What stands in the drop-in. Without it there is none, or the one that is there stays.
    type: str
  drop_in_name:
    description: The name of the drop-in, in the directory of drop-ins beside the file.
    type: str
    default: 50-host.yaml
  path:
    description: The file. A daemon that runs must follow this one.
    type: path
    default: /etc/mic/gpus.yaml
  allow_blocked:
    description:
      - Whether to go on where the plan says that an instance is blocked, as one whose GPU is not
        there. What else is asked for is done, and the blocked instance does not fail the task.
    type: bool
    default: false
  executable:
    description: The program, by its path or by its name on the C(PATH).
    type: path
    default: mic-supervisor
"""

EXAMPLES = r"""
- name: Serve one model on two GPUs
  mic.supervisor.apply:
    content: |
      version: 1
      models:
        embed:
          backend: container
          image: ghcr.io/huggingface/text-embeddings-inference:1.8
          command: [--port, "${port}", --model-id, BAAI/bge-m3]
          probe: {http: /health}
    drop_in: |
      gpus:
        0: embed
        1: embed

- name: Converge with the files as they are
  mic.supervisor.apply:
"""

RETURN = r"""
plan:
  description: The document of C(mic-supervisor plan --json), from before anything was changed.
  returned: success
  type: dict
  sample: {"version": 1, "host": "gpu1", "changes": 0, "actions": [], "blocked": []}
files:
  description: The files that were written, or would be.
  returned: success
  type: list
  elements: str
  sample: ["/etc/mic/gpus.yaml"]
outcome:
  description: The document of C(mic-supervisor apply --json).
  returned: success, and not in check mode
  type: dict
"""

import shutil  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.mic.supervisor.plugins.module_utils.program import (  # noqa: E402
    ARGUMENTS,
    Program,
)


class Files:
    """The file and its drop-in as they are, as they are wanted, and as a draft."""

    def __init__(self, module: AnsibleModule) -> None:
        self._module = module
        self.path = Path(module.params["path"])
        self._drop_ins = self.path.with_name(self.path.name + ".d")
        drop_in = self._drop_ins / module.params["drop_in_name"]
        texts = {self.path: module.params["content"], drop_in: module.params["drop_in"]}
        wanted = {path: text.encode() for path, text in texts.items() if text is not None}
        there = {path: path.read_bytes() if path.exists() else None for path in wanted}
        # Of those that have to be written: what they are to hold, and what they hold now.
        self.wanted = {path: data for path, data in wanted.items() if there[path] != data}
        self._before = {path: there[path] for path in self.wanted}

    def draft(self) -> Path:
        """A copy of the file and all its drop-ins, with what is wanted in it; its path."""
        copy = Path(tempfile.mkdtemp(dir=self._module.tmpdir)) / self.path.name
        if self._drop_ins.is_dir():
            shutil.copytree(self._drop_ins, copy.parent / self._drop_ins.name)
        if self.path.exists():
            shutil.copyfile(self.path, copy)
        for path, data in self.wanted.items():
            target = copy.parent / path.relative_to(self.path.parent)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(data)
        return copy

    def place(self) -> None:
        """Write what differs, each file at once."""
        for path, data in self.wanted.items():
            self._write(path, data)

    def restore(self) -> None:
        """Undo `place`."""
        for path, data in self._before.items():
            if data is None:
                path.unlink()
            else:
                self._write(path, data)

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        new = not path.exists()
        with tempfile.NamedTemporaryFile(dir=self._module.tmpdir, delete=False) as scratch:
            scratch.write(data)
        self._module.atomic_move(
            scratch.name, str(path)
        )  # with the owner and mode of what was there
        if new:
            path.chmod(0o644)  # as `mic-supervisor init` makes it


def named(items: list[dict[str, Any]], key: str) -> str:
    """A line for each, with the way out where there is one."""
    lines = []
    for item in items:
        hint = f"; hint: {item['hint']}" if item.get("hint") else ""
        lines.append(f"{item[key]}: {item['reason']}{hint}")
    return "\n".join(lines)


def planned(module: AnsibleModule, program: Program, files: Files) -> dict[str, Any]:
    """What this module returns in check mode.

    Ends the module where the files are refused, or the plan cannot be carried out.
    """
    draft = files.draft()

    def real(text: str) -> str:
        return text.replace(str(draft), str(files.path))

    checked = program.run("check", str(draft))
    if checked.rc:
        module.fail_json(
            msg=f"cannot apply {files.path}: it is refused, and nothing was changed:\n"
            + real(checked.error)
        )
    # What is in place is asked of the daemon, which knows what it waits for.
    arguments = ["plan", str(draft)] if files.wanted else ["plan"]
    plan = program.document(*arguments)
    written = sorted(map(str, files.wanted))
    result: dict[str, Any] = {"plan": plan, "files": written}
    result["changed"] = bool(written or plan["changes"])
    if module._diff:
        text = program.run(*arguments).stdout
        result["diff"] = {"prepared": "".join(f"writes {path}\n" for path in written) + real(text)}
    # What waits for its next try, an apply tries at once.
    blocked = [item for item in plan["blocked"] if not item["paused"] and item["until"] is None]
    if blocked and not module.params["allow_blocked"]:
        module.fail_json(
            msg=f"cannot apply {files.path}: something is blocked, and nothing was changed:\n"
            + named(blocked, "instance"),
        )
    return result


def place(module: AnsibleModule, program: Program, files: Files) -> None:
    """Write the files, and have the daemon follow them. Ends the module where it refuses them."""
    files.place()
    if not program.document("status")["daemon"]:
        return
    reloaded = program.run("reload", "--wait")
    if reloaded.rc:
        files.restore()
        module.fail_json(
            msg=f"cannot apply {files.path}: the daemon refuses it, and it is as it was before:\n"
            + reloaded.error
        )


def main() -> None:
    """Run as Ansible runs a module."""
    module = AnsibleModule(
        argument_spec={
            "content": {"type": "str"},
            "drop_in": {"type": "str"},
            "drop_in_name": {"type": "str", "default": "50-host.yaml"},
            "path": {"type": "path", "default": "/etc/mic/gpus.yaml"},
            "allow_blocked": {"type": "bool", "default": False},
            **ARGUMENTS,
        },
        supports_check_mode=True,
    )
    program, files = Program(module), Files(module)
    result = planned(module, program, files)
    if module.check_mode:
        module.exit_json(**result)
    if files.wanted:
        place(module, program, files)
    outcome = result["outcome"] = program.document("apply")
    if "changed" in outcome:  # a program of an earlier version does not say
        result["changed"] = bool(files.wanted) or outcome["changed"]
    known = {item["instance"] for item in result["plan"]["blocked"] if item["until"] is None}
    rows = [row for row in outcome["instances"] if not row["as_desired"]]
    failed = [row for row in rows if row["id"] not in known and row["phase"] != "paused"]
    if failed:
        module.fail_json(
            msg=f"{len(failed)} of {len(outcome['instances'])} instances are not as {files.path} "
            f"asks:\n{named(failed, 'id')}",
            changed=result["changed"],
            files=result["files"],
        )
    for row in rows:
        module.warn(f"{row['id']} is left as it is: {row['reason']}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
