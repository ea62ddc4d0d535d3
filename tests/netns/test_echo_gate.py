# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""icmp knocks at the role's own gate: echo requests by the length of their payload, alone and among other knocks."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._card import CardHost, card_files
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import (
    Address,
    KnockResult,
    knock_until_closed,
    knock_until_open,
)
from ansible_collections.fleet.portknock.plugins.module_utils._nft import TABLE, listing_digests, replace_transaction
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._sequences import ECHO_LENGTHS
from netlab import CLIENT4, CLIENT6, HOST4, HOST6, SEQUENCE, SSH, Lab, network
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest
from scapy.packet import Packet

FAMILIES = (4, 6)
ALONE = tuple(Knock(length, "icmp") for length in (731, 188, 1190))
MIXED = (Knock(417, "icmp"), Knock(30222, "tcp"), Knock(1043, "icmp"), Knock(48396, "udp"))
AFTER_TCP = (Knock(29161, "tcp"), Knock(613, "icmp"), Knock(41873, "tcp"))
KINDS = {"icmp alone": ALONE, "among others": MIXED, "in the middle": AFTER_TCP}
PROBE = {"socket_wildcard": True, "one_time": True, "echo": True}


def gate(lab: Lab, *sequences: tuple[Knock, ...], **options: Any) -> dict[str, Any]:
    return lab.gate(**{"sequences": {"default": sequences or (ALONE,)}, "probe": PROBE, **options})


def place(source: str) -> Address:
    return Address(socket.AF_INET6, (HOST6, SSH, 0, 0)) if ":" in source else Address(socket.AF_INET, (HOST4, SSH))


def knock(lab: Lab, source: str, *knocks: Knock, seconds: float = 3.0) -> KnockResult:
    """As the clients do it."""
    with lab.client.inside():
        return knock_until_open([place(source)], knocks, SSH, seconds, source=source)


def request(source: str, length: int, number: int = 7, host: str = "") -> Packet:
    """What ``ping -s`` sends: one program has one number for all of its packets."""
    echo = ICMPv6EchoRequest(id=number) if ":" in source else ICMP(id=number)
    return network(source, host or (HOST6 if ":" in source else HOST4)) / echo / bytes(length)


def ping(lab: Lab, source: str, *lengths: int, **options: Any) -> None:
    """By packets on the wire, in order; what follows by sockets comes after them."""
    for length in lengths:
        lab.wire.send(request(source, length, **options))


def lengths_of(knocks: tuple[Knock, ...]) -> list[int]:
    return [knock.port for knock in knocks]


