# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._gate import EARLIEST_TIME, Honoured
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import (
    HostSecrets,
    HostState,
    Operator,
    StoredSequence,
    check_host_state,
    check_not_all_expire,
    check_operators,
    parse_given,
    parse_valid_until,
    read_host_state,
)
from ansible_collections.fleet.portknock.plugins.module_utils._planning import Plan, plan_secrets
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._rotation import finish

NOW = "2026-01-31T08:15:00Z"
LATER = "2026-02-28T20:00:00Z"
A = (Knock(40000, "tcp"), Knock(30000, "udp"), Knock(50000, "tcp"))
B = (Knock(41000, "tcp"), Knock(31000, "tcp"), Knock(51000, "tcp"))
C = (Knock(42000, "tcp"), Knock(32000, "tcp"), Knock(52000, "tcp"))
D = (Knock(43000, "tcp"), Knock(33000, "tcp"), Knock(53000, "tcp"))


def stored(knocks: tuple[Knock, ...], generation: int = 1, source: str = "given") -> StoredSequence:
    return StoredSequence(generation, knocks, source, NOW)


def entry(**operators: Operator) -> HostSecrets:
    return HostSecrets("ring", "web1", 3, bytes(range(32)), frozenset({22, 80}), operators)


def plan(existing: HostSecrets | None, operators: list[str] | None = None, **arguments: Any) -> Plan:
    return plan_secrets(
        existing, keyring_id="ring", host="web1", operators=operators or ["default"], now=LATER, **arguments
    )


def opening(entry: HostSecrets, operator: str = "default") -> list[tuple[Knock, ...]]:
    """The sequences that the gate honours of an operator."""
    return [tuple(knocks) for knocks in entry.honoured([operator])[operator].sequences]


FULL = replace(
    entry(
        alice=Operator(True, stored(A), stored(B, 2, "generated")),
        bob=Operator(False, stored(C, 3)),
    ),
    removed=True,
)
MAPPING: dict[str, Any] = {
    "format": 1,
    "keyring": "ring",
    "host": "web1",
    "generation": 3,
    "removed": True,
    "tripwires": {"seed": bytes(range(32)).hex(), "avoid": [22, 80]},
    "operators": {
        "alice": {
            "active": True,
            "current": {
                "generation": 1,
                "knocks": ["40000/tcp", "30000/udp", "50000/tcp"],
                "source": "given",
                "created": NOW,
            },
            "next": {
                "generation": 2,
                "knocks": ["41000/tcp", "31000/tcp", "51000/tcp"],
                "source": "generated",
                "created": NOW,
            },
        },
        "bob": {
            "active": False,
            "current": {
                "generation": 3,
                "knocks": ["42000/tcp", "32000/tcp", "52000/tcp"],
                "source": "given",
                "created": NOW,
            },
        },
    },
}


def test_the_shape_on_disk() -> None:
    assert FULL.to_mapping() == MAPPING
    assert HostSecrets.from_mapping(MAPPING, "f.yml") == FULL


def test_the_marks_on_disk() -> None:
    marked = replace(
        FULL,
        rotation="0f",
        operators={
            "alice": replace(FULL.operators["alice"], both=True, both_since=NOW, valid_until=LATER),
            "bob": replace(FULL.operators["bob"], revoked=LATER),
        },
    )
    mapping = copy.deepcopy(MAPPING)
    mapping["rotation"] = "0f"
    mapping["operators"]["alice"].update(both=True, both_since=NOW, valid_until=LATER)
    mapping["operators"]["bob"]["revoked"] = LATER
    assert marked.to_mapping() == mapping
    assert HostSecrets.from_mapping(mapping, "f.yml") == marked


def test_removed_may_be_left_out() -> None:
    mapping = {key: value for key, value in MAPPING.items() if key != "removed"}
    assert HostSecrets.from_mapping(mapping, "f.yml") == replace(FULL, removed=False)


def test_packages_are_kept_where_there_are_any() -> None:
    noted = replace(FULL, packages=("nftables", "libnft-1.0+b1"))
    mapping = {**MAPPING, "packages": ["nftables", "libnft-1.0+b1"]}
    assert noted.to_mapping() == mapping
    assert HostSecrets.from_mapping(mapping, "f.yml") == noted
    assert noted.describe()["packages"] == ["nftables", "libnft-1.0+b1"]
    assert "packages" not in FULL.describe()


