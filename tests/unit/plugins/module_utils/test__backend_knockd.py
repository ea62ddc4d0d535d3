# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the back end knockd finds on a host; what it opens is in tests/netns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils import _backend_knockd
from ansible_collections.fleet.portknock.plugins.module_utils._backend_knockd import Knockd
from ansible_collections.fleet.portknock.plugins.module_utils._system import Completed

HELP = "  -i, --interface <int>  network interface to listen on\n  -4, --only-ip-v4       do not track ipv6\n"


class Host:
    """Answers for nft and knockd."""

    def __init__(
        self, help_text: str = HELP, nft: str = "nftables v1.0.6 (Lester Gooch #5)", counts: bool = True
    ) -> None:
        self._help, self._nft, self._counts = help_text, nft, counts

    def __call__(self, argv: Sequence[str], stdin: Optional[str] = None) -> Completed:
        if argv[0] == "nft" and argv[1] == "--version":
            return Completed(0, self._nft, "") if self._nft else Completed(127, "", "")
        if argv[0] == "/usr/sbin/knockd":
            return Completed(0, self._help, "")
        crashes = not self._counts and " counter packets " in (stdin or "")
        # What rules can't do, a command need not.
        lacks = " quota until " in (stdin or "") or "meta time" in (stdin or "")
        return Completed(-11 if crashes else int(lacks), "", "")


def test_what_rules_can_t_do_the_command_does() -> None:
    assert Knockd(Host()).capabilities() == {
        "one_time": True,
        "clock": True,
        "socket_wildcard": True,
        "echo": True,
        "ipv6": True,
        "counts": True,
    }


def test_a_knockd_without_ipv6_and_an_nft_that_crashes() -> None:
    """As Debian 11 has them."""
    found = Knockd(Host("  -i, --interface <int>\n", counts=False)).capabilities()
    assert (found["ipv6"], found["counts"]) == (False, False)


def test_missing_programs(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend_knockd, "_DAEMON", f"{tmp_path}/none")
    assert Knockd(Host(nft="")).missing_programs() == ["nft", "knockd"]
    assert Knockd(Host()).missing_programs() == ["knockd"]
    monkeypatch.setattr(_backend_knockd, "_DAEMON", "/bin/sh")
    assert Knockd(Host()).missing_programs() == []


def test_every_file_of_the_opener_is_the_gate_s() -> None:
    assert Knockd.files.keys() > set(Knockd.opener_files)
    assert Knockd.opener_files[0] == "opener"
    assert Knockd.files["knockd_conf"].mode == 0o600
    assert Knockd.files["opener_settings"].mode & 0o077 == 0
