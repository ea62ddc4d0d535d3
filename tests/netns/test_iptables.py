# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The gate in iptables' own language, in each of its variants, seen from outside as the one of nftables is.

The tests that are imported are those of the nftables gate: what they see must not depend on what enforces it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._procnet import Peer
from ansible_collections.fleet.portknock.plugins.module_utils._system import SEARCH_PATH
from iptlab import COMMANDS, VARIANTS, IptablesLab
from netlab import CLIENT4, CLIENT6, HOST4, PUBLISHED, SEQUENCE, SSH, WIREGUARD, network, wait_for
from scapy.layers.inet import TCP, UDP
from scapy.packet import Packet
from test_echo_gate import test_another_length_on_the_way as another_length_on_the_way
from test_echo_gate import test_ordinary_pings_are_no_attack as ordinary_pings_are_no_attack
from test_echo_gate import test_they_open as icmp_knocks_open
from test_echo_gate import test_tripwires_reset as lengths_that_are_tripwires_reset
from test_forward import CONTAINER4, CONTAINER6, put_container
from test_forward import test_a_published_port_is_gated_by_name as a_published_port_is_gated_by_name
from test_forward import test_forwarded_packets_are_no_knocks as test_forwarded_packets_are_no_knocks
from test_forward import test_forwarded_traffic_is_left_alone as test_forwarded_traffic_is_left_alone
from test_input_policy import close, serve_more
from test_input_policy import test_an_open_port_that_is_led_elsewhere as test_an_open_port_that_is_led_elsewhere
from test_input_policy import test_answers_to_datagrams_come_in as test_answers_to_datagrams_come_in
from test_input_policy import test_dhcp_answers_come_in as test_dhcp_answers_come_in
from test_input_policy import test_neighbours_are_found as test_neighbours_are_found
from test_input_policy import test_pings_are_answered as test_pings_are_answered
from test_input_policy import test_the_first_load_cuts_no_session as the_first_load_cuts_no_session
from test_input_policy import test_the_path_tells_its_mtu as test_the_path_tells_its_mtu
from test_input_policy import test_what_is_open_is_all_that_is as what_is_open_is_all_that_is
from test_lock import test_a_session_older_than_the_gate_lives_on as a_session_older_than_the_gate_lives_on
from test_lock import (
    test_calls_from_a_protected_port_are_answered as test_calls_from_a_protected_port_are_answered,
)
from test_lock import test_fragments_are_judged_whole as test_fragments_are_judged_whole
from test_lock import test_loopback_and_the_host_s_own_calls as test_loopback_and_the_host_s_own_calls
from test_lock import test_odd_packets_first as test_odd_packets_first
from test_lock import (
    test_progress_by_network_and_window_by_address as test_progress_by_network_and_window_by_address,
)
from test_lock import test_the_same_datagram_flow_after_the_knock as test_the_same_datagram_flow_after_the_knock
from test_lock import test_the_same_flow_after_the_window as test_the_same_flow_after_the_window
from test_lock import test_trusted_sources_never_knock as test_trusted_sources_never_knock
from test_lock import test_untracked_packets as untracked_packets
from test_look import CLOSED, FLAGS, _shows
from test_look import test_a_chosen_answer as test_a_chosen_answer
from test_look import test_a_flood_of_one_flow_changes_nothing as test_a_flood_of_one_flow_changes_nothing
from test_look import test_an_interface_without_an_address as test_an_interface_without_an_address
from test_look import test_stand_ins_are_low_and_differ as test_stand_ins_are_low_and_differ

WATCH = Path(__file__).resolve().parents[2] / "roles/knock_server/templates/nftables/watch.py"
LOAD = Path(__file__).resolve().parents[2] / "roles/knock_server/templates/common/load.sh"
TABLES = ("security", "mangle", "filter", "nat", "raw")
WRONG = Knock(40001, "tcp")

# A host's own rules: the policy, and what it says in INPUT.
_SERVICES = [
    "-p tcp -m multiport --dports 22,443 -j ACCEPT",
    "-p udp --dport 51820 -j ACCEPT",
]
_ESTABLISHED = "-m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"
_INVALID = "-m conntrack --ctstate INVALID -j DROP"
POLICIES: dict[str, tuple[str, list[str]]] = {
    "no firewall": ("ACCEPT", []),
    "drop": ("DROP", [_ESTABLISHED, *_SERVICES]),
    "drop invalid first": ("DROP", [_INVALID, _ESTABLISHED, *_SERVICES]),
    "accept but drop invalid": ("ACCEPT", [_INVALID]),
    "drop at the end": ("ACCEPT", [_ESTABLISHED, *_SERVICES, "-j DROP"]),
    "reset": ("DROP", [_ESTABLISHED, *_SERVICES, "-p tcp -j REJECT --reject-with tcp-reset"]),
    "the gate's own": ("ACCEPT", []),
}


@contextlib.contextmanager
def made(variant: str, ipset: bool = True) -> Iterator[IptablesLab]:
    lab = IptablesLab(variant, ipset)
    try:
        lab.serve()
        lab.serve(WIREGUARD, "udp")
        yield lab
    finally:
        lab.close()


