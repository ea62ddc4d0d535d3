# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Listings as three versions of nft printed them: a gate with two tripwires and one window of each kind open for an hour."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._nft import (
    TABLE,
    Opening,
    Source,
    close_window,
    forget_openings,
    kept_elements,
    listing_digests,
    normalise,
    openings,
    read_listing,
    replace_transaction,
    windows,
)

VERSIONS = ("0.9.8", "1.0.6", "1.1.3")
OPEN_SETS = ("open4", "open6", "open_ll6")


def text(size: int = 65536) -> str:
    sets = "".join(f"  set {name} {{\n    type x\n    size {size}\n  }}\n" for name in OPEN_SETS)
    return f"table inet {TABLE} {{\n{sets}}}\n"


@pytest.fixture(params=VERSIONS)
def listing(request: pytest.FixtureRequest) -> dict[str, Any]:
    printed = (Path(__file__).parent / "nft_listings" / f"{request.param}.txt").read_text()
    found = read_listing(printed)
    assert found is not None
    assert found["nftables"][0]["metainfo"]["version"] == request.param
    return found


def objects(listing: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [entry[kind] for entry in listing["nftables"] if kind in entry]


def named(listing: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    return next(found for found in objects(listing, kind) if found["name"] == name)


@pytest.mark.parametrize("printed", ["", "Error: No such file or directory\n", '{"nftables": [', "warning: x\n"])
def test_no_listing(printed: str) -> None:
    assert read_listing(printed) is None


def test_without_a_table_the_text_is_all() -> None:
    assert replace_transaction(text(), None) == text()


def test_a_table_without_windows_goes_as_a_whole(listing: dict[str, Any]) -> None:
    listing["nftables"] = [entry for entry in listing["nftables"] if entry.get("set", {}).get("name") not in OPEN_SETS]
    assert replace_transaction(text(), listing) == f"delete table inet {TABLE}\n{text()}"


def test_everything_but_the_windows_goes(listing: dict[str, Any]) -> None:
    lines = replace_transaction(text(), listing).splitlines()
    assert lines[0] == f"flush table inet {TABLE}"
    wanted = [
        f"delete {kind} inet {TABLE} {found['name']}"
        for kind in ("set", "map", "chain")
        for found in objects(listing, kind)
        if found["name"] not in OPEN_SETS
    ]
    count = len(wanted)
    assert sorted(lines[1 : count + 1]) == sorted(wanted)
    kinds = [line.split()[1] for line in lines[1 : count + 1]]
    assert kinds.index("chain") == len(kinds) - kinds.count("chain"), "a map's verdicts may lead to chains"
    assert "\n".join(lines[count + 1 :]) + "\n" == text()


def test_another_size_makes_the_windows_anew(listing: dict[str, Any]) -> None:
    lines = replace_transaction(text(1000), listing).splitlines()
    for name in OPEN_SETS:
        assert f"delete set inet {TABLE} {name}" in lines
    after = lines[lines.index("}") + 1 :]
    left = {name: named(listing, "set", name)["elem"][0]["elem"]["expires"] for name in OPEN_SETS}
    assert after == [
        f"add element inet {TABLE} open4 {{ 192.0.2.9 timeout 3600s expires {left['open4']}s }}",
        f"add element inet {TABLE} open6 {{ 2001:db8::9 timeout 3600s expires {left['open6']}s }}",
        f'add element inet {TABLE} open_ll6 {{ "gate-d" . fe80::9 timeout 3600s expires {left["open_ll6"]}s }}',
    ]


def test_windows_that_can_t_be_kept(listing: dict[str, Any]) -> None:
    """One that is about to end, one on an interface that has gone, and the shorter ones where there is no room."""
    named(listing, "set", "open_ll6")["elem"][0]["elem"]["val"]["concat"][0] = 7
    named(listing, "set", "open6")["elem"][0]["elem"]["expires"] = 0
    named(listing, "set", "open4")["elem"] = [
        {"elem": {"val": f"192.0.2.{left}", "timeout": 30, "expires": left}} for left in (5, 29, 17)
    ]
    lines = replace_transaction(text(2), listing).splitlines()
    assert [line.split("{")[1] for line in lines if line.startswith("add element")] == [
        " 192.0.2.29 timeout 30s expires 29s }",
        " 192.0.2.17 timeout 30s expires 17s }",
    ]


def test_a_text_without_windows_leaves_them(listing: dict[str, Any]) -> None:
    transaction = replace_transaction(f"table inet {TABLE} {{\n}}\n", listing)
    assert not any(f"{TABLE} {name}" in transaction for name in OPEN_SETS)


USED_SETS = tuple(f"{kind}{family}" for kind in ("used", "begun_tcp", "begun_udp") for family in ("4", "6", "_ll6"))


def single_use_text(size: int = 65536) -> str:
    sets = "".join(f"  set {name} {{\n    size {size}\n  }}\n" for name in (*OPEN_SETS, *USED_SETS))
    return f"table inet {TABLE} {{\n{sets}}}\n"


@pytest.fixture
def single_use(listing: dict[str, Any]) -> dict[str, Any]:
    """The listing of a gate whose windows are good for one connection."""
    sets = [{"set": {"name": name, "size": 65536, "flags": ["timeout"]}} for name in USED_SETS]
    sets[0]["set"]["elem"] = [{"elem": {"val": "192.0.2.8", "timeout": 30, "expires": 20}}]
    return {"nftables": [*listing["nftables"], *sets]}


def test_used_windows_stay_used(single_use: dict[str, Any]) -> None:
    for text_of in (single_use_text(), f"table inet {TABLE} {{\n}}\n"):
        lines = replace_transaction(text_of, single_use).splitlines()
        assert not any(line.endswith((*OPEN_SETS, *USED_SETS)) for line in lines if line.startswith("delete"))


def test_no_window_of_a_single_use_gate_is_opened_again(single_use: dict[str, Any]) -> None:
    """It may have been used up since it was listed; and an element without its limit would let everything through."""
    for text_of in (single_use_text(1000), text(1000)):
        lines = replace_transaction(text_of, single_use).splitlines()
        assert {f"delete set inet {TABLE} {name}" for name in (*OPEN_SETS, *USED_SETS)} <= set(lines)
        assert not any(line.startswith("add element") for line in lines)
    assert kept_elements(single_use_text(), single_use) == ""


def test_windows_last_from_one_kind_of_gate_to_the_other(listing: dict[str, Any], single_use: dict[str, Any]) -> None:
    there, back = replace_transaction(single_use_text(), listing), replace_transaction(text(), single_use)
    assert not any(f"delete set inet {TABLE} {name}" in there + back for name in OPEN_SETS)
    assert all(f"delete set inet {TABLE} {name}\n" in back for name in USED_SETS)
    assert kept_elements(single_use_text(), listing).count("add element") == 3


RECORD_SETS = {"opened4": "192.0.2.9", "opened6": "2001:db8::9", "opened_ll6": "fe80::9"}


def with_records(listing: dict[str, Any], days: int = 30) -> dict[str, Any]:
    """A gate of which operator 26 opened each family ten days and 1 s ago, five times."""
    for name, address in RECORD_SETS.items():
        key = [*(["gate-d"] if name == "opened_ll6" else []), address, "2:1a"]
        element = {"val": {"concat": key}, "expires": (days - 10) * 86400 - 1, "counter": {"packets": 5, "bytes": 300}}
        found = {"name": name, "table": TABLE, "size": 65536, "flags": ["timeout"], "timeout": days * 86400}
        listing["nftables"].append({"set": {**found, "elem": [{"elem": element}]}})
    return listing


def text_with_records(days: int) -> str:
    sets = "".join(f"  set {name} {{\n    timeout {days}d\n    size 65536\n  }}\n" for name in RECORD_SETS)
    return text().replace("{\n", "{\n" + sets, 1)


def test_the_records(listing: dict[str, Any]) -> None:
    assert openings(listing) == []
    ago = 10 * 86400 + 1
    assert openings(with_records(listing)) == [
        Opening("1a", Source("192.0.2.9"), ago, 5),
        Opening("1a", Source("2001:db8::9"), ago, 5),
        Opening("1a", Source("fe80::9", "gate-d"), ago, 5),
    ]
    # One that was added again, by nft 0.9.8 or when another time was set.
    element = named(listing, "set", "opened4")["elem"][0]["elem"]
    del element["counter"]
    element["timeout"] = 40 * 86400
    assert openings(listing)[0] == Opening("1a", Source("192.0.2.9"), ago + 10 * 86400, None)
    assert [str(record.source) for record in openings(listing)] == ["192.0.2.9", "2001:db8::9", "fe80::9%gate-d"]


def test_the_windows(listing: dict[str, Any]) -> None:
    assert windows(listing) == {Source("192.0.2.9"), Source("2001:db8::9"), Source("fe80::9", "gate-d")}


def test_records_stay_as_they_are(listing: dict[str, Any]) -> None:
    transaction = replace_transaction(text_with_records(30), with_records(listing))
    assert not any(f"set inet {TABLE} {name}" in transaction for name in RECORD_SETS)
    assert "add element" not in transaction


def test_another_time_keeps_when_it_was(listing: dict[str, Any]) -> None:
    lines = replace_transaction(text_with_records(11), with_records(listing)).splitlines()
    assert [line for line in lines if line.startswith("delete set")][-3:] == [
        f"delete set inet {TABLE} {name}" for name in RECORD_SETS
    ]
    left, count = 86400 - 1, "counter packets 5 bytes 300 timeout 950400s"
    assert lines[lines.index("}") + 1 :] == [
        f"add element inet {TABLE} opened4 {{ 192.0.2.9 . 2:1a {count} expires {left}s }}",
        f"add element inet {TABLE} opened6 {{ 2001:db8::9 . 2:1a {count} expires {left}s }}",
        f'add element inet {TABLE} opened_ll6 {{ "gate-d" . fe80::9 . 2:1a {count} expires {left}s }}',
    ]
    assert "add element" not in replace_transaction(text_with_records(10), listing)


def test_records_that_nobody_wants_go(listing: dict[str, Any]) -> None:
    lines = replace_transaction(text(), with_records(listing)).splitlines()
    assert {f"delete set inet {TABLE} {name}" for name in RECORD_SETS} <= set(lines)
    assert not any(line.startswith("add element") for line in lines)


def test_a_text_without_windows_leaves_records(listing: dict[str, Any]) -> None:
    transaction = replace_transaction(f"table inet {TABLE} {{\n}}\n", with_records(listing))
    assert not any(f"{TABLE} {name}" in transaction for name in RECORD_SETS)


def test_a_table_made_anew_has_them_without_counts(listing: dict[str, Any]) -> None:
    kept = kept_elements(text_with_records(30), with_records(listing))
    assert [line.split()[4] for line in kept.splitlines()] == [*OPEN_SETS, *RECORD_SETS]
    assert "counter" not in kept
    assert kept_elements(f"table inet {TABLE} {{\n}}\n", listing) == ""


def test_forgetting() -> None:
    wanted = text_with_records(30)
    assert forget_openings(wanted) == wanted + "".join(f"flush set inet {TABLE} {name}\n" for name in RECORD_SETS)
    assert forget_openings(text()) == text()


def _handles(listing: dict[str, Any]) -> None:
    for entry in listing["nftables"]:
        for found in entry.values():
            found["handle"] = found.get("handle", 0) + 100


def _elements(listing: dict[str, Any]) -> None:
    for name in OPEN_SETS:
        named(listing, "set", name).pop("elem")
    named(listing, "map", "at4")["elem"] = [["192.0.2.1", "1:1"]]


def _order(listing: dict[str, Any]) -> None:
    named(listing, "map", "step")["elem"].reverse()
    listing["nftables"].sort(key=lambda entry: "set" in entry)
    for rule in objects(listing, "rule"):
        for part in rule["expr"]:
            if isinstance(part, dict) and "vmap" in part:
                part["vmap"]["data"]["set"].reverse()


def _counts(listing: dict[str, Any]) -> None:
    named(listing, "map", "at4")["count"] = 5


@pytest.mark.parametrize("change", [_handles, _elements, _order, _counts])
def test_what_comes_and_goes_is_not_in_the_digest(
    listing: dict[str, Any], change: Callable[[dict[str, Any]], None]
) -> None:
    before = copy.deepcopy(listing)
    change(listing)
    assert normalise(listing) == normalise(before)
    assert listing_digests(listing) == listing_digests(before)


def test_the_counts_of_elements_are_not_in_the_digest(listing: dict[str, Any]) -> None:
    def counted(packets: int) -> list[Any]:
        element = {"val": "192.0.2.1", "counter": {"packets": packets, "bytes": 40}}
        return ["198.51.100.0", {"elem": element}]

    named(listing, "set", "trusted4")["elem"] = counted(1)
    before = listing_digests(listing)
    named(listing, "set", "trusted4")["elem"] = counted(2)[::-1]
    assert listing_digests(listing) == before


def _rules_swapped(listing: dict[str, Any]) -> None:
    rules = [entry for entry in listing["nftables"] if entry.get("rule", {}).get("chain") == "pre"]
    rules[0]["rule"], rules[1]["rule"] = rules[1]["rule"], rules[0]["rule"]


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "rule gone": lambda listing: listing["nftables"].remove({"rule": objects(listing, "rule")[-1]}),
    "rule changed": lambda listing: objects(listing, "rule")[3]["expr"].append({"accept": None}),
    # Up to 1.0.6 these are text, since nft has no JSON for them.
    "rule that writes to a map": lambda listing: next(
        rule for rule in objects(listing, "rule") if "add @at4" in str(rule) or "'map': '@at4'" in str(rule)
    )["expr"].pop(),
    "rules in another order": _rules_swapped,
    "chain gone": lambda listing: listing["nftables"].remove({"chain": objects(listing, "chain")[0]}),
    "policy": lambda listing: named(listing, "chain", "pre").update(policy="drop"),
    "priority": lambda listing: named(listing, "chain", "pre").update(prio=0),
    "element gone": lambda listing: named(listing, "map", "step")["elem"].pop(),
    "element more": lambda listing: named(listing, "set", "trusted4")["elem"].append("198.51.100.0"),
    "set's size": lambda listing: named(listing, "set", "open4").update(size=1),
    "step timeout": lambda listing: named(listing, "map", "at4").update(timeout=50),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_a_change_is_in_the_digest(listing: dict[str, Any], name: str) -> None:
    before = listing_digests(listing)
    CHANGES[name](listing)
    assert listing_digests(listing) != before


@pytest.mark.parametrize(
    ("address", "interface", "commands"),
    [
        ("192.0.2.9", None, [f"delete element inet {TABLE} open4 {{ 192.0.2.9 }}\n"]),
        ("2001:db8::9", "eth0", [f"delete element inet {TABLE} open6 {{ 2001:db8::9 }}\n"]),
        ("fe80::9", "eth0", [f'delete element inet {TABLE} open_ll6 {{ "eth0" . fe80::9 }}\n']),
        ("fe80::9", None, []),
    ],
)
def test_closing_a_window(address: str, interface: str | None, commands: list[str]) -> None:
    assert close_window(address, interface) == commands
