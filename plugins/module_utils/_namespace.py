# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Looks at a gate from a network namespace on its own host, for a host that no other machine can look at.

A gate leaves its host's own calls alone, so these go through a veth pair: they come in as a stranger's do. A child process
holds the namespace, which has no name; the kernel takes it away with the pair, its routes and its neighbours when that
process ends, however it ends. The host gets no address: neither end has to ask who is there, so that no filter of neighbour
discovery, no detection of duplicates and no program that waits for new addresses comes between.
"""

from __future__ import annotations

import ctypes
import ipaddress
import json
import os
import secrets
import signal
import socket
import time
from typing import Any, Callable, Iterable, Mapping, NoReturn, Optional, Sequence, Union

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import FAMILIES, Address
from ansible_collections.fleet.portknock.plugins.module_utils._proof import answer, local_address
from ansible_collections.fleet.portknock.plugins.module_utils._system import Runner, read_text
from ansible_collections.fleet.portknock.plugins.module_utils._system import run as run_program

# How long one question may take; the host goes back by itself meanwhile where a trial is shorter.
LOOK_SECONDS = 90.0
# How many addresses of each family are looked at.
MOST_ADDRESSES = 8

_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
# The exit code that stands for a program that is missing.
_MISSING = 127
_HERE, _THERE = "02:00:00:00:00:01", "02:00:00:00:00:02"
_GATEWAYS = {"inet": "169.254.0.1", "inet6": "fe80::1"}
_EVERYWHERE = {"inet": "0.0.0.0/0", "inet6": "::/0"}
# Any addresses that are reached by the default route; nothing is sent there.
_FAR = {"inet": "192.0.2.1", "inet6": "2001:db8::1"}
# What no network between machines uses: benchmarks' addresses, then documentation's.
_POOLS = ("198.18.0.0/15", "192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")
_TRIES = 64
_IPV6_SWITCH = "/proc/sys/net/ipv6/conf/{}/disable_ipv6"
# A shorter route is somebody's way to everything, such as a tunnel's 0.0.0.0/1, and is no place of its own.
_SHORTEST_PREFIX = 8
_NOWHERE = ("blackhole", "prohibit", "throw", "unreachable")

_Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


def answer_apart(question: str, request: Mapping[str, Any], run: Runner = run_program) -> dict[str, Any]:
    """Answer one of ``_proof.QUESTIONS`` from a namespace on this host.

    :param request: as there, but of a scout's ``addresses`` and ``host`` only those are looked at that this host has, before
        its others. The other questions are given all that the scout answered: ``sources`` are the namespace's addresses.
    """
    try:
        if question != "scout":
            seen = _from_namespace(lambda: answer(question, request), request["sources"], run)
            return {**seen, "notes": [*seen["notes"], *request["left_out"]]} if "notes" in seen else seen
        chosen, left_out = _addresses_of_host(request, run)
        asked = {**request, "addresses": [[family, *there.sockaddr] for family, there in chosen], "further": []}
        sources = _unused_addresses({family for family, _address in chosen}, run)
        return {**_from_namespace(lambda: answer(question, asked), sources, run), "left_out": left_out}
    except (PortknockError, OSError) as exc:
        return {"problem": str(exc)}


def _addresses_of_host(request: Mapping[str, Any], run: Runner) -> tuple[list[tuple[str, Address]], list[str]]:
    """The host's own addresses by family: first those by which it is reached, then what the default route uses.

    :returns: those to look at, and a note for what is left out.
    :raises PortknockError: none.
    """
    port = request["port"]
    own: dict[str, list[str]] = {"inet": [], "inet6": []}
    for link in _ip_reports(run, "address", "show"):
        for entry in link.get("addr_info", ()):
            usable = entry.get("scope") == "global" and not entry.get("tentative") and not entry.get("dadfailed")
            if usable and entry.get("family") in own and entry["local"] not in own[entry["family"]]:
                own[entry["family"]].append(entry["local"])
    # What a play calls this host is not looked up here: this host need not know that name, or any name server.
    first = [*(item[1] for item in request["addresses"]), request["host"]]
    first += [local_address(Address(FAMILIES[family], (far, port))) for family, far in _FAR.items()]
    left_out = []
    if own["inet6"] and not _can_have_ipv6():
        own["inet6"] = []
        left_out.append(
            "Not proved on IPv6: new interfaces of the host are without it (net.ipv6.conf.default.disable_ipv6), and "
            "/proc/sys can't be written."
        )
    chosen: list[tuple[str, Address]] = []
    for family, texts in own.items():
        texts.sort(key=lambda text: first.index(text) if text in first else len(first))
        rest = (0, 0) if family == "inet6" else ()
        chosen += [(family, Address(FAMILIES[family], (text, port, *rest))) for text in texts[:MOST_ADDRESSES]]
    if not chosen:
        raise PortknockError(
            "expected an address of the host to look at, beside loopback and link-local ones; got none."
        )
    besides = sum(len(texts) for texts in own.values()) - len(chosen)
    if besides:
        left_out.append(
            f"Not proved on {besides} more addresses of the host: {MOST_ADDRESSES} of each family are looked at."
        )
    return chosen, left_out


def _unused_addresses(families: Iterable[str], run: Runner) -> list[str]:
    """An address of each family to which no route of the host leads, but for one to everywhere.

    :raises PortknockError: there is none.
    """
    chosen = []
    for family in sorted(families):
        taken = _networks(run, "-6" if family == "inet6" else "-4")
        candidates = _random_ipv6() if family == "inet6" else _random_ipv4()
        free = next((text for text in candidates if not any(ipaddress.ip_address(text) in net for net in taken)), None)
        if free is None:
            raise PortknockError(
                f"expected an address that no route of the host leads to, of {', '.join(_POOLS)} or fd00::/8; got none."
            )
        chosen.append(free)
    return chosen


def _random_ipv4() -> Iterable[str]:
    for pool in map(ipaddress.IPv4Network, _POOLS):
        for _try in range(_TRIES):
            yield str(pool[1 + secrets.randbelow(pool.num_addresses - 2)])


def _random_ipv6() -> Iterable[str]:
    for _try in range(_TRIES):
        # A unique local network as RFC 4193 wants it: 40 random bits.
        yield str(ipaddress.IPv6Address((0xFD << 120) + (secrets.randbits(40) << 80) + 1))


def _networks(run: Runner, family: str) -> list[_Network]:
    """Where the host's routes lead, of all tables."""
    found: list[_Network] = []
    for route in _ip_reports(run, family, "route", "show", "table", "all"):
        try:
            network = ipaddress.ip_network(route.get("dst", ""), strict=False)
        except ValueError:
            continue  # the default route
        if network.prefixlen >= _SHORTEST_PREFIX and route.get("type") not in _NOWHERE:
            found.append(network)
    return found


