# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which one-time sequence a client sends next.

What is known of that is in a small file that holds no secret. Lost or stale it costs a few attempts and never the way in:
what does not open is followed by what comes after it. The order is always ascending. Whatever opens makes all before it
worthless, so that what somebody has seen on its way, without its arriving, is good for as short as can be.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Sequence, Tuple

from ansible_collections.fleet.portknock.plugins.module_utils._knocking import KnockResult
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock

FORMAT = 1
# How many after the last that is known to have opened are tried first, at each attempt: more than a boot of the host costs.
# Where they all fail, because another client has used more, an attempt goes on where the last one ended.
NEAR = 8

# Groups of sequences by their ids, each with its operator's name.
Stocks = Sequence[Tuple[str, Mapping[int, Sequence[Knock]]]]


class Ticket(NamedTuple):
    """One sequence that opens once, and whose it is."""

    operator: str
    identity: int
    knocks: Sequence[Knock]


class Usage:
    """What a client knows to be used of the one-time sequences of one host.

    :param path: the file; None where nothing can be kept. One that can't be read or written counts as none.
    :param stamp: tells the host's ids from those of another time, in which they may have been others.
    :param prefix: tells the host apart where several share a file.
    """

    def __init__(self, path: Optional[str], stamp: str, prefix: str = "") -> None:
        self._path = path
        self._stamp = stamp
        self._prefix = prefix

    def tickets(self, stocks: Stocks) -> list[Ticket]:
        """Return what to try, in this order.

        :param stocks: likeliest first. What one group begins with is tried before what others end with.
        """
        with self._records() as records:
            near, doubtful, far = [], [], []
            for operator, stock in stocks:
                opened, tried = self._known(records, operator)
                every = sorted(stock)
                # A record that is beyond all there are is another host's or time's.
                left = [identity for identity in every if identity > opened] or every
                near += [Ticket(operator, identity, stock[identity]) for identity in left[:NEAR]]
                # Sent without looking after one that opened, it may have been lost, and be all that can open now.
                doubtful += [Ticket(operator, one, stock[one]) for one in (opened,) if one in stock and one not in left]
                rest = [identity for identity in left[NEAR:] if identity > tried] or left[NEAR:]
                far += [Ticket(operator, identity, stock[identity]) for identity in rest]
        return near + doubtful + far

    def take(self, stocks: Stocks, operator: str) -> Optional[Ticket]:
        """Return the next of an operator that no other process has taken, for a knock that nobody looks after; None where
        there is none.
        """
        stock = {identity: knocks for name, group in stocks if name == operator for identity, knocks in group.items()}
        with self._records() as records:
            opened, tried = self._known(records, operator)
            identity = min((one for one in stock if one > max(opened, tried)), default=None)
            if identity is None:
                return None
            self._note(records, operator, opened, identity)
        return Ticket(operator, identity, stock[identity])

    def opened(self, ticket: Ticket) -> None:
        """Note that this one has opened the gate."""
        with self._records() as records:
            opened, tried = self._known(records, ticket.operator)
            if ticket.identity > opened:
                self._note(records, ticket.operator, ticket.identity, max(ticket.identity, tried))

    def note(self, tickets: Sequence[Ticket], result: KnockResult, reusable: int = 0) -> None:
        """Note how an attempt with these went.

        :param reusable: how many sequences that don't open once were tried before them.
        """
        sent = tickets[: result.sent_once]
        if not sent:
            return
        if result.sequence < reusable:
            self.failed(sent)
        else:
            # Not the one that the port opened for: what came after that has been seen on the way, too.
            self.opened(sent[-1])

    def failed(self, tickets: Sequence[Ticket]) -> None:
        """Note that none of these, which were all that was sent, has opened the gate."""
        with self._records() as records:
            for operator in {ticket.operator for ticket in tickets}:
                opened, _tried = self._known(records, operator)
                last = max(ticket.identity for ticket in tickets if ticket.operator == operator)
                self._note(records, operator, opened, last)

    def _known(self, records: Mapping[str, Any], operator: str) -> tuple[int, int]:
        record = records.get(self._prefix + operator)
        if isinstance(record, dict) and record.get("of") == self._stamp:
            opened, tried = record.get("opened"), record.get("tried")
            if isinstance(opened, int) and isinstance(tried, int):
                return opened, tried
        return 0, 0

    def _note(self, records: dict[str, Any], operator: str, opened: int, tried: int) -> None:
        records[self._prefix + operator] = {"of": self._stamp, "opened": opened, "tried": tried}

    @contextlib.contextmanager
    def _records(self) -> Iterator[dict[str, Any]]:
        """The file's content, to be changed while no other process does."""
        handle = self._open()
        if handle is None:
            yield {}
            return
        with open(handle, "r+b") as file:
            text = file.read()
            try:
                content = json.loads(text)
                records = content["used"] if content["format"] == FORMAT else {}
            except (ValueError, TypeError, LookupError):
                records = {}
            records = records if isinstance(records, dict) else {}
            yield records
            after = json.dumps({"format": FORMAT, "used": records}).encode() + b"\n"
            if after != text:
                with contextlib.suppress(OSError):
                    # One write, under the lock. What a crash halves is read as nothing known.
                    file.seek(0)
                    file.truncate()
                    file.write(after)
                    file.flush()

    def _open(self) -> Optional[int]:
        if self._path is None:
            return None
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:
            return None
        try:
            # Held for less than a millisecond.
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            os.close(handle)
            return None
        return handle


__all__ = ("NEAR", "Stocks", "Ticket", "Usage")