def test_single_use_is_kept_where_it_is() -> None:
    noted = replace(FULL, single_use=True)
    mapping = {**MAPPING, "single_use": True}
    assert noted.to_mapping() == mapping
    assert HostSecrets.from_mapping(mapping, "f.yml") == noted
    assert noted.describe()["single_use"] is True
    assert "single_use" not in {**FULL.to_mapping(), **FULL.describe()}


DAMAGES: list[tuple[tuple[str, ...], object, str]] = [
    ((), None, "a mapping of format, keyring, host, generation, tripwires, operators as the file"),
    ((), ["48396/tcp"], "a mapping of format, keyring, host, generation, tripwires, operators as the file"),
    (
        ("format",),
        2,
        "a keyring file of format 1, not of a newer one that a later release wrote, as the file",
    ),
    (("format",), "1", "1 as format"),
    (("keyring",), "", "the id of a keyring as keyring"),
    (("host",), 7, "the name of a host as host"),
    (("generation",), 0, "a whole number from 1 up as generation"),
    (("generation",), True, "a whole number from 1 up as generation"),
    (("removed",), "yes", "true or false as removed"),
    (("packages",), "nftables", "a list of packages as packages"),
    (("packages",), ["--force"], "a list of packages as packages"),
    (("single_use",), "yes", "true or false as single_use"),
    (("unknown",), 1, "a mapping of format, keyring, host, generation, tripwires, operators as the file"),
    (("tripwires",), [], "a mapping of seed, avoid as tripwires"),
    (("tripwires", "seed"), "48396", "64 hexadecimal digits as seed"),
    (("tripwires", "seed"), 48396, "64 hexadecimal digits as seed"),
    (("tripwires", "avoid"), ["48396"], "a list of ports as avoid"),
    (("tripwires", "avoid"), [483960], "a list of ports as avoid"),
    (("operators",), {"a/b": {}}, "a mapping from operators' names as operators"),
    (("operators",), {"vars": {}}, "a mapping from operators' names as operators"),
    (("operators", "alice"), "48396", "a mapping of active, current as operator alice"),
    (("operators", "alice", "active"), 1, "true or false as active"),
    (("operators", "alice", "current"), None, "a mapping of generation, knocks, source, created as current"),
    (("operators", "alice", "current", "knocks"), ["48396/tcp", "48396"], "a list of port/protocol as knocks"),
    (("operators", "alice", "current", "knocks"), ["48396/tcp"], "a list of 3 to 16 knocks as knocks"),
    (("operators", "alice", "next", "source"), "48396", "generated or given as source"),
    (("operators", "alice", "next", "created"), "48396", "a UTC time such as 2026-01-31T08:15:00Z as created"),
]


@pytest.mark.parametrize(("place", "value", "expected"), DAMAGES)
def test_a_damaged_file(place: tuple[str, ...], value: object, expected: str) -> None:
    mapping = copy.deepcopy(MAPPING)
    data: object = mapping
    if place:
        target = mapping
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = value
    else:
        data = value
    with pytest.raises(PortknockError) as caught:
        HostSecrets.from_mapping(data, "/k/web1.yml")
    assert str(caught.value) == (
        f"/k/web1.yml: expected {expected}; got something else. The file is damaged or is not a keyring's; restore it "
        f"from a backup."
    )
    assert "48396" not in str(caught.value)


def test_what_is_shown_has_no_secret() -> None:
    shown = repr(FULL.describe())
    assert "alice" in shown
    assert not any(str(knock.port) in shown for knock in (*A, *B, *C))
    assert FULL.tripwire_seed.hex() not in shown


def test_candidates_come_likeliest_first() -> None:
    three = entry(
        bob=Operator(False, stored(C)), alice=Operator(True, stored(A), stored(B)), carol=Operator(True, stored(C))
    )
    assert three.candidates() == [("alice", A), ("carol", C), ("alice", B), ("bob", C)]
    assert three.candidates("alice") == [("alice", A), ("alice", B)]
    assert three.candidates("bob") == [("bob", C)]


def test_an_unknown_operator() -> None:
    with pytest.raises(PortknockError) as caught:
        FULL.candidates("mallory")
    assert str(caught.value) == (
        "knock_operator: expected an operator that the keyring knows on web1 (alice, bob); got 'mallory'."
    )
    with pytest.raises(PortknockError) as caught:
        FULL.honoured(["alice", "mallory"])
    assert str(caught.value) == (
        "knock_server_operators: expected operators that the keyring knows on web1; got mallory."
    )


def test_what_the_gate_honours() -> None:
    numbers = {name: number for number, name in enumerate(FULL.operators, start=1)}
    assert FULL.honoured(["alice"]) == {"alice": Honoured(numbers["alice"], [B])}
    assert FULL.honoured(["bob", "alice"]) == {
        "bob": Honoured(numbers["bob"], [C]),
        "alice": Honoured(numbers["alice"], [B]),
    }


