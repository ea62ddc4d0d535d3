# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The task that knocks, against a closed host, whatever connection the play has."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from . import conftest as acc
from .conftest import Lab, Outcome


def knock(lab: Lab, *, connection: str = "fleet.portknock.knock_ssh", **options: Any) -> Outcome:
    arguments: tuple[str, ...] = ()
    if "knocks" in options:
        # By a variable: Ansible itself shows the text of a task that fails.
        (lab.folder / "vars.json").write_text(json.dumps({"by_hand": options["knocks"]}))
        options["knocks"] = "{{ by_hand }}"
        arguments = ("-e", "@vars.json")
    task = json.dumps([{"fleet.portknock.knock": options, "register": "seen"}, {"debug": {"var": "seen"}}])
    head = f"- hosts: web1\n  gather_facts: false\n  vars: {{ansible_connection: {connection}}}\n  tasks: {task}\n"
    return lab.play(head, "-vvv", *arguments, ANSIBLE_CALLBACK_RESULT_FORMAT="json")


def result(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.output
    found = outcome.output[outcome.output.rindex('"seen": ') + len('"seen": ') :]
    shown: dict[str, Any] = json.JSONDecoder().raw_decode(found)[0]
    return shown


@pytest.mark.parametrize("connection", ["fleet.portknock.knock_ssh", "ssh", "local"])
def test_knocks_and_opens(lab: Lab, connection: str) -> None:
    outcome = knock(lab, connection=connection, expect="open")
    shown = result(outcome)
    assert {name: shown[name] for name in ("state", "attempts", "gap", "address", "port", "changed")} == {
        "state": "open",
        "attempts": 1,
        "gap": 0,
        "address": acc.SERVER4,
        "port": acc.PORT,
        "changed": False,
    }
    assert shown["banner"].startswith("SSH-2.0-OpenSSH_")
    assert lab.knocks == 1
    assert not acc.SECRETS.search(outcome.output)


@pytest.mark.parametrize(("closed", "state"), [("reject with tcp reset", "reset"), ("drop", "filtered")])
def test_looks_without_knocking(lab: Lab, closed: str, state: str) -> None:
    lab.gate(closed)
    shown = result(knock(lab, knock=False, expect="closed", timeout=0.5))
    assert (shown["state"], shown["attempts"]) == (state, 0)
    assert lab.knocks == 0


def test_fails_where_it_is_not_as_expected(lab: Lab) -> None:
    lab.keep(("default", acc.operator(acc.STALE)))
    outcome = knock(lab, expect="open", timeout=0.5)
    assert outcome.code == 2
    assert f"expect: expected port 22 of {acc.SERVER4} to be open; got reset after 0.5 s and " in outcome.output
    assert not acc.SECRETS.search(outcome.output)


def test_no_way_to_the_host(lab: Lab) -> None:
    shown = result(knock(lab, host=acc.ABSENT4, timeout=20))
    assert shown["state"] == "unreachable"


def test_knocks_given_by_hand(lab: Lab) -> None:
    (lab.folder / "knock_keyring" / "web1.yml").unlink()
    outcome = knock(lab, knocks=[str(step) for step in acc.RIGHT], host=acc.SERVER6, family="inet6")
    shown = result(outcome)
    assert (shown["state"], shown["address"]) == ("open", acc.SERVER6)
    assert not acc.SECRETS.search(outcome.output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knocks": ["48396/tpc"]}, "knocks: expected port/protocol, a port from 1 to 65535 and tcp or udp"),
        ({"knocks": []}, "knocks: expected at least one knock; got an empty list."),
        ({"timeout": 0}, "timeout: expected more than 0 seconds; got 0."),
        ({"port": 70000}, "port: expected a port from 1 to 65535; got 70000."),
        ({"operator": "carol"}, "knock_operator: expected an operator that the keyring knows on web1 (default); got"),
        ({"host": "no..name"}, "host: expected a name or an address that resolves; got 'no..name': "),
    ],
)
def test_says_what_is_wrong(lab: Lab, options: dict[str, Any], message: str) -> None:
    outcome = knock(lab, **options)
    assert outcome.code == 2
    assert message in outcome.output
    assert lab.knocks == 0
    assert not acc.SECRETS.search(outcome.output)


def test_no_entry(lab: Lab) -> None:
    (lab.folder / "knock_keyring" / "web1.yml").unlink()
    outcome = knock(lab)
    assert "knocks: expected a sequence, as the keyring holds none for web1; got nothing." in outcome.output
    assert outcome.code == 2


def test_not_through_a_jump_host(lab: Lab) -> None:
    lab.variables["ansible_ssh_common_args"] = f"-J root@{acc.CLIENT4}:1"
    lab.inventory()
    outcome = knock(lab)
    assert f"host: expected one that ssh reaches directly; got {acc.SERVER4}" in outcome.output
    assert lab.knocks == 0
    assert result(knock(lab, host=acc.SERVER4))["state"] == "open"


CLOSE = acc.RETIRED
SHUTS = "".join(
    f"    tcp dport {CLOSE[1].port} delete @open{name} {{ {key} saddr }}\n" for name, key in (("4", "ip"), ("6", "ip6"))
)


@pytest.mark.parametrize("by_hand", [False, True], ids=["keyring", "by hand"])
def test_shuts_the_window_again(lab: Lab, by_hand: bool) -> None:
    """A gate of another kind: what the module sends is tried here, what the role's gate makes of it in ``tests/netns``."""
    lab.gate(extra=SHUTS)
    given: dict[str, Any] = {"knocks": [str(step) for step in CLOSE]} if by_hand else {}
    if not by_hand:
        closing = acc.operator(CLOSE).current
        lab.keep(("default", dataclasses.replace(acc.operator(acc.RIGHT), close=(closing,))))
    assert result(knock(lab, expect="open"))["state"] == "open"
    assert result(knock(lab, knock=False))["state"] == "open"
    outcome = knock(lab, state="closed", expect="closed", **given)
    shown = result(outcome)
    assert (shown["state"], shown["attempts"], shown["port"], shown["changed"]) == ("reset", 1, acc.PORT, False)
    assert result(knock(lab, knock=False))["state"] == "reset"
    assert not acc.SECRETS.search(outcome.output)


def test_shuts_nothing_without_a_sequence(lab: Lab) -> None:
    outcome = knock(lab, state="closed")
    assert outcome.code == 2
    assert (
        "state: expected a host with a close sequence (knock_server_close_sequence); the keyring holds none for web1."
        in (outcome.output)
    )
    assert "knock: expected true with state=closed" in knock(lab, state="closed", knock=False).output
    assert lab.knocks == 0
