# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Loading: never open for an instant, no window lost, nothing left of what was there before."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._nft import (
    TABLE,
    close_window,
    listing_digests,
    replace_transaction,
)
from netlab import CLIENT4, HOST4, SEQUENCE, SSH, Lab, fold, network
from scapy.layers.inet import TCP

SWAPS = 200


class _Prober(threading.Thread):
    """SYNs to the protected port, one after the other, from a source that may and from one that may not."""

    def __init__(self, lab: Lab, stranger: str, owner: str) -> None:
        super().__init__(daemon=True)
        self._lab = lab
        self.sent = 0
        self.seen = {stranger: 0, owner: 0}
        self.refused = {stranger: 0, owner: 0}
        self.done = threading.Event()
        frames = {
            source: bytearray(lab.wire.frame(network(source, HOST4) / TCP(sport=1, dport=SSH, flags="S", seq=1)))
            for source in (stranger, owner)
        }
        self._frames = frames

    def run(self) -> None:
        lab = self._lab
        addresses = {bytes(map(int, source.split("."))): source for source in self._frames}
        counter = 0
        while not self.done.is_set():
            for frame in self._frames.values():
                sport = 2000 + counter % 60000
                old = int.from_bytes(frame[34:36], "big")
                check = int.from_bytes(frame[50:52], "big") ^ 0xFFFF
                frame[34:36] = sport.to_bytes(2, "big")
                frame[50:52] = fold(check + (old ^ 0xFFFF) + sport).to_bytes(2, "big")
                lab.wire.socket.send(frame)
                self.sent += 1
            counter += 1
            lab.wire.socket.setblocking(False)
            try:
                while True:
                    data = lab.wire.socket.recv(2048)
                    source = addresses.get(data[30:34])
                    # From the host's port 22; 0x12 is SYN and ACK, 0x14 RST and ACK.
                    if source and data[23] == 6 and data[34:36] == b"\0\x16":
                        self.seen[source] += data[47] == 0x12
                        self.refused[source] += data[47] == 0x14
            except BlockingIOError:
                pass


def test_hundreds_of_swaps(lab: Lab) -> None:
    """Row 12: other rules each time, and both sources see no difference."""
    lab.serve(2222)
    texts = [
        lab.render(guard=guard, step_timeout=step)[0] for guard in ("strict", "tripwires", "loose") for step in (4, 5)
    ]
    lab.host.nft(texts[0])
    # Sources that nobody answers for: the prober's own machine would reset what it did not begin.
    stranger, owner = "192.0.2.201", "192.0.2.202"
    for source in (stranger, owner):
        lab.host.ip("neigh", "replace", source, "lladdr", lab.client.mac("c0"), "dev", "h0", "nud", "permanent")
    lab.host.nft(f"add element inet {TABLE} open4 {{ {owner} timeout 300s }}")
    prober = _Prober(lab, stranger, owner)
    prober.start()
    try:
        for number in range(SWAPS):
            lab.host.nft(replace_transaction(texts[number % len(texts)], lab.listing()))
    finally:
        prober.done.set()
        prober.join()
    print(f"\n{SWAPS} swaps, {prober.sent} SYNs: {prober.seen} answered, {prober.refused} refused")
    assert prober.sent > 1000
    assert prober.seen[stranger] == 0
    assert prober.refused[owner] == 0
    assert prober.seen[owner] > 100
    assert lab.count("open4") == 1


def test_windows_outlive_any_new_ruleset(lab: Lab) -> None:
    lab.gate(open_window=60)
    source = {4: lab.source(4), 6: lab.source(6)}
    for address in source.values():
        lab.knock(address)
    local = 'add element inet fleet_portknock open_ll6 { "h0" . fe80::77 timeout 60s }'
    lab.host.nft(local)
    for options in (
        {"guard": "strict"},
        {"max_windows": 100},
        {"max_windows": 5000, "closed_response": "drop"},
        {"template": "closed"},
        {"open_window": 10},
    ):
        lab.gate(**options)
        if "template" not in options:
            assert [lab.look(address) for address in source.values()] == ["open", "open"], options
        assert (lab.count("open4"), lab.count("open6"), lab.count("open_ll6")) == (1, 1, 1)


def test_a_window_keeps_its_end(lab: Lab) -> None:
    """Even where its set has to be made anew."""
    lab.gate(open_window=10)
    source = lab.source()
    lab.knock(source)
    began = time.monotonic()
    lab.gate(open_window=60, max_windows=77)
    left = json.loads(lab.elements("open4")[0])["elem"]
    assert left["timeout"] == 10
    assert left["expires"] <= 10
    while lab.look(source) == "open":
        assert time.monotonic() < began + 12
        time.sleep(0.2)


