# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What holds, whatever conntrack and other rules make of a packet."""

from __future__ import annotations

import pytest
from netlab import (
    CLIENT4,
    CLIENT6,
    HOST4,
    HOST6,
    SEQUENCE,
    SSH,
    WIREGUARD,
    Lab,
    Service,
    network,
    wait_for,
)
from scapy.layers.inet import TCP, UDP
from scapy.packet import Packet

PROBES = [
    pytest.param({"socket_wildcard": True}, id="socket"),
    pytest.param({"socket_wildcard": False}, id="no socket"),
]
SOURCES = (CLIENT4, CLIENT6)


def _is_syn_ack(packet: Packet) -> bool:
    return TCP in packet and str(packet[TCP].flags) == "SA"


def _syn_acks(lab: Lab, packets: list[Packet]) -> int:
    """How many of these SYNs a listener answers."""
    lab.wire.drain()
    for packet in packets:
        lab.wire.send(packet)
    return sum(map(_is_syn_ack, lab.wire.received(0.5, lambda _: False)))


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("source", SOURCES)
def test_a_session_older_than_the_gate_lives_on(lab: Lab, source: str, probe: dict[str, object]) -> None:
    """Row 2: nothing on this host has used conntrack before, so that it has never heard of the session."""
    state, session = lab.connect(source)
    _, idle = lab.connect(source)
    assert state == "open"
    lab.gate(probe=probe)
    for data in (b"first", b"second"):
        session.send(data)
        assert session.recv(100) == data
    lab.gate(probe=probe, guard="strict")
    session.send(b"third")
    assert session.recv(100) == b"third"
    idle.shutdown(1)
    assert idle.recv(100) == b"", "the host ends an idle session in order"
    assert lab.look(source) == "reset"


@pytest.mark.parametrize("source", SOURCES)
def test_a_session_outlives_conntrack_s_memory(lab: Lab, source: str) -> None:
    """Row 2: as after ``conntrack -F``: the gate goes, and conntrack with it, and comes again."""
    lab.gate()
    lab.knock(source)
    _, session = lab.connect(source)
    lab.host.nft("delete table inet fleet_portknock")
    lab.host.run("conntrack", "-F")
    lab.gate()
    session.send(b"hello")
    assert session.recv(100) == b"hello"
    assert lab.look(source) == "reset"


@pytest.mark.parametrize("probe", PROBES)
def test_untracked_packets(lab: Lab, probe: dict[str, object]) -> None:
    """Row 3: someone's ``notrack`` on the ports."""
    lab.host.nft(
        "table inet raw {\n"
        "chain pre { type filter hook prerouting priority -300; tcp dport 22 notrack; udp dport 51820 notrack; }\n"
        "chain answers { type filter hook output priority -300; tcp sport 22 notrack; udp sport 51820 notrack; }\n}\n"
    )
    lab.gate(probe=probe)
    for source in SOURCES:
        assert (lab.look(source), lab.ask(source)) == ("reset", "refused")
        lab.knock(source)
        state, session = lab.connect(source)
        assert (state, lab.ask(source)) == ("open", "answered")
        lab.close_windows()
        session.send(b"hello")
        assert session.recv(100) == b"hello"
        assert (lab.look(source), lab.ask(source)) == ("reset", "refused")


@pytest.mark.parametrize("loose", [0, 1])
@pytest.mark.parametrize("source", SOURCES)
def test_odd_packets_first(lab: Lab, source: str, loose: int) -> None:
    """Row 3: a flow that conntrack picks up in the middle, or holds for invalid, is not a way in."""
    lab.gate()
    lab.host.run("sysctl", "-qw", f"net.netfilter.nf_conntrack_tcp_loose={loose}")
    host = lab.host_of(source)
    syns = []
    for flags in ("A", "PA", "F", "FA", "SA", "R", "", "FPU"):
        sport = lab.source_port()
        for number in range(3):
            lab.wire.send(network(source, host) / TCP(sport=sport, dport=SSH, flags=flags, seq=100 + number, ack=1))
        syns.append(network(source, host) / TCP(sport=sport, dport=SSH, flags="S", seq=1000))
    assert _syn_acks(lab, syns) == 0


