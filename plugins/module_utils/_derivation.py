# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sequences that are derived from one secret, for controllers that can't keep files.

No error text of this module holds the secret or a port of a sequence.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import AbstractSet, Iterable

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import check_operators
from ansible_collections.fleet.portknock.plugins.module_utils._nmap_ports import nmap_ports
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._sequences import (
    DEFAULT_LENGTH,
    LOWEST_PORT,
    check_length,
    check_protocols,
    generate,
)

SHORTEST_SECRET = 16
DEFAULT_OPERATOR = "default"
DEFAULT_PROTECTED = ("22/tcp",)

_LABEL = b"fleet.portknock sequence version 1"
# 16 random hexadecimal digits have fewer different ones once in 30,000 times; 64 of them never do.
_FEWEST_CHARACTERS = 6
_HIGHEST_GENERATION = 2**31 - 1
_ASCII_BLANKS = " \t\n\r\v\f"
_ENCRYPTED = "$ANSIBLE_VAULT;"
_KINDS: tuple[tuple[tuple[type, ...], str], ...] = (
    ((bool,), "a boolean"),
    ((int, float), "a number"),
    ((bytes,), "bytes"),
    ((list, tuple), "a list"),
    ((dict,), "a mapping"),
)
_EXPECTED_SECRET = f"expected a random text of at least {SHORTEST_SECRET} bytes, such as openssl rand -hex 32 prints"


