# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What nft is told and what it says, as plain functions: nothing here runs it."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Optional

TABLE = "fleet_portknock"
# The sets that outlive a change of the ruleset: the open windows, and who opened them.
_OPEN_SETS = ("open4", "open6", "open_ll6")
# With single use, these do so too: what uses up a window while the rules change must find what others did before.
_USED_SETS = tuple(f"{name}{family}" for name in ("used", "begun_tcp", "begun_udp") for family in ("4", "6", "_ll6"))
_RECORD_SETS = ("opened4", "opened6", "opened_ll6")
# Which one-time sequences may open and which have: both outlive it, or neither, so that none that has opened does again.
_ONE_TIME_SETS = ("armed", "burnt")
# What differs from one load of the same text to the next, or counts.
_VOLATILE = frozenset(("handle", "position", "index", "packets", "bytes", "count", "metainfo", "expires"))
_MEMBERS = ("elem", "set")
_PARTS = re.compile(f'"(?:{"|".join(sorted((*_VOLATILE, *_MEMBERS)))})"')
_text = json.JSONEncoder(sort_keys=True).encode
_SIZE = re.compile(r"\bsize\s+([0-9]+)", re.ASCII)
_TIMEOUT = re.compile(r"\btimeout\s+([0-9]+)([dhms])", re.ASCII)
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


class Source(NamedTuple):
    """Where packets come from: an address, and for a link-local one the name of the interface that it is on."""

    address: str
    interface: Optional[str] = None

    def __str__(self) -> str:
        return f"{self.address}%{self.interface}" if self.interface else self.address


class Opening(NamedTuple):
    """That an operator opened the gate from a source.

    ``number`` is the operator's, in hexadecimal digits as the rules have it; ``ago`` says how many seconds the last time
    is past, ``times`` how often it was, None where that was lost.
    """

    number: str
    source: Source
    ago: int
    times: Optional[int]


class _Shape(NamedTuple):
    """What a set that outlives the rules can't change about itself: its size, and its elements' timeout in seconds."""

    size: Optional[int]
    timeout: Optional[int]


def replace_transaction(table_text: str, existing: Optional[Mapping[str, Any]]) -> str:
    """The text of the one transaction that puts ``table_text`` in place of the table that is loaded.

    The open windows and the records of openings stay as they are. Where the new text gives one of their sets another size
    or timeout, which nft can't change, the set is made anew with its elements and the time that each has left. Windows of a
    single-use gate are then left out: one may have been used up since it was listed.

    :param table_text: one ``table inet fleet_portknock { ... }`` block.
    :param existing: what ``nft -j list table inet fleet_portknock`` printed; None where there is no such table.
    """
    if existing is None:
        return table_text
    if not any(kind == "set" and found["name"] in _OPEN_SETS for kind, found in _objects(existing)):
        # Nothing to keep, and nft 0.9.8 crashes where it should put the gate in place of the table for a boot that fails.
        return f"delete table inet {TABLE}\n{table_text}"
    # A text without windows, the one for a boot that fails, leaves them alone.
    has_windows = _wanted_shape(table_text, _OPEN_SETS[0]) is not None
    lines = [f"flush table inet {TABLE}"]
    elements = []
    keeps_one_time = has_one_time(table_text) and set(_ONE_TIME_SETS) <= {
        found["name"] for kind, found in _objects(existing) if kind == "set"
    }
    for kind, found in _objects(existing):
        if kind not in ("set", "map"):
            continue
        name = found["name"]
        if name in _ONE_TIME_SETS and keeps_one_time:
            continue
        if name in (*_OPEN_SETS, *_USED_SETS, *_RECORD_SETS):
            wanted = _wanted_shape(table_text, name)
            if not has_windows or wanted == _Shape(found.get("size"), found.get("timeout")):
                continue
            if name in _kept_sets(existing):
                elements.extend(_add_elements(found, wanted))
        lines.append(f"delete {kind} inet {TABLE} {name}")
    # After the maps, whose verdicts may lead to chains.
    lines.extend(f"delete chain inet {TABLE} {found['name']}" for kind, found in _objects(existing) if kind == "chain")
    return "\n".join((*lines, table_text.rstrip("\n"), *elements)) + "\n"


