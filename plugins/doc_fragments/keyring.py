# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The keyring's options, once: for the connection plugin, the action plugins and every page of the documentation."""

from __future__ import annotations


class ModuleDocFragment:
    """``fleet.portknock.keyring`` for plugins that have the options, ``.module`` for tasks that use them."""

    DOCUMENTATION: str = r"""
options:
  knock_keyring_dir:
    description:
      - The folder that holds the secrets, one file a host, on the controller.
      - A relative path begins at the folder of the host's inventory, or at the current folder where there is none.
      - Where it is not set, C(knock_keyring) in the folder of the host's inventory. Without such a folder, as with
        C(-i host,), it must be set.
      - Where an inventory source is itself a folder, Ansible reads the files below it as inventory. Keep the keyring
        elsewhere then, or add C(^knock_keyring$) to C(ignore_patterns) in the section C([inventory]) of
        C(ansible.cfg).
      - The folder is made at its first use; the folder above it has to be there.
    type: str
    vars:
      - name: knock_keyring_dir
    env:
      - name: KNOCK_KEYRING_DIR
    ini:
      - section: portknock
        key: keyring_dir
  knock_keyring_plaintext:
    description:
      - Keep the secrets in plain files, readable by their owner only, instead of vault-encrypted ones.
      - This is for trying things out. A file that is encrypted is still read, and becomes plain when it changes.
    type: bool
    default: false
    vars:
      - name: knock_keyring_plaintext
    env:
      - name: KNOCK_KEYRING_PLAINTEXT
    ini:
      - section: portknock
        key: keyring_plaintext
  knock_inventory_dir:
    description:
      - The folder of the host's inventory. Ansible sets the variable.
    type: raw
    vars:
      - name: inventory_dir
"""

    # Core asks for options in every fragment; these tasks take none of their own.
    MODULE: str = r"""
options: {}
notes:
  - The keyring is found as the connection plugin P(fleet.portknock.knock_ssh#connection) finds it, by
    O(fleet.portknock.knock_ssh#connection:knock_keyring_dir) and
    O(fleet.portknock.knock_ssh#connection:knock_keyring_plaintext), which are set by variable, environment or
    C(ansible.cfg).
  - Files of the keyring are encrypted and decrypted with the vault secrets of the run, such as C(--vault-id) and
    C(--vault-password-file) give them. Where there are several, C(vault_encrypt_identity) of the configuration says
    which one encrypts, otherwise the first does, and any may decrypt.
"""


__all__ = ("ModuleDocFragment",)
