# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One-time sequences from the first run to the removal, over a boot. The tests build on each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from lab import FAMILIES, Fleet, Run

HOST = "web-1"
SSH = 2222
# A busy machine uses up several at each connection: whoever sees no open port soon enough sends the next one.
STOCK = 32
VARIABLES = {"knock_server_one_time": STOCK, "sshd_hardening_enabled": False}
# A connection for each task, so a knock for each.
TASKS = 4
LOOK_AROUND: list[dict[str, object]] = [
    {
        "name": "Go there often",
        "hosts": HOST,
        "gather_facts": False,
        "connection": "fleet.portknock.knock_ssh",
        "vars": {"ansible_ssh_args": "-o ControlMaster=no", "knock_operator": "alice"},
        "tasks": [{"name": "Look", "ansible.builtin.raw": "true", "changed_when": False} for _task in range(TASKS)],
    }
]

families = pytest.mark.parametrize("family", FAMILIES)


class Runs:
    """Runs of playbooks on the one host, and all that they have printed."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.printed = ""

    def __call__(self, playbook: Any, *arguments: str, variables: Mapping[str, object] | None = None) -> Run:
        run = self._fleet.play(
            playbook, "--limit", HOST, *arguments, variables={"ansible_port": SSH, **(variables or {})}
        )
        self.printed += run.output
        assert run.status == 0, run.output
        return run

    def site(self, *arguments: str) -> dict[str, int]:
        return self("fleet.portknock.site", *arguments, variables=VARIABLES).recap[HOST]

    def often(self) -> None:
        assert self(self._fleet.write("often.yml", LOOK_AROUND)).recap[HOST]["ok"] == TASKS

    def info(self) -> dict[str, dict[str, int]]:
        """What knock_gate_info counts, by operator."""
        play = {
            "name": "Count",
            "hosts": HOST,
            "gather_facts": False,
            "become": True,
            "connection": "fleet.portknock.knock_ssh",
            "tasks": [
                {"name": "Look", "fleet.portknock.knock_gate_info": {}, "register": "found"},
                {"name": "Tell", "ansible.builtin.debug": {"msg": "COUNTS {{ found.gate.one_time | to_json }}"}},
            ],
        }
        output = self(self._fleet.write("count.yml", [play])).output
        line = next(line for line in output.splitlines() if "COUNTS " in line)
        counts: dict[str, dict[str, int]] = json.loads(json.loads("{" + line.strip() + "}")["msg"].partition(" ")[2])
        return counts


@pytest.fixture(scope="module")
def runs(fleet: Fleet) -> Iterator[Runs]:
    made = Runs(fleet)
    assert made.site()["changed"]
    yield made
    made("fleet.portknock.remove", variables={"portknock_hosts": HOST, "knock_server_purge_keyring": True})
    left = fleet.state(HOST)
    assert "portknock" not in left["files"] + left["units"] + left["ruleset"]
    assert not list((fleet.directory / "knock_keyring").glob(f".{HOST}.used"))


def states(fleet: Fleet, family: str, knocks: list[str]) -> str:
    """What a source that is nobody's sees after these knocks."""
    (source,) = fleet.sources.take(family)
    target = fleet.hosts[HOST][family]
    return str(fleet.outside(["knock", source, target, knocks], ["connect", source, target, SSH])[-1])


@pytest.mark.usefixtures("runs")
@families
def test_the_reusable_sequence_does_not_open(fleet: Fleet, family: str) -> None:
    assert states(fleet, family, fleet.knocks(HOST, "alice")) == "silent"


def test_a_second_run_changes_nothing(runs: Runs) -> None:
    assert runs.site()["changed"] == 0
    assert runs.site("--check")["changed"] == 0


def test_each_connection_takes_the_next(fleet: Fleet, runs: Runs) -> None:
    before = runs.info()["alice"]
    runs.often()
    used = json.loads((fleet.directory / "knock_keyring" / f".{HOST}.used").read_text())["used"]["alice"]
    after = runs.info()["alice"]
    assert used["opened"] >= before["first"] + TASKS - 1
    assert after["left"] <= before["left"] - TASKS
    assert after["known"] == STOCK
    assert after["armed"] >= 1


@families
def test_a_sequence_that_was_seen_opens_nothing(fleet: Fleet, runs: Runs, family: str) -> None:
    stock, first = fleet.one_time(HOST, "bob"), runs.info()["bob"]["first"]
    assert states(fleet, family, stock[first]) == "open"
    assert [states(fleet, other, stock[first]) for other in FAMILIES] == ["silent", "silent"]


def test_in_again_after_a_boot(fleet: Fleet, runs: Runs) -> None:
    """Without anybody's hands, and with nothing that opened before."""
    before = runs.info()
    fleet.restart(HOST)
    fleet.wait_for_boot()
    runs.often()
    stock = fleet.one_time(HOST, "bob")
    assert states(fleet, "ipv4", stock[min(stock)]) == "silent"
    after = runs.info()
    assert after["bob"]["left"] < before["bob"]["left"]
    # Bob has used none since, and what was armed for him when the host went down is lost.
    assert states(fleet, "ipv4", stock[before["bob"]["first"]]) == "silent"
    assert states(fleet, "ipv4", stock[after["bob"]["first"]]) == "open"


def test_site_fills_the_stock_up(runs: Runs) -> None:
    while 2 * runs.info()["alice"]["left"] >= STOCK:
        runs.often()
    assert runs.site()["changed"]
    # What the run itself has used is gone by now.
    assert runs.info()["alice"]["left"] > STOCK // 2
    assert runs.site()["changed"] == 0
    runs.often()


def test_each_for_one_connection_only(fleet: Fleet, runs: Runs) -> None:
    """Together with single use: a sequence opens once, and what it opens is good for one connection."""
    # More of them: each connection takes one to look and one to use.
    variables = {**VARIABLES, "knock_server_one_time": 2 * STOCK, "knock_server_single_use": True}
    assert runs("fleet.portknock.site", variables=variables).recap[HOST]["changed"]
    runs.often()
    (source,), target = fleet.sources.take("ipv4"), fleet.hosts[HOST]["ipv4"]
    first = runs.info()["bob"]["first"]
    connect = ["connect", source, target, SSH]
    seen = fleet.outside(["knock", source, target, fleet.one_time(HOST, "bob")[first]], connect, connect)
    assert seen[-2:] == ["open", "silent"]
    assert states(fleet, "ipv4", fleet.one_time(HOST, "bob")[first]) == "silent"
    # The stock may have been filled up by the first of these.
    runs("fleet.portknock.site", variables=variables)
    assert runs("fleet.portknock.site", variables=variables).recap[HOST]["changed"] == 0


def test_nothing_gives_a_sequence_away(fleet: Fleet, runs: Runs) -> None:
    assert fleet.leaks(runs.printed, HOST) == []
    used = fleet.directory / "knock_keyring" / f".{HOST}.used"
    assert fleet.leaks(used.read_text(), HOST) == []
    assert used.stat().st_mode & 0o777 == 0o600
    spent = "/etc/fleet-portknock/spent.json"
    assert fleet.execute(HOST, f"stat -c %a {spent}").strip() == "600"
    told = fleet.execute(HOST, f"cat {spent}; journalctl -q --no-pager -b; grep -r . /run/fleet-portknock || true")
    assert fleet.leaks(told, HOST) == []
    readable = fleet.execute(HOST, "find /etc/fleet-portknock /run/fleet-portknock -perm /077")
    assert readable == ""
