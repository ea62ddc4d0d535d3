# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One-time sequences: each opens once, for one source, and never again, whatever is loaded and however a boot ends."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from types import ModuleType

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._nft import (
    TABLE,
    listing_digests,
    without_armed,
)
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._stock import draw
from netlab import HOST4, NFT, SSH, TEMPLATES, Lab, Namespace, network
from scapy.layers.inet import TCP

LENGTH = 3
PAIRS = 4000
# As Linux sends it: 60 bytes over IPv4, 80 over IPv6.
OPTIONS = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 7)]
ONE_ATOMIC_RULE = (
    "meta priority @armed meta length 44-87 add @burnt { meta priority quota until 87 bytes } "
    "meta priority set meta priority map @owner"
)


def stock(count: int, last: int = 0) -> dict[int, tuple[Knock, ...]]:
    return draw(count, last, LENGTH, ("tcp", "udp"), {SSH, 51820}, (), random.Random(7 + last))


class Host:
    """The host's own program for one-time sequences, with files of its own, in a namespace."""

    def __init__(self, module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = module
        self.where: Namespace | None = None
        self.spent = folder / "spent.json"
        monkeypatch.setattr(module, "FOLDER", str(folder))
        monkeypatch.setattr(module, "SPENT", str(self.spent))
        monkeypatch.setattr(module, "_program", self._nft)
        self.before_nft: Callable[[], None] = lambda: None

    def _nft(self, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
        assert self.where is not None
        if given:
            self.before_nft()
        return subprocess.run(
            ["ip", "netns", "exec", self.where.name, *NFT, *arguments],
            input=given,
            capture_output=True,
            text=True,
            check=False,
        )

    def __call__(self, command: str = "arm") -> int:
        code: int = self.module.main([command])
        return code

    def report(self, name: str = "1") -> dict[str, int]:
        report: dict[str, int] = self.module.report()["operators"][name]
        return report


def module_of(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, TEMPLATES / f"nftables/{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, name, module)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def host(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(module_of("stock", monkeypatch), tmp_path, monkeypatch)
    made.where = lab.host
    return made


def opens(lab: Lab, source: str, knocks: tuple[Knock, ...]) -> bool:
    lab.touch(source, *knocks)
    return lab.look(source) == "open"


@pytest.mark.parametrize("family", [4, 6])
def test_a_sequence_opens_once(lab: Lab, host: Host, family: int) -> None:
    """From the same address and from another one; the source's window is ended in between."""
    sequences = stock(16)
    lab.gate(one_time={"alice": sequences})
    assert host() == 0
    first, other = lab.source(family), lab.source(family)
    assert opens(lab, first, sequences[1])
    lab.host.nft(f"flush set inet {TABLE} open{family}")
    assert not opens(lab, first, sequences[1])
    assert not opens(lab, other, sequences[1])
    assert opens(lab, other, sequences[2])


@pytest.mark.parametrize("family", [4, 6])
def test_a_sequence_for_one_connection(lab: Lab, host: Host, family: int) -> None:
    """Together with single use."""
    sequences = stock(16)
    lab.gate(one_time={"alice": sequences}, single_use=True)
    assert host() == 0
    source = lab.source(family)
    for identity in (1, 2):
        assert opens(lab, source, sequences[identity])
        assert lab.look(source) == "reset"
        assert not opens(lab, source, sequences[identity])


def test_only_armed_ones_open(lab: Lab, host: Host) -> None:
    sequences = stock(40)
    lab.gate(one_time={"alice": sequences})
    source = lab.source()
    assert not opens(lab, source, sequences[1])
    host()
    assert not opens(lab, source, sequences[5])
    assert opens(lab, source, sequences[4])
    # What was skipped is worthless: somebody may have seen it on its way.
    host()
    lab.host.nft(f"flush set inet {TABLE} open4")
    for identity in (1, 2, 3, 4, 9):
        assert not opens(lab, lab.source(), sequences[identity])
    assert opens(lab, lab.source(), sequences[8])
    assert host.report() == {"left": 32, "armed": 0, "known": 40, "first": 9}


@pytest.mark.parametrize("length", [40, 43, 88, 120])
def test_a_packet_of_another_size_neither_uses_nor_opens(lab: Lab, host: Host, length: int) -> None:
    sequences = stock(16)
    lab.gate(one_time={"alice": sequences})
    host()
    source = lab.source()
    *knocks, last = sequences[1]
    lab.touch(source, *knocks)
    packet = network(source, HOST4) / TCP(sport=lab.source_port(), dport=last.port, flags="S", seq=1)
    raw = bytes(packet)
    padded = packet / (b"\0" * (length - len(raw)))
    lab.wire.send(padded)
    assert lab.look(source) != "open"
    assert lab.count("burnt") == 0
    lab.touch(source, *sequences[1])
    assert lab.look(source) == "open"


def test_operators_have_stocks_of_their_own(lab: Lab, host: Host) -> None:
    alice, bob = stock(16), stock(16, 16)
    lab.gate(one_time={"alice": alice, "bob": bob})
    host()
    assert opens(lab, lab.source(), bob[19])
    host()
    assert host.report("1") == {"left": 16, "armed": 4, "known": 16, "first": 1}
    assert host.report("2") == {"left": 13, "armed": 3, "known": 16, "first": 20}
    assert opens(lab, lab.source(), alice[1])


def test_nothing_comes_back_with_a_new_ruleset(lab: Lab, host: Host) -> None:
    """Nor is anything lost by it: what was armed stays armed."""
    sequences = stock(16)
    lab.gate(one_time={"alice": sequences})
    host()
    assert opens(lab, lab.source(), sequences[1])
    topped_up = {**{identity: knocks for identity, knocks in sequences.items() if identity > 1}, **stock(8, 16)}
    for options in ({"guard": "strict"}, {"max_windows": 99}, {"one_time": {"alice": topped_up}}):
        lab.gate(**{"one_time": {"alice": sequences}, **options})
        assert not opens(lab, lab.source(), sequences[1])
    assert opens(lab, lab.source(), sequences[2])
    assert (lab.count("armed"), lab.count("burnt")) == (4, 2)
    lab.gate()
    assert "armed" not in json.dumps(lab.listing())
    lab.gate(one_time={"alice": sequences})
    # Between the two loads the kernel forgot what had opened; nothing is armed that may have.
    assert not opens(lab, lab.source(), sequences[2])
    host()
    assert not opens(lab, lab.source(), sequences[2])
    assert host.report()["first"] == 5


def test_nothing_comes_back_with_a_boot(lab: Lab, host: Host) -> None:
    """As after a power failure: the kernel's memory is gone, and the watch had no time for anything."""
    sequences = stock(16)
    lab.gate(one_time={"alice": sequences})
    host()
    assert opens(lab, lab.source(), sequences[1])
    stranger = lab.source()
    boots, used = 0, {1}
    while True:
        lab.host.nft(f"delete table inet {TABLE}")
        lab.host.nft(lab.text)
        assert host() == 0
        report = host.report()
        for identity in sorted(used):
            assert not opens(lab, stranger, sequences[identity]), identity
        if not report["left"]:
            break
        boots += 1
        used.add(report["first"])
        assert opens(lab, lab.source(), sequences[report["first"]])
    # The first four are gone, then at each boot as many as a quarter of what is left, one at least.
    assert boots == 9
    assert report == {"left": 0, "armed": 0, "known": 16, "first": 17}


def test_what_is_armed_is_on_the_disk_first(lab: Lab, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    seen: list[tuple[object, list[str]]] = []
    host.before_nft = lambda: seen.append((json.loads(host.spent.read_text())["spent"], list(synced)))
    lab.gate(one_time={"alice": stock(16)})
    host()
    assert seen == [({"1": 4}, [f"{host.spent}.new", str(host.spent.parent)])]
    assert host.spent.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["", "{}", '{"format": 2, "spent": {}}', '{"format": 1, "spent": {"1": "x"}}'])
def test_nothing_is_armed_without_knowing_what_was(
    lab: Lab, host: Host, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    host.spent.write_text(damage)
    lab.gate(one_time={"alice": stock(16)})
    assert host() == 1
    assert lab.count("armed") == 0
    assert capsys.readouterr().err.startswith(f"<2>{host.spent}: expected a file that says which one-time sequences")


def test_nothing_is_armed_that_can_t_be_written_down(
    lab: Lab, host: Host, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    lab.gate(one_time={"alice": stock(16)})
    assert host() == 1
    assert lab.count("armed") == 0
    assert "No space left on device" in capsys.readouterr().err


def test_what_was_listed_once_opens_nothing(lab: Lab, host: Host) -> None:
    """The kernel's rules as text, loaded again by whoever: the way back, or a program that saves rules and restores them."""
    sequences = stock(16)
    lab.gate(one_time={"alice": sequences})
    host()
    saved = lab.host.run(*NFT, "list", "table", "inet", TABLE)
    assert opens(lab, lab.source(), sequences[1])
    lab.host.nft(f"delete table inet {TABLE}\n{without_armed(saved)}")
    assert not opens(lab, lab.source(), sequences[1])
    lab.host.nft(f"delete table inet {TABLE}\n{saved}")
    assert host("renew") == 0
    assert not opens(lab, lab.source(), sequences[1])
    assert opens(lab, lab.source(), sequences[5])


def test_what_is_used_is_no_drift(lab: Lab, host: Host) -> None:
    sequences = stock(16)
    lab.gate(one_time={"alice": sequences})
    before = listing_digests(lab.listing() or {})
    host()
    assert opens(lab, lab.source(), sequences[2])
    host()
    assert listing_digests(lab.listing() or {}) == before
    lab.gate(one_time={"alice": {**sequences, **stock(1, 16)}})
    assert listing_digests(lab.listing() or {}) != before


def test_a_gate_without_any(lab: Lab, host: Host) -> None:
    lab.gate()
    assert host() == 0
    assert not host.spent.exists()
    assert host.module.report() == {"operators": {}, "last": 0}


class _Senders:
    """Two processes, each on a processor of its own, that send one packet each at the same moment, many times over."""

    def __init__(self, lab: Lab, frames: list[list[bytes]]) -> None:
        self._turn = mmap(-1, 16)
        self._processes = []
        for place, mine in enumerate(frames):
            pid = os.fork()
            if pid == 0:
                try:
                    os.sched_setaffinity(0, {place})
                    self._send(lab, place, mine)
                finally:
                    os._exit(0)
            self._processes.append(pid)

    def _send(self, lab: Lab, place: int, frames: list[bytes]) -> None:
        turn, socket = self._turn, lab.wire.socket
        end = time.monotonic() + 120
        for number, frame in enumerate(frames, start=1):
            struct.pack_into("=q", turn, 8 * place, number)
            while struct.unpack_from("=q", turn, 8 * (1 - place))[0] < number:
                if time.monotonic() > end:
                    return
                # Where others have work to do on this processor.
                os.sched_yield()
            socket.send(frame)

    def wait(self) -> None:
        for pid in self._processes:
            os.waitpid(pid, 0)


def race(lab: Lab, count: int, change: Callable[[str], str] = lambda text: text) -> tuple[int, int]:
    """For each of thousands of sequences two sources that have sent all knocks but the last, and then send that at once.

    :param change: makes another gate of the text.
    :returns: how many sequences opened for one of the two, and how many for both.
    """
    sequences = stock(count)
    text, model = lab.render(one_time={"alice": sequences}, step_timeout=600, open_window=600, tripwires=1)
    lab.host.nft(change(text))
    last = {step["next"]: step for step in model["steps"]}
    sources = [[f"10.{place}.{number >> 8}.{number & 255}" for number in range(count)] for place in (1, 2)]
    armed = ", ".join(f"7:{identity:x}" for identity in sequences)
    lab.host.nft(f"add element inet {TABLE} armed {{ {armed} }}\n")
    frames: list[list[bytes]] = [[], []]
    for place in (0, 1):
        elements = []
        for number, identity in enumerate(sequences):
            step = last[f"7:{identity:x}"]
            source = sources[place][number]
            elements.append(f"{source} : {step['state']}")
            packet = network(source, HOST4) / TCP(
                sport=1025 + place, dport=step["port"], flags="S", seq=1, options=OPTIONS
            )
            frames[place].append(lab.wire.frame(packet))
        lab.host.nft(f"add element inet {TABLE} at4 {{ {', '.join(elements)} }}\n")
    _Senders(lab, frames).wait()
    opened = {json.loads(element)["elem"]["val"] for element in lab.elements("open4")}
    times = [sum(source in opened for source in pair) for pair in zip(*sources)]
    return times.count(1), times.count(2)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_two_sources_at_once_on_two_processors(lab: Lab) -> None:
    """Row 1: thousands of sequences, no double opening, and none that nobody got."""
    once, twice = race(lab, PAIRS)
    print(f"\n{PAIRS} sequences, each from two sources at once: {once} opened for one of them, {twice} for both")
    assert twice == 0
    assert once == PAIRS


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_the_race_shows_what_a_deletion_would_let_in(lab: Lab) -> None:
    """The test above is worth something only where it catches the rule that looks as good."""

    def with_deletion(text: str) -> str:
        assert text.count(ONE_ATOMIC_RULE) == 3
        return text.replace(
            ONE_ATOMIC_RULE,
            "meta priority @armed delete @armed { meta priority } meta priority set meta priority map @owner",
        ).replace(
            "set armed {\n    type classid\n", "set armed {\n    type classid\n    flags dynamic\n    size 65535\n"
        )

    once, twice = race(lab, PAIRS // 2, with_deletion)
    print(f"\nwith a deletion: {once} opened for one of them, {twice} for both")
    assert twice > 0


def test_the_watch_hears_of_what_opens(lab: Lab, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anybody's telling: what packets do to a set is no news of the kernel's."""
    watch = module_of("watch", monkeypatch)
    ran: list[str] = []

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        ran.append(argv[-1])
        return subprocess.CompletedProcess(argv, host(argv[-1]), "", "")

    monkeypatch.setattr(watch, "_run", run)
    one_time = watch.OneTime()
    with lab.host.inside():
        assert one_time.look() is None
    lab.gate()
    with lab.host.inside():
        assert one_time.look() is None
    sequences = stock(40)
    lab.gate(one_time={"alice": sequences})
    with lab.host.inside():
        assert one_time.look() == watch.ONE_TIME_SECONDS
        assert watch.count_burnt() == 0
    source = lab.source()
    for identity in range(1, 21):
        lab.touch(source, *sequences[identity])
        with lab.host.inside():
            one_time.look()
            assert watch.count_burnt() == identity
    assert ran == ["arm"] * 21
    lab.host.nft(f"delete table inet {TABLE}")
    with lab.host.inside():
        assert one_time.look() is None
