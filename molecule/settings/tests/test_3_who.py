# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who opened what and when, an operator who expires, and the end of what one has open. The tests build on each other."""

from __future__ import annotations

import calendar
import contextlib
import json
import random
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from typing import IO, Any, cast

import pytest
from lab import OUTSIDE, Fleet, Run, wait_until

SSH = 2222
HOSTS = ("web-1", "db1")
FAMILY = {"web-1": "ipv4", "db1": "ipv6"}
# As an operator gives it: long enough for the run that deploys it.
SECONDS = 75
LONGEST_PLAY = 100


@pytest.fixture(scope="module", autouse=True)
def _inventory(fleet: Fleet) -> None:
    content = json.loads(fleet.inventory.read_text())
    content["all"]["vars"] |= {"ansible_port": SSH, "ansible_connection": "fleet.portknock.knock_ssh"}
    fleet.write("who.yml", content)


def play(fleet: Fleet, playbook: Any, **variables: object) -> Run:
    # sshd has a scenario of its own.
    variables |= {"sshd_hardening_enabled": False}
    return fleet.play(playbook, inventory=fleet.directory / "who.yml", variables=variables)


def site(fleet: Fleet, **variables: object) -> Run:
    run = play(fleet, "fleet.portknock.site", **variables)
    assert run.status == 0, run.output
    return run


def utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def openings(fleet: Fleet) -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    """What knock_gate_info says of each host, by operator and source."""
    look: dict[str, object] = {"fleet.portknock.knock_gate_info": {}, "register": "found"}
    keep = {
        "ansible.builtin.copy": {
            "content": "{{ found.openings | to_json }}",
            "dest": "{{ playbook_dir }}/openings-{{ inventory_hostname }}.json",
        },
        "delegate_to": "localhost",
        "vars": {"ansible_connection": "local", "ansible_python_interpreter": "{{ ansible_playbook_python }}"},
    }
    run = play(fleet, fleet.write("info.yml", [{"hosts": "all", "gather_facts": False, "tasks": [look, keep]}]))
    assert run.status == 0, run.output
    result = {}
    for host in HOSTS:
        text = (fleet.directory / f"openings-{host}.json").read_text()
        assert fleet.leaks(text) == []
        found = json.loads(text)
        assert [entry["last"] for entry in found] == sorted((entry["last"] for entry in found), reverse=True)
        result[host] = {(entry["operator"], entry["source"]): entry for entry in found}
    return result


def opens(fleet: Fleet, host: str, operator: str) -> tuple[str, bool]:
    """Knock as an operator; the source, and whether that opened."""
    target = fleet.hosts[host][FAMILY[host]]
    (source,) = fleet.sources.take(FAMILY[host])
    seen = fleet.outside(["knock", source, target, fleet.knocks(host, operator)], ["connect", source, target, SSH])
    return source, seen[-1] == "open"


@pytest.fixture(scope="module")
def sources(fleet: Fleet) -> dict[tuple[str, str], str]:
    """Where operators opened the gates from, by host and operator."""
    site(fleet)
    found = {}
    for host in HOSTS:
        for operator in ("alice", "bob"):
            found[host, operator], opened = opens(fleet, host, operator)
            assert opened
    return found


def test_each_opening_is_its_operator_s(fleet: Fleet, sources: dict[tuple[str, str], str]) -> None:
    before = time.time()
    seen = openings(fleet)
    for (host, operator), source in sources.items():
        entry = seen[host][operator, source]
        assert entry["count"] == 1
        assert before - 300 < calendar.timegm(time.strptime(entry["last"], "%Y-%m-%dT%H:%M:%SZ")) <= time.time() + 1
    # The controller's are among them, too: it proved the gates, and got in.
    assert all(len(entries) > 2 for entries in seen.values())


def test_an_operator_who_expires(fleet: Fleet, sources: dict[tuple[str, str], str]) -> None:
    ends = int(time.time()) + SECONDS
    valid_until = {"bob": utc(ends)}
    site(fleet, knock_server_valid_until=valid_until)
    opened = {host: opens(fleet, host, "bob")[1] for host in HOSTS}
    if time.time() < ends:
        assert opened == dict.fromkeys(HOSTS, True)
    wait_until(lambda: time.time() > ends + 1, SECONDS + 5, "the time is over")
    for host in HOSTS:
        assert [opens(fleet, host, operator)[1] for operator in ("bob", "alice")] == [False, True]
    run = site(fleet, knock_server_valid_until=valid_until)
    assert f"the time of bob on web-1 is over since {valid_until['bob']}: they are shut out." in run.output
    assert not any(numbers["changed"] for numbers in run.recap.values()), run.output
    # What is on record outlives the gates that came since.
    seen = openings(fleet)
    assert all((operator, source) in seen[host] for (host, operator), source in sources.items())


