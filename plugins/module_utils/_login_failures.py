# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What sshd wrote about logins that failed: read as a stream, counted once an attempt, by source and user.

The name that somebody tries to log in under is theirs to choose, and sshd puts it before the address. So what a message says
is taken from the side that they can't reach, and a message in which both sides are theirs says nothing about its source:
that is known from another message of the same process then.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter, OrderedDict
from typing import Any, Match, NamedTuple, Optional, Pattern, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._sshd_log import (
    DEFAULT_FILES,
    Journal,
    Line,
    LogFiles,
    Source,
    as_utc,
)

# Pairs of source and user that are told one by one.
MOST_ROWS = 5000
# Connections that are kept in mind at a time: sshd has at most MaxStartups (100) that aren't logged in, but writes no end
# of some of them, and what it writes after the end of one must not be taken for another.
_MOST_CONNECTIONS = 4096
# sshd's own messages are shorter: it cuts names off after 100 characters. In a longer one somebody else's text has been cut
# off at a place of their choice, by sshd (1,024), or by rsyslog where it gathers repeated ones (800).
_LONGEST_MESSAGE = 800
_LONGEST_NAME = 400
# How much is read before and after the period, in seconds: most connections that fail are over in LoginGraceTime (120).
_MARGIN = 600
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

# Why a connection that tried nothing which sshd counts is a failed login, the most telling first.
_ONCE = ("root_refused", "not_allowed", "gssapi", "hostbased", "publickey", "too_many_attempts", "timeout", "gave_up")
_UNFINISHED = "unfinished"
# Methods whose every try sshd tells of. Of refused keys it tells some, so that they count once a connection.
_EACH = ("password", "keyboard_interactive")

_ADDRESS = r"(?P<source>[0-9A-Fa-f:.]+(?:%[\w.@-]+)?|UNKNOWN)"
_FROM = rf"{_ADDRESS} port (?P<port>\d+)"
_PREAUTH = r"(?: \[preauth\])?"
_WHO = r"(?:(?:authenticating|(?P<invalid>invalid)) user (?P<user>.*) )?"
_REPEATED = re.compile(r"message repeated (\d+) times: \[ ?(.*)\]")
_BEFORE_KEY = re.compile(rf" from {_FROM} ssh2")
# By first word, so that most lines are passed over at once. A message is what the first that fits it entirely says; greedy
# names end where the message's own end begins.
_MESSAGES: dict[str, list[tuple[str, Pattern[str]]]] = {}
for _kind, _text in (
    ("named", rf"Invalid (?P<invalid>user) (?P<user>.*) from {_FROM}"),
    (
        "failed",
        r"Failed (?P<method>password|keyboard-interactive/\w+|none|gssapi-[\w-]+) for (?P<invalid>invalid user )?"
        rf"(?P<user>.*) from {_FROM} ssh2",
    ),
    # Of keys a description follows. Their owner may have written a part of it, and chosen where sshd cuts it off.
    ("failed", r"Failed (?P<method>publickey|hostbased) for (?P<invalid>invalid user )?(?P<rest>.*)"),
    ("ended", rf"Connection (?:closed|reset) by {_WHO}{_FROM}{_PREAUTH}"),
    ("ended", rf"Disconnected from {_WHO}{_FROM}{_PREAUTH}"),
    # An account that exists has no such name as could be taken for the address.
    ("ended", rf"Disconnecting (?:authenticating user (?P<user>.*?) )?{_FROM}: .*"),
    ("ended", r"Disconnecting invalid user .*"),
    ("ended", rf"ssh_dispatch_run_fatal: Connection from {_FROM}: .*"),
    ("ended", r"ssh_dispatch_run_fatal: Connection from (?:authenticating|invalid) user .*"),
    (
        "too_many_attempts",
        r"maximum authentication attempts exceeded for (?P<invalid>invalid user )?(?P<user>.*) "
        rf"from {_FROM} ssh2{_PREAUTH}",
    ),
    ("asked", r"PAM: [^:]+? for (?P<invalid>illegal user )?(?P<user>.*) from (?P<rhost>\S+)"),
    ("not_allowed", r"User (?P<user>.*?) (?:from (?P<rhost>\S+) )?not allowed because .*"),
    ("no_account", rf"Access denied for user (?P<user>.*) by PAM account configuration{_PREAUTH}"),
    ("root_refused", rf"ROOT LOGIN REFUSED FROM {_FROM}{_PREAUTH}"),
    ("accepted", rf"Accepted [\w/-]+ for (?P<user>.*?) from {_FROM} ssh2(?:: .*)?"),
    ("timeout", rf"Timeout before authentication for {_FROM}"),
    ("timeout", rf"Timeout before authentication for connection from {_ADDRESS} to \S+, pid = (?P<pid>\d+)"),
    ("negotiation", rf"Unable to negotiate with {_FROM}: .*"),
    ("banner", rf"banner exchange: Connection from {_FROM}: .*"),
    ("banner", rf"Bad protocol version identification .* from {_FROM}"),
    ("ended", rf"Did not receive identification string from {_FROM}"),
    ("dropped", rf"drop connection #\d+ from \[{_ADDRESS}\]:(?P<port>\d+) on .*"),
    ("dropped", rf"refused connect from \S+ \({_ADDRESS}\)"),
):
    _MESSAGES.setdefault(_text.partition(" ")[0], []).append((_kind, re.compile(_text, re.DOTALL)))
