# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from random import Random

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._ports import KNOCK_PROTOCOLS, Knock, parse_knocks
from ansible_collections.fleet.portknock.plugins.module_utils._sequences import (
    ECHO_LENGTHS,
    LOWEST_PORT,
    check,
    check_length,
    check_protocols,
    derive_echo_tripwires,
    derive_tripwires,
    generate,
    generate_knocks,
    is_round,
)

ALL_PORTS = frozenset(range(LOWEST_PORT, 65536))
SEED = bytes(range(32))
GOLDEN_8 = (34040, 55958, 1766, 19789, 9794, 36118, 52514, 5130)
FIRST_ECHO_TRIPWIRES = (996, 978, 461, 623, 716)
GOLDEN_SUM_OF_2000 = 67624524


def chi_square(counts: Sequence[int]) -> float:
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


def spread(draw: Callable[[], int], draws: int) -> float:
    """How unevenly draws fall on 63 equal parts of the ports: about 62, and above 130 once in a million times."""
    counts = Counter((draw() - LOWEST_PORT) // 1024 for _ in range(draws))
    return chi_square([counts[part] for part in range(63)])


def test_ports_are_drawn_evenly() -> None:
    random = Random(20260101)

    def draw(position: int) -> int:
        return generate(4, ["tcp"], set(), random)[position].port

    for position in range(4):
        assert spread(partial(draw, position), 15000) < 130


def test_the_evenness_test_sees_a_remainder() -> None:
    random = Random(20260101)
    assert spread(lambda: LOWEST_PORT + random.getrandbits(16) % len(ALL_PORTS), 15000) > 130


def valid_orders(pool: Sequence[int], length: int) -> set[tuple[int, ...]]:
    return {
        ports
        for ports in itertools.permutations(pool, length)
        if all(abs(one - other) >= 2 for one, other in itertools.combinations(ports, 2))
        and list(ports) not in (sorted(ports), sorted(ports, reverse=True))
    }


@pytest.mark.parametrize(
    ("pool", "length"),
    [
        ((40000, 40001, 40002, 40004, 40005, 40007), 3),
        ((1024, 1026, 1027, 1029, 65535), 4),
    ],
)
def test_every_sequence_of_a_small_pool_is_equally_likely(pool: tuple[int, ...], length: int) -> None:
    possible = valid_orders(pool, length)
    random = Random(7)
    excluded = ALL_PORTS - set(pool)
    counts = Counter(
        tuple(knock.port for knock in generate(length, ["tcp"], excluded, random)) for _ in range(15 * len(possible))
    )
    assert set(counts) == possible
    degrees = len(possible) - 1
    assert chi_square([counts[ports] for ports in possible]) < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("length", range(3, 17))
def test_rules_hold_for_every_length(length: int) -> None:
    excluded = frozenset(range(2000, 60000))
    for _ in range(50):
        ports = [knock.port for knock in generate(length, ["tcp"], excluded)]
        assert len(ports) == length
        assert all(1024 <= port <= 65535 and port not in excluded for port in ports)
        assert all(abs(one - other) >= 2 for one, other in itertools.combinations(ports, 2))
        assert ports != sorted(ports)
        assert ports != sorted(ports, reverse=True)


def test_two_draws_differ() -> None:
    assert len({generate(4, ["tcp"], set()) for _ in range(50)}) == 50


@pytest.mark.parametrize(("protocols", "expected"), [(["tcp"], {"tcp"}), (["udp"], {"udp"})])
def test_one_protocol(protocols: list[str], expected: set[str]) -> None:
    assert {knock.proto for _ in range(20) for knock in generate(4, protocols, set())} == expected


def test_with_two_protocols_both_occur_and_every_mixture_is_drawn() -> None:
    random = Random(3)
    counts = Counter(
        "".join(knock.proto[0] for knock in generate(3, ["tcp", "udp"], set(), random)) for _ in range(3000)
    )
    assert set(counts) == {"ttu", "tut", "utt", "tuu", "utu", "uut"}
    assert chi_square(list(counts.values())) < 30


def test_the_last_sequence_that_is_possible_is_found() -> None:
    ports = set(range(50000, 50031, 2))
    assert {knock.port for knock in generate(16, ["tcp"], ALL_PORTS - ports)} == ports


@pytest.mark.parametrize(
    ("pool", "length", "left"),
    [
        (set(), 4, "0 ports from 1024 to 65535 are left after the exclusions, and at most 0 of them are"),
        ({4000}, 3, "1 port from 1024 to 65535 is left after the exclusions, and at most 1 of them is"),
        (
            set(range(4000, 4006)),
            4,
            "6 ports from 1024 to 65535 are left after the exclusions, and at most 3 of them are",
        ),
    ],
)
def test_too_small_a_pool_is_refused_with_the_numbers(pool: set[int], length: int, left: str) -> None:
    with pytest.raises(PortknockError) as caught:
        generate(length, ["tcp"], ALL_PORTS - pool)
    assert str(caught.value) == (
        f"knock_server_sequence_length: a sequence of {length} knocks needs {length} ports that are at least 2 apart; "
        f"{left} at least 2 apart."
    )


@pytest.mark.parametrize("length", [2, 17, -4, 0, True, "4", 4.0, None])
def test_bad_length(length: object) -> None:
    with pytest.raises(PortknockError) as caught:
        check_length(length)
    assert str(caught.value) == (f"knock_server_sequence_length: expected a whole number from 3 to 16; got {length!r}.")


@pytest.mark.parametrize("protocols", [[], ["icmp"], ["tcp", "tcp"], "tcp", None, [["tcp"]]])
def test_bad_protocols(protocols: object) -> None:
    with pytest.raises(PortknockError) as caught:
        check_protocols(protocols)
    assert str(caught.value) == (
        f"knock_server_sequence_protocols: expected a list of tcp, udp or both, each once; got {protocols!r}."
    )


@pytest.mark.parametrize(
    ("ports", "says"),
    [
        ([40000, 30000], "expected 3 to 16 knocks; got 2."),
        ([40000 + 7 * number for number in range(17)], "expected 3 to 16 knocks; got 17."),
        ([40000, 1023, 50000], "expected ports from 1024 to 65535; knock 2 has a lower one."),
        ([40000, 30000, 8443], "expected no protected port; knock 3 is one."),
        (
            [5432, 30000, 40000],
            "expected no port that nmap's list of services names, since every scan tries those first; knock 1 is one.",
        ),
        ([40000, 50000, 40001], "expected any two ports to be at least 2 apart; knocks 1 and 3 are not."),
        ([40000, 50000, 40000], "expected any two ports to be at least 2 apart; knocks 1 and 3 are not."),
        (
            [40000, 50000, 60000],
            "expected ports that neither ascend nor descend as a whole, since a plain sweep would open such a sequence; "
            "these do.",
        ),
        (
            [60000, 50000, 40000],
            "expected ports that neither ascend nor descend as a whole, since a plain sweep would open such a sequence; "
            "these do.",
        ),
    ],
)
def test_a_given_sequence_that_breaks_a_rule(ports: list[int], says: str) -> None:
    knocks = [Knock(port, "tcp") for port in ports]
    with pytest.raises(PortknockError) as caught:
        check(knocks, "sequences of bob", protected={8443}, nmap_ports={5432}, in_use={40000})
    assert str(caught.value) == f"sequences of bob: {says}"


@pytest.mark.parametrize(
    ("in_use", "warnings"),
    [
        (set(), []),
        (
            {40000, 22},
            [
                "bob: 1 knock goes to a port on which a service of the host listens. The service works on, but its own "
                "clients knock without meaning to."
            ],
        ),
        (
            {40000, 30000},
            [
                "bob: 2 knocks go to a port on which a service of the host listens. The service works on, but its own "
                "clients knock without meaning to."
            ],
        ),
    ],
)
def test_a_live_service_is_a_warning(in_use: set[int], warnings: list[str]) -> None:
    knocks = [Knock(40000, "tcp"), Knock(30000, "udp"), Knock(50000, "tcp")]
    assert check(knocks, "bob", protected={22}, nmap_ports=set(), in_use=in_use) == warnings


def test_tripwires_are_frozen_as_version_1() -> None:
    # These may never change: a host's tripwires would move with an upgrade of the collection.
    assert derive_tripwires(bytes(32), 5, frozenset()) == (21336, 58804, 16144, 43871, 61918)
    assert derive_tripwires(SEED, 8, frozenset()) == GOLDEN_8
    assert derive_tripwires(SEED, 8, frozenset(GOLDEN_8[:2]))[:6] == GOLDEN_8[2:]
    assert sum(derive_tripwires(SEED, 2000, frozenset())) == GOLDEN_SUM_OF_2000


def test_tripwires_keep_out_of_what_is_excluded() -> None:
    excluded = frozenset(range(1024, 40000))
    ports = derive_tripwires(SEED, 20000, excluded)
    assert len(ports) == len(set(ports)) == 20000
    assert min(ports) >= 40000


def test_tripwires_keep_out_of_traceroutes_way() -> None:
    every = derive_tripwires(SEED, 65536 - 1024 - 101, frozenset())
    assert set(every) == ALL_PORTS - set(range(33434, 33535))


def test_more_tripwires_begin_with_fewer() -> None:
    assert derive_tripwires(SEED, 3000, frozenset({50000}))[:2000] == derive_tripwires(SEED, 2000, frozenset({50000}))
    assert derive_tripwires(SEED, 0, frozenset()) == ()


def test_tripwires_are_even() -> None:
    ports = iter(derive_tripwires(SEED, 15000, frozenset()))
    # Drawn without putting back, so somewhat more even than independent draws.
    assert spread(lambda: next(ports), 15000) < 130


@pytest.mark.parametrize(
    ("seed", "count", "excluded", "says"),
    [
        (bytes(31), 5, frozenset(), "The tripwire seed: expected 32 bytes; got 31."),
        (SEED, -1, frozenset(), "knock_server_tripwires: expected a whole number, 0 or more; got -1."),
        (SEED, "5", frozenset(), "knock_server_tripwires: expected a whole number, 0 or more; got '5'."),
        (
            SEED,
            64000,
            frozenset(range(22, 2024)),
            "knock_server_tripwires: expected at most as many tripwires as there are ports left after the exclusions, "
            "63411; got 64000.",
        ),
    ],
)
def test_bad_tripwires(seed: bytes, count: int, excluded: frozenset[int], says: str) -> None:
    with pytest.raises(PortknockError) as caught:
        derive_tripwires(seed, count, excluded)
    assert str(caught.value) == says


@pytest.mark.parametrize("protocols", [["icmp"], ["tcp", "icmp"], ["tcp", "udp", "icmp"]])
@pytest.mark.parametrize("length", [3, 4, 8])
def test_sequences_with_echo_requests(protocols: list[str], length: int) -> None:
    """Every protocol occurs; lengths are in range, not round, apart from each other, and in no order; ports as ever."""
    source = Random(f"{protocols} {length}")
    excluded, excluded_lengths = set(range(1024, 40000)), set(range(100, 900))
    for _again in range(300):
        knocks = generate_knocks(length, protocols, excluded, excluded_lengths, source)
        assert {knock.proto for knock in knocks} == set(protocols)
        assert len(knocks) == length
        lengths = [knock.port for knock in knocks if knock.proto == "icmp"]
        ports = [knock.port for knock in knocks if knock.proto != "icmp"]
        assert all(900 <= one <= 1200 and not is_round(one) for one in lengths)
        assert all(port >= 40000 for port in ports)
        for numbers in (lengths, ports):
            assert all(abs(one - other) > 1 for index, one in enumerate(numbers) for other in numbers[:index])
            assert len(numbers) < 3 or numbers not in (sorted(numbers), sorted(numbers, reverse=True))


def test_every_length_is_drawn_as_often() -> None:
    source = Random(1)
    drawn = Counter(
        knock.port for _again in range(20000) for knock in generate_knocks(3, ["icmp"], set(), random=source)
    )
    usable = [length for length in ECHO_LENGTHS if not is_round(length)]
    assert set(drawn) == set(usable)
    mean = 60000 / len(usable)
    assert sum((drawn[length] - mean) ** 2 / mean for length in usable) < 1.3 * len(usable)


def test_without_icmp_they_are_drawn_as_ever() -> None:
    """What is derived by the same code must not change."""
    for protocols in (["tcp"], ["udp", "tcp"]):
        assert generate_knocks(5, protocols, {5000}, random=Random(7)) == generate(5, protocols, {5000}, Random(7))
    with pytest.raises(PortknockError, match="expected a list of tcp, udp or both, each once"):
        generate(4, ["icmp"], set())
    with pytest.raises(
        PortknockError, match=r"expected a list of one or more of tcp, udp, icmp, each once; got \['sctp'\]"
    ):
        generate_knocks(4, ["sctp"], set())


def test_too_few_lengths() -> None:
    says = (
        "knock_server_sequence_protocols: a sequence with 4 icmp knocks needs as many lengths that are at least 2 apart; 1 from "
        "100 to 1200 is left on this host. Add tcp, or have fewer operators."
    )
    with pytest.raises(PortknockError) as caught:
        generate_knocks(4, ["icmp"], set(), set(ECHO_LENGTHS) - {101})
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["717/icmp", "231/icmp", "1003/icmp"], None),
        (["717/icmp", "40000/tcp", "719/icmp"], None),
        (["443/icmp", "40000/tcp", "1100/icmp", "30000/udp"], None),
        (
            ["99/icmp", "231/icmp", "1003/icmp"],
            "expected icmp knocks of 100 to 1200 bytes; knock 1 is of another length.",
        ),
        (
            ["717/icmp", "231/icmp", "1201/icmp"],
            "expected icmp knocks of 100 to 1200 bytes; knock 3 is of another length.",
        ),
        (
            ["717/icmp", "40000/tcp", "716/icmp"],
            "expected any two ports to be at least 2 apart; knocks 1 and 3 are not.",
        ),
        (["231/icmp", "717/icmp", "1003/icmp"], "expected ports that neither ascend nor descend as a whole"),
        (
            ["231/icmp", "717/icmp", "40000/tcp", "1003/icmp"],
            "expected ports that neither ascend nor descend as a whole",
        ),
        (["1100/icmp", "40000/tcp", "443/tcp"], "expected ports from 1024 to 65535; knock 3 has a lower one."),
    ],
)
def test_given_sequences_with_echo_requests(texts: list[str], says: str | None) -> None:
    knocks = parse_knocks(texts, "given", protocols=KNOCK_PROTOCOLS)
    with pytest.raises(PortknockError, match=f"^given: {re.escape(says)}") if says else nullcontext():
        check(knocks, "given", protected={443}, nmap_ports={1100}, in_use={717})


def test_tripwires_among_lengths_are_frozen() -> None:
    seed = bytes(range(32))
    derived = derive_echo_tripwires(seed, {1043})
    assert (len(derived), len(set(derived)), derived[:5]) == (200, 200, FIRST_ECHO_TRIPWIRES)
    assert not [length for length in derived if length not in ECHO_LENGTHS or is_round(length)]
    assert 1043 not in derived
    without = derive_echo_tripwires(seed, {1043, derived[0]})
    assert without[:4] == derived[1:5]
    assert len(derive_echo_tripwires(seed, set(ECHO_LENGTHS) - {101, 103})) == 2
