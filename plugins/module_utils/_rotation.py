# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How a host's secrets change while its gate stands: a rotation's two steps, and a revocation.

A rotation makes the new sequence and has the gate honour both (:func:`begin`); once the host is known to, the former one
goes (:func:`finish`). Whatever is cut short between two steps, the entry holds a sequence that the host honours. Plain
entries in and out, as in ``_keyring.py``; no error text holds a port of a sequence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from time import gmtime, strftime
from typing import AbstractSet, NamedTuple

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import (
    GIVEN,
    TIME_FORMAT,
    HostSecrets,
    HostState,
    Operator,
    check_not_all_expire,
    check_not_all_revoked,
    seconds_since_1970,
)
from ansible_collections.fleet.portknock.plugins.module_utils._planning import NewSequences
from ansible_collections.fleet.portknock.plugins.module_utils._ports import GNUPG, SEQUENCE, SPA, Knock
from ansible_collections.fleet.portknock.plugins.module_utils._sequences import DEFAULT_LENGTH
from ansible_collections.fleet.portknock.plugins.module_utils._stock import draw

# What became of an operator's sequence in a run of the rotation.
MADE = "made"
UNDER_WAY = "under way"
DONE_BEFORE = "done before"
GIVEN_BY_HAND = "given"
REVOKED = "revoked"
RETIRED = "retired"
WAITS = "waits"
UNPROVED = "unproved"

_GRACE_OPTION = "knock_server_grace"
_OPERATOR_OPTION = "portknock_operator"
_GRACE = re.compile(r"([0-9]{1,9})([smhdw]?)", re.ASCII)
_UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class Step(NamedTuple):
    """What a step makes of a host's entry, and what it did by operator; ``until`` is when the last grace ends (UTC)."""

    secrets: HostSecrets
    done: dict[str, str]
    until: str | None = None


