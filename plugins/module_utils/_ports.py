# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ports and knocks as people write them: ``22/tcp``, and ``300/icmp`` for an echo request with 300 bytes of payload.

``22/tcp/spa:KEY:HMAC`` is one packet (single packet authorization) that asks for 22/tcp: encrypted with a key of 32 bytes and
authenticated with one of 64, both in base64. ``@192.0.2.7`` after that says for which address it asks, where it is not the one
that it leaves from.
"""

from __future__ import annotations

import re
from typing import AbstractSet, NamedTuple, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError

PROTOCOLS = ("tcp", "udp")
# What a client can knock with.
KNOCK_PROTOCOLS = (*PROTOCOLS, "icmp")
# And all that it can send.
SPA = "spa"
# What a gate is opened with: ports in their order, or one packet with a one-time token.
SEQUENCE = "sequence"
# The same with keys of GnuPG's.
GNUPG = "gnupg"
MODES = (SEQUENCE, SPA, GNUPG)
SENT_PROTOCOLS = (*KNOCK_PROTOCOLS, SPA)
HIGHEST_PORT = 65535
# Bytes of payload: what the 16 bits of an IPv4 packet's length leave beside its own header and that of the echo request.
LONGEST_PAYLOAD = 65535 - 20 - 8
_BASE64 = r"[A-Za-z0-9+/]"
_KEYS = rf"{_BASE64}{{43}}=:{_BASE64}{{86}}=="
_GNUPG_KEY = rf"[0-9A-F]{{40}}:{_BASE64}{{400,8000}}={{0,2}}"
_GNUPG_KEYS = rf"{GNUPG}:{_BASE64}{{86}}==:{_GNUPG_KEY}:{_GNUPG_KEY}"
_KNOCK = re.compile(
    rf"([0-9]{{1,5}})/([a-z]+)(?:/{SPA}:((?:{_KEYS}|{_GNUPG_KEYS})(?:@[0-9]{{1,3}}(?:\.[0-9]{{1,3}}){{3}})?))?",
    re.ASCII,
)


class Knock(NamedTuple):
    """One port of one protocol: a knock, or a port to protect. For icmp ``port`` is the payload's length.

    With ``spa``, which is secret, it is one packet that asks for that port: the two keys (or GnuPG's: the HMAC's, one's own and
    the other side's), and the address that it asks for.
    """

    port: int
    proto: str
    spa: str = ""

    def __str__(self) -> str:
        return f"{self.port}/{self.proto}/{SPA}:{self.spa}" if self.spa else f"{self.port}/{self.proto}"

    def is_among(self, ports: AbstractSet[int]) -> bool:
        """Whether it goes to one of these ports: an echo request goes to none."""
        return self.proto != "icmp" and self.port in ports


def parse_knock(value: object, option: str, secret: bool = False, protocols: Sequence[str] = PROTOCOLS) -> Knock:
    """Read ``port/proto``.

    :param value: what the user gave.
    :param option: the option's name, for the error.
    :param secret: leave the value out of the error.
    :param protocols: those that are taken.
    :raises PortknockError: not ``port/proto``, a port outside 1-65535 (icmp: a length outside 1-65507), or another protocol.
    """
    match = _KNOCK.fullmatch(value) if isinstance(value, str) else None
    if match is not None:
        knock = Knock(int(match.group(1)), match.group(2), match.group(3) or "")
        highest = LONGEST_PAYLOAD if knock.proto == "icmp" else HIGHEST_PORT
        known = [proto for proto in protocols if proto != SPA]
        if knock.spa:
            known = [*PROTOCOLS] if SPA in protocols else []
        if 1 <= knock.port <= highest and knock.proto in known:
            return knock
    came = "another value" if secret else repr(value)
    lengths = f" (or bytes/icmp, 1 to {LONGEST_PAYLOAD})" if "icmp" in protocols else ""
    raise PortknockError(
        f"{option}: expected port/protocol, a port from 1 to {HIGHEST_PORT} and tcp or udp{lengths}, such as 22/tcp; got {came}."
    )


def parse_knocks(
    values: object, option: str, secret: bool = False, protocols: Sequence[str] = PROTOCOLS
) -> tuple[Knock, ...]:
    """Read a list of ``port/proto``; the same port of one protocol twice is an error.

    :param protocols: those that are taken.
    :raises PortknockError: not a list, an element that is not ``port/proto``, or an element that comes twice.
    """
    if not isinstance(values, (list, tuple)):
        came = "another type" if secret else repr(values)
        raise PortknockError(f"{option}: expected a list such as [22/tcp]; got {came}.")
    knocks = tuple(parse_knock(value, option, secret, protocols) for value in values)
    for index, knock in enumerate(knocks):
        if knock in knocks[:index]:
            came = "one" if secret else str(knock)
            raise PortknockError(f"{option}: expected each port once; got {came} twice.")
    return knocks


def parse_sequences(value: object, option: str, protocols: Sequence[str] = PROTOCOLS) -> list[tuple[Knock, ...]]:
    """Read one sequence, a list of ``port/proto``, or a list of them in the order in which a client tries them.

    A sequence that comes again is left out.

    :param protocols: those that are taken.
    :raises PortknockError: neither, nothing at all, or a sequence without a knock; no value is in the text.
    """
    if not isinstance(value, (list, tuple)) or not value:
        came = "an empty list" if isinstance(value, (list, tuple)) else "another type"
        raise PortknockError(
            f"{option}: expected a sequence, which is a list of port/protocol, or a list of sequences; got {came}."
        )
    given = list(value) if isinstance(value[0], (list, tuple)) else [value]
    sequences: dict[tuple[Knock, ...], None] = {}
    for knocks in given:
        sequence = parse_knocks(knocks, option, secret=True, protocols=protocols)
        if not sequence:
            raise PortknockError(f"{option}: expected at least one knock in each sequence; got an empty list.")
        sequences[sequence] = None
    return list(sequences)


__all__ = (
    "GNUPG",
    "HIGHEST_PORT",
    "KNOCK_PROTOCOLS",
    "LONGEST_PAYLOAD",
    "MODES",
    "PROTOCOLS",
    "SENT_PROTOCOLS",
    "SEQUENCE",
    "SPA",
    "Knock",
    "parse_knock",
    "parse_knocks",
    "parse_sequences",
)
