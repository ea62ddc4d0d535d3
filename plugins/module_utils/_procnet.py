# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What Linux says of its sockets, addresses and the connection that a program was started through, read from /proc."""

from __future__ import annotations

import ipaddress
import os
import sys
from typing import AbstractSet, Iterator, NamedTuple, Optional, Union

from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock

# Socket states of /proc/net/tcp and /proc/net/udp (include/net/tcp_states.h): LISTEN; a UDP socket that is bound only.
_WAITING = {"tcp": "0A", "udp": "07"}
# States in which there is no session: TIME_WAIT, CLOSE, LISTEN.
_NO_SESSION = ("06", "07", "0A")
# Scope of /proc/net/if_inet6 (include/net/ipv6.h): global.
_SCOPE_GLOBAL = "00"


_IPAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]


class Peer(NamedTuple):
    """The far end of the ssh connection that this program was started through."""

    address: str
    interface: Optional[str]


class Session(NamedTuple):
    """A tcp connection with a service of this host: the service's port, and the address and port of the far end."""

    port: int
    address: str
    peer_port: int


def ports_in_use(proc: str = "/proc") -> list[Knock]:
    """Every port that a service of this host waits on, sorted; loopback ones too, since a service may be moved."""
    found = set()
    for proto, waiting in _WAITING.items():
        for table in (proto, f"{proto}6"):
            for fields in _rows(os.path.join(proc, "net", table)):
                if len(fields) > 3 and fields[3] == waiting:
                    found.add(Knock(int(fields[1].rpartition(":")[2], 16), proto))
    return sorted(found)


def tcp_listeners(proc: str = "/proc") -> dict[str, list[int]]:
    """The tcp ports on which a service can be reached from outside, by family (``inet``, ``inet6``), sorted.

    A socket on ``::`` counts for both families: whether it is for IPv6 alone, /proc does not say.
    """
    found: dict[str, set[int]] = {"inet": set(), "inet6": set()}
    for table in ("tcp", "tcp6"):
        for fields in _rows(os.path.join(proc, "net", table)):
            if len(fields) > 3 and fields[3] == _WAITING["tcp"]:
                address, _colon, port = fields[1].rpartition(":")
                for family in _families(_address(address)):
                    found[family].add(int(port, 16))
    return {family: sorted(ports) for family, ports in found.items()}


def reachable_ports(proc: str = "/proc") -> list[Knock]:
    """The ports on which a service can be reached from outside, sorted."""
    found = {Knock(port, "tcp") for ports in tcp_listeners(proc).values() for port in ports}
    for table in ("udp", "udp6"):
        for fields in _rows(os.path.join(proc, "net", table)):
            if len(fields) > 3 and fields[3] == _WAITING["udp"]:
                address, _colon, port = fields[1].rpartition(":")
                if _families(_address(address)):
                    found.add(Knock(int(port, 16), "udp"))
    return sorted(found)


def tcp_sessions(ports: AbstractSet[int], proc: str = "/proc") -> list[Session]:
    """The tcp connections with services on these ports, sorted. Of a link-local far end, the interface is not told."""
    found = set()
    for table in ("tcp", "tcp6"):
        for fields in _rows(os.path.join(proc, "net", table)):
            if len(fields) > 3 and fields[3] not in _NO_SESSION:
                port = int(fields[1].rpartition(":")[2], 16)
                address, _colon, peer_port = fields[2].rpartition(":")
                if port in ports:
                    found.add(Session(port, str(_unmapped(_address(address))), int(peer_port, 16)))
    return sorted(found)


def global_ipv6_addresses(proc: str = "/proc") -> list[str]:
    """The host's global IPv6 addresses, sorted."""
    rows = _rows(os.path.join(proc, "net", "if_inet6"), skip=0)
    return sorted(
        str(ipaddress.IPv6Address(int(row[0], 16))) for row in rows if len(row) > 3 and row[3] == _SCOPE_GLOBAL
    )


def ssh_peer(pid: int, proc: str = "/proc") -> Optional[Peer]:
    """Where the ssh connection came from that a process belongs to; see :func:`ssh_connection`."""
    connection = ssh_connection(pid, proc)
    if connection is None:
        return None
    address, _percent, interface = connection[0].partition("%")
    return Peer(address, interface or None) if _is_address(address) else None


def ssh_session(pid: int, proc: str = "/proc") -> Optional[Session]:
    """The ssh connection of a process, as it is among :func:`tcp_sessions`; see :func:`ssh_connection`."""
    words = _ssh_words(pid, proc)
    if words is None or not words[1].isdecimal() or not words[3].isdecimal():
        return None
    address = words[0].partition("%")[0]
    return Session(int(words[3]), address, int(words[1])) if _is_address(address) else None


def ssh_connection(pid: int, proc: str = "/proc") -> Optional[tuple[str, str, str]]:
    """The client's address, the address that it connected to, and that port, of the ssh connection of a process.

    Looked up in the environment of the process and its ancestors: sudo drops SSH_CONNECTION, its parent still has it.
    """
    words = _ssh_words(pid, proc)
    return (words[0], words[2], words[3]) if words else None


def _ssh_words(pid: int, proc: str) -> Optional[list[str]]:
    """SSH_CONNECTION: the client's address and port, the server's address and port."""
    while pid > 1:
        try:
            with open(f"{proc}/{pid}/environ", "rb") as stream:
                environment = stream.read().split(b"\0")
            with open(f"{proc}/{pid}/stat", encoding="utf-8", errors="replace") as stream:
                pid = int(stream.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return None
        for entry in environment:
            name, _equals, value = entry.partition(b"=")
            words = value.decode("ascii", "replace").split()
            if name == b"SSH_CONNECTION" and len(words) == 4:
                return words
    return None


def _address(text: str) -> _IPAddress:
    """An address as /proc/net/tcp writes it: hexadecimal words in the machine's byte order."""
    words = bytes.fromhex(text)
    if sys.byteorder == "little":
        words = b"".join(words[start : start + 4][::-1] for start in range(0, len(words), 4))
    return ipaddress.ip_address(words)


def _unmapped(address: _IPAddress) -> _IPAddress:
    """An IPv4 address that a socket for both families has as an IPv6 one."""
    return address.ipv4_mapped or address if isinstance(address, ipaddress.IPv6Address) else address


def _families(address: _IPAddress) -> tuple[str, ...]:
    address = _unmapped(address)
    if address.is_loopback:
        return ()
    if isinstance(address, ipaddress.IPv4Address):
        return ("inet",)
    return ("inet", "inet6") if address.is_unspecified else ("inet6",)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _rows(path: str, skip: int = 1) -> Iterator[list[str]]:
    try:
        with open(path, encoding="ascii", errors="replace") as stream:
            for line in stream.readlines()[skip:]:
                yield line.split()
    except OSError:
        return


__all__ = (
    "Peer",
    "Session",
    "global_ipv6_addresses",
    "ports_in_use",
    "reachable_ports",
    "ssh_connection",
    "ssh_peer",
    "ssh_session",
    "tcp_listeners",
    "tcp_sessions",
)