# Between them they have both variants and both ways to remember. Other combinations differ in nothing but these.
@pytest.fixture(
    params=[
        pytest.param((variant, variant == "nft"), id=f"{variant} {'ipset' if variant == 'nft' else 'recent'}")
        for variant in VARIANTS
    ]
)
def lab(request: pytest.FixtureRequest) -> Iterator[IptablesLab]:
    with made(*request.param) as one:
        yield one


@pytest.fixture(params=VARIANTS)
def with_sets(request: pytest.FixtureRequest) -> Iterator[IptablesLab]:
    with made(request.param) as one:
        yield one


@pytest.fixture(params=VARIANTS)
def with_lists(request: pytest.FixtureRequest) -> Iterator[IptablesLab]:
    with made(request.param, ipset=False) as one:
        yield one


@pytest.fixture
def docker(lab: IptablesLab) -> IptablesLab:
    """The host with a container behind it that publishes its ssh port as 2222 and as 8080."""
    put_container(lab)
    for name, container in zip(COMMANDS, (f"{CONTAINER4}:22", f"[{CONTAINER6}]:22")):
        lab.command(name, "-t", "nat", "-N", "DOCKER")
        lab.command(name, "-t", "nat", "-A", "PREROUTING", *["-m", "addrtype", "--dst-type", "LOCAL", "-j", "DOCKER"])
        for port in (PUBLISHED, 8080):
            rule = f"-p tcp --dport {port} -j DNAT --to-destination {container}"
            lab.command(name, "-t", "nat", "-A", "DOCKER", *rule.split())
    return lab


@pytest.mark.parametrize(
    ("source", "container", "response"),
    [(CLIENT4, CONTAINER4, "mimic"), (CLIENT6, CONTAINER6, "reset"), (CLIENT4, CONTAINER4, "drop")],
)
def test_a_published_port_is_gated_by_name(docker: IptablesLab, source: str, container: str, response: str) -> None:
    a_published_port_is_gated_by_name(docker, source, container, response)


@pytest.mark.parametrize("source", [CLIENT4, CLIENT6])
def test_a_session_older_than_the_gate_lives_on(lab: IptablesLab, source: str) -> None:
    """Row 2: nothing on this host has used conntrack before, so that it has never heard of the session."""
    a_session_older_than_the_gate_lives_on(lab, source, {})


def test_untracked_packets(with_sets: IptablesLab) -> None:
    """Row 3. Lists know no ports: there, a source that has just had a session of datagrams meets silence."""
    untracked_packets(with_sets, {})


# Knocks by ping.


@pytest.mark.parametrize("guard", ["tripwires", "strict"])
@pytest.mark.parametrize("family", [4, 6])
def test_icmp_knocks_with_sets(with_sets: IptablesLab, family: int, guard: str) -> None:
    for kind in ("icmp alone", "among others"):
        icmp_knocks_open(with_sets, family, kind, guard)
    ordinary_pings_are_no_attack(with_sets, family, guard)
    another_length_on_the_way(with_sets, family, guard, "reset" if guard == "strict" else "open")
    if guard == "tripwires":
        lengths_that_are_tripwires_reset(with_sets, family)


@pytest.mark.parametrize("family", [4, 6])
def test_icmp_knocks_with_lists(with_lists: IptablesLab, family: int) -> None:
    icmp_knocks_open(with_lists, family, "in the middle", "strict")
    another_length_on_the_way(with_lists, family, "strict", "reset")


# All other ports closed.


@pytest.fixture
def served(lab: IptablesLab) -> IptablesLab:
    serve_more(lab)
    return lab


@pytest.mark.parametrize("family", [4, 6])
def test_what_is_open_is_all_that_is(served: IptablesLab, family: int) -> None:
    what_is_open_is_all_that_is(served, family, {})


@pytest.mark.parametrize("family", [4, 6])
def test_the_first_load_cuts_no_session(served: IptablesLab, family: int) -> None:
    the_first_load_cuts_no_session(served, family, {})


def test_a_refusing_host_goes_on_refusing(served: IptablesLab) -> None:
    """The look is what the host shows, closed by whomever."""
    served.both("-A", "INPUT", "-p", "tcp", "--syn", "!", "--dport", "22", "-j", "REJECT", "--reject-with", "tcp-reset")
    close(served)
    for family in (4, 6):
        source = served.source(family)
        assert [served.look(source, port) for port in (SSH, CLOSED)] == ["reset"] * 2


