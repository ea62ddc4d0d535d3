#!/usr/bin/python
# Copyright (c) 2026, fleet.portknock contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: sshd_settings
short_description: Harden sshd, proved and confirmed, as one task
version_added: 0.1.0
description:
  - Writes sshd's settings as a drop-in that is sorted before all others, or where sshd reads no drop-ins as a block at the top of
    its configuration, and makes sure by C(sshd -T) that no other line wins over them.
  - Before anything changes, the account that is to get in afterwards does so over a fresh connection, and becomes root. Then a
    timer is armed on the host that brings the former settings back, sshd reads the new ones, and the same account confirms them
    over another fresh connection. Sessions live on.
  - Nothing on the host's disk changes before the confirmation, so a restart brings the former settings back, too.
author:
  - fleet.portknock contributors (@fleet-portknock)
extends_documentation_fragment:
  - fleet.portknock.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
  async:
    support: none
    details: The task changes the connection that it came by.
options:
  state:
    description: V(applied) makes the settings the wanted ones, V(absent) takes ours away.
    type: str
    choices: [applied, absent]
    default: applied
  settings:
    description:
      - The variables of the role P(fleet.portknock.sshd_hardening#role) by their names less its prefix, such as
        C(permit_root_login) for C(sshd_hardening_permit_root_login). All of them have to be there.
      - Required with O(state=applied).
    type: dict
  admin_user:
    description:
      - The account that is to get in afterwards and becomes root; the one that Ansible connects as, where empty.
    type: str
    default: ""
  without_proof:
    description:
      - What to do where that account can't be shown to get in. V(fail) fails the task, V(skip) leaves sshd as it is and warns.
    type: str
    choices: [fail, skip]
    default: fail
  confirm_timeout:
    description: Seconds after which the host goes back by itself when the change has not been confirmed, 10 to 3600.
    type: int
    default: 60
  phase:
    description: Which step the host is asked to do; the action plugin sets it.
    type: str
    choices: [compare, apply, confirm, rollback, prove]
    default: compare
  payload:
    description: What the step needs, as one text; the action plugin sets it.
    type: str
seealso:
  - module: fleet.portknock.knock_gate
"""

EXAMPLES = r"""
- name: Take our settings away again
  fleet.portknock.sshd_settings:
    state: absent

- name: Harden sshd by the role, which has all defaults
  ansible.builtin.include_role:
    name: fleet.portknock.sshd_hardening
"""

RETURN = r"""
reasons:
  description: The files that differ from what is wanted.
  returned: success
  type: list
  elements: str
proof:
  description: What was seen from outside while the change was on trial.
  returned: when something was changed outside check mode
  type: dict
  contains:
    user:
      description: The account that confirmed.
      type: str
    methods:
      description: The ways to log in that sshd offered.
      type: list
      elements: str
rolled_back:
  description: Whether the host was brought back because the proof failed.
  returned: failure
  type: bool
skip_reason:
  description: Why sshd was left as it is.
  returned: when O(without_proof=skip) and the account could not be shown to get in
  type: str
"""

import json
import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleet.portknock.plugins.module_utils._changes import PHASES
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._sshd import run_sshd_phase


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["applied", "absent"], "default": "applied"},
            "settings": {"type": "dict"},
            "admin_user": {"type": "str", "default": ""},
            "without_proof": {"type": "str", "choices": ["fail", "skip"], "default": "fail"},
            "confirm_timeout": {"type": "int", "default": 60},
            "phase": {"type": "str", "choices": [*PHASES, "prove"], "default": "compare"},
            "payload": {"type": "str"},
        },
        supports_check_mode=True,
    )
    try:
        payload = json.loads(module.params["payload"] or "null")
        if not isinstance(payload, dict):
            raise PortknockError("sshd_settings runs through its action plugin; this call did not come from it.")
        if module.params["phase"] == "prove":
            module.exit_json(changed=False, is_root=os.geteuid() == 0)
        result = run_sshd_phase(
            module.params["phase"],
            module.params["state"],
            payload,
            pid=os.getppid(),
            check_mode=module.check_mode,
        )
    except PortknockError as exc:
        module.fail_json(msg=str(exc))
    for warning in result.pop("warnings", ()):
        module.warn(warning)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
