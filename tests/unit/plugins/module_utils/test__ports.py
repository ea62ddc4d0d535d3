# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._ports import (
    KNOCK_PROTOCOLS,
    Knock,
    parse_knock,
    parse_knocks,
    parse_sequences,
)

ONE, OTHER = ["41001/tcp", "52002/udp"], ["43003/tcp", "54004/tcp"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (ONE, [ONE]),
        (tuple(ONE), [ONE]),
        ([ONE], [ONE]),
        ([ONE, OTHER], [ONE, OTHER]),
        ([OTHER, ONE], [OTHER, ONE]),
        ((tuple(ONE), OTHER), [ONE, OTHER]),
        ([ONE, OTHER, ONE], [ONE, OTHER]),
        ([ONE, list(reversed(ONE))], [ONE, list(reversed(ONE))]),
    ],
)
def test_one_sequence_or_several_in_order(value: object, expected: list[list[str]]) -> None:
    found = parse_sequences(value, "knock_sequences")
    assert [[str(knock) for knock in sequence] for sequence in found] == expected


EITHER = "expected a sequence, which is a list of port/protocol, or a list of sequences; got "


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], EITHER + "an empty list."),
        ("41001/tcp", EITHER + "another type."),
        ({"web1": ONE}, EITHER + "another type."),
        (41001, EITHER + "another type."),
        (None, EITHER + "another type."),
        ([[]], "expected at least one knock in each sequence; got an empty list."),
        ([ONE, []], "expected at least one knock in each sequence; got an empty list."),
        ([ONE, *ONE], "expected a list such as [22/tcp]; got another type."),
        (
            [*ONE, OTHER],
            "expected port/protocol, a port from 1 to 65535 and tcp or udp, such as 22/tcp; got another value.",
        ),
        (
            [ONE, ["43003/tcp", "54004"]],
            "expected port/protocol, a port from 1 to 65535 and tcp or udp, such as 22/tcp; got another value.",
        ),
        ([ONE, [*OTHER, OTHER[0]]], "expected each port once; got one twice."),
    ],
)
def test_what_is_neither_is_not_repeated(value: object, says: str) -> None:
    with pytest.raises(PortknockError) as caught:
        parse_sequences(value, "knock_sequences")
    assert str(caught.value) == f"knock_sequences: {says}"


def test_lengths_of_echo_requests_where_a_client_sends_them() -> None:
    knocks = parse_knocks(["300/icmp", "41001/tcp", "65507/icmp"], "knocks", protocols=KNOCK_PROTOCOLS)
    assert knocks == (Knock(300, "icmp"), Knock(41001, "tcp"), Knock(65507, "icmp"))
    assert parse_sequences([["300/icmp"]], "knock_sequences", KNOCK_PROTOCOLS) == [(Knock(300, "icmp"),)]


@pytest.mark.parametrize("value", ["0/icmp", "65508/icmp", "300/icmpv6"])
def test_other_lengths(value: str) -> None:
    with pytest.raises(PortknockError, match=r"tcp or udp \(or bytes/icmp, 1 to 65507\), such as 22/tcp; got"):
        parse_knock(value, "knocks", protocols=KNOCK_PROTOCOLS)


def test_a_gate_takes_none() -> None:
    with pytest.raises(PortknockError, match=r"tcp or udp, such as 22/tcp; got '300/icmp'\.$"):
        parse_knock("300/icmp", "knock_server_protected_ports")
    with pytest.raises(PortknockError, match=r"tcp or udp, such as 22/tcp; got another value\.$"):
        parse_sequences(["300/icmp"], "knock_server_sequences")
