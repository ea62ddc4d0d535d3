# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host's side of apply, prove and confirm: one call a phase, asked for by the action plugin."""

from __future__ import annotations

import ipaddress
from typing import Any, Mapping, Optional, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._backends import Nftables, back_end
from ansible_collections.fleet.portknock.plugins.module_utils._host import Difference, Found, GateHost, Wanted
from ansible_collections.fleet.portknock.plugins.module_utils._procnet import (
    Peer,
    ports_in_use,
    ssh_peer,
    tcp_listeners,
)
from ansible_collections.fleet.portknock.plugins.module_utils._system import Runner
from ansible_collections.fleet.portknock.plugins.module_utils._system import run as run_program

PHASES = ("compare", "apply", "confirm", "rollback")


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
    """Do one phase: see what would change, begin a trial, confirm it or go back.

    :param payload: ``run`` (id), ``seconds`` (of the trial), and for a wanted gate ``trusted`` (CIDRs), ``sources``
        (addresses that the proof will look from) and ``wanted`` (the fields of :class:`Wanted`).
    :param pid: a process of the ssh connection that this came through.
    :returns: the module's result.
    :raises PortknockError: with nothing changed, or with the way back armed.
    """
    enforcer = back_end(backend, run)
    host = GateHost(enforcer, root, run)
    identity = str(payload["run"])
    if phase == "rollback":
        host.trial.restore(identity)
        return {"changed": False, "outcome": host.outcome(identity, removal=state == "absent")}
    wanted = Wanted(**payload["wanted"]) if state == "applied" else None
    if phase == "confirm":
        with host.trial.turn(identity):
            if wanted is not None:
                host.confirm(wanted, identity)
            else:
                host.confirm_away(identity)
                host.forget()
        return {"changed": True}

    if check_mode:
        found = host.inspect()
        result = _plan(host, wanted, found)
        if wanted is not None and result["changed"]:
            if found.version is None:
                result["warnings"] = ["The rules were not validated: the back end is not installed on this host yet."]
            else:
                host.check(wanted)
        return result
    # ssh repeats a command whose connection was cut: what the first one did is undone.
    host.trial.restore(identity)
    try:
        with host.trial.turn(identity):
            found = host.inspect()
            result = _plan(host, wanted, found)
            if not result["changed"]:
                if wanted is None:
                    host.forget()
            elif phase == "apply":
                result.update(_begin(host, enforcer, wanted, found, payload, pid))
            return result
    except BaseException:
        # Whatever went wrong after the way back was armed, it need not wait for the timer.
        host.trial.restore(identity)
        raise


def _begin(
    host: GateHost,
    enforcer: Nftables,
    wanted: Optional[Wanted],
    found: Found,
    payload: Mapping[str, Any],
    pid: int,
) -> dict[str, Any]:
    """Put the change on trial; returns what whoever proves it has to know."""
    identity, seconds = str(payload["run"]), int(payload["seconds"])
    peer = ssh_peer(pid)
    if wanted is not None:
        host.apply(wanted, found, identity, seconds)
        # The proof begins with sources that have not knocked.
        for source in payload["sources"]:
            enforcer.close_window(Peer(source, None))
        if peer is not None:
            enforcer.close_window(peer)
    else:
        host.take_away(found, identity, seconds)
    return {
        "on_trial": True,
        "source_trusted": is_trusted(peer.address if peer else None, payload.get("trusted", ())),
        "ports_in_use": [str(knock) for knock in ports_in_use()],
        "listeners": tcp_listeners(),
    }


def is_trusted(address: Optional[str], trusted: Sequence[str]) -> bool:
    """Whether a gate with these trusted sources (CIDRs) lets the address in without a knock."""
    if not address:
        return False
    source = ipaddress.ip_address(address)
    return any(
        source.version == network.version and source in network
        for network in (ipaddress.ip_network(text, strict=False) for text in trusted)
    )


def _plan(host: GateHost, wanted: Optional[Wanted], found: Found) -> dict[str, Any]:
    if wanted is not None:
        differences = host.differences(wanted, found)
    elif host.exists(found):
        differences = [Difference("the gate", "a gate with its table, files and unit\n", "")]
    else:
        differences = []
    return {
        "changed": bool(differences),
        "reasons": [difference.what for difference in differences],
        "diff": [
            {"before_header": item.what, "after_header": item.what, "before": item.before, "after": item.after}
            for item in differences
        ],
    }


__all__ = ("PHASES", "is_trusted", "run_phase")
