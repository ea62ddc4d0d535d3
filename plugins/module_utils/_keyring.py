# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the keyring keeps of a host, and what follows from it.

Plain mappings in and out; reading, encrypting and locking files is ``plugin_utils/_keyring.py``. No error text of
this module holds a port of a sequence or a seed.
"""

from __future__ import annotations

import calendar
import hashlib
import hmac
import json
import re
from dataclasses import dataclass, replace
from time import gmtime, strftime, strptime
from types import MappingProxyType
from typing import Iterator, Mapping, NamedTuple, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._gate import EARLIEST_TIME, Honoured
from ansible_collections.fleet.portknock.plugins.module_utils._ports import (
    GNUPG,
    HIGHEST_PORT,
    KNOCK_PROTOCOLS,
    MODES,
    SEQUENCE,
    SPA,
    Knock,
    parse_knock,
    parse_knocks,
    parse_sequences,
)
from ansible_collections.fleet.portknock.plugins.module_utils._sequences import (
    LONGEST,
    SEED_BYTES,
    SHORTEST,
)
from ansible_collections.fleet.portknock.plugins.module_utils._spa import (
    GnupgPackets,
    new_gnupg,
    new_spa,
    uses_gnupg,
)
from ansible_collections.fleet.portknock.plugins.module_utils._stock import (
    HIGHEST_ID,
    HONOURED,
    STATES,
    Stock,
)

FORMAT = 1
GENERATED = "generated"
GIVEN = "given"
SOURCES = (GENERATED, GIVEN)
# How the keyring writes a time: UTC.
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"

OPERATORS_OPTION = "knock_server_operators"
SEQUENCES_OPTION = "knock_server_sequences"
# The newest, and during a rotation the former one.
_MOST_GIVEN = 2
_ADOPT_OPTION = "knock_server_adopt"
READMIT_OPTION = "knock_server_readmit"
VALID_UNTIL_OPTION = "knock_server_valid_until"
# How far a host's clock may be behind the controller's before it counts as wrong.
_CLOCK_SECONDS = 86400
_REMEDY = f"Use the keyring that the gate came from, or set {_ADOPT_OPTION} to give the host new secrets."
_STAMP_LABEL = b"fleet.portknock one-time sequences version 1\0"
_OPERATOR = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)
# A keyring inside a folder that is an inventory source is read by Ansible as inventory; under one of these names an
# operator's sequences would become variables of hosts.
_INVENTORY_WORDS = ("children", "hosts", "vars")
# Such a name is never an option of a package manager.
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,127}", re.ASCII)
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", re.ASCII)


@dataclass(frozen=True)
class StoredSequence:
    """One sequence, as it is kept.

    ``generation`` is the host's when the sequence was made, ``created`` a UTC time such as 2026-01-31T08:15:00Z. ``spa`` is the
    one packet that opens in its place where the gate wants such, ``gnupg`` one with keys of GnuPG's, where it wants that.
    """

    generation: int
    knocks: tuple[Knock, ...]
    source: str
    created: str
    spa: Knock | None = None
    gnupg: GnupgPackets | None = None

    def opening(self, mode: str) -> tuple[Knock, ...]:
        """What opens a gate of this mode, as an operator has it; empty where nothing does."""
        if mode == GNUPG:
            return () if self.gnupg is None else (self.gnupg.operator,)
        if mode == SPA:
            return () if self.spa is None else (self.spa,)
        return self.knocks

    def at_host(self, mode: str) -> tuple[Knock, ...]:
        """The same as the host has it."""
        return (self.gnupg.host,) if mode == GNUPG and self.gnupg is not None else self.opening(mode)

    def with_spa(self, asked: Knock | None, gnupg: bool = False) -> StoredSequence:
        """Return this with a packet that asks for that port, where it has none yet; None asks for none."""
        if asked is None or (self.gnupg if gnupg else self.spa) is not None:
            return self
        # The keys are the keyring's own, whoever gave the sequence: a rotation changes them.
        if gnupg:
            return replace(self, gnupg=new_gnupg(asked), source=GENERATED)
        return replace(self, spa=new_spa(asked), source=GENERATED)

    def to_mapping(self) -> dict[str, object]:
        return {
            "generation": self.generation,
            "knocks": [str(knock) for knock in self.knocks],
            **({} if self.spa is None else {"spa": str(self.spa)}),
            **({} if self.gnupg is None else {"gnupg": {side: str(it) for side, it in self.gnupg._asdict().items()}}),
            "source": self.source,
            "created": self.created,
        }


@dataclass(frozen=True)
class Operator:
    """One operator's sequences on a host.

    ``next`` is what is being deployed; it becomes ``current`` once it is proved. Until then both are kept, since
    the host may honour either. With ``both`` the gate is to honour the two of them, as it does during a rotation, and has
    been seen to since ``both_since``; None where it has not yet.

    ``valid_until`` is when the host itself shuts the operator out, ``revoked`` when that was done for good. All times are UTC,
    such as 2026-01-31T08:15:00Z. ``one_time`` are the sequences that open once each, where the gate honours such instead.
    ``close`` are those that shut the operator's own window, the newest first: two within a rotation, all of them honoured.
    """

    active: bool
    current: StoredSequence
    next: StoredSequence | None = None
    both: bool = False
    both_since: str | None = None
    valid_until: str | None = None
    revoked: str | None = None
    one_time: Stock | None = None
    close: tuple[StoredSequence, ...] = ()

    @property
    def opens_once(self) -> bool:
        """Whether the gate is to honour the one-time sequences, and no reusable one."""
        return self.one_time is not None and self.one_time.wanted

    @property
    def once(self) -> Mapping[int, tuple[Knock, ...]]:
        """The one-time sequences that the gate is to honour, by id."""
        return {} if self.one_time is None else self.one_time.honoured

    @property
    def wanted(self) -> StoredSequence:
        """The newest sequence that the gate is to honour."""
        return self.current if self.next is None else self.next

    def with_spa(self, asked: Knock | None, gnupg: bool = False) -> Operator:
        """Return this with a packet beside each sequence, as :meth:`StoredSequence.with_spa`."""
        following = None if self.next is None else self.next.with_spa(asked, gnupg)
        return replace(self, current=self.current.with_spa(asked, gnupg), next=following)

    @property
    def every_sequence(self) -> Iterator[tuple[Knock, ...]]:
        """All that is kept, honoured or not."""
        yield self.current.knocks
        if self.next is not None:
            yield self.next.knocks
        if self.one_time is not None:
            yield from self.one_time.sequences.values()
        yield from (stored.knocks for stored in self.close)

    @property
    def is_between(self) -> bool:
        """Whether there are two sequences, or two sets of those that open once, of which one is to go."""
        if self.one_time is not None and self.opens_once:
            return bool(self.one_time.retire)
        return self.next is not None

    @property
    def is_rotating(self) -> bool:
        """Whether it is a rotation that has made the one beside the other."""
        if self.one_time is not None and self.opens_once:
            return bool(self.one_time.retire) and not self.one_time.retiring
        return self.both and self.current.source != GIVEN

    @property
    def honoured(self) -> tuple[StoredSequence, ...]:
        """Every reusable sequence that the gate is to honour, newest first."""
        if self.opens_once:
            return ()
        return (self.next, self.current) if self.next is not None and self.both else (self.wanted,)

    def has_expired(self, now: str) -> bool:
        """Whether the host has shut the operator out by itself."""
        return self.valid_until is not None and self.valid_until <= now

    def promoted(self, now: str) -> Operator:
        """Return this after the gate was proved and confirmed with what is honoured."""
        if self.one_time is not None:
            noted = replace(self, one_time=self.one_time.promoted())
            if self.one_time.wanted:
                # What is reusable was not proved: it waits for the day when the gate honours it again.
                rotates = self.one_time.retire and not self.one_time.retiring
                return replace(noted, both_since=self.both_since or now) if rotates else noted
            return noted.promoted(now)
        if not self.both:
            return replace(self, current=self.wanted, next=None)
        return self if self.both_since else replace(self, both_since=now)

    def retired(self) -> Operator:
        """Return this with the newest sequence alone. Only once the host is known to honour it."""
        close = self.close[:1]
        if self.one_time is not None and self.one_time.retire:
            return replace(self, one_time=self.one_time.retired(), both_since=None, close=close)
        return replace(self, current=self.wanted, next=None, both=False, both_since=None, close=close)

    def to_mapping(self) -> dict[str, object]:
        return {
            "active": self.active,
            "current": self.current.to_mapping(),
            **({} if self.next is None else {"next": self.next.to_mapping()}),
            **({} if self.one_time is None else {"one_time": _stock_mapping(self.one_time)}),
            **({"close": [stored.to_mapping() for stored in self.close]} if self.close else {}),
            **self._marks(),
        }

    def describe(self) -> dict[str, object]:
        """Return what may be shown of this."""
        return {
            "active": self.active,
            "current": _describe(self.current),
            **({} if self.next is None else {"next": _describe(self.next)}),
            **({} if self.one_time is None else {"one_time": _describe_stock(self.one_time)}),
            **({"close": [_describe(stored) for stored in self.close]} if self.close else {}),
            **self._marks(),
        }

    def _marks(self) -> dict[str, object]:
        times = {"both_since": self.both_since, "valid_until": self.valid_until, "revoked": self.revoked}
        return {**({"both": True} if self.both else {}), **{name: time for name, time in times.items() if time}}


@dataclass(frozen=True)
class HostSecrets:
    """Everything that the keyring keeps of one host.

    ``generation`` goes up with every change of what is to be deployed. ``avoid`` holds the ports that were in use on
    the host at that time. ``removed`` marks a host whose gate was taken away. ``packages`` are those that were installed
    there for the gate, so that they can be removed with it. ``rotation`` is the id of the last one that made sequences here.
    ``single_use`` tells clients that a window of the host's gate may be good for one connection only. ``last_id`` is the highest
    id that a one-time sequence was ever given. ``modes`` says what the gate wants to be opened with, and after that what it may
    want still, as long as it isn't known to have changed.
    """

    keyring_id: str
    host: str
    generation: int
    tripwire_seed: bytes
    avoid: frozenset[int]
    operators: Mapping[str, Operator]
    removed: bool = False
    packages: tuple[str, ...] = ()
    rotation: str | None = None
    single_use: bool = False
    last_id: int = 0
    modes: tuple[str, ...] = (SEQUENCE,)

    @classmethod
    def from_mapping(cls, data: object, path: str) -> HostSecrets:
        """Read what :meth:`to_mapping` made.

        :param path: the file, for the error.
        :raises PortknockError: anything else; the text says where, never what came.
        """
        return _read_host(_Node(data, "the file", path))

    def to_mapping(self) -> dict[str, object]:
        """Return strings, numbers, lists and mappings only, ready for YAML."""
        return {
            "format": FORMAT,
            "keyring": self.keyring_id,
            "host": self.host,
            "generation": self.generation,
            "removed": self.removed,
            **({"packages": list(self.packages)} if self.packages else {}),
            **({"rotation": self.rotation} if self.rotation else {}),
            **({"single_use": True} if self.single_use else {}),
            **({"one_time_last": self.last_id} if self.last_id else {}),
            **({"modes": list(self.modes)} if self.modes != (SEQUENCE,) else {}),
            "tripwires": {"seed": self.tripwire_seed.hex(), "avoid": sorted(self.avoid)},
            "operators": {name: operator.to_mapping() for name, operator in self.operators.items()},
        }

    def describe(self) -> dict[str, object]:
        """Return what may be shown of this: for diffs and reports, without a port, protocol or seed."""
        return {
            "host": self.host,
            "generation": self.generation,
            "removed": self.removed,
            **({"packages": list(self.packages)} if self.packages else {}),
            **({"single_use": True} if self.single_use else {}),
            **({"modes": list(self.modes)} if self.modes != (SEQUENCE,) else {}),
            "operators": {name: operator.describe() for name, operator in self.operators.items()},
        }

    def candidates(self, operator: str | None = None) -> list[tuple[str, tuple[Knock, ...]]]:
        """Return the reusable sequences that a client tries, likeliest first, each with its operator's name.

        None of an operator whose one-time sequences are known to be what the gate honours.

        :param operator: only this one's.
        :raises PortknockError: there is no such operator.
        """
        chosen = [
            (name, entry)
            for name, entry in self._chosen(operator)
            if entry.one_time is None or entry.one_time.state != HONOURED
        ]
        active = [(name, entry) for name, entry in chosen if entry.active]
        stored = [
            *((name, entry.current) for name, entry in active),
            *((name, entry.next) for name, entry in active if entry.next is not None),
            *((name, entry.current) for name, entry in chosen if not entry.active),
            *((name, entry.next) for name, entry in chosen if not entry.active and entry.next is not None),
        ]
        found = [(name, sequence.opening(mode)) for mode in self.modes for name, sequence in stored]
        return [(name, knocks) for name, knocks in found if knocks]

    @property
    def mode(self) -> str:
        """What the gate is to be opened with."""
        return self.modes[0]

    def for_mode(self, mode: str) -> HostSecrets:
        """Return this for a gate that is to be opened so; what it may still want comes after that."""
        return replace(self, modes=(mode, *(former for former in self.modes if former != mode)))

    def check_mode(self, mode: str) -> None:
        """Refuse secrets that are not what a gate is opened with.

        :raises PortknockError: they aren't.
        """
        if mode != self.mode:
            raise PortknockError(
                f"knock_server_backend: expected one that is opened by what the keyring holds for {self.host} ({self.mode}); got "
                f"one that is opened by {mode}. Run site.yml, which makes that."
            )

    def one_time(self, operator: str | None = None) -> list[tuple[str, Mapping[int, tuple[Knock, ...]]]]:
        """Return the one-time sequences that a client may use, by id: groups with their operators' names, likeliest first.

        :param operator: only this one's.
        :raises PortknockError: there is no such operator.
        """
        chosen = [(name, entry) for name, entry in self._chosen(operator) if entry.one_time is not None]
        chosen.sort(key=lambda item: not item[1].active)
        return [
            (name, group) for name, entry in chosen if entry.one_time is not None for group in entry.one_time.groups
        ]

    def close_sequences(self, operator: str | None = None) -> list[tuple[Knock, ...]]:
        """Return the sequences that shut a window, the newest of each operator first; empty where there are none.

        :param operator: only this one's.
        :raises PortknockError: there is no such operator.
        """
        return [stored.knocks for _name, entry in self._chosen(operator) if entry.active for stored in entry.close]

    def _chosen(self, operator: str | None) -> list[tuple[str, Operator]]:
        if operator is not None and operator not in self.operators:
            raise PortknockError(
                f"knock_operator: expected an operator that the keyring knows on {self.host} "
                f"({', '.join(self.operators)}); got {operator!r}."
            )
        now = utc_now()
        chosen = [(name, entry) for name, entry in self.operators.items() if operator in (None, name)]
        # Whose time is over comes last; the host's clock is what counts.
        chosen.sort(key=lambda item: item[1].has_expired(now))
        return chosen

    def honoured(self, operators: Sequence[str]) -> dict[str, Honoured]:
        """Return what the gate is to honour, by operator; whoever was revoked is left out.

        :raises PortknockError: the keyring holds no sequence of one of them, or all of them were revoked.
        """
        missing = [name for name in operators if name not in self.operators]
        if missing:
            raise PortknockError(
                f"{OPERATORS_OPTION}: expected operators that the keyring knows on {self.host}; "
                f"got {', '.join(missing)}."
            )
        check_not_all_revoked(operators, self)
        numbers = {name: number for number, name in enumerate(self.operators, start=1)}
        return {
            name: Honoured(
                number=numbers[name],
                sequences=[stored.at_host(self.mode) for stored in self.operators[name].honoured],
                valid_until=_optional_seconds(self.operators[name].valid_until),
                valid_from=_valid_from(self.operators[name]),
                one_time=self.operators[name].once,
                close=tuple(stored.knocks for stored in self.operators[name].close),
            )
            for name in operators
            if not self.operators[name].revoked
        }

    def prover(self, operators: Sequence[str]) -> str:
        """Return the operator whose sequence a proof of the gate uses: one with a new sequence there, where there is any.

        :raises PortknockError: as :meth:`honoured`, or each one's time is over.
        """
        now = utc_now()
        names = [name for name in self.honoured(operators) if not self.operators[name].has_expired(now)]
        if not names:
            raise PortknockError(
                f"{VALID_UNTIL_OPTION}: expected an operator of {self.host} whose time is not over, since the proof knocks with "
                "their sequence; got none."
            )
        # One that expires may do so meanwhile.
        names.sort(key=lambda name: (not self._is_new(name), self.operators[name].valid_until is not None))
        return names[0]

    def to_prove(self, operators: Sequence[str]) -> tuple[Knock, ...]:
        """Return the sequence that a proof of the gate uses, where it is a reusable one: see :meth:`prover`."""
        return self.operators[self.prover(operators)].wanted.opening(self.mode)

    def _is_new(self, name: str) -> bool:
        operator = self.operators[name]
        if operator.one_time is not None:
            return operator.one_time.state != HONOURED
        return operator.next is not None and operator.both_since is None

    def promoted(self, now: str, single_use: bool | None = None) -> HostSecrets:
        """Return this after the gate was proved and confirmed: every next sequence is the current one, or honoured beside it.

        :param now: the time, such as 2026-01-31T08:15:00Z.
        :param single_use: whether it is a single-use gate; None where that isn't said.
        """
        return replace(
            self,
            operators={name: operator.promoted(now) for name, operator in self.operators.items()},
            single_use=self.single_use if single_use is None else single_use,
            modes=self.modes[:1],
        )

    @property
    def fingerprint(self) -> str:
        """What tells these secrets from others of the same generation, and gives nothing of them away.

        HMAC-SHA-256 of what the gate is to honour, with the tripwires' seed as the key: the first 64 bits in hex. A promotion
        does not change it.
        """
        honoured = {
            name: _fingerprinted(operator, self.mode)
            for name, operator in sorted(self.operators.items())
            if operator.active and not operator.revoked
        }
        text = json.dumps([self.generation, honoured])
        return hmac.new(self.tripwire_seed, text.encode(), hashlib.sha256).hexdigest()[:16]

    @property
    def stamp(self) -> str:
        """What tells the ids of these one-time sequences from those of an entry of another time, and gives nothing away."""
        return hmac.new(self.tripwire_seed, _STAMP_LABEL, hashlib.sha256).hexdigest()[:16]

    def marked_removed(self, packages_gone: Sequence[str] = ()) -> HostSecrets:
        """Return this for a host whose gate was taken away: the sequences are kept.

        :param packages_gone: packages that have been removed again, too.
        """
        left = tuple(name for name in self.packages if name not in packages_gone)
        return replace(self, removed=True, packages=left, single_use=False)


class HostState(NamedTuple):
    """What a host's gate says of itself: the keyring that it came from, its generation, and its secrets' fingerprint.

    ``one_time`` holds, by operator, the id of the first one-time sequence that has not been used; ``last_id`` is the highest
    id that the host knows of.
    """

    keyring_id: str
    generation: int
    fingerprint: str | None = None
    one_time: Mapping[str, int] = MappingProxyType({})
    last_id: int = 0

    def contradicts(self, entry: HostSecrets) -> bool:
        """Whether the entry has other secrets under the same name: a copy that went a way of its own."""
        return (
            self.fingerprint is not None
            and (self.keyring_id, self.generation) == (entry.keyring_id, entry.generation)
            and self.fingerprint != entry.fingerprint
        )


def seconds_since_1970(time: str) -> int:
    """Return a time that the keyring holds as a number."""
    return calendar.timegm(strptime(time, TIME_FORMAT))


def _optional_seconds(time: str | None) -> int | None:
    return None if time is None else seconds_since_1970(time)


def utc_now() -> str:
    """Return the time as the keyring writes it."""
    return strftime(TIME_FORMAT, gmtime())


def check_operators(values: object) -> tuple[str, ...]:
    """Return the operators' names.

    :raises PortknockError: not a list of names, none at all, or one twice.
    """
    if not isinstance(values, (list, tuple)) or not values:
        raise PortknockError(f"{OPERATORS_OPTION}: expected a list of at least one name; got {values!r}.")
    for index, name in enumerate(values):
        if not isinstance(name, str) or not _OPERATOR.fullmatch(name):
            raise PortknockError(
                f"{OPERATORS_OPTION}: expected names of 1 to 64 letters, digits, dots, hyphens and underscores that "
                f"begin with a letter, a digit or an underscore; got {name!r}."
            )
        if name in _INVENTORY_WORDS:
            raise PortknockError(
                f"{OPERATORS_OPTION}: expected names other than {', '.join(_INVENTORY_WORDS)}, which Ansible's "
                f"inventory reserves; got {name!r}."
            )
        if name in values[:index]:
            raise PortknockError(f"{OPERATORS_OPTION}: expected each name once; got {name!r} twice.")
    return tuple(str(name) for name in values)


def check_not_all_revoked(operators: Sequence[str], entry: HostSecrets) -> None:
    """Refuse a host that nobody could open any more.

    :raises PortknockError: each of the operators was revoked.
    """
    revoked = [name for name in operators if name in entry.operators and entry.operators[name].revoked]
    if len(revoked) == len(operators):
        raise PortknockError(
            f"{OPERATORS_OPTION}: expected an operator on {entry.host} who was not revoked, since nobody could get in "
            f"otherwise; got {', '.join(revoked)} only. Name another, or let one in again by {READMIT_OPTION}."
        )


def check_packages(values: object) -> tuple[str, ...]:
    """Return the names of packages.

    :raises PortknockError: not a list of names.
    """
    if not isinstance(values, (list, tuple)):
        raise PortknockError(f"packages: expected a list of names; got {values!r}.")
    for name in values:
        if not isinstance(name, str) or not _PACKAGE.fullmatch(name):
            raise PortknockError(f"packages: expected names of packages; got {name!r}.")
    return tuple(str(name) for name in values)


def parse_valid_until(value: object, operators: Sequence[str]) -> dict[str, str]:
    """Read until when operators may knock: name to a UTC time such as 2026-12-31T23:59:59Z.

    :raises PortknockError: not such a mapping, or an operator that isn't in ``operators``.
    """
    times = _by_operator(value, operators, VALID_UNTIL_OPTION, "a UTC time", shown=repr(value))
    return {name: _time(time, f"{VALID_UNTIL_OPTION}, operator {name}") for name, time in times.items()}


def check_not_all_expire(operators: Sequence[str], secrets: HostSecrets) -> None:
    """Refuse to let every operator of a host expire: nobody could get in then.

    :raises PortknockError: each has a time.
    """
    honoured = [name for name in operators if not secrets.operators[name].revoked]
    if all(secrets.operators[name].valid_until for name in honoured):
        raise PortknockError(
            f"{VALID_UNTIL_OPTION}: expected an operator of {secrets.host} without an expiry, or knock_server_trusted_sources, "
            f"so that somebody can always get in; got a time for each of {', '.join(honoured)}."
        )


def _time(value: object, option: str) -> str:
    # YAML makes a time of one that isn't quoted, and what it makes of it has lost how it was written.
    if isinstance(value, str) and _TIME.fullmatch(value):
        try:
            seconds = seconds_since_1970(value)
        except ValueError:
            seconds = 0
        # Before that a host's clock counts as wrong.
        if seconds > EARLIEST_TIME:
            return str(value)
    earliest = strftime(TIME_FORMAT, gmtime(EARLIEST_TIME))
    raise PortknockError(
        f"{option}: expected a UTC time after {earliest} such as '2026-12-31T23:59:59Z', in quotes; got {str(value)!r}."
    )


def parse_given(value: object, operators: Sequence[str]) -> dict[str, list[tuple[Knock, ...]]]:
    """Read the sequences that a person gave: operator name to list of ``port/proto``, or to two such lists, the newest first.

    Two that are the same are one.

    :raises PortknockError: not such a mapping, an operator that isn't in ``operators``, or more than two sequences.
    """
    given = {}
    named = _by_operator(value, operators, SEQUENCES_OPTION, "a list of port/protocol", shown="another type")
    for name, sequences in named.items():
        option = f"{SEQUENCES_OPTION}, operator {name}"
        given[name] = parse_sequences(sequences, option, KNOCK_PROTOCOLS)
        if len(given[name]) > _MOST_GIVEN:
            raise PortknockError(
                f"{option}: expected one sequence, or the newest and the former one; got {len(given[name])}."
            )
    return given


def _by_operator(value: object, operators: Sequence[str], option: str, expected: str, shown: str) -> dict[str, object]:
    """What an option says of each operator that it names; ``shown`` is what an error may show of it."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise PortknockError(f"{option}: expected a mapping from an operator's name to {expected}; got {shown}.")
    unknown = [str(name) for name in value if name not in operators]
    if unknown:
        raise PortknockError(
            f"{option}: expected operators that {OPERATORS_OPTION} names ({', '.join(operators)}); "
            f"got {', '.join(unknown)}."
        )
    return {str(name): item for name, item in value.items()}


