#!/usr/bin/python
# Copyright (c) 2026, fleet.portknock contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: knock
short_description: Knock at a host from the controller, or look at its port
version_added: 0.1.0
description:
  - Sends a host's sequence from the controller and polls the protected port until it opens, first back to back, then
    with growing gaps, because packets overtake each other on real paths.
  - At a single-use gate the connection that sees the port open uses up what the knock has opened. Where the keyring or
    O(fleet.portknock.knock_ssh#connection:knock_single_use) says that it is one, the knock is sent once more, so that the
    next connection gets in.
  - Runs in the controller's process, without privileges, and needs no connection to the host. Never delegate it.
  - The sequence comes from the keyring, or from O(fleet.portknock.knock_ssh#connection:knock_sequences) where that is set,
    unless O(knocks) gives it.
author:
  - fleet.portknock contributors (@fleet-portknock)
extends_documentation_fragment:
  - fleet.portknock.attributes
  - fleet.portknock.keyring.module
attributes:
  check_mode:
    support: full
    details: Knocks in check mode too, since the rest of the play may need the port, and a knock configures nothing.
  diff_mode:
    support: none
  idempotent:
    support: full
  async:
    support: none
options:
  host:
    description:
      - The name or address to knock at.
      - Where it is not set, what ssh would connect to for this host, by C(ansible_host) and ssh's own configuration.
    type: str
  port:
    description:
      - The tcp port that is looked at.
      - Where it is not set, the port that ssh would connect to.
    type: int
  family:
    description:
      - The addresses to use.
      - Where it is not set, ssh's own C(AddressFamily).
    type: str
    choices: [any, inet, inet6]
  operator:
    description:
      - The operator whose sequence of the keyring is sent.
      - Where it is not set, as O(fleet.portknock.knock_ssh#connection:knock_operator) says; without that, each
        operator's sequence is tried until one opens.
    type: str
  knocks:
    description:
      - The sequence, a list such as C([port/tcp, port/udp]), given by hand instead of taken from the keyring. With
        O(state=closed) it is the close sequence.
      - C(bytes/icmp) is an echo request with that many bytes of payload, as C(ping -s) sends it. The
        system has to let the user send it (on Linux C(net.ipv4.ping_group_range), or root).
      - Give it by a vault-encrypted variable. Ansible itself shows the text of a task that fails.
    type: raw
  state:
    description:
      - V(opened) knocks until the port opens.
      - V(closed) sends the close sequence, which shuts the window of the controller's address before its time, over each of the
        host's addresses, until the port is seen to be closed. Sessions go on. The host needs one
        (O(fleet.portknock.knock_server#role:main:knock_server_close_sequence)).
      - Neither makes the task fail by itself where the port turns out otherwise; O(expect) does. A trusted source always sees it
        open.
    type: str
    choices: [opened, closed]
    default: opened
  knock:
    description: With V(false), nothing is sent but one look at the port.
    type: bool
    default: true
  timeout:
    description: The most seconds that it takes.
    type: float
    default: 10
  expect:
    description:
      - Fail where the port turns out otherwise. V(closed) is any state but V(open).
    type: str
    choices: [open, closed]
seealso:
  - plugin: fleet.portknock.knock_ssh
    plugin_type: connection
"""

EXAMPLES = r"""
- name: Open the way for a tool that does not knock itself
  fleet.portknock.knock:
    expect: open

- name: Shut the way again when the tool has done its work
  fleet.portknock.knock:
    state: closed
    expect: closed

- name: See from here that the port is closed
  fleet.portknock.knock:
    knock: false
    expect: closed
    timeout: 2
"""

RETURN = r"""
state:
  description:
    - What the port showed last.
    - V(open), V(reset) (refused), V(filtered) (no answer) or V(unreachable) (no way to the host).
  returned: always
  type: str
  sample: open
elapsed_ms:
  description: The milliseconds from the first knock to the answer.
  returned: always
  type: float
  sample: 1.2
attempts:
  description: How many sequences were sent.
  returned: always
  type: int
  sample: 1
gap:
  description: The seconds between two knocks in the last one of them.
  returned: always
  type: float
  sample: 0.0
address:
  description: The address that opened, or the last one that was tried.
  returned: always
  type: str
  sample: 192.0.2.10
port:
  description: The port that was looked at.
  returned: always
  type: int
  sample: 22
banner:
  description: The first line that the service sent within a second of the port's opening, or nothing.
  returned: always
  type: str
  sample: SSH-2.0-OpenSSH_9.2
"""
