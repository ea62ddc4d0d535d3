# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whatever dies on the way, the host goes back to what it had, by itself, and is reachable."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from lab import FAMILIES, Fleet, differences, wait_until

SSH = 22
# The timer of vars.yml, and time for the host to act on it.
GOES_BACK_WITHIN = 15 + 20
# Ports above 1023 are silent and the protected one is not, which the proof looks at three times before it fails: time
# enough to kill something.
DEAF = "add table inet deaf; add chain inet deaf early { type filter hook prerouting priority -500; }; "
DEAF += "add rule inet deaf early tcp flags syn tcp dport 1024-65535 drop"


@pytest.fixture
def deaf(fleet: Fleet) -> Iterator[None]:
    fleet.execute("box", f"nft '{DEAF}'")
    yield
    fleet.execute("box", "nft delete table inet deaf", check=False)


def left_by_a_trial(fleet: Fleet) -> str:
    """What only a gate, or a trial that is not over, has on a host; a lock file may stay until the next boot."""
    found = fleet.execute("box", "nft list tables | grep -o fleet_portknock", check=False)
    found += fleet.execute("box", "systemctl list-units --all --no-legend '*portknock*' | cat")
    search = "find /run/fleet-portknock /etc/fleet-portknock -type f ! -name lock"
    return found + fleet.execute("box", search, check=False)


def reachable_by_plain_ssh(fleet: Fleet) -> bool:
    playbook = fleet.write(
        "plain.yml",
        [
            {
                "name": "Answer",
                "hosts": "box",
                "connection": "ssh",
                "gather_facts": False,
                "tasks": [{"name": "Answer", "ansible.builtin.ping": None}],
            }
        ],
    )
    return fleet.play(playbook, ANSIBLE_SSH_ARGS="-o ControlPath=none").status == 0


@pytest.mark.usefixtures("deaf")
def test_not_proved_goes_back_and_others_go_on(fleet: Fleet) -> None:
    run = fleet.play("fleet.portknock.site")
    assert run.status == 2, run.output
    assert run.recap["box"]["failed"] == 1
    assert run.recap["other"]["failed"] == 0
    assert fleet.has_gate("other")
    assert fleet.leaks(run.output) == []
    wait_until(lambda: not fleet.has_gate("box"), GOES_BACK_WITHIN, "box has gone back")
    assert reachable_by_plain_ssh(fleet)


@pytest.mark.usefixtures("deaf")
def test_the_controller_is_killed(fleet: Fleet) -> None:
    """At one step; tests/faults has all of them. What the killed run's module left is looked through below."""
    fleet.kill_play_when("fleet.portknock.site", lambda: fleet.has_gate("box"))
    wait_until(lambda: not fleet.has_gate("box"), GOES_BACK_WITHIN, "box has gone back")
    with contextlib.suppress(AssertionError):
        wait_until(lambda: left_by_a_trial(fleet) == "", 10, "nothing of the trial is left")
    assert left_by_a_trial(fleet) == ""
    assert reachable_by_plain_ssh(fleet)


def test_a_gate_comes_back_when_its_successor_fails(fleet: Fleet) -> None:
    first = fleet.play("fleet.portknock.site")
    assert first.status == 0, first.output
    fleet.execute("box", f"nft '{DEAF}'")
    changed = fleet.play("fleet.portknock.site", variables={"knock_server_closed_response": "drop"})
    fleet.execute("box", "nft delete table inet deaf")
    assert changed.recap["box"]["failed"] == 1 or changed.recap["box"]["unreachable"] == 1, changed.output
    for family in FAMILIES:
        target = fleet.hosts["box"][family]
        (source,) = fleet.sources.take(family)
        states = fleet.outside(
            ["until", "reset", GOES_BACK_WITHIN, source, target, SSH],
            ["knock", source, target, fleet.knocks("box")],
            ["connect", source, target, SSH],
        )
        assert (states[0], states[-1]) == ("reset", "open")


@pytest.fixture
def no_new_login(fleet: Fleet) -> Iterator[None]:
    """A connection that is there already serves on, and sshd lets nobody in any more."""
    assert fleet.play("fleet.portknock.site").status == 0
    fleet.execute("box", "echo 'DenyUsers root' >/etc/ssh/sshd_config.d/deny.conf; systemctl reload ssh")
    yield
    fleet.execute("box", "rm /etc/ssh/sshd_config.d/deny.conf; systemctl reload ssh")


@pytest.mark.usefixtures("no_new_login")
def test_an_old_connection_confirms_nothing(fleet: Fleet) -> None:
    before = fleet.state("box")
    run = fleet.play("fleet.portknock.site", variables={"knock_server_closed_response": "drop"})
    assert run.recap["box"]["failed"] == 1, run.output
    assert "Not confirmed: no fresh connection could be made" in run.output
    assert "The host has gone back to what it had." in run.output
    assert differences(before, fleet.state("box")) == []


def test_no_secret_lies_around_after_all_that(fleet: Fleet) -> None:
    """The killed runs' modules, for one: their arguments hold the gate's text."""
    found = fleet.execute("box", "find /root/.ansible /home/admin/.ansible /tmp /var/tmp -type f | cat", check=False)
    texts = [fleet.inside("box").file(path).content_string for path in found.split()]
    assert [text for text in texts if fleet.leaks(text)] == []
    assert fleet.leaks(fleet.execute("box", "journalctl --no-pager -o cat")) == []
    log = fleet.directory / "killed.log"
    assert fleet.leaks(log.read_text()) == []


def test_the_fleet_is_usable_in_the_end(fleet: Fleet) -> None:
    run = fleet.play("fleet.portknock.site")
    assert run.status == 0, run.output
