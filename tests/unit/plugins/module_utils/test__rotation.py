# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import (
    HostSecrets,
    HostState,
    Operator,
    StoredSequence,
)
from ansible_collections.fleet.portknock.plugins.module_utils._planning import plan_secrets
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._rotation import (
    Step,
    begin,
    finish,
    parse_grace,
    revoke,
    scope_of,
)

NOW = "2026-01-31T08:15:00Z"
LATER = "2026-02-01T08:15:00Z"
BOTH = ["alice", "bob"]


def made(*operators: str) -> HostSecrets:
    return plan_secrets(None, keyring_id="ring", host="web1", operators=operators or BOTH, now=NOW, in_use={22}).secrets


def rotate(entry: HostSecrets, *scope: str, rotation: str = "1", **arguments: Any) -> Step:
    return begin(entry, scope or BOTH, rotation=rotation, now=NOW, **arguments)


def retire(entry: HostSecrets, *scope: str, grace: int = 0, now: str = LATER) -> Step:
    return finish(entry, scope or BOTH, grace=grace, now=now)


def test_a_whole_rotation() -> None:
    first = made()
    step = rotate(first, length=5)
    assert step.done == {"alice": "made", "bob": "made"}
    begun = step.secrets
    assert begun.generation == 2
    for name in BOTH:
        former, operator = first.operators[name], begun.operators[name]
        assert (operator.current, operator.both, operator.both_since) == (former.current, True, None)
        assert operator.next is not None
        assert (operator.next.generation, len(operator.next.knocks)) == (2, 5)
    ports = [knock.port for _name, knocks in begun.candidates() for knock in knocks]
    assert len(set(ports)) == len(ports)
    # Nothing goes before the host was seen to honour both.
    assert retire(begun) == Step(begun, {"alice": "unproved", "bob": "unproved"})
    proved = begun.promoted(NOW)
    ended = retire(proved)
    assert ended.done == {"alice": "retired", "bob": "retired"}
    assert ended.secrets.generation == 3
    for name in BOTH:
        assert ended.secrets.operators[name] == Operator(True, begun.operators[name].wanted)


@pytest.mark.parametrize(
    "stopped_after", [lambda entry: entry, lambda entry: entry.promoted(NOW)], ids=["making", "the proof of both"]
)
def test_a_rotation_that_was_stopped_goes_on(stopped_after: Callable[[HostSecrets], HostSecrets]) -> None:
    stopped = stopped_after(rotate(made()).secrets)
    again = rotate(stopped)
    assert again == Step(stopped, {"alice": "under way", "bob": "under way"})
    # Another rotation does not give a third sequence either.
    assert rotate(stopped, rotation="2") == again
    ended = retire(stopped.promoted(NOW)).secrets
    assert rotate(ended) == Step(ended, {"alice": "done before", "bob": "done before"})
    assert rotate(ended, rotation="2").done == {"alice": "made", "bob": "made"}


def test_one_operator_s_rotation_touches_no_other() -> None:
    first = made()
    step = rotate(first, "bob")
    assert step.done == {"bob": "made"}
    assert step.secrets.operators["alice"] == first.operators["alice"]
    ended = retire(step.secrets.promoted(NOW), "bob").secrets
    assert ended.operators["alice"] == first.operators["alice"]
    assert ended.operators["bob"].current == step.secrets.operators["bob"].next


@pytest.mark.parametrize(
    ("grace", "done", "until"),
    [(86399, "retired", None), (86400, "retired", None), (86401, "waits", "2026-02-01T08:15:01Z")],
)
def test_the_grace_counts_from_the_proof(grace: int, done: str, until: str | None) -> None:
    proved = rotate(made("alice"), "alice").secrets.promoted(NOW)
    step = retire(proved, "alice", grace=grace)
    assert (step.done, step.until) == ({"alice": done}, until)
    assert (step.secrets == proved) == (done == "waits")


def test_who_is_left_alone() -> None:
    first = made("alice", "bob", "carol")
    given = replace(first.operators["bob"].current, source="given")
    entry = replace(
        revoke(first, "carol", ["alice", "bob", "carol"], NOW),
        operators={
            **revoke(first, "carol", ["alice", "bob", "carol"], NOW).operators,
            "bob": replace(first.operators["bob"], current=given),
        },
    )
    step = rotate(entry, "alice", "bob", "carol")
    assert step.done == {"alice": "made", "bob": "given", "carol": "revoked"}
    assert step.secrets.operators["bob"].next is None
    # Two that were given open as long as both are given.
    two = Operator(True, given, replace(given, generation=2), both=True, both_since=NOW)
    entry = replace(entry, operators={**entry.operators, "bob": two})
    assert retire(entry, "bob") == Step(entry, {})