_SEVERITIES = ("error: ", "fatal: ")
# These are the first that sshd writes of a connection.
_FIRST = ("named", "not_allowed")
_LAST = ("ended", "accepted", "no_account", "timeout", "negotiation", "banner")
# How a connection that never came to a name is counted.
_WITHOUT_NAME = {"ended": "closed", "timeout": "timeout", "negotiation": "negotiation", "banner": "banner"}


class Event(NamedTuple):
    """What a message says; None where it doesn't, or where that can't be told from what an attacker wrote."""

    kind: str
    times: int = 1
    source: Optional[str] = None
    port: Optional[int] = None
    user: Optional[str] = None
    invalid: bool = False
    method: Optional[str] = None
    pid: Optional[int] = None


def parse(message: str) -> Optional[Event]:
    """What one of sshd's messages says about a login or a connection; None for all others."""
    times = 1
    repeated = _REPEATED.fullmatch(message)
    if repeated:
        times, message = int(repeated[1]), repeated[2]
    if len(message) >= _LONGEST_MESSAGE:
        return None
    if message.startswith(_SEVERITIES):
        message = message.partition(" ")[2]
    for kind, pattern in _MESSAGES.get(message.partition(" ")[0], ()):
        match = pattern.fullmatch(message)
        if match:
            return _event(kind, times, match)
    return None


def _event(kind: str, times: int, match: Match[str]) -> Event:
    found = match.groupdict()
    if found.get("rest") is not None:
        found.update(_of_a_key(found["rest"]))
    user = found.get("user")
    method = found.get("method")
    return Event(
        kind=kind,
        times=times,
        source=_address(found.get("source") or found.get("rhost")),
        port=int(found["port"]) if found.get("port") else None,
        user=_shown(user) if user is not None else None,
        invalid=bool(found.get("invalid")),
        method=method.partition("/")[0].replace("-", "_") if method else None,
        pid=int(found["pid"]) if found.get("pid") else None,
    )


def _of_a_key(rest: str) -> dict[str, Optional[str]]:
    """User and source before a key's description, where only one place can be meant."""
    places = list(_BEFORE_KEY.finditer(rest))
    if len(places) != 1:
        return {}
    return {**places[0].groupdict(), "user": rest[: places[0].start()]}


def _address(text: Optional[str]) -> Optional[str]:
    """The address, or None where it isn't one: sshd writes a name there with UseDNS, and UNKNOWN without a network."""
    address, _percent, scope = (text or "").partition("%")
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return None
    return f"{address}%{_shown(scope)}" if scope else address


