# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One gate after another on the same hosts: each back end as a machine outside sees it, and what a change of it leaves.

The walk makes every change from one back end to another once. What differs between them is data. The tests build on each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._backends import (
    BACK_ENDS,
    FILES,
    UNIT_FOLDER,
    back_end,
)
from lab import FAMILIES, GATE_TABLE, SSH, Fleet, Run, differences, wait_until

SITE = "fleet.portknock.site"
OPEN_WINDOW = 8
WATCH_SECONDS = 15
# What opens and closes there, and the process that does it.
OPENERS = {"knockd": "knockd", "fwknop": "fwknopd"}
IPTABLES = "iptables-save ip6tables-save iptables-legacy-save ip6tables-legacy-save"


def tour(names: Sequence[str]) -> list[str]:
    """A walk from the first name that takes each way from one to another once, and ends where it began."""
    ways = {name: [other for other in reversed(names) if other != name] for name in names}
    walk, way = [], [names[0]]
    while way:
        if ways[way[-1]]:
            way.append(ways[way[-1]].pop())
        else:
            walk.append(way.pop())
    return walk[::-1]


def site(fleet: Fleet, backend: str, *arguments: str) -> Run:
    run = fleet.play(SITE, *arguments, variables={"knock_server_backend": backend})
    assert run.status == 0, run.output
    assert fleet.leaks(run.output) == []
    return run


def changes(run: Run) -> dict[str, int]:
    return {host: numbers["changed"] for host, numbers in run.recap.items()}


def leftovers(fleet: Fleet, host: str, backend: str) -> list[str]:
    """What is there of another back end, or missing of this one."""
    own = back_end(backend)
    paths = {file.path for file in FILES.values()}
    there = set(fleet.execute(host, f"ls -d {' '.join(paths)} 2>/dev/null || :").split())
    problems = [f"file {path}" for path in sorted(there ^ {file.path for file in own.files.values()})]
    enabled = fleet.execute(host, f"ls {UNIT_FOLDER}/sysinit.target.wants | grep portknock").split()
    problems += [f"unit {unit}" for unit in sorted(set(enabled) ^ set(own.units))]
    kernels = {
        "nft": f"! command -v nft >/dev/null || nft list tables | grep -w {GATE_TABLE} || :",
        "iptables": f"for save in {IPTABLES}; do ! command -v $save >/dev/null || $save; done | grep FPK || :",
    }
    problems += [
        f"rules {kernel}"
        for kernel, listing in kernels.items()
        if bool(fleet.execute(host, listing)) != (kernel == own.kernel)
    ]
    sets = fleet.execute(host, "! command -v ipset >/dev/null || ipset list -n | grep fpk || :").split()
    problems += [f"set {name}" for name in sets if own.kernel != "iptables"]
    for name, process in OPENERS.items():
        running = fleet.succeeds(host, f"grep -lx {process} /proc/[0-9]*/comm")
        problems += [f"process {process}"] if running != (name == backend) else []
    transient = fleet.execute(host, "systemctl list-units --no-legend --plain 'fleet-portknock*trial*' | cut -d' ' -f1")
    return problems + transient.split()


def opening(fleet: Fleet, backend: str, host: str, family: str, source: str) -> list[object]:
    """What opens the gate, sent by other means than the product's own."""
    target = fleet.hosts[host][family]
    if BACK_ENDS[backend].mode == "spa":
        return ["authorize", source, target, SSH, *fleet.keys(host)]
    return ["knock", source, target, fleet.knocks(host)]


def opens(backend: str, host: str, family: str) -> bool:
    """Whether it does so there: fwknop has no IPv6, nor has Debian 11's knockd."""
    return family == "ipv4" or (BACK_ENDS[backend].mode != "spa" and (backend, host) != ("knockd", "debian11"))


def everywhere(fleet: Fleet, do: Callable[[str, str], Any]) -> dict[tuple[str, str], Any]:
    """On each host, over each family, all at once."""
    places = [(host, family) for host in fleet.hosts for family in FAMILIES]
    with ThreadPoolExecutor(max_workers=len(places)) as pool:
        return dict(zip(places, pool.map(lambda place: do(*place), places)))


def look(fleet: Fleet, backend: str) -> None:
    """Closed without the knock; open with it, for its sender alone."""

    def seen(host: str, family: str) -> list[Any]:
        target = fleet.hosts[host][family]
        source, neighbour = fleet.sources.take(family, 2)
        does_open = opens(backend, host, family)
        before, *_knocked, after, others = fleet.outside(
            ["connect", source, target, SSH],
            *([opening(fleet, backend, host, family, source)] if does_open else ()),
            ["until", "open", 5, source, target, SSH] if does_open else ["connect", source, target, SSH],
            ["connect", neighbour, target, SSH],
        )
        return [before, after, others]

    found = everywhere(fleet, seen)
    assert found == {place: ["reset", "open" if opens(backend, *place) else "reset", "reset"] for place in found}


def repeat(fleet: Fleet, backend: str) -> None:
    """A second run changes nothing, and says so in a check."""
    nothing = dict.fromkeys(fleet.hosts, 0)
    assert changes(site(fleet, backend, "--diff", "-vvv")) == nothing
    assert changes(site(fleet, backend, "--check")) == nothing


