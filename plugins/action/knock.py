# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import time
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.fleet.portknock.plugins.connection.knock_ssh import Connection, HostSequences
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._jump import FromHere
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import (
    FAMILIES,
    Address,
    KnockResult,
    probe,
    resolve,
)
from ansible_collections.fleet.portknock.plugins.module_utils._ports import (
    HIGHEST_PORT,
    SENT_PROTOCOLS,
    parse_knocks,
)
from ansible_collections.fleet.portknock.plugins.plugin_utils._connections import knock_ssh_of

_BANNER_SECONDS = 1.0
_ARGUMENTS = {
    "host": {"type": "str"},
    "port": {"type": "int"},
    "family": {"type": "str", "choices": list(FAMILIES)},
    "operator": {"type": "str"},
    "knocks": {"type": "raw", "no_log": True},
    "knock": {"type": "bool", "default": True},
    "state": {"type": "str", "choices": ["opened", "closed"], "default": "opened"},
    "timeout": {"type": "float", "default": 10},
    "expect": {"type": "str", "choices": ["open", "closed"]},
}


class ActionModule(ActionBase):
    """Knocks in the controller's process: a packet from anywhere else would open nothing for the controller."""

    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result = super().run(tmp, task_vars)
        _unused, arguments = self.validate_argument_spec(argument_spec=_ARGUMENTS)
        try:
            result.update(self._knock(arguments, knock_ssh_of(self, task_vars or {})))
        except PortknockError as exc:
            raise AnsibleActionFail(str(exc)) from None
        return result

    def _knock(self, arguments: dict[str, Any], ssh: Connection) -> dict[str, Any]:
        if arguments["timeout"] <= 0:
            raise PortknockError(f"timeout: expected more than 0 seconds; got {arguments['timeout']:g}.")
        if arguments["port"] is not None and not 1 <= arguments["port"] <= HIGHEST_PORT:
            raise PortknockError(f"port: expected a port from 1 to {HIGHEST_PORT}; got {arguments['port']}.")
        closing = arguments["state"] == "closed"
        if closing and not arguments["knock"]:
            raise PortknockError("knock: expected true with state=closed, which sends a sequence; got false.")
        known = self._sequences(arguments, ssh) if arguments["knock"] else None
        if closing and known is not None and not known.close:
            raise PortknockError(
                f"state: expected a host with a close sequence (knock_server_close_sequence); the keyring holds none for "
                f"{known.host or 'this host'}. Run the role with that variable, or give one by knocks."
            )
        destination = ssh.destination()
        if destination.proxied and arguments["host"] is None:
            raise PortknockError(
                f"host: expected one that ssh reaches directly; got {destination.host}, which it reaches through a "
                "ProxyJump or ProxyCommand: a knock from here would come from the wrong address. Set host to an "
                "address that can be reached from here."
            )
        port = arguments["port"] or destination.port
        addresses = resolve(arguments["host"] or destination.host, port, arguments["family"] or destination.family)
        if known is not None:
            way = FromHere(addresses, port, destination.source)
            if closing:
                seen = way.close(known.close, arguments["timeout"])
            else:
                seen, _note = known.knock(way, arguments["timeout"], _BANNER_SECONDS)
        else:
            seen = self._look(addresses, arguments["timeout"], destination.source)
        shown: dict[str, Any] = {
            "state": seen.state,
            "elapsed_ms": round(seen.elapsed * 1000, 2),
            "attempts": seen.attempts,
            "gap": seen.gap,
            "address": seen.address.host if seen.address else "",
            "port": port,
            "banner": seen.banner,
        }
        expected = arguments["expect"]
        if expected is not None and (expected == "open") != (seen.state == "open"):
            shown["failed"] = True
            shown["msg"] = (
                f"expect: expected port {port} of {shown['address']} to be {expected}; got {seen.state} after "
                f"{seen.elapsed:.1f} s and {seen.attempts} knocks."
            )
        return shown

    @staticmethod
    def _sequences(arguments: dict[str, Any], ssh: Connection) -> HostSequences:
        if arguments["knocks"] is not None:
            sequence = parse_knocks(arguments["knocks"], "knocks", secret=True, protocols=SENT_PROTOCOLS)
            if not sequence:
                raise PortknockError("knocks: expected at least one knock; got an empty list.")
            if arguments["state"] == "closed":
                return HostSequences("", [], (), ssh.is_single_use, close=[sequence])
            return HostSequences("", [sequence], (), ssh.is_single_use)
        known = ssh.host_sequences(arguments["operator"])
        if known is None:
            raise PortknockError(
                f"knocks: expected a sequence, as the keyring holds none for {ssh.get_option('inventory_hostname')}; "
                "got nothing. Run the role knock_server on the host, name the keyring's folder by knock_keyring_dir, or set "
                "knock_sequences."
            )
        return known

    @staticmethod
    def _look(addresses: list[Address], timeout: float, source: str | None) -> KnockResult:
        """One look at each address until one is open."""
        begun = time.monotonic()
        for address in addresses:
            seen = probe(address, timeout / len(addresses), _BANNER_SECONDS, source)
            result = KnockResult(seen.state, address, time.monotonic() - begun, 0, 0.0, -1, seen.error, seen.banner)
            if seen.state == "open":
                break
        return result


__all__ = ("ActionModule",)