def _shown(name: str) -> str:
    """The name as sshd wrote it, without what a terminal would obey; sshd has escaped that already."""
    safe = name
    if not name.isprintable():
        safe = "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in name)
    return safe if len(safe) <= _LONGEST_NAME else safe[:_LONGEST_NAME] + "..."


class _Connection:
    """What is known of a connection so far."""

    __slots__ = ("asked", "first", "invalid", "last", "port", "reasons", "settled", "source", "tries", "user")

    def __init__(self, time: float) -> None:
        self.first = self.last = time
        self.source: Optional[str] = None
        self.port: Optional[int] = None
        self.user: Optional[str] = None
        self.invalid: Optional[bool] = None
        self.tries: Counter[str] = Counter()
        self.asked = 0
        self.reasons: set[str] = set()
        self.settled = False

    def is_other_than(self, event: Event) -> bool:
        """Whether the event is of a later connection, whose process got the same number."""
        if event.kind in _FIRST or (self.settled and event.kind in ("asked", "no_account")):
            return True
        if event.port is None or self.port is None:
            return False
        return (event.source, event.port) != (self.source, self.port)

    def learn(self, time: float, event: Event) -> None:
        self.last = time
        if self.source is None or self.port is None:
            self.source = event.source or self.source
            self.port = event.port
        if self.user is None:
            self.user = event.user
        # sshd calls an account that it doesn't let in invalid from then on, but said first why.
        if self.invalid is None and event.user is not None:
            self.invalid = event.invalid
        if event.kind == "failed" and event.method in _EACH:
            self.tries[event.method] += event.times
        elif event.kind == "failed":
            # Every client begins with the method "none", which is no reason.
            self.reasons.add("gssapi" if str(event.method).startswith("gssapi") else str(event.method))
        elif event.kind == "asked":
            self.asked += event.times
        elif event.kind == "no_account":
            self.reasons.add("not_allowed")
        elif event.kind in ("ended", "negotiation", "banner"):
            self.reasons.add("gave_up")
        elif event.kind in _ONCE:
            self.reasons.add(event.kind)

    def failures(self, accepted: bool) -> Counter[str]:
        """The failed attempts by reason: each try that sshd told of, or else the connection itself as one."""
        tries = Counter(self.tries)
        # PAM's complaint and sshd's are about the same try; the first comes always, the second at times.
        asked = max(self.asked, tries["keyboard_interactive"])
        tries["keyboard_interactive"] = asked
        tries = +tries
        if not tries and not accepted:
            tries[next((reason for reason in _ONCE if reason in self.reasons), _UNFINISHED)] = 1
        return tries


class Row:
    """What was counted for one key."""

    __slots__ = ("connections", "first", "last", "reasons")

    def __init__(self, first: float) -> None:
        self.first = self.last = first
        self.connections = 0
        self.reasons: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return sum(self.reasons.values())


