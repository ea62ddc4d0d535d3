# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``knock_server_close_sequence``: a second sequence shuts the window of its own source, and nothing else."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._card import CardHost, card_files
from ansible_collections.fleet.portknock.plugins.module_utils._helper_secrets import Access, HelperSecrets
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import (
    Address,
    KnockResult,
    knock_until_closed,
    knock_until_open,
)
from ansible_collections.fleet.portknock.plugins.module_utils._nft import openings
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.plugin_utils._program import helper_program
from netlab import CLIENT4, CLIENT6, HOST4, HOST6, SEQUENCE, SSH, Lab

FAMILIES = (4, 6)
WINDOWS = {4: "open4", 6: "open6"}
CLOSE = (Knock(29161, "tcp"), Knock(55417, "udp"), Knock(41873, "tcp"))
OTHER = (Knock(17003, "tcp"), Knock(61234, "tcp"), Knock(20777, "udp"))
OTHERS_CLOSE = (Knock(37771, "udp"), Knock(18222, "tcp"), Knock(60001, "tcp"))
ONE = {"default": [CLOSE]}


def gate(lab: Lab, close: Mapping[str, Sequence[Sequence[Knock]]] = ONE, **options: Any) -> None:
    lab.gate(close=close, open_window=600, **options)


def shut(lab: Lab, source: str, *sequences: Sequence[Knock], **options: Any) -> KnockResult:
    """As the clients do it."""
    with lab.client.inside():
        return knock_until_closed([address_of(source)], sequences or [CLOSE], SSH, 8.0, source=source, **options)


def from_client(lab: Lab, source: str, *argv: str) -> str:
    """What a program says that leaves from this address."""
    lab.client.ip("route", "replace", lab.host_of(source), "dev", "c0", "src", source)
    return lab.client.run(*argv)


def address_of(source: str) -> Address:
    return Address(socket.AF_INET6, (HOST6, SSH, 0, 0)) if ":" in source else Address(socket.AF_INET, (HOST4, SSH))