def test_both_sequences_of_a_rotation_are_honoured_and_stay_through_a_promotion() -> None:
    rotating = entry(default=Operator(True, stored(A), stored(B, 2), both=True))
    assert opening(rotating) == [B, A]
    assert rotating.to_prove(["default"]) == B
    confirmed = rotating.promoted(LATER)
    assert confirmed == entry(default=Operator(True, stored(A), stored(B, 2), both=True, both_since=LATER))
    assert confirmed.promoted("2026-03-01T00:00:00Z") == confirmed
    assert confirmed.fingerprint == rotating.fingerprint
    assert confirmed.fingerprint != entry(default=Operator(True, stored(A), stored(B, 2))).fingerprint
    # A later run of the role neither ends the rotation nor changes anything.
    assert not plan(confirmed).changed
    assert confirmed.operators["default"].retired() == Operator(True, stored(B, 2))


def test_the_proof_uses_what_is_new_and_does_not_expire() -> None:
    three = entry(
        alice=Operator(True, stored(A), valid_until=LATER),
        bob=Operator(True, stored(B)),
        carol=Operator(True, stored(D), stored(C, 2), both=True),
    )
    assert three.to_prove(["alice", "bob"]) == B
    assert three.to_prove(["alice", "bob", "carol"]) == C
    assert three.promoted(LATER).to_prove(["bob", "carol"]) == B
    assert three.honoured(["alice"])["alice"].valid_until == 1772308800


def test_the_former_sequence_of_a_rotation_gives_way_to_a_protected_port() -> None:
    rotating = entry(default=Operator(True, stored(A), stored(B, 2), both=True, both_since=NOW))
    for port, honoured in ((A[0].port, [B]), (B[0].port, None)):
        planned = plan(replace_source(rotating), protected={port})
        assert planned.changed
        assert port not in {knock.port for knocks in opening(planned.secrets) for knock in knocks}
        assert honoured is None or opening(planned.secrets) == honoured
        # Whichever the host honours now stays known.
        known = {knocks for _name, knocks in planned.secrets.candidates()}
        assert A in known


def replace_source(secrets: HostSecrets) -> HostSecrets:
    """The same with sequences that were generated."""
    operator = secrets.operators["default"]
    return replace(
        secrets,
        operators={
            "default": replace(
                operator,
                current=replace(operator.current, source="generated"),
                next=operator.next and replace(operator.next, source="generated"),
            )
        },
    )


def test_whoever_was_revoked_stays_out_until_let_in_again() -> None:
    two = entry(alice=Operator(True, stored(A)), bob=Operator(False, stored(B), revoked=NOW))
    planned = plan(two, ["alice", "bob"])
    assert not planned.changed
    assert planned.warnings == (
        f"knock_server_operators: bob, who was revoked on web1 at {NOW}, stays out. Take the name off the list, or let "
        "them in again with a new sequence by knock_server_readmit.",
    )
    assert list(planned.secrets.honoured(["alice", "bob"])) == ["alice"]
    again = plan(two, ["alice", "bob"], readmit=["bob"])
    assert again.changed
    bob = again.secrets.operators["bob"]
    assert (bob.active, bob.revoked, bob.next) == (True, None, None)
    assert bob.current.knocks != B
    assert again.secrets.operators["alice"] == two.operators["alice"]
    assert not plan(again.secrets, ["alice", "bob"], readmit=["bob"]).changed


def test_nobody_left_is_an_error() -> None:
    one = entry(bob=Operator(False, stored(B), revoked=NOW))
    message = (
        "knock_server_operators: expected an operator on web1 who was not revoked, since nobody could get in otherwise; got "
        "bob only. Name another, or let one in again by knock_server_readmit."
    )
    with pytest.raises(PortknockError) as caught:
        plan(one, ["bob"])
    assert str(caught.value) == message
    with pytest.raises(PortknockError) as caught:
        one.honoured(["bob"])
    assert str(caught.value) == message
    with pytest.raises(PortknockError) as caught:
        plan(one, ["alice"], readmit=["bob"])
    assert str(caught.value) == (
        "knock_server_readmit: expected operators that knock_server_operators names (alice); got bob."
    )


