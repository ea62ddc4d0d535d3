# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What packets cost, and what floods of them do."""

from __future__ import annotations

import random
import statistics
import time

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from netlab import CLIENT4, HOST4, NFT, SEQUENCE, Lab, network
from scapy.layers.inet import TCP

FIRST, SECOND, THIRD = SEQUENCE


@pytest.mark.parametrize("guard", ["tripwires", "strict", "loose"])
@pytest.mark.parametrize("family", [4, 6])
def test_every_port_costs_one_new_element(lab: Lab, guard: str, family: int) -> None:
    """Row 5: a knock, a tripwire and any other port, each from a source that is new, leave one element behind."""
    model = lab.gate(guard=guard, step_timeout=60)
    tripwires = model["tripwires"] or [40009]
    ports = (FIRST, SECOND, Knock(tripwires[0], "tcp"), Knock(40001, "tcp"), Knock(40001, "udp"))
    for knock in ports:
        lab.touch(lab.source(family), knock)
    # In the background what nobody reads goes again after a second.
    progress, idle = lab.count(f"at{family}"), lab.count("idle")
    assert (progress, idle) == (1, len(ports) - 1)


def test_candidate_ports_by_their_time(lab: Lab) -> None:
    """Row 5: reported, never judged: where a knock's port stands among 200 candidates by the time of its answer."""
    lab.gate(step_timeout=1)
    choice = random.Random(5)
    candidates = [FIRST.port, THIRD.port, *choice.sample(range(20000, 30000), 198)]
    times: dict[int, list[int]] = {port: [] for port in candidates}
    sport = lab.source_port()
    for _ in range(15):
        choice.shuffle(candidates)
        for port in candidates:
            frame = lab.wire.frame(network(CLIENT4, HOST4) / TCP(sport=sport, dport=port, flags="S"))
            lab.wire.drain()
            began = time.perf_counter_ns()
            lab.wire.socket.setblocking(True)
            lab.wire.socket.send(frame)
            while True:
                data = lab.wire.socket.recv(2048)
                if data[12:14] == b"\x08\x00" and data[23] == 6 and data[34:36] == port.to_bytes(2, "big"):
                    break
            times[port].append(time.perf_counter_ns() - began)
    ranked = sorted(times, key=lambda port: -statistics.median(times[port]))
    print(
        f"\nrank of the first knock {ranked.index(FIRST.port) + 1}, of a later one {ranked.index(THIRD.port) + 1}, of 200"
    )
    assert all(len(seen) == 15 for seen in times.values())


def test_a_tripwire_is_no_used_port_and_no_traceroute(lab: Lab) -> None:
    """Row 14."""
    used = frozenset(range(1024, 5000))
    model = lab.gate(tripwires=20000, avoid=used)
    tripwires = set(model["tripwires"])
    assert len(tripwires) == 20000
    assert not tripwires & used
    assert not tripwires & set(range(33434, 33535))
    assert not tripwires & {knock.port for knock in SEQUENCE}
    assert not tripwires & {22, 51820}


def test_only_new_local_calls_trip(lab: Lab) -> None:
    """Row 14: not what belongs to a session, is for another host, or is no call at all."""
    model = lab.gate()
    tripwire = model["tripwires"][0]
    source = lab.source()
    for flags in ("A", "R", "F", "", "SA"):
        lab.touch(source, FIRST)
        lab.wire.send(network(source, HOST4) / TCP(sport=lab.source_port(), dport=tripwire, flags=flags))
        lab.wire.send(network(source, "198.51.100.9") / TCP(sport=lab.source_port(), dport=tripwire, flags="S"))
        lab.wire.send(network(source, "192.0.2.255") / TCP(sport=lab.source_port(), dport=tripwire, flags="S"))
        lab.touch(source, SECOND, THIRD)
        assert lab.look(source) == "open", flags
        lab.host.nft("flush set inet fleet_portknock open4")


def test_a_flood_of_first_knocks_does_not_lock_the_owner_out(lab: Lab) -> None:
    """100,000 spoofed sources that all know the first knock, within the step timeout, at the size that is the default."""
    sequence = (Knock(48396, "udp"), SECOND, THIRD)
    lab.gate(sequences={"default": [sequence]}, guard="strict", step_timeout=30)
    owner = lab.source()
    lab.flood(0, 50000, 48396, "udp")
    lab.touch(owner, sequence[0])
    lab.flood(50000, 50000, 48396, "udp")
    lab.touch(owner, *sequence[1:])
    assert lab.look(owner) == "open"


def test_a_flood_of_wrong_ports_does_not_lock_the_owner_out(lab: Lab) -> None:
    """Even where it fills the set of sources that did nothing: progress has its own."""
    lab.gate(max_sources=1000)
    owner = lab.source()
    lab.touch(owner, FIRST)
    lab.flood(0, 5000, 40001, "tcp")
    lab.touch(owner, SECOND, THIRD)
    assert lab.look(owner) == "open"
    assert lab.look(lab.source()) == "reset"


def test_a_flood_of_calls_to_the_protected_port(lab: Lab) -> None:
    """More than the look remembers: silence for some of them, and an open port for none."""
    lab.gate(max_sources=1000)
    owner = lab.source()
    lab.knock(owner)
    lab.flood(0, 5000, 22, "tcp")
    assert lab.look(owner) == "open"
    assert lab.look(lab.source()) != "open"


def test_what_the_rules_write_is_given_back(lab: Lab) -> None:
    """The scratch register is other people's traffic class, and the packet mark is not touched at all."""
    lab.host.nft(
        "table inet spy {\n counter marked { }\n counter classed { }\n"
        "chain after { type filter hook prerouting priority 0;\n"
        "meta mark != 0x77 counter name marked\n meta priority != 0:0 counter name classed\n}\n"
        "chain before { type filter hook prerouting priority -180;\n meta mark set 0x77\n}\n}\n"
    )
    model = lab.gate()
    for family in (4, 6):
        source = lab.source(family)
        lab.touch(source, FIRST, Knock(40001, "tcp"), Knock(model["tripwires"][0], "udp"), *SEQUENCE)
        assert lab.look(source) == "open"
    for name in ("marked", "classed"):
        assert "packets 0 " in lab.host.run(*NFT, "list", "counter", "inet", "spy", name)
