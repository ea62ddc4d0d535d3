#!/usr/bin/python
# Copyright (c) 2026, fleet.portknock contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: knock_client
short_description: Put an operator's bundle on a person's machine
version_added: 0.1.0
description:
  - Does what C(portknock install) of the bundle does, for the user as whom the task runs. The bundle comes into a folder of
    C(~/.ssh), and one C(Include) line to the top of C(~/.ssh/config). Afterwards ssh, scp, sftp, rsync and git knock by
    themselves.
  - Nothing else of C(~/.ssh/config) changes. What the helper has noted of one-time sequences stays.
  - The bundle is read on the controller, where M(fleet.portknock.knock_bundle) has written it.
author:
  - fleet.portknock contributors (@fleet-portknock)
extends_documentation_fragment:
  - fleet.portknock.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    details: Sequences are shown as their number.
  idempotent:
    support: full
  async:
    support: none
    details: The arguments hold secrets and must not be written anywhere, for which the connection has to pipeline.
options:
  state:
    description: V(present) installs the bundle, V(absent) undoes that.
    type: str
    choices: [present, absent]
    default: present
  bundle:
    description:
      - The bundle on the controller, a tar file or a folder. A relative path begins at the folder of the inventory.
      - Where it is empty, C(portknock_bundles/OPERATOR.tar) beside the keyring.
    type: str
    default: ""
  operator:
    description: Whose bundle it is, where O(bundle) is empty.
    type: str
    default: ""
  fleet:
    description: With O(state=absent), the name of the fleet whose bundle is to go, where it was made with one.
    type: str
    default: ""
  replace:
    description: Take the place of another operator's or another fleet's bundle, which is refused otherwise.
    type: bool
    default: false
  payload:
    description: What the host needs, as one text; the action plugin sets it.
    type: str
seealso:
  - module: fleet.portknock.knock_bundle
"""

EXAMPLES = r"""
- name: Let my own ssh knock
  fleet.portknock.knock_client:
    operator: alice

- name: Install a bundle for another user
  fleet.portknock.knock_client:
    bundle: /srv/bundles/alice.tar
  become: true
  become_user: alice

- name: Take it away again
  fleet.portknock.knock_client:
    state: absent
"""

RETURN = r"""
path:
  description: The folder that holds the bundle, or did.
  returned: always
  type: str
  sample: /home/alice/.ssh/portknock
hosts:
  description: The names by which ssh knows the hosts.
  returned: with O(state=present)
  type: list
  elements: str
  sample: [web1, web2]
left:
  description: Files of that folder which are not the bundle's, and were left there.
  returned: with O(state=absent)
  type: list
  elements: str
"""

import base64
import json
import os
import pwd
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleet.portknock.plugins.module_utils._client import install, parse_bundle, uninstall
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "bundle": {"type": "str", "default": ""},
            "operator": {"type": "str", "default": ""},
            "fleet": {"type": "str", "default": ""},
            "replace": {"type": "bool", "default": False},
            "payload": {"type": "str", "no_log": True},
        },
        supports_check_mode=True,
    )
    try:
        payload = json.loads(module.params["payload"] or "null")
        if not isinstance(payload, dict):
            raise PortknockError("knock_client runs through its action plugin; this call did not come from it.")
        result = _run(payload, module.params["replace"], module.check_mode)
    except PortknockError as exc:
        module.fail_json(msg=str(exc))
    module.exit_json(**result)


def _run(payload: dict[str, Any], replace: bool, dry_run: bool) -> dict[str, Any]:
    try:
        # Where ssh itself looks, whatever the environment says.
        home = pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        raise PortknockError(
            f"expected a user with a home folder; got user id {os.geteuid()}, without a name."
        ) from None
    if "files" in payload:
        files = {name: base64.b64decode(text) for name, text in payload["files"].items()}
        bundle = parse_bundle(files, "knock_client_bundle")
        folder = bundle.manifest.folder
        outcome = install(bundle, home, replace, dry_run)
        said: dict[str, Any] = {"hosts": bundle.hosts}
    else:
        folder = payload["folder"]
        outcome = uninstall(folder, home, dry_run)
        said = {"left": list(outcome.left)}
    return {
        "changed": bool(outcome.differences),
        "path": os.path.join(home, ".ssh", folder),
        **said,
        "diff": [
            {"before_header": path, "after_header": path, "before": before, "after": after}
            for path, before, after in outcome.differences
        ],
    }


if __name__ == "__main__":
    main()