@pytest.mark.parametrize("look", ["steered", "not steered"])
def test_the_lock_holds_without_the_look(lab: Lab, look: str) -> None:
    """What comes to the port by another way than prerouting is dropped by the last rule."""
    lab.gate()
    if look == "not steered":
        lab.host.nft("flush chain inet fleet_portknock pre")
    for source in SOURCES:
        assert (lab.look(source), lab.ask(source)) == (
            ("reset", "refused") if look == "steered" else ("silent", "silent")
        )


def test_someone_s_redirect_is_no_way_round(lab: Lab) -> None:
    """From another port to the protected one, and from the protected one to where the service really waits."""
    lab.serve(2022)
    lab.host.nft(
        "table ip moved { chain pre { type nat hook prerouting priority -100;\n"
        "tcp dport 8022 redirect to :22\n tcp dport 2222 redirect to :2022\n}\n}\n"
    )
    lab.gate(protected_ports=["22/tcp", "2222/tcp"])
    source = lab.source()
    assert lab.look(source, 8022) == "silent"
    assert lab.look(source, 2222) == "reset"
    lab.knock(source)
    assert (lab.look(source, 8022), lab.look(source, 2222)) == ("open", "open")


@pytest.mark.parametrize("source", SOURCES)
def test_the_same_datagram_flow_after_the_knock(lab: Lab, source: str) -> None:
    """Row 7: a client with a fixed source port that came too early is let in right after its knock."""
    lab.gate()
    sport = lab.source_port()
    for _ in range(3):
        assert lab.ask(source, sport=sport) == "refused"
    lab.knock(source)
    assert lab.ask(source, sport=sport) == "answered"


@pytest.mark.parametrize("source", SOURCES)
def test_the_same_flow_after_the_window(lab: Lab, source: str) -> None:
    """Row 8: a bare SYN is judged by the open set, whatever conntrack remembers of its flow."""
    lab.gate()
    lab.knock(source)
    host = lab.host_of(source)
    ports = [lab.source_port() for _ in range(4)]
    syns = [network(source, host) / TCP(sport=port, dport=SSH, flags="S", seq=1000) for port in ports]
    assert _syn_acks(lab, syns) == 4
    lab.close_windows()
    assert _syn_acks(lab, syns) == 0
    again = [network(source, host) / TCP(sport=port, dport=SSH, flags="S", seq=9000) for port in ports]
    assert _syn_acks(lab, again) == 0
    sport = lab.source_port()
    lab.knock(source)
    _, session = lab.connect(source, sport=sport)
    lab.close_windows()
    assert _syn_acks(lab, [network(source, host) / TCP(sport=sport, dport=SSH, flags="S", seq=5)]) == 0
    session.send(b"hello")
    assert session.recv(100) == b"hello", "nor does a stray SYN cut the session"
    lab.crash()
    assert _syn_acks(lab, [network(source, host) / TCP(sport=sport, dport=SSH, flags="S", seq=7)]) == 0


def test_progress_by_network_and_window_by_address(lab: Lab) -> None:
    """Row 10: a client may change its address within its /64 while it knocks; its neighbours gain nothing."""
    lab.gate()
    first, second, neighbour = (f"2001:db8:0:99::{number}" for number in (1, 2, 3))
    far = "2001:db8:0:9a::1"
    for address in (first, second, neighbour, far):
        lab.client.ip("addr", "add", f"{address}/48", "dev", "c0", "nodad")
    lab.touch(first, *SEQUENCE[:2])
    lab.touch(far, SEQUENCE[2])
    assert [lab.look(address) for address in (first, second, neighbour, far)] == ["reset"] * 4
    lab.touch(second, SEQUENCE[2])
    assert [lab.look(address) for address in (first, second, neighbour, far)] == ["reset", "open", "reset", "reset"]