# What is seen of it.


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("source", [CLIENT4, CLIENT6])
def test_every_flag_pattern_and_udp(policy: str, source: str) -> None:
    """Row 4: 18 patterns of TCP flags and UDP look as they do at a closed port, byte for byte.

    One exception: where no firewall is, IPv6 resets that answer packets of no known kind have flow label 0.
    """
    with made("nft") as lab:
        chosen, rules = POLICIES[policy]
        for name in COMMANDS:
            lab.command(name, "-A", "INPUT", "-p", "tcp", "--dport", "443", "-j", "ACCEPT")
            if name == "ip6tables":
                lab.command(name, "-A", "INPUT", "-p", "ipv6-icmp", "-j", "ACCEPT")
            for rule in rules:
                lab.command(name, "-A", "INPUT", *rule.split())
            lab.command(name, "-P", "INPUT", chosen)
        for setting in ("net.ipv4.icmp_ratelimit=0", "net.ipv6.icmp.ratelimit=0"):
            lab.host.run("sysctl", "-qw", setting)
        lab.gate(input_policy="drop" if policy == "the gate's own" else "accept", open_ports=["443/tcp"])
        host = lab.host_of(source)
        different: set[str] = set()

        def compare(name: str, port: int, protected: Packet, closed: Packet) -> None:
            first, second = _shows(lab, source, port, protected), _shows(lab, source, CLOSED, closed)
            if first != second:
                same = _without_label(first) == _without_label(second)
                different.add(name if same else f"more than the label: {name}")

        for flags in FLAGS:
            for _again in range(2):
                header: dict[str, Any] = {"sport": lab.source_port(), "flags": flags, "seq": 1000, "ack": 2000}
                packets = [network(source, host) / TCP(dport=port, **header) for port in (SSH, CLOSED)]
                compare(flags, SSH, *packets)
        for payload in (b"", b"x" * 64):
            sport = lab.source_port()
            packets = [network(source, host) / UDP(sport=sport, dport=one) / payload for one in (WIREGUARD, CLOSED)]
            compare("udp", WIREGUARD, *packets)
        exception = {"SF", "SFPU", "F", "", "FPU", "P"} if policy == "no firewall" and source == CLIENT6 else set()
        assert different == exception


def _without_label(shown: Sequence[str]) -> list[str]:
    return [one.replace(" fl=1 ", " fl=0 ") for one in shown]


@pytest.mark.parametrize("source", [CLIENT4, CLIENT6])
def test_knocks_and_tripwires_look_closed(with_sets: IptablesLab, source: str) -> None:
    lab = with_sets
    model = lab.gate()
    host, sport = lab.host_of(source), lab.source_port()
    for layer in (lambda port: TCP(sport=sport, dport=port, flags="S"), lambda port: UDP(sport=sport, dport=port)):
        shown = [
            _shows(lab, source, port, network(source, host) / layer(port))
            for port in (CLOSED, *(knock.port for knock in SEQUENCE), model["tripwires"][0])
        ]
        assert all(one == shown[0] for one in shown)


# What opens it, and what does not.


@pytest.mark.parametrize("family", [4, 6])
def test_strict(lab: IptablesLab, family: int) -> None:
    lab.gate(guard="strict")
    first, second, third = SEQUENCE
    for knocks, state in (
        (SEQUENCE, "open"),
        ((first, first, second, second, third), "open"),
        ((first, Knock(SSH, "tcp"), second, Knock(WIREGUARD, "udp"), third), "open"),
        ((first, second, first, second, third), "open"),
        ((first, WRONG, second, third), "reset"),
        ((first, second, WRONG, third), "reset"),
        ((first, second, Knock(WRONG.port, "udp"), third), "reset"),
        ((first, second, Knock(third.port, "udp"), third), "reset"),
        ((first, second, first, third), "reset"),
        ((second, third), "reset"),
        ((first, third), "reset"),
    ):
        source = lab.source(family)
        lab.touch(source, *knocks)
        assert lab.look(source) == state, knocks


@pytest.mark.parametrize("family", [4, 6])
def test_loose(lab: IptablesLab, family: int) -> None:
    lab.gate(guard="loose")
    first, second, third = SEQUENCE
    for knocks, state in (
        ((first, WRONG, second, WRONG, third), "open"),
        ((first, second, second, first, second, third), "open"),
        ((first, third), "reset"),
        ((first, second), "reset"),
    ):
        source = lab.source(family)
        lab.touch(source, *knocks)
        assert lab.look(source) == state, knocks


@pytest.mark.parametrize("family", [4, 6])
def test_tripwires(with_sets: IptablesLab, family: int) -> None:
    lab = with_sets
    model = lab.gate(guard="tripwires")
    first, second, third = SEQUENCE
    for proto in ("tcp", "udp"):
        trip = Knock(model["tripwires"][-1], proto)
        for knocks, state in (
            ((first, WRONG, second, WRONG, third), "open"),
            ((first, trip, second, third), "reset"),
            ((first, second, trip, third), "reset"),
            ((trip, *SEQUENCE), "open"),
        ):
            source = lab.source(family)
            lab.touch(source, *knocks)
            assert lab.look(source) == state, knocks


def test_tripwires_need_sets(with_lists: IptablesLab) -> None:
    """They would be thousands of rules."""
    with pytest.raises(PortknockError, match=r"^knock_server_guard: expected strict or loose .*ipset"):
        with_lists.gate(guard="tripwires")


