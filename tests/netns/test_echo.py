# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Knocks that are echo requests, told apart by the length of their payload, at a gate of somebody else's."""

from __future__ import annotations

import socket

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import Address, KnockResult, knock_until_open
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from netlab import HOST4, HOST6, SSH, Lab
from scapy.layers.inet import ICMP
from scapy.layers.inet6 import ICMPv6EchoReply

FAMILIES = (4, 6)
# An odd one, and one that does not fit into a packet of the path's.
SEQUENCE = (Knock(301, "icmp"), Knock(40001, "udp"), Knock(3000, "icmp"))
HEADERS = {4: 20 + 8, 6: 40 + 8}
# As another program may have it: three steps and a window, by the length of packets.
GATE = """
table inet echo {{
{sets}
  chain pre {{
    type filter hook prerouting priority -200;
{steps}
  }}
  chain in {{
    type filter hook input priority 0;
    tcp dport {port} ip saddr @open4 accept
    tcp dport {port} ip6 saddr @open6 accept
    tcp dport {port} reject with tcp reset
  }}
}}
"""


def gate() -> str:
    first, second, third = SEQUENCE
    sets, steps = [], []
    for family, kind, saddr, request in (
        (4, "ipv4_addr", "ip saddr", "icmp type echo-request"),
        (6, "ipv6_addr", "ip6 saddr", "icmpv6 type echo-request"),
    ):
        sets += [
            f"  set {name}{family} {{ type {kind}; flags dynamic,timeout; timeout 10s; }}"
            for name in ("one", "two", "open")
        ]
        longer = HEADERS[family]
        steps += [
            f"    {request} meta length {first.port + longer} add @one{family} {{ {saddr} }}",
            f"    udp dport {second.port} {saddr} @one{family} add @two{family} {{ {saddr} }}",
            f"    {request} meta length {third.port + longer} {saddr} @two{family} add @open{family} {{ {saddr} }}",
        ]
    return GATE.format(sets="\n".join(sets), steps="\n".join(steps), port=SSH)


def knock(lab: Lab, source: str, *knocks: Knock) -> KnockResult:
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    host: tuple[object, ...] = (HOST6, SSH, 0, 0) if ":" in source else (HOST4, SSH)
    with lab.client.inside():
        return knock_until_open([Address(family, host)], knocks, SSH, 3.0, source=source)


# Whether the system has sockets for this to everybody's use, or to root's alone.
@pytest.mark.parametrize("groups", ["0 2147483647", "1 0"], ids=["for everybody", "for root"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_of_echo_requests_open(lab: Lab, family: int, groups: str) -> None:
    lab.client.run("sysctl", "-qw", f"net.ipv4.ping_group_range={groups}")
    # Fragments are put together before rules see them, as conntrack has it on most hosts.
    lab.host.nft("add table inet whole; add chain inet whole c { type filter hook prerouting priority -400; }")
    lab.host.nft("add rule inet whole c ct state new accept")
    lab.host.nft(gate())
    knocker, other = lab.source(family), lab.source(family)
    assert lab.look(knocker) == "reset"
    result = knock(lab, knocker, *SEQUENCE)
    assert (result.state, result.attempts) == ("open", 1)
    assert lab.look(other) == "reset"


def test_another_length_opens_nothing(lab: Lab) -> None:
    lab.host.nft(gate())
    source = lab.source()
    first, second, third = SEQUENCE
    assert knock(lab, source, first._replace(port=first.port + 1), second, third).state == "reset"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("groups", ["0 2147483647", "1 0"], ids=["for everybody", "for root"])
def test_the_host_answers_them(lab: Lab, family: int, groups: str) -> None:
    """So that what was sent is what ``ping -s`` sends, checksum and all."""
    lab.client.run("sysctl", "-qw", f"net.ipv4.ping_group_range={groups}")
    source = lab.source(family)
    lab.wire.drain()
    knock(lab, source, SEQUENCE[0])
    layer = ICMP if family == 4 else ICMPv6EchoReply

    def replies(packets: list) -> list:
        return [packet for packet in packets if layer in packet]

    (reply, *_more) = replies(lab.wire.received(2.0, lambda packets: bool(replies(packets))))
    payload = bytes(reply[layer].payload) if family == 4 else reply[layer].data
    assert len(payload) == SEQUENCE[0].port