def read_host_state(value: object) -> HostState | None:
    """Read what ``knock_gate_info`` says of the host's gate: None where there is no gate.

    :raises PortknockError: neither empty nor a mapping that names the gate's keyring and its generation.
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        keyring_id, generation = value.get("keyring"), _whole_number(value.get("generation"), 1)
        if keyring_id is None:
            return None
        if isinstance(keyring_id, str) and keyring_id and generation is not None:
            fingerprint = value.get("fingerprint")
            unused = value.get("one_time")
            firsts = {
                str(name): _whole_number(supply.get("first"), 1)
                for name, supply in (unused.items() if isinstance(unused, Mapping) else ())
                if isinstance(supply, Mapping)
            }
            return HostState(
                keyring_id,
                generation,
                fingerprint if isinstance(fingerprint, str) else None,
                {name: first for name, first in firsts.items() if first is not None},
                _whole_number(value.get("one_time_last"), 0) or 0,
            )
    raise PortknockError(
        "host_state: expected what knock_gate_info reports as gate, a mapping with keyring and generation; "
        "got something else."
    )


def check_host_state(
    state: HostState | None, existing: HostSecrets | None, keyring_id: str | None, host: str, adopt: bool
) -> None:
    """Refuse a keyring that cannot be the one that this host's gate came from.

    A stale checkout or an empty folder would otherwise replace secrets that work with others.

    :param keyring_id: the id of the keyring folder; None if it has none yet.
    :param adopt: let it pass.
    :raises PortknockError: the gate names another keyring, or a generation that the keyring has not reached.
    """
    if state is None or adopt:
        return
    if state.keyring_id != keyring_id:
        raise PortknockError(
            f"knock_keyring_dir: expected the keyring {state.keyring_id}, from which the gate of {host} came; "
            f"got {'a new one' if keyring_id is None else keyring_id}. {_REMEDY}"
        )
    if existing is None:
        raise PortknockError(
            f"knock_keyring_dir: expected an entry for {host}, whose gate has generation {state.generation}; "
            f"got none. {_REMEDY}"
        )
    if existing.generation < state.generation:
        raise PortknockError(
            f"knock_keyring_dir: expected generation {state.generation} or later of {host}, which is what its gate "
            f"has; got {existing.generation}, an older copy. {_REMEDY}"
        )
    check_same_secrets(state, existing)


def check_same_secrets(state: HostState | None, entry: HostSecrets) -> None:
    """Refuse an entry whose secrets are others than those that the gate has under the same generation.

    :raises PortknockError: they are.
    """
    if state is not None and state.contradicts(entry):
        raise PortknockError(
            f"knock_keyring_dir: expected the secrets of generation {state.generation} that the gate of {entry.host} was "
            "made from; got others under the same number: they were changed by hand, or are a copy's that went a way of its "
            f"own. {_REMEDY}"
        )


def _stock_mapping(stock: Stock) -> dict[str, object]:
    return {
        "size": stock.size,
        "state": stock.state,
        **({"retire": stock.retire} if stock.retire else {}),
        **({"retiring": True} if stock.retiring else {}),
        # A line each: there may be hundreds.
        "sequences": {identity: " ".join(map(str, knocks)) for identity, knocks in stock.sequences.items()},
    }


def _describe_stock(stock: Stock) -> dict[str, object]:
    return {"size": stock.size, "state": stock.state, "sequences": len(stock.sequences)}


def _fingerprinted(operator: Operator, mode: str) -> object:
    close = [[str(knock) for knock in stored.knocks] for stored in operator.close]
    return {"open": _opening(operator, mode), "close": close} if close else _opening(operator, mode)


def _opening(operator: Operator, mode: str) -> object:
    if operator.opens_once:
        return [{identity: list(map(str, knocks)) for identity, knocks in operator.once.items()}, operator.valid_until]
    sequences = [[str(knock) for knock in stored.opening(mode)] for stored in operator.honoured]
    if len(sequences) == 1 and operator.valid_until is None:
        return sequences[0]
    return [sequences, operator.valid_until]


def _valid_from(operator: Operator) -> int:
    """Before when the clock of a host with an operator who expires is wrong beyond doubt: the sequence had not been made."""
    if operator.valid_until is None:
        return EARLIEST_TIME
    # A sequence that is given may be written down anew by every run, and the rules must not change with it.
    made = [seconds_since_1970(stored.created) for stored in operator.honoured if stored.source == GENERATED]
    return max([EARLIEST_TIME, *(time - _CLOCK_SECONDS for time in made)])


def _is_operator(name: object) -> bool:
    return isinstance(name, str) and _OPERATOR.fullmatch(name) is not None and name not in _INVENTORY_WORDS


def _describe(stored: StoredSequence) -> dict[str, object]:
    return {
        "generation": stored.generation,
        "knocks": len(stored.knocks),
        "source": stored.source,
        "created": stored.created,
        **({} if stored.spa is None else {"spa": True}),
        **({} if stored.gnupg is None else {"gnupg": True}),
    }


def _whole_number(value: object, least: int) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return value
    return None


class _Node:
    """One value of a keyring file, with its place for the error."""

    def __init__(self, value: object, place: str, path: str) -> None:
        self.value = value
        self._place = place
        self._path = path

    def damaged(self, expected: str) -> PortknockError:
        return PortknockError(
            f"{self._path}: expected {expected} as {self._place}; got something else. The file is damaged or is not "
            f"a keyring's; restore it from a backup."
        )

    def mapping(self, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, _Node]:
        """The values of a mapping with exactly these keys."""
        keys = f"a mapping of {', '.join(required)}"
        value = self.value
        if not isinstance(value, Mapping) or not set(required) <= set(value) <= {*required, *optional}:
            raise self.damaged(keys)
        return {key: _Node(item, key, self._path) for key, item in value.items()}

    def item(self, value: object) -> _Node:
        """A part of this value, for whose errors this place will do."""
        return _Node(value, self._place, self._path)

    def items(self) -> list[_Node]:
        """The values of a list, for whose errors its place will do."""
        if not isinstance(self.value, list):
            raise self.damaged("a list")
        return [self.item(value) for value in self.value]

    def named(self) -> dict[str, _Node]:
        """The values of a mapping whose keys are operators' names."""
        value = self.value
        if not isinstance(value, Mapping) or not all(_is_operator(key) for key in value):
            raise self.damaged("a mapping from operators' names")
        return {key: _Node(item, f"operator {key}", self._path) for key, item in value.items()}

    def text(self, pattern: str, expected: str) -> str:
        if not isinstance(self.value, str) or not re.fullmatch(pattern, self.value, re.ASCII):
            raise self.damaged(expected)
        return self.value

    def time(self) -> str:
        return self.text(_TIME.pattern, "a UTC time such as 2026-01-31T08:15:00Z")

    def count(self, least: int) -> int:
        number = _whole_number(self.value, least)
        if number is None:
            raise self.damaged(f"a whole number from {least} up")
        return number

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.damaged("true or false")
        return self.value

    def ports(self) -> frozenset[int]:
        if not isinstance(self.value, list) or not all(
            _whole_number(port, 0) is not None and port <= HIGHEST_PORT for port in self.value
        ):
            raise self.damaged("a list of ports")
        return frozenset(self.value)

    def packages(self) -> tuple[str, ...]:
        try:
            return check_packages(self.value)
        except PortknockError:
            raise self.damaged("a list of packages") from None

    def modes(self) -> tuple[str, ...]:
        if not isinstance(self.value, list) or not self.value or not all(mode in MODES for mode in self.value):
            raise self.damaged(f"a list of {' and '.join(MODES)}")
        return tuple(self.value)

    def spa(self) -> Knock:
        try:
            knock = parse_knock(self.value, "spa", secret=True, protocols=(SPA,))
        except PortknockError:
            raise self.damaged("port/protocol/spa:key:key") from None
        if uses_gnupg(knock):
            raise self.damaged("port/protocol/spa:key:key")
        return knock

    def gnupg(self) -> GnupgPackets:
        sides = self.mapping(("operator", "host"))
        try:
            packets = GnupgPackets(
                **{
                    side: parse_knock(node.value, "gnupg", secret=True, protocols=(SPA,))
                    for side, node in sides.items()
                }
            )
        except PortknockError:
            packets = None
        if packets is None or not all(map(uses_gnupg, packets)):
            raise self.damaged("port/protocol/spa:gnupg:keys for either side")
        return packets

    def knocks(self) -> tuple[Knock, ...]:
        try:
            knocks = parse_knocks(self.value, "knocks", secret=True, protocols=KNOCK_PROTOCOLS)
        except PortknockError:
            raise self.damaged("a list of port/protocol") from None
        if not SHORTEST <= len(knocks) <= LONGEST:
            raise self.damaged(f"a list of {SHORTEST} to {LONGEST} knocks")
        return knocks


