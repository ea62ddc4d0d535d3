# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Knocking at the collection's own gate, over a good path and a bad one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._gate import Honoured, build_model, settings_from
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import (
    Probe,
    knock_until_open,
    knock_with_any,
    probe,
    resolve,
)
from ansible_collections.fleet.portknock.plugins.plugin_utils._rendering import render

from . import conftest as acc
from .conftest import Lab
from .slow_path import SlowPath

SEED = b"\x21" * 32
NEAR, FAR = "198.18.78.1", "198.18.78.2"


def own_gate(lab: Lab, **options: object) -> None:
    model = build_model(
        settings_from(options), {"default": Honoured(1, [acc.RIGHT])}, SEED, frozenset(), {"socket_wildcard": True}
    )
    text = render(acc.ROOT / "roles" / "knock_server" / "templates", "nftables", model)["gate"]
    lab.inside("nft", "-f", "-", given="flush ruleset\n" + text)


@pytest.fixture
def path(lab: Lab) -> Iterator[SlowPath]:
    """A second way to the host, by FAR."""
    near, far = f"acc{os.getpid()}n", f"acc{os.getpid()}f"
    slow = SlowPath(near, far)
    try:
        acc.run("ip", "link", "set", far, "netns", lab.namespace)
        lab.inside("ip", "address", "add", FAR, "peer", NEAR, "dev", far)
        lab.inside("ip", "link", "set", far, "up")
        acc.run("ip", "address", "add", NEAR, "peer", FAR, "dev", near)
        acc.run("ip", "link", "set", near, "up")
        yield slow
    finally:
        # The devices go with their files.
        slow.close()


@pytest.mark.parametrize("host", [acc.SERVER4, acc.SERVER6])
@pytest.mark.parametrize("guard", ["tripwires", "strict"])
@pytest.mark.parametrize(("response", "look"), [("mimic", "reset"), ("drop", "filtered")])
def test_the_gate_opens_at_once(lab: Lab, host: str, guard: str, response: str, look: str) -> None:
    own_gate(lab, guard=guard, closed_response=response)
    address = resolve(host, acc.PORT)[0]
    assert probe(address, 0.3).state == look
    result = knock_until_open([address], acc.RIGHT, acc.PORT, 10, banner=10)
    assert (result.state, result.attempts, result.gap) == ("open", 1, 0.0)
    assert result.banner.startswith("SSH-2.0-")


@pytest.mark.parametrize("guard", ["tripwires", "strict"])
def test_a_stale_sequence_is_no_hindrance(lab: Lab, guard: str) -> None:
    own_gate(lab, guard=guard)
    result = knock_with_any(resolve(acc.SERVER4, acc.PORT), [acc.STALE, acc.RIGHT], acc.PORT, 10)
    assert (result.state, result.sequence, result.attempts) == ("open", 1, 2)


@pytest.mark.parametrize("guard", ["tripwires", "strict"])
def test_packets_that_overtake_each_other(lab: Lab, path: SlowPath, guard: str) -> None:
    """With 1 to 9 ms on the way, some of ten back-to-back rounds arrive out of order; each opens in the end."""
    own_gate(lab, guard=guard)
    path.delay(0.001, 0.009)
    attempts = []
    for _round in range(10):
        lab.inside("nft", "flush", "set", "inet", "fleet_portknock", "open4")
        result = knock_until_open(resolve(FAR, acc.PORT), acc.RIGHT, acc.PORT, 20)
        assert result.state == "open"
        attempts.append(result.attempts)
    assert max(attempts) > 1


def test_a_path_that_is_slower_than_a_round(lab: Lab, path: SlowPath) -> None:
    own_gate(lab)
    path.delay(0.6, 0.6)
    assert knock_until_open(resolve(FAR, acc.PORT), acc.RIGHT, acc.PORT, 20).state == "open"


def test_a_path_that_loses_packets(lab: Lab) -> None:
    lab.gate(extra="meta l4proto { tcp, udp } numgen random mod 5 0 drop")
    assert knock_until_open(resolve(acc.SERVER4, acc.PORT), acc.RIGHT, acc.PORT, 60).state == "open"


def test_a_knock_is_one_packet(lab: Lab) -> None:
    """However long a closed, silent port is polled, each round sends each knock once."""
    lab.gate("drop", extra=f"tcp dport {acc.STALE[0].port} counter name stale drop")
    result = knock_until_open(resolve(acc.SERVER4, acc.PORT), acc.STALE, acc.PORT, 2.5)
    assert result == result._replace(state="filtered", attempts=lab.count("stale"))


def test_two_looks_can_be_compared(lab: Lab) -> None:
    own_gate(lab)
    address = resolve(acc.SERVER4, acc.PORT)[0]
    assert probe(address, 10) == probe(address.at(39999), 10) == Probe("reset", "ECONNREFUSED")