def test_a_step_is_forgotten_in_time(lab: IptablesLab) -> None:
    lab.gate(guard="strict", step_timeout=1)
    source = lab.source()
    lab.touch(source, *SEQUENCE[:2])
    time.sleep(1.5)  # what is tested is that the kernel's clock ends it
    lab.touch(source, SEQUENCE[2])
    assert lab.look(source) == "reset"
    lab.knock(source)
    assert lab.look(source) == "open"


def test_the_kernel_closes_the_window(lab: IptablesLab) -> None:
    lab.gate(open_window=5)
    sources, sessions = (lab.source(4), lab.source(6)), []
    for source in sources:
        lab.knock(source)
        state, session = lab.connect(source)
        assert (state, lab.ask(source)) == ("open", "answered")
        sessions.append(session)
    for source, session in zip(sources, sessions):
        wait_for(functools.partial(_is_closed_to, lab, source), 8, "the window ends")
        assert lab.ask(source) == "refused"
        session.send(b"hello")
        assert session.recv(100) == b"hello", "the session lives on"


def _is_closed_to(lab: IptablesLab, source: str) -> bool:
    return lab.look(source) == "reset"


def test_a_datagram_session_outlives_its_window(lab: IptablesLab) -> None:
    lab.gate(open_window=5)
    source, sport = lab.source(), lab.source_port()
    lab.knock(source)
    assert lab.ask(source, sport=sport) == "answered"
    lab.close_windows()
    assert lab.ask(source, sport=sport) == "answered"
    assert lab.look(source) == "reset"


def test_link_local_goes_by_the_interface(with_sets: IptablesLab) -> None:
    """Row 10: the same link-local address on another wire is someone else."""
    lab = with_sets
    other = lab.namespace("d")
    lab.link("h1", "d0", other)
    for where, interface in ((lab.client, "c0"), (other, "d0")):
        where.ip("addr", "add", "fe80::77/64", "dev", interface, "nodad")
    for interface in ("h0", "h1"):
        lab.host.ip("addr", "add", "fe80::1/64", "dev", interface, "nodad")
    lab.gate()
    mine, theirs = "fe80::77%c0", "fe80::77%d0"
    lab.knock(mine, host="fe80::1%c0")
    assert (lab.look(mine, host="fe80::1%c0"), lab.ask(mine, host="fe80::1%c0")) == ("open", "answered")
    listing = lab.backend.listing()
    assert listing is not None
    assert [str(source) for source in lab.backend.windows(listing)] == ["fe80::77%h0"]
    assert [str(opening.source) for opening in lab.backend.openings(listing)] == ["fe80::77%h0"]
    lab.client, here = other, lab.client
    try:
        assert lab.look(theirs, host="fe80::1%d0") == "reset"
    finally:
        lab.client = here


def test_link_local_sources_stay_outside_without_sets(with_lists: IptablesLab) -> None:
    """A list of xt_recent knows no interface, so that the window would be open on every wire."""
    lab = with_lists
    lab.client.ip("addr", "add", "fe80::77/64", "dev", "c0", "nodad")
    lab.host.ip("addr", "add", "fe80::1/64", "dev", "h0", "nodad")
    lab.gate()
    lab.knock("fe80::77%c0", host="fe80::1%c0")
    assert lab.look("fe80::77%c0", host="fe80::1%c0") == "reset"


def test_operators_and_who_opened_it(lab: IptablesLab) -> None:
    """Each has a sequence, and is on record; one whose time is over is not let in."""
    now = int(time.time())
    ann = [SEQUENCE]
    bob = [(Knock(2002, "udp"), Knock(39508, "udp"), Knock(2004, "tcp"))]
    eve = [(Knock(2005, "tcp"), Knock(2006, "tcp"), Knock(2007, "tcp"))]
    lab.gate(
        guard="strict",
        sequences={"ann": ann, "bob": bob, "eve": eve},
        validity={"bob": (now - 3600, now + 3600), "eve": (now - 3600, now - 60)},
    )
    seen = {}
    for number, (sequence, state) in enumerate(((ann, "open"), (bob, "open"), (eve, "reset")), start=1):
        source = lab.source(6 if number == 2 else 4)
        lab.touch(source, *sequence[0])
        assert lab.look(source) == state
        if state == "open":
            seen[source] = f"{number:x}"
    mixed = lab.source()
    lab.touch(mixed, ann[0][0], bob[0][0], *ann[0][1:])
    assert lab.look(mixed) == "reset"
    listing = lab.backend.listing()
    assert listing is not None
    assert {str(source) for source in lab.backend.windows(listing)} == set(seen)
    records = lab.backend.openings(listing)
    assert {str(record.source): record.number for record in records} == seen
    assert all(record.ago <= 10 for record in records)


def test_a_close_sequence_ends_one_s_own_window(lab: IptablesLab) -> None:
    closing = (Knock(3001, "tcp"), Knock(3002, "udp"), Knock(3003, "tcp"))
    for guard in ("strict", "loose"):
        lab.gate(guard=guard, close={"default": [closing]})
        owner, other = lab.source(6), lab.source(4)
        for source in (owner, other):
            lab.knock(source)
            assert lab.look(source) == "open"
        lab.touch(owner, *closing[:2])
        assert lab.look(owner) == "open"
        lab.touch(owner, closing[2])
        assert (lab.look(owner), lab.look(other)) == ("reset", "open")
        lab.touch(owner, *closing)
        assert lab.look(owner) == "reset"
        lab.knock(owner)
        assert lab.look(owner) == "open"


