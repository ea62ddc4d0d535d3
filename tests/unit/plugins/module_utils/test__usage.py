# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which one-time sequence is next: what is lost or stale is harmless, and the order ascends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import KnockResult
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._usage import NEAR, Stocks, Ticket, Usage

SECRET_PORT = 40961


def stock(first: int = 1, count: int = 30, operator: str = "alice") -> Stocks:
    return [(operator, {identity: (Knock(SECRET_PORT, "tcp"),) for identity in range(first, first + count)})]


def ids(tickets: Sequence[Ticket]) -> list[int]:
    return [ticket.identity for ticket in tickets]


def result(index: int, sent: int) -> KnockResult:
    return KnockResult("open" if index >= 0 else "reset", None, 1.0, sent, 0.0, index, sent_once=sent)


@pytest.fixture
def usage(tmp_path: Path) -> Usage:
    return Usage(str(tmp_path / ".web1.used"), "stamp")


def test_the_next_one_is_next(usage: Usage) -> None:
    tickets = usage.tickets(stock())
    assert ids(tickets) == list(range(1, 31))
    usage.note(tickets, result(0, 1))
    assert ids(usage.tickets(stock()))[0] == 2


def test_what_opened_late_does_not_bring_back_what_was_sent_after_it(usage: Usage) -> None:
    usage.note(usage.tickets(stock()), result(0, 3))
    assert ids(usage.tickets(stock()))[0] == 4


def test_the_last_one_that_opened_is_tried_again_after_the_next_few(usage: Usage) -> None:
    """Sent blindly behind one that opened it may never have arrived, and a host that has few left arms no other."""
    usage.note(usage.tickets(stock()), result(0, 2))
    assert ids(usage.tickets(stock())) == [*range(3, 3 + NEAR), 2, *range(3 + NEAR, 31)]


def test_after_a_failure_it_begins_again_and_goes_on_further(usage: Usage) -> None:
    """So that a host that was down is reached at once, and one whose sequences others have used in the end."""
    tickets = usage.tickets(stock(count=60))
    usage.note(tickets, result(-1, 20))
    later = ids(usage.tickets(stock(count=60)))
    assert later == [*range(1, NEAR + 1), *range(21, 61)]
    usage.note(usage.tickets(stock(count=60)), result(-1, len(later)))
    assert ids(usage.tickets(stock(count=60))) == list(range(1, 61))


def test_it_gets_there_however_many_others_have_used(usage: Usage) -> None:
    opens, seconds = 400, 20
    for _attempt in range(40):
        tickets = usage.tickets(stock(count=500))[:seconds]
        assert ids(tickets) == sorted(ids(tickets))
        place = next((index for index, ticket in enumerate(tickets) if ticket.identity == opens), -1)
        usage.note(tickets, result(place, place + 1 if place >= 0 else len(tickets)))
        if place >= 0:
            break
    assert ids(usage.tickets(stock(count=500)))[0] == 401


def test_processes_take_different_ones(usage: Usage) -> None:
    usage.note(usage.tickets(stock()), result(0, 1))
    taken = [usage.take(stock(), "alice") for _time in range(3)]
    assert [ticket.identity if ticket else 0 for ticket in taken] == [2, 3, 4]
    # What was taken and not seen to open is tried first where somebody looks.
    assert ids(usage.tickets(stock()))[0] == 2
    assert taken[1] is not None
    usage.opened(taken[1])
    assert ids(usage.tickets(stock()))[0] == 4
    assert usage.take(stock(), "alice") == Ticket("alice", 5, stock()[0][1][5])
    usage.opened(Ticket("alice", 1, ()))
    assert ids(usage.tickets(stock()))[0] == 4
    assert usage.take(stock(), "bob") is None
    assert usage.take(stock(count=5), "alice") is None


def test_many_processes_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "used")
    program = (
        "import sys; from ansible_collections.fleet.portknock.plugins.module_utils._usage import Usage\n"
        "stock = [('alice', {n: () for n in range(1, 500)})]\n"
        "print(*[Usage(sys.argv[1], 's').take(stock, 'alice').identity for _ in range(25)])"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True)
        for _place in range(4)
    ]
    taken = [int(number) for process in started for number in process.communicate()[0].split()]
    assert sorted(taken) == list(range(1, 101))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2}', '{"format": 1, "used": {"alice": [1]}}', "\xff"])
def test_a_damaged_file_is_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "used"
    path.write_text(content, encoding="latin-1")
    usage = Usage(str(path), "stamp")
    assert ids(usage.tickets(stock()))[0] == 1
    usage.note(usage.tickets(stock()), result(0, 1))
    assert ids(usage.tickets(stock()))[0] == 2


def test_no_place_for_a_file(tmp_path: Path) -> None:
    for path in (None, str(tmp_path / "absent" / "used")):
        usage = Usage(path, "stamp")
        usage.note(usage.tickets(stock()), result(0, 1))
        assert ids(usage.tickets(stock())) == list(range(1, 31))


def test_a_record_of_another_time_is_none(tmp_path: Path, usage: Usage) -> None:
    usage.note(usage.tickets(stock()), result(19, 20))
    assert ids(Usage(str(tmp_path / ".web1.used"), "another").tickets(stock()))[0] == 1
    # Beyond all there are: the host's numbers began anew, or a copy of the keyring went a way of its own.
    assert ids(usage.tickets(stock(count=10))) == list(range(1, 11))


def test_hosts_that_share_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "used")
    one, two = Usage(path, "s", "web1 "), Usage(path, "s", "web2 ")
    one.note(one.tickets(stock()), result(4, 5))
    assert (ids(one.tickets(stock()))[0], ids(two.tickets(stock()))[0]) == (6, 1)


def test_groups_follow_one_another() -> None:
    groups = [*stock(1, 20), *stock(21, 20)]
    order = ids(Usage(None, "s").tickets(groups))
    assert order == [*range(1, 9), *range(21, 29), *range(9, 21), *range(29, 41)]


def test_the_file_is_private_and_holds_no_port(tmp_path: Path, usage: Usage) -> None:
    os.umask(0o022)
    usage.note(usage.tickets(stock()), result(2, 3))
    path = tmp_path / ".web1.used"
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text()) == {
        "format": 1,
        "used": {"alice": {"of": "stamp", "opened": 3, "tried": 3}},
    }
    assert str(SECRET_PORT) not in path.read_text()


def test_reusable_ones_that_opened_use_nothing_up(usage: Usage) -> None:
    tickets = usage.tickets(stock())
    usage.note(tickets, result(0, 0), reusable=1)
    assert ids(usage.tickets(stock()))[0] == 1
    usage.note(tickets, result(0, 2), reusable=1)
    assert ids(usage.tickets(stock()))[0] == 1
    usage.note(tickets, result(2, 2), reusable=1)
    assert ids(usage.tickets(stock()))[0] == 3
