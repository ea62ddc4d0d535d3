#!/usr/bin/python
# Copyright (c) 2026, fleet.portknock contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: knock_bundle
short_description: Make what an operator's own ssh needs to get in
version_added: 0.1.0
description:
  - Writes one bundle on the controller, for all hosts that an operator may open. It holds a file for ssh to include, the helper,
    the operator's sequences of these hosts and no others, and the program that installs it.
  - It runs once for all hosts of the play, in the controller's process, and connects to none.
  - The sequences come from the keyring, and from C(knock_server_sequences) where the inventory gives them. Hosts whose gate was
    taken away, and those where the operator was revoked or has expired, are left out. Within a rotation both sequences are in.
  - A bundle is not encrypted. Only its owner can read the files.
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
    details: Sequences are shown as their number.
  idempotent:
    support: full
    details: The same sequences, addresses and release of the collection make the same bytes.
  async:
    support: none
options:
  operator:
    description: Whose bundle it is.
    type: str
    required: true
  hosts:
    description: Which hosts it is for; all hosts of the play, where it is not given.
    type: list
    elements: str
  dest:
    description:
      - Where it is written. A path that ends with C(.tar) is one file, any other a folder.
      - A relative path begins at the folder of the inventory.
      - Where it is empty, C(portknock_bundles/OPERATOR.tar) beside the keyring, in a folder that git passes by.
    type: str
    default: ""
  fleet:
    description:
      - A name that tells this fleet from others, for people who have bundles of several. It is part of the folder's name in
        their C(~/.ssh).
    type: str
    default: ""
notes:
  - Where people's ssh goes is what ssh on the controller says of the host (C(ssh -G)), so that aliases which only the
    controller knows are resolved, with the jump hosts on the way. The variables C(knock_client_hostname), C(knock_client_port)
    and C(knock_client_jump) of a host say otherwise.
  - The bundle names no user unless the host's variable C(knock_client_remote_user) does. Ansible's own is not a person's.
seealso:
  - module: fleet.portknock.knock_client
"""

EXAMPLES = r"""
- name: Make alice's bundle for all hosts of the play
  fleet.portknock.knock_bundle:
    operator: alice
  run_once: true

- name: Make it as a folder, for some hosts
  fleet.portknock.knock_bundle:
    operator: alice
    hosts: "{{ groups.web }}"
    dest: /srv/bundles/alice
  run_once: true
"""

RETURN = r"""
path:
  description: Where the bundle is on the controller.
  returned: always
  type: str
  sample: /home/ops/fleet/portknock_bundles/alice.tar
operator:
  description: Whose it is.
  returned: always
  type: str
  sample: alice
folder:
  description: The name of its folder in a person's C(~/.ssh).
  returned: always
  type: str
  sample: portknock
hosts:
  description: The hosts that it opens.
  returned: always
  type: list
  elements: str
  sample: [web1, web2]
left_out:
  description: The other hosts that were asked for, each with the reason.
  returned: always
  type: dict
  sample: {db1: no sequence}
"""