def kept_elements(table_text: str, existing: Mapping[str, Any]) -> str:
    """Commands that add the windows and records of a listing again, in a table made anew, for the time that each has left.

    Without the records' counts, over which nft 0.9.8 crashes, and without a single-use gate's windows, one of which may have
    been used up since it was listed.
    """
    return "".join(
        f"{command}\n"
        for kind, found in _objects(existing)
        if kind == "set" and found["name"] in _kept_sets(existing)
        for command in _add_elements(found, _wanted_shape(table_text, found["name"]), counts=False)
    )


def windows(listing: Mapping[str, Any]) -> set[Source]:
    """The sources that have an open window."""
    return {
        Source(key[-1], key[0] if len(key) > 1 else None)
        for kind, found in _objects(listing)
        if kind == "set" and found["name"] in _OPEN_SETS
        for key, _element in _elements(found)
    }


def openings(listing: Mapping[str, Any]) -> list[Opening]:
    """Who opened the gate from where: one record a source and operator."""
    records = []
    for kind, found in _objects(listing):
        if kind == "set" and found["name"] in _RECORD_SETS:
            for key, element in _elements(found):
                lasts = element.get("timeout", found.get("timeout", 0))
                records.append(
                    Opening(
                        number=key[-1].rpartition(":")[2],
                        source=Source(key[-2], key[0] if len(key) > 2 else None),
                        ago=max(0, lasts - element["expires"]),
                        times=element.get("counter", {}).get("packets"),
                    )
                )
    return records


def forget_openings(table_text: str) -> str:
    """The text with commands behind it that empty its records of openings."""
    return (
        table_text.rstrip("\n")
        + "".join(f"\nflush set inet {TABLE} {name}" for name in _RECORD_SETS if _wanted_shape(table_text, name))
        + "\n"
    )


def has_one_time(table_text: str) -> bool:
    """Whether the text is of a gate with one-time sequences."""
    return "\n  set armed {" in table_text


def without_armed(kernel_text: str) -> str:
    """The kernel's table as nft lists it, without the one-time sequences that may open: some will have, by the next load."""
    return re.sub(r"(\bset armed \{[^{}]*?)\s*elements = \{[^{}]*\}", r"\1", kernel_text)


def read_listing(output: str) -> Optional[dict[str, Any]]:
    """What ``nft -j list table`` printed, as a listing; None where it holds none.

    nft 0.9.8 prints its warnings in front of it, on standard output: it can't say a rule that writes to a map in JSON, and
    puts its text in.
    """
    start = output.find('{"nftables"')
    if start < 0:
        return None
    try:
        listing = json.loads(output[start:])
    except ValueError:
        return None
    return listing if isinstance(listing, dict) else None


def is_dormant(listing: Mapping[str, Any]) -> bool:
    """Whether the table has flags: the gate's has none, and one that is dormant lets everything pass."""
    return any(kind == "table" and found.get("flags") for kind, found in _objects(listing))


def normalise(listing: Mapping[str, Any]) -> dict[str, str]:
    """The listing of a table as texts that are the same for every load of the same rules by the same version of nft.

    Left out are handles, counts and the elements of sets that rules write. A rule, its place in its chain, a chain's hook
    and policy, a set's attributes and the elements of a set that only nft writes are all in it.

    :returns: a text for each chain (with its rules), set and map, and the table itself, by kind and name (``chain lock``).
    """
    objects: dict[str, list[Any]] = {}
    for kind, found in _objects(listing):
        if kind == "rule":
            # Listed after its chain, in the order in which the rules are gone through.
            objects.setdefault(f"chain {found['chain']}", []).append(_stable(found))
            continue
        if kind in ("set", "map") and ("timeout" in found.get("flags", ()) or found["name"] in _ONE_TIME_SETS):
            found = {key: value for key, value in found.items() if key != "elem"}
        objects.setdefault(f"{kind} {found['name']}", []).insert(0, _stable(found))
    return {name: _text(parts) for name, parts in objects.items()}


