# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""An operator's bundle, made in the controller's process for all hosts of the play at once; none is connected to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.fleet.portknock.plugins.module_utils._client import Difference, folder_name
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import (
    HostSecrets,
    parse_given,
    parse_valid_until,
    utc_now,
)
from ansible_collections.fleet.portknock.plugins.module_utils._ports import HIGHEST_PORT
from ansible_collections.fleet.portknock.plugins.plugin_utils._bundle import (
    Target,
    bundle_path,
    given_secrets,
    keep,
    whole_bundle,
    why_not,
)
from ansible_collections.fleet.portknock.plugins.plugin_utils._connections import action_on, knock_ssh_of
from ansible_collections.fleet.portknock.plugins.plugin_utils._keyring import (
    keyring_options,
    open_keyring,
    read_as_inventory,
)
from ansible_collections.fleet.portknock.plugins.plugin_utils._qr import qr_maker

_ARGUMENTS: dict[str, dict[str, Any]] = {
    "operator": {"type": "str", "required": True},
    "hosts": {"type": "list", "elements": "str"},
    "dest": {"type": "str", "default": ""},
    "fleet": {"type": "str", "default": ""},
}


class ActionModule(ActionBase):
    """See the module's documentation."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(argument_spec=_ARGUMENTS)
        self._vars = task_vars or {}
        self._warnings: list[str] = []
        try:
            result.update(self._make(arguments))
        except PortknockError as exc:
            raise AnsibleActionFail(str(exc)) from None
        result["warnings"] = self._warnings
        return result

    def _make(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        operator = arguments["operator"]
        if not operator:
            raise PortknockError("portknock_operator: expected the name of an operator; got nothing.")
        folder_name(arguments["fleet"])
        hosts = arguments["hosts"]
        if hosts is None:
            hosts = self._vars["ansible_play_hosts_all"]
        unknown = [host for host in hosts if host not in self._vars["hostvars"]]
        if unknown:
            raise PortknockError(f"hosts: expected hosts of the inventory; got {', '.join(unknown)}.")
        now = utc_now()
        targets: list[Target] = []
        left_out: dict[str, str] = {}
        for host in hosts:
            found = self._target(host, operator, now)
            if isinstance(found, Target):
                targets.append(found)
            else:
                left_out[host] = found
        whole = whole_bundle(operator, targets, arguments["fleet"], qr_maker())
        path, is_default = bundle_path(arguments["dest"], operator, self._vars, self._templar)
        warning = read_as_inventory(path.parent, "The folder", "knock_client_bundle", self._vars)
        if warning:
            self._warnings.append(warning)
        difference = keep(whole, str(path), is_default, dry_run=bool(self._task.check_mode))
        return {
            "changed": difference is not None,
            "path": str(path),
            "operator": operator,
            "folder": whole.manifest.folder,
            "hosts": whole.hosts,
            "left_out": left_out,
            "diff": self._shown(str(path), difference),
        }

    def _target(self, host: str, operator: str, now: str) -> Target | str:
        """Where the operator's ssh goes and what opens it, or why they don't get in."""
        other, variables = action_on(self, host, self._vars)

        def own(name: str) -> Any:
            return other._templar.template(variables[name]) if name in variables else None

        given = parse_given(_part(own("knock_server_sequences"), operator), [operator]).get(operator, [])
        secrets = self._secrets(other, variables, host)
        if secrets is None or operator not in secrets.operators:
            if not given:
                return "no sequence"
            valid_until = parse_valid_until(_part(own("knock_server_valid_until"), operator), [operator])
            secrets = given_secrets(host, operator, given, valid_until.get(operator))
        reason = why_not(secrets, operator, now)
        if reason is not None:
            return reason
        ssh = knock_ssh_of(other, variables)
        destination = ssh.destination()
        hostname, port = own("knock_client_hostname"), own("knock_client_port")
        jump = str(own("knock_client_jump") or destination.jump)
        if destination.proxied and not destination.jump and not hostname and not jump:
            self._warnings.append(
                f"{host}: ssh on the controller goes through a ProxyCommand, which the bundle knows nothing of: it leads to "
                f"{destination.host} directly. Set knock_client_hostname or knock_client_jump to where people's ssh goes."
            )
        return Target(
            secrets,
            str(hostname or destination.host),
            self._port(port, host) or destination.port,
            destination.family,
            str(own("knock_client_remote_user") or ""),
            given,
            "" if jump.lower() == "none" else jump,
            not ssh.get_option("knock_from_jump"),
        )

    @staticmethod
    def _secrets(other: ActionBase, variables: dict[str, Any], host: str) -> HostSecrets | None:
        try:
            keyring = open_keyring(keyring_options(variables, other._templar))
        except PortknockError:
            # No folder is named, so there is no keyring.
            return None
        return keyring.load(host)

    @staticmethod
    def _port(value: Any, host: str) -> int:
        """A port that the inventory gives; 0 for none."""
        if not value:
            return 0
        text = str(value)
        if text.isascii() and text.isdecimal() and 1 <= int(text[:6]) <= HIGHEST_PORT:
            return int(text)
        raise PortknockError(
            f"knock_client_port: expected a port from 1 to {HIGHEST_PORT}, or 0, for {host}; got {value!r}."
        )

    @staticmethod
    def _shown(path: str, difference: Difference | None) -> dict[str, str]:
        if difference is None:
            return {}
        return {
            "before_header": path,
            "after_header": path,
            "before": difference.before,
            "after": difference.after,
        }


def _part(value: Any, operator: str) -> Any:
    """What an option says of one operator: what is wrong with others' is not this one's."""
    if not isinstance(value, Mapping):
        return value
    return {operator: value[operator]} if operator in value else {}


__all__ = ("ActionModule",)
