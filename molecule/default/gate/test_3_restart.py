# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A restart of the hosts: never open on the way up, closed and openable afterwards."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from lab import FAMILIES, Fleet

HOSTS = ("debian11", "debian12", "debian13")
PLACES = [(host, family) for host in HOSTS for family in FAMILIES]
SSH = 22
WATCH_SECONDS = 15

everywhere = pytest.mark.parametrize(("host", "family"), PLACES)


@pytest.fixture(scope="module", autouse=True)
def seen(fleet: Fleet) -> dict[tuple[str, str], list[str]]:
    """Restart all hosts, and look at the port all the while."""
    sources = {place: fleet.sources.take(place[1]) for place in PLACES}

    def watch(place: tuple[str, str]) -> Any:
        host, family = place
        return fleet.outside(["states", WATCH_SECONDS, *sources[place], fleet.hosts[host][family], SSH])[0]

    with ThreadPoolExecutor(max_workers=len(PLACES)) as pool:
        watching = pool.map(watch, PLACES)
        fleet.restart()
        fleet.wait_for_boot()
        return dict(zip(PLACES, watching))


@everywhere
def test_never_open_on_the_way_up(seen: dict[tuple[str, str], list[str]], host: str, family: str) -> None:
    assert "reset" in seen[host, family]
    assert not {"open", "mute"} & set(seen[host, family])


@everywhere
def test_openable(fleet: Fleet, host: str, family: str) -> None:
    target = fleet.hosts[host][family]
    (source,) = fleet.sources.take(family)
    states = fleet.outside(
        ["connect", source, target, SSH],
        ["knock", source, target, fleet.knocks(host)],
        ["until", "open", 5, source, target, SSH],
    )
    assert (states[0], states[-1]) == ("reset", "open")


def test_ansible_finds_nothing_to_do(fleet: Fleet) -> None:
    run = fleet.play("fleet.portknock.site")
    assert run.status == 0, run.output
    assert {host: numbers["changed"] for host, numbers in run.recap.items()} == dict.fromkeys(fleet.hosts, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_nmap_still_sees_nothing(fleet: Fleet, family: str) -> None:
    before = json.loads((fleet.directory / f"before-{family}.json").read_text())
    for ports in before.values():
        del ports[str(SSH)]
    assert fleet.scan(family, "1-3000") == before


@pytest.mark.parametrize("host", HOSTS)
def test_ssh_itself_runs(fleet: Fleet, host: str) -> None:
    """Closed means gated, not broken."""
    assert subprocess.run(
        ["docker", "exec", fleet.hosts[host]["container"], "ss", "-Hltn", "sport = :22"],
        capture_output=True,
        check=True,
    ).stdout
