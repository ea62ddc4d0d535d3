# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The watch over the gate, when a flush meets it at its worst."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from lab import FAMILIES, Fleet, wait_until

BACK_WITHIN = 2.0
# Old and new systemd.
HOSTS = ("plain", "persistent")


@pytest.mark.parametrize("host", HOSTS)
def test_a_flush_right_after_the_watch_was_killed(fleet: Fleet, host: str) -> None:
    with fleet.watched(host) as watch:
        fleet.execute(host, "systemctl kill -s KILL fleet-portknock-watch; nft flush ruleset")
        wait_until(partial(fleet.has_gate, host), BACK_WITHIN, "the gate is back")
        fleet.execute(host, "systemctl is-active fleet-portknock-watch")
    holes = [hole for family in FAMILIES for hole in watch.open[host, family]]
    assert [hole for hole in holes if hole.seconds >= BACK_WITHIN] == []
    assert fleet.judge(host) == []


@pytest.mark.parametrize("host", HOSTS)
def test_flush_upon_flush(fleet: Fleet, host: str) -> None:
    fleet.execute(host, "for turn in 1 2 3 4 5 6 7 8; do nft flush ruleset; done")
    wait_until(partial(fleet.has_gate, host), BACK_WITHIN, "the gate is back")
    assert fleet.judge(host) == []


def deafened(fleet: Fleet, host: str) -> str:
    """Rules by which closed ports are silent and the protected one is not; the knocks still get through.

    The proof looks three times before it fails: time enough for a flush.
    """
    knocks = ", ".join(knock.split("/")[0] for knock in fleet.knocks(host))
    return (
        "add table inet deaf; add chain inet deaf early { type filter hook prerouting priority -500; }; "
        f"add rule inet deaf early tcp flags syn tcp dport 20000-65535 tcp dport != {{ {knocks} }} drop"
    )


def is_on_trial(fleet: Fleet, host: str) -> bool:
    return fleet.succeeds(host, "test -e /run/fleet-portknock/trial/loaded")


@pytest.mark.parametrize("host", HOSTS)
def test_a_flush_while_a_change_is_on_trial(fleet: Fleet, host: str) -> None:
    """It goes back to what was confirmed, and the run says that its change was not."""
    fleet.execute(host, f"nft '{deafened(fleet, host)}'")
    with ThreadPoolExecutor(max_workers=1) as pool:
        running = pool.submit(
            fleet.play, "fleet.portknock.site", "--limit", host, variables={"knock_server_closed_response": "drop"}
        )
        wait_until(partial(is_on_trial, fleet, host), 60, "the change is on trial", lambda: not running.done())
        fleet.execute(host, "nft flush ruleset")
        wait_until(partial(fleet.has_gate, host), BACK_WITHIN, "the gate is back")
        run = running.result()
    assert run.recap[host]["failed"] or run.recap[host]["unreachable"], run.output
    assert fleet.judge(host) == []
    assert not fleet.succeeds(host, "test -e /run/fleet-portknock/trial")
    (source,) = fleet.sources.take("ipv4")
    assert fleet.outside(["connect", source, fleet.hosts[host]["ipv4"], 22]) == ["reset"]


@pytest.mark.parametrize("host", HOSTS)
def test_a_gate_that_was_removed_stays_away(fleet: Fleet, host: str) -> None:
    run = fleet.play("fleet.portknock.remove", "--limit", host)
    assert run.status == 0, run.output
    fleet.execute(host, "nft flush ruleset; nft add table inet fleet_portknock; nft delete table inet fleet_portknock")
    deadline = time.monotonic() + BACK_WITHIN
    while time.monotonic() < deadline:
        assert not fleet.has_gate(host)
    assert not fleet.succeeds(host, "systemctl is-active fleet-portknock-watch")