def test_an_expiry_is_a_change_and_leaves_the_sequence() -> None:
    one = entry(default=Operator(True, stored(A)))
    ends = plan(one, valid_until={"default": LATER})
    assert ends.changed
    assert ends.secrets.operators["default"] == Operator(True, stored(A), valid_until=LATER)
    assert ends.secrets.fingerprint != replace(one, generation=ends.secrets.generation).fingerprint
    assert not plan(ends.secrets, valid_until={"default": LATER}).changed
    assert not plan(ends.secrets).changed
    assert plan(ends.secrets, valid_until={}).secrets.operators["default"].valid_until is None


PAST, FUTURE = "2026-01-31T08:15:00Z", "2999-12-31T23:59:59Z"


def test_until_when_they_may_knock() -> None:
    assert parse_valid_until(None, ["alice"]) == {}
    assert parse_valid_until({"bob": FUTURE}, ["alice", "bob"]) == {"bob": FUTURE}


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (["bob"], "expected a mapping"),
        ({"carol": FUTURE}, "expected operators that knock_server_operators names (alice, bob); got carol."),
        ({"bob": "tomorrow"}, "knock_server_valid_until, operator bob: expected a UTC time after 2026-01-01T00:00:00Z"),
        ({"bob": "2026-12-31T23:59:59"}, "got '2026-12-31T23:59:59'"),
        ({"bob": "2026-12-31T23:59:59+01:00"}, "expected a UTC time"),
        ({"bob": "2026-02-30T00:00:00Z"}, "expected a UTC time"),
        ({"bob": "2025-12-31T23:59:59Z"}, "expected a UTC time"),
        ({"bob": 1798761599}, "expected a UTC time"),
        ({"bob": None}, "got 'None'"),
    ],
    ids=str,
)
def test_times_that_can_t_be(value: object, complaint: str) -> None:
    with pytest.raises(PortknockError) as caught:
        parse_valid_until(value, ["alice", "bob"])
    assert str(caught.value).startswith("knock_server_valid_until")
    assert complaint in str(caught.value)


def test_somebody_is_left_to_get_in() -> None:
    expiring = Operator(True, stored(A), valid_until=FUTURE)
    check_not_all_expire(["alice", "bob"], entry(alice=Operator(True, stored(B)), bob=expiring))
    for alice in (replace(expiring, current=stored(B)), Operator(True, stored(B), revoked=PAST)):
        with pytest.raises(PortknockError, match=r"^knock_server_valid_until: .*web1.*knock_server_trusted_sources"):
            check_not_all_expire(["alice", "bob"], entry(alice=alice, bob=expiring))


def test_a_time_that_is_over_is_told() -> None:
    one = entry(default=Operator(True, stored(A)))
    assert plan(one, valid_until={"default": FUTURE}).warnings == ()
    (warning,) = plan(one, valid_until={"default": PAST}).warnings
    assert warning == f"knock_server_valid_until: the time of default on web1 is over since {PAST}: they are shut out."


def test_whose_time_is_over_comes_last() -> None:
    secrets = entry(
        alice=Operator(True, stored(A), valid_until=PAST),
        bob=Operator(True, stored(B), valid_until=FUTURE),
        carol=Operator(False, stored(C)),
    )
    assert [name for name, _knocks in secrets.candidates()] == ["bob", "alice", "carol"]
    assert [name for name, _knocks in secrets.candidates("alice")] == ["alice"]


def test_the_proof_is_not_made_with_whose_time_is_over() -> None:
    over = Operator(True, stored(A), stored(D), valid_until=PAST)
    secrets = entry(alice=over, bob=Operator(True, stored(B), valid_until=FUTURE), carol=Operator(True, stored(C)))
    assert secrets.to_prove(["alice", "bob", "carol"]) == C
    assert secrets.to_prove(["alice", "bob"]) == B
    with pytest.raises(PortknockError, match=r"^knock_server_valid_until: .* web1 "):
        secrets.to_prove(["alice"])


def test_before_when_a_clock_is_wrong() -> None:
    """A day before the sequence was made; one that is given may be written down anew by every run."""
    made = 1769847300  # NOW
    secrets = entry(
        alice=Operator(True, stored(A, source="generated"), valid_until=FUTURE),
        bob=Operator(True, stored(B), valid_until=FUTURE),
        carol=Operator(True, stored(C, source="generated")),
    )
    honoured = secrets.honoured(["alice", "bob", "carol"])
    assert {name: operator.valid_from for name, operator in honoured.items()} == {
        "alice": made - 86400,
        "bob": EARLIEST_TIME,
        "carol": EARLIEST_TIME,
    }


