# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Knocking: send a sequence from an unprivileged process and see what it opened.

Only ordinary sockets are used, so that neither the controller nor a person's machine needs root. Times are seconds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._spa import send_spa

FAMILIES = {"any": socket.AF_UNSPEC, "inet": socket.AF_INET, "inet6": socket.AF_INET6}
_FAMILY_NAMES = {int(number): name for name, number in FAMILIES.items()}

# Back to back is the hardest to disturb; 20 ms apart, packets no longer overtake each other on real paths; then slower.
GAPS = (0.0, 0.02, 0.2)

# How long a round waits for the port to open, by round; the last one repeats. A connect that a round started goes on
# in the following ones, so that a path slower than this is no loss.
_PATIENCE = (0.25, 0.5, 1.0)
# A sequence that opens once has mostly been used by someone else where it does not open: the next follows soon.
_PATIENCE_ONCE = 0.25
# How long a port that says nothing is looked at before it counts as closed: longer than the second after which a lost SYN is
# said again.
_PATIENCE_CLOSED = 1.5
_FIRST_PAUSE = 0.005
_LONGEST_PAUSE = 0.1
_BANNER_SIZE = 255

# The type of an echo request, and the protocol that it belongs to.
_ECHO_REQUEST: dict[int, tuple[int, int]] = {
    socket.AF_INET: (8, socket.IPPROTO_ICMP),
    socket.AF_INET6: (128, socket.IPPROTO_ICMPV6),
}

# Linux tells an unprivileged UDP socket of every ICMP error only when asked; not every Python has the constants.
_RECVERR: dict[int, tuple[int, int]] = (
    {
        socket.AF_INET: (socket.IPPROTO_IP, getattr(socket, "IP_RECVERR", 11)),
        socket.AF_INET6: (socket.IPPROTO_IPV6, getattr(socket, "IPV6_RECVERR", 25)),
    }
    if sys.platform.startswith("linux")
    else {}
)


class Address(NamedTuple):
    """One address of a host as ``getaddrinfo`` gives it; an IPv6 scope id is kept."""

    family: int
    sockaddr: tuple[Any, ...]

    @property
    def host(self) -> str:
        """The numeric address."""
        return str(self.sockaddr[0])

    @property
    def port(self) -> int:
        """The port that was resolved with it."""
        return int(self.sockaddr[1])

    def at(self, port: int) -> Address:
        """The same address with another port."""
        return Address(self.family, (self.sockaddr[0], port, *self.sockaddr[2:]))

    def packed(self) -> list[Any]:
        """The address as JSON carries it to another machine."""
        # Families by name: systems number them differently.
        return [_FAMILY_NAMES[self.family], *self.sockaddr]

    @classmethod
    def unpacked(cls, item: Sequence[Any]) -> Address:
        """What :meth:`packed` made, on this machine."""
        return cls(FAMILIES[item[0]], tuple(item[1:]))


class Probe(NamedTuple):
    """What one look at a port showed.

    ``state`` is open, reset, filtered or unreachable (TCP) or answered, refused, silent or unreachable (UDP).
    ``error`` is the name of the error that the system reported, such as ECONNREFUSED, or empty. Two looks can be
    compared as they are.
    """

    state: str
    error: str = ""
    banner: str = ""


class KnockResult(NamedTuple):
    """How knocking went.

    ``state`` is as in :class:`Probe` (TCP); ``address`` is the one that opened, or the last one tried (None where there
    was none); ``elapsed`` is in seconds; ``attempts`` counts the sequences sent; ``gap`` is the one between the knocks
    that opened (or of the last try); ``sequence`` is the index of the one that opened, or -1; ``error`` and ``banner``
    are as in :class:`Probe`. ``sent_once`` says how many of the sequences that open once were sent.
    """

    state: str
    address: Address | None
    elapsed: float
    attempts: int
    gap: float
    sequence: int
    error: str = ""
    banner: str = ""
    sent_once: int = 0

    def to_mapping(self) -> dict[str, Any]:
        """The result as JSON carries it to another machine."""
        return {**self._asdict(), "address": self.address and self.address.packed()}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> KnockResult:
        """What :meth:`to_mapping` made, on this machine."""
        return cls(**{**mapping, "address": mapping["address"] and Address.unpacked(mapping["address"])})


class _Try(NamedTuple):
    """What a connect that is under way belongs to."""

    address: Address
    sequence: int
    gap: float


