# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Questions and answers of a proof, as they travel; what the looks see is made up."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils import _proof
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import Address, KnockResult, Probe
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock

# Local addresses of which the one that packets leave from is another: 127.0.0.1.
HOST, OTHER = "127.0.0.2", "127.0.0.3"
SSH = 22
KNOCKS = ["40961/tcp", "51203/udp", "47129/tcp"]
CLOSED = Probe("reset", "ECONNREFUSED")


def ask(question: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """As over a connection: everything becomes JSON on the way."""
    answered: dict[str, Any] = json.loads(json.dumps(_proof.answer(question, json.loads(json.dumps(request)))))
    return answered


def scout(*addresses: str, place: str = "", host: str = HOST, further: Sequence[str] = ()) -> dict[str, Any]:
    packed = [item for address in addresses for item in _proof.packed_addresses(address, SSH, "any")]
    return ask(
        "scout",
        {"host": host, "port": SSH, "family": "any", "addresses": packed, "further": list(further), "place": place},
    )


@pytest.mark.parametrize("place", ["", "eye"])
def test_scout(place: str) -> None:
    seen = scout(HOST, OTHER, place=place)
    assert seen == {
        "addresses": [["inet", HOST, SSH], ["inet", OTHER, SSH]],
        "others": [],
        "sources": ["127.0.0.1"],
    }


def test_a_name_that_the_controller_leaves_to_the_other_host() -> None:
    assert scout(host=OTHER, place="eye")["addresses"] == [["inet", OTHER, SSH]]
    assert "host: expected a name or an address that resolves" in scout(host="no..name", place="eye")["problem"]


def test_own_and_link_local_addresses_mean_nothing_elsewhere() -> None:
    link_local = ["inet6", "fe80::1", SSH, 0, 7]
    request = {"host": "box", "port": SSH, "family": "any", "further": [], "place": "eye"}
    own = _proof.packed_addresses("127.0.0.1", SSH, "any")
    there = _proof.packed_addresses(HOST, SSH, "any")
    assert ask("scout", {**request, "addresses": [link_local, *own, *there]})["addresses"] == there
    assert ask("scout", {**request, "addresses": [link_local, *own]}) == {
        "problem": "expected a host from which box is another machine; for eye, fe80::1, 127.0.0.1 is link-local or an "
        "address of its own."
    }
    kept = ask("scout", {**request, "addresses": [link_local], "place": ""})["addresses"]
    assert kept == [link_local]


class Network:
    """What each look at a port sees; every other port is closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: dict[tuple[str, int], Probe] = {}
        self.otherwise = CLOSED
        self.opens = True
        self.knocked: list[tuple[str, Sequence[Knock]]] = []
        monkeypatch.setattr(_proof, "_LOOKS", {"tcp": self.look, "udp": self.look})
        monkeypatch.setattr(_proof, "probe", self.look)
        monkeypatch.setattr(_proof, "knock_with_any", self.knock)

    def look(self, address: Address, _timeout: float) -> Probe:
        return self.seen.get((address.host, address.port), self.otherwise)

    def knock(
        self,
        addresses: Sequence[Address],
        sequences: Sequence[Sequence[Knock]],
        port: int,
        _timeout: float,
        once: Sequence[Sequence[Knock]],
    ) -> KnockResult:
        self.knocked.append((addresses[0].host, (*sequences, *once)[0]))
        state = "open" if self.opens else "reset"
        sent_once = 1 if once else 0
        return KnockResult(state, addresses[0].at(port), 0.002, 1, 0.0, 0 if self.opens else -1, sent_once=sent_once)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return Network(monkeypatch)


def request(**more: object) -> dict[str, Any]:
    return {
        "addresses": [["inet", HOST, SSH]],
        "others": [],
        "place": "eye",
        "protected": ["22/tcp"],
        "closed_response": "mimic",
        "trusted": [],
        "ports_in_use": ["22/tcp"],
        "listeners": {"inet": [22, 80], "inet6": [22]},
        "source_trusted": False,
        "knocks": KNOCKS,
        "timeout": 1.0,
        **more,
    }


def test_closed_and_opened(network: Network) -> None:
    assert ask("prove", request()) == {
        "closed": [{"address": HOST, "port": "22/tcp", "showed": "reset", "closed_port_showed": "reset"}],
        "opened": [{"address": HOST, "port": "22/tcp", "milliseconds": 2.0}],
        "notes": [],
    }
    assert [(host, [str(knock) for knock in knocks]) for host, knocks in network.knocked] == [(HOST, KNOCKS)]


@pytest.mark.parametrize(("place", "view"), [("", "127.0.0.1"), ("eye", "127.0.0.1 on eye")])
def test_what_is_wrong_and_from_where(network: Network, place: str, view: str) -> None:
    network.seen[HOST, SSH] = Probe("open")
    assert ask("prove", request(place=place)) == {
        "problem": f"Not closed: port 22/tcp of {HOST}, seen from {view} without the knock, answered (open)."
    }
    network.seen[HOST, SSH] = Probe("filtered", "ETIMEDOUT")
    problem = ask("prove", request(place=place))["problem"]
    assert problem.startswith(f"Not hidden: port 22/tcp of {HOST}, seen from {view} without the knock, showed filtered")
    network.seen.clear()
    network.opens = False
    assert ask("prove", request(place=place)) == {
        "problem": f"Not opened: port 22/tcp of {HOST}, seen from {view}, showed reset after the right knock was sent 1 "
        "times in 0.0 s."
    }


def test_who_is_trusted(network: Network) -> None:
    """The proving host by its own address, the controller also by the one that the gate's host sees."""
    note = f"Not proved on {HOST}: packets from {{}} come from a trusted source."
    assert ask("prove", request(trusted=["127.0.0.1/32"]))["notes"] == [note.format("eye")]
    assert ask("prove", request(trusted=["127.0.0.1/32"], place=""))["notes"] == [note.format("here")]
    assert ask("prove", request(source_trusted=True, place=""))["notes"] == [note.format("here")]
    assert ask("prove", request(trusted=["192.0.2.1/32"]))["notes"] == []
    assert len(network.knocked) == 1


def test_a_daemon_without_ipv6(network: Network) -> None:
    """It is to be closed there, and told; where there is nothing else, nobody would get in."""
    both = {"addresses": [["inet6", "::1", SSH], ["inet", HOST, SSH]], "without_ipv6": "this knockd has no IPv6"}
    answer = ask("prove", request(**both))
    assert [one["address"] for one in answer["closed"]] == ["::1", HOST]
    assert [one["address"] for one in answer["opened"]] == [HOST]
    assert answer["notes"] == ["Not open on ::1, whoever knocks: this knockd has no IPv6."]
    answer = ask("prove", request(**{**both, "addresses": both["addresses"][:1]}))
    assert answer["problem"] == (
        "knock_server_backend: expected an IPv4 address of the host that can be reached from eye, since this knockd has no "
        "IPv6; got ::1 only."
    )


def test_nothing_is_reached(network: Network) -> None:
    network.otherwise = Probe("unreachable", "EHOSTUNREACH")
    two = [["inet", HOST, SSH], ["inet", OTHER, SSH]]
    assert ask("prove", request(addresses=two)) == {
        "problem": f"No address of the host can be reached with a fresh packet from eye: tried {HOST}, {OTHER}."
    }


def test_a_removal(network: Network) -> None:
    network.seen[HOST, SSH] = Probe("open")
    removal = {"addresses": [["inet", OTHER, SSH], ["inet", HOST, SSH]], "place": "eye", "timeout": 1.0}
    assert ask("prove_removed", removal) == {}
    network.seen.clear()
    assert ask("prove_removed", removal) == {
        "problem": f"Without the gate, port 22/tcp of {OTHER} does not answer a fresh connection from 127.0.0.1 on eye: "
        "it showed reset."
    }


def test_families_travel_by_name() -> None:
    assert _proof.packed_addresses("::1", SSH, "inet6") == [["inet6", "::1", SSH, 0, 0]]
    assert Address.unpacked(["inet6", "::1", SSH, 0, 0]) == Address(socket.AF_INET6, ("::1", SSH, 0, 0))


def test_each_family_uses_a_sequence_of_its_own_where_each_opens_once(network: Network) -> None:
    once = [KNOCKS, KNOCKS[::-1], KNOCKS[1:]]
    addresses = [["inet", HOST, SSH], ["inet6", "::2", SSH, 0, 0]]
    answered = ask("prove", request(knocks=[], once=once, addresses=addresses))
    assert [(host, [str(knock) for knock in knocks]) for host, knocks in network.knocked] == [
        (HOST, once[0]),
        ("::2", once[1]),
    ]
    assert answered["sent_once"] == 2
