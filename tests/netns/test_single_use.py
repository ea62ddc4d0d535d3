# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``knock_server_single_use``: a window passes one connection, however many arrive, and no other comes of it."""

from __future__ import annotations

import mmap
import os
import re
import select
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._nft import TABLE, listing_digests, replace_transaction
from netlab import CLIENT4, CLIENT6, HOST4, HOST6, SSH, WIREGUARD, Lab, network, wait_for
from scapy.layers.inet import TCP, UDP
from scapy.packet import Packet
from test_look import CLOSED, FLAGS, _shows

FAMILIES = (4, 6)
WINDOWS = {4: "open4", 6: "open6"}
# Pairs: at the gate, and at one that is known to let both of some pass.
TRIES, NAIVE_TRIES = 1000, 200
# How often a process looks for the other one before it lets others have its processor.
PATIENCE = 2000
# A network of sources that nobody answers for: the client's own stack would reset what it did not begin.
SPOOFED = {4: "10.0.0.0/8", 6: "2001:db8:ff::/48"}


@pytest.fixture
def gated(lab: Lab) -> Lab:
    """A single-use gate, and a way back to the spoofed sources. The host says no SYN-ACK twice by itself."""
    lab.host.run("sysctl", "-qw", "net.ipv4.tcp_synack_retries=0")
    lab.gate(single_use=True, open_window=60)
    spoofable(lab)
    return lab


def spoofable(lab: Lab) -> None:
    for family, neighbour in ((4, "192.0.2.250"), (6, "2001:db8::250")):
        lab.host.ip("neigh", "replace", neighbour, "lladdr", lab.client.mac("c0"), "dev", "h0", "nud", "permanent")
        lab.host.ip("route", "add", SPOOFED[family], "via", neighbour, "dev", "h0")


def spoofed(family: int, number: int = 1) -> str:
    return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}" if family == 4 else f"2001:db8:ff::{number:x}"


def open_for(lab: Lab, source: str) -> None:
    """As a knock does it."""
    family = "6" if ":" in source else "4"
    lab.host.nft(
        f"add element inet {TABLE} used{family} {{ {source} }}\ndelete element inet {TABLE} used{family} {{ {source} }}\n"
        f"add element inet {TABLE} open{family} {{ {source} timeout 60s }}\n"
    )


def syn(source: str, sport: int, dport: int = SSH, flags: str = "S", **fields: Any) -> Packet:
    host = HOST6 if ":" in source else HOST4
    return network(source, host) / TCP(sport=sport, dport=dport, flags=flags, **{"seq": 1000, **fields})


def answers(lab: Lab, *packets: Packet) -> list[Packet]:
    """The SYN-ACKs that come back for these."""
    asked = {packet[TCP].sport for packet in packets}
    lab.wire.drain()
    for packet in packets:
        lab.wire.send(packet)

    def are(received: list[Packet]) -> list[Packet]:
        tcp = [packet for packet in received if TCP in packet]
        return [one for one in tcp if str(one[TCP].flags) == "SA" and one[TCP].dport in asked]

    return are(lab.wire.received(0.5, lambda received: len(are(received)) == len(packets)))