def test_promotion_keeps_the_generation_and_is_done_once() -> None:
    promoted = FULL.promoted(LATER)
    assert promoted.operators["alice"] == Operator(True, stored(B, 2, "generated"))
    assert promoted.generation == FULL.generation
    assert promoted.honoured(["alice", "bob"]) == FULL.honoured(["alice", "bob"])
    assert promoted.promoted(LATER) == promoted


def test_a_new_host() -> None:
    made = plan(None, ["alice", "bob"], length=6, protocols=["tcp", "udp"], in_use={22, 8080}, protected={22})
    assert made.changed
    assert made.created == ("alice", "bob")
    assert made.warnings == ()
    secrets = made.secrets
    assert (secrets.keyring_id, secrets.host, secrets.generation, secrets.removed) == ("ring", "web1", 1, False)
    assert len(secrets.tripwire_seed) == 32
    assert secrets.avoid == {22, 8080}
    ports = [knock.port for operator in secrets.operators.values() for knock in operator.current.knocks]
    assert len(ports) == len(set(ports)) == 12
    assert plan(None).secrets.tripwire_seed != secrets.tripwire_seed
    assert HostSecrets.from_mapping(secrets.to_mapping(), "f") == secrets


def test_nothing_to_change() -> None:
    first = plan(None, ["alice", "bob"]).secrets
    again = plan(first, ["bob", "alice"], in_use={60000})
    assert not again.changed
    assert again.secrets is first
    assert again.created == ()


def test_operators_come_go_and_come_back() -> None:
    first = plan(None, ["alice", "bob"]).secrets
    second = plan(first, ["alice", "carol"])
    assert second.changed
    assert second.created == ("carol",)
    assert second.secrets.generation == 2
    assert [operator.active for operator in second.secrets.operators.values()] == [True, False, True]
    assert second.secrets.operators["bob"].current == first.operators["bob"].current
    third = plan(second.secrets, ["alice", "bob", "carol"])
    assert third.created == ()
    assert third.secrets.generation == 3
    assert all(operator.active for operator in third.secrets.operators.values())


def test_a_removed_host_is_live_again_with_the_same_sequences() -> None:
    first = plan(None).secrets
    removed = first.marked_removed()
    assert removed.removed
    again = plan(removed)
    assert again.changed
    assert again.secrets == replace(first, generation=2)


def test_single_use_is_noted_at_once_and_forgotten_by_a_proof() -> None:
    """While the host may have either gate, clients reckon with the one that needs more of them."""
    assert plan(None, single_use=True).secrets.single_use
    first = plan(None).secrets
    noted = plan(first, single_use=True)
    assert (noted.changed, noted.secrets) == (True, replace(first, single_use=True))
    assert noted.secrets.fingerprint == first.fingerprint
    assert not plan(noted.secrets, single_use=True).changed
    kept = plan(noted.secrets, single_use=False)
    assert (kept.changed, kept.secrets) == (False, noted.secrets)
    assert plan(noted.secrets, operators=["default", "alice"]).secrets.single_use
    assert plan(first, operators=["default", "alice"], single_use=True).secrets.single_use
    assert kept.secrets.promoted(LATER) == noted.secrets
    assert kept.secrets.promoted(LATER, single_use=False) == first
    assert first.promoted(LATER, single_use=True) == noted.secrets
    assert not noted.secrets.marked_removed().single_use


def test_packages_are_noted_and_forgotten_without_a_new_generation() -> None:
    assert plan(None, packages=["nftables"]).secrets.packages == ("nftables",)
    first = plan(None).secrets
    noted = plan(first, packages=["nftables"])
    assert (noted.changed, noted.secrets) == (True, replace(first, packages=("nftables",)))
    # What was installed once stays noted, whatever is missing later.
    assert plan(noted.secrets) == plan(noted.secrets, packages=["nftables"])
    assert not plan(noted.secrets).changed
    assert plan(noted.secrets, packages=["ipset"]).secrets.packages == ("nftables", "ipset")
    newer = plan(noted.secrets, ["default", "bob"]).secrets
    assert (newer.generation, newer.packages) == (2, ("nftables",))
    assert noted.secrets.marked_removed() == replace(noted.secrets, removed=True)
    assert noted.secrets.marked_removed(["nftables", "other"]) == replace(first, removed=True)


def test_a_given_sequence_waits_beside_the_former_one() -> None:
    first = entry(default=Operator(True, stored(A)))
    second = plan(first, given={"default": [B]})
    assert second.changed
    assert second.secrets.operators["default"] == Operator(True, stored(A), StoredSequence(4, B, "given", LATER))
    assert opening(second.secrets) == [B]
    assert not plan(second.secrets, given={"default": [B]}).changed
    assert not plan(second.secrets.promoted(LATER), given={"default": [B]}).changed