class Table:
    """Counts by key, of which the largest are kept, and the rest in one sum."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._rows: dict[tuple[Any, ...], Row] = {}
        self.total: Counter[str] = Counter()
        self.connections = 0
        self.is_incomplete = False

    def add(self, key: tuple[Any, ...], reasons: Counter[str], first: float, last: float) -> None:
        self.total.update(reasons)
        self.connections += 1
        row = self._rows.get(key)
        if row is None:
            # Twice as many as are told, so that one that grows late isn't lost for coming late.
            if len(self._rows) >= 2 * self._most:
                self.is_incomplete = True
                self._rows = dict(self._largest())
            row = self._rows[key] = Row(first)
        row.reasons.update(reasons)
        row.connections += 1
        row.first = min(row.first, first)
        row.last = max(row.last, last)

    def rows(self) -> list[tuple[tuple[Any, ...], Row]]:
        """The largest, by count, then source."""
        return self._largest()

    def others(self) -> int:
        """What is counted in none of the rows."""
        return sum(self.total.values()) - sum(row.count for _key, row in self.rows())

    def _largest(self) -> list[tuple[tuple[Any, ...], Row]]:
        order = sorted(self._rows.items(), key=lambda item: (-item[1].count, *(str(each or "") for each in item[0])))
        return order[: self._most]


class Tally:
    """Counts what sshd wrote of one period.

    A connection belongs to the period in which sshd first wrote of it, whole. So two periods that meet count each
    connection once, if each is given some lines from before its beginning and after its end.
    """

    def __init__(self, since: float, until: float, most_rows: int) -> None:
        self._since = since
        self._until = until
        self._connections: OrderedDict[tuple[str, int], _Connection] = OrderedDict()
        self._logged_in: OrderedDict[tuple[Optional[str], Optional[int]], None] = OrderedDict()
        self.failures = Table(most_rows)
        self.without_login = Table(most_rows)
        self.logins = 0
        self.lines = 0

    def add(self, line: Line) -> None:
        """Take one message; they come in the order in which they were written."""
        self.lines += self._is_within(line.time)
        event = parse(line.message)
        if event is None:
            return
        if event.kind == "dropped":
            # The listening process writes this, and refuses many.
            self._count_without_login(event.source, Counter(dropped=event.times), line.time, line.time)
            return
        process = (line.group, event.pid or line.pid)
        connection = self._connections.get(process)
        if connection is not None and connection.is_other_than(event):
            self._settle(connection)
            connection = None
        if connection is None:
            if event.kind == "ended" and (event.source, event.port) in self._logged_in:
                # Another process of sshd serves who is logged in, and the end of that is no failure.
                return
            connection = self._connections[process] = _Connection(line.time)
        self._connections.move_to_end(process)
        connection.learn(line.time, event)
        if event.kind in _LAST:
            self._settle(connection, event.kind)
        if event.kind == "accepted":
            self._logged_in[(event.source, event.port)] = None
            if len(self._logged_in) > _MOST_CONNECTIONS:
                self._logged_in.popitem(last=False)
        while len(self._connections) > _MOST_CONNECTIONS:
            self._settle(self._connections.popitem(last=False)[1])

    def finish(self) -> None:
        """Count what sshd wrote no end of."""
        while self._connections:
            self._settle(self._connections.popitem(last=False)[1])

    def _settle(self, connection: _Connection, end: Optional[str] = None) -> None:
        if connection.settled:
            return
        connection.settled = True
        first, last = connection.first, connection.last
        if end == "accepted" and self._is_within(first):
            self.logins += 1
        is_nobody = connection.user is None and not connection.tries and not connection.asked
        if is_nobody and not connection.reasons - {"gave_up", "timeout"}:
            reason = _WITHOUT_NAME.get(end or "", _UNFINISHED)
            self._count_without_login(connection.source, Counter({reason: 1}), first, last)
            return
        failures = connection.failures(end == "accepted")
        if failures and self._is_within(first):
            key = (connection.source, connection.user, bool(connection.invalid))
            self.failures.add(key, failures, first, last)

    def _count_without_login(self, source: Optional[str], reasons: Counter[str], first: float, last: float) -> None:
        if self._is_within(first):
            self.without_login.add((source,), reasons, first, last)

    def _is_within(self, time: float) -> bool:
        return self._since <= time < self._until


def seconds_of(option: str, text: str) -> int:
    """A length of time such as ``30m``, ``24h`` or ``7d`` in seconds.

    :raises PortknockError: it is something else.
    """
    match = re.fullmatch(r"([0-9]{1,12})([smhdw]?)", text.strip())
    if not match:
        raise PortknockError(
            f"{option}: expected a whole number of seconds, or one with a unit of s, m, h, d or w, such as 24h; "
            f"got '{_shown(text)}'."
        )
    return int(match[1]) * _UNITS[match[2]]


def login_failures(
    since: str,
    until: str,
    log_files: Optional[Sequence[str]],
    now: float,
    journal: Optional[Journal] = None,
) -> dict[str, Any]:
    """Count the failed logins of a period.

    :param since: how long ago it began, ``until`` how long ago it ended, as in ``24h``.
    :param log_files: read these instead of choosing between the journal and the distributions' own files.
    :returns: as documented in login_failures_info.
    :raises PortknockError: bad times, or nothing to read.
    """
    begin, end = (math.ceil(now) - seconds_of(option, text) for option, text in (("since", since), ("until", until)))
    if begin < 0:
        raise PortknockError(f"since: expected a time after 1970; got '{since}'.")
    if begin >= end:
        raise PortknockError(f"since: expected a time before until ({until} ago); got '{since}'.")
    source, tally = _read(log_files, journal or Journal(), begin, end)
    notes = _notes(source, tally, begin)
    return {
        "failures": [
            {
                "source": address,
                "user": user,
                "invalid_user": invalid,
                "count": row.count,
                "connections": row.connections,
                "first": as_utc(row.first),
                "last": as_utc(row.last),
                "reasons": dict(row.reasons),
            }
            for (address, user, invalid), row in tally.failures.rows()
        ],
        "connections_without_login": [
            {
                "source": address,
                "count": row.count,
                "first": as_utc(row.first),
                "last": as_utc(row.last),
                "reasons": dict(row.reasons),
            }
            for (address,), row in tally.without_login.rows()
        ],
        "other": {"failures": tally.failures.others(), "connections_without_login": tally.without_login.others()},
        "totals": {
            "failures": sum(tally.failures.total.values()),
            "connections": tally.failures.connections,
            "reasons": dict(tally.failures.total),
            "connections_without_login": sum(tally.without_login.total.values()),
            "logins": tally.logins,
        },
        "period": {"since": as_utc(begin), "until": as_utc(end)},
        "read_from": source.names(),
        "notes": notes,
    }


def _read(log_files: Optional[Sequence[str]], journal: Journal, begin: float, end: float) -> tuple[Source, Tally]:
    """Read what reaches back far enough, the journal first, and the files where that has nothing to say."""
    for path in log_files or ():
        if not path.startswith("/"):
            raise PortknockError(f"log_files: expected absolute paths; got '{path}'.")
    files = LogFiles(DEFAULT_FILES if log_files is None else log_files, begin - _MARGIN)
    sources: list[Source] = [files] if files.is_there else []
    if log_files is not None:
        if not sources:
            raise PortknockError(
                f"log_files: expected at least one file that exists; got {', '.join(log_files) or 'none'}."
            )
    elif journal.begins is not None:
        reaches_further = files.begins is not None and journal.begins > max(begin, files.begins)
        sources.insert(len(sources) if reaches_further else 0, journal)
    if not sources:
        raise PortknockError(
            "log_files: expected entries in the systemd journal, or one of the files "
            f"{', '.join(DEFAULT_FILES)}; this host has neither."
        )
    read = []
    for source in sources:
        tally = Tally(begin, end, MOST_ROWS)
        for line in source.lines(begin - _MARGIN, end + _MARGIN):
            tally.add(line)
        tally.finish()
        if tally.lines:
            return source, tally
        read.append((source, tally))
    return read[0]


def _notes(source: Source, tally: Tally, begin: float) -> list[str]:
    notes = list(source.notes)
    if source.begins is None or source.begins > begin:
        known = "is empty" if source.begins is None else f"begins at {as_utc(source.begins)}"
        notes.append(
            f"What was read ({source.title}) {known}, after the period's beginning: earlier failures are missing."
        )
    if not tally.lines:
        notes.append("sshd wrote nothing in this period.")
    for table, name in ((tally.failures, "failures"), (tally.without_login, "connections_without_login")):
        if table.is_incomplete:
            notes.append(
                f"{name}: there were too many to keep apart. Rows may count too little, by what other.{name} has too much."
            )
    return notes


__all__ = ("MOST_ROWS", "Event", "Row", "Table", "Tally", "login_failures", "parse", "seconds_of")
