# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host's side of apply, prove and confirm: one call a phase, asked for by the action plugin."""

from __future__ import annotations

import ipaddress
from typing import Any, Mapping, Optional, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._backends import Nftables, back_end
from ansible_collections.fleet.portknock.plugins.module_utils._changes import (
    Change,
    Difference,
    planned,
    run_change,
)
from ansible_collections.fleet.portknock.plugins.module_utils._host import GateHost, Wanted
from ansible_collections.fleet.portknock.plugins.module_utils._procnet import (
    Peer,
    ports_in_use,
    ssh_peer,
    tcp_listeners,
)
from ansible_collections.fleet.portknock.plugins.module_utils._system import Runner
from ansible_collections.fleet.portknock.plugins.module_utils._system import run as run_program


class GateChange(Change):
    """A gate that is to be there, or to be gone.

    :param wanted: None where it is to be gone.
    :param payload: as for :func:`run_phase`.
    :param pid: a process of the ssh connection that this came through.
    """

    def __init__(
        self, host: GateHost, enforcer: Nftables, wanted: Optional[Wanted], payload: Mapping[str, Any], pid: int
    ) -> None:
        self._host = host
        self._enforcer = enforcer
        self._wanted = wanted
        self._payload = payload
        self._run = str(payload["run"])
        self._pid = pid

    def preview(self) -> dict[str, Any]:
        result = self.plan()
        if self._wanted is not None and result["changed"]:
            if self._found.version is None:
                result["warnings"] = ["The rules were not validated: the back end is not installed on this host yet."]
            else:
                self._host.check(self._wanted)
        return result

    def plan(self) -> dict[str, Any]:
        self._found = self._host.inspect()
        if self._wanted is not None:
            return planned(self._host.differences(self._wanted, self._found))
        if self._host.exists(self._found):
            return planned([Difference("the gate", "a gate with its table, files and unit\n", "")])
        return planned([])

    def settled(self) -> None:
        if self._wanted is None:
            self._host.forget()

    def begin(self) -> dict[str, Any]:
        seconds, peer = int(self._payload["seconds"]), ssh_peer(self._pid)
        if self._wanted is not None:
            self._host.apply(self._wanted, self._found, self._run, seconds)
            # The proof begins with sources that have not knocked.
            for source in self._payload["sources"]:
                self._enforcer.close_window(Peer(source, None))
            if peer is not None:
                self._enforcer.close_window(peer)
        else:
            self._host.take_away(self._found, self._run, seconds)
        return {
            "source_trusted": is_trusted(peer.address if peer else None, self._payload.get("trusted", ())),
            "ports_in_use": [str(knock) for knock in ports_in_use()],
            "listeners": tcp_listeners(),
        }

    def confirm(self) -> None:
        if self._wanted is not None:
            self._host.confirm(self._wanted, self._run)
        else:
            self._host.confirm_away(self._run)
            self._host.forget()

    def outcome(self) -> Optional[str]:
        return self._host.outcome(self._run, removal=self._wanted is None)


def run_phase(
    phase: str,
    state: str,
    backend: str,
    payload: Mapping[str, Any],
    pid: int,
    check_mode: bool,
    run: Runner = run_program,
    root: str = "",
) -> dict[str, Any]:
    """Do one phase of a gate's change; see :func:`run_change`.

    :param payload: ``run`` (id), ``seconds`` (of the trial), and for a wanted gate ``trusted`` (CIDRs), ``sources``
        (addresses that the proof will look from) and ``wanted`` (the fields of :class:`Wanted`).
    :param pid: a process of the ssh connection that this came through.
    :returns: the module's result.
    :raises PortknockError: with nothing changed, or with the way back armed.
    """
    enforcer = back_end(backend, run)
    host = GateHost(enforcer, root, run)
    wanted = Wanted(**payload["wanted"]) if state == "applied" else None
    change = GateChange(host, enforcer, wanted, payload, pid)
    return run_change(phase, change, host.trial, str(payload["run"]), check_mode)


def is_trusted(address: Optional[str], trusted: Sequence[str]) -> bool:
    """Whether a gate with these trusted sources (CIDRs) lets the address in without a knock."""
    if not address:
        return False
    source = ipaddress.ip_address(address)
    return any(
        source.version == network.version and source in network
        for network in (ipaddress.ip_network(text, strict=False) for text in trusted)
    )


__all__ = ("GateChange", "is_trusted", "run_phase")
