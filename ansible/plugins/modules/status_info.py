#!/usr/bin/python
# Copyright: the mic-supervisor authors
# Apache License 2.0 (see LICENSE)
"""What runs on the GPUs of a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: status_info
short_description: What runs on the GPUs of a host, and what should
version_added: 0.1.0
description:
  - Returns the document of C(mic-supervisor status --json). Changes nothing.
  - Where the daemon runs it is asked, otherwise the host itself is looked at.
author:
  - The mic-supervisor authors (@mic-supervisor)
attributes:
  check_mode:
    description: Reads only, so it does the same in check mode.
    support: full
  diff_mode:
    description: Changes nothing.
    support: none
options:
  executable:
    description: The program, by its path or by its name on the C(PATH).
    type: path
    default: mic-supervisor
"""

EXAMPLES = r"""
- name: Look at the GPUs
  mic.supervisor.status_info:
  register: mic

- name: Require every instance to be as its file says
  ansible.builtin.assert:
    that: mic.ready
"""

RETURN = r"""
status:
  description: The document of C(mic-supervisor status --json).
  returned: success
  type: dict
  sample: {"version": 1, "host": "gpu1", "instances": [], "gpus": []}
ready:
  description: Whether the host can be read, and every instance is as its file says.
  returned: success
  type: bool
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.mic.supervisor.plugins.module_utils.program import (  # noqa: E402
    ARGUMENTS,
    Program,
)


def main() -> None:
    """Run as Ansible runs a module."""
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    status = Program(module).document("status")
    ready = not status["unreadable"] and all(row["as_desired"] for row in status["instances"])
    module.exit_json(changed=False, status=status, ready=ready)


if __name__ == "__main__":
    main()
