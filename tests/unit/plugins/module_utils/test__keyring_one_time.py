# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One-time sequences in a host's entry: on, off, more of them, and what a client tries meanwhile."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import (
    HostSecrets,
    HostState,
    read_host_state,
)
from ansible_collections.fleet.portknock.plugins.module_utils._planning import Plan, plan_secrets
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._rotation import begin, finish
from ansible_collections.fleet.portknock.plugins.module_utils._stock import COMING, GOING, HONOURED

NOW = "2026-01-31T08:15:00Z"
LATER = "2026-02-28T20:00:00Z"
GIVEN = (Knock(43000, "tcp"), Knock(33000, "tcp"), Knock(53000, "tcp"))


def plan(existing: HostSecrets | None, *operators: str, **arguments: Any) -> Plan:
    return plan_secrets(
        existing, keyring_id="ring", host="web1", operators=operators or ("alice",), now=NOW, **arguments
    )


def state(entry: HostSecrets, last_id: int | None = None, **firsts: int) -> HostState:
    """What the host says once it has the entry's gate."""
    return HostState(
        entry.keyring_id, entry.generation, entry.fingerprint, firsts, entry.last_id if last_id is None else last_id
    )


@pytest.fixture(scope="module")
def reusable() -> HostSecrets:
    return plan(None).secrets


@pytest.fixture(scope="module")
def switched(reusable: HostSecrets) -> HostSecrets:
    return plan(reusable, one_time=20, state=state(reusable)).secrets


@pytest.fixture(scope="module")
def there(switched: HostSecrets) -> HostSecrets:
    return switched.promoted(NOW)


def ids(entry: HostSecrets, operator: str = "alice") -> list[int]:
    stock = entry.operators[operator].one_time
    return [] if stock is None else list(stock.sequences)


def test_switched_on(reusable: HostSecrets, switched: HostSecrets, there: HostSecrets) -> None:
    """Until the gate is known to have them, the reusable one is tried first: it gives nothing away."""
    honoured = switched.honoured(["alice"])["alice"]
    assert (honoured.sequences, list(honoured.one_time)) == ([], list(range(1, 21)))
    assert switched.generation == reusable.generation + 1
    assert [name for name, _knocks in switched.candidates()] == ["alice"]
    assert [list(group) for _name, group in switched.one_time()] == [ids(switched)]
    assert there.candidates() == []
    assert there.one_time() == switched.one_time()
    assert there.fingerprint == switched.fingerprint != reusable.fingerprint
    assert there.operators["alice"].current == reusable.operators["alice"].current
    assert plan(there, one_time=20, state=state(there, alice=1)).changed is False


def test_on_from_the_first(there: HostSecrets) -> None:
    entry = plan(None, "alice", "bob", one_time=16, is_bare=True).secrets
    assert (ids(entry, "alice"), ids(entry, "bob")) == (list(range(1, 17)), list(range(17, 33)))
    assert entry.last_id == 32
    firsts = {knocks[0] for name in ("alice", "bob") for knocks in entry.operators[name].once.values()}
    assert len(firsts) == 32
    assert entry.prover(["alice", "bob"]) == "alice"


def test_switched_off_and_on_again(there: HostSecrets) -> None:
    off = plan(there, state=state(there, alice=5)).secrets
    assert off.operators["alice"].one_time is not None
    assert off.operators["alice"].one_time.state == GOING
    assert off.honoured(["alice"])["alice"].sequences == [off.operators["alice"].current.knocks]
    assert not off.honoured(["alice"])["alice"].one_time
    # Whichever the host honours: both are known.
    assert (len(off.candidates()), len(off.one_time())) == (1, 1)
    gone = off.promoted(NOW)
    assert gone.operators["alice"].one_time is None
    assert gone.last_id == 20
    assert plan(gone, state=state(gone)).changed is False
    again = plan(gone, one_time=16, state=state(gone)).secrets
    assert ids(again) == list(range(21, 37))
    back = plan(off, one_time=20, state=state(there, alice=5)).secrets
    assert back.operators["alice"].one_time is not None
    assert (back.operators["alice"].one_time.state, ids(back)) == (COMING, list(range(1, 21)))


def test_filled_up_where_fewer_than_half_are_left(there: HostSecrets) -> None:
    assert plan(there, one_time=20, state=state(there, alice=11)).changed is False
    filled = plan(there, one_time=20, state=state(there, alice=12)).secrets
    assert ids(filled) == list(range(12, 32))
    assert filled.operators["alice"].one_time is not None
    assert filled.operators["alice"].one_time.state == HONOURED
    assert (filled.generation, filled.last_id) == (there.generation + 1, 31)
    # A run that died before the host had these: it still says what it knows.
    assert plan(filled, one_time=20, state=state(there, last_id=20, alice=21)).secrets == filled


def test_another_number(there: HostSecrets) -> None:
    more = plan(there, one_time=30, state=state(there, alice=3)).secrets
    assert ids(more) == list(range(3, 33))
    fewer = plan(there, one_time=16, state=state(there, alice=3)).secrets
    assert ids(fewer) == list(range(3, 19))
    assert plan(fewer, one_time=16, state=state(fewer, alice=3)).changed is False


