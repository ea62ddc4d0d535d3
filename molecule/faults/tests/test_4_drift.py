# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A gate that somebody has changed by hand: the next run sees it in files and kernel, says so, and puts it right."""

from __future__ import annotations

import pytest
from lab import FAMILIES, Fleet, wait_until

SSH = 22
CONFIG = "/etc/fleet-portknock"
UNITS = "/etc/systemd/system"
# What is done to box and to other, and what the diff must say of each.
SPOILED = {
    "files lost, rule lost": (
        (f"rm -r {CONFIG}", [f"{CONFIG}/gate.rules", f"{CONFIG}/closed.nft", f"{CONFIG}/watch.py"]),
        ("nft flush chain inet fleet_portknock lock_tcp", ["chain lock_tcp was changed"]),
    ),
    "rule added, half of the table lost": (
        (
            "nft add rule inet fleet_portknock permitted ip saddr 0.0.0.0/0 accept",
            ["chain permitted was changed"],
        ),
        (
            "nft flush chain inet fleet_portknock pre; nft delete chain inet fleet_portknock pre;"
            " nft flush chain inet fleet_portknock lock; nft delete chain inet fleet_portknock lock",
            ["chain lock is missing", "chain pre is missing"],
        ),
    ),
    "table dormant, gate's file changed": (
        (
            "nft add table inet fleet_portknock '{ flags dormant; }'",
            ["table fleet_portknock was changed"],
        ),
        (f"echo 'table ip extra {{ }}' >>{CONFIG}/gate.rules", [f"{CONFIG}/gate.rules"]),
    ),
    "not started at boot, not watched": (
        (
            f"systemctl disable fleet-portknock; rm {UNITS}/fleet-portknock.service",
            [f"{UNITS}/fleet-portknock.service", "not started at boot"],
        ),
        (
            "systemctl stop fleet-portknock-watch; nft delete table inet fleet_portknock",
            ["not running", "no gate is loaded in the kernel"],
        ),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def gated(fleet: Fleet) -> None:
    run = fleet.play("fleet.portknock.site")
    assert run.status == 0, run.output


@pytest.mark.parametrize("name", sorted(SPOILED))
def test_drift_is_told_and_repaired(fleet: Fleet, name: str) -> None:
    spoiled = dict(zip(("box", "other"), SPOILED[name], strict=True))
    for host, (script, _said) in spoiled.items():
        fleet.execute(host, script)
    run = fleet.play("fleet.portknock.site", "--diff")
    assert run.status == 0, run.output
    assert fleet.leaks(run.output) == []
    for host, (_script, said) in spoiled.items():
        assert run.recap[host]["changed"] == 1
        assert [words for words in said if words not in run.output] == []
        assert fleet.judge(host) == []
    again = fleet.play("fleet.portknock.site")
    assert {host: numbers["changed"] for host, numbers in again.recap.items()} == dict.fromkeys(spoiled, 0)


def test_gate_that_does_not_load_at_boot_leaves_only_the_trusted_in(fleet: Fleet) -> None:
    trusted, other = fleet.sources.take("ipv4", 2)
    (other6,) = fleet.sources.take("ipv6")
    controller = [fleet.description[key] for key in ("gateway4", "gateway6")]
    run = fleet.play("fleet.portknock.site", variables={"knock_server_trusted_sources": [trusted, *controller]})
    assert run.status == 0, run.output
    fleet.execute("box", f"sed -i 's/chain lock /chain lock lock /' {CONFIG}/gate.rules")
    fleet.restart("box")
    wait_until(lambda: fleet.has_booted("box"), 60, "box has booted")
    target4, target6 = (fleet.hosts["box"][family] for family in FAMILIES)
    seen = fleet.outside(
        ["until", "open", 20, trusted, target4, SSH],
        ["connect", other, target4, SSH],
        ["knock", other, target4, fleet.knocks("box")],
        ["connect", other, target4, SSH],
        ["connect", other6, target6, SSH],
    )
    assert seen == ["open", "silent", None, "silent", "silent"]
    journal = fleet.execute("box", "journalctl --no-pager -o cat -t fleet-portknock -p crit")
    assert "The gate does not load: the protected ports are closed to all but the trusted sources." in journal
    assert fleet.leaks(journal) == []
    # From a trusted source, so that the repair itself needs no knock.
    repaired = fleet.play("fleet.portknock.site")
    assert repaired.status == 0, repaired.output
    assert fleet.judge("box") == []
