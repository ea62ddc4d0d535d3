# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The back end knockd as the outside sees it, with Debian's own knockd: what it opens, what it does not, and what it can't."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._nft import openings, windows
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._stock import draw
from netlab import HOST4, SEQUENCE, SSH, TABLE, Lab, network, wait_for
from openlab import SECONDS, Opener, is_open_soon, knocks_open, wait_until_open
from scapy.layers.inet import TCP
from test_one_time import Host, module_of

ALICE, BOB = SEQUENCE, (Knock(61003, "tcp"), Knock(20202, "tcp"), Knock(44444, "udp"))
pytestmark = pytest.mark.skipif(not shutil.which("knockd", path="/usr/sbin:/sbin"), reason="needs knockd")


@pytest.fixture
def opener(lab: Lab, tmp_path: Path) -> Iterator[Opener]:
    made = Opener(lab, tmp_path)
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def ready(lab: Lab, opener: Opener) -> Opener:
    """A gate for alice and bob at which knockd listens; no window is open."""
    opener.gate(sequences={"alice": [ALICE], "bob": [BOB]})
    listen(lab, opener)
    return opener


def listen(lab: Lab, opener: Opener) -> None:
    """Start it, and wait until it hears."""
    opener.start()
    wait_until_open(lab, lab.source())
    opener.close()


@pytest.mark.parametrize("family", [4, 6])
def test_a_door_for_each_operator(lab: Lab, ready: Opener, family: int) -> None:
    alice, bob, stranger = (lab.source(family) for _ in range(3))
    lab.touch(alice, *ALICE)
    assert is_open_soon(lab, alice)
    lab.touch(bob, *BOB)
    assert is_open_soon(lab, bob)
    assert lab.look(stranger) == "reset"
    listing = lab.listing() or {}
    assert {str(source) for source in windows(listing)} == {alice, bob}
    records = {(str(one.source), one.number, one.times) for one in openings(listing)}
    assert {(alice, "1", 1), (bob, "2", 1)} <= records


def test_who_opened_it_and_how_often(lab: Lab, ready: Opener) -> None:
    source = lab.source()

    def times() -> list[int | None]:
        return [one.times for one in openings(lab.listing() or {}) if str(one.source) == source]

    def is_noted() -> bool:
        before = times()
        lab.touch(source, *ALICE)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: times() != before, 0.5, "a record")
            return True
        return False

    seen = []
    for _ in range(3):
        wait_for(is_noted, SECONDS, "a record")
        seen += times()
    # One record for each source and operator. A knock that came late counts, too.
    assert len(seen) == 3
    assert seen[0] is not None
    assert seen == sorted({one for one in seen if one is not None})
    # Somebody who opens it has a window, whether or not there is a place left for a record.
    ready.stop()
    ready.gate(sequences={"alice": [ALICE]}, max_windows=2)
    lab.host.nft(f"flush set inet {TABLE} opened4\n")
    listen(lab, ready)
    lab.host.nft(
        "".join(
            f"add element inet {TABLE} opened4 {{ 10.0.0.{one} . 2:7 }}\n" for one in range(2 - lab.count("opened4"))
        )
    )
    assert knocks_open(lab, lab.source())


@pytest.mark.parametrize("wrong", ["order", "port", "missing", "protocol"])
def test_what_is_not_the_knock_opens_nothing(lab: Lab, ready: Opener, wrong: str) -> None:
    first, second, third = ALICE
    knocks = {
        "order": (first, third, second),
        "port": (first, Knock(second.port + 1, "udp"), third),
        "missing": (first, third),
        "protocol": (first, Knock(second.port, "tcp"), third),
    }[wrong]
    source = lab.source()
    lab.touch(source, *knocks)
    assert not is_open_soon(lab, source, seconds=0.3)


