# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The proof of a gate from a network namespace on its own host, by the role's own gate."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils import _namespace
from netlab import HOST4, HOST6, SEQUENCE, SSH, WIREGUARD, Lab, command, wait_for

KNOCKS = [str(knock) for knock in SEQUENCE]
SCOUT = {"host": "web1", "port": SSH, "family": "any", "addresses": [], "further": [], "place": "here"}
PROOF = {
    "place": "here",
    "protected": ["22/tcp", f"{WIREGUARD}/udp"],
    "closed_response": "mimic",
    "trusted": [],
    "ports_in_use": ["22/tcp", f"{WIREGUARD}/udp"],
    "listeners": {"inet": [SSH], "inet6": [SSH]},
    "source_trusted": False,
    "knocks": KNOCKS,
    "timeout": 2.0,
}
# Asks one question after another, each with all that was answered before; a line for each answer.
PROGRAM = """
import json, socket, sys
from ansible_collections.fleet.portknock.plugins.module_utils import _namespace
options, *questions = json.load(sys.stdin)
for name, value in options.items():
    setattr(_namespace, name, value)
answered = {}
for question, request in questions:
    answered = {**answered, **_namespace.answer_apart(question, {**answered, **request})}
    answered["left"] = [name for _index, name in socket.if_nameindex() if name.startswith("knock-")]
    print(json.dumps(answered), flush=True)
"""


class Asked:
    """The program at work on the lab's host."""

    def __init__(self, lab: Lab, *questions: object, wrapper: Sequence[str] = (), **options: object) -> None:
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", lab.host.name, *wrapper, sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self.process.stdin
        json.dump([options, *questions], self.process.stdin)
        self.process.stdin.close()

    def answer(self) -> dict[str, Any]:
        """The next answer."""
        assert self.process.stdout
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def last(self) -> dict[str, Any]:
        """All answers; the program has ended well and left no word on standard error."""
        assert self.process.stdout
        assert self.process.stderr
        with self.process:
            lines, complaints = self.process.stdout.read().splitlines(), self.process.stderr.read()
        assert (self.process.returncode, complaints) == (0, "")
        answer: dict[str, Any] = json.loads(lines[-1])
        return answer


def prove(lab: Lab, **more: object) -> dict[str, Any]:
    return Asked(lab, ("scout", SCOUT), ("prove", {**PROOF, **more})).last()


def network(lab: Lab) -> str:
    """Everything that a namespace could leave behind on the host."""
    tables = (
        lab.host.ip("-br", "link"),
        lab.host.ip("route", "show", "table", "all"),
        lab.host.ip("neigh", "show", "nud", "permanent"),
    )
    return "\n".join(tables) + lab.host.ip("-6", "route", "show", "table", "all")


def test_closed_and_opened(lab: Lab) -> None:
    lab.gate()
    before = network(lab)
    seen = prove(lab)
    assert {(look["address"], look["port"], look["showed"]) for look in seen["closed"]} == {
        (address, *port)
        for address in (HOST4, HOST6)
        for port in (("22/tcp", "reset"), (f"{WIREGUARD}/udp", "refused"))
    }
    assert [(look["address"], look["port"]) for look in seen["opened"]] == [(HOST4, "22/tcp"), (HOST6, "22/tcp")]
    assert seen["notes"] == []
    # A stranger's: from elsewhere than the host, and by nobody's route.
    assert re.fullmatch(r"198\.(18|19)\.\d+\.\d+", seen["sources"][0])
    assert seen["sources"][1].startswith("fd")
    assert (seen["left"], network(lab)) == ([], before)


def test_a_gate_that_is_not_there_or_is_another(lab: Lab) -> None:
    assert prove(lab)["problem"].startswith(f"Not closed: port 22/tcp of {HOST4}, seen from 198.1")
    lab.gate()
    problem = prove(lab, knocks=KNOCKS[::-1])["problem"]
    assert problem.startswith(f"Not opened: port 22/tcp of {HOST4}, seen from 198.1")
    assert not any(knock.partition("/")[0] in problem for knock in KNOCKS)


def test_a_trusted_source_proves_nothing(lab: Lab) -> None:
    trusted = ["198.18.0.0/15", "fd00::/8"]
    lab.gate(trusted_sources=trusted)
    seen = prove(lab, trusted=trusted)
    assert (seen["closed"], seen["opened"]) == ([], [])
    assert seen["notes"] == [
        f"Not proved on {address}: packets from here come from a trusted source." for address in (HOST4, HOST6)
    ]


STRICT = "net.ipv4.conf.all.rp_filter=1"
REVERSE_PATH = "chain early {\n type filter hook prerouting priority -300; fib saddr . iif oif missing drop; \n}"
BY_INTERFACE = "chain mine {\n type filter hook input priority 0; iifname != h0 iifname != lo drop; \n}"


def test_reverse_path_filters_let_it_through(lab: Lab) -> None:
    lab.gate()
    lab.host.run("sysctl", "-qw", STRICT)
    lab.host.nft(f"table inet reverse {{\n{REVERSE_PATH}\n}}")
    assert len(prove(lab)["opened"]) == 2


