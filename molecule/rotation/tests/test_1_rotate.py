# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sequences change while the fleet is in use, whatever becomes of the run. The tests build on each other."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from lab import SSH, Fleet, wait_until
from sequences_in_use import ROTATE, SITE, changed, down, judge, leaks, put_up_gates, rotate, sequences

TRIAL = "/run/fleet-portknock/trial"
OPENING = "    update @open{{ name }} "
LATER = {"knock_server_grace": "7d"}


@pytest.fixture(scope="module", autouse=True)
def gates(fleet: Fleet) -> None:
    put_up_gates(fleet)


def test_a_check_says_what_would_happen(fleet: Fleet) -> None:
    folder = fleet.directory / "knock_keyring"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    gate = [fleet.execute(host, "sha256sum /etc/fleet-portknock/gate.rules") for host in fleet.hosts]
    run = rotate(fleet, "--check", "--diff")
    assert run.status == 0, run.output
    assert '"got_new_sequences": 3' in run.output
    assert run.output.count("+    both: true") == 5
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [fleet.execute(host, "sha256sum /etc/fleet-portknock/gate.rules") for host in fleet.hosts] == gate


def test_hosts_have_to_be_named(fleet: Fleet) -> None:
    run = fleet.play(ROTATE)
    assert run.status != 0
    assert "name the hosts with -e portknock_hosts=PATTERN or --limit" in run.output
    run = rotate(fleet, knock_server_grace="7 days")
    assert run.status != 0
    assert "knock_server_grace: expected a time such as 0, 90m, 12h or 7d; got '7 days'" in run.output


def test_the_fleet_gets_new_sequences_while_it_is_in_use(fleet: Fleet) -> None:
    former = sequences(fleet)
    # A source that has knocked before, and a session: both go on.
    (source,), host = fleet.sources.take("ipv4"), "web-1"
    target = fleet.hosts[host]["ipv4"]
    _knocked, state = fleet.outside(
        ["knock", source, target, former[host, "bob"]], ["until", "open", 5, source, target, SSH]
    )
    assert state == "open"
    with fleet.watched(*fleet.hosts) as watch:
        run = rotate(fleet, "-vvv", portknock_serial=[1, "10%"])
    assert run.status == 0, run.output
    assert {place: stretches for place, stretches in watch.open.items() if stretches} == {}
    assert min(watch.tries.values()) > 20
    assert fleet.outside(["connect", source, target, SSH]) == ["open"]
    present = sequences(fleet)
    assert sequences(fleet, "next") == {}
    assert [place for place in former if former[place] == present[place]] == []
    assert {place[0]: place[1] for place in former if place[0] == "web2"} == {"web2": "alice"}
    judge(fleet, present, former)
    assert leaks(run.output, former, present) == []
    assert '"retired_the_former": 3' in run.output
    assert '"left_as_they_were": 0' in run.output
    # What is deployed is what site.yml would deploy.
    run = fleet.play(SITE)
    assert (run.status, set(changed(run).values())) == (0, {0}), run.output


def test_both_open_for_the_time_of_grace(fleet: Fleet) -> None:
    former = sequences(fleet)
    run = rotate(fleet, "--limit", "web-1,db", **LATER)
    assert run.status == 0, run.output
    assert '"open_for_both": 2' in run.output
    both = {place: knocks for place, knocks in former.items() if place[0] != "web2"}
    assert {place: sequences(fleet)[place] for place in both} == both
    following = sequences(fleet, "next")
    assert set(following) == set(both)
    judge(fleet, {**both}, {})
    judge(fleet, following, {})
    # Neither the role nor another run within that time ends it.
    for playbook, variables in ((SITE, {}), (ROTATE, LATER)):
        run = fleet.play(playbook, "--limit", "web-1,db", variables={"portknock_hosts": "all", **variables})
        assert (run.status, changed(run)["db"]) == (0, 0), run.output
    assert sequences(fleet, "next") == following
    run = rotate(fleet, "--limit", "web-1,db")
    assert run.status == 0, run.output
    assert {place: sequences(fleet)[place] for place in both} == following
    judge(fleet, following, both)