def resolve(host: str, port: int, family: str = "any") -> list[Address]:
    """The addresses of a host in the order in which ssh tries them.

    :param family: any, inet or inet6, as ssh's AddressFamily.
    :raises PortknockError: unknown family, or a name that does not resolve.
    """
    if family not in FAMILIES:
        raise PortknockError(f"family: expected any, inet or inet6; got {family!r}.")
    try:
        found = socket.getaddrinfo(host, port, FAMILIES[family], socket.SOCK_STREAM)
    except (OSError, UnicodeError, OverflowError) as exc:
        raise PortknockError(f"host: expected a name or an address that resolves; got {host!r}: {exc}.") from exc
    return [Address(kind, sockaddr) for kind, _unused_type, _unused_proto, _unused_name, sockaddr in found]


def send(address: Address, knocks: Sequence[Knock], gap: float = 0.0, source: str | None = None) -> None:
    """Send one sequence, ``gap`` seconds between two knocks.

    :param source: the local address to knock from; None leaves it to the system.
    :raises OSError: there is no way to the address.
    :raises PortknockError: the system lets this user send no echo requests, or has no program fwknop that sends what is one.
    """
    for index, knock in enumerate(knocks):
        if index and gap:
            time.sleep(gap)
        target = address.at(knock.port).sockaddr
        if knock.spa:
            _send_spa(address, knock, source)
        elif knock.proto == "icmp":
            _send_echo(address, knock.port, source)
        elif knock.proto == "udp":
            with _socket(address.family, socket.SOCK_DGRAM, source) as sock:
                sock.sendto(b"", target)
        else:
            # Closing a socket whose connect is under way sends nothing more: one knock is one SYN, without repeats.
            with _socket(address.family, socket.SOCK_STREAM, source) as sock:
                code = sock.connect_ex(target)
            if code not in (0, errno.EINPROGRESS, errno.ECONNREFUSED):
                raise OSError(code, errno.errorcode.get(code, "error"))


def _send_spa(address: Address, knock: Knock, source: str | None) -> None:
    """Send the one packet that asks for a port, for the address that a connection to the host would come from."""
    if address.family != socket.AF_INET:
        raise OSError(errno.EAFNOSUPPORT, "fwknop has no IPv6")
    asking = source or local_address(address)
    if not asking:
        raise OSError(errno.ENETUNREACH, "no way to the address")
    send_spa(address.host, knock, asking)


def _send_echo(address: Address, size: int, source: str | None) -> None:
    """Send one echo request with that many bytes of payload, as ``ping -s`` does."""
    kind, protocol = _ECHO_REQUEST[address.family]
    message = struct.pack("!BBHHH", kind, 0, 0, os.getpid() & 0xFFFF, 1) + bytes(size)
    # The kernel fills in IPv6's, and on Linux that of the first kind of socket; other systems want it done.
    checksum = _checksum(message) if address.family == socket.AF_INET else 0
    message = message[:2] + struct.pack("!H", checksum) + message[4:]
    with _echo_socket(address.family, protocol) as sock:
        _bind(sock, address.family, source)
        sock.sendto(message, address.at(0).sockaddr)


def check_echo(family: int = socket.AF_INET) -> None:
    """See that this user may send echo requests; none is sent.

    :raises PortknockError: not on this system.
    """
    _echo_socket(family, _ECHO_REQUEST[family][1]).close()


def _echo_socket(family: int, protocol: int) -> socket.socket:
    # What systems have for unprivileged programs, and what is left to root where a system keeps that from everybody.
    for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
        with contextlib.suppress(PermissionError):
            sock = socket.socket(family, kind, protocol)
            sock.setblocking(False)
            return sock
    raise PortknockError(
        "icmp: expected a system that lets you send echo requests (on Linux the sysctl net.ipv4.ping_group_range has to hold one "
        "of your groups); got one that does not. Knock with `ping -c 1 -s BYTES`, or from another machine."
    )


