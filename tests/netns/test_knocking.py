# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What opens the gate, and what does not."""

from __future__ import annotations

import time

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from netlab import HOST4, SEQUENCE, SSH, WIREGUARD, Lab, network
from scapy.layers.inet import TCP, UDP

FIRST, SECOND, THIRD = SEQUENCE
# Neither a knock nor, with the seed of these tests, a tripwire.
OTHER = Knock(40001, "tcp")
GUARDS = ("tripwires", "strict", "loose")
FAMILIES = (4, 6)


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_sequence_opens_for_its_source_alone(lab: Lab, guard: str, family: int) -> None:
    lab.gate(guard=guard)
    knocker, other = lab.source(family), lab.source(family)
    assert (lab.look(knocker), lab.ask(knocker)) == ("reset", "refused")
    lab.knock(knocker)
    assert (lab.look(knocker), lab.ask(knocker)) == ("open", "answered")
    assert (lab.look(other), lab.ask(other)) == ("reset", "refused")


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize(
    "knocks",
    [
        pytest.param((SECOND, FIRST, THIRD), id="wrong order"),
        pytest.param((FIRST, THIRD), id="one missing"),
        pytest.param((SECOND, THIRD), id="first missing"),
        pytest.param((FIRST, SECOND), id="last missing"),
        pytest.param((FIRST, Knock(SECOND.port, "tcp"), THIRD), id="wrong protocol"),
        pytest.param((THIRD, SECOND, FIRST), id="backwards"),
    ],
)
def test_another_order_does_not_open(lab: Lab, guard: str, knocks: tuple[Knock, ...]) -> None:
    lab.gate(guard=guard)
    for family in FAMILIES:
        source = lab.source(family)
        lab.touch(source, *knocks)
        assert lab.look(source) == "reset"


@pytest.mark.parametrize("guard", GUARDS)
def test_a_service_on_a_knock_s_port_works_on(lab: Lab, guard: str) -> None:
    """As with a sequence given by hand: it answers everyone, and its port counts as a knock all the same."""
    lab.serve(FIRST.port)
    lab.gate(guard=guard)
    for family in FAMILIES:
        source = lab.source(family)
        assert lab.look(source, FIRST.port) == "open"
        assert lab.look(source) == "reset"
        lab.knock(source)
        assert (lab.look(source), lab.look(source, FIRST.port)) == ("open", "open")


@pytest.mark.parametrize("guard", GUARDS)
def test_each_packet_twice_opens(lab: Lab, guard: str) -> None:
    lab.gate(guard=guard)
    for family in FAMILIES:
        source = lab.source(family)
        lab.touch(source, *(knock for knock in SEQUENCE for _ in range(2)))
        assert lab.look(source) == "open"


@pytest.mark.parametrize("guard", GUARDS)
def test_starting_again_in_the_middle_opens(lab: Lab, guard: str) -> None:
    lab.gate(guard=guard)
    for family in FAMILIES:
        source = lab.source(family)
        lab.touch(source, FIRST, SECOND, *SEQUENCE)
        assert lab.look(source) == "open"


@pytest.mark.parametrize(("guard", "between"), [("tripwires", "open"), ("strict", "reset"), ("loose", "open")])
def test_another_port_between(lab: Lab, guard: str, between: str) -> None:
    lab.gate(guard=guard)
    for family in FAMILIES:
        source = lab.source(family)
        lab.touch(source, FIRST, OTHER, SECOND, THIRD)
        assert lab.look(source) == between


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_a_tripwire_between_resets(lab: Lab, proto: str) -> None:
    model = lab.gate()
    tripwire = Knock(model["tripwires"][0], proto)
    for family in FAMILIES:
        source = lab.source(family)
        lab.touch(source, FIRST, SECOND, tripwire, THIRD)
        assert lab.look(source) == "reset"
        lab.knock(source)
        assert lab.look(source) == "open", "a reset is not a lockout"


@pytest.mark.parametrize("guard", GUARDS)
def test_a_touch_of_a_protected_port_does_not_reset(lab: Lab, guard: str) -> None:
    lab.gate(guard=guard)
    for family in FAMILIES:
        source = lab.source(family)
        protected = (Knock(SSH, "tcp"), Knock(WIREGUARD, "udp"))
        lab.touch(source, FIRST, *protected, SECOND, *protected, THIRD)
        assert lab.look(source) == "open"


