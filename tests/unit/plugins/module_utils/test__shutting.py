# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is ended, and over what; with a real kernel in tests/netns/test_audit.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._nft import Opening, Source
from ansible_collections.fleet.portknock.plugins.module_utils._phases import GateChange
from ansible_collections.fleet.portknock.plugins.module_utils._procnet import Peer, Session
from ansible_collections.fleet.portknock.plugins.module_utils._shutting import find, shut
from ansible_collections.fleet.portknock.plugins.module_utils._system import Completed

ALICES, BOBS, BOTHS = Source("192.0.2.1"), Source("2001:db8::2"), Source("192.0.2.3")
UNKNOWN, LOCAL = Source("192.0.2.4"), Source("fe80::5", "eth0")
# Where bob has knocked, and alice after him.
SINCE = Source("192.0.2.6")
RECORDS = [
    Opening("1", ALICES, 5, 1),
    Opening("1a", BOBS, 5, 1),
    Opening("1a", BOTHS, 5, 1),
    Opening("1", BOTHS, 5, 1),
    Opening("1a", LOCAL, 5, None),
    Opening("1a", SINCE, 9, 4),
    Opening("1", SINCE, 8, 1),
]
BOB = frozenset((0x1A,))
SSH = frozenset((22,))


class Enforcer:
    """A gate with windows and records."""

    def __init__(self, windows: set[Source], closes: bool = True) -> None:
        self.open = windows
        self._closes = closes

    def listing(self) -> Optional[dict[str, Any]]:
        return {}

    def windows(self, _listing: dict[str, Any]) -> set[Source]:
        return set(self.open)

    def openings(self, _listing: dict[str, Any]) -> list[Opening]:
        return RECORDS

    def close_window(self, peer: Peer) -> None:
        if self._closes:
            self.open.discard(Source(*peer))


class Kernel:
    """Sessions as /proc lists them, and the ss that ends them."""

    def __init__(self, proc: Path, *sessions: Session, ends: bool = True) -> None:
        self.proc = str(proc)
        self.asked: list[list[str]] = []
        self._file = proc / "net/tcp6"
        self._file.parent.mkdir()
        self._sessions = list(sessions)
        self._ends = ends
        self._write()

    def _write(self) -> None:
        lines = ["header"]
        for port, address, peer in self._sessions:
            packed = Source(address).address
            lines.append(f"0: {'0' * 32}:{port:04X} {_words(packed)}:{peer:04X} 01 rest")
        self._file.write_text("\n".join(lines))

    def __call__(self, argv: Sequence[str], stdin: Optional[str] = None) -> Completed:
        self.asked.append(list(argv))
        there = [one for one in self._sessions if f":{one.peer_port}" in argv[argv.index("dst") + 1]]
        if "--kill" in argv and self._ends:
            self._sessions = [one for one in self._sessions if one not in there]
            self._write()
        return Completed(0, "ESTAB\n" if there and "eth1" not in argv else "", "")


def _words(address: str) -> str:
    import ipaddress

    parsed = ipaddress.ip_address(address)
    packed = parsed.packed if parsed.version == 6 else bytes(10) + b"\xff\xff" + parsed.packed
    if sys.byteorder == "little":
        packed = b"".join(packed[start : start + 4][::-1] for start in range(0, 16, 4))
    return packed.hex().upper()


def sessions(*sources: Source) -> list[Session]:
    return [Session(22, source.address, 40000 + index) for index, source in enumerate(sources)]


def test_what_is_theirs(tmp_path: Path) -> None:
    enforcer = Enforcer({ALICES, BOBS, BOTHS, UNKNOWN, LOCAL, SINCE})
    alice, bob, both, other_port = *sessions(ALICES, BOBS, BOTHS), Session(80, BOBS.address, 50000)
    kernel = Kernel(tmp_path, alice, bob, both, other_port)
    found = find(enforcer, BOB, SSH, (), kernel, kernel.proc)  # type: ignore[arg-type]
    assert set(found.windows) == {BOBS, BOTHS, LOCAL, UNKNOWN}
    assert set(found.sessions) == {(bob, BOBS), (both, BOTHS)}
    assert enforcer.open == {ALICES, BOBS, BOTHS, UNKNOWN, LOCAL, SINCE}


