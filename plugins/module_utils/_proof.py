# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The proof of a gate from outside: what an unprivileged process sees without the knock, and with it.

Runs in the controller's process, or on the host that the user names for it; so questions and answers are plain mappings
that survive JSON. What the gate's own host says of itself proves nothing, and neither does a connection that was there
before; so every look is a packet of its own.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import (
    Address,
    Probe,
    knock_with_any,
    local_address,
    probe,
    probe_udp,
    resolve,
)
from ansible_collections.fleet.portknock.plugins.module_utils._ports import (
    GNUPG,
    HIGHEST_PORT,
    SENT_PROTOCOLS,
    SEQUENCE,
    Knock,
    parse_knocks,
)
from ansible_collections.fleet.portknock.plugins.module_utils._spa import check_client

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
    """The gate as it is to be seen.

    ``addresses`` lead to the host and must be reachable; ``others`` are further addresses of the host, looked at where
    they can be reached; ``trusted`` are those of both that packets from here reach from a trusted source. ``listening``
    are the protected tcp ports that a service waits on, by family, the ssh port first. ``place`` names the host that
    looks, empty for the controller. ``without_ipv6`` says why IPv6 stays closed whoever knocks, empty where it does not.
    """

    addresses: Sequence[Address]
    others: Sequence[Address]
    protected: Sequence[Knock]
    listening: Mapping[str, Sequence[int]]
    in_use: frozenset[Knock]
    closed_response: str
    trusted: frozenset[Address]
    timeout: float
    place: str = ""
    without_ipv6: str = ""

    @property
    def here(self) -> str:
        """Where the looks come from, in a sentence."""
        return self.place or "here"


@dataclass
class Proof:
    """What was seen; ``notes`` say what could not be proved, ``sent_once`` how many of the sequences that open once were sent."""

    closed: list[dict[str, Any]] = field(default_factory=list)
    opened: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sent_once: int = 0

    def note(self, sentence: str) -> None:
        """Add a note, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def _usage(self) -> dict[str, int]:
        return {"sent_once": self.sent_once} if self.sent_once else {}

    def as_result(self) -> dict[str, Any]:
        """The proof as a task result."""
        return {"closed": self.closed, "opened": self.opened, "notes": self.notes, **self._usage()}


def answer(question: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Answer one of :data:`QUESTIONS`; ``problem`` in the answer is what a person has to know instead."""
    try:
        return QUESTIONS[question](request)
    except (PortknockError, OSError) as exc:
        return {"problem": str(exc)}


def _scout(request: Mapping[str, Any]) -> dict[str, Any]:
    """Which addresses a proof would look at, and the sources that its packets would come from; sends none.

    :param request: ``host``, ``port`` and ``family`` as ssh would use them; ``addresses`` (packed) that the controller
        resolves that to, none where it leaves it to this host; ``further`` addresses of the host; ``place``; ``mode`` where
        the gate is to be opened otherwise than by a sequence.
    :returns: ``addresses`` and ``others`` (packed), and ``sources``.
    :raises PortknockError: no address leads from here to the host, or nothing here could open the gate.
    """
    place, port = request["place"], request["port"]
    mode = request.get("mode", SEQUENCE)
    if mode != SEQUENCE:
        check_client(place, gnupg=mode == GNUPG)
    named = [Address.unpacked(item) for item in request["addresses"]] or resolve(
        request["host"], port, request["family"]
    )
    addresses = named
    if place:
        # The controller's interfaces mean nothing here, and neither does what is an address of this very host.
        addresses = [address for address in named if not _has_scope(address) and not _is_own(address)]
        if not addresses:
            raise PortknockError(
                f"expected a host from which {request['host']} is another machine; for {place}, {_names(named)} "
                "is link-local or an address of its own."
            )
    others = _further_addresses(addresses, request["further"])
    return {
        "addresses": [address.packed() for address in addresses],
        "others": [address.packed() for address in others],
        "sources": _sources_towards([*addresses, *others]),
    }


