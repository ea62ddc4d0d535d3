# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the supervisor of daemons reads in the kernel's answers and in its settings; the rest needs a kernel."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCE = ROOT / "roles/knock_server/templates/opener/opener.py"
UP, LOOPBACK, RUNNING = 0x1, 0x8, 0x40

# What kernel 6.18 answered in a namespace with lo and v0, one end of a pair that is plugged into a bridge: one message each,
# of the interfaces without what is not read.
LINK_LO = bytes.fromhex("2800000010000200010000004534000000000403010000004900010000000000070003006c6f0000")
LINK_PORT = bytes.fromhex(
    "9c01000010000200010000004534000000000100030000004310010000000000070003007630000008000a00040000006c01120009000100"
    "76657468000000000b0004006272696467650000500105000500010000000000060002002000000008000300020000000500040000000000"
    "05000500000000000500060000000000050007000000000005001c00000000000500080001000000050009000100000005001b0001000000"
    "05001e000100000005000a000000000005000c00000000000c000d008000ee81711ad0070c000e008000ee81711ad00706000f0001800000"
    "0600100000000000060011000180000006001200010000000500130000000000050014000000000005001d000000000006001f0000000000"
    "05002000000000000500230000000000050024000000000005002100000000000500270000000000050028000000000005002b0000000000"
    "0c00150000000000000000000c00160000000000000000000c00170000000000000000000500190001000000080025000002000008002600"
    "00000000080029000000000008002a0000000000"
)
ADDRESS_4 = bytes.fromhex(
    "4c000000140002000100000045340000022080000300000008000100c000020908000200c000020107000300763000000800080080000000"
    "14000600ffffffffffffffff6f9467006f946700"
)
ADDRESS_6 = bytes.fromhex(
    "480000001400020001000000453400000a408200030000001400010020010db800000000000000000000000114000600ffffffffffffffff"
    "6f9467006f9467000800080082000000"
)


@pytest.fixture
def opener(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    specification = importlib.util.spec_from_file_location("opener", SOURCE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "opener", module)
    specification.loader.exec_module(module)
    return module


def test_links(opener: ModuleType) -> None:
    (lo,) = opener.links_in(LINK_LO)
    assert (lo.number, lo.name, lo.flags & (UP | LOOPBACK), lo.master) == (1, "lo", UP | LOOPBACK, "")
    (port,) = opener.links_in(LINK_PORT)
    assert (port.name, port.flags & (UP | LOOPBACK), port.master) == ("v0", UP, "bridge")
    assert list(opener.links_in(LINK_LO + LINK_PORT)) == [lo, port]


def test_addresses(opener: ModuleType) -> None:
    """Of two ends, this side's own."""
    assert [address for _index, address in opener.addresses_in(ADDRESS_4 + ADDRESS_6)] == ["192.0.2.1", "2001:db8::1"]
    assert list(opener.addresses_in(LINK_LO)) == []


@pytest.mark.parametrize("length", [0, 7, 16, 30, 40, 100])
def test_a_message_that_is_cut_off_is_no_error(opener: ModuleType, length: int) -> None:
    assert {link.name for link in opener.links_in(LINK_PORT[:length])} <= {"v0", ""}
    assert {address for _index, address in opener.addresses_in(ADDRESS_4[:length])} <= {"192.0.2.1", "192.0.2.9"}


def test_where_a_daemon_is_to_listen(opener: ModuleType) -> None:
    links = [
        opener.Link(1, "lo", UP | LOOPBACK, ""),
        opener.Link(2, "eth0", UP | RUNNING, ""),
        opener.Link(3, "down", RUNNING, ""),
        opener.Link(4, "bare", UP, ""),
        opener.Link(5, "port", UP, "bridge"),
        opener.Link(6, "slave", UP, "bond"),
        opener.Link(7, "red", UP, "vrf"),
        opener.Link(8, "unknown", UP, "?"),
    ]
    addresses = [(link.number, f"192.0.2.{link.number}") for link in links if link.name != "bare"]
    found = opener.sniffable(links, [*addresses, (2, "2001:db8::1"), (99, "192.0.2.99")])
    assert found == {
        2: opener.Interface(2, "eth0", frozenset({"192.0.2.2", "2001:db8::1"})),
        7: opener.Interface(7, "red", frozenset({"192.0.2.7"})),
    }


def test_settings(opener: ModuleType) -> None:
    text = json.dumps({"argv": ["/bin/d", "-i", "{interface}"], "expand": ["a.conf"], "memory": 5, "one_time": "b"})
    assert opener.read_settings(text) == (["/bin/d", "-i", "{interface}"], ["a.conf"], 5, "b", False, "", [], [])
    assert opener.read_settings('{"argv": ["d"]}') == (["d"], [], 0, "", False, "", [], [])
    assert opener.read_settings('{"argv": ["d"], "everywhere": true, "state": "/s"}')[4:6] == (True, "/s")
    keys = opener.read_settings('{"argv": ["d"], "gnupg": {"keys": ["QQ=="], "trusted": ["F0"]}}')
    assert keys[6:] == (["QQ=="], ["F0"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"argv": []}',
        '{"argv": [1]}',
        '{"argv": ["a"], "memory": "x"}',
        '{"argv": ["a"], "everywhere": 1}',
        '{"argv": ["a"], "gnupg": {"keys": [1]}}',
        '{"argv": ["a"], "gnupg": []}',
    ],
)
def test_settings_that_say_nothing(opener: ModuleType, text: str) -> None:
    with pytest.raises(opener.OpenerError, match=r"opener\.json: expected argv"):
        opener.read_settings(text)


def test_what_is_filled_in(opener: ModuleType) -> None:
    text = "{folder}/x -i {interface} {run}/y {other} {} { folder }"
    assert opener.expanded(text, "/etc/f", "eth0", "/run/r") == "/etc/f/x -i eth0 /run/r/y {other} {} { folder }"


def test_a_folder_that_says_nothing(opener: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(opener.OpenerError, match=r"opener\.json: expected to be able to read it; got No such file"):
        opener.main(str(tmp_path))


def test_the_one_time_sequences_that_are_waited_for(opener: ModuleType) -> None:
    """Of each operator those that may open and the next, eight in all."""
    parts = {(number, identity): f"[{number}-{identity:x}]\n" for number in ("1", "a") for identity in range(1, 31)}
    text = "[options]\n" + "".join(f"# one-time {number} {one:x}\n{part}" for (number, one), part in parts.items())
    # Ids are a host's, not an operator's; these two have the same ones.
    chosen, ids = opener.selected(text, {5, 6})
    assert ids == set(range(5, 13))
    assert chosen == "[options]\n" + "".join(parts[number, one] for number in ("1", "a") for one in range(5, 13))
    assert opener.selected(text, {29}) == (
        "[options]\n" + "".join(parts[n, o] for n in "1a" for o in (29, 30)),
        {29, 30},
    )
    assert opener.selected(text, set()) == ("[options]\n", frozenset())
    assert opener.selected("[options]\n", {1}) == ("[options]\n", frozenset())