def test_many_operators(with_sets: IptablesLab) -> None:
    """Enough knocks that they are found by groups."""
    lab = with_sets
    sequences = {
        f"op{one}": [tuple(Knock(20000 + 7 * one + 500 * step, "tcp") for step in range(4))] for one in range(60)
    }
    lab.gate(guard="strict", sequences=sequences)
    for one in (0, 17, 59):
        source = lab.source()
        lab.touch(source, *sequences[f"op{one}"][0][:3], WRONG, sequences[f"op{one}"][0][3])
        assert lab.look(source) == "reset"
        lab.touch(source, *sequences[f"op{one}"][0])
        assert lab.look(source) == "open"


# Floods.


def test_a_flood_of_first_knocks_and_lists(with_lists: IptablesLab) -> None:
    """A list of xt_recent holds 100 sources: as many spoofed first knocks between two knocks lock the owner out.

    Knocks sent back to back leave no time for that. What the documentation says, so that this fails where it no longer holds.
    """
    lab = with_lists
    most = int(Path("/sys/module/xt_recent/parameters/ip_list_tot").read_text())
    lab.gate(guard="loose")
    owner = lab.source()
    lab.touch(owner, SEQUENCE[0])
    lab.flood(0, most // 2, SEQUENCE[0].port, "tcp")
    lab.touch(owner, *SEQUENCE[1:])
    assert lab.look(owner) == "open"
    owner = lab.source()
    lab.touch(owner, SEQUENCE[0])
    lab.flood(0, 2 * most, SEQUENCE[0].port, "tcp")
    lab.touch(owner, *SEQUENCE[1:])
    assert lab.look(owner) == "reset"
    lab.knock(owner)
    assert lab.look(owner) == "open"


def test_a_flood_of_first_knocks_and_sets(with_sets: IptablesLab) -> None:
    """Sets hold as many as they are told to; where they are full, nobody else begins."""
    lab = with_sets
    lab.gate(max_sources=5000, step_timeout=60)
    owner = lab.source()
    lab.touch(owner, SEQUENCE[0])
    lab.flood(0, 4000, SEQUENCE[0].port, "tcp")
    lab.touch(owner, *SEQUENCE[1:])
    assert lab.look(owner) == "open"
    # A set that packets alone fill does not grow by itself.
    newcomer = lab.source()
    lab.knock(newcomer)
    assert lab.look(newcomer) == "open"


# Loading, and what is loaded.


def test_windows_outlive_a_load_and_progress_does_not(lab: IptablesLab) -> None:
    lab.gate(guard="strict")
    owner, other = lab.source(), lab.source(6)
    lab.knock(owner)
    lab.knock(other)
    half = lab.source()
    lab.touch(half, *SEQUENCE[:2])
    listing = lab.backend.listing()
    assert listing is not None
    for settings in (
        {"guard": "loose"},
        {"guard": "loose", "input_policy": "drop"},
        {"guard": "loose", "max_windows": 1000, "audit_days": 3},
        {"step_timeout": 9},
    ):
        lab.gate(**settings)
        assert (lab.look(owner), lab.look(other)) == ("open", "open"), settings
        later = lab.backend.listing()
        assert later is not None
        assert lab.backend.windows(later) == lab.backend.windows(listing)
        found = {(one.source, one.number): one.ago for one in lab.backend.openings(later)}
        assert set(found) == {(one.source, one.number) for one in lab.backend.openings(listing)}
        assert max(found.values()) <= 20
    lab.touch(half, SEQUENCE[2])
    assert lab.look(half) == "reset"
    lab.backend.load(lab.backend.forgetting(lab.text), None)
    later = lab.backend.listing()
    assert later is not None
    assert not lab.backend.openings(later)
    assert lab.look(owner) == "open"


def test_never_open_while_it_is_changed(with_sets: IptablesLab) -> None:
    """Row 12: a stranger's calls while gates are put in each other's place."""
    lab = with_sets
    texts = []
    for settings in (
        {"guard": "strict"},
        {"guard": "tripwires", "closed_response": "drop"},
        {"closed_response": "reset", "protected_ports": ["22/tcp"]},
    ):
        lab.gate(**settings)
        texts.append(lab.text)
    ended = threading.Event()
    lab.host.ip("neigh", "replace", "192.0.2.201", "lladdr", lab.client.mac("c0"), "dev", "h0", "nud", "permanent")
    answers = {"sent": 0, "open": 0}

    def probe() -> None:
        while not ended.is_set():
            sport = lab.source_port()
            lab.wire.send(network("192.0.2.201", HOST4) / TCP(sport=sport, dport=SSH, flags="S", seq=1))
            answers["sent"] += 1
            for answer in lab.wire.received(0.001, lambda packets: bool(packets)):
                if TCP in answer and answer[TCP].sport == SSH and str(answer[TCP].flags) == "SA":
                    answers["open"] += 1

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        for number in range(7):
            lab.backend.load(texts[number % 3], None)
            if number == 4:
                assert lab.loader("fresh") == 0
    finally:
        ended.set()
        prober.join()
    assert answers["sent"] > 100
    assert answers["open"] == 0


def test_both_families_or_neither(lab: IptablesLab) -> None:
    """What IPv6 refuses leaves IPv4 as it was."""
    lab.gate(guard="strict")
    before = lab.backend.listing()
    assert before is not None
    broken = lab.text.replace("-A PREROUTING -j FPK-KNOCK\n", "-A NOWHERE -j FPK-KNOCK\n")
    half = lab.text.split("#6\n")[0].replace("--dport 48396", "--dport 48397") + "#6\n" + broken.split("#6\n")[1]
    with pytest.raises(PortknockError, match="IPv6 rules are refused"):
        lab.backend.load(half, before)
    unknown = lab.text.split("#6\n")[1].replace("-m addrtype", "-m unheard-of")
    with pytest.raises(PortknockError, match=r"gate\.rules\.j2.*IPv6 rules are refused"):
        lab.backend.check({"gate": f"{lab.text.split('#6')[0]}#6\n{unknown}", "closed_rules": ""})
    with pytest.raises(PortknockError, match="IPv4 rules are refused"):
        lab.backend.load(broken, before)
    after = lab.backend.listing()
    assert after is not None
    assert lab.backend.digests(after) == lab.backend.digests(before)
    for family in (4, 6):
        source = lab.source(family)
        lab.knock(source)
        assert lab.look(source) == "open"


def test_what_is_loaded_is_known(lab: IptablesLab) -> None:
    """Drift is seen and named, without a port; what packets do is none."""
    lab.gate(guard="strict")

    def digests() -> dict[str, str]:
        listing = lab.backend.listing()
        assert listing is not None
        return lab.backend.digests(listing)

    before = digests()
    lab.knock(lab.source())
    lab.flood(0, 50, SEQUENCE[0].port, "tcp")
    lab.backend.load(lab.text, None)
    assert digests() == before
    assert not any(str(knock.port) in name for knock in SEQUENCE for name in before)
    lab.command("iptables", "-t", "security", "-D", "FPK-LOCK-T", "-j", "DROP")
    assert {name for name, digest in digests().items() if digest != before[name]} == {"IPv4 chain security FPK-LOCK-T"}
    lab.command("ip6tables", "-t", "mangle", "-D", "PREROUTING", "-j", "FPK-KNOCK")
    assert set(before) - set(digests()) == {"IPv6 jumps of mangle"}
    if lab.has_ipset:
        lab.command("sh", "-c", "ipset flush $(ipset list -n | grep 'fpk[abc]-tcp')")
        assert any("set" in name for name, digest in digests().items() if digest != before[name])
    text = lab.backend.kernel_text()
    lab.gate(guard="strict")
    assert text is not None
    assert lab.backend.accepts(lab.backend.boot_text(text))
    assert digests() == before


def test_what_the_kernel_has_can_be_loaded_again(lab: IptablesLab) -> None:
    """The way back where no file tells it."""
    lab.gate(guard="strict")
    listing = lab.backend.listing()
    text = lab.backend.kernel_text()
    assert text is not None
    lab.backend.unload()
    assert lab.look(lab.source()) == "open"
    lab.backend.load(text, None)
    later = lab.backend.listing()
    assert listing is not None
    assert later is not None
    assert lab.backend.digests(later) == lab.backend.digests(listing)
    source = lab.source()
    assert lab.look(source) == "reset"
    lab.knock(source)
    assert lab.look(source) == "open"


def test_nothing_is_left_and_others_rules_are_untouched(lab: IptablesLab) -> None:
    """Somebody's rules in the same chains, and a set of theirs."""
    for name in COMMANDS:
        lab.command(
            name,
            "-A",
            "INPUT",
            *["-p", "tcp", "--dport", "443", "-m", "comment", "-j", "ACCEPT", "--comment"],
            "mine FPK-",
        )
        lab.command(
            name, "-t", "nat", "-A", "PREROUTING", *["-p", "tcp", "--dport", "81", "-j", "REDIRECT", "--to-ports", "80"]
        )

    def theirs() -> list[str]:
        lines = [line for name in COMMANDS for line in lab.command(f"{name}-save").splitlines()]
        return [line for line in lines if line.startswith("-A") and "-A FPK" not in line and " -j FPK" not in line]

    before = theirs()
    assert len(before) == 4
    lab.gate()
    lab.gate(closed_response="reset")
    assert theirs() == before
    for name in COMMANDS:
        # Others put theirs in front; each of ours is there once.
        lab.command(name, "-I", "INPUT", "-j", "ACCEPT")
    assert lab.look(lab.source()) == "silent"
    lab.backend.load(lab.text, None)
    assert lab.look(lab.source()) == "reset"
    jumps = [line for name in COMMANDS for line in lab.command(f"{name}-save").splitlines() if " -j FPK" in line]
    jumps = [line for line in jumps if not line.startswith("-A FPK")]
    assert len(jumps) == 2 * len(set(jumps))
    lab.both("-D", "INPUT", "-j", "ACCEPT")
    lab.backend.unload()
    assert lab.backend.listing() is None
    assert theirs() == before
    for name in COMMANDS:
        assert "FPK-" not in lab.command(f"{name}-save").replace("mine FPK-", "")
    assert not lab.has_ipset or "fpk" not in lab.command("ipset", "list", "-n")
    assert lab.look(lab.source()) == "open"


def test_the_lock_holds_without_the_look(lab: IptablesLab) -> None:
    """Any one table, or all but the lock, flushed by somebody: closed, if not unseen."""
    lab.gate()
    for tables in (("nat",), ("raw", "filter", "mangle")):
        for table in tables:
            lab.both("-t", table, "-F")
        assert (lab.look(lab.source()), lab.look(lab.source(6)), lab.ask(lab.source())) == ("silent",) * 3, tables


def test_someone_s_redirect_is_no_way_round(lab: IptablesLab) -> None:
    """From another port to the protected one, from the protected one to where the service really waits, and before ours."""
    lab.serve(2022)
    for rule in ("--dport 8022 -j REDIRECT --to-ports 22", "--dport 2222 -j REDIRECT --to-ports 2022"):
        lab.both("-t", "nat", "-A", "PREROUTING", "-p", "tcp", *rule.split())
    lab.gate(protected_ports=["22/tcp", "2222/tcp"])
    source = lab.source()
    assert (lab.look(source, 8022), lab.look(source, 2222)) == ("silent", "reset")
    lab.knock(source)
    assert (lab.look(source, 8022), lab.look(source, 2222)) == ("open", "open")
    lab.both("-t", "nat", "-I", "PREROUTING", "-p", "tcp", "--dport", "2222", "-j", "REDIRECT", "--to-ports", "2022")
    stranger = lab.source()
    assert lab.look(stranger, 2222) == "silent"


@pytest.mark.parametrize("zones", [True, False])
def test_a_dnat_before_ours_is_locked_where_it_is_forwarded(docker: IptablesLab, zones: bool) -> None:
    docker.gate(protected_ports=["22/tcp", f"{PUBLISHED}/tcp"], probe={"zones": zones})
    docker.both("-t", "nat", "-I", "PREROUTING", "-j", "DOCKER")
    assert docker.look(CLIENT4, PUBLISHED) == "silent"
    assert docker.look(CLIENT4, 8080) == "open"
    docker.knock(CLIENT4)
    assert docker.look(CLIENT4, PUBLISHED) == "open"


def test_a_window_that_is_closed_for_one(lab: IptablesLab) -> None:
    lab.gate()
    sources = [lab.source(4), lab.source(4), lab.source(6)]
    for source in sources:
        lab.knock(source)
        assert lab.look(source) == "open"
    for source in sources[1:]:
        lab.backend.close_window(Peer(source, None))
    assert [lab.look(source) for source in sources] == ["open", "reset", "reset"]


# Boots, saved rules, and who takes it away.


def test_saved_rules_hold_no_opening_and_load_at_boot(lab: IptablesLab) -> None:
    """``netfilter-persistent save`` while a window is open, then a boot: the saved rules load, ours follow, nothing is open."""
    lab.both("-A", "INPUT", "-p", "tcp", "--dport", "443", "-j", "ACCEPT")
    lab.gate()
    source = lab.source()
    lab.knock(source)
    assert lab.look(source) == "open"
    saved = [lab.command(f"{name}-save") for name in COMMANDS]
    for text, name in zip(saved, ("rules.v4", "rules.v6")):
        assert source not in text
        (lab.bin / name).write_text(text)
    lab.backend.unload()
    lab.both("-F", "INPUT")
    assert lab.loader("sets") == 0
    for name, text in zip(COMMANDS, saved):
        assert lab.on_host([f"{name}-restore"], text).code == 0
    assert lab.look(source) == "reset"
    assert lab.loader("fresh") == 0
    assert lab.loader("check") == 0
    assert lab.look(source) == "reset"
    assert "--dport 443 -j ACCEPT" in lab.command("iptables-save")
    lab.knock(source)
    assert lab.look(source) == "open"
    # Nor does one stay that somebody's saved sets would bring back.
    assert lab.loader("fresh") == 0
    assert lab.look(source) == "reset"


def test_a_gate_that_does_not_load_at_boot(lab: IptablesLab) -> None:
    """Closed to all but the trusted sources, by the shell script that boot runs."""
    model = lab.gate(trusted_sources=[f"{CLIENT4}/32", f"{CLIENT6}/128"])
    closed = lab.rendered("iptables/closed.rules.j2", model)
    lab.backend.check({"gate": lab.text, "closed_rules": closed})
    lab.backend.unload()
    gate = lab.backend.boot_text(lab.text)
    (lab.bin / "closed.rules").write_text(closed)
    (lab.bin / "load.sh").write_text(
        LOAD.read_text().replace("/etc/fleet-portknock", str(lab.bin)).replace("PATH=/", f"PATH={lab.bin}:/", 1)
    )
    for text, code in ((gate.replace("-A FPK-LOCK -i lo", "-A FPK-NONE -i lo"), 1), (gate, 0)):
        (lab.bin / "gate.rules").write_text(text.replace("PATH=/", f"PATH={lab.bin}:/", 1))
        # Twice, as the watch may: the same in the end.
        for _again in range(2):
            done = lab.on_host(["/bin/sh", str(lab.bin / "load.sh")])
            assert done.code == code
            assert not any(str(knock.port) in done.stdout + done.stderr for knock in SEQUENCE)
        for trusted in (CLIENT4, CLIENT6):
            assert (lab.look(trusted), lab.ask(trusted)) == ("open", "answered")
        for family in (4, 6):
            stranger = lab.source(family)
            assert lab.look(stranger) == ("silent" if code else "reset")
        assert lab.ask(stranger) == ("silent" if code else "refused")
        assert lab.command("iptables-save").count("-j FPK-SHUT\n") == (1 if code else 0)


@contextlib.contextmanager
def _watched(lab: IptablesLab) -> Iterator[Path]:
    """The watch at work as its service runs it, with its folders in the lab's; gives what it says."""
    folder = str(lab.bin)
    gate, load, program = lab.backend.boot_text(lab.text), LOAD.read_text(), WATCH.read_text()
    (lab.bin / "gate.rules").write_text(gate.replace("PATH=/", f"PATH={folder}:/", 1))
    (lab.bin / "closed.rules").write_text("#4\n#6\n")
    load = load.replace("/etc/fleet-portknock", folder)
    (lab.bin / "load.sh").write_text(load.replace("PATH=/", f"PATH={folder}:/", 1))
    program = program.replace("/etc/fleet-portknock", folder).replace("/run/fleet-portknock", f"{folder}/run")
    (lab.bin / "watch.py").write_text(program.replace('SEARCH_PATH = "/', f'SEARCH_PATH = "{folder}:/'))
    journal = lab.bin / "journal"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified, journal.open("w") as said:
        notified.bind(str(lab.bin / "notify"))
        notified.settimeout(20)
        service = subprocess.Popen(
            ["ip", "netns", "exec", lab.host.name, sys.executable, "-I", "-S", str(lab.bin / "watch.py")],
            stderr=said,
            env={"NOTIFY_SOCKET": str(lab.bin / "notify"), "PATH": SEARCH_PATH},
        )
        try:
            assert notified.recv(100) == b"READY=1"
            yield journal
        finally:
            service.terminate()
            service.wait()


def _is_said(journal: Path, times: int) -> bool:
    return journal.read_text().count("it was loaded again within") >= times


def _foreign() -> str:
    """Rules that somebody has saved, without the gate's."""
    chains = {"filter": "INPUT FORWARD OUTPUT", "security": "INPUT FORWARD OUTPUT", "nat": "PREROUTING OUTPUT"}
    return "".join(
        f"*{table}\n{''.join(f':{name} ACCEPT [0:0]{chr(10)}' for name in names.split())}COMMIT\n"
        for table, names in chains.items()
    )


def test_the_watch_brings_it_back(lab: IptablesLab) -> None:
    """Whatever takes rules away, in either variant: the gate is whole again soon, and the journal is told."""
    lab.gate()
    owner = lab.source()
    lab.knock(owner)
    events: list[Callable[[], object]] = [
        lambda: lab.command("iptables", "-t", "security", "-F"),
        lambda: lab.command("ip6tables-restore", given=_foreign()),
        lambda: [lab.command("iptables", "-t", table, "-F") for table in TABLES],
        lambda: lab.command("iptables", "-t", "mangle", "-D", "PREROUTING", "-j", "FPK-KNOCK"),
    ]
    with _watched(lab) as journal:
        for number, take_away in enumerate(events, start=1):
            take_away()
            wait_for(functools.partial(_is_said, journal, number), 20, "it is said")
            wait_for(lambda: lab.loader("check") == 0, 20, "the gate is back")
            assert (lab.look(lab.source()), lab.look(lab.source(6))) == ("reset", "reset")
        said = journal.read_text()
        if lab.has_ipset:
            assert lab.look(owner) == "open", "windows are in sets, which nobody's flush empties"
    assert "<2>Rules of the gate were taken away by " in said
    assert not any(str(knock.port) in said for knock in SEQUENCE)


def test_what_the_host_can_is_asked_without_a_trace(lab: IptablesLab) -> None:
    found = lab.backend.capabilities()
    assert found["ipset"] is lab.has_ipset
    assert found["zones"]
    assert found["dnat_port"]
    assert found["clock"]
    for name in COMMANDS:
        assert "FPK" not in lab.command(f"{name}-save")
    assert json.dumps(found)