def test_going_back_before_the_new_one_is_proved_keeps_both() -> None:
    half = plan(entry(default=Operator(True, stored(A))), given={"default": [B]}).secrets
    back = plan(half, given={"default": [A]}).secrets
    assert opening(back) == [A]
    assert back.operators["default"].current.knocks == B


@pytest.mark.parametrize(
    ("deployed", "kept"),
    [(3, A), (4, B)],
    ids=["the host still has the former one", "the host has the new one"],
)
def test_a_third_sequence_before_the_second_is_promoted(deployed: int, kept: tuple[Knock, ...]) -> None:
    half = plan(entry(default=Operator(True, stored(A))), given={"default": [B]}).secrets
    third = plan(half, given={"default": [C]}, state=HostState("ring", deployed)).secrets
    assert third.operators["default"].current.knocks == kept
    assert opening(third) == [C]


def deployed(secrets: HostSecrets) -> tuple[HostSecrets, HostState]:
    """The entry after its gate was proved, and what the host then says of itself."""
    return secrets.promoted(LATER), HostState("ring", secrets.generation)


@pytest.mark.parametrize("source", ["given", "generated"])
def test_a_rotation_by_given_sequences(source: str) -> None:
    """The former one alone, both, the newest alone; whatever is proved or not, one that the host honours is known."""
    first = entry(default=Operator(True, replace(stored(A), source=source)))
    both = plan(first, given={"default": [B, A]}, state=HostState("ring", 3)).secrets
    operator = both.operators["default"]
    assert opening(both) == [B, A]
    assert both.to_prove(["default"]) == B
    assert {stored.source for stored in operator.honoured} == {"given"}
    assert not plan(both, given={"default": [B, A]}, state=HostState("ring", 3)).changed
    proved, state = deployed(both)
    assert proved.operators["default"].both_since == LATER
    assert not plan(proved, given={"default": [B, A]}, state=state).changed
    assert "retired" not in finish(proved, ["default"], grace=0, now=LATER).done.values()
    alone = plan(proved, given={"default": [B]}, state=state).secrets
    assert opening(alone) == [B]
    assert [knocks for _name, knocks in alone.candidates()] == [A, B]
    ended, state = deployed(alone)
    assert ended.operators["default"] == Operator(True, operator.honoured[0])
    assert not plan(ended, given={"default": [B]}, state=state).changed
    # Straight to the next one.
    assert opening(plan(proved, given={"default": [C, B]}, state=HostState("ring", both.generation)).secrets) == [C, B]


def test_two_given_sequences_from_the_beginning() -> None:
    made = plan(None, given={"default": [B, A]})
    assert made.created == ("default",)
    assert opening(made.secrets) == [B, A]
    assert not plan(made.secrets, given={"default": [B, A]}).changed


def test_two_given_sequences_where_the_host_may_have_neither() -> None:
    """Its own is not forgotten before one of the new ones is proved; then the other one comes back."""
    first = entry(default=Operator(True, stored(A)))
    half = plan(first, given={"default": [C, B]}, state=HostState("ring", 3))
    assert opening(half.secrets) == [C]
    assert half.secrets.operators["default"].current == stored(A)
    assert half.warnings == (
        "knock_server_sequences: the gate of web1 may honour neither of the two of operator default yet. It gets the newest "
        "alone, and the next run adds the former one.",
    )
    assert not plan(half.secrets, given={"default": [C, B]}, state=HostState("ring", 3)).changed
    proved, state = deployed(half.secrets)
    whole = plan(proved, given={"default": [C, B]}, state=state)
    assert (opening(whole.secrets), whole.warnings) == ([C, B], ())


def test_two_given_sequences_the_other_way_round() -> None:
    proved, state = deployed(plan(entry(default=Operator(True, stored(A))), given={"default": [B, A]}).secrets)
    back = plan(proved, given={"default": [A, B]}, state=state).secrets
    assert opening(back) == [A, B]
    assert opening(plan(back, given={"default": [A]}, state=state).secrets) == [A]


def test_two_given_sequences_of_one_operator_that_begin_alike() -> None:
    with pytest.raises(PortknockError, match=r"two of default's begin alike\.$"):
        plan(None, given={"default": [(A[0], *B[1:]), A]})


def test_a_generated_sequence_gives_way_to_a_protected_port() -> None:
    first = plan(None).secrets
    port = first.operators["default"].current.knocks[1].port
    second = plan(first, protected={port})
    operator = second.secrets.operators["default"]
    assert operator.current == first.operators["default"].current
    assert operator.next is not None
    assert port not in [knock.port for knock in operator.next.knocks]


