# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The proof of a gate from outside: what an unprivileged controller sees without the knock, and with it.

What the host says of itself proves nothing, and neither does a connection that was there before; so every look is a
packet of its own.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._gate import GateSettings
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import (
    Address,
    Probe,
    knock_until_open,
    probe,
    probe_udp,
    resolve,
)
from ansible_collections.fleet.portknock.plugins.module_utils._phases import is_trusted
from ansible_collections.fleet.portknock.plugins.module_utils._ports import HIGHEST_PORT, Knock, parse_knocks

# Longer than the kernel waits before it repeats a SYN (1 s), so that one lost packet doesn't look like silence.
LOOK_SECONDS = 1.5
# Where the closed ports for comparison come from: above the ports that services are given.
_LOWEST_CLOSED = 20000
_TRIES = 3
_LOOKS: Mapping[str, Callable[[Address, float], Probe]] = {"tcp": probe, "udp": probe_udp}
# What the chosen answers look like from outside; `mimic` is compared instead.
_EXPECTED = {
    "drop": {"tcp": "filtered", "udp": "silent"},
    "reset": {"tcp": "reset", "udp": "refused"},
}


@dataclass(frozen=True)
class Subject:
    """The gate as the controller is to see it.

    ``addresses`` lead to the host and must be reachable; ``others`` are further addresses of the host, looked at where
    they can be reached; ``trusted`` are those of both that packets from here reach from a trusted source. ``listening``
    are the protected tcp ports that a service waits on, by family, the ssh port first.
    """

    addresses: Sequence[Address]
    others: Sequence[Address]
    protected: Sequence[Knock]
    listening: Mapping[str, Sequence[int]]
    in_use: frozenset[Knock]
    closed_response: str
    trusted: frozenset[Address]
    timeout: float


