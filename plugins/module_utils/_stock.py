# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""An operator's one-time sequences on a host: how many there are, how they are drawn, and when there are too few.

No error text of this module holds a port of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import AbstractSet, Optional

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._sequences import (
    Barred,
    RandomSource,
    generate_knocks,
)

# A boot uses up a few of them, unused: fewer would not last.
SMALLEST = 16
LARGEST = 500
HIGHEST_ID = 0xFFFF

_OPTION = "knock_server_one_time"

# Whether the host's gate honours them instead of the reusable sequence: not yet known, known, or no longer wanted.
COMING = "coming"
HONOURED = "honoured"
GOING = "going"
STATES = (COMING, HONOURED, GOING)


@dataclass(frozen=True)
class Stock:
    """An operator's one-time sequences on a host, by id. Each is good for one opening, and none before it is good after.

    ``size`` is how many there are to be when it is filled. During a rotation, those before the id ``retire`` are about to go (0
    outside of one), and with ``retiring`` the gate is to honour them no more.
    """

    size: int
    state: str
    sequences: Mapping[int, tuple[Knock, ...]]
    retire: int = 0
    retiring: bool = False

    @property
    def wanted(self) -> bool:
        """Whether the gate is to honour these, and not the reusable sequence."""
        return self.state != GOING

    @property
    def honoured(self) -> Mapping[int, tuple[Knock, ...]]:
        """Those that the gate is to honour."""
        if not self.wanted:
            return {}
        return self._parts()[1] if self.retiring else self.sequences

    @property
    def groups(self) -> list[Mapping[int, tuple[Knock, ...]]]:
        """All that the gate may honour: where it may honour the later ones alone, these for themselves."""
        return [part for part in self._parts() if part]

    def _parts(self) -> tuple[dict[int, tuple[Knock, ...]], dict[int, tuple[Knock, ...]]]:
        former = {identity: knocks for identity, knocks in self.sequences.items() if identity < self.retire}
        return former, {identity: knocks for identity, knocks in self.sequences.items() if identity >= self.retire}

    def promoted(self) -> Optional[Stock]:
        """Return this after the gate was proved and confirmed; None where it no longer honours these."""
        if not self.wanted:
            return None
        if self.retiring:
            return Stock(self.size, HONOURED, self._parts()[1])
        return replace(self, state=HONOURED)

    def going(self) -> Stock:
        """Return this for a gate that is to honour the reusable sequence again."""
        return replace(self, state=GOING)

    def beside(self, new: Mapping[int, tuple[Knock, ...]]) -> Stock:
        """Return this with new sequences, which are to take the place of all that there is."""
        return replace(self, sequences={**self.sequences, **new}, retire=min(new, default=0))

    def retired(self) -> Stock:
        """Return this for a gate that is to honour the new ones of a rotation alone. Until it is known to, all are kept."""
        return replace(self, retiring=True)

    def coming(self) -> Stock:
        """Return this for a gate that is to honour these."""
        return self if self.wanted else replace(self, state=COMING)

    def since(self, first: int) -> Stock:
        """Return this without what comes before that id."""
        return replace(self, sequences={one: knocks for one, knocks in self.sequences.items() if one >= first})

    def without(self, barred: Barred) -> Stock:
        """Return this without what holds something that is now barred."""
        kept = {identity: knocks for identity, knocks in self.sequences.items() if not barred.bars(knocks)}
        return replace(self, sequences=kept)

    def is_short(self, size: int) -> bool:
        """Whether it is to be filled up to that size now."""
        return not self.retire and (size > self.size or 2 * len(self.sequences) < size)

    def filled(self, size: int, new: Mapping[int, tuple[Knock, ...]]) -> Stock:
        """Return this with new sequences behind the others, and what is more than the size left out."""
        every = sorted({**self.sequences, **new}.items())
        return replace(self, size=size, sequences=dict(every[:size]))


def check_one_time(value: object) -> int:
    """Return how many one-time sequences an operator is to have, 0 for none.

    :raises PortknockError: another value.
    """
    # -e key=value on the command line gives text.
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value[:9])
    if isinstance(value, bool) or not isinstance(value, int) or not (value == 0 or SMALLEST <= value <= LARGEST):
        raise PortknockError(f"{_OPTION}: expected 0, or a whole number from {SMALLEST} to {LARGEST}; got {value!r}.")
    # Ansible's tagged numbers are not what YAML writes.
    return int(value)


def draw(
    count: int,
    last: int,
    length: int,
    protocols: Sequence[str],
    excluded: AbstractSet[int],
    begun: Iterable[Knock],
    random: Optional[RandomSource] = None,
) -> dict[int, tuple[Knock, ...]]:
    """Draw sequences that the kernel can use up: their last knock is a tcp one, whose size it knows.

    :param last: the highest id that was ever given on that host.
    :param begun: knocks that another sequence of the host's begins with.
    :raises PortknockError: no tcp, or no ids are left.
    """
    if "tcp" not in protocols:
        raise PortknockError(
            f"{_OPTION}: expected tcp in knock_server_sequence_protocols, since a one-time sequence ends with a tcp knock; "
            f"got {', '.join(protocols)}."
        )
    if last + count > HIGHEST_ID:
        raise PortknockError(
            f"{_OPTION}: expected ids up to {HIGHEST_ID}, of which the host has had {last}; {count} more are needed. Remove "
            "the gate and purge the host's keyring entry (knock_server_purge_keyring), then set it up anew."
        )
    firsts = set(begun)
    drawn: dict[int, tuple[Knock, ...]] = {}
    while len(drawn) < count:
        knocks = generate_knocks(length, protocols, excluded, random=random)
        if knocks[-1].proto == "tcp" and knocks[0] not in firsts:
            firsts.add(knocks[0])
            drawn[last + len(drawn) + 1] = knocks
    return drawn


__all__ = (
    "COMING",
    "GOING",
    "HIGHEST_ID",
    "HONOURED",
    "LARGEST",
    "SMALLEST",
    "STATES",
    "Stock",
    "check_one_time",
    "draw",
)
