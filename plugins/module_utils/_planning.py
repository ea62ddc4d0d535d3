# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a host's entry in the keyring is to become, so that whoever may knock has a sequence.

Plain entries in and out, as in ``_keyring.py``; no error text holds a port of a sequence.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import AbstractSet, NamedTuple

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import (
    GENERATED,
    GIVEN,
    OPERATORS_OPTION,
    READMIT_OPTION,
    SEQUENCES_OPTION,
    VALID_UNTIL_OPTION,
    HostSecrets,
    HostState,
    Operator,
    StoredSequence,
    check_not_all_revoked,
    check_operators,
)
from ansible_collections.fleet.portknock.plugins.module_utils._ports import GNUPG, KNOCK_PROTOCOLS, SEQUENCE, SPA, Knock
from ansible_collections.fleet.portknock.plugins.module_utils._sequences import (
    DEFAULT_LENGTH,
    SEED_BYTES,
    Barred,
    check,
    check_length,
    check_protocols,
    generate_knocks,
)
from ansible_collections.fleet.portknock.plugins.module_utils._stock import COMING, Stock, check_one_time, draw


class NewSequences:
    """Makes a host's sequences: no two share a port, nor one with what the host has.

    :param generation: the one that they are for.
    :param now: the time, such as 2026-01-31T08:15:00Z.
    :param barred: ports that none may hold.
    :param known: the operators that are there.
    """

    def __init__(
        self,
        generation: int,
        now: str,
        length: int,
        protocols: Sequence[str],
        barred: AbstractSet[int],
        known: Sequence[Operator],
        random: Random | None = None,
    ) -> None:
        self._generation = generation
        self._now = now
        self._shape = check_length(length), check_protocols(protocols, allowed=KNOCK_PROTOCOLS)
        self._random = random
        self._taken = set(barred)
        self._lengths: set[int] = set()
        for operator in known:
            stored = (operator.current, operator.next, *operator.close)
            for sequence in stored:
                self.take(sequence.knocks if sequence else ())
            # Of those that open once, which are many, only what none may begin with.
            self.take([knocks[0] for knocks in operator.once.values()])

    def take(self, knocks: Iterable[Knock]) -> None:
        """Leave these to others."""
        for knock in knocks:
            (self._lengths if knock.proto == "icmp" else self._taken).add(knock.port)

    def make(self) -> StoredSequence:
        """Return a new one.

        :raises PortknockError: too few ports are left.
        """
        knocks = generate_knocks(*self._shape, self._taken, self._lengths, self._random)
        self.take(knocks)
        return StoredSequence(self._generation, knocks, GENERATED, self._now)


class Plan(NamedTuple):
    """What a host's entry is to become.

    ``created`` names the operators that get a sequence for the first time; ``warnings`` are sentences.
    """

    secrets: HostSecrets
    changed: bool
    created: tuple[str, ...]
    warnings: tuple[str, ...]