@pytest.mark.usefixtures("sources")
def test_no_controller_and_no_boot_brings_them_back(fleet: Fleet) -> None:
    fleet.restart()
    fleet.wait_for_boot()
    for host in HOSTS:
        assert [opens(fleet, host, operator)[1] for operator in ("bob", "alice")] == [False, True]
    seen = openings(fleet)
    assert not any(operator == "bob" for entries in seen.values() for operator, _source in entries)


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize(
    ("valid_until", "says"),
    [
        (
            {"alice": "2999-01-01T00:00:00Z", "bob": "2999-01-01T00:00:00Z"},
            "knock_server_valid_until: expected an operator of",
        ),
        (
            {"carol": "2999-01-01T00:00:00Z"},
            "knock_server_valid_until: expected operators that knock_server_operators names",
        ),
        ({"bob": "tomorrow"}, "knock_server_valid_until, operator bob: expected a UTC time"),
    ],
    ids=["nobody-left", "unknown", "no-time"],
)
def test_nothing_changes_before_all_is_checked(fleet: Fleet, valid_until: dict[str, str], says: str) -> None:
    before = [fleet.secrets(host) for host in HOSTS]
    run = play(fleet, "fleet.portknock.site", knock_server_valid_until=valid_until)
    assert run.status != 0
    assert says in run.output
    assert [fleet.secrets(host) for host in HOSTS] == before


@contextlib.contextmanager
def sessions(fleet: Fleet, sources: dict[tuple[str, str], str]) -> Iterator[dict[tuple[str, str], bool]]:
    """A session of each operator with each host; filled in afterwards: whether it has lived."""
    over = f"/tmp/over-{random.getrandbits(64):x}"
    lived: dict[tuple[str, str], bool] = {}
    calls = {}
    try:
        for (host, operator), source in sources.items():
            target = fleet.hosts[host][FAMILY[host]]
            steps = [
                ["knock", source, target, fleet.knocks(host, operator)],
                ["hold", source, target, SSH],
                ["wait", over, LONGEST_PLAY],
                ["speak"],
            ]
            argv = ["docker", "exec", "-i", fleet.client, "python3", "-c", OUTSIDE]
            calls[host, operator] = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            print(json.dumps(steps), file=calls[host, operator].stdin)
            cast(IO[str], calls[host, operator].stdin).close()
            wait_until(partial(is_in, fleet, host, source), 10, f"{operator} has a session with {host}")
        yield lived
    finally:
        subprocess.run(["docker", "exec", fleet.client, "touch", over], check=True)
        for key, call in calls.items():
            lived[key] = json.loads(cast(IO[str], call.stdout).read())[-1]
            call.wait()


def is_in(fleet: Fleet, host: str, source: str) -> bool:
    return source in fleet.execute(host, f"ss --no-header --numeric --tcp state established sport = :{SSH}")


def test_revoking_ends_what_they_have_open(fleet: Fleet) -> None:
    site(fleet)
    sources = {(host, operator): fleet.sources.take(FAMILY[host])[0] for host in HOSTS for operator in ("alice", "bob")}
    with sessions(fleet, sources) as lived:
        run = play(
            fleet,
            "fleet.portknock.revoke",
            portknock_hosts="all",
            portknock_operator="bob",
            knock_server_end_sessions=True,
        )
        assert run.status == 0, run.output
    assert lived == {(host, operator): operator == "alice" for host, operator in sources}
    seen = openings(fleet)
    for (host, operator), source in sources.items():
        # Who was shut out is known by name.
        assert seen[host][operator, source]["count"] == 1
        if operator == "bob":
            assert not seen[host][operator, source]["open"]
            assert not opens(fleet, host, operator)[1]


def test_leaves_nothing(fleet: Fleet) -> None:
    run = play(fleet, "fleet.portknock.remove", portknock_hosts="all", knock_server_purge_keyring=True)
    assert run.status == 0, run.output
    assert not any(fleet.has_gate(host) for host in HOSTS)
