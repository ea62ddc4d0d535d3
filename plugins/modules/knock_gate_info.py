#!/usr/bin/python
# Copyright (c) 2026, fleet.portknock contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: knock_gate_info
short_description: Report what a host has of port knocking, and what a gate has to respect there
version_added: 0.1.0
description:
  - Reads the host's gate, its packet filter, init system, sockets and addresses in one round trip, and changes nothing.
  - The result names no port of a knock sequence.
author:
  - fleet.portknock contributors (@fleet-portknock)
extends_documentation_fragment:
  - fleet.portknock.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: full
  async:
    support: full
options:
  backend:
    description: The back end to look for.
    type: str
    choices: [knockd, nftables]
    default: nftables
seealso:
  - module: fleet.portknock.knock_gate
"""

EXAMPLES = r"""
- name: See what is there
  fleet.portknock.knock_gate_info:
  register: found

- name: Show who opened the gate, and when
  ansible.builtin.debug:
    msg: "{{ item.last }} {{ item.operator }} from {{ item.source }}"
  loop: "{{ found.openings }}"
  loop_control:
    label: "{{ item.source }}"

- name: Say whose secrets the gate was made of
  ansible.builtin.debug:
    msg: "keyring {{ found.gate.keyring }}, generation {{ found.gate.generation }}"
  when: found.gate.present
"""

RETURN = r"""
gate:
  description: The gate that was confirmed on this host.
  returned: always
  type: dict
  contains:
    present:
      description: Whether a confirmed gate is on disk.
      type: bool
    loaded:
      description: Whether the kernel has the gate's table.
      type: bool
    watched:
      description: Whether the service runs that brings the gate back when another program takes it away.
      type: bool
    on_trial:
      description: Whether a change waits for its confirmation.
      type: bool
    backend:
      description: Back end of the confirmed gate; V(null) without one.
      type: str
    keyring:
      description: Id of the keyring whose secrets the gate was made of; V(null) without a gate.
      type: str
    generation:
      description: Generation of these secrets; 0 without a gate.
      type: int
    fingerprint:
      description:
        - What tells these secrets from others of the same generation, and gives nothing of them away; V(null) without a gate.
      type: str
    one_time:
      description:
        - The operators that have one-time sequences here, by name; empty without a gate that has any.
        - A warning says where fewer than a quarter are left. The role makes new ones where fewer than half are.
      type: dict
      sample: {alice: {left: 87, armed: 4, known: 100, first: 14}}
      contains:
        left:
          description: How many have not been used, nor lost at a boot.
          type: int
        armed:
          description: How many of these can open now; the others follow as these are used.
          type: int
        known:
          description: How many the gate was made with.
          type: int
        first:
          description: Id of the first that is left.
          type: int
    one_time_last:
      description: The highest id of a one-time sequence that this host knows of; 0 without any.
      type: int
    open_ports:
      description:
        - The ports that the confirmed gate leaves open where it closes all that are not protected, as port/protocol.
        - V(null) where it closes none of these.
      type: list
      elements: str
openings:
  description:
    - Who opened the gate from where, the latest first, one entry for each operator and source, for as many days as
      C(knock_server_audit_days) says. The records are the kernel's and are gone after a reboot.
  returned: always
  type: list
  elements: dict
  contains:
    operator:
      description: The operator's name, of one who is no longer there, too; V(null) where the host does not know it.
      type: str
    source:
      description: The address, of a link-local one with its interface, such as V(fe80::1%eth0).
      type: str
    last:
      description: When that was last, UTC, to the second by the host's clock.
      type: str
      sample: "2026-01-31T08:15:00Z"
    count:
      description: How often; V(null) where that was lost, which nft 0.9.8 does when the size or time of the records changes.
      type: int
    open:
      description: Whether that source has an open window now, by whomever.
      type: bool
backend:
  description: What the asked-for back end can do here.
  returned: always
  type: dict
  contains:
    name:
      description: The back end.
      type: str
    version:
      description: Version of its program; V(null) where it is not installed.
      type: str
    missing_programs:
      description: Programs that have to be installed.
      type: list
      elements: str
    capabilities:
      description: Which of the optional ways the host can go.
      type: dict
    problem:
      description: Why the back end can't work here; V(null) where it can or where it is not installed yet.
      type: str
init:
  description: Name of the init system, such as V(systemd).
  returned: always
  type: str
ports_in_use:
  description: Ports that services of the host wait on, as port/protocol.
  returned: always
  type: list
  elements: str
reachable_ports:
  description: Those of O(ignore:ports_in_use) whose services wait on more than loopback addresses.
  returned: always
  type: list
  elements: str
ipv6_addresses:
  description: The host's global IPv6 addresses.
  returned: always
  type: list
  elements: str
firewalls:
  description: Programs beside the gate that manage packet filters and are active here.
  returned: always
  type: list
  elements: str
ssh_source:
  description: Address that this connection comes from, as the host sees it; V(null) where it is not an ssh connection.
  returned: always
  type: str
ssh_port:
  description: The host's own port that this connection goes to; V(null) where it is not an ssh connection.
  returned: always
  type: int
conntrack:
  description: Entries that the kernel's connection tracking holds, and the most it can hold; both V(null) where it is not active.
  returned: always
  type: dict
  contains:
    count:
      description: Entries in use.
      type: int
    maximum:
      description: The table's size.
      type: int
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleet.portknock.plugins.module_utils._backends import BACK_ENDS
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._inspection import inspect_host, one_time_warnings


def main() -> None:
    module = AnsibleModule(
        argument_spec={"backend": {"type": "str", "choices": sorted(BACK_ENDS), "default": "nftables"}},
        supports_check_mode=True,
    )
    try:
        report = inspect_host(module.params["backend"], os.getppid())
        for warning in one_time_warnings(report):
            module.warn(warning)
        module.exit_json(changed=False, **report)
    except PortknockError as exc:
        module.fail_json(msg=str(exc))


if __name__ == "__main__":
    main()
