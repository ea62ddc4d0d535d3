# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""For the scenario rotation: what the keyring holds, what opens, and the plays that change it."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

from lab import FAMILIES, SSH, Fleet, Run

ROTATE = "fleet.portknock.rotate"
SITE = "fleet.portknock.site"
# A connection that outlives its play would be waited on for ever where its host has gone.
NO_MASTER = "-o ControlMaster=no -o ControlPath=none"


def put_up_gates(fleet: Fleet) -> None:
    """Bob may not knock everywhere: a plain variable of the inventory says so."""
    path = fleet.directory / "host_vars" / "web2.yml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"knock_server_operators": ["alice"]}))
    run = fleet.play(SITE)
    assert run.status == 0, run.output


def rotate(fleet: Fleet, *arguments: str, **variables: object) -> Run:
    """All hosts at once, unless told otherwise."""
    variables = {"portknock_hosts": "all", "portknock_serial": "100%", **variables}
    return fleet.play(ROTATE, *arguments, variables=variables, ANSIBLE_TIMEOUT="4", ANSIBLE_SSH_ARGS=NO_MASTER)


def kept(fleet: Fleet) -> dict[str, dict[str, Any]]:
    """The keyring's entries."""
    return {host: fleet.secrets(host) for host in fleet.hosts}


def sequences(fleet: Fleet, which: str = "current") -> dict[tuple[str, str], list[str]]:
    """What the keyring holds for each operator who may knock at a host."""
    return {
        (host, name): entry[which]["knocks"]
        for host, secrets in kept(fleet).items()
        for name, entry in secrets["operators"].items()
        if which in entry and entry["active"]
    }


def judge(fleet: Fleet, opening: dict[tuple[str, str], list[str]], closed: dict[tuple[str, str], list[str]]) -> None:
    """Each of the sequences does what it should, over IPv4 and IPv6, for a source that nobody has seen yet."""
    tries = [
        (place, family, knocks, state)
        for state, several in (("open", opening), ("reset", closed))
        for place, knocks in several.items()
        for family in FAMILIES
    ]
    sources = {family: iter(fleet.sources.take(family, len(tries))) for family in FAMILIES}
    steps: list[list[object]] = []
    for (host, _operator), family, knocks, _state in tries:
        source, target = next(sources[family]), fleet.hosts[host][family]
        look = ["connect", source, target, SSH]
        steps += [look, ["knock", source, target, knocks], look]
    seen = fleet.outside(*steps)
    wrong = [
        (place, family, before, after)
        for (place, family, _knocks, state), before, after in zip(tries, seen[::3], seen[2::3])
        if (before, after) != ("reset", state)
    ]
    assert wrong == []


def changed(run: Run) -> dict[str, int]:
    """How many tasks have changed something on, or for, each host."""
    return {host: numbers["changed"] for host, numbers in run.recap.items()}


def leaks(output: str, *several: dict[tuple[str, str], list[str]]) -> list[tuple[str, str]]:
    """Whose sequences a text shows: a knock in full, or two numbers of one."""
    numbers = set(re.findall(r"(?<![\w.])\d{4,5}(?![\w.])", output))
    return [
        place
        for known in several
        for place, knocks in known.items()
        if any(knock in output for knock in knocks) or len(numbers & {knock.partition("/")[0] for knock in knocks}) > 1
    ]


@contextlib.contextmanager
def down(fleet: Fleet, host: str) -> Iterator[None]:
    container = fleet.hosts[host]["container"]
    subprocess.run(["docker", "pause", container], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["docker", "unpause", container], check=True, capture_output=True)