def _from_namespace(look: Callable[[], dict[str, Any]], sources: Sequence[str], run: Runner) -> dict[str, Any]:
    """Let a child of this process look from a namespace of its own with these addresses.

    :raises PortknockError: the namespace can't be made, or the child died or took too long.
    """
    deadline = time.monotonic() + LOOK_SECONDS
    name = f"knock-{secrets.token_hex(4)}"
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        ours.close()
        _look_and_exit(theirs, parent, look, sources, run)
    theirs.close()
    try:
        with ours:
            _received(ours, deadline)
            _make_link(name, child, sources, run)
            ours.sendall(b"{}\n")
            return _received(ours, deadline)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        # The kernel would do it, too, but some time later: the next question needs the same addresses.
        run(["ip", "link", "delete", "dev", name], None)


def _received(channel: socket.socket, deadline: float) -> dict[str, Any]:
    """The next line of the child's.

    :raises PortknockError: it says what went wrong, or says nothing.
    """
    text = b""
    while not text.endswith(b"\n"):
        left = deadline - time.monotonic()
        channel.settimeout(max(0.001, left))
        try:
            piece = channel.recv(65536)
        except socket.timeout:
            raise PortknockError(
                f"expected an answer from the namespace within {LOOK_SECONDS:.0f} s; got none."
            ) from None
        if not piece:
            raise PortknockError("expected an answer from the namespace; its process died.")
        text += piece
    told: dict[str, Any] = json.loads(text)
    if "failed" in told:
        raise PortknockError(told["failed"])
    return told