def plan_secrets(
    existing: HostSecrets | None,
    *,
    keyring_id: str,
    host: str,
    operators: Sequence[str],
    now: str,
    length: int = DEFAULT_LENGTH,
    protocols: Sequence[str] = ("tcp",),
    given: Mapping[str, Sequence[Sequence[Knock]]] | None = None,
    protected: AbstractSet[int] = frozenset(),
    nmap_ports: AbstractSet[int] = frozenset(),
    in_use: AbstractSet[int] = frozenset(),
    state: HostState | None = None,
    packages: Sequence[str] = (),
    single_use: bool = False,
    readmit: Sequence[str] = (),
    valid_until: Mapping[str, str] | None = None,
    one_time: int = 0,
    close_sequence: bool = False,
    is_bare: bool = False,
    spa: Knock | None = None,
    gnupg: bool = False,
    random: Random | None = None,
) -> Plan:
    """Say what a host's entry is to become, so that every operator has a sequence; nothing is written.

    * A sequence that is there stays, whatever length and tcp and udp in protocols say: those are for new ones.
    * A given sequence that differs becomes ``next``; so does a new one where one came to hold a port that is now protected, or
      holds icmp knocks that ``protocols`` does not name any more. The former stays known until the new one is promoted.
    * Of two given sequences the newest becomes ``next``, and both are honoured until it is given alone.
    * Two generated sequences that are honoured during a rotation stay as they are: ending it is not this function's.
    * An operator who isn't named any more becomes inactive and keeps their sequence. One who was revoked stays out, named or
      not, until ``readmit`` names them, and then gets a new sequence.
    * With ``one_time``, each operator has that many one-time sequences, which the gate honours instead of the reusable one:
      new ones where fewer than half are left, where the number was raised, and where what there was may have been used.
      Without, they go once the gate is known to honour the reusable sequence.
    * With ``close_sequence``, each operator has a sequence that shuts their window; without, they have none.
    * An entry that was marked removed is live again.
    * Packages are noted, and so is a gate that is to be a single-use one; neither changes secrets, so the generation stays.
      That it is one no more is noted by :meth:`HostSecrets.promoted`: until then clients have to reckon with it.
    * With ``spa``, a protected port, the gate is opened by one packet that asks for it: each sequence has keys beside it, which
      are GnuPG's with ``gnupg``.
    * ``valid_until`` gives each operator that it names a time, and takes those of others away; None leaves them as they are.

    :param now: the time, for what is created, such as 2026-01-31T08:15:00Z.
    :param state: what the host's gate says of itself. A generation beyond the entry's (an adopted host) is passed by.
    :param is_bare: the host is known to have no gate, and with it no memory of what was used there.
    :raises PortknockError: bad input, or a given sequence that breaks a rule.
    """
    names = check_operators(operators)
    sequences = {name: [tuple(knocks) for knocks in several] for name, several in (given or {}).items()}
    if check_one_time(one_time) and sequences:
        raise PortknockError(
            f"{SEQUENCES_OPTION}: expected none where knock_server_one_time is set, since each sequence is used once; got "
            f"those of {', '.join(sequences)}."
        )
    if spa is not None and sequences:
        raise PortknockError(
            f"{SEQUENCES_OPTION}: expected none where knock_server_backend is opened by one packet (fwknop), whose keys the "
            f"keyring makes; got those of {', '.join(sequences)}."
        )
    warnings = _check_given(sequences, protected, nmap_ports, in_use)
    _check_readmitted(readmit, names)
    known = {} if existing is None else dict(existing.operators)
    deployed = 0 if state is None else state.generation
    generation = 1 + max(deployed, 0 if existing is None else existing.generation)
    excluded = {*nmap_ports, *in_use, *protected}
    barred = Barred(protected, echo="icmp" not in check_protocols(protocols, allowed=KNOCK_PROTOCOLS))
    new = NewSequences(generation, now, length, protocols, excluded, list(known.values()), random)
    for several in sequences.values():
        new.take(knock for knocks in several for knock in knocks)
    planned: dict[str, Operator] = {}
    for name in names:
        entry = known.get(name)
        wishes = [StoredSequence(generation, knocks, GIVEN, now) for knocks in sequences.get(name, ())]
        if entry is None or (entry.revoked is not None and name in readmit):
            planned[name] = _newcomer(wishes or [new.make()])
        elif entry.revoked is not None:
            planned[name] = entry
            warnings.append(
                f"{OPERATORS_OPTION}: {name}, who was revoked on {host} at {entry.revoked}, stays out. Take the name "
                f"off the list, or let them in again with a new sequence by {READMIT_OPTION}."
            )
        elif wishes:
            planned[name] = _with_given(replace(entry, active=True), wishes, deployed)
            if len(planned[name].honoured) < len(wishes):
                warnings.append(
                    f"{SEQUENCES_OPTION}: the gate of {host} may honour neither of the two of operator {name} yet. It gets the "
                    "newest alone, and the next run adds the former one."
                )
        else:
            planned[name] = entry = _clear_of(barred, name, replace(entry, active=True), new, deployed)
            if spa is None and entry.wanted.source == GENERATED and len(entry.wanted.knocks) != length:
                warnings.append(
                    f"knock_server_sequence_length: the sequence of operator {name} on {host} keeps its "
                    f"{len(entry.wanted.knocks)} knocks; {length} take effect when it is rotated."
                )
    # Whoever was revoked gets new ones, or none.
    planned = {name: entry if entry.revoked else entry.with_spa(spa, gnupg) for name, entry in planned.items()}
    mode = SEQUENCE if spa is None else GNUPG if gnupg else SPA
    if valid_until is not None:
        planned = {name: replace(entry, valid_until=valid_until.get(name)) for name, entry in planned.items()}
        warnings += [
            f"{VALID_UNTIL_OPTION}: the time of {name} on {host} is over since {planned[name].valid_until}: they are shut out."
            for name in names
            if planned[name].has_expired(now)
        ]
    begins = {knocks[0] for several in sequences.values() for knocks in several}
    planned = {
        name: entry if entry.revoked else replace(entry, close=_closing(entry, close_sequence, barred, begins, new))
        for name, entry in planned.items()
    }
    adopted = (
        existing is not None
        and state is not None
        and (state.keyring_id != keyring_id or state.generation > existing.generation or state.contradicts(existing))
    )
    last_id = max(0 if existing is None else existing.last_id, 0 if state is None else state.last_id)
    begun = {knocks[0] for entry in (*known.values(), *planned.values()) for knocks in entry.every_sequence}
    for name, entry in planned.items():
        if entry.revoked is not None:
            continue
        if not one_time:
            planned[name] = replace(entry, one_time=entry.one_time.going() if entry.one_time else None)
            continue
        # What another keyring's gate, or one that is gone, has let in is not known.
        kept = None if adopted or is_bare else entry.one_time
        stock = (kept or Stock(one_time, COMING, {})).coming().without(barred)
        left = stock.since(0 if state is None else state.one_time.get(name, 0))
        if left.is_short(one_time) or (one_time < stock.size and not stock.retire):
            missing = max(0, one_time - len(left.sequences))
            added = draw(missing, last_id, length, protocols, excluded, begun, random)
            begun.update(knocks[0] for knocks in added.values())
            last_id += missing
            stock = left.filled(one_time, added)
        planned[name] = replace(entry, one_time=stock)
    _check_first_knocks(
        {
            name: [*(stored.knocks for stored in (*entry.honoured, *entry.close)), *entry.once.values()]
            for name, entry in planned.items()
        }
    )
    for name, former in known.items():
        planned.setdefault(name, replace(former, active=False))
    created = tuple(name for name in names if name not in known)

    if existing is None:
        fresh = HostSecrets(
            keyring_id,
            host,
            generation,
            secrets.token_bytes(SEED_BYTES),
            frozenset(in_use),
            planned,
            packages=tuple(packages),
            single_use=single_use,
            last_id=last_id,
            modes=(mode,),
        )
        return Plan(fresh, True, created, tuple(warnings))
    noted = (*existing.packages, *(name for name in packages if name not in existing.packages))
    # The order of what is there is kept: it is the order in which a client tries.
    ordered = {name: planned[name] for name in (*known, *created)}
    same = replace(
        existing, operators=ordered, removed=False, keyring_id=keyring_id, last_id=max(existing.last_id, last_id)
    ).for_mode(mode)
    check_not_all_revoked(names, same)
    if same == existing and not adopted:
        latest = replace(existing, packages=noted, single_use=existing.single_use or single_use)
        if latest == existing:
            return Plan(existing, False, (), tuple(warnings))
        return Plan(latest, True, (), tuple(warnings))
    avoid = frozenset(in_use) or existing.avoid
    changed = replace(
        same,
        generation=generation,
        avoid=avoid,
        packages=noted,
        single_use=existing.single_use or single_use,
    )
    return Plan(changed, True, created, tuple(warnings))


