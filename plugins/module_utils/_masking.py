# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rules as they may be shown in a diff: the elements of sets and maps are secret unless they are known to be public."""

from __future__ import annotations

import re
from typing import Callable, Iterator, Match

# Sets that hold what the inventory says openly. Whatever isn't named here is masked, so that a new set starts secret.
PUBLIC_SETS = frozenset({"protected_tcp", "protected_udp", "served_tcp", "served_udp", "trusted4", "trusted6"})
_SET = re.compile(
    r"(?P<kind>\b(?:set|map)\s+)(?P<name>[A-Za-z0-9_]+)"
    r"(?P<head>\s*\{(?:[^{}]|\{[^{}]*\})*?elements\s*=\s*\{)(?P<elements>[^{}]*)\}"
)

# As knockd's configuration has them.
_SEQUENCE = re.compile(r"^(?P<head>\s*sequence\s*=\s*)(?P<knocks>\S.*)$", re.MULTILINE | re.IGNORECASE)
# As fwknopd's has them.
_KEY = re.compile(
    r"^(?P<head>\s*(?:(?:HMAC_)?KEY(?:_BASE64)?|GPG_(?:DECRYPT|SIGNING)_PW)[ \t]+)(?P<key>\S.*)$",
    re.MULTILINE | re.IGNORECASE,
)
# As the supervisor's settings have GnuPG's.
_BLOB = re.compile(r"[A-Za-z0-9+/]{200,}={0,2}")
# As sets of ipset and rules of iptables have them.
_MEMBERS = re.compile(r"(?:^add fpk@-(?:tcp|udp|trip) [0-9]+\n)+", re.MULTILINE)
_RULE = re.compile(
    r"^(?P<head>-A FPK-(?:(?:KNOCK-[TU]|[TU]G[0-9]+) .*--dport|(?:ECHO|I[GW][0-9]+) .*--length) )(?P<ports>[0-9:]+)",
    re.MULTILINE,
)
_NUMBER = re.compile(r"(?<![\w.])[0-9]{4,5}(?![\w.])")


def masked(before: str, after: str) -> tuple[str, str]:
    """Both texts with secret elements, sequences and keys replaced; where only these differ, the second says so."""
    old = {match.group("name"): _split(match) for match in _SET.finditer(before)}

    def hide(match: Match[str]) -> str:
        if match.group("name") in PUBLIC_SETS:
            return match.group(0)
        return (
            f"{match.group('kind')}{match.group('name')}{match.group('head')} {len(_split(match))} secret elements }}"
        )

    def hide_and_compare(match: Match[str]) -> str:
        hidden = hide(match)
        changed = match.group("name") in old and old[match.group("name")] != _split(match)
        return hidden.replace("secret elements", "other secret elements") if changed else hidden

    sequences = {match.group("knocks") for match in _SEQUENCE.finditer(before)}

    def hide_sequence(match: Match[str]) -> str:
        other = " other" if before and match.group("knocks") not in sequences else ""
        return f"{match.group('head')}{match.group('knocks').count(',') + 1}{other} secret knocks"

    # A template of the user's own may say them in a rule, too.
    secret = {number for text in (before, after) for number in _secret_numbers(text)}

    def hide_number(match: Match[str]) -> str:
        return "(secret)" if match.group(0) in secret else match.group(0)

    keys = {match.group("key") for match in _KEY.finditer(before)}

    def hide_key(match: Match[str]) -> str:
        other = "another " if keys and match.group("key") not in keys else ""
        return f"{match.group('head')}({other}secret)"

    blobs = set(_BLOB.findall(before))

    def hide_blob(match: Match[str]) -> str:
        return f"({'another ' if before and match.group(0) not in blobs else ''}secret)"

    members, rules = set(_MEMBERS.findall(before)), set(_RULE.findall(before))

    def hide_members(match: Match[str]) -> str:
        other = " other" if before and match.group(0) not in members else ""
        lines = match.group(0).count("\n")
        return f"{lines}{other} secret elements\n"

    def hide_ports(match: Match[str]) -> str:
        other = "another " if before and match.groups() not in rules else ""
        return f"{match.group('head')}({other}secret)"

    shown = _SET.sub(hide, before), _SET.sub(hide_and_compare, after)
    shown = _hidden(shown[0], hide_members, hide_ports), _hidden(shown[1], hide_members, hide_ports)
    shown = _BLOB.sub(hide_blob, shown[0]), _BLOB.sub(hide_blob, shown[1])
    first, second = (_NUMBER.sub(hide_number, _KEY.sub(hide_key, _SEQUENCE.sub(hide_sequence, text))) for text in shown)
    return first, second


def _hidden(text: str, members: Callable[[Match[str]], str], ports: Callable[[Match[str]], str]) -> str:
    return _RULE.sub(ports, _MEMBERS.sub(members, text))


def _secret_numbers(text: str) -> Iterator[str]:
    for match in _SET.finditer(text):
        if match.group("name") not in PUBLIC_SETS:
            yield from _NUMBER.findall(match.group("elements"))
    for match in _SEQUENCE.finditer(text):
        yield from _NUMBER.findall(match.group("knocks"))
    for pattern in (_MEMBERS, _RULE):
        for match in pattern.finditer(text):
            yield from _NUMBER.findall(match.group(0))


def _split(match: Match[str]) -> list[str]:
    return sorted(element.strip() for element in match.group("elements").split(",") if element.strip())


__all__ = ("PUBLIC_SETS", "masked")