@pytest.mark.parametrize("guard", ["tripwires", "strict", "loose"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_shuts_the_own_window_alone(lab: Lab, family: int, guard: str) -> None:
    gate(lab, guard=guard)
    source, other = lab.source(family), lab.source(family)
    for one in (source, other):
        lab.knock(one)
    state, session = lab.connect(source)
    assert (state, lab.look(source), lab.count(WINDOWS[family])) == ("open", "open", 2)
    result = shut(lab, source)
    assert (result.state, result.attempts, result.address) == ("reset", 1, address_of(source))
    assert (lab.look(source), lab.ask(source), lab.look(other)) == ("reset", "refused", "open")
    assert lab.count(WINDOWS[family]) == 1
    session.send(b"hello")
    assert session.recv(100) == b"hello", "a session outlives its window"
    lab.knock(source)
    assert lab.look(source) == "open", "the next knock opens again"


@pytest.mark.parametrize("family", FAMILIES)
def test_it_opens_nothing_and_is_no_other_knock(lab: Lab, family: int) -> None:
    """Not by itself, not in parts: neither does half of it close, nor do its knocks go with those that open."""
    gate(lab, guard="loose")
    source, closed = lab.source(family), lab.source(family)
    lab.touch(closed, *CLOSE)
    lab.touch(closed, *SEQUENCE[:2], CLOSE[-1])
    lab.touch(closed, *CLOSE[:2], SEQUENCE[-1])
    assert lab.look(closed) == "reset"
    lab.knock(source)
    lab.touch(source, *CLOSE[:-1])
    lab.touch(source, CLOSE[0], CLOSE[-1])
    lab.touch(source, *reversed(CLOSE))
    assert lab.look(source) == "open"


@pytest.mark.parametrize(("guard", "expected"), [("tripwires", "reset"), ("strict", "open")])
def test_a_wrong_port_on_the_way(lab: Lab, guard: str, expected: str) -> None:
    gate(lab, guard=guard)
    source = lab.source()
    lab.knock(source)
    lab.touch(source, CLOSE[0], Knock(7, "tcp"), *CLOSE[1:])
    assert lab.look(source) == expected


def test_link_local_goes_by_the_interface(lab: Lab) -> None:
    lab.client.ip("addr", "add", "fe80::77/64", "dev", "c0", "nodad")
    lab.host.ip("addr", "add", "fe80::1/64", "dev", "h0", "nodad")
    gate(lab)
    source, host = "fe80::77%c0", "fe80::1%c0"
    lab.knock(source, host=host)
    assert lab.look(source, host=host) == "open"
    lab.touch(source, *CLOSE, host=host)
    assert lab.look(source, host=host) == "reset"


def test_each_operator_has_their_own(lab: Lab) -> None:
    """Whose the window is, the address says; an operator without one, as after a revocation, has nothing that closes."""
    sequences = {"alice": [SEQUENCE], "bob": [OTHER]}
    gate(lab, {"alice": [CLOSE], "bob": [OTHERS_CLOSE]}, sequences=sequences)
    for close in (CLOSE, OTHERS_CLOSE):
        source = lab.source()
        lab.knock(source)
        assert (lab.look(source), shut(lab, source, close).state) == ("open", "reset")
    gate(lab, {"alice": [CLOSE]}, sequences=sequences)
    source = lab.source()
    lab.knock(source)
    assert shut(lab, source, OTHERS_CLOSE, gaps=[0.0]).state == "open"


def test_within_a_rotation_either_of_two_closes(lab: Lab) -> None:
    """A client sends all that it knows, whichever of them the gate honours."""
    for honoured in ([CLOSE], [OTHERS_CLOSE], [OTHERS_CLOSE, CLOSE]):
        gate(lab, {"default": honoured}, guard="strict")
        source = lab.source()
        lab.knock(source)
        assert (lab.look(source), shut(lab, source, OTHERS_CLOSE, CLOSE).state) == ("open", "reset")


@pytest.mark.parametrize("family", FAMILIES)
def test_with_single_use(lab: Lab, family: int) -> None:
    """A window that nobody has used goes; one that was used has nothing left to shut, and its flow goes on."""
    gate(lab, single_use=True)
    source, user = lab.source(family), lab.source(family)
    lab.knock(source)
    lab.touch(source, *CLOSE)
    assert (lab.count(WINDOWS[family]), lab.look(source)) == (0, "reset")
    lab.knock(user)
    state, session = lab.connect(user)
    lab.touch(user, *CLOSE)
    session.send(b"hello")
    assert (state, session.recv(100)) == ("open", b"hello")
    lab.knock(user)
    assert (lab.look(user), lab.look(user)) == ("open", "reset")


def test_with_one_time_sequences(lab: Lab) -> None:
    """It is not used up, and uses none of them up."""
    stock = {number: (Knock(20000 + 7 * number, "tcp"), *SEQUENCE[1:]) for number in (1, 2)}
    gate(lab, one_time={"default": stock}, guard="strict")
    lab.host.nft("add element inet fleet_portknock armed { 7:1, 7:2 }")
    source = lab.source()
    for knocks in stock.values():
        lab.touch(source, *knocks)
        assert lab.look(source) == "open"
        assert shut(lab, source).state == "reset"
    lab.touch(source, *stock[1])
    assert lab.look(source) == "reset"


def test_the_record_of_the_opening_stays(lab: Lab) -> None:
    gate(lab)
    source = lab.source()
    lab.knock(source)
    shut(lab, source)
    (record,) = openings(lab.listing() or {})
    assert (str(record.source), record.times) == (source, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_client_goes_on_until_it_is_closed(lab: Lab, family: int) -> None:
    """Packets that are lost, of whichever gap, cost a round; a host that answers nothing is no reason to wait for ever."""
    gate(lab, closed_response="drop")
    lab.host.nft(
        "table inet lossy { set once { type inet_service; flags dynamic,timeout; timeout 60s; }\n"
        "chain pre { type filter hook prerouting priority -300;\n"
        "tcp dport 41873 tcp dport != @once add @once { tcp dport } drop\n}\n}\n"
    )
    source = lab.source(family)
    with lab.client.inside():
        opened = knock_until_open([address_of(source)], SEQUENCE, SSH, 5.0, source=source)
    assert opened.state == "open"
    result = shut(lab, source)
    assert (result.state, result.attempts) == ("filtered", 2)
    assert lab.count(WINDOWS[family]) == 0


def test_a_trusted_source_is_told_that_it_is_open(lab: Lab) -> None:
    gate(lab, trusted_sources=["192.0.2.0/24"])
    assert shut(lab, lab.source()).state == "open"


def test_what_is_not_there_is_unreachable(lab: Lab) -> None:
    """One address without a way counts for nothing where there is another, and for itself where there is none."""
    gate(lab)
    source = lab.source()
    lab.knock(source)
    away = Address(socket.AF_INET, ("198.51.100.1", SSH))
    with lab.client.inside():
        both = knock_until_closed([away, address_of(source)], [CLOSE], SSH, 8.0, source=source)
        none = knock_until_closed([away], [CLOSE], SSH, 8.0, source=source)
    assert (both.state, none.state) == ("reset", "unreachable")
    assert lab.look(source) == "reset"


def test_without_it_the_rules_know_of_none(lab: Lab) -> None:
    with_it, model = lab.render(close=ONE)
    without, plain = lab.render()
    assert ("chain shut4" in with_it, "shut" in without) == (True, False)
    assert [step["next"] for step in model["steps"]].count("8:1") == 1
    assert [entry["name"] for entry in model["close"]] == ["default"]
    assert plain["close"] == []


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The helper, and beside it a file of secrets, as a bundle has them; the host goes by an address of each family."""
    access = {
        name: Access(host, SSH, (SEQUENCE,), close=(OTHERS_CLOSE, CLOSE))
        for name, host in (("v4", HOST4), ("v6", HOST6))
    }
    for name, content, mode in (
        ("portknock", helper_program(), 0o755),
        ("secrets.json", HelperSecrets("alice", access).to_text().encode(), 0o600),
    ):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(mode)
    return tmp_path / "portknock"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_helper_shuts_it(lab: Lab, program: Path, family: int) -> None:
    gate(lab)
    source = CLIENT6 if family == 6 else CLIENT4
    lab.knock(source)
    assert lab.look(source) == "open"
    said = from_client(lab, source, str(program), "close", f"v{family}")
    assert said == f"Port {SSH} of v{family} is closed to this address.\n"
    assert (lab.look(source), lab.count(WINDOWS[family])) == ("reset", 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_shuts_it(lab: Lab, family: int) -> None:
    """By the line for bash, which every machine has; what else is on the card is tried by ``test_card.py``."""
    gate(lab, guard="strict")
    source = CLIENT6 if family == 6 else CLIENT4
    text = card_files("alice", [CardHost("web1", lab.host_of(source), SSH, [SEQUENCE], close=CLOSE)])[
        "card.txt"
    ].decode()
    (line,) = re.findall(r"^    (for k in .*)$", text.partition("To shut the port again")[2], re.MULTILINE)
    lab.knock(source)
    assert lab.look(source) == "open"
    from_client(lab, source, "bash", "-c", line)
    assert lab.look(source) == "reset"
