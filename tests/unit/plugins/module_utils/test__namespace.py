# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a namespace would look at and from where, by what ip says; the namespace itself is in tests/netns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils import _namespace
from ansible_collections.fleet.portknock.plugins.module_utils._system import Completed

SCOUT = {"host": "no..name", "port": 22, "family": "any", "addresses": [], "further": [], "place": "here"}
NO_DEFAULT_ROUTE = ""


def address(local: str, scope: str = "global", **more: object) -> dict[str, Any]:
    return {"family": "inet6" if ":" in local else "inet", "local": local, "scope": scope, **more}


class Host:
    """Answers in place of ip, and of whatever leads out of this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: list[dict[str, Any]] = []
        self.routes: dict[str, list[dict[str, Any]]] = {"-4": [], "-6": []}
        self.complaint: Optional[Completed] = None
        self.asked: list[tuple[Mapping[str, Any], Sequence[str]]] = []
        monkeypatch.setattr(_namespace, "local_address", lambda _address: NO_DEFAULT_ROUTE)
        monkeypatch.setattr(_namespace, "_can_have_ipv6", lambda: True)
        monkeypatch.setattr(_namespace, "answer", lambda _question, request: {"request": request})
        monkeypatch.setattr(_namespace, "_from_namespace", lambda look, sources, _run: {**look(), "sources": sources})

    def run(self, argv: Sequence[str], _stdin: Optional[str] = None) -> Completed:
        if self.complaint is not None:
            return self.complaint
        links = [{"ifname": "any", "addr_info": [entry]} for entry in self.addresses]
        return Completed(0, json.dumps(links if "address" in argv else self.routes[argv[2]]), "")

    def scout(self) -> dict[str, Any]:
        return _namespace.answer_apart("scout", SCOUT, self.run)

    def looked_at(self) -> list[str]:
        return [item[1] for item in self.scout()["request"]["addresses"]]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def test_addresses_that_a_stranger_could_reach(host: Host) -> None:
    host.addresses = [
        address("127.0.0.1", "host"),
        address("169.254.7.7", "link"),
        address("10.0.0.7"),
        address("10.0.0.7"),
        address("fe80::7", "link"),
        address("2001:db8::6", tentative=True),
        address("2001:db8::7"),
    ]
    assert host.looked_at() == ["10.0.0.7", "2001:db8::7"]
    assert host.scout()["request"]["addresses"][1] == ["inet6", "2001:db8::7", 22, 0, 0]
    host.addresses = host.addresses[:2]
    assert host.scout() == {
        "problem": "expected an address of the host to look at, beside loopback and link-local ones; got none."
    }


def test_the_default_route_s_address_comes_first(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.addresses = [address(f"10.0.0.{number}") for number in range(12)]
    monkeypatch.setattr(_namespace, "local_address", lambda there: "10.0.0.9" if there.host == "192.0.2.1" else "")
    assert host.looked_at() == ["10.0.0.9", *(f"10.0.0.{number}" for number in range(7))]
    assert host.scout()["left_out"] == ["Not proved on 4 more addresses of the host: 8 of each family are looked at."]


def test_without_ipv6_on_new_interfaces(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.addresses = [address("10.0.0.7"), address("2001:db8::7")]
    monkeypatch.setattr(_namespace, "_can_have_ipv6", lambda: False)
    seen = host.scout()
    assert [item[1] for item in seen["request"]["addresses"]] == ["10.0.0.7"]
    assert len(seen["sources"]) == 1
    assert seen["left_out"][0].startswith("Not proved on IPv6: ")
    proved = _namespace.answer_apart("prove", {"sources": [], "left_out": seen["left_out"]}, host.run)
    assert proved == {"request": {"sources": [], "left_out": seen["left_out"]}, "sources": []}
    monkeypatch.setattr(_namespace, "answer", lambda _question, _request: {"notes": ["Another."]})
    proved = _namespace.answer_apart("prove", {"sources": [], "left_out": seen["left_out"]}, host.run)
    assert proved["notes"] == ["Another.", *seen["left_out"]]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (Completed(127, "", ""), r"expected the program ip on the host \(Debian's package iproute2\); got none\."),
        (
            Completed(2, "", "RTNETLINK answers: Operation not permitted\nmore\n"),
            "got 'RTNETLINK answers: Operation not",
        ),
        (Completed(124, "", ""), "got 'exit code 124'"),
        (Completed(0, "Usage: ip", ""), "got 'exit code 0'"),
    ],
)
def test_an_ip_that_does_not_serve(host: Host, said: Completed, words: str) -> None:
    host.complaint = said
    problem = host.scout()["problem"]
    assert problem.startswith("expected ")
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(problem)