def test_one_operator_alone(fleet: Fleet) -> None:
    former = sequences(fleet)
    run = rotate(fleet, portknock_operator="bob")
    assert run.status == 0, run.output
    present = sequences(fleet)
    assert {place for place in former if former[place] != present[place]} == {("web-1", "bob"), ("db", "bob")}
    judge(fleet, {place: present[place] for place in present if place[1] == "bob"}, {})
    run = rotate(fleet, portknock_operator="mallory")
    assert run.status != 0
    assert "portknock_operator: expected an operator who may knock at one of these hosts; got mallory." in run.output
    assert sequences(fleet) == present


def test_an_operator_comes_and_goes_and_the_others_keep_theirs(fleet: Fleet) -> None:
    former = sequences(fleet)
    run = fleet.play(SITE, variables={"knock_server_operators": ["alice", "bob", "carol"]})
    assert run.status == 0, run.output
    present = sequences(fleet)
    assert {place: present[place] for place in former} == former
    carol = {place: knocks for place, knocks in present.items() if place[1] == "carol"}
    assert {place[0] for place in carol} == set(fleet.hosts)
    # Variables of the command line are for all hosts.
    assert ("web2", "bob") in present
    judge(fleet, {**carol, ("db", "alice"): former["db", "alice"]}, {})
    run = fleet.play(SITE)
    assert run.status == 0, run.output
    assert {place: sequences(fleet)[place] for place in former} == former
    judge(fleet, {("db", "alice"): former["db", "alice"]}, carol)


def test_a_host_that_is_down_is_told_of_and_caught_up(fleet: Fleet) -> None:
    former = sequences(fleet)
    with down(fleet, "web2"):
        run = rotate(fleet)
    assert run.status != 0
    assert "web2 did not answer and keeps its former sequences" in run.output
    assert {host for host, numbers in run.recap.items() if numbers["failed"]} == {"web2"}
    between = sequences(fleet)
    assert {place for place in former if former[place] == between[place]} == {("web2", "alice")}
    run = rotate(fleet)
    assert run.status == 0, run.output
    present = sequences(fleet)
    # The others have had their turn in this rotation.
    assert {place for place in between if between[place] != present[place]} == {("web2", "alice")}
    judge(fleet, present, former)


def test_a_run_that_fails_stops_by_itself_and_goes_on(fleet: Fleet) -> None:
    """A batch that fails is as far as it goes; its hosts are as they were."""
    former = sequences(fleet)
    templates = broken_templates(fleet)
    run = rotate(fleet, portknock_serial=1, knock_server_templates=str(templates))
    assert run.status != 0
    assert run.recap["web-1"]["failed"] == 1
    assert set(run.recap) == {"web-1"}, run.output
    assert sequences(fleet) == former
    # No connection was left through which it could have gone back at once.
    wait_until(lambda: not fleet.succeeds("web-1", f"[ -e {TRIAL} ]"), 45, "the host has gone back")
    judge(fleet, former, sequences(fleet, "next"))
    run = rotate(fleet)
    assert run.status == 0, run.output
    judge(fleet, sequences(fleet), former)
    assert sequences(fleet, "next") == {}


def broken_templates(fleet: Fleet) -> Path:
    """A gate that lets nobody in, so that the proof fails."""
    role = Path(__file__).parents[3] / "roles/knock_server/templates"
    folder = fleet.directory / "templates"
    subprocess.run(["cp", "-r", str(role), str(folder)], check=True)
    gate = folder / "nftables/knocks.nft.j2"
    text = gate.read_text()
    assert text.count(OPENING) == 1
    gate.write_text(text.replace(OPENING, f"#{OPENING}"))
    return folder


def generation(fleet: Fleet, host: str) -> int:
    number: int = fleet.secrets(host)["generation"]
    return number


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_a_run_that_is_stopped_goes_on_where_it_was(fleet: Fleet, ending: signal.Signals) -> None:
    """Stopped while the second host's keyring entry has changed and its gate perhaps not."""
    former, before = sequences(fleet), generation(fleet, "web2")
    done_first = generation(fleet, "web-1")
    started = {"portknock_hosts": "all"}
    fleet.kill_play_when(ROTATE, lambda: generation(fleet, "web2") > before, started, ending)
    after_first = generation(fleet, "web-1")
    assert after_first == done_first + 2
    untouched = generation(fleet, "db")
    run = rotate(fleet)
    assert run.status == 0, run.output
    assert generation(fleet, "web-1") == after_first
    assert generation(fleet, "db") == untouched + 2
    assert sequences(fleet, "next") == {}
    judge(fleet, sequences(fleet), former)
