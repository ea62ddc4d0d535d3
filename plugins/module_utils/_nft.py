# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What nft is told and what it says, as plain functions: nothing here runs it."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Optional

TABLE = "fleet_portknock"
# The sets that outlive a change of the ruleset.
_OPEN_SETS = ("open4", "open6", "open_ll6")
# With single use, these do so too: what uses up a window while the rules change must find what others did before.
_USED_SETS = tuple(f"{name}{family}" for name in ("used", "begun_tcp", "begun_udp") for family in ("4", "6", "_ll6"))
# What differs from one load of the same text to the next, or counts.
_VOLATILE = frozenset(("handle", "position", "index", "packets", "bytes", "count", "metainfo", "expires"))
_SIZE = re.compile(r"\bsize\s+([0-9]+)", re.ASCII)


def replace_transaction(table_text: str, existing: Optional[Mapping[str, Any]]) -> str:
    """The text of the one transaction that puts ``table_text`` in place of the table that is loaded.

    The open windows stay as they are. Where the new text gives one of their sets another size, which nft can't change,
    the set is made anew with its elements and the time that each has left. Those of a single-use gate are made anew without:
    a window may have been used up since it was listed.

    :param table_text: one ``table inet fleet_portknock { ... }`` block.
    :param existing: what ``nft -j list table inet fleet_portknock`` printed; None where there is no such table.
    """
    if existing is None:
        return table_text
    if not any(kind == "set" and found["name"] in _OPEN_SETS for kind, found in _objects(existing)):
        # Nothing to keep, and nft 0.9.8 crashes where it should put the gate in place of the table for a boot that fails.
        return f"delete table inet {TABLE}\n{table_text}"
    # A text without windows, the one for a boot that fails, leaves them alone.
    has_windows = _wanted_size(table_text, _OPEN_SETS[0]) is not None
    lines = [f"flush table inet {TABLE}"]
    elements = []
    for kind, found in _objects(existing):
        if kind not in ("set", "map"):
            continue
        name = found["name"]
        if name in (*_OPEN_SETS, *_USED_SETS):
            size = _wanted_size(table_text, name)
            if not has_windows or size == found.get("size"):
                continue
            if name in _OPEN_SETS and not _is_single_use(existing):
                elements.extend(_add_elements(name, found.get("elem", ()), size))
        lines.append(f"delete {kind} inet {TABLE} {name}")
    # After the maps, whose verdicts may lead to chains.
    lines.extend(f"delete chain inet {TABLE} {found['name']}" for kind, found in _objects(existing) if kind == "chain")
    return "\n".join((*lines, table_text.rstrip("\n"), *elements)) + "\n"


def open_windows(table_text: str, existing: Mapping[str, Any]) -> str:
    """Commands that open the windows of a listing again, in a table made anew, for the time that each has left.

    None for a single-use gate's: one may have been used up since it was listed.
    """
    if _is_single_use(existing):
        return ""
    return "".join(
        f"{command}\n"
        for kind, found in _objects(existing)
        if kind == "set" and found["name"] in _OPEN_SETS
        for command in _add_elements(found["name"], found.get("elem", ()), _wanted_size(table_text, found["name"]))
    )


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
        if kind in ("set", "map") and "timeout" in found.get("flags", ()):
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


def _is_single_use(listing: Mapping[str, Any]) -> bool:
    return any(kind == "set" and found["name"] in _USED_SETS for kind, found in _objects(listing))


def _objects(listing: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in listing.get("nftables", ()):
        for kind, found in entry.items():
            if kind != "metainfo":
                yield kind, found


def _wanted_size(table_text: str, name: str) -> Optional[int]:
    block = re.search(r"\bset\s+" + name + r"\s*\{([^{}]*)", table_text)
    size = _SIZE.search(block.group(1)) if block else None
    return int(size.group(1)) if size else None


def _add_elements(name: str, elements: Any, size: Optional[int]) -> list[str]:
    """Commands that add elements of a listing again, those that last longest first: a smaller set may not hold all."""
    live = []
    for entry in elements:
        element = entry.get("elem") if isinstance(entry, dict) else None
        if not isinstance(element, dict) or not element.get("expires"):
            continue
        value = element["val"]
        parts = value["concat"] if isinstance(value, dict) else [value]
        # An interface that has gone is listed by its number, which nft doesn't take back.
        if all(isinstance(part, str) for part in parts):
            quoted = [f'"{part}"' for part in parts[:-1]]
            live.append((element["expires"], element["timeout"], " . ".join((*quoted, parts[-1]))))
    live.sort(reverse=True)
    return [
        f"add element inet {TABLE} {name} {{ {key} timeout {timeout}s expires {expires}s }}"
        for expires, timeout, key in live[:size]
    ]


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            # nft lists the members of a set in whatever order.
            key: sorted(map(_stable, inner), key=_text)
            if key in ("elem", "set") and isinstance(inner, list)
            else _stable(inner)
            for key, inner in value.items()
            if key not in _VOLATILE
        }
    if isinstance(value, list):
        return [_stable(inner) for inner in value]
    return value


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


__all__ = (
    "TABLE",
    "close_window",
    "is_dormant",
    "listing_digests",
    "normalise",
    "open_windows",
    "read_listing",
    "replace_transaction",
)