class _Stream:
    """Numbers that a key and a context give, the same ones for ever.

    Block number ``i`` of the stream is HMAC-SHA-256 of ``i`` as 8 bytes, big-endian, and the context.
    """

    def __init__(self, key: bytes, context: bytes) -> None:
        self._key = key
        self._context = context
        self._blocks = 0
        self._buffer = b""

    def randrange(self, stop: int, /) -> int:
        """A number below ``stop``, each equally likely.

        The fewest whole bytes that hold ``stop - 1`` are read, big-endian, and of these the fewest low bits. A number that is
        too large is thrown away; a remainder would make small ones likelier.
        """
        bits = (stop - 1).bit_length()
        while True:
            number = int.from_bytes(self._read((bits + 7) // 8), "big") & ((1 << bits) - 1)
            if number < stop:
                return number

    def _read(self, size: int) -> bytes:
        while len(self._buffer) < size:
            counted = self._blocks.to_bytes(8, "big") + self._context
            self._buffer += hmac.new(self._key, counted, hashlib.sha256).digest()
            self._blocks += 1
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data


def derive_sequence(
    secret: object,
    host: object,
    operator: object = DEFAULT_OPERATOR,
    generation: object = 1,
    *,
    length: object = DEFAULT_LENGTH,
    protocols: object = ("tcp",),
    protected: AbstractSet[int] = frozenset(),
) -> tuple[Knock, ...]:
    """Derive an operator's sequence on a host. Frozen as version 1: the same arguments give the same sequence for ever.

    The key is HMAC-SHA-256 of the secret's UTF-8 bytes, without blanks around it, under the label ``fleet.portknock sequence
    version 1``. The context is, each with its length as 4 bytes before it, big-endian: that label, the host's and the
    operator's name in UTF-8, the generation and the length in decimal digits, and the protocols in alphabetical order with
    commas between. From the numbers that these give (:class:`_Stream`) the sequence is drawn as :func:`generate` draws it,
    from ports that are neither in nmap's list as of version 1 nor protected.

    A protected port is passed by when it comes up, so that another list of them changes only those sequences, about 1 in
    10,000 for each port, in whose drawing one of the ports came up that were added or taken away.

    :param host: its name in the inventory. Names that are written differently are different hosts.
    :param generation: from 1; with it everything changes.
    :param protected: port numbers, whatever the protocol. Ports below 1024 or in nmap's list never come up.
    :raises PortknockError: bad input; neither the secret nor a text that was given in its place is quoted.
    """
    knocks = check_length(_whole_number(length), "length")
    kinds = sorted(check_protocols(protocols, "protocols"))
    fields = (
        _LABEL,
        _encoded(_check_host(host), "host"),
        _check_operator(operator).encode(),
        str(_check_generation(generation)).encode(),
        str(knocks).encode(),
        ",".join(kinds).encode(),
    )
    key = hmac.new(_LABEL, _check_secret(secret), hashlib.sha256).digest()
    excluded, more = excluded_ports(), {port for port in protected if port >= LOWEST_PORT}
    return generate(knocks, kinds, excluded | more if more else excluded, _Stream(key, _joined(fields)))


def excluded_ports() -> frozenset[int]:
    """The ports of nmap's list that version 1 leaves out, whatever a later release of nmap names."""
    return nmap_ports()


def _joined(fields: Iterable[bytes]) -> bytes:
    """No two lists of fields give the same bytes."""
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def _encoded(text: str, option: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        # The system's own text would quote it; so would the cause.
        raise PortknockError(f"{option}: expected text that UTF-8 can express; got half a character.") from None


def _check_secret(secret: object) -> bytes:
    if not isinstance(secret, str):
        raise PortknockError(f"secret: {_EXPECTED_SECRET}; got {_kind(secret)}.")
    # Whoever encrypts what a command prints encrypts the line's end with it.
    text = secret.strip(_ASCII_BLANKS)
    if text.startswith(_ENCRYPTED):
        raise PortknockError(
            f"secret: {_EXPECTED_SECRET}; got text that Ansible's vault has encrypted and nothing decrypted."
        )
    data = _encoded(text, "secret")
    if len(data) < SHORTEST_SECRET:
        raise PortknockError(f"secret: {_EXPECTED_SECRET}; got {len(data)} bytes.")
    if len(set(text)) < _FEWEST_CHARACTERS:
        raise PortknockError(
            f"secret: {_EXPECTED_SECRET}; got one of fewer than {_FEWEST_CHARACTERS} different characters."
        )
    # A text occurs inside of itself said twice only if it is a shorter one, repeated.
    if (text + text).find(text, 1) < len(text):
        raise PortknockError(f"secret: {_EXPECTED_SECRET}; got one that repeats itself.")
    return data


def _check_host(host: object) -> str:
    if isinstance(host, str) and host and not any(ord(character) < 0x20 for character in host):
        return host
    came = "one with a control character" if isinstance(host, str) and host else _kind(host)
    raise PortknockError(f"host: expected the host's name in the inventory; got {came}.")


def _check_operator(operator: object) -> str:
    try:
        return check_operators((operator,))[0]
    except PortknockError:
        raise PortknockError(
            "operator: expected a name as knock_server_operators takes it, 1 to 64 letters, digits, dots, hyphens and "
            f"underscores; got {_kind(operator)}."
        ) from None


def _check_generation(generation: object) -> int:
    number = _whole_number(generation)
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= _HIGHEST_GENERATION:
        raise PortknockError(
            f"generation: expected a whole number from 1 to {_HIGHEST_GENERATION}; got {generation!r}."
        )
    return number


def _whole_number(value: object) -> object:
    """The number that a text means: -e key=value on the command line gives text."""
    if isinstance(value, str) and len(value) <= len(str(_HIGHEST_GENERATION)) and value.isascii() and value.isdecimal():
        return int(value)
    return value


def _kind(value: object) -> str:
    """What came, without saying it."""
    if isinstance(value, str):
        return "another text" if value else "an empty text"
    if value is None:
        return "nothing"
    # Not the type's own name: Ansible's are other ones than Python's.
    return next((name for kinds, name in _KINDS if isinstance(value, kinds)), "a value of another type")


__all__ = ("DEFAULT_OPERATOR", "DEFAULT_PROTECTED", "SHORTEST_SECRET", "derive_sequence", "excluded_ports")
