# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A user's own playbook, inventory and settings, from the first run to the removal. The tests build on each other."""

from __future__ import annotations

import json
from typing import Any

import pytest
from lab import FAMILIES, Fleet, differences

SSH = 2222
PUBLISHED = 8080
HOSTS = ("web-1", "db1")
# An address of the fleet's network that nobody has.
ABSENT = 240

PLACES = [(host, family) for host in HOSTS for family in FAMILIES]
everywhere = pytest.mark.parametrize(("host", "family"), PLACES)


def own_playbook(**play: object) -> list[dict[str, object]]:
    include = {"name": "fleet.portknock.knock_server", "apply": {"tags": ["gate"]}}
    return [
        {
            "name": "Close the hosts, and do something else",
            "hosts": "all",
            "become": True,
            "gather_facts": False,
            **play,
            "tasks": [
                {"name": "Close", "ansible.builtin.include_role": include, "tags": ["gate"]},
                {"name": "Look around", "ansible.builtin.command": "id -un", "changed_when": False, "tags": ["other"]},
            ],
        }
    ]


def own_inventory(fleet: Fleet, absent: bool) -> dict[str, Any]:
    """One host by its IPv4 and one by its IPv6 address, a user with sudo, and the one line."""
    hosts = {
        "web-1": {"ansible_host": fleet.hosts["web-1"]["ipv4"]},
        "db1": {"ansible_host": fleet.hosts["db1"]["ipv6"]},
    }
    if absent:
        hosts["gone"] = {"ansible_host": f"{fleet.description['ipv4'].rpartition('.')[0]}.{ABSENT}"}
    shared = json.loads(fleet.inventory.read_text())["all"]["vars"]
    line = {"ansible_connection": "fleet.portknock.knock_ssh"}
    return {"all": {"hosts": hosts, "vars": {**shared, **line, "ansible_user": "admin", "ansible_port": SSH}}}


def dynamic_inventory(fleet: Fleet) -> str:
    """The same as a program that prints it."""
    static = own_inventory(fleet, absent=False)["all"]
    answer = {
        "_meta": {"hostvars": {host: {**static["vars"], **own} for host, own in static["hosts"].items()}},
        "all": {"hosts": list(static["hosts"])},
    }
    return f"#!/bin/sh\ncat <<'JSON'\n{json.dumps(answer)}\nJSON\n"


@pytest.fixture(scope="module")
def before(fleet: Fleet) -> dict[str, dict[str, str]]:
    return {host: fleet.state(host) for host in HOSTS}


@pytest.fixture(scope="module")
def applied(fleet: Fleet, before: dict[str, dict[str, str]]) -> Any:
    """The first run, with one host down."""
    inventory = fleet.write("with-absent.yml", own_inventory(fleet, absent=True))
    fleet.write("own.yml", own_inventory(fleet, absent=False))
    return fleet.play(fleet.write("first.yml", own_playbook()), inventory=inventory, ANSIBLE_TIMEOUT="5")


def test_one_host_down_does_not_stop_the_others(applied: Any) -> None:
    assert {host: applied.recap[host]["failed"] for host in HOSTS} == dict.fromkeys(HOSTS, 0), applied.output
    assert all(applied.recap[host]["changed"] for host in HOSTS)
    assert applied.recap["gone"]["unreachable"] == 1


@pytest.mark.usefixtures("applied")
def test_the_missing_package_was_installed(fleet: Fleet) -> None:
    assert fleet.inside("db1").package("nftables").is_installed


@everywhere
@pytest.mark.usefixtures("applied")
def test_silent_without_a_knock(fleet: Fleet, host: str, family: str) -> None:
    (source,) = fleet.sources.take(family)
    assert fleet.outside(["connect", source, fleet.hosts[host][family], SSH]) == ["silent"]


@everywhere
@pytest.mark.usefixtures("applied")
@pytest.mark.parametrize("operator", ["alice", "bob"])
def test_each_operator_opens(fleet: Fleet, host: str, family: str, operator: str) -> None:
    target = fleet.hosts[host][family]
    (source,) = fleet.sources.take(family)
    knocks = fleet.knocks(host, operator)
    assert {knock.split("/")[1] for knock in knocks} == {"tcp", "udp"}
    states = fleet.outside(["knock", source, target, knocks], ["connect", source, target, SSH])
    assert states[-1] == "open"


@pytest.mark.usefixtures("applied")
def test_no_two_operators_share_a_port(fleet: Fleet) -> None:
    assert not set(fleet.knocks("db1", "alice")) & set(fleet.knocks("db1", "bob"))


@pytest.mark.usefixtures("applied")
def test_a_published_port_hides_too(fleet: Fleet) -> None:
    target = fleet.hosts["web-1"]["ipv4"]
    (source,) = fleet.sources.take("ipv4")
    states = fleet.outside(
        ["connect", source, target, PUBLISHED],
        ["knock", source, target, fleet.knocks("web-1", "bob")],
        ["connect", source, target, PUBLISHED],
    )
    # A web server says nothing until it is asked.
    assert (states[0], states[-1]) == ("silent", "mute")