def test_a_given_sequence_that_is_kept_does_not() -> None:
    with pytest.raises(PortknockError) as caught:
        plan(entry(default=Operator(True, stored(A))), protected={30000})
    assert str(caught.value) == (
        "knock_server_sequences, operator default: expected no protected port; the sequence that the keyring holds, "
        "which was given, has one."
    )


def test_another_length_is_for_the_next_rotation() -> None:
    first = plan(None).secrets
    again = plan(first, length=6)
    assert not again.changed
    assert again.warnings == (
        "knock_server_sequence_length: the sequence of operator default on web1 keeps its 4 knocks; 6 take effect when "
        "it is rotated.",
    )


def test_a_live_service_under_a_given_sequence() -> None:
    made = plan(None, given={"default": [A]}, in_use={30000})
    assert made.changed
    assert made.warnings == (
        "knock_server_sequences, operator default: 1 knock goes to a port on which a service of the host listens. The "
        "service works on, but its own clients knock without meaning to.",
    )


def test_given_sequences_that_begin_alike() -> None:
    other = (A[0], *B[1:])
    with pytest.raises(PortknockError) as caught:
        plan(None, ["alice", "bob"], given={"alice": [A], "bob": [other]})
    assert str(caught.value) == (
        "knock_server_sequences: expected sequences that begin with different knocks; those of alice and bob begin alike."
    )


def test_a_generated_sequence_shares_no_port_with_a_given_one() -> None:
    keep = {port for port in range(1024, 65536) if port not in {*range(40000, 40012, 2), 30000, 50000}}
    made = plan(None, ["alice", "bob"], given={"alice": [A]}, in_use=keep)
    assert {knock.port for knock in made.secrets.operators["bob"].current.knocks} <= {40002, 40004, 40006, 40008, 40010}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "expected a list of at least one name; got []."),
        ("alice", "expected a list of at least one name; got 'alice'."),
        (
            ["a/b"],
            "expected names of 1 to 64 letters, digits, dots, hyphens and underscores that begin with a letter, a digit "
            "or an underscore; got 'a/b'.",
        ),
        (
            [".."],
            "expected names of 1 to 64 letters, digits, dots, hyphens and underscores that begin with a letter, a digit "
            "or an underscore; got '..'.",
        ),
        (
            ["hosts"],
            "expected names other than children, hosts, vars, which Ansible's inventory reserves; got 'hosts'.",
        ),
        (["a", "b", "a"], "expected each name once; got 'a' twice."),
    ],
)
def test_bad_operators(value: object, says: str) -> None:
    with pytest.raises(PortknockError) as caught:
        check_operators(value)
    assert str(caught.value) == f"knock_server_operators: {says}"


def test_given_sequences_are_read() -> None:
    assert parse_given({"a": ["40000/tcp", "30000/udp", "50000/tcp"]}, ["a", "b"]) == {"a": [A]}
    assert parse_given({"a": [["41000/tcp"], ["42000/udp"]]}, ["a"]) == {
        "a": [(Knock(41000, "tcp"),), (Knock(42000, "udp"),)]
    }
    assert parse_given({"a": [["41000/tcp"], ["41000/tcp"]]}, ["a"]) == {"a": [(Knock(41000, "tcp"),)]}
    assert parse_given({}, ["a"]) == parse_given(None, ["a"]) == {}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (
            ["48396/tcp"],
            "knock_server_sequences: expected a mapping from an operator's name to a list of port/protocol; got another "
            "type.",
        ),
        (
            {"b": ["48396/tcp"]},
            "knock_server_sequences: expected operators that knock_server_operators names (a); got b.",
        ),
        (
            {"a": "48396/tcp"},
            "knock_server_sequences, operator a: expected a sequence, which is a list of port/protocol, or a list of "
            "sequences; got another type.",
        ),
        (
            {"a": ["48396"]},
            "knock_server_sequences, operator a: expected port/protocol, a port from 1 to 65535 and tcp or udp (or "
            "bytes/icmp, 1 to 65507), such as 22/tcp; got another value.",
        ),
        ({"a": ["48396/tcp"] * 2}, "knock_server_sequences, operator a: expected each port once; got one twice."),
        (
            {"a": [["48396/tcp"], ["48396"]]},
            "knock_server_sequences, operator a: expected port/protocol, a port from 1 to 65535 and tcp or udp (or "
            "bytes/icmp, 1 to 65507), such as 22/tcp; got another value.",
        ),
        (
            {"a": [["48396/tcp"], ["48397/tcp"], ["48398/tcp"]]},
            "knock_server_sequences, operator a: expected one sequence, or the newest and the former one; got 3.",
        ),
    ],
)
def test_bad_given_sequences_are_not_echoed(value: object, says: str) -> None:
    with pytest.raises(PortknockError) as caught:
        parse_given(value, ["a"])
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("value", "state"),
    [
        (None, None),
        ({}, None),
        ({"present": False, "keyring": None, "generation": 0}, None),
        ({"keyring": "ring", "generation": 2, "loaded": True}, HostState("ring", 2)),
    ],
)
def test_what_a_gate_says_of_itself(value: object, state: HostState | None) -> None:
    assert read_host_state(value) == state


