# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._masking import masked

TABLE = """\
table inet t {{
  set open4 {{
    type ipv4_addr
    flags dynamic,timeout
  }}
  set trusted4 {{
    type ipv4_addr
    elements = {{ 192.0.2.1 }}
  }}
  map step {{
    type classid . inet_proto . inet_service : classid
    elements = {{
      0:0 . tcp . {port} : 1:1,
      1:1 . tcp . 40002 : 1:2,
    }}
  }}
  chain c {{
    tcp dport {{ 22, 80 }} accept
  }}
}}
"""


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("", TABLE.format(port=40001), "elements = { 2 secret elements }"),
        (TABLE.format(port=40001), TABLE.format(port=40001), "elements = { 2 secret elements }"),
        (TABLE.format(port=40003), TABLE.format(port=40001), "elements = { 2 other secret elements }"),
    ],
)
def test_secret_elements_are_counted_not_shown(before: str, after: str, said: str) -> None:
    shown_before, shown_after = masked(before, after)
    assert "4000" not in shown_before + shown_after
    assert said in shown_after
    assert ("elements = { 2 secret elements }" in shown_before) == bool(before)


def test_public_sets_and_rules_are_shown() -> None:
    shown = masked("", TABLE.format(port=40001))[1]
    assert "192.0.2.1" in shown
    assert "tcp dport { 22, 80 } accept" in shown


def test_a_secret_that_a_rule_repeats_is_hidden_there_too() -> None:
    rule = "# Copyright 2026\ntcp dport { 40001, 40002, 8080 } counter\n"
    shown = masked(rule + TABLE.format(port=40001), rule + TABLE.format(port=40003))
    assert "4000" not in shown[0] + shown[1]
    assert "# Copyright 2026" in shown[1]
    assert "8080" in shown[1]


def test_text_without_sets_is_left_as_it_is() -> None:
    assert masked("[Unit]\n", "[Unit]\nAfter=x\n") == ("[Unit]\n", "[Unit]\nAfter=x\n")


DOORS = "[1]\n    sequence = 40001:tcp,{port}:udp\n    seq_timeout = 40001\n"


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("", DOORS.format(port=40002), "    sequence = 2 secret knocks\n"),
        (DOORS.format(port=40002), DOORS.format(port=40002), "    sequence = 2 secret knocks\n"),
        (DOORS.format(port=40003), DOORS.format(port=40002), "    sequence = 2 other secret knocks\n"),
    ],
)
def test_knockd_s_sequences(before: str, after: str, said: str) -> None:
    first, second = masked(before, after)
    assert said in second
    assert "4000" not in first + second
    assert (first != second) is (before != after)


SETS = "#sets\ncreate fpk@-tcp bitmap:port range 0-65535\nadd fpk@-tcp 4{0}01\nadd fpk@-tcp 4{0}02\n#4\n*mangle\n"
RULES = "-A FPK-KNOCK-T -p tcp -m tcp --dport 4{0}01 -g FPK-T1-1\n-A FPK-TG1 -p udp --dport 4{0}02:4{0}03 -g FPK-U1\n"
PINGS = (
    "-A FPK-ECHO -m length --length 4{0}1:4{0}2 -g FPK-IG1\n-A FPK-IG1 -m length --length 4{0}1 -g FPK-IG1-1\n"
    "-A FPK-IW1 -m length --length 4{0}2 -g FPK-WRONG\n"
)
OPEN = "-A FPK-KNOCK -p icmp -m icmp --icmp-type 8 -m length --length 128:1228 -g FPK-ECHO\n"
OPEN += "-A FPK-DOOR-T -p tcp -m tcp --dport 2222 -j REDIRECT --to-ports 300\nCOMMIT\n"


def test_sets_and_rules_of_iptables() -> None:
    first, second = (SETS.format(number) + RULES.format(number) + PINGS.format(number) + OPEN for number in (7, 8))
    first, second = masked(first, second)
    for text in (first, second):
        assert not any(port in text for port in ("4701", "4702", "4703", "4801", "4802", "4803"))
        assert not any(length in text for length in ("471", "472", "481", "482"))
        assert "--length 128:1228" in text
        assert "--dport 2222" in text
    assert "\n2 secret elements\n" in first
    assert "\n2 other secret elements\n" in second
    assert "--dport (another secret) -g FPK-T1-1" in second
    same, again = masked(SETS.format(7) + RULES.format(7), SETS.format(7) + RULES.format(7))
    assert same == again