def test_only_a_syn_is_a_knock(lab: Lab, ready: Opener) -> None:
    """Nor does another packet that a client may send in between disturb."""
    source = lab.source()
    sport = lab.source_port()
    for flags in ("A", "F", "R", "FPU", ""):
        for knock in ALICE:
            if knock.proto == "udp":
                lab.touch(source, knock)
            else:
                lab.wire.send(network(source, HOST4) / TCP(sport=sport, dport=knock.port, flags=flags, seq=1))
    assert not is_open_soon(lab, source, seconds=0.3)
    source = lab.source()
    lab.touch(source, ALICE[0])
    lab.wire.send(network(source, HOST4) / TCP(sport=sport, dport=ALICE[2].port, flags="R", seq=1))
    lab.touch(source, *ALICE[1:])
    assert is_open_soon(lab, source)


def test_the_time_of_a_whole_sequence(lab: Lab, opener: Opener) -> None:
    """What has not come to an end by then is forgotten; nothing of it can be hurried."""
    opener.gate(step_timeout=1)
    assert "seq_timeout = 3\n" in (opener.folder / "knockd.conf").read_text()
    listen(lab, opener)
    late = lab.source()
    lab.touch(late, *SEQUENCE[:2])
    time.sleep(3.1)
    lab.touch(late, SEQUENCE[2])
    assert not is_open_soon(lab, late, seconds=0.3)


def test_whose_time_is_over(lab: Lab, opener: Opener) -> None:
    now = int(time.time())
    opener.gate(sequences={"alice": [ALICE], "bob": [BOB]}, validity={"bob": (now - 86400, now - 1)})
    listen(lab, opener)
    source = lab.source()
    lab.touch(source, *BOB)
    assert not is_open_soon(lab, source)
    opener.stop()
    opener.gate(sequences={"alice": [BOB], "bob": [ALICE]}, validity={"bob": (now - 86400, now + 86400)})
    listen(lab, opener)


def test_single_use(lab: Lab, opener: Opener) -> None:
    """A knock is good for one connection, and another knock for another one, from the same source."""
    opener.gate(single_use=True)
    opener.start()
    for family in (4, 6):
        source = lab.source(family)
        for _ in range(2):
            wait_until_open(lab, source)
            # A knock that was late may have opened it once more.
            wait_for(lambda source=source: lab.look(source) == "reset", SECONDS, "the window is used up")  # type: ignore[misc]


@pytest.mark.parametrize("family", [4, 6])
def test_a_close_sequence(lab: Lab, opener: Opener, family: int) -> None:
    """It shuts its own source's window, and nobody else's."""
    opener.gate(sequences={"alice": [ALICE]}, close={"alice": [BOB]}, open_window=600)
    opener.start()
    mine, other = lab.source(family), lab.source(family)
    wait_until_open(lab, mine)
    wait_until_open(lab, other)

    def is_shut() -> bool:
        lab.touch(mine, *BOB)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: lab.look(mine) == "reset", 0.5, "a window that is shut")
            return True
        return False

    wait_for(is_shut, SECONDS, "the window is shut")
    assert lab.look(other) == "open"


def test_a_burst_of_junk_does_no_harm(lab: Lab, ready: Opener) -> None:
    """Ports that are in no sequence are not even seen."""
    lab.flood(0, 20000, 9, "tcp")
    source = lab.source()
    lab.touch(source, *ALICE)
    assert is_open_soon(lab, source)


# What knockd can't: known, in docs/knockd.md, and pinned here, so that a release that can is noticed.


def test_a_knock_said_twice_spoils_the_try(lab: Lab, ready: Opener) -> None:
    source = lab.source()
    lab.touch(source, ALICE[0], *ALICE)
    assert not is_open_soon(lab, source, seconds=0.3)


def test_an_abandoned_try_spoils_the_next_one_and_no_more(lab: Lab, ready: Opener) -> None:
    source = lab.source()
    lab.touch(source, *ALICE[:2])
    lab.touch(source, *ALICE)
    assert not is_open_soon(lab, source, seconds=0.3)
    lab.touch(source, *ALICE)
    assert is_open_soon(lab, source)


