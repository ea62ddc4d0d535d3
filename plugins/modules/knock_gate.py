#!/usr/bin/python
# Copyright (c) 2026, fleet.portknock contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: knock_gate
short_description: Apply, prove and confirm a gate, or take it away, as one task
version_added: 0.1.0
description:
  - Renders the back end's templates with the host's secrets from the keyring, compares them with the host's files and its
    kernel, and where they differ arms a timer on the host that brings the former state back, loads the new gate, proves from
    outside that it is closed without the knock and open with it, and confirms it over a fresh connection of the controller's
    that went through it.
  - A gate that is not proved is rolled back, by the task where the connection still serves, otherwise by the host's timer.
  - Most settings have the meaning and default that the role P(fleet.portknock.knock_server#role) gives them there.
author:
  - fleet.portknock contributors (@fleet-portknock)
extends_documentation_fragment:
  - fleet.portknock.attributes
  - fleet.portknock.keyring.module
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    details: Secret elements are shown as their number.
  idempotent:
    support: full
  async:
    support: none
    details: The arguments of an asynchronous task are kept in a file on the host.
options:
  state:
    description:
      - V(applied) makes the host's gate the wanted one, V(absent) takes it away.
      - V(checked) only checks the settings, on the controller; for use before something else is changed on the host.
    type: str
    choices: [applied, absent, checked]
    default: applied
  backend:
    description: What enforces the gate.
    type: str
    choices: [fwknop, knockd, nftables]
    default: nftables
  settings:
    description:
      - The gate's settings, with the names and meanings of the role's variables less their prefix, such as
        C(protected_ports) for C(knock_server_protected_ports).
      - Required but for O(state=absent).
    type: dict
  operators:
    description:
      - Who may knock, by their names in the keyring. The first one's sequence is what the proof uses.
      - Required with O(state=applied).
    type: list
    elements: str
  templates:
    description:
      - Folder on the controller with a folder of templates for each back end.
      - Required with O(state=applied).
    type: path
  confirm_timeout:
    description: Seconds after which the host goes back by itself when the change has not been confirmed, 10 to 3600.
    type: int
    default: 60
  proof:
    description:
      - Where the proof is made from. V(outside) is the controller, the last jump host of a C(ProxyJump), or the host of
        O(prove_from). V(host) is a temporary network
        namespace on the gate's own host. See the role's variable knock_server_proof.
    type: str
    choices: [outside, host]
    default: outside
  prove_from:
    description:
      - Name of the inventory's host that the proof is made from, by its own variables, without become; empty for the
        controller. See the role's variable knock_server_prove_from.
    type: str
    default: ""
  found:
    description:
      - What M(fleet.portknock.knock_gate_info) reported of this host.
      - Required with O(state=applied).
    type: dict
  shut:
    description:
      - Operators who are shut out, by their names in the keyring. Once the gate is confirmed, and where it has nothing to change,
        too, the host closes the open windows of every source that they have opened it from, by what it has on record, and
        those of which it has no record.
      - One of whom the keyring knows nothing on this host is passed over. Whether their sequences are still honoured
        is what the keyring and O(operators) say.
    type: list
    elements: str
    default: []
  end_sessions:
    description:
      - With O(shut), end the tcp sessions with the protected ports, too, that come from those sources. Never the ones that this
        run came through.
      - Needs C(ss) (iproute2) and a kernel that ends other programs' sockets (C(INET_DIAG_DESTROY)). What goes on is counted and
        a warning.
    type: bool
    default: false
  phase:
    description:
      - Which step the host is asked to do; the action plugin sets it. V(scout), V(prove) and V(prove_removed) are for the
        host of O(prove_from), or the gate's own with O(proof=host).
    type: str
    choices: [compare, apply, confirm, rollback, scout, prove, prove_removed]
    default: apply
  payload:
    description: Rendered texts and what belongs to them, as one opaque text; the action plugin sets it.
    type: str
notes:
  - Asynchronous tasks and C(ANSIBLE_KEEP_REMOTE_FILES) are refused, and pipelining is always used, so that no secret comes to
    lie in a temporary file.
seealso:
  - module: fleet.portknock.knock_gate_info
  - module: fleet.portknock.knock_keyring
"""

EXAMPLES = r"""
- name: Apply, prove and confirm the gate
  fleet.portknock.knock_gate:
    settings:
      protected_ports: [22/tcp]
    operators: [default]
    templates: "{{ role_path }}/templates"
    found: "{{ found }}"

- name: Shut an operator out who is no longer one, and end what they have open
  fleet.portknock.knock_gate:
    settings:
      protected_ports: [22/tcp]
    operators: [alice]
    templates: "{{ role_path }}/templates"
    found: "{{ found }}"
    shut: [bob]
    end_sessions: true

- name: Take the gate away
  fleet.portknock.knock_gate:
    state: absent
"""

RETURN = r"""
reasons:
  description: What differed from the wanted state, each in a few words without secrets.
  returned: success
  type: list
  elements: str
proof:
  description: What the proof saw.
  returned: when something was changed outside check mode
  type: dict
  contains:
    seen_from:
      description:
        - Name of the host that looked, the gate's own with O(proof=host), a jump host's as ssh names it.
        - Empty for the controller.
      type: str
    closed:
      description: For each address and protected port what a connection without the knock met, and what a closed port showed.
      type: list
      elements: dict
    opened:
      description: For each family the address and port that opened, and how many milliseconds after the first knock.
      type: list
      elements: dict
    notes:
      description: What could not be proved, and why.
      type: list
      elements: str
windows_closed:
  description: Open windows that were closed, in check mode those that would be.
  returned: with O(shut)
  type: int
sessions_ended:
  description: Sessions that were ended, in check mode those that would be.
  returned: with O(shut)
  type: int
sessions_left:
  description: Sessions from sources that the operators had opened the gate from and that go on, but for this run's own.
  returned: with O(shut)
  type: int
rolled_back:
  description: Whether the host was brought back because the proof failed.
  returned: failure
  type: bool
"""

import json
import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleet.portknock.plugins.module_utils._backends import BACK_ENDS
from ansible_collections.fleet.portknock.plugins.module_utils._changes import PHASES
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._namespace import answer_apart
from ansible_collections.fleet.portknock.plugins.module_utils._phases import run_phase
from ansible_collections.fleet.portknock.plugins.module_utils._proof import QUESTIONS, answer


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["applied", "absent", "checked"], "default": "applied"},
            "backend": {"type": "str", "choices": sorted(BACK_ENDS), "default": "nftables"},
            "settings": {"type": "dict"},
            "operators": {"type": "list", "elements": "str"},
            "templates": {"type": "path"},
            "confirm_timeout": {"type": "int", "default": 60},
            "proof": {"type": "str", "choices": ["outside", "host"], "default": "outside"},
            "prove_from": {"type": "str", "default": ""},
            "found": {"type": "dict"},
            "shut": {"type": "list", "elements": "str", "default": []},
            "end_sessions": {"type": "bool", "default": False},
            "phase": {"type": "str", "choices": [*PHASES, *QUESTIONS], "default": "apply"},
            "payload": {"type": "str", "no_log": True},
        },
        supports_check_mode=True,
    )
    try:
        payload: dict[str, Any] = json.loads(module.params["payload"] or "null")
        if not isinstance(payload, dict):
            raise PortknockError("knock_gate runs through its action plugin; this call did not come from it.")
        if module.params["phase"] in QUESTIONS:
            look = answer_apart if payload.get("apart") else answer
            module.exit_json(changed=False, answer=look(module.params["phase"], payload))
        result = run_phase(
            module.params["phase"],
            module.params["state"],
            module.params["backend"],
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
