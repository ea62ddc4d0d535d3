# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Somebody leaves: off every host that answers, and not forgotten on the others. The tests build on each other."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from lab import SSH, Fleet, Run
from sequences_in_use import NO_MASTER, ROTATE, SITE, changed, down, judge, leaks, put_up_gates, rotate, sequences

REVOKE = "fleet.portknock.revoke"
# Says hello, and then waits for whichever comes first: its standard input ends, or the connection does.
SESSION = """
import select, socket, sys
with socket.create_connection((sys.argv[2], 22), 5, (sys.argv[1], 0)) as sock:
    print(sock.recv(99)[:3].decode(), flush=True)
    while True:
        ready, _, _ = select.select([sock, sys.stdin], [], [])
        if sys.stdin in ready:
            sys.exit(0)
        try:
            alive = bool(sock.recv(9999))
        except OSError:
            alive = False
        if not alive:
            sys.exit(1)
"""


@pytest.fixture(scope="module", autouse=True)
def gates(fleet: Fleet) -> None:
    put_up_gates(fleet)


def revoke(fleet: Fleet, operator: str, *arguments: str, **variables: object) -> Run:
    variables = {"portknock_hosts": "all", "portknock_operator": operator, **variables}
    return fleet.play(REVOKE, *arguments, variables=variables, ANSIBLE_TIMEOUT="4", ANSIBLE_SSH_ARGS=NO_MASTER)


def bob(fleet: Fleet, host: str) -> dict[str, Any]:
    entry: dict[str, Any] = fleet.secrets(host)["operators"]["bob"]
    return entry


@contextlib.contextmanager
def session(fleet: Fleet, source: str, target: str) -> Iterator[subprocess.Popen[str]]:
    """A connection to sshd from one of the client's addresses; ends with 1 when somebody else ends it."""
    argv = ["docker", "exec", "-i", fleet.client, "python3", "-c", SESSION, source, target]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "SSH\n"
        yield process
        process.stdin.close()


def test_who_is_to_go_has_to_be_said(fleet: Fleet) -> None:
    before = sequences(fleet)
    run = fleet.play(REVOKE, variables={"portknock_hosts": "all"})
    assert run.status != 0
    assert "name them with -e portknock_operator=NAME" in run.output
    run = fleet.play(REVOKE, variables={"portknock_operator": "bob"})
    assert run.status != 0
    assert "name the hosts with -e portknock_hosts=PATTERN or --limit" in run.output
    run = revoke(fleet, "mallory")
    assert run.status != 0
    assert (
        "portknock_operator: expected an operator whom the keyring knows on one of these hosts; got mallory."
        in run.output
    )
    run = revoke(fleet, "alice", "--limit", "web2")
    assert run.status != 0
    assert "nobody could get in otherwise" in run.output
    assert sequences(fleet) == before
    judge(fleet, before, {})


def test_a_check_takes_nobody_off(fleet: Fleet) -> None:
    before = sequences(fleet)
    run = revoke(fleet, "bob", "--check", "--diff")
    assert run.status == 0, run.output
    assert "+    revoked: " in run.output
    assert sequences(fleet) == before
    judge(fleet, before, {})


def test_off_every_host_that_answers_with_windows_and_sessions(fleet: Fleet) -> None:
    before = sequences(fleet)
    former = {place: knocks for place, knocks in before.items() if place[1] == "bob"}
    others = {place: knocks for place, knocks in before.items() if place[1] != "bob"}
    target = fleet.hosts["web-1"]["ipv4"]
    his, hers = fleet.sources.take("ipv4", 2)
    steps: list[list[object]] = []
    for source, name in ((his, "bob"), (hers, "alice")):
        steps += [
            ["knock", source, target, before["web-1", name]],
            ["until", "open", 5, source, target, SSH],
        ]
    assert fleet.outside(*steps)[1::2] == ["open", "open"]
    with session(fleet, his, target) as his_session, session(fleet, hers, target) as her_session:
        with down(fleet, "db"):
            run = revoke(fleet, "bob", "-vvv", knock_server_end_sessions=True)
        assert run.status != 0
        assert "db did not answer and may still let the operator in" in run.output
        assert {host for host, numbers in run.recap.items() if numbers["failed"]} == {"db"}
        # His window is shut and his session has ended, hers are as they were.
        assert fleet.outside(*(["connect", source, target, SSH] for source in (his, hers))) == ["reset", "open"]
        assert his_session.wait(20) == 1
        assert her_session.poll() is None
    assert leaks(run.output, before) == []
    judge(fleet, others, {("web-1", "bob"): former["web-1", "bob"]})
    # The keyring knows of the host that was down, too.
    assert [bob(fleet, host)["active"] for host in ("web-1", "db")] == [False, False]
    judge(fleet, {("db", "bob"): former["db", "bob"]}, {})
    run = revoke(fleet, "bob")
    assert run.status == 0, run.output
    judge(fleet, others, former)
    # What has just been opened from an address that was once his is closed like his own.
    assert revoke(fleet, "bob").status == 0
    run = revoke(fleet, "bob")
    assert (run.status, set(changed(run).values())) == (0, {0}), run.output


def test_the_inventory_does_not_bring_him_back(fleet: Fleet) -> None:
    """He is among the operators of the inventory still."""
    former = {("web-1", "bob"): bob(fleet, "web-1")["current"]["knocks"]}
    for playbook in (SITE, ROTATE):
        run = fleet.play(playbook, variables={"portknock_hosts": "all", "portknock_serial": "100%"})
        assert run.status == 0, run.output
        judge(fleet, {}, former)
    assert "knock_server_operators: bob, who was revoked on web-1 at" in fleet.play(SITE).output


def test_somebody_is_let_in_again_with_a_new_sequence(fleet: Fleet) -> None:
    former = {("web-1", "bob"): bob(fleet, "web-1")["current"]["knocks"]}
    run = fleet.play(SITE, "--limit", "web-1", variables={"knock_server_readmit": ["bob"]})
    assert run.status == 0, run.output
    judge(fleet, {("web-1", "bob"): sequences(fleet)["web-1", "bob"]}, former)
    run = fleet.play(SITE, "--limit", "web-1")
    assert (run.status, changed(run)["web-1"]) == (0, 0), run.output
    assert rotate(fleet, "--check").status == 0


def test_a_rotation_under_way_is_cut_short_by_a_revocation(fleet: Fleet) -> None:
    run = rotate(fleet, "--limit", "web-1", knock_server_grace="7d")
    assert run.status == 0, run.output
    both = [sequences(fleet, which)["web-1", "bob"] for which in ("current", "next")]
    run = revoke(fleet, "bob", "--limit", "web-1")
    assert run.status == 0, run.output
    for knocks in both:
        judge(fleet, {}, {("web-1", "bob"): knocks})
    for which in ("current", "next"):
        judge(fleet, {("web-1", "alice"): sequences(fleet, which)["web-1", "alice"]}, {})
