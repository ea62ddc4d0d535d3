# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A gate that the controller can't judge is proved from another host. The tests build on each other."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from lab import FAMILIES, Fleet, Run, differences, wait_until

SSH = 22
# An address of the fleet's network that nobody has.
ABSENT = 240
LINE = "fleet.portknock.knock_ssh"


def settings(fleet: Fleet, **more: object) -> dict[str, object]:
    """The controller is a trusted source, so that it could prove nothing."""
    trusted = [f"{fleet.description['gateway4']}/32", f"{fleet.description['gateway6']}/128"]
    return {"knock_server_trusted_sources": trusted} | more


def write_inventory(fleet: Fleet) -> None:
    """Hosts that look from elsewhere: as a user without rights and by a template, by none, and the box itself."""
    content = json.loads(fleet.inventory.read_text())
    hosts = content["all"]["hosts"]
    address = fleet.hosts["eye"]["ipv4"]
    # Whose variables these are must not get mixed up: the box's would lead nowhere from here.
    hosts["eye"] = {
        "ansible_host": "{{ eye_address }}",
        "eye_address": address,
        "ansible_user": "admin",
        "ansible_python_interpreter": "auto_silent",
    }
    hosts["box"] |= {"ansible_password": "only the box's"}
    hosts["gone"] = {"ansible_host": f"{address.rpartition('.')[0]}.{ABSENT}"}
    hosts["without-python"] = {"ansible_host": address, "ansible_python_interpreter": "/usr/bin/nowhere"}
    hosts["alias"] = {"ansible_host": hosts["box"]["ansible_host"]}
    hosts["here"] = {"ansible_connection": "local"}
    fleet.inventory.write_text(json.dumps(content))


@pytest.fixture(scope="module", autouse=True)
def before(fleet: Fleet) -> dict[str, str]:
    write_inventory(fleet)
    return fleet.state("box")


def site(fleet: Fleet, *arguments: str, playbook: str = "site", **more: object) -> Run:
    return fleet.play(
        f"fleet.portknock.{playbook}", "--limit", "box", "-v", *arguments, variables=settings(fleet, **more)
    )


def proof(run: Run) -> dict[str, Any]:
    assert run.status == 0, run.output
    # An option has the same name, and a text.
    _before, found, rest = run.output.partition('"proof": {')
    assert found, run.output
    seen: dict[str, Any] = json.JSONDecoder().raw_decode("{" + rest)[0]
    return seen


def logins(fleet: Fleet, host: str) -> int:
    return fleet.execute(host, "journalctl --no-pager -o cat").count("Accepted publickey")


@contextlib.contextmanager
def deaf(fleet: Fleet, rule: str) -> Iterator[None]:
    """The box drops something that comes from the eye."""
    chain = "add table inet deaf; add chain inet deaf early { type filter hook prerouting priority -500; }; "
    sources = "; ".join(
        f"add rule inet deaf early {family} saddr {fleet.hosts['eye'][name]} {rule} drop"
        for family, name in (("ip", "ipv4"), ("ip6", "ipv6"))
    )
    fleet.execute("box", f"nft '{chain}{sources}'")
    try:
        yield
    finally:
        fleet.execute("box", "nft delete table inet deaf")


SILENCE = "add table inet silence; add chain inet silence in { type filter hook input priority -500; policy drop; }; "
SILENCE += "add chain inet silence out { type filter hook output priority -500; policy drop; }"
KNOCKS = "tcp flags syn tcp dport 1024-65535"


@pytest.mark.parametrize(
    ("playbook", "name", "words"),
    [
        ("site", "nobody", "expected a host of the inventory; got 'nobody'"),
        ("site", "box", "expected another host than box itself"),
        ("site", "alias", "is link-local or an address of its own"),
        ("site", "gone", "expected gone to be able to look at the host; it is not"),
        ("site", "without-python", "expected without-python to be able to look at the host; it is not"),
        ("remove", "nobody", "expected a host of the inventory; got 'nobody'"),
        ("remove", "gone", "expected gone to be able to look at the host; it is not"),
    ],
)
def test_refused_before_anything_changes(fleet: Fleet, playbook: str, name: str, words: str) -> None:
    # Something to take away, for the removal.
    fleet.execute("box", "nft add table inet fleet_portknock")
    former = fleet.state("box")
    run = site(fleet, playbook=playbook, knock_server_prove_from=name)
    left = fleet.state("box")
    fleet.execute("box", "nft delete table inet fleet_portknock; rm -rf /run/fleet-portknock")
    assert run.recap["box"]["failed"] == 1, run.output
    assert re.search(rf"knock_server_prove_from: .*{re.escape(words)}", run.output), run.output
    assert [line for line in differences(former, left) if not line.startswith("run: ")] == []