def _checksum(message: bytes) -> int:
    """The internet checksum (RFC 1071)."""
    total = sum(struct.unpack(f"!{(len(message) + 1) // 2}H", message + bytes(len(message) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def local_address(address: Address) -> str:
    """The address that packets to the host leave from, empty where there is no way to it."""
    with socket.socket(address.family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(address.at(9).sockaddr)
        except OSError:
            return ""
        return str(sock.getsockname()[0])


def probe(address: Address, timeout: float, banner: float = 0.0, source: str | None = None) -> Probe:
    """Look at a TCP port with one connect.

    :param banner: where it opens, the seconds to wait for the first line that the service sends.
    """
    deadline = time.monotonic() + timeout
    with _connects(source) as connects:
        connects.start(_Try(address, 0, 0.0), address.port)
        found = connects.wait(deadline)
        if found is None:
            return Probe("filtered", "ETIMEDOUT")
        _unused_try, seen, sock = found
        return _with_banner(seen, sock, banner)


def probe_udp(address: Address, timeout: float, payload: bytes = b"", source: str | None = None) -> Probe:
    """Look at a UDP port with one datagram: answered, refused (port unreachable), silent or unreachable."""
    with _socket(address.family, socket.SOCK_DGRAM, source) as sock:
        if address.family in _RECVERR:
            with contextlib.suppress(OSError):
                sock.setsockopt(*_RECVERR[address.family], 1)
        sock.settimeout(timeout)
        try:
            sock.connect(address.sockaddr)
            sock.send(payload)
            sock.recv(1)
        except socket.timeout:
            return Probe("silent")
        except OSError as exc:
            state = "refused" if exc.errno == errno.ECONNREFUSED else "unreachable"
            return Probe(state, _error_name(exc.errno))
    return Probe("answered")


def knock_until_open(
    addresses: Sequence[Address],
    knocks: Sequence[Knock],
    port: int,
    timeout: float,
    gaps: Sequence[float] = GAPS,
    source: str | None = None,
    banner: float = 0.0,
) -> KnockResult:
    """Knock with one sequence until the port opens; see :func:`knock_with_any`."""
    return knock_with_any(addresses, [knocks], port, timeout, gaps, source, banner)


def knock_with_any(
    addresses: Sequence[Address],
    sequences: Sequence[Sequence[Knock]],
    port: int,
    timeout: float,
    gaps: Sequence[float] = GAPS,
    source: str | None = None,
    banner: float = 0.0,
    single_use: bool = False,
    once: Sequence[Sequence[Knock]] = (),
) -> KnockResult:
    """Knock as :func:`knock_and_connect` does, to see whether the port opens; the connection is closed.

    :param banner: the seconds to wait for the first line of what opened; not part of the timeout and of ``elapsed``.
    :param single_use: the look uses up what the knock opened, so what worked is sent once more for whoever connects next, or
        the next of those that open once.
    """
    result, sock = knock_and_connect(addresses, sequences, port, timeout, gaps, source, once)
    if sock is None:
        return result
    with sock:
        result = result._replace(banner=_read_banner(sock, time.monotonic() + banner))
    following = [sequences[result.sequence]] if result.sequence < len(sequences) else once[result.sent_once :]
    if single_use and result.address is not None and following:
        # The port was open a moment ago; where no packet goes out any more, the next connection says so itself.
        with contextlib.suppress(OSError):
            send(result.address, following[0], result.gap, source)
        if result.sequence >= len(sequences):
            result = result._replace(sent_once=result.sent_once + 1)
    return result


def knock_and_connect(
    addresses: Sequence[Address],
    sequences: Sequence[Sequence[Knock]],
    port: int,
    timeout: float,
    gaps: Sequence[float] = GAPS,
    source: str | None = None,
    once: Sequence[Sequence[Knock]] = (),
) -> tuple[KnockResult, socket.socket | None]:
    """Knock with each sequence in turn until the TCP port opens, first back to back, then with growing gaps.

    The knock comes first: a closed port is never waited for. Between two rounds the port is polled, and the polling
    ends with the first connect that succeeds, so that a service is troubled with one connection. The next address
    is tried where one does not open. Ends early where no address can be reached.

    :param once: sequences that open once each, tried one after the other after the first round of the others, and never
        again once the next was sent. Their indices follow those of the others.
    :return: how it went, and the connection that the port opened for (non-blocking; the caller closes it), or None.
    """
    begun = time.monotonic()
    deadline = begun + timeout
    attempts = 0
    sent_once = 0
    last = _Try(addresses[0], -1, gaps[0]) if addresses else None
    seen = Probe("unreachable")
    every = [*sequences, *once]
    with _connects(source) as connects:
        for steps in _rounds(len(sequences), len(once), gaps):
            reachable = False
            for index, gap, patience in steps:
                turned = max(0, index - len(sequences)) % max(1, len(addresses))
                # One address that opens but can't be connected to shall not use up every sequence before the next has its turn.
                for address in (*addresses[turned:], *addresses[:turned]):
                    if attempts and time.monotonic() >= deadline:
                        return _result(begun, attempts, last, seen, sent_once), None
                    last = _Try(address, index, gap)
                    attempts += 1
                    try:
                        send(address, every[index], gap, source)
                    except OSError as exc:
                        seen = Probe("unreachable", _error_name(exc.errno))
                        continue
                    sent_once = max(sent_once, index + 1 - len(sequences))
                    opened, seen, sock = _poll(connects, last, port, min(deadline, time.monotonic() + patience))
                    if opened is not None and sock is not None:
                        connects.hand_over(sock)
                        return _result(begun, attempts, opened, seen, sent_once), sock
                    reachable = reachable or seen.state != "unreachable"
            if not reachable:
                break
    return _result(begun, attempts, last, seen, sent_once), None


def knock_until_closed(
    addresses: Sequence[Address],
    sequences: Sequence[Sequence[Knock]],
    port: int,
    timeout: float,
    gaps: Sequence[float] = GAPS,
    source: str | None = None,
) -> KnockResult:
    """Send close sequences, all of them, until the TCP port is closed at each address: a window is one of a source and family.

    :param sequences: during a rotation more than one; which of them the gate honours makes no difference.
    :return: what the port showed last, ``open`` where any address still does; an address without a way there is passed over
        where there is another.
    """
    begun = time.monotonic()
    attempts = 0
    left = list(addresses)
    last: Address | None = None
    seen = Probe("unreachable")
    gap = gaps[0]
    for gap in gaps:
        # Each address is looked at once, however long that takes.
        if attempts and time.monotonic() >= begun + timeout:
            break
        still = []
        for address in left:
            try:
                for knocks in sequences:
                    attempts += 1
                    send(address, knocks, gap, source)
                    # So that no knock of the next one overtakes the last of this.
                    time.sleep(gap)
                looked = probe(address.at(port), _PATIENCE_CLOSED, source=source)
            except OSError as exc:
                looked = Probe("unreachable", _error_name(exc.errno))
            if looked.state == "open":
                still.append(address)
            if looked.state != "unreachable" or last is None:
                last, seen = address, looked
        left = still
        if not left:
            break
    if left:
        last, seen = left[0], Probe("open")
    return KnockResult(seen.state, last, time.monotonic() - begun, attempts, gap, -1, seen.error)


def _rounds(count: int, once: int, gaps: Sequence[float]) -> Iterator[list[tuple[int, float, float]]]:
    """The rounds of an attempt: for each knock with a sequence its index, the gap, and how long to wait for the port to open.

    :param count: sequences that are good for as long as one likes: all in every round, of which the last repeats for ever.
    :param once: those that follow, which open once: a round each, after the first of the others.
    """
    number = 0
    while True:
        gap, patience = gaps[min(number, len(gaps) - 1)], _PATIENCE[min(number, len(_PATIENCE) - 1)]
        if count:
            yield [(index, gap, patience) for index in range(count)]
        if once and not number:
            yield from ([(count + index, own, _PATIENCE_ONCE)] for index, own in _steps_once(once, gaps))
        if not count:
            return
        number += 1


def _steps_once(count: int, gaps: Sequence[float]) -> Iterator[tuple[int, float]]:
    """The first of the sequences with the two shortest gaps; the others, of which most will have been used, with one each."""
    yield 0, gaps[0]
    for index in range(count):
        yield index, gaps[min(1 + index % 2, len(gaps) - 1)]


def _result(begun: float, attempts: int, last: _Try | None, seen: Probe, sent_once: int) -> KnockResult:
    return KnockResult(
        state=seen.state,
        address=last.address if last else None,
        elapsed=time.monotonic() - begun,
        attempts=attempts,
        gap=last.gap if last else 0.0,
        sequence=last.sequence if last and seen.state == "open" else -1,
        error=seen.error,
        sent_once=sent_once,
    )


def _poll(
    connects: _Connects, attempt: _Try, port: int, until: float
) -> tuple[_Try | None, Probe, socket.socket | None]:
    """Connect, and again after each reset, until the port opens or time is up; returns the try that opened it."""
    pause = _FIRST_PAUSE
    seen = Probe("filtered", "ETIMEDOUT")
    connects.start(attempt, port)
    while True:
        found = connects.wait(until)
        if found is None:
            return None, seen, None
        finished, seen, sock = found
        if seen.state == "open":
            return finished, seen, sock
        if finished.address != attempt.address:
            continue
        if seen.state == "unreachable":
            return None, seen, None
        # Refused connects never reach the service, so polling a closed port costs it nothing.
        time.sleep(max(0.0, min(pause, until - time.monotonic())))
        pause = min(2 * pause, _LONGEST_PAUSE)
        if time.monotonic() >= until:
            return None, seen, None
        connects.start(attempt, port)


class _Connects:
    """Connects that are under way at the same time."""

    def __init__(self, source: str | None) -> None:
        self._selector = selectors.DefaultSelector()
        self._source = source
        self._finished: list[tuple[_Try, Probe, socket.socket]] = []
        self._sockets: list[socket.socket] = []

    def start(self, attempt: _Try, port: int) -> None:
        """Begin a connect."""
        sock = _bare_socket(attempt.address.family, socket.SOCK_STREAM)
        self._sockets.append(sock)
        try:
            _bind(sock, attempt.address.family, self._source)
            code = sock.connect_ex(attempt.address.at(port).sockaddr)
        except OSError as exc:
            code = exc.errno or errno.EADDRNOTAVAIL
        if code == errno.EINPROGRESS:
            self._selector.register(sock, selectors.EVENT_WRITE, (attempt, sock))
        else:
            self._finished.append((attempt, _connect_outcome(code), sock))

    def wait(self, until: float) -> tuple[_Try, Probe, socket.socket] | None:
        """The next connect that ends before ``until`` (monotonic clock), or None."""
        while not self._finished:
            if not self._selector.get_map():
                return None
            left = until - time.monotonic()
            # Once more when time is up: an answer that is there already is worth more than none.
            ready = self._selector.select(max(0.0, left))
            if not ready and left <= 0:
                return None
            for key, _unused_events in ready:
                attempt, sock = key.data
                self._selector.unregister(sock)
                outcome = _connect_outcome(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
                self._finished.append((attempt, outcome, sock))
        # An open one first: whatever else ended meanwhile no longer matters.
        self._finished.sort(key=lambda entry: entry[1].state != "open")
        return self._finished.pop(0)

    def hand_over(self, sock: socket.socket) -> None:
        """Leave an open connection to the caller."""
        self._sockets.remove(sock)

    def close(self) -> None:
        """Give up what is still under way; no further packet is sent for it."""
        for sock in self._sockets:
            sock.close()
        self._selector.close()


@contextlib.contextmanager
def _connects(source: str | None) -> Iterator[_Connects]:
    connects = _Connects(source)
    try:
        yield connects
    finally:
        connects.close()


def _connect_outcome(code: int) -> Probe:
    if code == 0:
        return Probe("open")
    if code in (errno.ECONNREFUSED, errno.ECONNRESET):
        return Probe("reset", _error_name(code))
    if code == errno.ETIMEDOUT:
        return Probe("filtered", _error_name(code))
    return Probe("unreachable", _error_name(code))


def _with_banner(seen: Probe, sock: socket.socket | None, seconds: float) -> Probe:
    if sock is None or seen.state != "open" or seconds <= 0:
        return seen
    return seen._replace(banner=_read_banner(sock, time.monotonic() + seconds))


def _read_banner(sock: socket.socket, deadline: float) -> str:
    """The first line that the service sends, as far as it comes before the deadline."""
    received = b""
    while b"\n" not in received and len(received) < _BANNER_SIZE:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        sock.settimeout(left)
        try:
            chunk = sock.recv(_BANNER_SIZE - len(received))
        except OSError:
            break
        if not chunk:
            break
        received += chunk
    return received.split(b"\n")[0].decode("ascii", "replace").rstrip("\r")


@contextlib.contextmanager
def _socket(family: int, kind: int, source: str | None) -> Iterator[socket.socket]:
    """A non-blocking socket, bound to the source address where one is wanted."""
    with _bare_socket(family, kind) as sock:
        _bind(sock, family, source)
        yield sock


def _bare_socket(family: int, kind: int) -> socket.socket:
    sock = socket.socket(family, kind)
    sock.setblocking(False)
    return sock


def _bind(sock: socket.socket, family: int, source: str | None) -> None:
    if source is not None:
        # Through getaddrinfo, for the scope id of a link-local address. Which kind of socket it is for makes no difference.
        sock.bind(socket.getaddrinfo(source, 0, family, socket.SOCK_DGRAM, 0, socket.AI_NUMERICHOST)[0][4])


def _error_name(code: int | None) -> str:
    return errno.errorcode.get(code or 0, "")


__all__ = (
    "FAMILIES",
    "GAPS",
    "Address",
    "KnockResult",
    "Probe",
    "check_echo",
    "knock_and_connect",
    "knock_until_closed",
    "knock_until_open",
    "knock_with_any",
    "local_address",
    "probe",
    "probe_udp",
    "resolve",
    "send",
)
