# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Close sequences in a host's entry: made, kept, rotated, revoked and taken away."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import yaml
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._gate import build_model, settings_from
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import HostSecrets, HostState
from ansible_collections.fleet.portknock.plugins.module_utils._planning import Plan, plan_secrets
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._rotation import begin, finish, revoke

NOW = "2026-01-31T08:15:00Z"
BOTH = ("alice", "bob")


def plan(existing: HostSecrets | None, *operators: str, close_sequence: bool = True, **arguments: Any) -> Plan:
    return plan_secrets(
        existing,
        keyring_id="ring",
        host="web1",
        operators=operators or BOTH,
        now=NOW,
        close_sequence=close_sequence,
        **arguments,
    )


def rotated(entry: HostSecrets, rotation: str = "1", **arguments: Any) -> HostSecrets:
    return begin(entry, BOTH, rotation=rotation, now=NOW, **arguments).secrets


def ports(sequences: Iterable[Iterable[Knock]]) -> list[int]:
    return [knock.port for knocks in sequences for knock in knocks]


def test_each_operator_has_one_of_their_own() -> None:
    entry = plan(None, length=5).secrets
    assert len(entry.close_sequences()) == 2
    assert entry.close_sequences("bob") == [entry.operators["bob"].close[0].knocks]
    every = ports([*entry.close_sequences(), *(knocks for _name, knocks in entry.candidates())])
    assert len(every) == len(set(every)) == 20
    assert plan(entry, length=5) == Plan(entry, False, (), ())
    honoured = entry.honoured(BOTH)
    assert {name: [tuple(knocks) for knocks in one.close] for name, one in honoured.items()} == {
        name: entry.close_sequences(name) for name in BOTH
    }


def test_on_and_off_are_changes_of_what_the_gate_honours() -> None:
    plain = plan(None, close_sequence=False).secrets
    switched = plan(plain)
    assert (switched.changed, switched.secrets.generation, switched.created) == (True, 2, ())
    assert switched.secrets.candidates() == plain.candidates()
    assert plain.close_sequences() == []
    off = plan(switched.secrets, close_sequence=False).secrets
    assert off == replace(plain, generation=3)


def test_what_had_none_has_the_fingerprint_that_it_had() -> None:
    plain = plan(None, close_sequence=False).secrets
    with_it = plan(plain).secrets
    same_number = replace(with_it, generation=plain.generation)
    assert same_number.fingerprint != plain.fingerprint
    another = plan(plan(with_it, close_sequence=False).secrets).secrets
    assert replace(another, generation=with_it.generation).fingerprint != with_it.fingerprint
    assert with_it.promoted(NOW).fingerprint == with_it.fingerprint


def test_the_file_keeps_it_and_shows_nothing() -> None:
    entry = rotated(plan(None).secrets)
    text = yaml.safe_dump(entry.to_mapping())
    assert HostSecrets.from_mapping(yaml.safe_load(text), "FILE") == entry
    shown = yaml.safe_dump(entry.describe())
    assert not [port for port in ports(entry.close_sequences()) if str(port) in shown]
    mapping = yaml.safe_load(text)
    short = {**mapping["operators"]["alice"]["close"][0], "knocks": ["48396/tcp"]}
    damages: list[Any] = [{}, [{}], ["12345/tcp"], [short]]
    for damage in damages:
        mapping["operators"]["alice"]["close"] = damage
        with pytest.raises(PortknockError, match="damaged") as caught:
            HostSecrets.from_mapping(mapping, "FILE")
        assert not re.search(r"48396|12345", str(caught.value))


def test_a_rotation_renews_it() -> None:
    first = plan(None).secrets
    begun = rotated(first)
    for name in BOTH:
        new, former = begun.close_sequences(name)
        assert [former] == first.close_sequences(name)
        assert new != former
        assert len(begun.honoured(BOTH)[name].close) == 2
    every = ports([*begun.close_sequences(), *(knocks for _name, knocks in begun.candidates())])
    assert len(every) == len(set(every))
    # Whatever runs between the two steps.
    assert plan(begun).secrets == begun
    assert rotated(begun, "2") == begun
    ended = finish(begun.promoted(NOW), BOTH, grace=0, now=NOW).secrets
    assert {name: ended.close_sequences(name) for name in BOTH} == {
        name: begun.close_sequences(name)[:1] for name in BOTH
    }
    again = rotated(ended, "3")
    assert again.close_sequences("bob")[1:] == ended.close_sequences("bob")