def _look_and_exit(
    channel: socket.socket, parent: int, look: Callable[[], dict[str, Any]], sources: Sequence[str], run: Runner
) -> NoReturn:
    """The child: make the namespace, wait until it is linked, look, tell. Never returns to what it was forked from."""
    try:
        try:
            _leave(parent)
            channel.sendall(b"{}\n")
            if channel.recv(64):
                _make_own_end(sources, run)
                told = look()
            else:
                told = {}
        except (PortknockError, OSError) as exc:
            told = {"failed": str(exc)}
        channel.sendall(json.dumps(told).encode() + b"\n")
    finally:
        # Whatever it was: no word of it, which may quote a knock.
        os._exit(0)


def _leave(parent: int) -> None:
    """Go into a new network namespace, which goes with this process, which goes with its parent.

    :raises PortknockError: the kernel does not let it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)  # it died before that
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise PortknockError(
            "expected root on the host to be allowed a network namespace, which takes CAP_SYS_ADMIN; "
            f"got {os.strerror(ctypes.get_errno())}."
        )


def _make_link(name: str, child: int, sources: Sequence[str], run: Runner) -> None:
    """The host's end of the veth pair, with a way to each of the namespace's addresses.

    :raises PortknockError: ip or the kernel refuses.
    """
    # Addresses that are given are not changed by udev.
    _ip(run, [f"link add name {name} address {_HERE} type veth peer name knock address {_THERE} netns {child}"])
    if any(_family(source) == "inet6" for source in sources):
        _allow_ipv6(name)
    commands = [f"link set dev {name} up"]
    for source in sources:
        commands.append(f"route add {source}/{_bits(source)} dev {name}")
        commands.append(f"neigh replace {source} lladdr {_THERE} dev {name} nud permanent")
    _ip(run, commands)


def _make_own_end(sources: Sequence[str], run: Runner) -> None:
    """The namespace's end: its addresses, and the host as the way to everywhere."""
    if any(_family(source) == "inet6" for source in sources):
        _allow_ipv6("knock")
    commands = ["link set dev knock up"]
    for source in sources:
        family = _family(source)
        gateway = _GATEWAYS[family]
        commands.append(f"address add {source}/{_bits(source)} dev knock" + (" nodad" if family == "inet6" else ""))
        commands.append(f"neigh replace {gateway} lladdr {_HERE} dev knock nud permanent")
        # An IPv6 gateway of the link's own needs no such word.
        onlink = "" if family == "inet6" else " onlink"
        commands.append(f"route add {_EVERYWHERE[family]} via {gateway} dev knock{onlink}")
    _ip(run, commands)


def _can_have_ipv6() -> bool:
    """Whether a new interface has IPv6, or can be given it."""
    path = _IPV6_SWITCH.format("default")
    return (read_text(path) or "").strip() == "0" or os.access(path, os.W_OK)


def _allow_ipv6(interface: str) -> None:
    """New interfaces may be without IPv6 where others have it."""
    path = _IPV6_SWITCH.format(interface)
    if (read_text(path) or "").strip() != "0":
        with open(path, "w", encoding="ascii") as stream:
            stream.write("0")


def _ip(run: Runner, commands: Sequence[str]) -> None:
    done = run(["ip", "-batch", "-"], "".join(f"{command}\n" for command in commands))
    if done.code != 0:
        raise PortknockError(_refusal(done.code, done.stderr))


def _ip_reports(run: Runner, *arguments: str) -> list[dict[str, Any]]:
    done = run(["ip", "-json", *arguments], None)
    try:
        if done.code == 0:
            reports: list[dict[str, Any]] = json.loads(done.stdout or "[]")
            return reports
    except ValueError:
        pass
    raise PortknockError(_refusal(done.code, done.stderr))


def _refusal(code: int, complaint: str) -> str:
    if code == _MISSING:
        return "expected the program ip on the host (Debian's package iproute2); got none."
    # Addresses and interfaces are all that ip knows of, so it may be quoted.
    lines: Optional[list[str]] = complaint.strip().splitlines()
    return f"expected ip to link a network namespace to the host; got {lines[0] if lines else f'exit code {code}'!r}."


def _family(address: str) -> str:
    return "inet6" if ":" in address else "inet"


def _bits(address: str) -> int:
    return ipaddress.ip_address(address).max_prefixlen


__all__ = ("LOOK_SECONDS", "MOST_ADDRESSES", "answer_apart")