def test_a_policy_by_interface_is_no_proof(lab: Lab) -> None:
    """What a stranger on h0 could open, the namespace can't: silent both ways, so the gate is not called proved."""
    lab.gate()
    lab.host.nft(f"table inet mine {{\n{BY_INTERFACE}\n}}")
    assert re.match(rf"Not opened: port 22/tcp of {HOST4}, .* showed filtered", prove(lab)["problem"])
    source = lab.source()
    lab.knock(source)
    assert lab.look(source) == "open"


def test_a_removal(lab: Lab) -> None:
    removed = ("prove_removed", {"place": "here", "timeout": 2.0})
    assert "problem" not in Asked(lab, ("scout", SCOUT), removed).last()
    lab.gate()
    assert "does not answer a fresh connection" in Asked(lab, ("scout", SCOUT), removed).last()["problem"]


def test_addresses_that_others_have_are_left_to_them(lab: Lab) -> None:
    scout = ("scout", SCOUT)
    # A tunnel to everywhere, and a rule against strangers' addresses, take nothing away.
    for route in ("0.0.0.0/1 dev h0", "128.0.0.0/1 dev h0", "blackhole 198.18.0.0/15", "unreachable fc00::/7"):
        lab.host.ip("route", "add", *route.split())
    assert Asked(lab, scout).last()["sources"][0].startswith("198.1")
    lab.host.ip("route", "del", "blackhole", "198.18.0.0/15")
    for route in ("198.18.0.0/15", "198.51.100.0/24"):
        lab.host.ip("route", "add", route, "dev", "h0", "table", "77")
    assert Asked(lab, scout).last()["sources"][0].startswith("203.0.113.")
    lab.host.ip("route", "add", "203.0.113.0/24", "dev", "h0")
    assert "expected an address that no route of the host leads to" in Asked(lab, scout).last()["problem"]


def test_the_address_that_the_host_is_reached_by_comes_first(lab: Lab) -> None:
    for number in range(10):
        lab.host.ip("addr", "add", f"10.77.{number}.1/24", "dev", "h0")
    seen = Asked(lab, ("scout", {**SCOUT, "host": "10.77.9.1"})).last()
    assert seen["addresses"][0] == ["inet", "10.77.9.1", SSH]
    assert len(seen["addresses"]) == _namespace.MOST_ADDRESSES + 1
    assert seen["left_out"] == ["Not proved on 3 more addresses of the host: 8 of each family are looked at."]


def test_where_new_interfaces_are_without_ipv6(lab: Lab) -> None:
    lab.gate()
    lab.host.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
    assert len(prove(lab)["opened"]) == 2


def processes_of(lab: Lab) -> list[Path]:
    """Those that hold the host's namespace, and theirs: what runs by the program's hand."""
    first = set(command("ip", "netns", "pids", lab.host.name).split())
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if path.name in first or parent in first:
            found.append(path)
    return found


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_killed_half_way_nothing_is_left(lab: Lab, end: signal.Signals) -> None:
    """And while it is at work, no argument and no environment holds a knock."""
    lab.gate()
    lab.host.nft(f"table inet mine {{\n{BY_INTERFACE}\n}}")
    before = network(lab)
    asked = Asked(lab, ("scout", SCOUT), ("prove", {**PROOF, "timeout": 60.0}))
    asked.answer()
    wait_for(lambda: "knock-" in network(lab) and len(processes_of(lab)) > 1, 10, "the look has begun")
    processes = processes_of(lab)
    shown = b"".join((path / name).read_bytes() for path in processes for name in ("cmdline", "environ"))
    assert not any(knock.partition("/")[0].encode() in shown for knock in KNOCKS)
    asked.process.send_signal(end)
    asked.process.wait()
    wait_for(lambda: not any(path.exists() for path in processes), 5, "its child is gone")
    wait_for(lambda: network(lab) == before, 10, "the pair of interfaces is gone")


def test_it_does_not_take_for_ever(lab: Lab) -> None:
    lab.gate()
    lab.host.nft(f"table inet mine {{\n{BY_INTERFACE}\n}}")
    before = network(lab)
    questions = (("scout", SCOUT), ("prove", {**PROOF, "timeout": 60.0}))
    seen = Asked(lab, *questions, LOOK_SECONDS=2.0).last()
    assert seen["problem"] == "expected an answer from the namespace within 2 s; got none."
    wait_for(lambda: network(lab) == before, 10, "the pair of interfaces is gone")


def test_without_the_right_to_make_one(lab: Lab) -> None:
    before = network(lab)
    seen = Asked(lab, ("scout", SCOUT), wrapper=("setpriv", "--bounding-set", "-sys_admin")).last()
    assert seen["problem"] == (
        "expected root on the host to be allowed a network namespace, which takes CAP_SYS_ADMIN; got Operation not permitted."
    )
    assert network(lab) == before
