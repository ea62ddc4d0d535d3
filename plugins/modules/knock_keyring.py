#!/usr/bin/python
# Copyright (c) 2026, fleet.portknock contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: knock_keyring
short_description: Make and keep the secrets of a host on the controller
version_added: 0.1.0
description:
  - Gives each operator of a host a knock sequence of their own and keeps it in the keyring, one vault-encrypted file
    a host, before anything is deployed.
  - What is there stays. A sequence is made only where one is missing, is given, or holds a port that became
    protected.
  - A sequence that replaces another is kept beside it until O(state=promoted), since the host may honour either.
  - Runs in the controller's process and neither connects to the host nor delegates.
  - The result names no port.
author:
  - fleet.portknock contributors (@fleet-portknock)
extends_documentation_fragment:
  - fleet.portknock.attributes
  - fleet.portknock.keyring.module
attributes:
  check_mode:
    support: full
    details: Nothing is written, not even the folder.
  diff_mode:
    support: full
    details: Sequences are shown as their length, source and time.
  idempotent:
    support: full
  async:
    support: none
options:
  state:
    description:
      - V(present) makes sure that each of O(operators) has a sequence, and that the entry of a host that was marked
        removed is live again, with the sequences that it had.
      - V(promoted) makes each sequence that is being deployed the current one, or notes that both of a rotation's are
        honoured. Use it after the gate was proved with it.
      - V(rotated) gives the operators new sequences, for the gate to honour beside the former ones.
      - V(retired) forgets the former ones, where the gate was proved to honour both at least O(grace) ago.
      - V(rotation_ended) notes that the rotation of O(scope) has come to its end, so that the next run begins another.
      - V(revoked) marks O(operator) as one who may not knock any more. It stays so until O(readmit) names them.
      - V(removed) marks the entry of a host whose gate was taken away. Its sequences are kept.
      - V(absent) deletes the host's file for good.
    type: str
    choices: [present, promoted, rotated, retired, rotation_ended, revoked, removed, absent]
    default: present
  operators:
    description:
      - Who may knock at this host. An operator who isn't named any more becomes inactive and keeps their sequence.
    type: list
    elements: str
    default: [default]
  length:
    description:
      - Number of knocks of a sequence that is made now, from 3 to 16. One that is there keeps its own.
    type: int
    default: 4
  protocols:
    description:
      - Protocols of a sequence that is made now. With several, each knock's is drawn, and all occur.
      - A sequence with icmp knocks, which are lengths of echo requests, is replaced where V(icmp) is not among them any more.
    type: list
    elements: str
    choices: [tcp, udp, icmp]
    default: [tcp]
  sequences:
    description:
      - Sequences of your own, or what P(fleet.portknock.knock_sequence#filter) derives, as a mapping from an operator's
        name to a list of port/protocol, or during a rotation to a list of two such lists, the newest first. Keep them in the
        vault.
      - They are held to the rules of those that are made, except that a port on which a service of the host listens
        is a warning.
      - An operator whose sequence is taken out of this mapping keeps it.
    type: raw
    default: {}
  protected_ports:
    description:
      - Ports that the gate hides, as port/protocol. No sequence holds one.
    type: list
    elements: str
    default: [22/tcp]
  ports_in_use:
    description:
      - Ports that services of the host wait on, as numbers or as port/protocol, such as
        M(fleet.portknock.knock_gate_info) reports them.
    type: list
    elements: raw
    default: []
  nmap_services:
    description:
      - A newer C(nmap-services) file on the controller. Its ports are avoided beside those that the collection knows.
    type: path
  host_state:
    description:
      - What M(fleet.portknock.knock_gate_info) reports as RV(fleet.portknock.knock_gate_info#module:gate). A keyring
        from which that gate can't have come, or an older copy of it, is refused.
    type: dict
    default: {}
  adopt:
    description:
      - Accept a gate that came from another keyring, or from a newer copy of this one, and give the host the secrets
        of this keyring.
    type: bool
    default: false
  packages:
    description:
      - With O(state=present), packages that are about to be installed on the host for the gate. They are noted in the entry,
        so that a removal knows which of the host's packages are its own.
      - With O(state=removed), packages that have been removed again, and are no longer noted.
    type: list
    elements: str
    default: []
  single_use:
    description:
      - With O(state=present), that a window of the host's gate is going to be good for one connection only. It is noted in the
        entry, for the connection and P(fleet.portknock.knock#module) to knock once more where they have used one up by a look.
      - Without it what is noted stays. M(fleet.portknock.knock_gate) takes the note off when a gate was proved that is none.
    type: bool
    default: false
  close_sequence:
    description:
      - With O(state=present), that each operator is to have a sequence, too, that shuts the window of whoever sends it. Without,
        those that there are go.
    type: bool
    default: false
  backend:
    description:
      - What M(fleet.portknock.knock_gate_info) reports of the host's back end, so that no knocks are made that it can't tell.
        With the name V(fwknop), which is opened by one packet, each operator has keys for that beside the sequence.
    type: dict
    default: {}
  spa_keys:
    description:
      - Of what kind these keys are, V(symmetric) or V(gnupg); the latter are made by GnuPG on the controller.
    type: str
    default: symmetric
  readmit:
    description:
      - With O(state=present), names among O(operators) who were revoked and may knock again, each with a new sequence.
    type: list
    elements: str
    default: []
  operator:
    description:
      - With O(state=rotated) and O(state=retired), the one operator that it is about; without it all of O(operators).
      - With O(state=revoked), who is to go.
    type: str
  grace:
    description:
      - With O(state=retired), the least time for which both sequences open, in seconds or as C(90m), C(12h) or C(7d).
    type: raw
    default: 0
  scope:
    description:
      - With O(state=rotated) and O(state=rotation_ended), what tells this rotation from others. A run with the same scope
        goes on where another was stopped, for 12 hours, and makes no second sequence for whoever has a new one.
    type: str
    default: ""
  valid_until:
    description:
      - With O(state=present), until when operators may knock, as a mapping from an operator's name to a UTC time such as
        V(2026-12-31T23:59:59Z), in quotes. Those that it does not name may for ever.
      - Where it is not given, times that the keyring holds stay as they are.
      - Somebody has to be left who can always get in, an operator without an expiry or one of O(trusted_sources).
    type: raw
  trusted_sources:
    description: Addresses that never need to knock, as the gate has them; asked for where each operator expires.
    type: list
    elements: str
    default: []
  one_time:
    description:
      - How many one-time sequences each of O(operators) is to have, from 16 to 500; 0 for one reusable sequence.
      - New ones are made where fewer than half are left by O(host_state), and where O(host_state) says that there is no gate.
        Those that were used are left out.
    type: raw
    default: 0
seealso:
  - module: fleet.portknock.knock_gate_info
  - module: fleet.portknock.knock_gate
"""

EXAMPLES = r"""
- name: Make the secrets of each host, where they are missing
  fleet.portknock.knock_keyring:

- name: Two operators, with longer sequences of both protocols
  fleet.portknock.knock_keyring:
    operators: [alice, bob]
    length: 6
    protocols: [tcp, udp]

- name: An operator whom the host itself shuts out at the end of the year
  fleet.portknock.knock_keyring:
    operators: [alice, bob]
    valid_until:
      bob: "2026-12-31T23:59:59Z"

- name: A sequence of your own, from a vaulted variable
  fleet.portknock.knock_keyring:
    operators: [alice]
    sequences:
      alice: "{{ vault_sequence_of_alice }}"

- name: Take bob off, whatever becomes of the host
  fleet.portknock.knock_keyring:
    state: revoked
    operator: bob
    operators: [alice, bob]

- name: A hundred sequences each, of which every one opens once
  fleet.portknock.knock_keyring:
    operators: [alice]
    one_time: 100

- name: Keep the secrets of a host whose gate was taken away, and mark them
  fleet.portknock.knock_keyring:
    state: removed
"""

RETURN = r"""
path:
  description: The host's file on the controller.
  returned: always
  type: str
  sample: /home/ops/fleet/knock_keyring/web1.yml
keyring_id:
  description: Id of the keyring; V(null) where nothing has been kept in it yet.
  returned: always
  type: str
  sample: 5d2c1e0a-7b1f-4b53-9f55-1d8f0c6b8a11
keyring_created:
  description: Whether this task made the keyring, at its first use.
  returned: always
  type: bool
generation:
  description: Generation of the host's secrets; V(null) where nothing is kept of the host.
  returned: always
  type: int
  sample: 1
packages:
  description: Packages that are noted as installed for the host's gate; with O(state=absent) those that were.
  returned: always
  type: list
  elements: str
  sample: [nftables]
rotation:
  description:
    - What became of each operator's sequence. V(made), V(under way), V(done before), V(given) (by hand, so left alone) and
      V(revoked) with O(state=rotated); V(retired), V(waits) (for the end of O(grace)) and V(unproved) with O(state=retired).
  returned: with O(state=rotated) and O(state=retired)
  type: dict
  sample: {alice: made}
until:
  description: When the last grace ends for which something waits, in UTC; V(null) where nothing does.
  returned: with O(state=rotated) and O(state=retired)
  type: str
  sample: '2026-02-07T08:15:00Z'
known:
  description: Whether the keyring knew the operator on this host.
  returned: with O(state=revoked)
  type: bool
created:
  description: Operators who got a sequence for the first time.
  returned: always
  type: list
  elements: str
  sample: [default]
"""
