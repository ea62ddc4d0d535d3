# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible against closed hosts, by one line of inventory."""

from __future__ import annotations

import pytest
from lab import Fleet

LINE = {"ansible_connection": "fleet.portknock.knock_ssh"}
PLAY = [
    {
        "name": "Use the hosts",
        "hosts": "all",
        "gather_facts": True,
        "tasks": [
            {"name": "Copy", "ansible.builtin.copy": {"content": "hello\n", "dest": "/tmp/hello", "mode": "0600"}},
            {"name": "Cut the connection", "ansible.builtin.meta": "reset_connection"},
            {"name": "Wait for it", "ansible.builtin.wait_for_connection": {"timeout": 20}},
            {"name": "Read back", "ansible.builtin.slurp": {"src": "/tmp/hello"}},
        ],
    }
]


@pytest.mark.parametrize("pipelining", ["true", "false"])
def test_any_playbook_gets_in(fleet: Fleet, pipelining: str) -> None:
    playbook = fleet.write("use.yml", PLAY)
    run = fleet.play(playbook, "-vvv", variables=LINE, ANSIBLE_PIPELINING=pipelining)
    assert run.status == 0, run.output
    assert set(run.recap) == set(fleet.hosts)
    assert fleet.leaks(run.output) == []


def test_plain_ssh_does_not(fleet: Fleet) -> None:
    playbook = fleet.write("use.yml", PLAY)
    run = fleet.play(playbook, ANSIBLE_TIMEOUT="3", ANSIBLE_SSH_ARGS="-o ControlPath=none")
    assert {host: numbers["unreachable"] for host, numbers in run.recap.items()} == dict.fromkeys(fleet.hosts, 1)


def test_a_second_run_changes_nothing_and_tells_nothing(fleet: Fleet) -> None:
    run = fleet.play("fleet.portknock.site", "--diff", "-vvv")
    assert run.status == 0, run.output
    assert {host: numbers["changed"] for host, numbers in run.recap.items()} == dict.fromkeys(fleet.hosts, 0)
    assert fleet.leaks(run.output) == []


def test_no_run_so_far_told_a_secret(fleet: Fleet) -> None:
    log = (fleet.directory.parent.parent / "logs" / f"ansible-{fleet.name}.log").read_text()
    assert "fleet.portknock" in log
    assert fleet.leaks(log) == []


@pytest.mark.parametrize("host", ["debian11", "debian12", "debian13"])
def test_nothing_on_the_host_tells_a_secret_to_others(fleet: Fleet, host: str) -> None:
    """Neither the journal nor a file that anybody may read."""
    journal = fleet.execute(host, "journalctl --no-pager -o cat")
    assert fleet.leaks(journal) == []
    readable = fleet.execute(host, "find / -xdev -name '*portknock*' -type f -perm /077 2>/dev/null", check=False)
    texts = [fleet.inside(host).file(path).content_string for path in readable.split()]
    assert [text for text in texts if fleet.leaks(text)] == []
