# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Knock sequences and tripwires: how they are drawn, and the rules that they keep.

No error text of this module holds a port of a sequence or of a tripwire.
"""

from __future__ import annotations

import hashlib
from math import factorial
from random import SystemRandom
from typing import AbstractSet, Callable, NamedTuple, Protocol, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._ports import (
    HIGHEST_PORT,
    KNOCK_PROTOCOLS,
    PROTOCOLS,
    Knock,
)

LOWEST_PORT = 1024
SHORTEST = 3
LONGEST = 16
DEFAULT_LENGTH = 4
SEED_BYTES = 32
# What traceroute sends to (attack 14 of the design): a tripwire there would cost an honest client its progress.
TRACEROUTE_PORTS = range(33434, 33535)

# What a gate tells echo requests by, in bytes of payload: longer than what ping sends by itself anywhere, and short enough for
# any path, so that none comes in parts.
ECHO_LENGTHS = range(100, 1201)
# However many there are among a thousand lengths, a sweep over all of them meets most before the right ones.
ECHO_TRIPWIRES = 200

_LENGTH_OPTION = "knock_server_sequence_length"
_PROTOCOLS_OPTION = "knock_server_sequence_protocols"
_TRIPWIRES_OPTION = "knock_server_tripwires"
_PORT_COUNT = HIGHEST_PORT - LOWEST_PORT + 1
# Enough that a pool of more than a hundredth of all ports practically never gets to the slower exact draw.
_DRAWS_PER_KNOCK = 400
_TRIPWIRE_LABEL = b"fleet.portknock tripwires version 1\0"
_ECHO_TRIPWIRE_LABEL = b"fleet.portknock echo tripwires version 1\0"


class RandomSource(Protocol):
    """What sequences are drawn from: ``random.Random`` is one."""

    def randrange(self, stop: int, /) -> int:
        """A whole number from 0 to ``stop - 1``, each equally likely."""


class Barred(NamedTuple):
    """What no sequence of a host may hold: ports that are protected, and with ``echo`` echo requests."""

    protected: AbstractSet[int]
    echo: bool = False

    def bars(self, knocks: Sequence[Knock]) -> bool:
        """Whether a sequence holds any of it."""
        return any(knock.is_among(self.protected) or (self.echo and knock.proto == "icmp") for knock in knocks)


def check_length(length: object, option: str = _LENGTH_OPTION) -> int:
    """Return a sequence's length.

    :param option: names it in the error.
    :raises PortknockError: not a whole number from 3 to 16.
    """
    if isinstance(length, bool) or not isinstance(length, int) or not SHORTEST <= length <= LONGEST:
        raise PortknockError(f"{option}: expected a whole number from {SHORTEST} to {LONGEST}; got {length!r}.")
    return length


def check_protocols(
    protocols: object, option: str = _PROTOCOLS_OPTION, allowed: Sequence[str] = PROTOCOLS
) -> tuple[str, ...]:
    """Return the protocols that a generated sequence may use.

    :param option: names them in the error.
    :param allowed: those that there are.
    :raises PortknockError: not a list of some of these, each once.
    """
    if (
        isinstance(protocols, (list, tuple))
        and protocols
        and all(proto in allowed for proto in protocols)
        and len(set(protocols)) == len(protocols)
    ):
        return tuple(str(proto) for proto in protocols)
    choices = "tcp, udp or both" if allowed == PROTOCOLS else f"one or more of {', '.join(allowed)}"
    raise PortknockError(f"{option}: expected a list of {choices}, each once; got {protocols!r}.")


def generate(
    length: int,
    protocols: Sequence[str],
    excluded: AbstractSet[int],
    random: RandomSource | None = None,
) -> tuple[Knock, ...]:
    """Draw a sequence: every one that keeps the rules is equally likely.

    What a given source leads to is frozen: version 1 of ``_derivation`` draws by this very code. Whatever would change it
    needs a copy of the present rules there first; golden sequences in the tests of ``_derivation`` notice.

    The rules: ports from 1024 to 65535 that are not excluded, any two at least 2 apart, neither ascending nor
    descending as a whole. With two protocols each knock's is drawn, and both occur.

    :param excluded: port numbers, whatever the protocol.
    :param random: the source of randomness; the operating system's unless another is given.
    :raises PortknockError: a bad length or protocol, or fewer usable ports than the sequence needs.
    """
    check_length(length)
    choices = check_protocols(protocols)
    source = SystemRandom() if random is None else random
    # Rejection would hardly ever find one of the few ports that are left.
    crowded = len(excluded) > _PORT_COUNT * 99 // 100
    ports = None if crowded else _draw_ports(length, excluded, source)
    if ports is None:
        ports = _draw_ports_exactly(length, excluded, source)
    ordered = _disorder(sorted(ports), source)
    if len(choices) == 1:
        return tuple(Knock(port, choices[0]) for port in ordered)
    # One bit a knock; neither all zeros nor all ones, so that both protocols occur.
    bits = 1 + source.randrange(2**length - 2)
    return tuple(Knock(port, choices[bits >> index & 1]) for index, port in enumerate(ordered))


def generate_knocks(
    length: int,
    protocols: Sequence[str],
    excluded: AbstractSet[int],
    excluded_lengths: AbstractSet[int] = frozenset(),
    random: RandomSource | None = None,
) -> tuple[Knock, ...]:
    """Draw a sequence as :func:`generate`, which it is where no icmp is asked for.

    Lengths of echo requests keep the rules of ports among themselves, and are none that people ping with. Every protocol occurs.

    :param excluded_lengths: lengths that none may have.
    :raises PortknockError: as :func:`generate`, or fewer usable lengths than the sequence needs.
    """
    choices = check_protocols(protocols, allowed=KNOCK_PROTOCOLS)
    if "icmp" not in choices:
        return generate(length, choices, excluded, random)
    check_length(length)
    source = SystemRandom() if random is None else random
    kinds: list[str] = []
    while set(kinds) != set(choices):
        kinds = [choices[source.randrange(len(choices))] for _knock in range(length)]
    count = kinds.count("icmp")
    lengths = iter(_in_disorder(_draw_lengths(count, excluded_lengths, source), source))
    others = length - count
    drawn = _draw_ports(others, excluded, source) if others else []
    ports = iter(_in_disorder(_draw_ports_exactly(others, excluded, source) if drawn is None else drawn, source))
    return tuple(Knock(next(lengths if kind == "icmp" else ports), kind) for kind in kinds)


def _in_disorder(numbers: list[int], random: RandomSource) -> list[int]:
    # Fewer than three always ascend or descend, and are in the order in which they were drawn.
    return _disorder(sorted(numbers), random) if len(numbers) >= SHORTEST else numbers


def _draw_lengths(count: int, excluded: AbstractSet[int], random: RandomSource) -> list[int]:
    """Draw a set of lengths by rejection.

    :raises PortknockError: hardly any are left.
    """
    lengths: list[int] = []
    for _draw in range(_DRAWS_PER_KNOCK * max(1, count)):
        if len(lengths) == count:
            return lengths
        length = ECHO_LENGTHS[random.randrange(len(ECHO_LENGTHS))]
        if length in excluded or is_round(length):
            continue
        if any(abs(length - other) < 2 for other in lengths):
            lengths = []
            continue
        lengths.append(length)
    left = sum(length not in excluded and not is_round(length) for length in ECHO_LENGTHS)
    raise PortknockError(
        f"{_PROTOCOLS_OPTION}: a sequence with {_count(count, 'icmp knock')} needs as many lengths that are at least 2 apart; "
        f"{left} from {ECHO_LENGTHS[0]} to {ECHO_LENGTHS[-1]} {_be(left)} left on this host. Add tcp, or have fewer operators."
    )


def is_round(length: int) -> bool:
    """Whether it is a length that people choose when they ping."""
    return length % 50 == 0 or length % 64 == 0


def _draw_ports(length: int, excluded: AbstractSet[int], random: RandomSource) -> list[int] | None:
    """Draw a set of ports by rejection, or give up: None.

    A set that breaks the neighbour rule is thrown away as a whole; replacing only its last port would make some
    sets likelier than others.
    """
    ports: list[int] = []
    for _draw in range(_DRAWS_PER_KNOCK * length):
        # randrange rejects what lies beyond the last multiple; it does not take a remainder.
        port = LOWEST_PORT + random.randrange(_PORT_COUNT)
        if port in excluded:
            continue
        if any(abs(port - other) < 2 for other in ports):
            ports = []
            continue
        ports.append(port)
        if len(ports) == length:
            return ports
    return None


def _draw_ports_exactly(length: int, excluded: AbstractSet[int], random: RandomSource) -> list[int]:
    """Draw a set of ports by counting all of them: for pools so small that rejection would not end.

    :raises PortknockError: there is no such set.
    """
    pool = sorted(set(range(LOWEST_PORT, HIGHEST_PORT + 1)).difference(excluded))
    apart = _most_apart(pool)
    if apart < length:
        raise PortknockError(
            f"{_LENGTH_OPTION}: a sequence of {length} knocks needs {length} ports that are at least 2 apart; "
            f"{_count(len(pool), 'port')} from {LOWEST_PORT} to {HIGHEST_PORT} {_be(len(pool))} left after the "
            f"exclusions, and at most {apart} of them {_be(apart)} at least 2 apart."
        )
    size = len(pool)
    # following[i]: where the ports begin that are at least 2 above pool[i].
    following = [index + 2 if pool[index + 1 : index + 2] == [pool[index] + 1] else index + 1 for index in range(size)]
    # ways[j][i]: how many sets of j ports can be made of pool[i:].
    ways = [[1] * (size + 1)]
    for _count_of_ports in range(length):
        fewer, row = ways[-1], [0] * (size + 1)
        for index in reversed(range(size)):
            row[index] = row[index + 1] + fewer[following[index]]
        ways.append(row)
    rank = random.randrange(ways[length][0])
    ports: list[int] = []
    index = 0
    while len(ports) < length:
        without = ways[length - len(ports)][index + 1]
        if rank < without:
            index += 1
        else:
            rank -= without
            ports.append(pool[index])
            index = following[index]
    return ports


def _most_apart(pool: Sequence[int]) -> int:
    """How many ports of an ascending pool can be taken so that any two are at least 2 apart."""
    taken, last = 0, -2
    for port in pool:
        if port - last >= 2:
            taken, last = taken + 1, port
    return taken


def _disorder(ports: list[int], random: RandomSource) -> list[int]:
    """Order ascending ports in any way but the ascending and the descending one, each equally likely."""
    # The first and the last permutation in lexicographic order are those two.
    rank = 1 + random.randrange(factorial(len(ports)) - 2)
    left = list(ports)
    ordered = []
    for remaining in range(len(ports) - 1, -1, -1):
        index, rank = divmod(rank, factorial(remaining))
        ordered.append(left.pop(index))
    return ordered


def check(
    knocks: Sequence[Knock],
    option: str,
    *,
    protected: AbstractSet[int],
    nmap_ports: AbstractSet[int],
    in_use: AbstractSet[int],
) -> list[str]:
    """Hold a sequence that a person gave to the rules of a generated one.

    A port on which a service listens is a warning only: a knock rule carries no verdict, so the service works on.

    :param option: names the sequence in the texts.
    :returns: warnings, without a port in them.
    :raises PortknockError: the first rule that the sequence breaks.
    """
    if not SHORTEST <= len(knocks) <= LONGEST:
        raise PortknockError(f"{option}: expected {SHORTEST} to {LONGEST} knocks; got {len(knocks)}.")
    kinds = ("icmp" if knock.proto == "icmp" else "port" for knock in knocks)
    numbered = [(number, kind, knock.port) for number, (kind, knock) in enumerate(zip(kinds, knocks), 1)]
    ports = [port for _number, kind, port in numbered if kind == "port"]
    lengths = [length for _number, kind, length in numbered if kind == "icmp"]
    for number, kind, port in numbered:
        if kind == "icmp":
            if port not in ECHO_LENGTHS:
                raise PortknockError(
                    f"{option}: expected icmp knocks of {ECHO_LENGTHS[0]} to {ECHO_LENGTHS[-1]} bytes; knock {number} is of "
                    "another length."
                )
            continue
        if port < LOWEST_PORT:
            raise PortknockError(
                f"{option}: expected ports from {LOWEST_PORT} to {HIGHEST_PORT}; knock {number} has a lower one."
            )
        if port in protected:
            raise PortknockError(f"{option}: expected no protected port; knock {number} is one.")
        if port in nmap_ports:
            raise PortknockError(
                f"{option}: expected no port that nmap's list of services names, since every scan tries those first; "
                f"knock {number} is one."
            )
    for number, kind, port in numbered:
        for earlier, other_kind, other in numbered[: number - 1]:
            if kind == other_kind and abs(port - other) < 2:
                raise PortknockError(
                    f"{option}: expected any two ports to be at least 2 apart; knocks {earlier} and {number} are not."
                )
    for numbers in (ports, lengths):
        # Two of a kind among others can't do otherwise.
        is_few = 0 < len(numbers) < SHORTEST and len(numbers) < len(knocks)
        if numbers and not is_few and numbers in (sorted(numbers), sorted(numbers, reverse=True)):
            raise PortknockError(
                f"{option}: expected ports that neither ascend nor descend as a whole, since a plain sweep would open "
                f"such a sequence; these do."
            )
    live = sum(port in in_use for port in ports)
    if live:
        return [
            f"{option}: {_count(live, 'knock')} {'goes' if live == 1 else 'go'} to a port on which a service of the "
            f"host listens. The service works on, but its own clients knock without meaning to."
        ]
    return []


def derive_tripwires(seed: bytes, count: int, excluded: AbstractSet[int]) -> tuple[int, ...]:
    """Derive a host's tripwires from its seed. Frozen as version 1: the same arguments give the same ports for ever.

    SHAKE-256 over the ASCII label ``fleet.portknock tripwires version 1``, a zero byte and the 32 bytes of the seed is
    read as unsigned 16-bit big-endian numbers. A number is taken unless it is below 1024, from 33434 to 33534,
    excluded, or was taken before; the first ``count`` that are taken are the result, in that order. So a larger count
    begins with the ports of a smaller one.

    :raises PortknockError: a bad count, or more tripwires than there are ports.
    """
    if len(seed) != SEED_BYTES:
        raise PortknockError(f"The tripwire seed: expected {SEED_BYTES} bytes; got {len(seed)}.")
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise PortknockError(f"{_TRIPWIRES_OPTION}: expected a whole number, 0 or more; got {count!r}.")
    barred = set(excluded).union(range(LOWEST_PORT), TRACEROUTE_PORTS)
    left = HIGHEST_PORT + 1 - sum(0 <= port <= HIGHEST_PORT for port in barred)
    if count > left:
        raise PortknockError(
            f"{_TRIPWIRES_OPTION}: expected at most as many tripwires as there are ports left after the exclusions, "
            f"{left}; got {count}."
        )
    return _derived(_TRIPWIRE_LABEL, seed, count, lambda port: port not in barred)


def derive_echo_tripwires(seed: bytes, excluded: AbstractSet[int]) -> tuple[int, ...]:
    """Derive a host's tripwires among the lengths of echo requests from its seed. Frozen as version 1.

    As :func:`derive_tripwires`, with the label ``fleet.portknock echo tripwires version 1``; a number is taken by its low 11
    bits, where that is in :data:`ECHO_LENGTHS`, not one that people ping with, not excluded, and was not taken before.
    """
    usable = {length for length in ECHO_LENGTHS if length not in excluded and not is_round(length)}
    return _derived(
        _ECHO_TRIPWIRE_LABEL, seed, min(ECHO_TRIPWIRES, len(usable)), lambda length: length in usable, mask=0x7FF
    )


def _derived(
    label: bytes, seed: bytes, count: int, takes: Callable[[int], bool], mask: int = 0xFFFF
) -> tuple[int, ...]:
    stream = hashlib.shake_256(label + seed)
    size = 4 * (count + 64)
    while True:
        # A longer digest begins with the shorter one, so starting over with twice the length changes nothing.
        data = stream.digest(size)
        # A dict keeps the order of what is put in.
        chosen: dict[int, None] = {}
        for offset in range(0, size, 2):
            if len(chosen) == count:
                return tuple(chosen)
            number = (data[offset] << 8 | data[offset + 1]) & mask
            if takes(number):
                chosen[number] = None
        size *= 2


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _be(number: int) -> str:
    return "is" if number == 1 else "are"


__all__ = (
    "DEFAULT_LENGTH",
    "ECHO_LENGTHS",
    "ECHO_TRIPWIRES",
    "LONGEST",
    "LOWEST_PORT",
    "SEED_BYTES",
    "SHORTEST",
    "TRACEROUTE_PORTS",
    "Barred",
    "RandomSource",
    "check",
    "check_length",
    "check_protocols",
    "derive_echo_tripwires",
    "derive_tripwires",
    "generate",
    "generate_knocks",
    "is_round",
)
