# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a source that has not knocked sees: a port like any other closed one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from netlab import CLIENT4, CLIENT6, HOST4, HOST6, SSH, WIREGUARD, Lab, network
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6
from scapy.packet import Packet

# Every combination that nmap's scans send, and some that none does.
FLAGS = ("S", "SEC", "SPU", "SF", "SR", "SA", "SFPU", "SRFA", "A", "PA", "AU", "F", "FA", "", "FPU", "P", "R", "RA")
CLOSED = 40002

_FAMILY = """
    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert } accept
"""
_SERVICES = """
    tcp dport { 22, 2222 } accept
    udp dport 51820 accept
"""
POLICIES = {
    "no firewall": None,
    "drop": f"{_FAMILY} ct state established,related accept\n{_SERVICES}",
    "drop invalid first": f"{_FAMILY} ct state invalid drop\n ct state established,related accept\n{_SERVICES}",
    "accept but drop invalid": "ct state invalid drop\n accept",
    "reset": f"{_FAMILY} ct state established,related accept\n{_SERVICES} meta l4proto tcp reject with tcp reset",
}


def _shows(lab: Lab, source: str, port: int, packet: Packet) -> list[str]:
    """What comes back, with the number of the port and what is drawn anew for each packet taken out."""
    lab.wire.drain()
    lab.wire.send(packet)
    # The host works through its packets in order: once the marker is answered, so is the probe.
    marker = lab.source_port()
    lab.wire.send(_marker(source, marker))
    answers = lab.wire.received(3, lambda packets: any(map(_is_marker(marker), packets)))
    assert any(map(_is_marker(marker), answers)), "the marker was not answered"
    return [_plain(answer, port) for answer in answers if _concerns(answer) and not _is_marker(marker)(answer)]


def _marker(source: str, number: int) -> Packet:
    host = HOST6 if ":" in source else HOST4
    return network(source, host) / TCP(sport=number, dport=443, flags="S")


def _is_marker(number: int) -> Callable[[Packet], bool]:
    return lambda packet: TCP in packet and packet[TCP].sport == 443 and packet[TCP].dport == number


def _concerns(packet: Packet) -> bool:
    return TCP in packet or UDP in packet or ICMP in packet or ICMPv6DestUnreach in packet


def _plain(packet: Packet, port: int) -> str:
    raw = bytes(packet)
    packet = type(packet)(raw)
    for name in ("chksum", "cksum"):
        layer: Any = packet
        while layer:
            if name in layer.fields:
                # Right or wrong is what matters; the value follows from the numbers that differ anyway.
                sent = layer.fields[name]
                rebuilt = type(packet)(raw)
                target: Any = rebuilt.getlayer(type(layer))
                if "error" not in type(layer).__name__:
                    del target.fields[name]
                    target = type(packet)(bytes(rebuilt)).getlayer(type(layer))
                    setattr(layer, name, int(sent == target.fields[name]))
                else:
                    setattr(layer, name, 0)
            layer = layer.payload
    layer = packet
    while layer:
        for name in ("sport", "dport"):
            if getattr(layer, name, None) == port:
                setattr(layer, name, 1)
        if isinstance(layer, IPv6) or "IPv6" in type(layer).__name__:
            if "fl" in layer.fields:
                layer.fl = int(layer.fl != 0)
        elif "id" in layer.fields and isinstance(layer, IP):
            layer.id = int(layer.id != 0)
        layer = layer.payload
    return repr(packet)


@pytest.fixture(params=sorted(POLICIES))
def firewalled(lab: Lab, request: pytest.FixtureRequest) -> Lab:
    """A host whose firewall lets its services in, and one port that always answers, for the tests' markers."""
    rules = POLICIES[request.param]
    if rules is not None:
        lab.policy("tcp dport 443 accept\n" + rules)
    for setting in ("net.ipv4.icmp_ratelimit=0", "net.ipv6.icmp.ratelimit=0"):
        lab.host.run("sysctl", "-qw", setting)
    return lab


