# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What knock_gate_info reports: everything that a play has to know of a host before it makes a gate there."""

from __future__ import annotations

import os
import re
import time
from typing import Any, Mapping, Optional

from ansible_collections.fleet.portknock.plugins.module_utils._backends import back_end
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._host import Found, GateHost
from ansible_collections.fleet.portknock.plugins.module_utils._procnet import (
    global_ipv6_addresses,
    ports_in_use,
    reachable_ports,
    ssh_peer,
    ssh_session,
)
from ansible_collections.fleet.portknock.plugins.module_utils._system import Runner, read_text
from ansible_collections.fleet.portknock.plugins.module_utils._system import run as run_program

# Where a packet filter's manager leaves a trace that needs no program to be run.
_FIREWALL_TRACES = {
    "docker": "/run/docker.sock",
    "fail2ban": "/run/fail2ban/fail2ban.sock",
    "firewalld": "/run/firewalld.pid",
    "nftables": "/etc/systemd/system/sysinit.target.wants/nftables.service",
    "netfilter-persistent": "/etc/systemd/system/multi-user.target.wants/netfilter-persistent.service",
}
_UFW_SETTINGS = "/etc/ufw/ufw.conf"
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
# Fewer one-time sequences than one in so many are few.
_FEW = 4
_CONNTRACK = "/proc/sys/net/netfilter"
# As every back end's template of the gate says it where it closes all other ports.
_OPEN_PORTS = re.compile(r"^\s*# Open ports: (.+)$", re.MULTILINE)


def inspect_host(backend: str, pid: int, run: Runner = run_program) -> dict[str, Any]:
    """Look at the host.

    :param pid: a process of the ssh connection, to find where that comes from.
    :returns: as documented in knock_gate_info.
    :raises PortknockError: an unknown back end, or files of the gate that can't be read.
    """
    enforcer = back_end(backend, run)
    host = GateHost(enforcer, run=run)
    found = host.inspect()
    capabilities: dict[str, bool] = {}
    problem: Optional[str] = None
    missing = enforcer.missing_programs()
    if not missing:
        try:
            capabilities = enforcer.capabilities()
        except PortknockError as exc:
            problem = str(exc)
    peer, session = ssh_peer(pid), ssh_session(pid)
    text = found.texts["gate"] or ""
    stock, names = found.enforcer.stock(text), found.enforcer.one_time_operators(text)
    return {
        "gate": {
            "present": found.texts["gate"] is not None,
            "loaded": found.listing is not None,
            "watched": found.running.issuperset(found.enforcer.services),
            "on_trial": host.trial.pending() is not None,
            "backend": found.state.get("backend"),
            "keyring": found.state.get("keyring"),
            "generation": found.state.get("generation", 0),
            "fingerprint": found.state.get("fingerprint"),
            "one_time": {
                names[number]: supply for number, supply in stock.get("operators", {}).items() if number in names
            },
            "one_time_last": stock.get("last", 0),
            "open_ports": _open_ports(text),
        },
        "openings": _openings(host, found),
        "backend": {
            "name": backend,
            "version": found.version,
            "missing_programs": missing,
            "capabilities": capabilities,
            "problem": problem,
            "notes": enforcer.notes(capabilities) if capabilities else [],
        },
        "init": "systemd" if os.path.isdir("/run/systemd/system") else _name_of_init(),
        "ports_in_use": [str(knock) for knock in ports_in_use()],
        "reachable_ports": [str(knock) for knock in reachable_ports()],
        "ipv6_addresses": global_ipv6_addresses(),
        "firewalls": _firewalls(),
        "ssh_source": peer.address if peer else None,
        "ssh_port": session.port if session else None,
        "conntrack": {
            "count": _number(f"{_CONNTRACK}/nf_conntrack_count"),
            "maximum": _number(f"{_CONNTRACK}/nf_conntrack_max"),
        },
    }


def _openings(host: GateHost, found: Found) -> list[dict[str, Any]]:
    """Who opened the gate, the latest first."""
    if found.listing is None:
        return []
    enforcer = found.enforcer
    names, now, windows = host.names(found), time.time(), enforcer.windows(found.listing)
    return [
        {
            "operator": names.get(record.number),
            "source": str(record.source),
            "last": time.strftime(_TIME_FORMAT, time.gmtime(now - record.ago)),
            "count": record.times,
            "open": record.source in windows,
        }
        for record in sorted(enforcer.openings(found.listing), key=lambda record: (record.ago, str(record.source)))
    ]


def _open_ports(text: str) -> Optional[list[str]]:
    """The ports that a gate leaves open where it closes all others; None where it doesn't."""
    found = _OPEN_PORTS.search(text)
    if found is None:
        return None
    return [] if found.group(1) == "none" else found.group(1).split(", ")


def one_time_warnings(report: Mapping[str, Any]) -> list[str]:
    """What to tell the user of one-time sequences of which few are left.

    :param report: what :func:`inspect_host` returned.
    """
    warnings = []
    for name, supply in report["gate"]["one_time"].items():
        if not supply["left"]:
            warnings.append(
                f"knock_server_one_time: operator {name} has no sequence left on this host: only trusted sources and other "
                "operators get in until site.yml makes new ones."
            )
        elif _FEW * supply["left"] < supply["known"]:
            warnings.append(
                f"knock_server_one_time: operator {name} has {supply['left']} of {supply['known']} sequences left on this host; "
                "site.yml makes new ones."
            )
    return warnings


def _firewalls() -> list[str]:
    active = [name for name, trace in _FIREWALL_TRACES.items() if os.path.exists(trace)]
    if "ENABLED=yes" in (read_text(_UFW_SETTINGS) or ""):
        active.append("ufw")
    return sorted(active)


def _name_of_init() -> str:
    return (read_text("/proc/1/comm") or "unknown").strip()


def _number(path: str) -> Optional[int]:
    text = read_text(path)
    return int(text) if text is not None else None


__all__ = ("inspect_host", "one_time_warnings")