def test_nothing_but_theirs_ends(tmp_path: Path) -> None:
    enforcer = Enforcer({ALICES, BOBS})
    alice, bob = sessions(ALICES, BOBS)
    kernel = Kernel(tmp_path, alice, bob)
    done = shut(enforcer, BOB, SSH, True, (), kernel, kernel.proc)  # type: ignore[arg-type]
    assert done == {"windows_closed": 1, "sessions_ended": 1, "sessions_left": 0, "warnings": []}
    assert enforcer.open == {ALICES}
    (argv,) = [argv for argv in kernel.asked if "--kill" in argv]
    assert " ".join(argv) == "ss --kill --no-header --numeric --tcp state connected dst [2001:db8::2]:40001 sport = :22"


def test_sessions_stay_where_nobody_asked(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, *sessions(BOBS, BOTHS))
    done = shut(Enforcer({BOBS}), BOB, SSH, False, (), kernel, kernel.proc)  # type: ignore[arg-type]
    assert done == {"windows_closed": 1, "sessions_ended": 0, "sessions_left": 2, "warnings": []}
    assert kernel.asked == []


def test_a_window_that_does_not_close_is_told(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    done = shut(Enforcer({BOBS}, closes=False), BOB, SSH, True, (), kernel, kernel.proc)  # type: ignore[arg-type]
    assert done["windows_closed"] == 0
    assert done["warnings"] == ["shut: the window of 2001:db8::2 can't be closed."]


@pytest.mark.parametrize(("interface", "ended"), [("eth0", 1), ("eth1", 0)])
def test_a_link_local_session_is_one_interface_s(tmp_path: Path, interface: str, ended: int) -> None:
    class Local(Enforcer):
        def openings(self, _listing: dict[str, Any]) -> list[Opening]:
            return [Opening("1a", Source("fe80::5", interface), 5, 1)]

    kernel = Kernel(tmp_path, *sessions(LOCAL))
    done = shut(Local(set()), BOB, SSH, True, (), kernel, kernel.proc)  # type: ignore[arg-type]
    assert (done["sessions_ended"], done["sessions_left"]) == (ended, 0)


class Gate:
    """What a confirmation asks of a host."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def confirm(self, _wanted: object, _run: str) -> list[str]:
        self._calls.append("confirmed")
        return []


def change(tmp_path: Path, calls: list[str], **payload: object) -> GateChange:
    class Noting(Enforcer):
        def close_window(self, peer: Peer) -> None:
            calls.append(f"closed {peer.address}")
            super().close_window(peer)

    kernel = Kernel(tmp_path)
    given = {"run": "aa", "protected": ["22/tcp", "53/udp"], **payload}
    return GateChange(Gate(calls), Noting({BOBS}), object(), given, 0, kernel)  # type: ignore[arg-type]


def test_they_are_cut_off_after_the_confirmation(tmp_path: Path) -> None:
    calls: list[str] = []
    done = change(tmp_path, calls, shut=[0x1A]).confirm()
    assert calls == ["confirmed", "closed 2001:db8::2"]
    assert done is not None
    assert done["windows_closed"] == 1


def test_nothing_to_change_is_no_reason_to_leave_them(tmp_path: Path) -> None:
    calls: list[str] = []
    asked = change(tmp_path, calls, shut=[0x1A])
    assert (asked.settled() or {})["changed"] is True
    assert (asked.settled() or {})["changed"] is False
    assert calls == ["closed 2001:db8::2"]


def test_nobody_to_shut_out(tmp_path: Path) -> None:
    calls: list[str] = []
    assert change(tmp_path, calls).confirm() == {}
    assert calls == ["confirmed"]


def test_a_failure_after_the_confirmation_is_a_warning(tmp_path: Path) -> None:
    """The gate stands; the run must not take it for a change that has gone back."""
    asked = change(tmp_path, [], shut=[0x1A])

    def fail() -> None:
        raise PortknockError("nft can't list the gate's table.")

    asked._enforcer.listing = fail  # type: ignore[method-assign]
    done = asked.confirm()
    assert done is not None
    assert done["warnings"] == [
        "shut: whether what they opened has ended is not known: nft can't list the gate's table."
    ]
