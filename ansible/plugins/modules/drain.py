#!/usr/bin/python
# Copyright: the mic-supervisor authors
# Apache License 2.0 (see LICENSE)
"""Take a host out of service, or put it back."""

from __future__ import annotations

DOCUMENTATION = r"""
module: drain
short_description: Take a host out of service, or put it back
version_added: 0.1.0
description:
  - Stops everything that mic-supervisor runs on the host, in the order that keeps requests, and
    starts nothing until the host is put back. Nothing is removed, and the files stay as they are.
  - Proxies on other hosts are not told. The playbook M(mic.supervisor.drain) does that as well.
author:
  - The mic-supervisor authors (@mic-supervisor)
attributes:
  check_mode:
    description: Tells whether the host is in the other state.
    support: full
  diff_mode:
    description: Shows the state.
    support: full
options:
  state:
    description: C(drained) is out of service; C(active) runs what its file says, and is waited for.
    type: str
    choices: [drained, active]
    default: drained
  until_reboot:
    description: The next boot puts the host back. Only for C(state=drained).
    type: bool
    default: false
  reason:
    description: What is shown wherever it is said that the host is drained.
    type: str
  executable:
    description: The program, by its path or by its name on the C(PATH).
    type: path
    default: mic-supervisor
"""

EXAMPLES = r"""
- name: Empty the GPUs for a new driver
  mic.supervisor.drain:
    until_reboot: true
    reason: new driver

- name: Put the host back into service
  mic.supervisor.drain:
    state: active
"""

RETURN = r"""
drained:
  description: Since when the host has been drained, and why; null where it is in service.
  returned: success
  type: dict
  sample: {"since": 1795966000.0, "reason": "new driver", "until_reboot": true}
"""

from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.mic.supervisor.plugins.module_utils.program import (  # noqa: E402
    ARGUMENTS,
    Program,
)


def main() -> None:
    """Run as Ansible runs a module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["drained", "active"], "default": "drained"},
            "until_reboot": {"type": "bool", "default": False},
            "reason": {"type": "str"},
            **ARGUMENTS,
        },
        supports_check_mode=True,
    )
    program = Program(module)
    before, runs = state(module, program)
    if module.params["state"] == "active":
        arguments, changed = ["undrain"], before is not None
    else:
        arguments = ["drain", "--yes"]
        arguments += ["--until-reboot"] if module.params["until_reboot"] else []
        arguments += ["--reason", module.params["reason"]] if module.params["reason"] else []
        changed = before is None or before["until_reboot"] != module.params["until_reboot"]
        changed = changed or runs  # it did not stop the last time
    result: dict[str, Any] = {"changed": changed, "drained": before}
    if module._diff:
        was = "in service" if before is None else "drained"
        wanted = "in service" if module.params["state"] == "active" else "drained"
        result["diff"] = {"before": f"{was}\n", "after": f"{wanted}\n"}
    if changed and not module.check_mode:
        done = program.run(*arguments)
        if done.rc:
            said = "\n".join(filter(None, (done.stdout.strip(), done.stderr.strip())))
            module.fail_json(msg=f"cannot {arguments[0]} the host: {said}", rc=done.rc)
        result["drained"], _ = state(module, program)
    module.exit_json(**result)


def state(module: AnsibleModule, program: Program) -> tuple[dict[str, Any] | None, bool]:
    """Since when the host has been drained, and why; None: it is in service. And whether anything
    runs there, as far as that can be told."""
    status = program.document("status")
    if "drained" not in status:
        module.fail_json(
            msg="cannot drain the host: its mic-supervisor knows no such command; upgrade it"
        )
    runs = any(row["pid"] or row["endpoints"] for row in status["instances"])
    return status["drained"], runs or bool(status["unreadable"])


if __name__ == "__main__":
    main()
