# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""An operator's one-time sequences: how they are drawn, and what becomes of them."""

from __future__ import annotations

import random
import re

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._sequences import Barred
from ansible_collections.fleet.portknock.plugins.module_utils._stock import (
    COMING,
    GOING,
    HONOURED,
    Stock,
    check_one_time,
    draw,
)


def drawn(count: int, last: int = 0) -> dict[int, tuple[Knock, ...]]:
    return draw(count, last, 4, ("tcp", "udp"), {22}, (), random.Random(3 + last))


@pytest.mark.parametrize(("value", "number"), [(0, 0), (16, 16), (500, 500), ("40", 40), ("0", 0)])
def test_numbers(value: object, number: int) -> None:
    assert check_one_time(value) == number


@pytest.mark.parametrize("value", [1, 15, 501, -1, True, None, "many", "9" * 5000, 1.5, [16]])
def test_other_values(value: object) -> None:
    with pytest.raises(
        PortknockError, match=r"^knock_server_one_time: expected 0, or a whole number from 16 to 500; got "
    ):
        check_one_time(value)


def test_they_end_with_tcp_and_begin_differently() -> None:
    every = draw(400, 0, 3, ("tcp", "udp"), {22}, (), random.Random(1))
    assert list(every) == list(range(1, 401))
    assert {knocks[-1].proto for knocks in every.values()} == {"tcp"}
    assert {knock.proto for knocks in every.values() for knock in knocks} == {"tcp", "udp"}
    firsts = {knocks[0] for knocks in every.values()}
    assert len(firsts) == 400
    more = draw(16, 400, 3, ("tcp", "udp"), {22}, firsts, random.Random(1))
    assert next(iter(more)) == 401
    assert not firsts & {knocks[0] for knocks in more.values()}


def test_none_ends_with_udp() -> None:
    with pytest.raises(
        PortknockError, match=r"^knock_server_one_time: expected tcp in knock_server_sequence_protocols"
    ):
        draw(16, 0, 4, ("udp",), set(), ())


def test_ids_come_to_an_end() -> None:
    assert next(iter(draw(1, 65534, 4, ("tcp",), set(), ()))) == 65535
    with pytest.raises(PortknockError, match="expected ids up to 65535, of which the host has had 65534; 2 more"):
        draw(2, 65534, 4, ("tcp",), set(), ())


def test_from_on_to_off() -> None:
    stock = Stock(16, COMING, drawn(16))
    assert stock.honoured == stock.sequences
    there = stock.promoted()
    assert there == Stock(16, HONOURED, stock.sequences)
    assert there.promoted() == there
    leaving = there.going()
    assert (leaving.state, leaving.honoured, leaving.sequences) == (GOING, {}, stock.sequences)
    assert leaving.promoted() is None
    assert leaving.coming() == Stock(16, COMING, stock.sequences)
    assert there.coming() is there


def test_what_was_used_goes_and_new_ones_come_behind() -> None:
    stock = Stock(16, HONOURED, drawn(16))
    half = stock.since(9)
    assert list(half.sequences) == list(range(9, 17))
    assert not half.is_short(16)
    short = stock.since(10)
    assert short.is_short(16)
    filled = short.filled(16, drawn(9, 16))
    assert list(filled.sequences) == list(range(10, 26))
    assert stock.is_short(17)
    assert list(filled.filled(3, {}).sequences) == [10, 11, 12]


def test_a_protected_port_is_in_none() -> None:
    stock = Stock(16, HONOURED, drawn(16))
    port = stock.sequences[5][2].port
    assert 5 not in stock.without(Barred({port})).sequences
    assert len(stock.without(Barred({port})).sequences) == 15


def test_a_rotation_keeps_what_the_host_may_honour() -> None:
    old, new = drawn(16), drawn(16, 16)
    stock = Stock(16, HONOURED, old)
    both = stock.beside(new)
    assert (both.honoured, both.groups) == ({**old, **new}, [old, new])
    assert not both.since(14).is_short(16)
    assert both.promoted() == both
    retiring = both.retired()
    assert (retiring.honoured, retiring.groups) == (new, [old, new])
    assert retiring.promoted() == Stock(16, HONOURED, new)
    assert stock.groups == [old]


def test_no_error_holds_a_port() -> None:
    with pytest.raises(PortknockError) as caught:
        draw(16, 0, 4, ("udp",), {40961}, [Knock(40961, "tcp")])
    assert not re.search(r"40961", str(caught.value))