def test_too_slow_and_other_packets_do_not_help(lab: Lab) -> None:
    """The step timeout counts from the last right knock, whatever else comes in between."""
    lab.gate(step_timeout=2)
    slow, kept, quick = (lab.source() for _ in range(3))
    lab.touch(slow, FIRST)
    lab.touch(kept, FIRST, SECOND)
    for _ in range(23):
        time.sleep(0.1)
        lab.touch(kept, OTHER, SECOND)
    lab.touch(slow, SECOND, THIRD)
    lab.touch(kept, THIRD)
    assert (lab.look(slow), lab.look(kept)) == ("reset", "reset")
    for knock in SEQUENCE:
        lab.touch(quick, knock)
        time.sleep(1.2)
    assert lab.look(quick) == "open"


def test_the_window_ends_and_the_session_does_not(lab: Lab) -> None:
    lab.gate(open_window=5)
    for family in FAMILIES:
        source = lab.source(family)
        lab.knock(source)
        state, session = lab.connect(source)
        assert state == "open"
        set_name = "open4" if family == 4 else "open6"
        lab.host.nft(f"flush set inet fleet_portknock {set_name}")
        assert lab.look(source) == "reset"
        session.send(b"still here")
        assert session.recv(100) == b"still here"


def test_the_kernel_closes_the_window(lab: Lab) -> None:
    lab.gate(open_window=5)
    source = lab.source()
    lab.knock(source)
    opened = time.monotonic()
    while lab.look(source) == "open":
        assert time.monotonic() < opened + 7
        time.sleep(0.1)
    assert time.monotonic() > opened + 4.5


def test_several_operators_and_generations(lab: Lab) -> None:
    others = [
        [Knock(50001, "tcp"), Knock(41007, "tcp"), Knock(61009, "tcp")],
        [Knock(50011, "tcp"), Knock(41017, "udp"), Knock(61019, "tcp"), Knock(31021, "tcp")],
    ]
    lab.gate(sequences={"default": [SEQUENCE], "a.b@c": others}, guard="strict")
    for sequence in (list(SEQUENCE), *others):
        source = lab.source()
        lab.touch(source, *sequence)
        assert lab.look(source) == "open"
    mixed = lab.source()
    lab.touch(mixed, others[0][0], others[1][1], others[0][2])
    assert lab.look(mixed) == "reset"


def test_a_first_knock_that_is_expected_does_not_start_anew(lab: Lab) -> None:
    """Given by hand, the first knock of one may stand inside another."""
    inside = [Knock(50001, "tcp"), FIRST, Knock(61009, "tcp")]
    lab.gate(sequences={"a": [SEQUENCE], "b": [inside]})
    one, two = lab.source(), lab.source()
    lab.touch(one, *inside)
    lab.touch(two, *SEQUENCE)
    assert (lab.look(one), lab.look(two)) == ("open", "open")


@pytest.mark.parametrize("flags", ["A", "F", "", "FPU", "SF", "SA", "R", "FA"])
def test_only_a_bare_syn_counts(lab: Lab, flags: str) -> None:
    """Neither as a knock nor as a wrong port."""
    lab.gate(guard="strict")
    source = lab.source()

    def packet(port: int) -> None:
        lab.wire.send(network(source, HOST4) / TCP(sport=lab.source_port(), dport=port, flags=flags))

    packet(FIRST.port)
    lab.touch(source, SECOND, THIRD)
    assert lab.look(source) == "reset"
    lab.touch(source, FIRST)
    packet(OTHER.port)
    lab.touch(source, SECOND)
    packet(OTHER.port)
    lab.touch(source, THIRD)
    assert lab.look(source) == "open"


def test_a_datagram_of_a_known_flow_does_not_count(lab: Lab) -> None:
    """Answers to what the host asked for, for one."""
    lab.gate(guard="strict")
    source = lab.source()
    asking = lab.host.socket(2, 2)
    asking.bind((HOST4, OTHER.port))
    asking.sendto(b"question", (source, 53))
    lab.touch(source, FIRST)
    lab.wire.send(network(source, HOST4) / UDP(sport=53, dport=OTHER.port) / b"answer")
    assert asking.recv(100) == b"answer"
    asking.close()
    lab.touch(source, SECOND, THIRD)
    assert lab.look(source) == "open"