@pytest.mark.parametrize("kind", ["bare", "adopted", "ahead"])
def test_what_may_have_been_used_is_not_used_again(there: HostSecrets, kind: str) -> None:
    """A host without a gate forgot what was used there, and another keyring's numbers are others."""
    if kind == "bare":
        after = plan(there, one_time=20, is_bare=True).secrets
        assert ids(after) == list(range(21, 41))
        rotating = begin(there, ["alice"], rotation="ab", now=NOW).secrets
        assert ids(plan(rotating, one_time=20, is_bare=True).secrets) == list(range(41, 61))
        return
    keyring_id, generation = ("another", 1) if kind == "adopted" else ("ring", there.generation + 5)
    found = HostState(keyring_id, generation, "f" * 16, {"alice": 77}, 90)
    after = plan(there, one_time=20, state=found).secrets
    assert ids(after) == list(range(91, 111))


def test_a_protected_port_is_in_none(there: HostSecrets) -> None:
    port = there.operators["alice"].once[7][1].port
    after = plan(there, one_time=20, protected={port}, state=state(there, alice=1)).secrets
    assert 7 in ids(there)
    assert all(port not in {knock.port for knock in knocks} for knocks in after.operators["alice"].once.values())


def test_not_beside_given_ones() -> None:
    with pytest.raises(PortknockError) as caught:
        plan(None, one_time=20, given={"alice": GIVEN})
    assert str(caught.value) == (
        "knock_server_sequences: expected none where knock_server_one_time is set, since each sequence is used once; got "
        "those of alice."
    )


def test_who_was_revoked_gets_others(there: HostSecrets) -> None:
    both = plan(there, "alice", "bob", one_time=20, state=state(there, alice=1)).secrets.promoted(NOW)
    gone = replace(both, operators={**both.operators, "bob": replace(both.operators["bob"], active=False, revoked=NOW)})
    assert "bob" not in gone.honoured(["alice", "bob"])
    back = plan(gone, "alice", "bob", one_time=20, state=state(gone, alice=1), readmit=["bob"]).secrets
    assert not set(ids(back, "bob")) & set(ids(both, "bob"))


def test_the_shape_on_disk(there: HostSecrets) -> None:
    text = yaml.safe_dump(there.to_mapping(), sort_keys=False)
    assert HostSecrets.from_mapping(yaml.safe_load(text), "FILE") == there
    mapping: Any = there.to_mapping()
    assert mapping["one_time_last"] == 20
    assert list(mapping["operators"]["alice"]["one_time"]) == ["size", "state", "sequences"]
    shown = yaml.safe_dump(there.describe())
    assert "sequences: 20" in shown
    assert not re.search(r"\d+/(tcp|udp)", shown)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("state", "gone", "coming or honoured or going as state"),
        ("size", 0, "a whole number from 1 up as size"),
        ("sequences", {"a": "40961/tcp"}, "a mapping from ids to port/protocol as sequences"),
        ("sequences", {0: "40961/tcp"}, "a mapping from ids to port/protocol as sequences"),
        ("sequences", {65536: "40961/tcp"}, "a mapping from ids to port/protocol as sequences"),
        ("sequences", {1: ["40961/tcp"]}, "a mapping from ids to port/protocol as sequences"),
        ("sequences", {1: "40961/tcp 40961"}, "a list of port/protocol as sequences"),
        ("sequences", {1: "40961/tcp 40963/tcp"}, "a list of 3 to 16 knocks as sequences"),
    ],
)
def test_a_damaged_file(there: HostSecrets, place: str, value: object, says: str) -> None:
    mapping: Any = yaml.safe_load(yaml.safe_dump(there.to_mapping()))
    mapping["operators"]["alice"]["one_time"][place] = value
    with pytest.raises(PortknockError) as caught:
        HostSecrets.from_mapping(mapping, "FILE")
    assert str(caught.value).startswith(f"FILE: expected {says}; got something else.")
    assert "40961" not in str(caught.value)


def test_what_a_gate_says(there: HostSecrets) -> None:
    said = {
        "keyring": "ring",
        "generation": 2,
        "one_time": {"alice": {"left": 9, "armed": 4, "known": 20, "first": 12}, "bob": "?"},
        "one_time_last": 20,
    }
    assert read_host_state(said) == HostState("ring", 2, None, {"alice": 12}, 20)
    assert read_host_state({**said, "one_time": None, "one_time_last": "x"}) == HostState("ring", 2)


def test_the_stamp_is_the_entry_s_own(there: HostSecrets, switched: HostSecrets) -> None:
    assert there.stamp == switched.stamp != replace(there, tripwire_seed=b"\1" * 32).stamp


def test_a_rotation(there: HostSecrets) -> None:
    step = begin(there, ["alice"], rotation="ab", now=NOW, state=state(there, alice=5))
    both = step.secrets
    assert list(both.honoured(["alice"])["alice"].one_time) == list(range(1, 41))
    assert begin(both, ["alice"], rotation="cd", now=NOW).secrets == both
    # Not before the host is known to honour both.
    assert finish(both, ["alice"], grace=0, now=LATER).secrets == both
    assert plan(both, one_time=20, state=state(both, alice=18)).secrets.last_id == 40
    proved = both.promoted(NOW)
    assert finish(proved, ["alice"], grace=10**9, now=LATER).secrets == proved
    alone = finish(proved, ["alice"], grace=0, now=LATER).secrets
    assert list(alone.honoured(["alice"])["alice"].one_time) == list(range(21, 41))
    # The host may still have both, and then opens for the former ones first.
    assert [list(group) for _name, group in alone.one_time()] == [list(range(1, 21)), list(range(21, 41))]
    assert HostSecrets.from_mapping(alone.to_mapping(), "FILE") == alone
    done = alone.promoted(LATER)
    assert [list(group) for _name, group in done.one_time()] == [list(range(21, 41))]
    assert done.fingerprint == alone.fingerprint != proved.fingerprint
    assert finish(done, ["alice"], grace=0, now=LATER).secrets == done