def test_a_rotation_of_one_time_sequences_renews_it() -> None:
    entry = plan(None, one_time=16).secrets.promoted(NOW)
    begun = rotated(entry)
    assert begun.close_sequences("alice")[1:] == entry.close_sequences("alice")
    settings, capable = settings_from({}), {"one_time": True}
    model: Any = build_model(settings, begun.honoured(BOTH), b"\0" * 32, frozenset(), capable)
    assert len(model["close"]) == 4
    ended = finish(begun.promoted(NOW), BOTH, grace=0, now=NOW).secrets
    assert ended.close_sequences("alice") == begun.close_sequences("alice")[:1]


def test_without_one_a_rotation_makes_none() -> None:
    assert rotated(plan(None, close_sequence=False).secrets).close_sequences() == []


def test_a_rotation_that_something_else_ended_leaves_one() -> None:
    begun = rotated(plan(None).secrets)
    former = ports([begun.operators["alice"].current.knocks])[0]
    state = HostState("ring", begun.generation, begun.fingerprint)
    ended = plan(begun, protected={former}, state=state).secrets.promoted(NOW)
    assert plan(ended, protected={former}).secrets.close_sequences("alice") == begun.close_sequences("alice")[:1]


def test_revoked_and_let_in_again() -> None:
    entry = plan(None).secrets
    gone = revoke(entry, "bob", BOTH, NOW)
    assert list(gone.honoured(BOTH)) == ["alice"]
    assert gone.close_sequences("bob") == []
    assert plan(gone).secrets == gone
    back = plan(gone, readmit=["bob"]).secrets
    assert len(back.close_sequences("bob")) == 1
    assert back.close_sequences("bob") != entry.close_sequences("bob")
    unnamed = plan(entry, "alice").secrets
    assert unnamed.close_sequences("bob") == []


def test_what_the_gate_could_not_honour_is_made_anew() -> None:
    entry = plan(None).secrets
    (former,) = entry.close_sequences("alice")
    # Up and down, whatever it begins with.
    same = (former[0], *(Knock(port, "tcp") for port in (60001, 50001, 55001)))
    for arguments in ({"protected": {former[-1].port}}, {"given": {"bob": [same]}}):
        after = plan(entry, **arguments).secrets
        (new,) = after.close_sequences("alice")
        assert new != former
        build_model(settings_from({}), after.honoured(BOTH), b"\0" * 32, frozenset(), {})


def test_no_two_begin_alike() -> None:
    """Nor with what opens once, of which there may be hundreds."""
    entry = plan(None, one_time=500, random=Random(1)).secrets
    begun = [knocks[0] for operator in entry.operators.values() for knocks in operator.once.values()]
    begun += [knocks[0] for knocks in entry.close_sequences()]
    assert len(begun) == len(set(begun)) == 1002
    later = plan(plan(entry, close_sequence=False, one_time=500).secrets, one_time=500).secrets
    assert not {knocks[0] for knocks in later.close_sequences()} & set(begun[:1000])


def test_icmp_knocks_go_with_the_protocol() -> None:
    """A host whose gate is to be of another kind gets others; what a person gave is theirs."""
    entry = plan(None, protocols=["tcp", "icmp"]).secrets
    assert {knock.proto for knock in entry.to_prove(BOTH)} == {"tcp", "icmp"}
    assert plan(entry, protocols=["icmp", "tcp"]).secrets == entry
    text = yaml.safe_dump(entry.to_mapping())
    assert HostSecrets.from_mapping(yaml.safe_load(text), "FILE") == entry
    after = plan(entry).secrets
    for name in BOTH:
        assert {knock.proto for knock in after.operators[name].wanted.knocks} == {"tcp"}
        assert after.operators[name].current == entry.operators[name].current
        assert {knock.proto for knocks in after.close_sequences(name) for knock in knocks} == {"tcp"}
    given = {"alice": [(Knock(717, "icmp"), Knock(231, "icmp"), Knock(1003, "icmp"))]}
    by_hand = plan(plan(after.promoted(NOW), given=given).secrets).secrets.promoted(NOW)
    assert by_hand.to_prove(["alice"]) == given["alice"][0]
    assert plan(by_hand).secrets == by_hand


def test_icmp_knocks_of_a_host_are_different_ones() -> None:
    names = tuple(f"op{number}" for number in range(20))
    entry = plan(None, *names, protocols=["icmp"], protected={443, 22}).secrets
    rotated_all = begin(entry, names, rotation="1", now=NOW, protocols=["icmp"]).secrets
    lengths = ports([knocks for operator in rotated_all.operators.values() for knocks in operator.every_sequence])
    assert len(lengths) == len(set(lengths)) == 20 * 4 * 4
    once = plan(None, one_time=100, protocols=["tcp", "icmp"]).secrets
    assert {knocks[-1].proto for knocks in once.operators["alice"].once.values()} == {"tcp"}
    assert plan(once, one_time=100).secrets.operators["alice"].one_time != once.operators["alice"].one_time
