# Copyright (c) 2026, fleet.portknock contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: knock_sequence
author:
  - fleet.portknock contributors (@fleet-portknock)
short_description: Derive a knock sequence from a secret
version_added: 0.1.0
description:
  - Gives the sequence of an operator on a host, derived from one secret, so that a controller that can't keep a keyring
    knows it all the same. The same input gives the same sequence for ever, whatever release of the collection.
  - The rules are those of sequences that M(fleet.portknock.knock_keyring) makes, ports from 1024 to 65535 that nmap's
    list of services does not name, any two at least 2 apart, neither ascending nor descending as a whole, but that the
    ports in use on a host are not looked at. Where a derived sequence holds one, the role warns.
  - With O(host), O(operator), O(generation), O(length) or O(protocols) the whole sequence changes.
options:
  _input:
    description:
      - The secret, a random text of at least 16 bytes, such as C(openssl rand -hex 32) prints. Blanks around it, among
        them a line's end, are left out.
      - Whoever sees one sequence on the wire can try secrets on it at leisure, so make it random, not a password that a
        person thinks of.
      - Keep it in the vault. Ansible shows the text of a task or an expression that fails, so never write it into one.
    type: str
    required: true
  host:
    description:
      - The host's name in the inventory, C(inventory_hostname).
      - Names that are written differently, if only in case or in how an accent is put, are different hosts.
    type: str
    required: true
  operator:
    description: The operator's name, as O(fleet.portknock.knock_server#role:knock_server_operators) takes it.
    type: str
    default: default
  generation:
    description: The number of the sequence, from 1 to 2147483647. The next one rotates the host to another sequence.
    type: int
    default: 1
  length:
    description: The number of knocks, from 3 to 16.
    type: int
    default: 4
  protocols:
    description: The protocols of the knocks. With both, each knock's is drawn, and both occur. Their order is of no account.
    type: list
    elements: str
    choices: [tcp, udp]
    default: [tcp]
  protected_ports:
    description:
      - The ports that the gate hides, as port/protocol. No sequence holds one.
      - Set it, wherever the filter is used, only if a host's gate hides a port from 1024 up that nmap's list does not
        name. Others never come up, so that naming them changes nothing.
      - Another list changes only those sequences that held a port which is new in it, or would have held one that is no
        longer in it, each with a chance of about 1 in 10,000.
    type: list
    elements: str
    default: [22/tcp]
notes:
  - Nothing keeps two operators' sequences of one host from beginning with the same knock, which the role refuses. The chance
    is about 1 in 44,000 for a host and each two of its operators. Give one of the two another O(generation) there.
seealso:
  - plugin: fleet.portknock.knock_ssh
    plugin_type: connection
  - module: fleet.portknock.knock_keyring
"""

EXAMPLES = r"""
# In group_vars: what the gate honours, and what the connection sends. knock_secret is in a vault.
knock_generation: 1
knock_server_sequences:
  default: "{{ knock_secret | fleet.portknock.knock_sequence(host=inventory_hostname, generation=knock_generation) }}"
knock_sequences: "{{ knock_server_sequences.default }}"

# Six knocks of both protocols for an operator.
sequence_of_alice: >-
  {{ knock_secret | fleet.portknock.knock_sequence(host=inventory_hostname, operator='alice', length=6,
     protocols=['tcp', 'udp']) }}
"""

RETURN = r"""
_value:
  description: The knocks in order, each as port/protocol.
  type: list
  elements: str
"""

from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleTemplatePluginError
from ansible_collections.fleet.portknock.plugins.module_utils._derivation import (
    DEFAULT_OPERATOR,
    DEFAULT_PROTECTED,
    derive_sequence,
)
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._ports import parse_knocks
from ansible_collections.fleet.portknock.plugins.module_utils._sequences import DEFAULT_LENGTH


def knock_sequence(
    secret: object,
    *,
    host: object,
    operator: object = DEFAULT_OPERATOR,
    generation: object = 1,
    length: object = DEFAULT_LENGTH,
    protocols: object = ("tcp",),
    protected_ports: object = DEFAULT_PROTECTED,
) -> list[str]:
    """The sequence as the role and the connection take it.

    :raises AnsibleTemplatePluginError: bad input; the text quotes neither the secret nor a sequence.
    """
    try:
        protected = {knock.port for knock in parse_knocks(protected_ports, "protected_ports")}
        knocks = derive_sequence(
            secret, host, operator, generation, length=length, protocols=protocols, protected=protected
        )
    except PortknockError as exc:
        raise AnsibleTemplatePluginError(str(exc)) from None
    return [str(knock) for knock in knocks]


class FilterModule:
    """``fleet.portknock.knock_sequence``."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"knock_sequence": knock_sequence}


__all__ = ("FilterModule", "knock_sequence")