@everywhere
@pytest.mark.usefixtures("applied")
def test_any_wrong_port_spoils_a_sequence(fleet: Fleet, host: str, family: str) -> None:
    target = fleet.hosts[host][family]
    (source,) = fleet.sources.take(family)
    knocks = fleet.knocks(host, "alice")
    used = {knock for operator in ("alice", "bob") for knock in fleet.knocks(host, operator)}
    wrong = next(f"{port}/tcp" for port in range(20000, 30000) if f"{port}/tcp" not in used)
    states = fleet.outside(
        ["knock", source, target, [*knocks[:2], wrong, *knocks[2:]], 0.01], ["connect", source, target, SSH]
    )
    assert states[-1] == "silent"


@pytest.mark.usefixtures("applied")
@pytest.mark.parametrize(
    ("play", "arguments"),
    [
        ({"strategy": "free"}, ()),
        ({"strategy": "host_pinned"}, ()),
        ({"serial": 1}, ()),
        ({}, ("--forks", "1")),
        ({}, ("--limit", "web-1")),
        ({}, ("--tags", "gate")),
        ({}, ("--skip-tags", "gate")),
    ],
    ids=["free", "host_pinned", "serial", "forks", "limit", "tags", "skip-tags"],
)
def test_run_again_in_every_way(fleet: Fleet, play: dict[str, object], arguments: tuple[str, ...]) -> None:
    run = fleet.play(fleet.write("again.yml", own_playbook(**play)), *arguments, inventory=fleet.directory / "own.yml")
    assert run.status == 0, run.output
    expected = ["web-1"] if "--limit" in arguments else sorted(HOSTS)
    assert sorted(run.recap) == sorted(expected)
    assert not any(host["changed"] for host in run.recap.values()), run.output
    assert all(host["ok"] for host in run.recap.values())
    assert ("Apply, prove and confirm" in run.output) == ("--skip-tags" not in arguments)


@pytest.mark.usefixtures("applied")
def test_an_inventory_that_is_a_program(fleet: Fleet) -> None:
    script = fleet.write("inventory.sh", dynamic_inventory(fleet))
    script.chmod(0o755)
    # sshd has a scenario of its own.
    run = fleet.play("fleet.portknock.site", inventory=script, variables={"sshd_hardening_enabled": False})
    assert run.status == 0, run.output
    assert {host: numbers["changed"] for host, numbers in run.recap.items()} == dict.fromkeys(HOSTS, 0)


@pytest.mark.usefixtures("applied")
@pytest.mark.parametrize(
    ("play", "window", "single_use"),
    [({"strategy": "free"}, 7, True), ({"strategy": "host_pinned"}, 8, False), ({"serial": 1}, 6, False)],
    ids=["free", "host_pinned", "serial"],
)
def test_a_change_in_every_way(fleet: Fleet, play: dict[str, object], window: int, single_use: bool) -> None:
    """A change goes through the whole trial, whatever the strategy; to single use and back, too."""

    def run(*arguments: str) -> dict[str, int]:
        done = fleet.play(
            fleet.write("change.yml", own_playbook(**play)),
            *arguments,
            inventory=fleet.directory / "own.yml",
            variables={"knock_server_open_window": window, "knock_server_single_use": single_use},
            # Each task makes a connection of its own.
            ANSIBLE_SSH_ARGS="-o ControlMaster=no -o ControlPath=none",
        )
        assert done.status == 0, done.output
        return {host: numbers["changed"] for host, numbers in done.recap.items()}

    # The keyring's note of single use is a change of its own; it goes with the proof of a gate that has none.
    assert run() == dict.fromkeys(HOSTS, 2 if single_use else 1)
    assert {host: fleet.secrets(host).get("single_use", False) for host in HOSTS} == dict.fromkeys(HOSTS, single_use)
    assert not single_use or run() == dict.fromkeys(HOSTS, 0)
    for host, family in PLACES:
        target = fleet.hosts[host][family]
        (source,) = fleet.sources.take(family)
        connect = ["connect", source, target, SSH]
        states = fleet.outside(["knock", source, target, fleet.knocks(host, "alice")], connect, connect)
        assert states[-2:] == ["open", "silent" if single_use else "open"]


@pytest.mark.usefixtures("applied")
def test_removal_asks_for_which_hosts(fleet: Fleet) -> None:
    run = fleet.play("fleet.portknock.remove", inventory=fleet.directory / "own.yml")
    assert run.status != 0
    assert "portknock_hosts" in run.output
    assert all(fleet.has_gate(host) for host in HOSTS)


@pytest.mark.usefixtures("applied")
def test_removal_leaves_nothing(fleet: Fleet, before: dict[str, dict[str, str]]) -> None:
    run = fleet.play(
        "fleet.portknock.remove",
        inventory=fleet.directory / "own.yml",
        variables={"portknock_hosts": "all"},
    )
    assert run.status == 0, run.output
    assert differences(before["web-1"], fleet.state("web-1")) == []
    # The package that was installed stays; nothing of the gate does.
    left = fleet.state("db1")
    assert (left["run"], left["transient"]) == ("", "")
    assert "portknock" not in left["files"] + left["units"] + left["ruleset"]
    assert [fleet.outside(["connect", *fleet.sources.take(f), fleet.hosts[h][f], SSH])[0] for h, f in PLACES] == [
        "open"
    ] * len(PLACES)


def test_a_second_removal_finds_nothing(fleet: Fleet) -> None:
    run = fleet.play("fleet.portknock.remove", "--limit", "all", inventory=fleet.directory / "own.yml")
    assert run.status == 0, run.output
    assert not any(host["changed"] for host in run.recap.values())
