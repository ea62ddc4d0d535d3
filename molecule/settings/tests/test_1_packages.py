# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Packages that the role installed go with the gate where that is asked for and harms nobody; others never go.

Comes before test_settings.py and leaves the hosts as it found them.
"""

from __future__ import annotations

import json

import pytest
from lab import Fleet, Run, differences

SSH = 2222
PACKAGE = "nftables"
# The engine's own name server is behind a table of every container.
ENGINE_TABLE = "ip nat"


@pytest.fixture(scope="module", autouse=True)
def before(fleet: Fleet) -> dict[str, dict[str, str]]:
    """The hosts, of which only web-1 has the package."""
    content = json.loads(fleet.inventory.read_text())
    content["all"]["vars"] |= {"ansible_port": SSH, "ansible_connection": "fleet.portknock.knock_ssh"}
    fleet.write("packages.yml", content)
    assert {host: is_installed(fleet, host) for host in fleet.hosts} == {"web-1": True, "db1": False}
    return {host: fleet.state(host) for host in fleet.hosts}


def is_installed(fleet: Fleet, host: str) -> bool:
    installed: bool = fleet.inside(host).package(PACKAGE).is_installed
    return installed


def site(fleet: Fleet) -> None:
    run = fleet.play("fleet.portknock.site", inventory=fleet.directory / "packages.yml")
    assert run.status == 0, run.output


def remove(fleet: Fleet, *arguments: str, packages: bool = True) -> Run:
    run = fleet.play(
        "fleet.portknock.remove",
        # As a person types it: a string.
        *("--limit", "all", "--extra-vars", f"knock_server_remove_packages={str(packages).lower()}", *arguments),
        inventory=fleet.directory / "packages.yml",
    )
    assert run.status == 0, run.output
    return run


def start_again(fleet: Fleet) -> None:
    """So that the engine's name server is back."""
    fleet.restart("db1")
    fleet.wait_for_boot()


def changed(run: Run) -> dict[str, int]:
    return {host: numbers["changed"] for host, numbers in run.recap.items()}


def test_stays_where_nobody_asks(fleet: Fleet) -> None:
    site(fleet)
    assert (fleet.secrets("db1")["packages"], "packages" in fleet.secrets("web-1")) == ([PACKAGE], False)
    remove(fleet, packages=False)
    assert is_installed(fleet, "db1")
    assert fleet.secrets("db1")["packages"] == [PACKAGE]


def test_stays_where_it_would_harm_others(fleet: Fleet) -> None:
    assert f"The package {PACKAGE} stays: the kernel has other tables, which may need it (table {ENGINE_TABLE})." in (
        remove(fleet).output
    )
    fleet.execute("db1", f"nft delete table {ENGINE_TABLE}")
    for command, word in (("enable", "enabled"), ("start", "active")):
        fleet.execute("db1", f"systemctl {command} {PACKAGE}")
        assert f"The package {PACKAGE} stays: {PACKAGE}.service is {word}." in remove(fleet).output
        fleet.execute("db1", f"systemctl {'disable' if command == 'enable' else 'stop'} {PACKAGE}")
    assert is_installed(fleet, "db1")
    start_again(fleet)


def test_goes_where_it_was_not_before(fleet: Fleet, before: dict[str, dict[str, str]]) -> None:
    """The host is as before the first run; one that had the package itself keeps it."""
    site(fleet)
    fleet.execute("db1", f"nft delete table {ENGINE_TABLE}")
    with_gate = fleet.state("db1")
    assert changed(remove(fleet, "--check"))["db1"] > 0
    assert differences(with_gate, fleet.state("db1")) == []
    remove(fleet)
    assert not is_installed(fleet, "db1")
    assert is_installed(fleet, "web-1")
    assert {host: differences(before[host], fleet.state(host)) for host in fleet.hosts} == {"web-1": [], "db1": []}
    kept = fleet.secrets("db1")
    assert (kept["removed"], "packages" in kept) == (True, False)
    assert changed(remove(fleet)) == {"web-1": 0, "db1": 0}
    remove(fleet, "--extra-vars", "knock_server_purge_keyring=true")
    assert list((fleet.directory / "knock_keyring").glob("*1.yml")) == []
    start_again(fleet)
