# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hands a bundle of the controller's to the module, which does on the host what portknock install does."""

from __future__ import annotations

import base64
import json
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible_collections.fleet.portknock.plugins.module_utils._client import folder_name
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.plugin_utils._bundle import bundle_path, load
from ansible_collections.fleet.portknock.plugins.plugin_utils._confirmed import Opaque, SecretiveAction

_ARGUMENTS: dict[str, dict[str, Any]] = {
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "bundle": {"type": "str", "default": ""},
    "operator": {"type": "str", "default": ""},
    "fleet": {"type": "str", "default": ""},
    "replace": {"type": "bool", "default": False},
}


class ActionModule(SecretiveAction):
    """See the module's documentation."""

    _module = "fleet.portknock.knock_client"

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(argument_spec=_ARGUMENTS)
        variables = task_vars or {}
        try:
            if arguments["state"] == "absent":
                payload: dict[str, Any] = {"folder": folder_name(arguments["fleet"])}
            else:
                path, _is_default = bundle_path(arguments["bundle"], arguments["operator"], variables, self._templar)
                contents = load(str(path)).contents()
                payload = {"files": {name: base64.b64encode(data).decode() for name, data in contents.items()}}
            self._check_kept_secret()
        except PortknockError as exc:
            raise AnsibleActionFail(str(exc)) from None
        given = {"state": arguments["state"], "replace": arguments["replace"], "payload": Opaque(json.dumps(payload))}
        result.update(self._execute_module(module_name=self._module, module_args=given, task_vars=variables))
        return result


__all__ = ("ActionModule",)