def _read_host(node: _Node) -> HostSecrets:
    if isinstance(node.value, Mapping) and _whole_number(node.value.get("format"), FORMAT + 1):
        raise node.damaged(f"a keyring file of format {FORMAT}, not of a newer one that a later release wrote,")
    top = node.mapping(
        ("format", "keyring", "host", "generation", "tripwires", "operators"),
        ("removed", "packages", "rotation", "single_use", "one_time_last", "modes"),
    )
    if top["format"].value != FORMAT:
        raise top["format"].damaged(str(FORMAT))
    tripwires = top["tripwires"].mapping(("seed", "avoid"))
    seed = tripwires["seed"].text(rf"[0-9a-f]{{{2 * SEED_BYTES}}}", f"{2 * SEED_BYTES} hexadecimal digits")
    return HostSecrets(
        keyring_id=top["keyring"].text(r"\S{1,64}", "the id of a keyring"),
        host=top["host"].text(r"[^\x00-\x1f]+", "the name of a host"),
        generation=top["generation"].count(1),
        tripwire_seed=bytes.fromhex(seed),
        avoid=tripwires["avoid"].ports(),
        operators={name: _read_operator(entry) for name, entry in top["operators"].named().items()},
        removed=top["removed"].flag() if "removed" in top else False,
        packages=top["packages"].packages() if "packages" in top else (),
        rotation=top["rotation"].text(r"[0-9a-f]{1,64}", "the id of a rotation") if "rotation" in top else None,
        single_use=top["single_use"].flag() if "single_use" in top else False,
        last_id=top["one_time_last"].count(1) if "one_time_last" in top else 0,
        modes=top["modes"].modes() if "modes" in top else (SEQUENCE,),
    )