def test_a_generation_beyond_what_the_host_has() -> None:
    step = rotate(made("alice"), "alice", state=HostState("ring", 7))
    assert step.secrets.generation == 8


def test_new_sequences_avoid_what_is_asked() -> None:
    entry = made("alice")
    ports = set(range(1024, 65536)) - set(range(30000, 30040, 2))
    step = rotate(entry, "alice", nmap_ports=ports)
    wanted = step.secrets.operators["alice"].wanted
    assert {knock.port for knock in wanted.knocks} <= set(range(30000, 30040, 2))


def test_the_scope() -> None:
    entry = made()
    assert scope_of(BOTH, None, entry) == ("alice", "bob")
    assert scope_of(BOTH, "bob", entry) == ("bob",)
    assert scope_of(BOTH, "carol", entry) == ()
    with pytest.raises(PortknockError) as caught:
        scope_of([*BOTH, "carol"], None, entry)
    assert str(caught.value) == (
        "portknock_operator: expected operators that have a sequence on web1, which site.yml gives them; got carol."
    )


@pytest.mark.parametrize(
    ("value", "seconds"), [(0, 0), (30, 30), ("45", 45), ("90m", 5400), ("12h", 43200), ("7d", 604800), ("2w", 1209600)]
)
def test_a_grace(value: object, seconds: int) -> None:
    assert parse_grace(value) == seconds


@pytest.mark.parametrize("value", [-1, True, 1.5, None, "", "7 d", "d", "-1d", "1y", [7]])
def test_no_grace(value: object) -> None:
    with pytest.raises(PortknockError) as caught:
        parse_grace(value)
    assert str(caught.value) == (
        f"knock_server_grace: expected a time such as 0, 90m, 12h or 7d; got {value!r}. Units are s, m, h, d and w."
    )


def test_revoking() -> None:
    first = made()
    gone = revoke(first, "bob", BOTH, NOW)
    assert gone.generation == 2
    assert gone.operators["bob"] == replace(first.operators["bob"], active=False, revoked=NOW)
    assert gone.operators["alice"] == first.operators["alice"]
    assert list(gone.honoured(BOTH)) == ["alice"]
    assert gone.fingerprint != replace(first, generation=2).fingerprint
    # Once is enough, and the time stays.
    assert revoke(gone, "bob", BOTH, LATER) == gone
    assert revoke(first, "mallory", BOTH, NOW) == first
    # One who is off the inventory already is to go as well.
    assert revoke(first, "bob", ["alice"], NOW).operators["bob"].revoked == NOW


def test_the_last_operator_is_not_revoked() -> None:
    with pytest.raises(PortknockError) as caught:
        revoke(made("bob"), "bob", ["bob"], NOW)
    assert str(caught.value) == (
        "knock_server_operators: expected an operator on web1 who was not revoked, since nobody could get in otherwise; got "
        "bob only. Name another, or let one in again by knock_server_readmit."
    )
    # Where the gate is gone, nobody is locked out.
    assert revoke(made("bob").marked_removed(), "bob", ["bob"], NOW).operators["bob"].revoked == NOW


def test_those_who_expire_are_not_all_that_is_left() -> None:
    entry = made()
    entry = replace(
        entry,
        operators={**entry.operators, "alice": replace(entry.operators["alice"], valid_until="2027-01-01T00:00:00Z")},
    )
    with pytest.raises(PortknockError) as caught:
        revoke(entry, "bob", BOTH, NOW)
    assert str(caught.value).startswith("knock_server_valid_until: expected an operator of web1 without an expiry")
    assert revoke(entry, "bob", BOTH, NOW, may_all_expire=True).operators["bob"].revoked == NOW
    assert revoke(entry, "alice", BOTH, NOW).operators["alice"].revoked == NOW


def test_what_the_host_honours_is_known_wherever_a_rotation_stops() -> None:
    """The entry and the host, after each of the four moments at which either changes."""
    entry = made("alice")
    host = {tuple(stored.knocks) for stored in entry.operators["alice"].honoured}

    def known(secrets: HostSecrets) -> set[tuple[Knock, ...]]:
        return {knocks for _name, knocks in secrets.candidates()}

    def deployed(secrets: HostSecrets) -> set[tuple[Knock, ...]]:
        return {tuple(stored.knocks) for stored in secrets.operators["alice"].honoured}

    entry = rotate(entry, "alice").secrets
    assert host & known(entry)
    host = deployed(entry)
    assert host == known(entry)
    entry = retire(entry.promoted(NOW), "alice").secrets
    assert host & known(entry)
    host = deployed(entry)
    assert host == known(entry)


def test_a_stored_sequence_says_when_it_was_made() -> None:
    assert isinstance(rotate(made("alice"), "alice").secrets.operators["alice"].next, StoredSequence)
    assert rotate(made("alice"), "alice").secrets.operators["alice"].wanted.created == NOW