def _prove_applied(request: Mapping[str, Any]) -> dict[str, Any]:
    """See that the gate is closed without the knock, and open with it.

    :param request: ``addresses`` and ``others`` as the scout gave them; ``place``; of the gate ``protected``
        (port/protocol), ``closed_response`` and ``trusted`` (CIDRs); of its host ``ports_in_use``, ``listeners`` and
        ``source_trusted``; ``knocks``, or ``once`` instead (secret), see :func:`prove`, ``timeout`` in seconds, and
        ``without_ipv6`` where IPv6 stays closed.
    """
    knocks, *once = (
        parse_knocks(texts, "knocks", secret=True, protocols=SENT_PROTOCOLS)
        for texts in (request["knocks"], *request.get("once", ()))
    )
    return prove(_subject_of(request), knocks, once).as_result()


def _prove_removed(request: Mapping[str, Any]) -> dict[str, Any]:
    """See that the port of the connection answers without a knock.

    :param request: ``addresses`` as the scout gave them, ``place``, and ``timeout`` in seconds.
    :raises PortknockError: it does not.
    """
    addresses = [Address.unpacked(item) for item in request["addresses"]]
    seen = [probe(address, request["timeout"]) for address in addresses]
    if not any(look.state == "open" for look in seen):
        raise PortknockError(
            f"Without the gate, port {addresses[0].port}/tcp of {_name(addresses[0])} does not answer a fresh connection "
            f"from {_view(addresses[0], request['place'])}: it showed {seen[0].state}."
        )
    return {}


QUESTIONS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "scout": _scout,
    "prove": _prove_applied,
    "prove_removed": _prove_removed,
}


def prove(subject: Subject, knocks: Sequence[Knock], once: Sequence[Sequence[Knock]] = ()) -> Proof:
    """Look without the knock, then knock and look again.

    :param knocks: the sequence that has to open the gate; empty where that is one of
    :param once: sequences that open once each, and are used in this order.
    :raises PortknockError: says which look at which address, from where, saw what.
    """
    proof = Proof()
    reached = _prove_closed(subject, frozenset(knock for sequence in (knocks, *once) for knock in sequence), proof)
    families: set[int] = set()
    closed = [one for one in reached if subject.without_ipv6 and one.family == socket.AF_INET6]
    if reached == closed and not subject.trusted.issuperset(closed):
        raise PortknockError(
            f"knock_server_backend: expected an IPv4 address of the host that can be reached from {subject.here}, since "
            f"{subject.without_ipv6}; got {_names(reached)} only."
        )
    for address in reached:
        if address.family in families or address in subject.trusted:
            continue
        if address in closed:
            proof.note(f"Not open on {_name(address)}, whoever knocks: {subject.without_ipv6}.")
            continue
        families.add(address.family)
        ports = subject.listening["inet6" if address.family == socket.AF_INET6 else "inet"]
        if ports:
            _prove_open(subject, address, ports[0], knocks, once, proof)
        else:
            proof.note(f"Not proved open on {_name(address)}: no service waits on a protected tcp port there.")
    return proof


