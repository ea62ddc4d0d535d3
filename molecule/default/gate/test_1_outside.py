# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The gate as a machine outside sees it, on every host and both families."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._sequences import derive_tripwires
from lab import FAMILIES, Fleet

HOSTS = ("debian11", "debian12", "debian13")
PLACES = [(host, family) for host in HOSTS for family in FAMILIES]
SSH = 22
STEP_TIMEOUT = 2
OPEN_WINDOW = 6

everywhere = pytest.mark.parametrize(("host", "family"), PLACES)


def tripwire(fleet: Fleet, host: str) -> str:
    """A port that must reset progress: the gate leaves only used ports and knocks out of the ports of the seed."""
    secrets = fleet.secrets(host)
    operators = secrets["operators"].values()
    used = {int(knock.split("/")[0]) for operator in operators for knock in operator["current"]["knocks"]}
    seed = bytes.fromhex(secrets["tripwires"]["seed"])
    return f"{derive_tripwires(seed, 1, used | set(secrets['tripwires']['avoid']))[0]}/tcp"


def spoiled(case: str, knocks: list[str], tripwire_port: str) -> list[str]:
    """The sequence with one thing wrong."""
    if case == "reversed":
        return knocks[::-1]
    if case == "first two swapped":
        return [knocks[1], knocks[0], *knocks[2:]]
    if case == "a tripwire between":
        return [*knocks[:2], tripwire_port, *knocks[2:]]
    missing = int(case.split()[-1])
    return [knock for number, knock in enumerate(knocks, start=1) if number != missing]


@pytest.mark.parametrize("family", FAMILIES)
def test_nmap_sees_one_port_less_and_nothing_else(fleet: Fleet, family: str) -> None:
    before = json.loads((fleet.directory / f"before-{family}.json").read_text())
    for ports in before.values():
        del ports[str(SSH)]
    assert fleet.scan(family) == before


@everywhere
def test_closed_without_a_knock(fleet: Fleet, host: str, family: str) -> None:
    (source,) = fleet.sources.take(family)
    assert fleet.outside(["connect", source, fleet.hosts[host][family], SSH]) == ["reset"]


@everywhere
def test_the_sequence_opens_for_its_sender_alone(fleet: Fleet, host: str, family: str) -> None:
    target = fleet.hosts[host][family]
    source, neighbour = fleet.sources.take(family, 2)
    states = fleet.outside(
        ["knock", source, target, fleet.knocks(host)],
        ["connect", neighbour, target, SSH],
        ["connect", source, target, SSH],
        ["connect", neighbour, target, SSH],
    )
    assert states[1:] == ["reset", "open", "reset"]


@everywhere
def test_each_packet_doubled_opens(fleet: Fleet, host: str, family: str) -> None:
    target = fleet.hosts[host][family]
    (source,) = fleet.sources.take(family)
    states = fleet.outside(["knock", source, target, fleet.knocks(host), 0.0, 2], ["connect", source, target, SSH])
    assert states[-1] == "open"


@everywhere
def test_a_new_start_in_the_middle_opens(fleet: Fleet, host: str, family: str) -> None:
    target = fleet.hosts[host][family]
    (source,) = fleet.sources.take(family)
    knocks = fleet.knocks(host)
    states = fleet.outside(["knock", source, target, knocks[:2] + knocks, 0.02], ["connect", source, target, SSH])
    assert states[-1] == "open"


@everywhere
@pytest.mark.parametrize(
    "case",
    [
        "reversed",
        "first two swapped",
        "a tripwire between",
        *(f"missing knock {number}" for number in (1, 2, 3, 4)),
    ],
)
def test_a_spoiled_sequence_stays_closed(fleet: Fleet, host: str, family: str, case: str) -> None:
    target = fleet.hosts[host][family]
    (source,) = fleet.sources.take(family)
    knocks = spoiled(case, fleet.knocks(host), tripwire(fleet, host))
    states = fleet.outside(["knock", source, target, knocks, 0.01], ["connect", source, target, SSH])
    assert states[-1] == "reset"


@everywhere
def test_too_slow_stays_closed(fleet: Fleet, host: str, family: str) -> None:
    target = fleet.hosts[host][family]
    (source,) = fleet.sources.take(family)
    knocks = fleet.knocks(host)
    states = fleet.outside(
        ["knock", source, target, knocks[:-1]],
        ["sleep", STEP_TIMEOUT + 1],
        ["knock", source, target, knocks[-1:]],
        ["connect", source, target, SSH],
    )
    assert states[-1] == "reset"


@pytest.fixture(scope="module")
def ends(fleet: Fleet) -> dict[tuple[str, str], dict[str, object]]:
    """Open, hold a session, wait for the window's end; everywhere at once, for each takes as long as a window."""

    def watch(place: tuple[str, str]) -> dict[str, object]:
        host, family = place
        target = fleet.hosts[host][family]
        (source,) = sources[place]
        steps: list[list[object]] = [
            ["knock", source, target, fleet.knocks(host)],
            ["hold", source, target, SSH],
            ["until", "reset", OPEN_WINDOW * 3, source, target, SSH],
            ["speak"],
        ]
        _, banner, state, alive = fleet.outside(*steps)
        return {"banner": banner, "state": state, "alive": alive}

    sources = {place: fleet.sources.take(place[1]) for place in PLACES}
    with ThreadPoolExecutor(max_workers=len(PLACES)) as pool:
        return dict(zip(PLACES, pool.map(watch, PLACES)))


@everywhere
def test_the_window_ends(ends: dict[tuple[str, str], dict[str, str]], host: str, family: str) -> None:
    assert ends[host, family]["state"] == "reset"


@everywhere
def test_a_session_survives_the_windows_end(
    ends: dict[tuple[str, str], dict[str, str]], host: str, family: str
) -> None:
    assert ends[host, family]["banner"].startswith("SSH-2.0-")
    assert ends[host, family]["alive"]