def _read_operator(node: _Node) -> Operator:
    entry = node.mapping(
        ("active", "current"), ("next", "both", "both_since", "valid_until", "revoked", "one_time", "close")
    )

    def time(name: str) -> str | None:
        return entry[name].time() if name in entry else None

    return Operator(
        active=entry["active"].flag(),
        current=_read_sequence(entry["current"]),
        next=_read_sequence(entry["next"]) if "next" in entry else None,
        both=entry["both"].flag() if "both" in entry else False,
        both_since=time("both_since"),
        valid_until=time("valid_until"),
        revoked=time("revoked"),
        one_time=_read_stock(entry["one_time"]) if "one_time" in entry else None,
        close=tuple(_read_sequence(item) for item in entry["close"].items()) if "close" in entry else (),
    )


def _read_stock(node: _Node) -> Stock:
    entry = node.mapping(("size", "state", "sequences"), ("retire", "retiring"))
    sequences = entry["sequences"].value
    if not isinstance(sequences, dict) or not all(
        _whole_number(identity, 1) and identity <= HIGHEST_ID and isinstance(text, str)
        for identity, text in sequences.items()
    ):
        raise entry["sequences"].damaged("a mapping from ids to port/protocol")
    return Stock(
        size=entry["size"].count(1),
        retire=entry["retire"].count(1) if "retire" in entry else 0,
        retiring=entry["retiring"].flag() if "retiring" in entry else False,
        state=entry["state"].text("|".join(STATES), " or ".join(STATES)),
        sequences={
            identity: entry["sequences"].item(text.split(" ")).knocks() for identity, text in sorted(sequences.items())
        },
    )


def _read_sequence(node: _Node) -> StoredSequence:
    entry = node.mapping(("generation", "knocks", "source", "created"), ("spa", "gnupg"))
    return StoredSequence(
        generation=entry["generation"].count(1),
        knocks=entry["knocks"].knocks(),
        source=entry["source"].text("|".join(SOURCES), " or ".join(SOURCES)),
        created=entry["created"].time(),
        spa=entry["spa"].spa() if "spa" in entry else None,
        gnupg=entry["gnupg"].gnupg() if "gnupg" in entry else None,
    )


__all__ = (
    "FORMAT",
    "GENERATED",
    "GIVEN",
    "OPERATORS_OPTION",
    "READMIT_OPTION",
    "SEQUENCES_OPTION",
    "TIME_FORMAT",
    "VALID_UNTIL_OPTION",
    "HostSecrets",
    "HostState",
    "Operator",
    "StoredSequence",
    "check_host_state",
    "check_not_all_expire",
    "check_not_all_revoked",
    "check_operators",
    "check_packages",
    "check_same_secrets",
    "parse_given",
    "parse_valid_until",
    "read_host_state",
    "seconds_since_1970",
    "utc_now",
)