def _subject_of(request: Mapping[str, Any]) -> Subject:
    addresses = [Address.unpacked(item) for item in request["addresses"]]
    others = [Address.unpacked(item) for item in request["others"]]
    protected = parse_knocks(request["protected"], "protected")
    protected_tcp = {knock.port for knock in protected if knock.proto == "tcp"}
    port = addresses[0].port
    return Subject(
        addresses=addresses,
        others=others,
        protected=protected,
        listening={
            family: sorted(protected_tcp.intersection(ports), key=lambda listens: listens != port)
            for family, ports in request["listeners"].items()
        },
        in_use=frozenset(parse_knocks(request["ports_in_use"], "ports_in_use")),
        closed_response=request["closed_response"],
        trusted=frozenset(
            address
            for address in (*addresses, *others)
            if (request["source_trusted"] and address in addresses)
            or is_trusted(local_address(address), request["trusted"])
        ),
        timeout=request["timeout"],
        place=request["place"],
        without_ipv6=request.get("without_ipv6", ""),
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
    # One look a job; zip's own check for that needs Python 3.10.
    for (address, port, is_other), (seen, closed) in zip(jobs, looks):
        silent = closed.state in ("unreachable", "filtered", "silent")
        if is_other and silent and seen.state == closed.state:
            # Silence may be a host that answers nobody or a path that isn't there.
            proof.note(f"Not proved on {_name(address)}: it can't be told from {subject.here} whether it is reached.")
            continue
        if seen.state == "unreachable" and not is_other and len(subject.addresses) > 1:
            proof.note(f"Not proved on {_name(address)}: it can't be reached from {subject.here} ({seen.error}).")
            continue
        if address not in reached:
            reached.append(address)
        if address in subject.trusted:
            proof.note(f"Not proved on {_name(address)}: packets from {subject.here} come from a trusted source.")
            continue
        _judge(subject, address, port, seen, closed)
        proof.closed.append(
            {"address": _name(address), "port": str(port), "showed": seen.state, "closed_port_showed": closed.state}
        )
    if not reached:
        raise PortknockError(
            f"No address of the host can be reached with a fresh packet from {subject.here}: "
            f"tried {_names(subject.addresses)}."
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
    where = f"port {port} of {_name(address)}, seen from {_view(address, subject.place)} without the knock,"
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


def _prove_open(
    subject: Subject,
    address: Address,
    port: int,
    knocks: Sequence[Knock],
    once: Sequence[Sequence[Knock]],
    proof: Proof,
) -> None:
    reusable, unsent = [] if once else [knocks], once[proof.sent_once :]
    result = knock_with_any([address.at(port)], reusable, port, subject.timeout, once=unsent)
    proof.sent_once += result.sent_once
    if result.state != "open":
        raise PortknockError(
            f"Not opened: port {port}/tcp of {_name(address)}, seen from {_view(address, subject.place)}, showed "
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


def packed_addresses(host: str, port: int, family: str) -> list[list[Any]]:
    """The addresses of a host, in the order in which ssh tries them, as a request carries them.

    :raises PortknockError: a name that does not resolve.
    """
    return [address.packed() for address in resolve(host, port, family)]


def _further_addresses(addresses: Sequence[Address], texts: Sequence[str]) -> list[Address]:
    """The IPv6 addresses of a host beside those that lead to it."""
    known = {address.host for address in addresses}
    port = addresses[0].port
    others = [address for text in texts if text not in known for address in resolve(text, port, "inet6")]
    # An address that this machine has, too, leads to itself.
    return [address for address in others if not _is_own(address)]


def _sources_towards(addresses: Sequence[Address]) -> list[str]:
    """The addresses that this machine's packets to these ones leave from, as far as there is a way; asking sends none.

    Without link-local ones, whose scope means nothing on the host.
    """
    sources = {local_address(address) for address in addresses}
    return sorted(source for source in sources if source and "%" not in source)


def _has_scope(address: Address) -> bool:
    return address.family == socket.AF_INET6 and address.sockaddr[3] != 0


def _is_own(address: Address) -> bool:
    return local_address(address) == address.host


def _look(seen: Probe) -> str:
    return f"{seen.state} ({seen.error})" if seen.error else seen.state


def _name(address: Address) -> str:
    return address.host


def _names(addresses: Sequence[Address]) -> str:
    return ", ".join(_name(address) for address in addresses) or "none"


def _view(address: Address, place: str) -> str:
    """Where a look at the address comes from."""
    source = local_address(address)
    return f"{source} on {place}" if place else source


def is_trusted(address: str | None, trusted: Sequence[str]) -> bool:
    """Whether a gate with these trusted sources (CIDRs) lets the address in without a knock."""
    if not address:
        return False
    source = ipaddress.ip_address(address)
    return any(
        source.version == network.version and source in network
        for network in (ipaddress.ip_network(text, strict=False) for text in trusted)
    )


__all__ = ("QUESTIONS", "Proof", "Subject", "answer", "is_trusted", "local_address", "packed_addresses", "prove")
