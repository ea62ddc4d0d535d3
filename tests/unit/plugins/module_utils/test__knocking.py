# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Knocking against real sockets on loopback."""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils import _knocking
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import (
    Address,
    KnockResult,
    Probe,
    knock_and_connect,
    knock_until_open,
    knock_with_any,
    probe,
    probe_udp,
    resolve,
    send,
)
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock

_LOCAL = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
        sock.bind(("::1", 0))
        return True
    return False


FAMILIES = [
    socket.AF_INET,
    pytest.param(socket.AF_INET6, marks=pytest.mark.skipif(not _has_ipv6(), reason="no IPv6 here")),
]


class FakeGate:
    """Listens on knock ports; its protected port starts to listen when the right knocks came in the right order.

    ``deaf`` knocks are ignored first, as a path that loses packets does.
    """

    def __init__(self, family: int, protocols: list[str], deaf: int = 0) -> None:
        self.selector = selectors.DefaultSelector()
        self.heard: list[int] = []
        self.deaf = deaf
        self.accepted = 0
        self.opened = threading.Event()
        self.protected = self._bound(family, socket.SOCK_STREAM)
        self.port = self.protected.getsockname()[1]
        self.address = Address(family, self.protected.getsockname())
        self.knocks: list[Knock] = []
        for index, protocol in enumerate(protocols):
            sock = self._bound(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
            if protocol == "tcp":
                sock.listen()
            self.knocks.append(Knock(sock.getsockname()[1], protocol))
            self.selector.register(sock, selectors.EVENT_READ, index)
        self.wake, self._woken = socket.socketpair()
        self.selector.register(self._woken, selectors.EVENT_READ, None)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    @staticmethod
    def _bound(family: int, kind: int) -> socket.socket:
        sock = socket.socket(family, kind)
        sock.bind((_LOCAL[socket.AddressFamily(family)], 0))
        return sock

    def _run(self) -> None:
        while True:
            # Sockets that are ready at the same time come in the order of registration, which is the right one.
            ready = sorted(
                self.selector.select(), key=lambda item: item[0].data if isinstance(item[0].data, int) else -1
            )
            for key, _unused_events in ready:
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if key.data is None:
                    return
                if key.data == "protected":
                    sock.accept()[0].close()
                    self.accepted += 1
                    continue
                if sock.type == socket.SOCK_STREAM:
                    sock.accept()[0].close()
                else:
                    assert sock.recv(16) == b""
                self._hear(key.data)

    def _hear(self, index: int) -> None:
        if self.deaf:
            self.deaf -= 1
            return
        self.heard.append(index)
        right = self.heard[-len(self.knocks) :] == list(range(len(self.knocks)))
        if right and not self.opened.is_set():
            self.protected.listen()
            self.selector.register(self.protected, selectors.EVENT_READ, "protected")
            self.opened.set()

    def close(self) -> None:
        self.wake.send(b"x")
        self.thread.join()
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self.selector.close()
        self.protected.close()
        self.wake.close()


@contextlib.contextmanager
def fake_gate(family: int, protocols: list[str], deaf: int = 0) -> Iterator[FakeGate]:
    gate = FakeGate(family, protocols, deaf)
    try:
        yield gate
    finally:
        gate.close()


@contextlib.contextmanager
def closed_port(family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> Iterator[Address]:
    """A port that nothing listens on, and that nobody else takes meanwhile."""
    with socket.socket(family, kind) as sock:
        sock.bind((_LOCAL[socket.AddressFamily(family)], 0))
        if kind == socket.SOCK_STREAM:
            yield Address(family, sock.getsockname())
            return
        address = Address(family, sock.getsockname())
    yield address


@contextlib.contextmanager
def full_backlog() -> Iterator[Address]:
    """A port that answers no SYN: its queue is full."""
    with socket.socket() as listener, contextlib.ExitStack() as clients:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _unused in range(3):
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield Address(socket.AF_INET, listener.getsockname())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocols", [["tcp", "tcp", "tcp"], ["udp", "tcp", "udp"], ["udp", "udp"]])
def test_opens_with_the_right_order(family: int, protocols: list[str]) -> None:
    with fake_gate(family, protocols) as gate:
        result = knock_until_open([gate.address], gate.knocks, gate.port, 10)
    assert (result.state, result.address, result.sequence) == ("open", gate.address, 0)


def test_stops_at_the_first_success() -> None:
    with fake_gate(socket.AF_INET, ["tcp", "tcp"]) as gate:
        knock_until_open([gate.address], gate.knocks, gate.port, 10)
    assert gate.accepted <= 1


def test_the_connection_that_opened_is_handed_over() -> None:
    with fake_gate(socket.AF_INET, ["tcp", "udp"]) as gate:
        result, sock = knock_and_connect([gate.address], [gate.knocks], gate.port, 10)
        assert sock is not None
        with sock:
            assert (result.state, sock.getpeername()) == ("open", gate.address.sockaddr)
            sock.settimeout(10)
            # It is not only open on this side: the service has it, and ends it.
            assert sock.recv(1) == b""
    assert gate.accepted == 1


def test_once_more_where_the_look_uses_up_what_it_saw() -> None:
    with fake_gate(socket.AF_INET, ["tcp", "udp"]) as gate:
        result = knock_with_any([gate.address], [gate.knocks], gate.port, 10, single_use=True)
        assert (result.state, result.attempts) == ("open", 1)
        deadline = time.monotonic() + 5
        while len(gate.heard) < 2 * len(gate.knocks) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert gate.heard == [0, 1, 0, 1]
        assert gate.accepted == 1


def test_there_is_no_connection_where_it_does_not_open() -> None:
    with closed_port() as address:
        result, sock = knock_and_connect([address], [[Knock(9, "udp")]], address.port, 0.1)
    assert (result.state, sock) == ("reset", None)


def test_knocks_before_it_looks() -> None:
    with fake_gate(socket.AF_INET, ["tcp", "tcp"]) as gate:
        result = knock_until_open([gate.address], gate.knocks, gate.port, 0)
        assert gate.opened.wait(10)
    assert result.attempts == 1


def test_wrong_order_does_not_open() -> None:
    with fake_gate(socket.AF_INET, ["tcp", "tcp", "tcp"]) as gate:
        # Slow enough for the gate to hear them one by one.
        result = knock_until_open([gate.address], gate.knocks[::-1], gate.port, 0.6, gaps=(0.05,))
    assert (result.state, result.error, result.sequence) == ("reset", "ECONNREFUSED", -1)


def test_gaps_grow_until_it_opens() -> None:
    with fake_gate(socket.AF_INET, ["tcp", "tcp", "tcp"], deaf=4) as gate:
        result = knock_until_open([gate.address], gate.knocks, gate.port, 20, gaps=(0.0, 0.01, 0.03))
    assert (result.state, result.attempts, result.gap) == ("open", 3, 0.03)


def test_the_next_sequence_where_the_first_does_not_open() -> None:
    with fake_gate(socket.AF_INET, ["tcp", "udp"]) as gate, closed_port() as other:
        stale = [Knock(other.port, "tcp"), Knock(other.port, "udp")]
        result = knock_with_any([gate.address], [stale, gate.knocks], gate.port, 10)
    assert (result.state, result.sequence, result.attempts, result.gap) == ("open", 1, 2, 0.0)


def test_the_next_address_where_the_first_does_not_open() -> None:
    with fake_gate(socket.AF_INET, ["tcp", "udp"]) as gate:
        # The whole 127/8 is local, and nothing listens on this one.
        other = Address(socket.AF_INET, ("127.9.9.9", gate.port))
        result = knock_until_open([other, gate.address], gate.knocks, gate.port, 10)
    assert (result.state, result.address) == ("open", gate.address)


def test_nothing_reachable_ends_early() -> None:
    # The discard-only block has no route on a loopback source.
    unreachable = Address(socket.AF_INET, ("127.0.0.1", 9))
    result = knock_until_open([unreachable], [Knock(4000, "tcp")], 9, 600, source="192.0.2.1")
    assert (result.state, result.attempts, result.error) == ("unreachable", 1, "EADDRNOTAVAIL")


def test_no_address() -> None:
    result = knock_until_open([], [Knock(4000, "tcp")], 9, 600)
    assert (result.state, result.address, result.attempts) == ("unreachable", None, 0)


def test_silence_is_filtered() -> None:
    with full_backlog() as address:
        result = knock_until_open([address], [Knock(9, "udp")], address.port, 0.3)
        seen = probe(address, 0.2)
    assert (result.state, result.error) == ("filtered", "ETIMEDOUT")
    assert seen == Probe("filtered", "ETIMEDOUT")


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_of_a_closed_port(family: int) -> None:
    with closed_port(family) as address:
        assert probe(address, 10) == Probe("reset", "ECONNREFUSED")


@pytest.mark.parametrize(
    ("sent", "banner"),
    [(b"SSH-2.0-Test_1\r\nmore", "SSH-2.0-Test_1"), (b"no line end", "no line end"), (b"", ""), (None, "")],
)
def test_probe_of_an_open_port(sent: bytes | None, banner: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def serve() -> None:
            client, _unused_address = listener.accept()
            with client:
                if sent is None:
                    # Says nothing until the other side gives up.
                    client.recv(1)
                else:
                    client.sendall(sent)

        thread = threading.Thread(target=serve)
        thread.start()
        seen = probe(Address(socket.AF_INET, listener.getsockname()), 10, banner=0.3 if sent is None else 10)
        thread.join()
    assert seen == Probe("open", "", banner)


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_udp_of_a_closed_port(family: int) -> None:
    with closed_port(family, socket.SOCK_DGRAM) as address:
        assert probe_udp(address, 10) == Probe("refused", "ECONNREFUSED")


def test_probe_udp_of_a_service() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service:
        service.bind(("127.0.0.1", 0))
        address = Address(socket.AF_INET, service.getsockname())
        assert probe_udp(address, 0.05) == Probe("silent")
        service.recv(10)
        thread = threading.Thread(target=lambda: service.sendto(b"hello", service.recvfrom(10)[1]))
        thread.start()
        assert probe_udp(address, 10, payload=b"?") == Probe("answered")
        thread.join()


def test_send_uses_the_source_address() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service:
        service.bind(("127.0.0.1", 0))
        target = Address(socket.AF_INET, ("127.0.0.1", 0))
        send(target, [Knock(service.getsockname()[1], "udp")], source="127.0.0.7")
        service.settimeout(10)
        assert service.recvfrom(10)[1][0] == "127.0.0.7"


def test_addresses_keep_the_scope() -> None:
    address = Address(socket.AF_INET6, ("fe80::1", 22, 0, 7))
    assert address.at(4000) == Address(socket.AF_INET6, ("fe80::1", 4000, 0, 7))
    assert (address.host, address.port) == ("fe80::1", 22)


def test_resolve() -> None:
    assert resolve("127.0.0.1", 22) == [Address(socket.AF_INET, ("127.0.0.1", 22))]
    assert resolve("127.0.0.1", 22, "inet") == resolve("127.0.0.1", 22)
    assert resolve("::1", 22, "inet6") == [Address(socket.AF_INET6, ("::1", 22, 0, 0))]


@pytest.mark.parametrize(
    ("host", "family", "message"),
    [
        ("127.0.0.1", "inet6", r"host: expected a name or an address that resolves; got '127\.0\.0\.1': .+\."),
        ("no..name", "any", r"host: expected a name or an address that resolves; got 'no\.\.name': .+\."),
        ("127.0.0.1", "ipv4", r"family: expected any, inet or inet6; got 'ipv4'\."),
    ],
)
def test_resolve_says_what_is_wrong(host: str, family: str, message: str) -> None:
    with pytest.raises(PortknockError, match=rf"\A{message}\Z"):
        resolve(host, 22, family)


def sent_knocks(
    monkeypatch: pytest.MonkeyPatch, opens: int, **arguments: Any
) -> tuple[KnockResult, list[tuple[str, int, float]]]:
    """Knock at a gate that opens for one sequence of those that open once: how it went, and what was sent to whom."""
    sent: list[tuple[str, int, float]] = []

    def send(address: Address, knocks: Sequence[Knock], gap: float, _source: str | None) -> None:
        sent.append((address.host, knocks[0].port, gap))

    def poll(_connects: object, attempt: Any, _port: int, _until: float) -> Any:
        if sent[-1][1] == opens:
            return attempt, Probe("open"), socket.socket()
        return None, Probe("reset", "ECONNREFUSED"), None

    monkeypatch.setattr(_knocking, "send", send)
    monkeypatch.setattr(_knocking, "_poll", poll)
    monkeypatch.setattr(_knocking._Connects, "hand_over", lambda *_arguments: None)
    addresses = [Address(socket.AF_INET, (host, 22)) for host in arguments.pop("hosts", ["127.0.0.1"])]
    once = [[Knock(4000 + number, "tcp")] for number in range(1, 9)]
    return knock_with_any(addresses, arguments.pop("sequences", []), 22, 10, once=once, **arguments), sent


def test_of_those_that_open_once_each_is_sent_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    result, sent = sent_knocks(monkeypatch, opens=4004)
    assert [port for _host, port, _gap in sent] == [4001, 4001, 4002, 4003, 4004]
    # With growing gaps, in case the first was only overtaken on its way.
    assert [gap for _host, _port, gap in sent][:2] == [0.0, 0.02]
    assert (result.state, result.sequence, result.sent_once) == ("open", 3, 4)


def test_none_is_sent_again_after_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    result, sent = sent_knocks(monkeypatch, opens=0)
    ports = [port for _host, port, _gap in sent]
    assert ports == sorted(ports)
    assert (result.state, result.sequence, result.sent_once) == ("reset", -1, 8)


def test_reusable_ones_come_first_and_again_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """They give nothing away that the gate might still honour."""
    result, sent = sent_knocks(monkeypatch, opens=4002, sequences=[[Knock(3001, "tcp")]])
    assert [port for _host, port, _gap in sent] == [3001, 4001, 4001, 4002]
    assert (result.sequence, result.sent_once) == (2, 2)


def test_each_address_has_its_turn_to_be_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one where a sequence opens what can't be connected to does not use up all of them."""
    _result, sent = sent_knocks(monkeypatch, opens=0, hosts=["127.0.0.1", "127.0.0.2"])
    firsts: dict[int, str] = {}
    for host, port, _gap in sent:
        firsts.setdefault(port, host)
    assert [firsts[port] for port in (4001, 4002, 4003)] == ["127.0.0.1", "127.0.0.2", "127.0.0.1"]


def test_what_could_not_be_sent_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def send(*_arguments: object) -> None:
        raise OSError(errno.ENETUNREACH, "no")

    monkeypatch.setattr(_knocking, "send", send)
    address = Address(socket.AF_INET, ("127.0.0.1", 22))
    result = knock_with_any([address], [], 22, 600, once=[[Knock(4001, "tcp")], [Knock(4002, "tcp")]])
    assert (result.state, result.sent_once, result.attempts) == ("unreachable", 0, 1)


def test_where_the_system_lets_nobody_send_echo_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise PermissionError

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(PortknockError, match=r"^icmp: expected .*ping_group_range"):
        send(Address(socket.AF_INET, ("192.0.2.1", 22)), [Knock(300, "icmp")])