@pytest.mark.parametrize("guard", ["tripwires", "strict", "loose"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_they_open(lab: Lab, family: int, kind: str, guard: str) -> None:
    gate(lab, KINDS[kind], guard=guard)
    knocker, other = lab.source(family), lab.source(family)
    assert lab.look(knocker) == "reset"
    result = knock(lab, knocker, *KINDS[kind])
    assert (result.state, result.attempts) == ("open", 1)
    assert (lab.look(knocker), lab.look(other)) == ("open", "reset")


@pytest.mark.parametrize("number", [7, None], ids=["one process", "a process each"])
@pytest.mark.parametrize("family", FAMILIES)
def test_whoever_pings(lab: Lab, family: int, number: int | None) -> None:
    """To conntrack the packets of one process are one flow, answered before the next comes."""
    gate(lab)
    source, reply = lab.source(family), ICMPv6EchoReply if family == 6 else ICMP
    for index, length in enumerate(lengths_of(ALONE)):
        lab.wire.drain()
        ping(lab, source, length, number=number or 100 + index)
        assert any(reply in one for one in lab.wire.received(2, lambda packets: any(reply in one for one in packets)))
    assert lab.look(source) == "open"


@pytest.mark.parametrize("guard", ["tripwires", "strict", "loose"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_pings_are_no_attack(lab: Lab, family: int, guard: str) -> None:
    """What ping sends by itself, of any system, and the largest that fit: in the middle of a knock they change nothing."""
    gate(lab, guard=guard)
    source = lab.source(family)
    for length in lengths_of(ALONE):
        ping(lab, source, 0, 8, 32, 56, 64, 1400, 1452)
        ping(lab, source, length)
        ping(lab, source, length, 56)
    assert lab.look(source) == "open"


@pytest.mark.parametrize(("guard", "expected"), [("tripwires", "open"), ("strict", "reset"), ("loose", "open")])
@pytest.mark.parametrize("family", FAMILIES)
def test_another_length_on_the_way(lab: Lab, family: int, guard: str, expected: str) -> None:
    model = gate(lab, guard=guard)
    first, *rest = lengths_of(ALONE)
    wrong = next(length for length in ECHO_LENGTHS if length not in (*model["echo"]["tripwires"], *lengths_of(ALONE)))
    source = lab.source(family)
    ping(lab, source, first, wrong, *rest)
    assert lab.look(source) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_tripwires_reset(lab: Lab, family: int) -> None:
    """Lengths reset progress that ports have made, and the other way round."""
    model = gate(lab, ALONE, AFTER_TCP)
    assert len(model["echo"]["tripwires"]) == 200
    source, other = lab.source(family), lab.source(family)
    first, *rest = lengths_of(ALONE)
    ping(lab, source, first, model["echo"]["tripwires"][77], *rest)
    assert lab.look(source) == "reset"
    lab.touch(other, AFTER_TCP[0])
    ping(lab, other, model["echo"]["tripwires"][5], AFTER_TCP[1].port)
    lab.touch(other, AFTER_TCP[2])
    assert lab.look(other) == "reset"
    ping(lab, source, first)
    lab.touch(source, Knock(model["tripwires"][3], "udp"))
    ping(lab, source, *rest)
    assert lab.look(source) == "reset"


@pytest.mark.parametrize("guard", ["tripwires", "strict"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_over_all_lengths_opens_nothing(lab: Lab, family: int, guard: str) -> None:
    gate(lab, guard=guard)
    source = lab.source(family)
    lab.client.run("sysctl", "-qw", "net.ipv4.icmp_ratelimit=0")
    for lengths in (ECHO_LENGTHS, reversed(ECHO_LENGTHS)):
        ping(lab, source, *lengths)
    assert lab.look(source) == "reset"


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_for_itself_and_no_reply_counts(lab: Lab, family: int) -> None:
    gate(lab)
    source = lab.source(family)
    first, second, third = lengths_of(ALONE)
    ping(lab, source, first, second)
    reply = ICMPv6EchoReply(id=7) if family == 6 else ICMP(type=0, id=7)
    lab.wire.send(network(source, lab.host_of(source)) / reply / bytes(third))
    ping(lab, lab.source(10 - family), third)
    assert lab.look(source) == "reset"
    ping(lab, source, third)
    assert lab.look(source) == "open"


def test_what_is_not_for_the_host_does_not_count(lab: Lab) -> None:
    gate(lab)
    source = lab.source()
    ping(lab, source, *lengths_of(ALONE), host="192.0.2.255")
    ping(lab, source, *lengths_of(ALONE), host="192.0.2.77")
    assert lab.look(source) == "reset"
    assert lab.count("at4") == 0


def test_link_local_goes_by_the_interface(lab: Lab) -> None:
    lab.client.ip("addr", "add", "fe80::77/64", "dev", "c0", "nodad")
    lab.host.ip("addr", "add", "fe80::1/64", "dev", "h0", "nodad")
    gate(lab)
    ping(lab, "fe80::77", *lengths_of(ALONE), host="fe80::1")
    assert lab.look("fe80::77%c0", host="fe80::1%c0") == "open"
    assert (lab.count("open_ll6"), lab.count("open6")) == (1, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_answers_as_it_always_did(lab: Lab, family: int) -> None:
    """Knock or not, byte for byte; and silent where the host's own filter is."""
    source = CLIENT6 if family == 6 else CLIENT4
    reply = ICMPv6EchoReply if family == 6 else ICMP

    def answers() -> list[bytes]:
        shown = []
        for length in (*lengths_of(ALONE), 500, 56):
            lab.wire.drain()
            ping(lab, source, length)
            got = [
                one
                for one in lab.wire.received(0.5, lambda packets: any(reply in one for one in packets))
                if reply in one
            ]
            for one in got:
                if IP in one:
                    one[IP].id = one[IP].chksum = 0
                else:
                    one.fl = int(one.fl != 0)
            shown.append(b"".join(bytes(one) for one in got))
        return shown

    before = answers()
    gate(lab)
    assert answers() == before
    assert all(before)
    lab.policy("icmp type echo-request drop\n icmpv6 type echo-request drop", "accept")
    assert answers() == [b""] * 5
    assert knock(lab, lab.source(family), *ALONE).state == "open"


@pytest.mark.parametrize("family", FAMILIES)
def test_with_everything_else(lab: Lab, family: int) -> None:
    """Single use, a close sequence, one's own record, and all other ports closed."""
    close = (Knock(333, "icmp"), Knock(999, "icmp"), Knock(666, "icmp"))
    gate(lab, MIXED, single_use=True, close={"default": [close]}, input_policy="drop", open_window=600)
    source = lab.source(family)
    assert knock(lab, source, *MIXED).state == "open"
    assert lab.look(source) == "silent"
    ping(lab, source, 417)
    assert knock(lab, source, *MIXED).state == "open"
    lab.touch(source, MIXED[1])
    with lab.client.inside():
        assert knock_until_closed([place(source)], [close], SSH, 5.0, source=source).state == "filtered"
    assert lab.count(f"opened{family if family == 4 else 6}") == 1


def test_one_time_sequences_end_with_tcp(lab: Lab) -> None:
    stock = {1: (Knock(417, "icmp"), Knock(1043, "icmp"), Knock(30222, "tcp"))}
    lab.gate(one_time={"default": stock}, probe=PROBE)
    lab.host.nft(f"add element inet {TABLE} armed {{ 7:1 }}")
    source, other = lab.source(), lab.source()
    assert knock(lab, source, *stock[1]).state == "open"
    assert knock(lab, other, *stock[1], seconds=0.5).state == "reset"


def test_the_kernel_keeps_what_was_loaded(lab: Lab) -> None:
    """A table listed is the table that was loaded, whether by nft's words or again in place of itself; windows stay."""
    gate(lab, open_window=600)
    source = lab.source()
    assert knock(lab, source, *ALONE).state == "open"
    digests = listing_digests(lab.listing() or {})
    assert {"map step_ip", "map step_ip6", "chain echo"} <= {name.strip() for name in digests}, sorted(digests)
    lab.host.nft(replace_transaction(lab.text, lab.listing()))
    assert listing_digests(lab.listing() or {}) == digests
    assert lab.look(source) == "open"
    text = lab.host.run("nft", "list", "table", "inet", TABLE)
    lab.host.nft(f"delete table inet {TABLE}\n{text}")
    assert listing_digests(lab.listing() or {}) == digests
    assert knock(lab, lab.source(6), *ALONE).state == "open"
    lab.gate()
    assert not [name for name in listing_digests(lab.listing() or {}) if "echo" in name or "step_" in name]
    lab.knock(other := lab.source())
    assert lab.look(other) == "open"


def test_without_icmp_knocks_nothing_looks_at_pings(lab: Lab) -> None:
    text, model = lab.render(sequences={"default": [SEQUENCE]}, probe=PROBE)
    assert model["echo"] is None
    assert ("echo" in text.partition("knock_server_input_policy")[0], "step_ip" in text) == (False, False)


def test_a_host_that_can_not_tell_them(lab: Lab) -> None:
    with pytest.raises(
        PortknockError, match=r"^knock_server_sequence_protocols: expected no icmp knocks on a host whose nft"
    ):
        lab.render(sequences={"default": [ALONE]}, probe={**PROBE, "echo": False})


def test_the_card_has_ping(lab: Lab) -> None:
    """Its words are looked at here; ``test_card.py`` runs them where ping is."""
    text = card_files("alice", [CardHost("web1", HOST4, SSH, [MIXED])])["card.txt"].decode()
    assert f"ping -n -c 1 -W 1 -s 417 {HOST4}" in text