def parse_grace(value: object) -> int:
    """Return a grace period in seconds.

    :param value: seconds, or a number with one of the units s, m, h, d and w, such as 7d.
    :raises PortknockError: anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return int(value)
    match = _GRACE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise PortknockError(
            f"{_GRACE_OPTION}: expected a time such as 0, 90m, 12h or 7d; got {value!r}. Units are s, m, h, d and w."
        )
    return int(match[1]) * _UNIT_SECONDS[match[2]]


def scope_of(operators: Sequence[str], operator: str | None, entry: HostSecrets) -> tuple[str, ...]:
    """Return whose sequences a rotation of this host is about.

    :param operators: all who may knock there.
    :param operator: only this one.
    :raises PortknockError: the keyring holds no sequence of one of them.
    """
    names = tuple(name for name in operators if operator in (None, name))
    missing = [name for name in names if name not in entry.operators]
    if missing:
        raise PortknockError(
            f"{_OPERATOR_OPTION}: expected operators that have a sequence on {entry.host}, which site.yml gives them; got "
            f"{', '.join(missing)}."
        )
    return names


def begin(
    entry: HostSecrets,
    scope: Sequence[str],
    *,
    rotation: str,
    now: str,
    state: HostState | None = None,
    length: int = DEFAULT_LENGTH,
    protocols: Sequence[str] = ("tcp",),
    protected: AbstractSet[int] = frozenset(),
    nmap_ports: AbstractSet[int] = frozenset(),
    in_use: AbstractSet[int] = frozenset(),
    spa: Knock | None = None,
    gnupg: bool = False,
    random: Random | None = None,
) -> Step:
    """Give each operator a new sequence beside the one that they have, for the gate to honour both; likewise to close.

    One who is between two sequences already is not given a third, and neither is one whom this rotation has given theirs.

    :param rotation: its id: a run that goes on where another was stopped has that one's.
    :param state: what the host's gate says of itself.
    :param spa: the port for which the one packet asks that opens the gate; None where a sequence does.
    :param gnupg: its keys are GnuPG's.
    :raises PortknockError: the keyring's secrets are not what the gate is opened with.
    """
    entry.check_mode(SEQUENCE if spa is None else GNUPG if gnupg else SPA)
    generation = max(entry.generation, 0 if state is None else state.generation) + 1
    new = NewSequences(
        generation,
        now,
        length,
        protocols,
        {*nmap_ports, *in_use, *protected},
        list(entry.operators.values()),
        random,
    )
    operators = dict(entry.operators)
    done: dict[str, str] = {}
    last_id = max(entry.last_id, 0 if state is None else state.last_id)
    for name in scope:
        operator = operators[name]
        done[name] = _reason_to_leave(operator, entry.rotation == rotation) or MADE
        if done[name] != MADE:
            continue
        if operator.close:
            operator = replace(operator, close=(new.make(), operator.close[0]))
        if operator.one_time is None or not operator.one_time.wanted:
            operators[name] = replace(operator, next=new.make().with_spa(spa, gnupg), both=True, both_since=None)
            continue
        operators[name] = operator
        begun = {knocks[0] for kept in operators.values() for knocks in kept.every_sequence}
        added = draw(
            operator.one_time.size, last_id, length, protocols, {*nmap_ports, *in_use, *protected}, begun, random
        )
        last_id += len(added)
        operators[name] = replace(operator, one_time=operator.one_time.beside(added), both_since=None)
    if MADE not in done.values():
        return Step(entry, done)
    avoid = frozenset(in_use) or entry.avoid
    after = replace(entry, generation=generation, operators=operators, avoid=avoid, rotation=rotation, last_id=last_id)
    return Step(after, done)


def _reason_to_leave(operator: Operator, was_done: bool) -> str | None:
    if operator.revoked is not None or not operator.active:
        return REVOKED
    if operator.is_between:
        return UNDER_WAY
    if operator.current.source == GIVEN and not operator.opens_once:
        return GIVEN_BY_HAND
    return DONE_BEFORE if was_done else None


def finish(entry: HostSecrets, scope: Sequence[str], *, grace: int, now: str) -> Step:
    """Forget each operator's former sequence, where the host was seen to honour the new one for long enough.

    :param grace: the least seconds for which both have to have been honoured.
    """
    operators = dict(entry.operators)
    done: dict[str, str] = {}
    ends: list[int] = []
    for name in scope:
        operator = operators[name]
        if not operator.is_rotating:
            continue
        if operator.both_since is None:
            done[name] = UNPROVED
            continue
        end = seconds_since_1970(operator.both_since) + grace
        if end > seconds_since_1970(now):
            done[name] = WAITS
            ends.append(end)
            continue
        done[name] = RETIRED
        operators[name] = operator.retired()
    until = strftime(TIME_FORMAT, gmtime(max(ends))) if ends else None
    if RETIRED not in done.values():
        return Step(entry, done, until)
    return Step(replace(entry, generation=entry.generation + 1, operators=operators), done, until)


def revoke(
    entry: HostSecrets, operator: str, operators: Sequence[str], now: str, may_all_expire: bool = False
) -> HostSecrets:
    """Return the entry without an operator, for good.

    :param operators: all who may knock at the host, whether or not the operator is among them still.
    :param may_all_expire: somebody gets in without a knock.
    :raises PortknockError: nobody would be left, or would be in the end.
    """
    kept = entry.operators.get(operator)
    if kept is None or kept.revoked is not None:
        return entry
    gone = replace(kept, active=False, revoked=now)
    after = replace(entry, generation=entry.generation + 1, operators={**entry.operators, operator: gone})
    if not entry.removed:
        check_not_all_revoked(operators, after)
        if not may_all_expire:
            check_not_all_expire([name for name in operators if name in after.operators], after)
    return after


__all__ = (
    "DONE_BEFORE",
    "GIVEN_BY_HAND",
    "MADE",
    "RETIRED",
    "REVOKED",
    "UNDER_WAY",
    "UNPROVED",
    "WAITS",
    "Step",
    "begin",
    "finish",
    "parse_grace",
    "revoke",
    "scope_of",
)