def test_a_check_asks_nobody(fleet: Fleet) -> None:
    run = site(fleet, "--check", knock_server_prove_from="gone")
    assert run.status == 0, run.output
    assert run.recap["box"]["changed"] > 0


def test_the_controller_itself_can_not_prove_it(fleet: Fleet) -> None:
    seen = proof(site(fleet, knock_server_open_window=7))
    assert any("packets from here come from a trusted source" in note for note in seen["notes"])
    assert (seen["seen_from"], seen["opened"]) == ("", [])


@pytest.mark.parametrize("name", ["eye", "here"])
def test_proved_from_elsewhere(fleet: Fleet, name: str) -> None:
    run = site(fleet, "-vvvv", knock_server_prove_from=name)
    seen = proof(run)
    addresses = {fleet.hosts["box"][family] for family in FAMILIES}
    assert {look["address"] for look in seen["closed"] + seen["opened"]} <= addresses
    assert seen["seen_from"] == name
    if name == "eye":
        assert {look["address"] for look in seen["closed"]} == {look["address"] for look in seen["opened"]} == addresses
        assert {look["showed"] for look in seen["closed"]} == {"reset"}
        assert seen["notes"] == []
        assert "Not proved" not in run.output
    else:
        assert any("packets from here come from a trusted source" in note for note in seen["notes"])
    assert fleet.leaks(run.output, "box") == []
    # Something to change for the next one.
    assert site(fleet, knock_server_open_window=8).status == 0


def test_nothing_to_change_asks_nobody(fleet: Fleet) -> None:
    assert proof(site(fleet, knock_server_prove_from="eye"))["notes"] == []
    before = logins(fleet, "eye")
    run = site(fleet, knock_server_prove_from="eye")
    assert (run.status, run.recap["box"]["changed"]) == (0, 0), run.output
    assert logins(fleet, "eye") == before


def test_rolled_back_where_the_knock_does_not_arrive_from_there(fleet: Fleet) -> None:
    before = fleet.state("box")
    with deaf(fleet, KNOCKS):
        run = site(
            fleet, knock_server_prove_from="eye", knock_server_open_window=9, knock_server_closed_response="reset"
        )
    assert run.recap["box"]["failed"] == 1, run.output
    assert re.search(r"Not opened: port 22/tcp of \S+, seen from \S+ on eye, showed reset after the right", run.output)
    assert "The host has gone back to what it had." in run.output
    assert differences(before, fleet.state("box")) == []
    # From the controller, nothing would have been found.
    with deaf(fleet, KNOCKS):
        assert site(fleet, knock_server_open_window=9).status == 0


def test_rolled_back_where_the_proving_host_dies(fleet: Fleet) -> None:
    """It falls silent in the middle of the proof, which the deafness of the box makes long enough for that."""
    before = fleet.state("box")
    outcome: list[Run] = []
    with deaf(fleet, KNOCKS):
        run = threading.Thread(
            target=lambda: outcome.append(
                site(
                    fleet,
                    knock_server_prove_from="eye",
                    knock_server_open_window=13,
                    knock_server_closed_response="reset",
                )
            )
        )
        run.start()
        on_trial = partial(fleet.execute, "box", "cat /run/fleet-portknock/trial/run", check=False)
        looks = partial(fleet.execute, "eye", "pgrep -u admin python", check=False)
        wait_until(lambda: bool(on_trial() and looks()), 250, "the proof has begun", run.is_alive)
        fleet.execute("eye", f"nft '{SILENCE}'")
        try:
            run.join()
        finally:
            fleet.execute("eye", "nft delete table inet silence")
    assert outcome[0].recap["box"]["failed"] == 1, outcome[0].output
    assert "knock_server_prove_from: expected eye to be able to look at the host" in outcome[0].output
    wait_until(lambda: not on_trial(), 60, "the box has gone back")
    assert differences(before, fleet.state("box")) == []