@pytest.mark.parametrize("probe", [{"socket_wildcard": True}, {"socket_wildcard": False}], ids=["socket", "no socket"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_connection_a_knock(lab: Lab, family: int, probe: dict[str, object]) -> None:
    lab.gate(single_use=True, probe=probe)
    source = lab.source(family)
    for _ in range(2):
        lab.knock(source)
        state, session = lab.connect(source)
        assert (state, lab.look(source), lab.ask(source)) == ("open", "reset", "refused")
        assert lab.count(WINDOWS[family]) == 0
        session.send(b"hello")
        assert session.recv(100) == b"hello"
    assert lab.look(lab.source(family)) == "reset"


def test_one_connection_to_any_of_the_ports(lab: Lab) -> None:
    lab.serve(2222)
    lab.gate(single_use=True, protected_ports=["22/tcp", "2222/tcp", "51820/udp"])
    for family in FAMILIES:
        for use in (
            lambda source: lab.look(source) == "open",
            lambda source: lab.look(source, 2222) == "open",
            lambda source: lab.ask(source) == "answered",
        ):
            source = lab.source(family)
            lab.knock(source)
            assert use(source)
            assert (lab.look(source), lab.look(source, 2222), lab.ask(source)) == ("reset", "reset", "refused")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_datagram_flow(lab: Lab, family: int) -> None:
    """The flow that used the window goes on, answered or not yet; another one is refused."""
    lab.gate(single_use=True)
    source, sport = lab.source(family), lab.source_port()
    lab.knock(source)
    flow = lab.dial(source, "udp", sport)
    flow.settimeout(1)
    flow.connect(lab.client.address(lab.host_of(source), WIREGUARD))
    for _ in range(3):
        flow.send(b"said again")
    for _ in range(3):
        assert flow.recv(100) == b"said again"
    assert lab.ask(source) == "refused"
    flow.send(b"later")
    assert flow.recv(100) == b"later"
    lab.host.run("conntrack", "-F")
    wait_for(lambda: lab.count(f"begun_udp{family}") == 0, 10, "the flow is known no more")
    flow.send(b"same flow, new")
    with pytest.raises(ConnectionRefusedError):
        flow.recv(100)


def test_trusted_sources_use_up_nothing(lab: Lab) -> None:
    lab.gate(single_use=True, trusted_sources=["192.0.2.0/24", "2001:db8::/32"])
    for family in FAMILIES:
        source = lab.source(family)
        assert [lab.look(source) for _ in range(3)] == ["open"] * 3
        assert (lab.count(f"used{family}"), lab.count(f"begun_tcp{family}")) == (0, 0)


def test_link_local_goes_by_the_interface(lab: Lab) -> None:
    lab.client.ip("addr", "add", "fe80::77/64", "dev", "c0", "nodad")
    lab.host.ip("addr", "add", "fe80::1/64", "dev", "h0", "nodad")
    lab.gate(single_use=True)
    source, host = "fe80::77%c0", "fe80::1%c0"
    for _ in range(2):
        lab.knock(source, host=host)
        assert (lab.look(source, host=host), lab.look(source, host=host)) == ("open", "reset")
        assert lab.ask(source, host=host) == "refused"
    lab.knock(source, host=host)
    assert (lab.ask(source, host=host), lab.look(source, host=host)) == ("answered", "reset")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lost_answer_does_not_cost_the_window(gated: Lab, family: int) -> None:
    source = spoofed(family)
    open_for(gated, source)
    first, other = syn(source, 4001), syn(source, 4002)
    assert len(answers(gated, first)) == 1
    assert len(answers(gated, other)) == 0
    (answer,) = answers(gated, first)
    # The answer came through: from now on its flow is no way in.
    gated.wire.send(syn(source, 4001, flags="A", seq=1001, ack=answer[TCP].seq + 1))
    assert gated.wire.received(1, lambda packets: any(b"SSH" in bytes(one) for one in packets))
    assert gated.count(f"begun_tcp{family}") == 0
    gated.crash()
    gated.host.run("conntrack", "-F")
    assert answers(gated, first, syn(source, 4001, seq=77), other) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unanswered_flow_is_worthless_after_a_while(gated: Lab, family: int) -> None:
    source = spoofed(family)
    open_for(gated, source)
    first = syn(source, 4001)
    assert len(answers(gated, first)) == 1
    wait_for(lambda: gated.count(f"begun_tcp{family}") == 0, 10, "the flow is known no more")
    assert answers(gated, first, syn(source, 4001, seq=77)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_flow_does_not_come_in_again(lab: Lab, family: int) -> None:
    """Row 8: after its end, and after a crash of the service that conntrack knows nothing of."""
    lab.gate(single_use=True)
    source, sport = lab.source(family), lab.source_port()
    lab.knock(source)
    state, session = lab.connect(source, sport=sport)
    assert (state, answers(lab, syn(source, sport, seq=5))) == ("open", [])
    session.send(b"hello")
    assert session.recv(100) == b"hello", "nor does a stray SYN cut the session"
    lab.crash()
    assert answers(lab, syn(source, sport, seq=5)) == []
    session.close()
    assert lab.look(source, sport=sport) != "open"


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_begins_a_connection_uses_a_window(gated: Lab, family: int) -> None:
    """And of any size: a SYN with as many options as there is room for."""
    source = spoofed(family)
    open_for(gated, source)
    for flags in ("A", "F", "", "FPU", "SF", "SA", "R", "FA", "PA"):
        gated.wire.send(syn(source, 4001, flags=flags))
    assert len(answers(gated, syn(source, 4002, options=[("NOP", None)] * 40))) == 1
    assert answers(gated, syn(source, 4003)) == []


def test_untracked_packets(lab: Lab) -> None:
    lab.host.nft(
        "table inet raw {\n"
        "chain pre { type filter hook prerouting priority -300; tcp dport 22 notrack; udp dport 51820 notrack; }\n"
        "chain answers { type filter hook output priority -300; tcp sport 22 notrack; udp sport 51820 notrack; }\n}\n"
    )
    lab.gate(single_use=True)
    for family in FAMILIES:
        source = lab.source(family)
        lab.knock(source)
        state, session = lab.connect(source)
        assert (state, lab.look(source), lab.ask(source)) == ("open", "reset", "refused")
        session.send(b"hello")
        assert session.recv(100) == b"hello"
        lab.knock(source)
        assert (lab.ask(source), lab.ask(source), lab.look(source)) == ("answered", "refused", "reset")


def test_the_lock_lets_in_what_was_let_through_and_nothing_else(lab: Lab) -> None:
    """Also where packets come to it by another way: without the look, and by someone's redirect."""
    lab.serve(2022)
    lab.host.nft(
        "table inet moved { chain pre { type nat hook prerouting priority -100;\n"
        "tcp dport 8022 redirect to :22\n tcp dport 2222 redirect to :2022\n}\n}\n"
    )
    lab.gate(single_use=True, protected_ports=["22/tcp", "2222/tcp"])
    for family in FAMILIES:
        for port, other in ((8022, 22), (2222, 22), (22, 8022)):
            source = lab.source(family)
            lab.knock(source)
            state, session = lab.connect(source, port)
            assert state == "open", port
            assert [lab.look(source, number) for number in (port, other)].count("open") == 0
            session.send(b"hello")
            assert session.recv(100) == b"hello"
    lab.host.nft(f"flush chain inet {TABLE} pre")
    for family in FAMILIES:
        source = lab.source(family)
        assert lab.look(source) == "silent"
        open_for(lab, source)
        assert (lab.look(source), lab.look(source)) == ("open", "silent")


def test_the_lock_repeats_what_a_redirect_began(gated: Lab) -> None:
    gated.host.nft(
        "table inet moved { chain pre { type nat hook prerouting priority -100; tcp dport 8022 redirect to :22; }\n}\n"
    )
    for family in FAMILIES:
        source = spoofed(family)
        open_for(gated, source)
        first = syn(source, 4001, 8022)
        assert [len(answers(gated, packet)) for packet in (first, syn(source, 4002, 8022), first)] == [1, 0, 1]


@pytest.fixture
def _one_processor() -> Iterator[None]:
    """So that the host works through the packets in the order in which they are sent."""
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    yield
    os.sched_setaffinity(0, processors)


@pytest.mark.usefixtures("_one_processor")
def test_closed_looks_closed_after_the_use(lab: Lab) -> None:
    """Byte for byte, for whatever a scanner sends, from new source ports and from the one that was let in."""
    for setting in ("net.ipv4.icmp_ratelimit=0", "net.ipv6.icmp.ratelimit=0"):
        lab.host.run("sysctl", "-qw", setting)
    lab.serve(443)
    lab.gate(single_use=True)
    differences = []
    for source in (CLIENT4, CLIENT6):
        host, used = lab.host_of(source), lab.source_port()
        lab.knock(source)
        assert lab.look(source, sport=used) == "open"
        wait_for(lambda: not lab.host.run("ss", "-Htn"), 3, "the session has ended on the host, too")
        lab.host.run("conntrack", "-F")
        for flags in FLAGS:
            for sport in (lab.source_port(), used):
                header: dict[str, Any] = {"sport": sport, "flags": flags, "seq": 1000, "ack": 2000, "window": 1024}
                protected = _shows(lab, source, SSH, network(source, host) / TCP(dport=SSH, **header))
                closed = _shows(lab, source, CLOSED, network(source, host) / TCP(dport=CLOSED, **header))
                if protected != closed:
                    differences.append((flags, sport == used, protected, closed))
    assert not differences


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param([{"guard": "strict"}], id="rules"),
        pytest.param([{"open_window": 10}], id="timeouts"),
        pytest.param([{"max_windows": 100}], id="sizes"),
        pytest.param([{"template": "closed"}, {}], id="closed and back"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_used_window_stays_used(lab: Lab, family: int, changes: list[dict[str, Any]]) -> None:
    """Whatever is loaded; who has not used theirs keeps it, unless its set had to be made anew."""
    lab.gate(single_use=True, open_window=60)
    used, fresh = lab.source(family), lab.source(family)
    for source in (used, fresh):
        lab.knock(source)
    _, session = lab.connect(used)
    listed = lab.listing()
    lab.knock(used)
    assert lab.look(used) == "open"
    for change in changes:
        text, _ = lab.render(single_use=True, **{"open_window": 60, **change})
        lab.host.nft(replace_transaction(text, lab.listing()))
    assert lab.look(used) == "reset"
    assert lab.look(fresh) == ("reset" if "max_windows" in changes[0] else "open")
    assert lab.look(fresh) == "reset"
    session.send(b"hello")
    assert session.recv(100) == b"hello"
    # As it was when the rules that are there were read, a moment before others are put in their place.
    lab.knock(used)
    listed = lab.listing()
    assert lab.look(used) == "open"
    for size in (200, 300):
        text, _ = lab.render(single_use=True, open_window=60, max_windows=size)
        lab.host.nft(replace_transaction(text, listed))
        assert lab.look(used) == "reset"
        listed = lab.listing()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_begun_outlives_a_new_ruleset(gated: Lab, family: int) -> None:
    source = spoofed(family)
    open_for(gated, source)
    first = syn(source, 4001)
    assert len(answers(gated, first)) == 1
    gated.gate(single_use=True, open_window=60, guard="strict")
    assert [len(answers(gated, packet)) for packet in (syn(source, 4002), first)] == [0, 1]


def test_on_and_off(lab: Lab) -> None:
    """Windows that are open stay so, each for what it is good for now; nothing of single use stays."""
    lab.gate()
    plain = listing_digests(lab.listing() or {})
    source = {family: lab.source(family) for family in FAMILIES}
    for address in source.values():
        lab.knock(address)
    lab.gate(single_use=True)
    single = listing_digests(lab.listing() or {})
    assert [lab.look(source[4]) for _ in range(2)] == ["open", "reset"]
    assert listing_digests(lab.listing() or {}) == single
    lab.gate()
    assert [lab.look(source[6]) for _ in range(2)] == ["open", "open"]
    assert lab.look(source[4]) == "reset"
    assert listing_digests(lab.listing() or {}) == plain
    lab.gate(single_use=True)
    assert listing_digests(lab.listing() or {}) == single


def _naive(text: str) -> str:
    """The gate that only takes the window away, as the rules of attack row 1 did."""
    naive, count = re.subn(r"add @used\w+ \{[^}]*limit[^}]*\} goto (begin\w+)", r"goto \1", text)
    assert count == 3
    return naive


RACES = [
    pytest.param(4, "tcp", id="tcp4"),
    pytest.param(6, "tcp", id="tcp6"),
    pytest.param(4, "udp", id="udp4"),
    pytest.param(6, "udp", id="udp6"),
]


@pytest.mark.parametrize(("family", "proto"), RACES)
def test_two_at_once_on_two_processors(lab: Lab, family: int, proto: str) -> None:
    """Row 1: one of the two passes, each time; the same pairs at a gate that only deletes the window show that they meet."""
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < 2:
        pytest.skip("needs two processors")
    spoofable(lab)
    lab.host.run("sysctl", "-qw", "net.ipv4.icmp_ratelimit=0")
    passed = {}
    for name, change, tries in (("deleting", _naive, NAIVE_TRIES), ("single use", str, TRIES)):
        text = change(lab.render(single_use=True, open_window=600)[0])
        lab.host.nft(f"add table inet {TABLE}\ndelete table inet {TABLE}\n{text}")
        # Flows of their own: conntrack remembers those of the other gate.
        sports = (lab.source_port(), lab.source_port())
        passed[name] = _race(lab, family, proto, sports, processors[:2], tries)
    print(f"\n{proto} over IPv{family}, pairs by how many of them passed: {passed}")
    assert passed["single use"] == {1: TRIES}
    assert passed["deleting"].get(2, 0) > 0, "the two never met"


def _race(
    lab: Lab, family: int, proto: str, sports: tuple[int, int], processors: Sequence[int], tries: int
) -> dict[int, int]:
    """How many of a pair were answered, and how often."""
    sources = [spoofed(family, number) for number in range(1, tries + 1)]
    elements = ", ".join(f"{source} timeout 600s" for source in sources)
    lab.host.nft(f"add element inet {TABLE} {WINDOWS[family]} {{ {elements} }}\n")
    target = HOST6 if family == 6 else HOST4
    port = SSH if proto == "tcp" else WIREGUARD
    layer: Callable[[int], Packet] = (
        (lambda sport: TCP(sport=sport, dport=port, flags="S", seq=1000))
        if proto == "tcp"
        else (lambda sport: UDP(sport=sport, dport=port) / b"hello")
    )
    frames = [[lab.wire.frame(network(source, target) / layer(sport)) for source in sources] for sport in sports]
    lab.wire.drain()
    shared = mmap.mmap(-1, 16)
    children = [_sender(lab, shared, own, frames[own], processor) for own, processor in enumerate(processors)]
    seen: set[tuple[bytes, int]] = set()
    start, offset = (14 + 24, 14 + 40) if family == 6 else (14 + 16, 14 + 20)
    size = 16 if family == 6 else 4
    for child in children:
        # The answers wait meanwhile: whoever reads them now takes a processor from the two.
        assert os.waitpid(child, 0)[1] == 0
    while select.select([lab.wire.socket], [], [], 0.5)[0]:
        data, address = lab.wire.socket.recvfrom(65536)
        if address[2] == socket.PACKET_OUTGOING:
            continue
        from_port, to_port = struct.unpack_from("!HH", data, offset)
        is_answer = from_port == port and (proto == "udp" or data[offset + 13] == 0x12)
        if is_answer and len(data) > offset + 8:
            seen.add((data[start : start + size], to_port))
    counts: dict[int, int] = {}
    for source in sources:
        packed = socket.inet_pton(socket.AF_INET6 if family == 6 else socket.AF_INET, source)
        number = sum((packed, sport) in seen for sport in sports)
        counts[number] = counts.get(number, 0) + 1
    return counts


def _sender(lab: Lab, shared: mmap.mmap, own: int, frames: list[bytes], processor: int) -> int:
    """A process on one processor that sends each frame when the other one is about to send its own."""
    child = os.fork()
    if child:
        return child
    status = 1
    mine, other = struct.Struct("=q"), 8 * (1 - own)
    try:
        os.sched_setaffinity(0, {processor})
        for number, frame in enumerate(frames, 1):
            mine.pack_into(shared, 8 * own, number)
            turns = 0
            while mine.unpack_from(shared, other)[0] < number:
                turns += 1
                if turns > PATIENCE:
                    os.sched_yield()
            lab.wire.socket.send(frame)
        status = 0
    finally:
        # Whatever happened, the other one waits for this one no more.
        mine.pack_into(shared, 8 * own, len(frames))
        os._exit(status)
