# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The options of core's ssh connection, whatever the ansible-core that runs: a subclass has to declare them all."""

from __future__ import annotations

from typing import Any

from ansible.module_utils.common.yaml import yaml_dump, yaml_load
from ansible.plugins.connection import ssh


def _without_versions(value: Any) -> Any:
    """Leave out ``version_added``: core's version numbers mean nothing in a collection."""
    if isinstance(value, dict):
        return {key: _without_versions(item) for key, item in value.items() if key != "version_added"}
    if isinstance(value, list):
        return [_without_versions(item) for item in value]
    return value


class ModuleDocFragment:
    """Computed from the documentation of ansible.builtin.ssh."""

    # By libyaml where it is there: every worker of every task comes here.
    DOCUMENTATION: str = yaml_dump({"options": _without_versions(yaml_load(ssh.DOCUMENTATION)["options"])})
