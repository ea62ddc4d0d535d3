# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the back end makes of nft's answers, with an nft that answers as told: the real one doesn't fail on demand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Optional

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._backend_nftables import Nftables
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._system import Completed

TEXT = "table inet fleet_portknock {\n  set open4 { type ipv4_addr; flags dynamic,timeout; size 8; }\n}\n"
WINDOW = {"elem": {"val": "192.0.2.7", "timeout": 30, "expires": 12}}
LISTING: dict[str, Any] = {
    "nftables": [
        {"metainfo": {"version": "1.0.6"}},
        {"table": {"family": "inet", "name": "fleet_portknock", "handle": 1}},
        {"set": {"name": "open4", "type": "ipv4_addr", "size": 8, "flags": ["timeout", "dynamic"], "elem": [WINDOW]}},
        {"chain": {"name": "pre", "handle": 2}},
    ]
}
ABSENT = Completed(1, "", "Error: No such file or directory\nlist table inet fleet_portknock\n")
# nft quotes what it refuses.
REFUSED = Completed(
    1, "", "/dev/stdin:7:3-9: Error: syntax error, unexpected junk\n  0:0 . tcp . 48396 : junk\n  ^^^^^^^\n"
)
CRASHED = Completed(-11, "", "")
FINE = Completed(0, "", "")


class Nft:
    """Answers in turn, and keeps what it was asked."""

    def __init__(self, *answers: Completed) -> None:
        self._answers = list(answers)
        self.asked: list[Optional[str]] = []

    def __call__(self, argv: Sequence[str], stdin: Optional[str] = None) -> Completed:
        self.asked.append(stdin)
        return self._answers.pop(0)


def test_a_change_leaves_the_windows_where_they_are() -> None:
    nft = Nft(FINE)
    Nftables(nft).load(TEXT, LISTING)
    assert "flush table" in str(nft.asked[0])
    assert "delete set inet fleet_portknock open4" not in str(nft.asked[0])


def test_a_crash_of_nft_is_got_round_and_loses_no_window() -> None:
    nft = Nft(CRASHED, FINE)
    Nftables(nft).load(TEXT, LISTING)
    assert str(nft.asked[1]).startswith("add table inet fleet_portknock; delete table inet fleet_portknock; ")
    assert str(nft.asked[1]).endswith("add element inet fleet_portknock open4 { 192.0.2.7 timeout 30s expires 12s }\n")


def test_what_the_kernel_has_can_be_loaded_again() -> None:
    """By nft 0.9.8, too, which crashes over elements with counts; and a time is not a local one."""
    listed = (
        "table inet fleet_portknock {\n set opened4 {\n elements = { 192.0.2.7 . 2:1 counter packets 3 bytes 87 expires 29d,\n"
        "192.0.2.8 . 2:1 counter packets 1 bytes 9 timeout 30d expires 2d }\n }\n"
        " chain c {\n counter packets 7 bytes 70\n update @opened4 { ip saddr . meta priority counter }\n }\n}\n"
    )
    text = Nftables(Nft(Completed(0, f"warning\n{listed}", ""))).kernel_text()
    assert text is not None
    assert "{ 192.0.2.7 . 2:1 expires 29d,\n192.0.2.8 . 2:1 timeout 30d expires 2d }" in text
    assert "chain c {\n counter packets 7 bytes 70\n update @opened4 { ip saddr . meta priority counter }" in text
    assert Nftables(Nft()).restore_command("/former") == "TZ=UTC nft -f /former"


@pytest.mark.parametrize("flags", [["dormant"], "dormant"])
def test_a_dormant_table_is_made_anew(flags: object) -> None:
    listing = {"nftables": [{"table": {"name": "fleet_portknock", "flags": flags}}]}
    nft = Nft(FINE)
    Nftables(nft).load(TEXT, listing)
    assert str(nft.asked[0]).startswith("add table inet fleet_portknock; delete table")


def test_no_table_is_not_the_same_as_no_answer() -> None:
    assert Nftables(Nft(ABSENT)).listing() is None
    assert Nftables(Nft(Completed(127, "", ""))).listing() is None
    assert Nftables(Nft(Completed(0, json.dumps(LISTING), ""))).listing() == LISTING
    for answer in (CRASHED, Completed(0, "", ""), Completed(1, "", "Error: Operation not permitted")):
        with pytest.raises(PortknockError, match=r"^nft can't list the gate's table \(.*\)\.$"):
            Nftables(Nft(answer)).listing()