def windows(fleet: Fleet, backend: str) -> None:
    """A window ends by itself; the session that came through it lives on, and nobody has to do anything for either."""

    def watch(host: str, family: str) -> list[Any]:
        if not opens(backend, host, family):
            return ["reset", True]
        target = fleet.hosts[host][family]
        (source,) = fleet.sources.take(family)
        return fleet.outside(
            opening(fleet, backend, host, family, source),
            ["until", "open", 5, source, target, SSH],
            ["hold", source, target, SSH],
            ["until", "reset", OPEN_WINDOW * 3, source, target, SSH],
            ["speak"],
        )[-2:]

    found = everywhere(fleet, watch)
    assert found == {place: ["reset", True] for place in found}


def kill(fleet: Fleet, backend: str) -> None:
    """Who opens is there again when it has been killed."""
    running = f"grep -lx {OPENERS[backend]} /proc/[0-9]*/comm"
    for host in fleet.hosts:
        fleet.execute(host, f"kill -9 $({running} | cut -d/ -f3)")
    for host in fleet.hosts:
        wait_until(partial(fleet.succeeds, host, running), 30, f"{OPENERS[backend]} is there again on {host}")
    look(fleet, backend)


def restart(fleet: Fleet, backend: str) -> None:
    """Never open on the way up, and openable afterwards; and nothing is left to do."""
    sources = everywhere(fleet, lambda _host, family: fleet.sources.take(family))

    def watch(host: str, family: str) -> set[str]:
        return set(fleet.outside(["states", WATCH_SECONDS, *sources[host, family], fleet.hosts[host][family], SSH])[0])

    with ThreadPoolExecutor(max_workers=1) as pool:
        watching = pool.submit(everywhere, fleet, watch)
        fleet.restart()
        fleet.wait_for_boot()
        seen = watching.result()
    assert {place: states & {"open", "mute"} for place, states in seen.items()} == {place: set() for place in seen}
    look(fleet, backend)
    assert changes(site(fleet, backend)) == dict.fromkeys(fleet.hosts, 0)


def tell(fleet: Fleet, _backend: str) -> None:
    """Neither the journal, nor a process's arguments, nor a file that anybody may read gives a secret away."""
    for host in fleet.hosts:
        told = fleet.execute(
            host, "journalctl --no-pager -o cat; cat /proc/[0-9]*/cmdline | tr '\\0' '\\n'", check=False
        )
        assert fleet.leaks(told) == []
        readable = "find /etc /run /var -xdev -name '*portknock*' -type f -perm /077 -exec cat {} + 2>/dev/null"
        assert fleet.leaks(fleet.execute(host, readable, check=False)) == []


def states(fleet: Fleet) -> dict[str, dict[str, str]]:
    """All that the collection could have left behind; of rules what there is, since what is in them comes and goes."""
    rules = {
        "ruleset": "nft list ruleset | grep -E '^table|^\\s(chain|set|map) ' | sort",
        # Sets that no progress is to outlive change their names at each load.
        "iptables": f"for save in {IPTABLES}; do ! command -v $save >/dev/null || $save | grep '^[*:-]' | "
        "sed 's/fpk[abc]-/fpk-/; s/ .[0-9]*:[0-9]*.$//' | sort; done",
    }
    return {
        host: {**fleet.state(host), **{kind: fleet.execute(host, listing) for kind, listing in rules.items()}}
        for host in fleet.hosts
    }


def steps() -> Iterator[Any]:
    """The walk as parameters of one test: each change, and after the first to a back end all that this one has to stand."""
    walk = tour(list(BACK_ENDS))
    for number, (former, later) in enumerate(zip(["nothing", *walk], walk)):
        yield pytest.param(change, later, id=f"{number}-from-{former}-to-{later}")
        if later not in walk[:number]:
            ordeals = [repeat, windows, *([kill] if later in OPENERS else []), restart, tell]
            yield from (pytest.param(ordeal, later, id=f"{later}-{ordeal.__name__}") for ordeal in ordeals)


# How each host looked with a back end, from the time on when the packages of all were there.
SEEN: dict[str, dict[str, dict[str, str]]] = {}


def change(fleet: Fleet, backend: str) -> None:
    """Another back end does what it is for, the former one is gone, and all is as when it was there before."""
    assert all(changes(site(fleet, backend)).values())
    assert {host: leftovers(fleet, host, backend) for host in fleet.hosts} == {host: [] for host in fleet.hosts}
    look(fleet, backend)
    if len(SEEN) < len(BACK_ENDS):
        SEEN[backend] = {}
        return
    now = states(fleet)
    before = SEEN[backend] or now
    SEEN[backend] = now
    assert {host: differences(before[host], now[host]) for host in now} == {host: [] for host in now}


@pytest.mark.parametrize(("ordeal", "backend"), list(steps()))
def test_walk(fleet: Fleet, ordeal: Callable[[Fleet, str], None], backend: str) -> None:
    ordeal(fleet, backend)


def test_nothing_is_left(fleet: Fleet) -> None:
    run = fleet.play("fleet.portknock.remove", variables={"portknock_hosts": "all", "knock_server_purge_keyring": True})
    assert run.status == 0, run.output
    for host, state in states(fleet).items():
        assert not re.search("portknock|FPK", "".join(state.values())), host
