# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Check mode on hosts that the collection has never touched, which has run before this."""

from __future__ import annotations

import json
import re

from lab import Fleet, differences


def test_the_hosts_are_untouched(fleet: Fleet) -> None:
    before = json.loads((fleet.directory / "before-state.json").read_text())
    assert [differences(before[host], fleet.state(host)) for host in fleet.hosts] == [[]] * len(before)


def test_no_keyring_was_made(fleet: Fleet) -> None:
    assert not (fleet.directory / "knock_keyring").exists()


def test_the_diff_says_what_would_change_and_no_port(fleet: Fleet) -> None:
    run = fleet.play("fleet.portknock.site", "--check", "--diff", "-vvv")
    assert run.status == 0, run.output
    assert all(host["changed"] > 0 for host in run.recap.values()), run.recap
    assert "fleet_portknock" in run.output
    told = set(re.findall(r"\b(\d+/(?:tcp|udp))\b", run.output))
    in_use = {port for host in fleet.hosts for port in fleet.listening(host)}
    assert told <= in_use, "ports that are nobody's but a sequence's"
    assert {host: fleet.has_gate(host) for host in fleet.hosts} == dict.fromkeys(fleet.hosts, False)