def test_link_local_goes_by_the_interface(lab: Lab) -> None:
    """Row 10: the same link-local address on another wire is someone else."""
    other = lab.namespace("d")
    lab.link("h1", "d0", other)
    for where, interface in ((lab.client, "c0"), (other, "d0")):
        where.ip("addr", "add", "fe80::77/64", "dev", interface, "nodad")
    for interface in ("h0", "h1"):
        lab.host.ip("addr", "add", "fe80::1/64", "dev", interface, "nodad")
    lab.gate()
    mine, theirs = "fe80::77%c0", "fe80::77%d0"
    assert lab.look(mine, host="fe80::1%c0") == "reset"
    lab.knock(mine, host="fe80::1%c0")
    assert (lab.look(mine, host="fe80::1%c0"), lab.ask(mine, host="fe80::1%c0")) == ("open", "answered")
    lab.client, here = other, lab.client
    try:
        assert lab.look(theirs, host="fe80::1%d0") == "reset"
    finally:
        lab.client = here


def test_trusted_sources_never_knock(lab: Lab) -> None:
    lab.gate(trusted_sources=["192.0.2.128/25", "192.0.2.200", "192.0.2.0/26", "2001:db8:0:5::/64"])
    for address, length, expected in (
        ("192.0.2.200", 24, "open"),
        ("192.0.2.60", 24, "open"),
        ("192.0.2.70", 24, "reset"),
        ("2001:db8:0:5::9", 48, "open"),
        ("2001:db8:0:6::9", 48, "reset"),
    ):
        lab.client.ip("addr", "add", f"{address}/{length}", "dev", "c0", *(("nodad",) if ":" in address else ()))
        assert lab.look(address) == expected, address
        assert lab.ask(address) == ("answered" if expected == "open" else "refused"), address


def test_loopback_and_the_host_s_own_calls(lab: Lab) -> None:
    """Row 6: the host reaches its own protected port, by any of its addresses, and the client's."""
    lab.gate()
    service = Service(lab.client, SSH, "tcp")
    try:
        for address in ("127.0.0.1", "::1", HOST4, HOST6, CLIENT4, CLIENT6):
            one = lab.host.socket(10 if ":" in address else 2, 1)
            one.settimeout(2)
            one.connect((address, SSH))
            assert one.recv(100)
            one.close()
    finally:
        service.stop()


def test_calls_from_a_protected_port_are_answered(lab: Lab) -> None:
    """The host calls out from a protected port's number: what comes back is an answer and no call."""
    lab.gate(protected_ports=["22/tcp", "40404/tcp", "51820/udp"])
    service = Service(lab.client, 443, "tcp")
    try:
        for address, bound in ((CLIENT4, HOST4), (CLIENT6, HOST6)):
            one = lab.host.socket(10 if ":" in address else 2, 1)
            one.settimeout(2)
            one.bind((bound, 40404))
            one.connect((address, 443))
            assert one.recv(100)
            one.close()
    finally:
        service.stop()


def test_a_full_conntrack_table(lab: Lab) -> None:
    """Row 11: full of flows that nobody answered: the owner gets in, everyone else stays out."""
    lab.gate()
    limit = int(lab.host.run("sysctl", "-n", "net.netfilter.nf_conntrack_max"))
    if limit > 300000:
        pytest.skip("conntrack holds too many flows here to fill it in a test's time")

    def count() -> int:
        return int(lab.host.run("sysctl", "-n", "net.netfilter.nf_conntrack_count"))

    for first in range(0, 3 * limit, 50000):
        lab.flood(first, 50000, 9999, "udp")
        if count() >= limit * 0.99:
            break
    assert count() >= limit * 0.99
    stranger, owner = lab.source(), lab.source()
    assert lab.look(stranger) != "open"

    def gets_in() -> bool:
        lab.knock(owner)
        return lab.look(owner) == "open"

    wait_for(gets_in, 10, "the owner gets in")
    assert lab.look(stranger) != "open"
    assert lab.ask(stranger, WIREGUARD) != "answered"


def test_fragments_are_judged_whole(lab: Lab) -> None:
    """A datagram in pieces, of which only the first has a port."""
    from scapy.layers.inet import IP, fragment

    lab.gate()
    lab.wire.drain()
    for piece in fragment(IP(src=CLIENT4, dst=HOST4, id=77) / UDP(sport=5555, dport=WIREGUARD) / (b"x" * 64), 24):
        lab.wire.send(piece)
    answers = lab.wire.received(0.3, lambda _: False)
    assert not any(UDP in answer and answer[UDP].sport == WIREGUARD for answer in answers)