def test_of_two_who_knock_at_once_one_gets_in(lab: Lab, ready: Opener) -> None:
    """Both do, once they knock one after the other: clients try again."""
    sources = lab.source(), lab.source()
    for knock in ALICE:
        for source in sources:
            lab.touch(source, knock)
    assert [is_open_soon(lab, source) for source in sources] == [True, False]
    wait_until_open(lab, sources[1])


# One-time sequences.


def stock(count: int, last: int = 0) -> dict[int, tuple[Knock, ...]]:
    return draw(count, last, 3, ("tcp", "udp"), {SSH, 51820}, (), random.Random(7 + last))


class Watched:
    """The host's own program for one-time sequences, run as the watch runs it."""

    def __init__(self, lab: Lab, opener: Opener, host: Host) -> None:
        self._lab, self._opener, self._host = lab, opener, host

    def opens(self, source: str, knocks: tuple[Knock, ...], seconds: float = 0.5) -> bool:
        self._lab.touch(source, *knocks)
        return is_open_soon(self._lab, source, seconds=seconds)

    def arm(self) -> None:
        assert self._host() == 0

    def next(self) -> int:
        return self._host.report()["first"]

    def left(self) -> int:
        return self._host.report()["left"]

    def use(self, source: str, sequences: dict[int, tuple[Knock, ...]]) -> int:
        """Use one up, as a client does that goes on to the next one where one does not open."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            for identity in range(self.next(), min(self.next() + 8, max(sequences) + 1)):
                if self.opens(source, sequences[identity]):
                    self._opener.close()
                    self.arm()
                    return identity
        raise AssertionError("None of them opens.")


@pytest.fixture
def watched(lab: Lab, opener: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    host = Host(module_of("stock", monkeypatch), tmp_path, monkeypatch)
    host.where = lab.host
    return Watched(lab, opener, host)


@pytest.mark.parametrize("family", [4, 6])
def test_a_sequence_opens_once(lab: Lab, opener: Opener, watched: Watched, family: int) -> None:
    """Neither for the one who used it nor for another one, after a new start of the daemon and after a boot."""
    sequences = stock(16)
    opener.gate(one_time={"alice": sequences})
    watched.arm()
    opener.start()
    mine, other = lab.source(family), lab.source(family)
    wait_for(lambda: len(opener.daemons()) > 0, SECONDS, "a daemon")
    used = watched.use(mine, sequences)

    def is_refused() -> None:
        for source in (mine, other):
            # The second time not even a try that was spoiled by the one before is a reason.
            for _ in range(2):
                assert not watched.opens(source, sequences[used], seconds=0.2)

    is_refused()
    opener.stop()
    opener.start()
    assert watched.use(other, sequences) > used
    is_refused()
    # A boot: the kernel has forgotten everything.
    opener.stop()
    lab.host.nft(f"delete table inet {TABLE}\n{lab.text}")
    watched.arm()
    opener.start()
    assert watched.use(other, sequences) > used + 1
    is_refused()


def test_the_last_one_and_more(lab: Lab, opener: Opener, watched: Watched) -> None:
    """They are used up one by one, each opens, and at the end there is still a daemon, for those that are made then."""
    sequences = stock(16)
    opener.gate(one_time={"alice": sequences})
    watched.arm()
    opener.start()
    source = lab.source()
    used = []
    while watched.left():
        used.append(watched.use(source, sequences))
    assert used == sorted(set(used))
    assert used[-1] == 16
    assert len(used) >= 10
    daemon = opener.daemons()["h0"]
    assert not watched.opens(source, sequences[16])
    more = {**sequences, **stock(16, 16)}
    lab.gate(opener="knockd", one_time={"alice": more})
    opener.write(
        "knockd.conf", lab.rendered("knockd/knockd.conf.j2", lab.gate(opener="knockd", one_time={"alice": more}))
    )
    watched.arm()
    assert watched.use(source, more) > 16
    assert "ended" not in opener.said()
    assert opener.daemons()["h0"] != daemon


def test_a_sequence_that_is_not_armed(lab: Lab, opener: Opener, watched: Watched) -> None:
    """knockd waits for some more than may open: the kernel has the last word."""
    sequences = stock(40)
    opener.gate(one_time={"alice": sequences})
    watched.arm()
    opener.start()
    source = lab.source()
    watched.use(source, sequences)
    waits = re.findall(
        r"^\[1-([0-9a-f]+)-",
        next(Path(f"/run/fleet-portknock/opener-{opener.pid}").glob("*/knockd.conf")).read_text(),
        re.M,
    )
    assert len(waits) == 8
    after_armed = int(waits[-1], 16)
    assert f'"7:{after_armed:x}"' not in json.dumps(lab.elements("armed"))
    for _ in range(2):
        assert not watched.opens(source, sequences[after_armed], seconds=0.2)
    assert watched.use(source, sequences) < after_armed


def test_two_at_once_with_the_same_sequence(lab: Lab, opener: Opener, watched: Watched) -> None:
    """The command that opens, twice at the same moment: one of the two finds the sequence spent."""
    sequences = stock(16)
    opener.gate(one_time={"alice": sequences})
    watched.arm()
    first = watched.next()
    command = ["ip", "netns", "exec", lab.host.name, "/bin/sh", str(opener.folder / "open.sh"), "1"]
    for identity in range(first, first + 4):
        pair = [
            subprocess.Popen([*command, f"10.0.{identity}.{one}", f"{identity:x}"], stderr=subprocess.DEVNULL)
            for one in (1, 2)
        ]
        codes = sorted(one.wait() for one in pair)
        assert codes[0] == 0
        assert codes[1] != 0
    assert lab.count("open4") == 4


# Nothing that was knocked is to be seen.


def test_where_no_port_of_a_sequence_is(lab: Lab, ready: Opener) -> None:
    """Arguments and environment of processes, what the supervisor writes, and the rules."""
    told = ready.folder / "told"
    ready.write(
        "open.sh",
        f"{{ printf '%s ' \"$0\" \"$@\"; env; tr '\\0' ' ' </proc/$PPID/cmdline; }} >{told}.new; mv {told}.new {told}\n",
    )
    source = lab.source()

    def is_told() -> bool:
        lab.touch(source, *ALICE)
        with contextlib.suppress(AssertionError):
            wait_for(told.exists, 0.5, "the command")
        return told.exists()

    wait_for(is_told, SECONDS, "the command is run")
    assert f" 1 {source} " in told.read_text()
    processes = subprocess.run(["ps", "axeww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert "/usr/sbin/knockd -i h0" in processes
    seen = [told.read_text(), processes, ready.said(), lab.text, json.dumps(lab.listing())]
    numbers = {str(knock.port) for knock in (*ALICE, *BOB)}
    assert [number for text in seen for number in numbers if re.search(rf"(?<![0-9]){number}(?![0-9])", text)] == []


@pytest.mark.parametrize(
    ("arguments", "interface"),
    [
        (["1", "192.0.2.9; reboot"], "h0"),
        (["1", "$(reboot)"], "h0"),
        (["1", "192.0.2.9, 192.0.2.10"], "h0"),
        (["1", "localhost"], "h0"),
        (["x", "192.0.2.9"], "h0"),
        (["shutter", "192.0.2.9"], "h0"),
        (["shut", "192.0.2.9", "1"], "h0"),
        (["", "192.0.2.9"], "h0"),
        (["1", ""], "h0"),
        (["1", "192.0.2.9", "5 }"], "h0"),
        (["1", "192.0.2.9", "5"], "h0"),
        (["1", "fe80::9"], "none"),
    ],
)
def test_what_the_command_refuses(lab: Lab, opener: Opener, arguments: list[str], interface: str) -> None:
    opener.gate()
    done = subprocess.run(
        ["ip", "netns", "exec", lab.host.name, "/bin/sh", str(opener.folder / "open.sh"), *arguments],
        env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "FLEET_PORTKNOCK_INTERFACE": interface},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert (lab.count("open4"), lab.count("open_ll6")) == (0, 0)
