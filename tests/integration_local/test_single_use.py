# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The clients against the role's own single-use gate: each real connection gets one window, and none is wasted."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._gate import Honoured, build_model, settings_from
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import (
    Address,
    knock_and_connect,
    knock_until_open,
    probe,
)
from ansible_collections.fleet.portknock.plugins.plugin_utils._program import helper_program
from ansible_collections.fleet.portknock.plugins.plugin_utils._rendering import render

from . import conftest as acc
from .conftest import Lab, Outcome
from .test_connection import NO_PERSIST

TEMPLATES = Path(__file__).parents[2] / "roles/knock_server/templates"
HOST = Address(socket.AF_INET, (acc.SERVER4, acc.PORT))
# What arrives, before the gate sees it.
COUNTERS = f"""
table inet counted {{
  counter knocks {{ }}
  counter connections {{ }}
  chain pre {{
    type filter hook prerouting priority -290;
    tcp dport {acc.RIGHT[0].port} tcp flags & (syn | ack) == syn counter name knocks
    tcp dport {acc.PORT} tcp flags & (syn | ack) == syn counter name connections
  }}
}}
"""


class Gate:
    """The gate of the role, in place of the one that the other tests make do with."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def load(self, response: str = "mimic", single_use: bool = True) -> None:
        settings = settings_from(
            {"single_use": single_use, "closed_response": response, "open_window": 30, "tripwires": 100}
        )
        model = build_model(
            settings, {"default": Honoured(1, [acc.RIGHT])}, b"\x5a" * 32, frozenset(), {"socket_wildcard": True}
        )
        text = render(TEMPLATES, "nftables", model)["gate"]
        self._lab.inside("nft", "-f", "-", given=f"flush ruleset\n{COUNTERS}{text}")

    def count(self, name: str) -> int:
        listing = self._lab.inside("nft", "list", "counter", "inet", "counted", name)
        return int(listing.split("packets")[1].split()[0])


@pytest.fixture
def gate(lab: Lab) -> Gate:
    made = Gate(lab)
    made.load()
    return made


def test_a_look_uses_up_what_it_saw(gate: Gate) -> None:
    result = knock_until_open([HOST], acc.RIGHT, acc.PORT, 5)
    assert (result.state, probe(HOST, 1).state, gate.count("knocks")) == ("open", "reset", 1)
    result, sock = knock_and_connect([HOST], [acc.RIGHT], acc.PORT, 5)
    assert sock is not None
    with sock:
        assert (result.state, probe(HOST, 1).state) == ("open", "reset")


def ping(lab: Lab, *arguments: str) -> Outcome:
    return lab.adhoc("-m", "ping", "-vvv", *arguments, ANSIBLE_SSH_ARGS=NO_PERSIST)


@pytest.mark.parametrize("response", ["mimic", "drop"])
@pytest.mark.parametrize("how", ["the keyring", "the role's variable", "the option"])
def test_one_more_knock_after_the_look(lab: Lab, gate: Gate, how: str, response: str) -> None:
    """Whoever says that it is a single-use gate, no connection is refused."""
    gate.load(response)
    lab.keep(single_use=how == "the keyring")
    variables = {"the role's variable": "knock_server_single_use=true", "the option": "knock_single_use=true"}
    outcome = ping(lab, *(("-e", variables[how]) if how in variables else ()))
    assert outcome.code == 0, outcome.output
    assert outcome.ssh_calls > 2
    assert gate.count("knocks") == gate.count("connections") == outcome.ssh_calls + 1
    assert "used up" not in outcome.output
    assert not acc.SECRETS.search(outcome.output)


def test_where_nothing_says_so_a_connection_is_made_good(lab: Lab, gate: Gate) -> None:
    """As where the gate was changed and the keyring's note of it is gone."""
    outcome = ping(lab)
    assert outcome.code == 0, outcome.output
    assert outcome.output.count("used up") == 1
    # The look, the connection that came too late, and one for each run of ssh.
    assert gate.count("connections") == outcome.ssh_calls + 1
    assert not acc.SECRETS.search(outcome.output)


def test_derived_sequences(lab: Lab, gate: Gate) -> None:
    """Without a keyring, it is the option that tells."""
    (lab.folder / "knock_keyring" / "web1.yml").unlink()
    lab.variables["knock_single_use"] = "true"
    lab.inventory()
    given = json.dumps({"knock_sequences": [str(knock) for knock in acc.RIGHT]})
    outcome = ping(lab, "-e", given)
    assert outcome.code == 0, outcome.output
    assert gate.count("connections") == outcome.ssh_calls + 1


def test_the_master_carries_on(lab: Lab, gate: Gate) -> None:
    lab.keep(single_use=True)
    outcome = lab.play(
        "- hosts: web1\n  gather_facts: false\n  tasks:\n    - raw: 'true'\n      loop: '{{ range(9) | list }}'\n"
    )
    assert outcome.code == 0, outcome.output
    assert (gate.count("knocks"), gate.count("connections")) == (2, 2)


@pytest.mark.parametrize("response", ["mimic", "drop"])
def test_forks_that_use_up_each_others_windows(lab: Lab, gate: Gate, response: str) -> None:
    """Delegated to one host from eight forks at once, without a master."""
    gate.load(response)
    lab.keep(single_use=True)
    lab.inventory(*(f"peer{number} ansible_host={acc.ABSENT4}" for number in range(8)))
    outcome = lab.play(
        "- hosts: peer*\n  gather_facts: false\n  tasks:\n"
        "    - raw: 'true'\n      delegate_to: web1\n    - raw: 'true'\n      delegate_to: web1\n",
        *("--forks=8", "-vvv"),
        ANSIBLE_SSH_ARGS=NO_PERSIST,
    )
    print(
        f"\n{response}: {gate.count('connections')} SYNs for 16 connections, {outcome.output.count('used up')} refused"
    )
    assert outcome.code == 0, outcome.output


def test_the_task_leaves_the_way_open(lab: Lab, gate: Gate) -> None:
    lab.keep(single_use=True)
    outcome = lab.play(
        "- hosts: web1\n  gather_facts: false\n  tasks:\n"
        "    - fleet.portknock.knock: {expect: open}\n"
        f"    - wait_for: {{host: {acc.SERVER4}, port: {acc.PORT}, timeout: 2}}\n      delegate_to: localhost\n"
        "      connection: local\n"
        "    - fleet.portknock.knock: {knock: false, expect: closed}\n"
    )
    assert outcome.code == 0, outcome.output


def test_the_helper(lab: Lab, gate: Gate, tmp_path: Path) -> None:
    """It relays the very connection that its knock opened."""
    secrets, program = tmp_path / "secrets.json", tmp_path / "portknock"
    secrets.touch(0o600)
    entry = {"hostname": acc.SERVER4, "port": acc.PORT, "sequences": [[str(knock) for knock in acc.RIGHT]]}
    secrets.write_text(json.dumps({"format": 1, "operator": "default", "hosts": {"web1": entry}}))
    program.write_bytes(helper_program())
    proxy = f"ProxyCommand={sys.executable} {program} connect --secrets {secrets} %h %p"
    known = ("-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR")
    for _ in range(3):
        said = acc.run(
            "ssh", "-F", "none", "-i", str(lab.key), *known, "-o", proxy, f"root@{acc.SERVER4}", "echo arrived"
        )
        assert said == "arrived\n"
    assert gate.count("knocks") == gate.count("connections") == 3