def _check_given(
    sequences: Mapping[str, Sequence[Sequence[Knock]]],
    protected: AbstractSet[int],
    nmap_ports: AbstractSet[int],
    in_use: AbstractSet[int],
) -> list[str]:
    """Refuse given sequences that break a rule; what is merely unwise comes back as sentences."""
    warnings: dict[str, None] = {}
    for name, several in sequences.items():
        option = f"{SEQUENCES_OPTION}, operator {name}"
        for knocks in several:
            found = check(knocks, option, protected=protected, nmap_ports=nmap_ports, in_use=in_use)
            warnings.update(dict.fromkeys(found))
    return list(warnings)


def _check_readmitted(readmit: Iterable[str], names: Sequence[str]) -> None:
    unknown = [name for name in readmit if name not in names]
    if unknown:
        raise PortknockError(
            f"{READMIT_OPTION}: expected operators that {OPERATORS_OPTION} names ({', '.join(names)}); got "
            f"{', '.join(unknown)}."
        )


def _clear_of(barred: Barred, name: str, entry: Operator, new: NewSequences, deployed: int) -> Operator:
    """An operator who is honoured for no sequence that holds what has come to be barred.

    :raises PortknockError: a person gave it, so a person has to give another.
    """
    if _is_barred(entry.wanted, barred):
        if entry.wanted.source == GIVEN:
            raise PortknockError(
                f"{SEQUENCES_OPTION}, operator {name}: expected no protected port; the sequence that the keyring "
                f"holds, which was given, has one."
            )
        return _with_next(entry, new.make(), deployed)
    if any(_is_barred(stored, barred) for stored in entry.honoured):
        # The former sequence of a rotation: honoured no more, but known until the other is proved.
        return replace(entry, both=False, both_since=None)
    return entry