def test_a_refusal_says_where_and_not_what() -> None:
    with pytest.raises(PortknockError) as raised:
        Nftables(Nft(REFUSED)).check({"gate": TEXT, "closed": TEXT})
    assert str(raised.value) == (
        "gate.nft.j2: expected rules that nft accepts; it refuses them (line 7: syntax error)."
    )


def test_the_kernels_reason_is_passed_on() -> None:
    refused = Completed(1, "", "/dev/stdin:3:1-9: Error: Could not process rule: Operation not supported\n 48396\n")
    with pytest.raises(PortknockError, match=r"\(line 3: Operation not supported\)"):
        Nftables(Nft(refused)).load(TEXT, None)


def test_what_is_missing_is_named() -> None:
    # One call for everything, then one for each that is needed: the second of them is refused.
    nft = Nft(REFUSED, FINE, REFUSED, Completed(0, "nftables v0.8.2 (Joe Btfsplk)\n", ""))
    with pytest.raises(PortknockError) as raised:
        Nftables(nft).capabilities()
    assert str(raised.value).startswith(
        "knock_server_backend: nftables needs deleting set elements in a rule; this host's nft 0.8.2 and kernel refuse it"
    )


ONE_TIME = TEXT.replace(
    "\n}\n",
    "\n  # Operator a with one-time sequences: alice\n  # Operator 1f with one-time sequences: b.ob\n"
    "  set armed {\n    type classid\n  }\n  set burnt {\n    type classid\n    flags dynamic\n    size 65535\n  }\n}\n",
)


def with_sets(*names: str) -> dict[str, Any]:
    sets = [{"set": {"name": name, "type": "classid", "elem": ["7:1"]}} for name in names]
    return {"nftables": [*LISTING["nftables"], *sets]}


def test_what_may_open_once_and_what_has_stay_together() -> None:
    """One without the other would let something open again."""
    for names, text, gone in (
        (("armed", "burnt"), ONE_TIME, []),
        (("armed",), ONE_TIME, ["armed"]),
        (("burnt",), ONE_TIME, ["burnt"]),
        (("armed", "burnt"), TEXT, ["armed", "burnt"]),
    ):
        nft = Nft(FINE)
        Nftables(nft).load(text, with_sets(*names))
        asked = str(nft.asked[0])
        assert [name for name in names if f"delete set inet fleet_portknock {name}\n" in asked] == gone


def test_a_table_made_anew_arms_nothing() -> None:
    nft = Nft(CRASHED, FINE)
    Nftables(nft).load(ONE_TIME, with_sets("armed", "burnt"))
    assert "add element inet fleet_portknock armed" not in str(nft.asked[1])


def test_the_gate_s_own_program_arms() -> None:
    nft = Nft(FINE)
    Nftables(nft).arm({"gate": ONE_TIME, "stock": "the program"})
    assert nft.asked == ["the program"]
    Nftables(Nft()).arm({"gate": TEXT, "stock": "the program"})
    with pytest.raises(PortknockError, match=r"^The one-time sequences can't be armed: no space\.$"):
        Nftables(Nft(Completed(1, "", "<2>no space.\n"))).arm({"gate": ONE_TIME, "stock": "the program"})


def test_a_kernel_s_rules_are_kept_without_what_is_armed() -> None:
    listed = (
        "table inet fleet_portknock {\n\tset armed {\n\t\ttype classid\n\t\telements = { 7:1, 7:2,\n\t\t\t     7:3 }\n\t}\n"
        "\tset burnt {\n\t\ttype classid\n\t\telements = { 7:1 quota 87 bytes }\n\t}\n}\n"
    )
    kept = Nftables(Nft(Completed(0, listed, ""))).kernel_text()
    assert kept == (
        "table inet fleet_portknock {\n\tset armed {\n\t\ttype classid\n\t}\n"
        "\tset burnt {\n\t\ttype classid\n\t\telements = { 7:1 quota 87 bytes }\n\t}\n}\n"
    )


def test_operators_of_one_time_sequences_have_their_names_in_the_rules() -> None:
    assert Nftables(Nft()).one_time_operators(ONE_TIME) == {"10": "alice", "31": "b.ob"}
    assert Nftables(Nft()).one_time_operators(TEXT) == {}


@pytest.mark.parametrize("answer", [Completed(1, "", "<2>why"), Completed(0, "junk", ""), Completed(0, "[]", "")])
def test_a_stock_that_can_t_be_counted(answer: Completed) -> None:
    assert Nftables(Nft(answer)).stock(ONE_TIME) == {}
    assert Nftables(Nft(Completed(0, '{"operators": {}, "last": 7}\n', ""))).stock(ONE_TIME) == {
        "operators": {},
        "last": 7,
    }