@pytest.mark.parametrize("value", ["ring", {"keyring": "ring"}, {"keyring": "ring", "generation": "2"}, {"keyring": 5}])
def test_a_gate_that_says_something_else(value: object) -> None:
    with pytest.raises(PortknockError) as caught:
        read_host_state(value)
    assert str(caught.value) == (
        "host_state: expected what knock_gate_info reports as gate, a mapping with keyring and generation; got something "
        "else."
    )


REMEDY = "Use the keyring that the gate came from, or set knock_server_adopt to give the host new secrets."


@pytest.mark.parametrize(
    ("state", "existing", "keyring_id", "says"),
    [
        (
            HostState("other", 1),
            FULL,
            "ring",
            "expected the keyring other, from which the gate of web1 came; got ring.",
        ),
        (
            HostState("other", 1),
            None,
            None,
            "expected the keyring other, from which the gate of web1 came; got a new one.",
        ),
        (HostState("ring", 2), None, "ring", "expected an entry for web1, whose gate has generation 2; got none."),
        (
            HostState("ring", 3, "0123456789abcdef"),
            FULL,
            "ring",
            "expected the secrets of generation 3 that the gate of web1 was made from; got others under the same "
            "number: they were changed by hand, or are a copy's that went a way of its own.",
        ),
        (
            HostState("ring", 4),
            FULL,
            "ring",
            "expected generation 4 or later of web1, which is what its gate has; got 3, an older copy.",
        ),
    ],
)
def test_a_keyring_that_is_not_the_gates(
    state: HostState, existing: HostSecrets | None, keyring_id: str | None, says: str
) -> None:
    with pytest.raises(PortknockError) as caught:
        check_host_state(state, existing, keyring_id, "web1", adopt=False)
    assert str(caught.value) == f"knock_keyring_dir: {says} {REMEDY}"
    check_host_state(state, existing, keyring_id, "web1", adopt=True)


def test_a_keyring_that_is_the_gates() -> None:
    check_host_state(None, None, None, "web1", adopt=False)
    check_host_state(HostState("ring", 3), FULL, "ring", "web1", adopt=False)
    check_host_state(HostState("ring", 1), FULL, "ring", "web1", adopt=False)


@pytest.mark.parametrize("existing", [None, entry(default=Operator(True, stored(A)))])
def test_an_adopted_host_gets_a_generation_beyond_its_gates(existing: HostSecrets | None) -> None:
    made = plan(existing, state=HostState("other", 9))
    assert made.changed
    assert made.secrets.generation == 10
    settled = plan(
        made.secrets, state=HostState("ring", 10), length=len(made.secrets.operators["default"].current.knocks)
    )
    assert not settled.changed


def test_a_fingerprint_tells_secrets_apart_and_outlives_a_promotion() -> None:
    operators = {
        name: replace(operator, next=replace(operator.wanted, knocks=tuple(reversed(operator.wanted.knocks))))
        for name, operator in FULL.operators.items()
    }
    others = replace(FULL, operators=operators)
    assert len({FULL.fingerprint, others.fingerprint, replace(FULL, generation=4).fingerprint}) == 3
    assert FULL.promoted(LATER).fingerprint == FULL.fingerprint
    assert HostState("ring", 3, FULL.fingerprint).contradicts(FULL) is False
    assert HostState("ring", 3, FULL.fingerprint).contradicts(others) is True
    assert HostState("ring", 2, FULL.fingerprint).contradicts(others) is False


def test_contradicting_secrets_that_are_adopted_get_a_generation_of_their_own() -> None:
    plan = plan_secrets(
        FULL,
        keyring_id="ring",
        host="web1",
        operators=[name for name, operator in FULL.operators.items() if operator.active],
        now=NOW,
        state=HostState("ring", 3, "0123456789abcdef"),
    )
    assert plan.secrets.generation == 4