@dataclass
class Proof:
    """What was seen; ``notes`` say what could not be proved."""

    closed: list[dict[str, Any]] = field(default_factory=list)
    opened: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, sentence: str) -> None:
        """Add a note, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def as_result(self) -> dict[str, Any]:
        """The proof as a task result."""
        return {"closed": self.closed, "opened": self.opened, "notes": self.notes}


def further_addresses(addresses: Sequence[Address], ipv6_addresses: Sequence[str]) -> list[Address]:
    """The IPv6 addresses of a host beside those that lead to it."""
    known = {address.host for address in addresses}
    port = addresses[0].port
    others = [address for text in ipv6_addresses if text not in known for address in resolve(text, port, "inet6")]
    # An address that this machine has, too, leads to itself.
    return [address for address in others if _local_address(address) != address.host]


def sources_towards(addresses: Sequence[Address]) -> list[str]:
    """The addresses that this machine's packets to these ones leave from, as far as there is a way; asking sends none.

    Without link-local ones, whose scope means nothing on the host.
    """
    sources = {_local_address(address) for address in addresses}
    return sorted(source for source in sources if source and "%" not in source)


def subject_of(
    settings: GateSettings,
    addresses: Sequence[Address],
    others: Sequence[Address],
    host: Mapping[str, Any],
    timeout: float,
) -> Subject:
    """The subject of a proof.

    :param host: what the host said after the gate was loaded (``ports_in_use``, ``listeners``, ``source_trusted``).
    """
    port = addresses[0].port
    in_use = parse_knocks(host["ports_in_use"], "ports_in_use")
    return Subject(
        addresses=addresses,
        others=others,
        protected=[
            *(Knock(protected, "tcp") for protected in settings.protected_tcp),
            *(Knock(protected, "udp") for protected in settings.protected_udp),
        ],
        listening={
            family: sorted(set(settings.protected_tcp).intersection(ports), key=lambda listens: listens != port)
            for family, ports in host["listeners"].items()
        },
        in_use=frozenset(in_use),
        closed_response=settings.closed_response,
        # The host sees the connection's source itself, behind whatever translates addresses on the way.
        trusted=frozenset(
            address
            for address in (*addresses, *others)
            if (host["source_trusted"] and address in addresses)
            or is_trusted(_local_address(address), (*settings.trusted4, *settings.trusted6))
        ),
        timeout=timeout,
    )


def prove(subject: Subject, knocks: Sequence[Knock]) -> Proof:
    """Look without the knock, then knock and look again.

    :param knocks: the sequence that has to open the gate.
    :raises PortknockError: says which look at which address, from where, saw what.
    """
    proof = Proof()
    reached = _prove_closed(subject, frozenset(knocks), proof)
    families: set[int] = set()
    for address in reached:
        if address.family in families or address in subject.trusted:
            continue
        families.add(address.family)
        ports = subject.listening["inet6" if address.family == socket.AF_INET6 else "inet"]
        if ports:
            _prove_open(subject, address, ports[0], knocks, proof)
        else:
            proof.note(f"Not proved open on {_name(address)}: no service waits on a protected tcp port there.")
    return proof


def prove_removed(addresses: Sequence[Address], port: int, timeout: float) -> None:
    """See that the port of the connection answers without a knock.

    :raises PortknockError: it does not.
    """
    seen = [probe(address, timeout) for address in addresses]
    if not any(look.state == "open" for look in seen):
        raise PortknockError(
            f"Without the gate, port {port}/tcp of {_name(addresses[0])} does not answer a fresh connection from "
            f"{_local_address(addresses[0])}: it showed {seen[0].state}."
        )


def _prove_closed(subject: Subject, knocks: frozenset[Knock], proof: Proof) -> list[Address]:
    """Compare every protected port with a closed one; returns the addresses that can be reached."""
    jobs = [
        (address, port, address in subject.others)
        for address in (*subject.addresses, *subject.others)
        for port in subject.protected
    ]
    with ThreadPoolExecutor(max_workers=min(16, len(jobs) or 1)) as pool:
        looks = list(pool.map(lambda job: _look_twice(job[0], job[1], subject, knocks), jobs))
    reached: list[Address] = []
    for (address, port, is_other), (seen, closed) in zip(jobs, looks, strict=True):
        silent = closed.state in ("unreachable", "filtered", "silent")
        if is_other and silent and seen.state == closed.state:
            # Silence may be a host that answers nobody or a path that isn't there.
            proof.note(f"Not proved on {_name(address)}: it can't be told from here whether it is reached.")
            continue
        if seen.state == "unreachable" and not is_other and len(subject.addresses) > 1:
            proof.note(f"Not proved on {_name(address)}: it can't be reached from here ({seen.error}).")
            continue
        if address not in reached:
            reached.append(address)
        if address in subject.trusted:
            proof.note(f"Not proved on {_name(address)}: packets from here come from a trusted source.")
            continue
        _judge(subject, address, port, seen, closed)
        proof.closed.append(
            {"address": _name(address), "port": str(port), "showed": seen.state, "closed_port_showed": closed.state}
        )
    if not reached:
        raise PortknockError(
            f"No address of the host can be reached with a fresh packet from here: tried {_names(subject.addresses)}."
        )
    return reached


def _look_twice(address: Address, port: Knock, subject: Subject, knocks: frozenset[Knock]) -> tuple[Probe, Probe]:
    """One look at the protected port and one at a closed port, again where they differ: networks lose packets."""
    look = _LOOKS[port.proto]
    seen = closed = Probe("unreachable")
    for _attempt in range(_TRIES):
        seen = look(address.at(port.port), LOOK_SECONDS)
        closed = look(address.at(_closed_port(port.proto, subject, knocks)), LOOK_SECONDS)
        if seen == closed or seen.state in ("open", "answered"):
            break
    return seen, closed


def _judge(subject: Subject, address: Address, port: Knock, seen: Probe, closed: Probe) -> None:
    where = f"port {port} of {_name(address)}, seen from {_local_address(address)} without the knock,"
    if seen.state in ("open", "answered"):
        raise PortknockError(f"Not closed: {where} answered ({seen.state}).")
    expected = _EXPECTED.get(subject.closed_response)
    if expected is None and seen != closed:
        raise PortknockError(
            f"Not hidden: {where} showed {_look(seen)} and a closed port {_look(closed)}, where "
            "knock_server_closed_response=mimic promises the same. The packet filter of the host, or one on the way, tells "
            "ports apart: choose drop or reset, whichever comes closest to what its closed ports show."
        )
    if expected is not None and seen.state != expected[port.proto]:
        raise PortknockError(
            f"Not hidden: {where} showed {_look(seen)}, where knock_server_closed_response={subject.closed_response} "
            f"promises {expected[port.proto]}."
        )


def _prove_open(subject: Subject, address: Address, port: int, knocks: Sequence[Knock], proof: Proof) -> None:
    result = knock_until_open([address.at(port)], knocks, port, subject.timeout)
    if result.state != "open":
        raise PortknockError(
            f"Not opened: port {port}/tcp of {_name(address)}, seen from {_local_address(address)}, showed "
            f"{result.state} after the right knock was sent {result.attempts} times in {result.elapsed:.1f} s."
        )
    proof.opened.append(
        {"address": _name(address), "port": f"{port}/tcp", "milliseconds": round(result.elapsed * 1000, 1)}
    )


def _closed_port(proto: str, subject: Subject, knocks: Iterable[Knock]) -> int:
    taken = {knock.port for knock in (*subject.in_use, *subject.protected, *knocks)}
    while True:
        port = _LOWEST_CLOSED + secrets.randbelow(HIGHEST_PORT - _LOWEST_CLOSED)
        if port not in taken:
            return port


def _look(seen: Probe) -> str:
    return f"{seen.state} ({seen.error})" if seen.error else seen.state


def _name(address: Address) -> str:
    return address.host


def _names(addresses: Sequence[Address]) -> str:
    return ", ".join(_name(address) for address in addresses) or "none"


def _local_address(address: Address) -> str:
    """The address that packets to the host leave from, empty where there is no way to it."""
    with socket.socket(address.family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(address.at(9).sockaddr)
        except OSError:
            return ""
        return str(sock.getsockname()[0])


__all__ = ("Proof", "Subject", "further_addresses", "prove", "prove_removed", "sources_towards", "subject_of")
