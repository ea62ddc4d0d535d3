#!/usr/bin/python
# Copyright (c) 2026, fleet.portknock contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: knock_packages
short_description: Remove packages that were installed for a gate, where nobody else needs them
version_added: 0.1.0
description:
  - For use after the gate was taken away, with the packages that the keyring noted when they were installed.
  - A package stays where another one depends on it, and C(nftables) also where the kernel has any other table, or where
    C(nftables.service) is active or enabled, since stopping that service flushes everybody's rules. C(iptables) and C(ipset)
    stay where the kernel has anybody else's rules or sets. A warning says why.
  - Uses C(dpkg) or C(rpm), which take no dependent package along. Debian's configuration files go with the package unless
    somebody has changed them. What was installed with it as a dependency is left to the package manager's autoremove.
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
  packages:
    description: Names of the packages.
    type: list
    elements: str
    required: true
seealso:
  - module: fleet.portknock.knock_keyring
  - module: fleet.portknock.knock_gate
"""

EXAMPLES = r"""
- name: Mark the keyring entry, and see which packages are the gate's own
  fleet.portknock.knock_keyring:
    state: removed
  register: entry

- name: Remove them where nobody else needs them
  fleet.portknock.knock_packages:
    packages: "{{ entry.packages }}"
"""

RETURN = r"""
gone:
  description: Those of the packages that are not installed any more.
  returned: success
  type: list
  elements: str
removed:
  description: Those that this call removed, or in check mode would.
  returned: success
  type: list
  elements: str
kept:
  description: For each package that stays a sentence that says why.
  returned: success
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import check_packages
from ansible_collections.fleet.portknock.plugins.module_utils._packages import uninstall


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "packages": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    try:
        packages = check_packages(module.params["packages"])
        outcome = uninstall(packages, module.check_mode)
    except PortknockError as exc:
        module.fail_json(msg=str(exc))
    for sentence in outcome.kept:
        module.warn(sentence)
    module.exit_json(
        changed=bool(outcome.removed),
        gone=list(outcome.gone),
        removed=list(outcome.removed),
        kept=list(outcome.kept),
    )


if __name__ == "__main__":
    main()
