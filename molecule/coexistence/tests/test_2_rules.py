# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A restart of the hosts with the tools at work; and their rules, while the gate changes, goes and comes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import pytest
from lab import FAMILIES, Fleet, Run, Watch, differences, wait_until

HOSTS = ("plain", "ufw", "firewalld", "docker", "persistent")
# What each says once it is at work after a boot, with rules of its own.
AT_WORK = {
    "plain": "systemctl is-active nftables && nft list table inet filter",
    "ufw": "ufw status | grep '22/tcp.*ALLOW'",
    "firewalld": "firewall-cmd --state && firewall-cmd --list-services",
    "docker": "docker exec web true && fail2ban-client status sshd | grep 2001:db8::6 && ip6tables-save | grep 2001:db8::6",
    "persistent": "systemctl is-active netfilter-persistent && ip6tables -C INPUT -p tcp --dport 23 -j DROP",
}
# Every rule and chain of everybody else with its handle, which a rule made anew would not keep.
NFT_RULES = "nft list tables | grep -v fleet_portknock | while read -r table; do nft -as list $table; done"
STEPS = ("changed", "removed", "applied")
WAIT_SECONDS = 30


def rules(fleet: Fleet, host: str) -> dict[str, str]:
    """Other people's rules, in the words of every program that lists them, without counters."""
    found = {"nft": fleet.execute(host, NFT_RULES)}
    for program in ("iptables-save", "ip6tables-save", "iptables-legacy-save", "ip6tables-legacy-save"):
        listing = f"! command -v {program} >/dev/null || {program} 2>/dev/null | sed '/^#/d; s/\\[[0-9]*:[0-9]*\\]//'"
        found[program] = fleet.execute(host, listing)
    return found


class Story(NamedTuple):
    """The runs by name, the rules of each host at each step, and what was wrong with the gates."""

    runs: dict[str, Run]
    rules: dict[str, dict[str, dict[str, str]]]
    problems: dict[str, list[str]]
    gates: dict[str, list[str]]
    at_work: dict[str, str]


@pytest.fixture(scope="module")
def restart(fleet: Fleet) -> Watch:
    with fleet.watched(*HOSTS) as watch:
        fleet.restart()
        fleet.wait_for_boot()
        for host, command in AT_WORK.items():
            wait_until(lambda h=host, c=command: fleet.succeeds(h, c), WAIT_SECONDS, f"{host}'s tools work")  # type: ignore[misc]
    return watch


@pytest.mark.parametrize("host", HOSTS)
def test_a_restart_opens_nothing(restart: Watch, host: str) -> None:
    assert all(restart.tries[host, family] for family in FAMILIES)
    assert [restart.open[host, family] for family in FAMILIES] == [[], []]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.usefixtures("restart")
def test_closed_and_openable_after_a_restart(fleet: Fleet, host: str) -> None:
    assert fleet.judge(host, ports=(22, 8080) if host == "docker" else (22,)) == []


@pytest.fixture(scope="module")
def story(fleet: Fleet, restart: Watch) -> Story:
    made = Story({}, {}, {}, {}, {})
    (fleet.directory / "host_vars").mkdir(exist_ok=True)

    def note(step: str) -> None:
        with ThreadPoolExecutor(max_workers=len(HOSTS)) as pool:
            made.rules[step] = dict(zip(HOSTS, pool.map(partial(rules, fleet), HOSTS)))
            made.gates[step] = [host for host, there in zip(HOSTS, pool.map(fleet.has_gate, HOSTS)) if there]

    def play(name: str, playbook: str, *arguments: str, **variables: object) -> None:
        made.runs[name] = fleet.play(f"fleet.portknock.{playbook}", *arguments, variables=variables, ANSIBLE_FORKS="5")

    note("before")
    with ThreadPoolExecutor(max_workers=2) as pool:
        others = pool.submit(play, "changed", "site", "--limit", "all:!firewalld", knock_server_open_window=7)
        play("mimic beside firewalld", "site", "--limit", "firewalld", knock_server_open_window=7)
        made.problems["mimic beside firewalld"] = fleet.judge("firewalld")
        fleet.write("host_vars/firewalld.yml", {"knock_server_closed_response": "drop"})
        play("drop beside firewalld", "site", "--limit", "firewalld", knock_server_open_window=7)
        others.result()
    note("changed")
    play("removed", "remove", "--limit", "all")
    note("removed")
    fleet.write("host_vars/firewalld.yml", {"knock_server_closed_response": "reset"})
    play("applied", "site")
    note("applied")
    for host in HOSTS:
        made.problems[host] = fleet.judge(host, ports=(22, 8080) if host == "docker" else (22,))
        made.at_work[host] = fleet.execute(host, AT_WORK[host], check=False)
    return made


@pytest.mark.parametrize("name", ["changed", "drop beside firewalld", "removed", "applied"])
def test_each_run_works(story: Story, name: str) -> None:
    run = story.runs[name]
    assert run.status == 0, run.output
    assert all(host["changed"] for host in run.recap.values()), run.output


def test_mimic_beside_firewalld_is_refused_with_a_way_out(story: Story) -> None:
    run = story.runs["mimic beside firewalld"]
    assert run.recap["firewalld"]["failed"] == 1
    assert "knock_server_closed_response=mimic" in run.output
    assert "choose drop or reset" in run.output
    assert story.problems["mimic beside firewalld"] == []


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("step", STEPS)
def test_not_a_byte_of_others_rules_changes(story: Story, host: str, step: str) -> None:
    before = story.rules["before"][host]
    assert before["nft"]
    assert differences(before, story.rules[step][host]) == []


def test_the_gates_come_and_go(story: Story) -> None:
    assert {step: story.gates[step] for step in STEPS} == {
        "changed": list(HOSTS),
        "removed": [],
        "applied": list(HOSTS),
    }


@pytest.mark.parametrize("host", HOSTS)
def test_closed_openable_and_the_tools_at_work_in_the_end(story: Story, host: str) -> None:
    assert story.problems[host] == []
    assert story.at_work[host]