def test_fewer_windows_than_there_are(lab: Lab) -> None:
    lab.gate()
    lab.host.nft(
        f"add element inet {TABLE} open4 {{ 192.0.2.3 timeout 100s, 192.0.2.4 timeout 300s, 192.0.2.5 timeout 200s }}"
    )
    lab.gate(max_windows=2)
    assert {json.loads(element)["elem"]["val"] for element in lab.elements("open4")} == {"192.0.2.4", "192.0.2.5"}


def test_nothing_of_the_former_ruleset_stays(lab: Lab) -> None:
    lab.gate()
    fresh = listing_digests(lab.listing() or {})
    lab.host.nft(
        f"table inet {TABLE} {{\n"
        "map verdicts { type inet_service : verdict; elements = { 7 : goto extra }\n}\n"
        "set more { type inet_service; elements = { 8 }\n}\n"
        "chain extra {\n tcp dport @more accept\n}\n"
        "chain base { type filter hook input priority 5; policy drop;\n tcp dport vmap @verdicts\n}\n}\n"
    )
    lab.gate()
    assert listing_digests(lab.listing() or {}) == fresh
    assert lab.look(CLIENT4) == "reset"


def test_stale_progress_goes_with_the_old_rules(lab: Lab) -> None:
    """The numbers of states mean something else in other rules."""
    lab.gate()
    source = lab.source()
    lab.touch(source, *SEQUENCE[:2])
    lab.gate()
    lab.touch(source, SEQUENCE[2])
    assert lab.look(source) == "reset"


CHANGES: dict[str, Callable[[Lab], str]] = {
    "a rule more": lambda lab: f"add rule inet {TABLE} permitted ip saddr 192.0.2.77 accept",
    "a rule first": lambda lab: f"insert rule inet {TABLE} pre accept",
    "a chain emptied": lambda lab: f"flush chain inet {TABLE} lock_tcp",
    "a chain more": lambda lab: f"add chain inet {TABLE} more",
    "a set emptied": lambda lab: f"flush set inet {TABLE} protected_tcp",
    "an element more": lambda lab: f"add element inet {TABLE} trusted4 {{ 192.0.2.0/24 }}",
    "a step more": lambda lab: f"add element inet {TABLE} step {{ 0:0 . tcp . 7 : 2:0 }}",
    "another policy": lambda lab: f"add chain inet {TABLE} pre {{ policy drop; }}",
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_the_digest_tells_a_change(lab: Lab, change: str) -> None:
    lab.gate(trusted_sources=["198.51.100.0/24"])
    before = listing_digests(lab.listing() or {})
    lab.host.nft(CHANGES[change](lab))
    assert listing_digests(lab.listing() or {}) != before


def test_the_digest_is_the_same_for_the_same_rules(lab: Lab) -> None:
    """Whatever packets have done, and however often they are loaded."""
    lab.gate(trusted_sources=["198.51.100.0/24", "2001:db8:f::/48"])
    before = listing_digests(lab.listing() or {})
    lab.knock(lab.source())
    lab.knock(lab.source(6))
    lab.look(CLIENT4)
    assert listing_digests(lab.listing() or {}) == before
    for _ in range(3):
        lab.gate(trusted_sources=["198.51.100.0/24", "2001:db8:f::/48"])
        assert listing_digests(lab.listing() or {}) == before


def test_closing_one_window(lab: Lab) -> None:
    lab.gate()
    four, six, other = lab.source(4), lab.source(6), lab.source(4)
    for source in (four, six, other):
        lab.knock(source)
    lab.host.nft('add element inet fleet_portknock open_ll6 { "h0" . fe80::77 timeout 60s }')
    for address, interface in ((four, None), (six, "h0"), ("fe80::77", "h0")):
        for text in close_window(address, interface):
            lab.host.nft(text)
    assert [lab.look(source) for source in (four, six, other)] == ["reset", "reset", "open"]
    assert lab.count("open_ll6") == 0


@pytest.mark.parametrize("family", [4, 6])
def test_the_table_for_a_boot_that_fails(lab: Lab, family: int) -> None:
    """Row 15: closed but for the trusted sources, knocks or not; who is connected stays so."""
    source, trusted = lab.source(family), lab.source(family)
    _, session = lab.connect(source)
    lab.gate(template="closed", trusted_sources=[trusted])
    lab.knock(source)
    assert (lab.look(source), lab.ask(source)) == ("silent", "silent")
    assert (lab.look(trusted), lab.ask(trusted)) == ("open", "answered")
    session.send(b"hello")
    assert session.recv(100) == b"hello"
    lab.gate(trusted_sources=[trusted])
    lab.knock(source)
    assert lab.look(source) == "open"


def test_what_is_asked_of_the_kernel_at_boot(lab: Lab) -> None:
    """Row 15: the gate needs no NAT, and the table for a boot that fails no connection tracking either."""
    gate, _ = lab.render()
    closed, _ = lab.render(template="closed")
    assert " nat " not in gate
    assert "redirect" not in gate
    assert not {"ct", "map", "socket"} & set(closed.split())