def test_a_proving_host_behind_a_gate_of_its_own(fleet: Fleet) -> None:
    line = {"ansible_connection": LINE}
    gated = fleet.play("fleet.portknock.site", "--limit", "eye", variables=line)
    assert gated.status == 0, gated.output
    (source,) = fleet.sources.take("ipv4")
    assert fleet.outside(["connect", source, fleet.hosts["eye"]["ipv4"], SSH]) == ["reset"]
    assert proof(site(fleet, knock_server_prove_from="eye", knock_server_open_window=11))["notes"] == []


def test_a_proving_host_that_changes_in_the_same_run(fleet: Fleet) -> None:
    """Nobody knocks at the eye while its own gate is looked at from the controller, which here nobody trusts."""
    content = json.loads(fleet.inventory.read_text())
    content["all"]["hosts"] = {name: content["all"]["hosts"][name] for name in ("box", "eye")}
    content["all"]["hosts"]["box"] |= {"knock_server_prove_from": "eye"}
    # Silence takes longest to look at.
    shared = {"ansible_connection": LINE, "knock_server_closed_response": "drop"}
    content["all"]["vars"] |= shared
    run = fleet.play("fleet.portknock.site", inventory=fleet.write("both.yml", content))
    assert {host: (numbers["changed"], numbers["failed"]) for host, numbers in run.recap.items()} == {
        "box": (1, 0),
        "eye": (1, 0),
    }, run.output
    assert "Not proved" not in run.output


def test_a_host_behind_a_jump_host(fleet: Fleet) -> None:
    """Its gate trusts the jump host alone, through which the controller comes."""
    content = json.loads(fleet.inventory.read_text())
    key, known = fleet.directory / "id_ed25519", fleet.directory / "known_hosts"
    through = f"ssh -i {key} -o UserKnownHostsFile={known} -W %h:%p root@{fleet.hosts['jump']['ipv4']}"
    content["all"]["hosts"]["box"]["ansible_ssh_extra_args"] = f'-o ProxyCommand="{through}"'
    inventory = fleet.write("jump.yml", content)
    jump = f"{fleet.hosts['jump']['ipv4']}/32"
    trusted = {"knock_server_trusted_sources": [jump]}
    # The way in by then.
    assert site(fleet, knock_server_trusted_sources=[f"{fleet.description['gateway4']}/32", jump]).status == 0

    def run(**more: object) -> Run:
        return fleet.play(
            "fleet.portknock.site",
            *("--limit", "box", "-v"),
            inventory=inventory,
            variables={**trusted, **more},
            # Past the master of earlier, direct connections.
            ANSIBLE_SSH_ARGS="-o ControlMaster=no -o ControlPath=none",
        )

    assert proof(run())["notes"] == [
        "Not proved from outside: the host is reached through a ProxyJump or ProxyCommand."
    ]
    seen = proof(run(knock_server_prove_from="eye", knock_server_open_window=12))
    assert (seen["notes"], seen["seen_from"]) == ([], "eye")
    assert fleet.hosts["box"]["ipv4"] in {look["address"] for look in seen["opened"]}
    assert site(fleet).status == 0


def test_nothing_secret_stays_on_the_proving_host(fleet: Fleet) -> None:
    found = fleet.execute("eye", "find /root /home /tmp /var/tmp /run -xdev -type f -size -1000k | cat", check=False)
    texts = [fleet.inside("eye").file(path).content.decode(errors="replace") for path in found.split("\n") if path]
    assert [path for path, text in zip(found.split("\n"), texts) if fleet.leaks(text, "box")] == []
    assert fleet.execute("eye", "find / -xdev -name '*ansible*' -path '*tmp*' | cat", check=False) == ""
    assert fleet.leaks(fleet.execute("eye", "journalctl --no-pager -o cat"), "box") == []


def test_a_removal_is_proved_from_there_too(fleet: Fleet, before: dict[str, str]) -> None:
    former = fleet.state("box")
    this = {"knock_server_prove_from": "eye", "portknock_hosts": "box"}
    with deaf(fleet, f"tcp dport {SSH}"):
        run = site(fleet, playbook="remove", **this)
    assert run.recap["box"]["failed"] == 1, run.output
    assert re.search(r"port 22/tcp of \S+ does not answer a fresh connection from \S+ on eye", run.output)
    assert differences(former, fleet.state("box")) == []
    assert site(fleet, playbook="remove", **this).status == 0
    assert differences(before, fleet.state("box")) == []
    count = logins(fleet, "eye")
    again = site(fleet, playbook="remove", **this)
    assert (again.status, again.recap["box"]["changed"]) == (0, 0), again.output
    assert logins(fleet, "eye") == count