def listing_digests(listing: Mapping[str, Any]) -> dict[str, str]:
    """A digest of each of :func:`normalise`'s texts: SHA-256, the first 64 bits in hex.

    To be compared only with those that the same version of nft listed.
    """
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in normalise(listing).items()}


def close_window(address: str, interface: Optional[str]) -> list[str]:
    """Texts that end the open window of one source; nft refuses one where there is no such window.

    :param interface: name of the interface that a link-local source is on.
    """
    source = ipaddress.ip_address(address)
    if source.version == 4:
        return [f"delete element inet {TABLE} open4 {{ {source} }}\n"]
    if source.is_link_local:
        return [f'delete element inet {TABLE} open_ll6 {{ "{interface}" . {source} }}\n'] if interface else []
    return [f"delete element inet {TABLE} open6 {{ {source} }}\n"]


def _kept_sets(listing: Mapping[str, Any]) -> tuple[str, ...]:
    """The sets whose elements may be added again."""
    return _RECORD_SETS if _is_single_use(listing) else (*_OPEN_SETS, *_RECORD_SETS)


def _is_single_use(listing: Mapping[str, Any]) -> bool:
    return any(kind == "set" and found["name"] in _USED_SETS for kind, found in _objects(listing))


def _objects(listing: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in listing.get("nftables", ()):
        for kind, found in entry.items():
            if kind != "metainfo":
                yield kind, found


def _wanted_shape(table_text: str, name: str) -> Optional[_Shape]:
    block = re.search(r"\bset\s+" + name + r"\s*\{([^{}]*)", table_text)
    if block is None:
        return None
    size, timeout = _SIZE.search(block.group(1)), _TIMEOUT.search(block.group(1))
    return _Shape(
        int(size.group(1)) if size else None, int(timeout.group(1)) * _UNITS[timeout.group(2)] if timeout else None
    )


def _elements(found: Mapping[str, Any]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """The elements of a set whose time isn't over, each with the parts of its key."""
    for entry in found.get("elem", ()):
        element = entry.get("elem") if isinstance(entry, dict) else None
        if isinstance(element, dict) and element.get("expires"):
            value = element["val"]
            # An interface that has gone is listed by its number.
            yield [str(part) for part in (value["concat"] if isinstance(value, dict) else [value])], element


def _add_elements(found: Mapping[str, Any], wanted: Optional[_Shape], counts: bool = True) -> list[str]:
    """Commands that add a listed set's elements again, those that last longest first: a smaller set may not hold all."""
    name, live = found["name"], []
    if wanted is None:
        return []
    for parts, element in _elements(found):
        if name in ("open_ll6", "opened_ll6"):
            if parts[0].isdecimal():
                continue  # nft doesn't take an interface's number back
            parts[0] = f'"{parts[0]}"'
        timeout, expires = element.get("timeout", found.get("timeout")), element["expires"]
        if wanted.timeout is not None:
            timeout, expires = wanted.timeout, expires + wanted.timeout - timeout
        if expires > 0:
            count = element.get("counter") if counts else None
            text = f"counter packets {count['packets']} bytes {count['bytes']} " if count else ""
            live.append((expires, timeout, f"{' . '.join(parts)} {text}timeout {timeout}s expires {expires}s"))
    live.sort(reverse=True)
    return [f"add element inet {TABLE} {name} {{ {text} }}" for _expires, _timeout, text in live[: wanted.size]]


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _stable_members(inner) if key in _MEMBERS and isinstance(inner, list) else _stable(inner)
            for key, inner in value.items()
            if key not in _VOLATILE
        }
    if isinstance(value, list):
        return [_stable(inner) for inner in value]
    return value


def _stable_members(members: list[Any]) -> list[Any]:
    """In one order: nft lists the members of a set in whatever order."""
    # A gate has thousands, and few of them hold anything that is left out.
    has_parts = _PARTS.search(_text(members)) is not None
    return sorted(map(_stable, members) if has_parts else members, key=_text)


__all__ = (
    "TABLE",
    "Opening",
    "Source",
    "close_window",
    "forget_openings",
    "has_one_time",
    "is_dormant",
    "kept_elements",
    "listing_digests",
    "normalise",
    "openings",
    "read_listing",
    "replace_transaction",
    "windows",
    "without_armed",
)