@pytest.mark.parametrize("source", [CLIENT4, CLIENT6])
def test_every_flag_pattern_and_udp(firewalled: Lab, source: str) -> None:
    """18 patterns of TCP flags and UDP, each with the same numbers to the protected port and to a closed one."""
    lab = firewalled
    lab.gate()
    host = lab.host_of(source)
    differences = []
    for flags in FLAGS:
        for _again in range(2):
            sport = lab.source_port()
            header: dict[str, Any] = {"sport": sport, "flags": flags, "seq": 1000, "ack": 2000, "window": 1024}
            protected = _shows(lab, source, SSH, network(source, host) / TCP(dport=SSH, **header))
            closed = _shows(lab, source, CLOSED, network(source, host) / TCP(dport=CLOSED, **header))
            if protected != closed:
                differences.append((flags, protected, closed))
    for payload in (b"", b"x" * 64):
        sport = lab.source_port()
        protected = _shows(lab, source, WIREGUARD, network(source, host) / UDP(sport=sport, dport=WIREGUARD) / payload)
        closed = _shows(lab, source, CLOSED, network(source, host) / UDP(sport=sport, dport=CLOSED) / payload)
        if protected != closed:
            differences.append(("udp", protected, closed))
    assert not differences


@pytest.mark.parametrize("source", [CLIENT4, CLIENT6])
def test_one_flow_again_and_again(lab: Lab, source: str) -> None:
    """From one source port to all of them: the protected one, its stand-in and a closed one, mixed."""
    model = lab.gate()
    stand_in = model["look_tcp"][0]["stand_in"]
    host, sport = lab.host_of(source), lab.source_port()
    for flags in ("F", "S", "A", "FPU", "S", "F", "S"):
        shown = [
            _shows(lab, source, port, network(source, host) / TCP(sport=sport, dport=port, flags=flags, seq=7, ack=9))
            for port in (SSH, stand_in, CLOSED, stand_in, SSH)
        ]
        assert all(one == shown[0] for one in shown), flags
        assert len(shown[0]) == 1
        assert "flags=RA" in shown[0][0] or "flags=R " in shown[0][0]


def test_a_flood_of_one_flow_changes_nothing(lab: Lab) -> None:
    lab.gate()
    sport = lab.source_port()
    for flags in ("F", "S"):
        packet = network(CLIENT4, HOST4) / TCP(sport=sport, dport=SSH, flags=flags)
        for _ in range(200):
            lab.wire.send(packet)
        assert len(_shows(lab, CLIENT4, SSH, packet)) == 1


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(("response", "tcp", "udp"), [("drop", "silent", "silent"), ("reset", "reset", "refused")])
def test_a_chosen_answer(lab: Lab, family: int, response: str, tcp: str, udp: str) -> None:
    lab.gate(closed_response=response)
    source = lab.source(family)
    assert (lab.look(source), lab.ask(source)) == (tcp, udp)
    lab.knock(source)
    assert (lab.look(source), lab.ask(source)) == ("open", "answered")


def test_an_interface_without_an_address(lab: Lab) -> None:
    """Row 9: the host's address is on another interface than the packets come in by."""
    lab.host.ip("addr", "flush", "dev", "h0", "scope", "global")
    lab.host.ip("addr", "add", f"{HOST4}/32", "dev", "lo")
    lab.host.ip("route", "add", "192.0.2.0/24", "dev", "h0", "src", HOST4)
    lab.gate()
    source = lab.source()
    assert (lab.look(source), lab.look(source, CLOSED)) == ("reset", "reset")
    assert (lab.ask(source), lab.ask(source, CLOSED)) == ("refused", "refused")
    lab.knock(source)
    assert (lab.look(source), lab.ask(source)) == ("open", "answered")


def test_stand_ins_are_low_and_differ(lab: Lab) -> None:
    """Row 9: no user of the host can wait on one, and each tcp port has its own."""
    model = lab.gate(protected_ports=["22/tcp", "2222/tcp", "8443/tcp", "51820/udp"])
    stand_ins = [pair["stand_in"] for pair in model["look_tcp"]]
    assert len(set(stand_ins)) == 3
    assert max(stand_ins) < 1024
    for port in (22, 2222, 8443):
        assert lab.look(lab.source(), port) == "reset"


@pytest.mark.parametrize("source", [CLIENT4, CLIENT6])
def test_knocks_and_tripwires_look_closed(firewalled: Lab, source: str) -> None:
    """Row 14: nothing is answered differently for being a knock or a tripwire."""
    lab = firewalled
    model = lab.gate()
    host, sport = lab.host_of(source), lab.source_port()
    for layer in (lambda port: TCP(sport=sport, dport=port, flags="S"), lambda port: UDP(sport=sport, dport=port)):
        shown = [
            _shows(lab, source, port, network(source, host) / layer(port))
            for port in (CLOSED, 48396, 39508, 30222, model["tripwires"][0])
        ]
        assert all(one == shown[0] for one in shown)