def _is_barred(stored: StoredSequence, barred: Barred) -> bool:
    # What a person gives is of the protocols that they choose.
    return (barred._replace(echo=False) if stored.source == GIVEN else barred).bars(stored.knocks)


def _closing(
    entry: Operator, wanted: bool, barred: Barred, begins: AbstractSet[Knock], new: NewSequences
) -> tuple[StoredSequence, ...]:
    """The sequences that are to shut an operator's window: what is there, as far as the gate can honour it, or a new one.

    :param begins: knocks that sequences which were given begin with.
    """
    if not wanted:
        return ()
    # The former one of a rotation that something else has ended.
    stored = entry.close if entry.is_between else entry.close[:1]
    kept = [one for one in stored if one.knocks[0] not in begins and not barred.bars(one.knocks)]
    return tuple(kept) or (new.make(),)


def _newcomer(sequences: Sequence[StoredSequence]) -> Operator:
    """An operator who has no sequence yet: with one, or with two, the newest first."""
    if len(sequences) == 1:
        return Operator(True, sequences[0])
    return Operator(True, current=sequences[1], next=sequences[0], both=True)


def _with_given(entry: Operator, wishes: Sequence[StoredSequence], deployed: int) -> Operator:
    """An operator whose sequence a person gives, or two of them, the newest first."""
    kept = {stored.knocks: stored for stored in (entry.current, entry.next) if stored is not None}
    newest, *former = (kept.get(wish.knocks, wish) for wish in wishes)
    if former and _on_host(entry, deployed) in (newest, *former):
        # Whatever they were: from now on nobody but this person ends it.
        following, current = replace(newest, source=GIVEN), replace(former[0], source=GIVEN)
        if entry.both and (entry.next, entry.current) == (following, current):
            return entry
        return replace(entry, current=current, next=following, both=True, both_since=None)
    # One that is wanted alone, or with another where the host's own would have to be forgotten before the new ones are proved.
    if entry.wanted == newest:
        return replace(entry, both=False, both_since=None)
    if entry.next is not None and entry.current == newest:
        # Back to the former one; the other may be on the host, so it stays known.
        return replace(entry, current=entry.next, next=wishes[0], both=False, both_since=None)
    return _with_next(entry, newest, deployed)


def _on_host(entry: Operator, deployed: int) -> StoredSequence:
    """The sequence that the host honours for sure, whatever else it does.

    :param deployed: the generation of the host's gate.
    """
    return entry.next if entry.next is not None and entry.next.generation <= deployed else entry.current


def _with_next(entry: Operator, following: StoredSequence, deployed: int) -> Operator:
    """An operator who gets another sequence, while the one that the host honours stays known.

    :param deployed: the generation of the host's gate. It tells which of two sequences the host honours.
    """
    return replace(entry, current=_on_host(entry, deployed), next=following, both=False, both_since=None)


def _check_first_knocks(sequences: Mapping[str, Sequence[Sequence[Knock]]]) -> None:
    """Refuse sequences that begin alike: the gate could not tell them apart."""
    first: dict[Knock, str] = {}
    for name, several in sequences.items():
        for knocks in several:
            if knocks[0] in first:
                other = first[knocks[0]]
                whose = f"those of {other} and {name}" if other != name else f"two of {name}'s"
                raise PortknockError(
                    f"{SEQUENCES_OPTION}: expected sequences that begin with different knocks; {whose} begin alike."
                )
            first[knocks[0]] = name


__all__ = ("NewSequences", "Plan", "plan_secrets")
