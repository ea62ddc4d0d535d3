# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the back ends do for those who knock, side by side: each with its real programs, in network namespaces of this machine.

For each back end, with the role's defaults and one operator, seen from another namespace, over IPv4:

* *knock to open*: 100 knocks, each from a source of its own, one after the other. The time from before the last packet is sent
  until a connection to the protected port is accepted; where the first one is not, another is tried each millisecond. In turn
  with each of them, as the floor, a connection to a port without a gate: the ratio is that of the medians.
* *at once*: the first packets of 200 sources, then their second ones, and so on; each once, nobody tries again. How many get in,
  sooner or later.
* *in a flood*: 30 knocks, each from a source of its own, their packets one flood packet apart, 1,000 of these between two knocks,
  after 5,000 ahead. The flood comes from a spoofed source each time, 10,000 packets a second where this machine keeps up with
  that: to the port of the first knock, or where one packet opens to its port, half of it noise and half of it packets with a
  right look and a wrong HMAC. How many get in, sooner or later.
* *guessing*: the chance that one sweep over all ports opens, computed.

Packets are sent as frames that were made before, so that no client's own time is in it: what the program fwknop takes to make one
comes on top. iptables is measured in one variant (nft where it is there), with sets (ipset) and without them, when its lists hold
as many sources as this kernel was told to. Asserts nothing: the numbers are for people.

Usage: backends.py [BACK_END...], as root, with tests/netns on Python's path
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Optional

import jinja2
import yaml
from ansible_collections.fleet.portknock.plugins.module_utils._backends import BACK_ENDS, back_end, check_name
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._gate import guess_cost, settings_from
from ansible_collections.fleet.portknock.plugins.module_utils._ports import SPA, Knock
from ansible_collections.fleet.portknock.plugins.module_utils._sequences import generate
from ansible_collections.fleet.portknock.plugins.module_utils._spa import PORT as SPA_PORT
from ansible_collections.fleet.portknock.plugins.module_utils._spa import PROGRAM as SPA_PROGRAM
from ansible_collections.fleet.portknock.plugins.module_utils._spa import new_spa, send_spa
from iptlab import VARIANTS, IptablesLab
from netlab import CLIENT4, HOST4, PREFIX, SSH, Lab, network, wait_for
from openlab import SECONDS, Opener, is_open_soon
from scapy.layers.inet import TCP, UDP

DEFAULTS = Path(__file__).resolve().parents[1] / "roles/knock_server/defaults/main.yml"
KNOCKS = 100
AT_ONCE = 200
IN_FLOOD = 30
FLOOD_RATE = 10_000
FLOOD_AHEAD = 5_000
FLOOD_BETWEEN = 1_000
UNGATED = 8022
# The block that is set aside for measurements (RFC 2544): all of it is the client's.
SOURCES = "198.18.0.0/15"
# An answer on this machine takes far less.
ANSWER_SECONDS = 0.2
# Before time is taken: the service, which is a thread of this process, is done with the connection before.
SETTLE_SECONDS = 0.005
# How long one knock may take, and how long nobody gets in until nobody else is thought to.
PATIENCE_SECONDS = 3.0
# Windows last for 30 s.
LONGEST_SECONDS = 25.0
HEAD = f"""\
{"":20}   knock to open, ms                    at once  in a flood            guessing
{"":20}  median     p95   floor   ratio     got in  got in    packets/s  one sweep"""


class Contender(NamedTuple):
    """What a row is about; ``ipset`` matters to iptables alone."""

    name: str
    backend: str
    ipset: bool = True

    @property
    def is_spa(self) -> bool:
        return BACK_ENDS[self.backend].mode == SPA

    @property
    def guard(self) -> str:
        """The default, where it can be had."""
        return "tripwires" if self.ipset else "strict"

    @property
    def length(self) -> int:
        """How many knocks the role draws for it."""
        template = yaml.safe_load(DEFAULTS.read_text())["knock_server_sequence_length"]
        return int(jinja2.Template(template).render(knock_server_backend=self.backend))

    def missing(self) -> list[str]:
        """Programs that it needs and this machine does not have."""
        client = [SPA_PROGRAM] if self.is_spa and shutil.which(SPA_PROGRAM) is None else []
        if BACK_ENDS[self.backend].opener == "iptables" and not VARIANTS:
            return ["iptables"]
        return [*back_end(self.backend).missing_programs(), *client]

    def guessing(self) -> str:
        if self.is_spa:
            return "not by sweeps: HMAC-SHA-256"
        chance = guess_cost(settings_from({"guard": self.guard}), self.length, BACK_ENDS[self.backend].opener)
        guard = "" if BACK_ENDS[self.backend].opener == "knockd" else f", {self.guard}"
        return f"1 in {1 / chance:.3g} ({self.length} knocks{guard})"


def contenders(names: Sequence[str]) -> Iterator[Contender]:
    """The rows for these back ends."""
    for name in names:
        if BACK_ENDS[check_name(name)].opener == "iptables":
            yield Contender(f"{name} with ipset", name)
            yield Contender(f"{name} without", name, ipset=False)
        else:
            yield Contender(name, name)


class Latencies(NamedTuple):
    """Seconds from knock to open, of those that opened, and those of the floor."""

    opened: list[float]
    floor: list[float]


class Flooded(NamedTuple):
    """How many got in, and how many packets a second the flood had."""

    got_in: int
    rate: float


class Host:
    """A host with a gate, and what knocks at it: a new source each time."""

    def __init__(self, lab: Lab, knocks: Sequence[Knock]) -> None:
        self._lab = lab
        self._knocks = knocks
        self._numbers = itertools.count(1)
        # One neighbour for all sources, those of floods included: what answers they get ends at the client.
        lab.host.ip("route", "add", "default", "via", CLIENT4)
        lab.client.ip("route", "add", "local", SOURCES, "dev", "lo")
        lab.serve(SSH)
        lab.serve(UNGATED)

    def clients(self, count: int) -> dict[str, list[bytes]]:
        """Sources that have not been used yet, each with the frames that open for it."""
        sources = [f"198.18.{number >> 8}.{number & 255}" for number in itertools.islice(self._numbers, count)]
        return {source: [self._frame(source, knock) for knock in self._knocks] for source in sources}

    def _frame(self, source: str, knock: Knock) -> bytes:
        if knock.spa:
            return self._datagram(source, self._authorization(knock, source))
        layer = TCP if knock.proto == "tcp" else UDP
        return self._lab.wire.frame(
            network(source, HOST4) / layer(sport=self._lab.source_port() % 40000 + 20000, dport=knock.port)
        )

    def _datagram(self, source: str, payload: bytes) -> bytes:
        return self._lab.wire.frame(network(source, HOST4) / UDP(sport=20000, dport=SPA_PORT) / payload)

    def _authorization(self, knock: Knock, source: str) -> bytes:
        """What the program fwknop makes for this source; it goes no further than the client."""
        with self._lab.client.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as catcher:
            catcher.bind(("127.0.0.1", SPA_PORT))
            catcher.settimeout(SECONDS)
            send_spa("127.0.0.1", knock, source)
            return catcher.recv(4096)

    def _flood(self) -> Iterator[bytes]:
        """Frames that nobody gets in by, more than are sent."""
        first = self._knocks[0]
        if not first.spa:
            return self._lab.spoofed(0, 1 << 24, first.port, first.proto)
        right = self._authorization(first, "192.0.2.9")
        payloads = [os.urandom(len(right)), right[:-1] + (b"A" if right[-1:] != b"A" else b"B")]
        return itertools.cycle([self._datagram(f"10.0.0.{number}", payloads[number % 2]) for number in range(200)])

    def _send(self, frame: bytes) -> None:
        self._lab.wire.socket.send(frame)

    def _connects(self, source: str, port: int = SSH) -> bool:
        """Whether a connection is accepted; for a thread in the client's namespace."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(ANSWER_SECONDS)
            sock.bind((source, 0))
            with contextlib.suppress(OSError):
                sock.connect((HOST4, port))
                return True
        return False

    def _wait(self, source: str, began: float) -> Optional[float]:
        """Seconds since then until a connection is accepted, or None where that takes too long."""
        while not self._connects(source):
            if time.perf_counter() - began > PATIENCE_SECONDS:
                return None
            time.sleep(0.001)
        return time.perf_counter() - began

    def _get_in(self, sources: Sequence[str]) -> int:
        """How many of them get in, until for a while nobody does."""
        waiting = list(sources)
        begun = latest = time.monotonic()
        with self._lab.client.inside():
            while waiting and time.monotonic() < min(latest + PATIENCE_SECONDS, begun + LONGEST_SECONDS):
                left = [source for source in waiting if not self._connects(source)]
                if len(left) < len(waiting):
                    latest = time.monotonic()
                waiting = left
                time.sleep(0.05)
        return len(sources) - len(waiting)

    def wait_until_ready(self) -> None:
        """Knock until it opens: a daemon has to start first."""

        def opens() -> bool:
            ((source, frames),) = self.clients(1).items()
            for frame in frames:
                self._send(frame)
            return is_open_soon(self._lab, source)

        wait_for(opens, SECONDS, "a knock opens")

    def knock_to_open(self, count: int) -> Latencies:
        seen = Latencies([], [])
        clients = self.clients(count)
        with self._lab.client.inside():
            for source, (*before, last) in clients.items():
                for frame in before:
                    self._send(frame)
                time.sleep(SETTLE_SECONDS)
                began = time.perf_counter()
                self._send(last)
                seconds = self._wait(source, began)
                if seconds is not None:
                    seen.opened.append(seconds)
                time.sleep(SETTLE_SECONDS)
                began = time.perf_counter()
                if self._connects(source, UNGATED):
                    seen.floor.append(time.perf_counter() - began)
        return seen

    def at_once(self, count: int) -> int:
        clients = self.clients(count)
        for frames in zip(*clients.values()):
            for frame in frames:
                self._send(frame)
        return self._get_in([*clients])

    def in_a_flood(self, count: int) -> Flooded:
        clients = self.clients(count)
        flood = self._flood()
        sent = 0
        begun = time.monotonic()

        def pour(until: int) -> None:
            nonlocal sent
            while sent < until:
                due = min(until, int((time.monotonic() - begun) * FLOOD_RATE))
                for frame in itertools.islice(flood, max(0, due - sent)):
                    self._send(frame)
                    sent += 1
                time.sleep(0.001)

        for number, frames in enumerate(clients.values()):
            pour(FLOOD_AHEAD + number * FLOOD_BETWEEN)
            for frame in frames:
                self._send(frame)
                self._send(next(flood))
                sent += 1
        pour(sent + FLOOD_BETWEEN)
        rate = sent / (time.monotonic() - begun)
        return Flooded(self._get_in([*clients]), rate)


@contextlib.contextmanager
def gated(contender: Contender) -> Iterator[Host]:
    """A host with its gate, which opens to a knock."""
    is_iptables = BACK_ENDS[contender.backend].opener == "iptables"
    lab = IptablesLab(VARIANTS[0], contender.ipset) if is_iptables else Lab()
    with contextlib.ExitStack() as ending:
        ending.callback(lab.close)
        knocks: Sequence[Knock] = (new_spa(Knock(SSH, "tcp")),)
        if not contender.is_spa:
            knocks = generate(contender.length, ["tcp"], {SSH, UNGATED})
        host = Host(lab, knocks)
        options = {"sequences": {"default": [knocks]}, "guard": contender.guard, "tripwires": 2000}
        if back_end(contender.backend).opener is None:
            lab.gate(**options)
        else:
            folder = ending.enter_context(tempfile.TemporaryDirectory(prefix="fpk-bench-"))
            opener = Opener(lab, Path(folder), contender.backend)
            ending.callback(opener.stop)
            opener.gate(**options)
            opener.start()
        host.wait_until_ready()
        yield host


def row(contender: Contender) -> str:
    """Measure one."""
    missing = contender.missing()
    if missing:
        return f"{contender.name:20}  not measured: {', '.join(missing)} is missing"
    with gated(contender) as host:
        seen = host.knock_to_open(KNOCKS)
        at_once = host.at_once(AT_ONCE)
        flooded = host.in_a_flood(IN_FLOOD)
    line = f"{contender.name:20}"
    if len(seen.opened) > 1 and len(seen.floor) > 1:
        median, floor = statistics.median(seen.opened), statistics.median(seen.floor)
        p95 = statistics.quantiles(seen.opened, n=20)[-1]
        line += f"{1000 * median:8.2f}{1000 * p95:8.2f}{1000 * floor:8.2f}{median / floor:8.1f}"
    else:
        line += f"{'-':>8}" * 4
    line += f"{f'{at_once}/{AT_ONCE}':>11}{f'{flooded.got_in}/{IN_FLOOD}':>8}{flooded.rate:13,.0f}"
    line += f"  {contender.guessing()}"
    if len(seen.opened) < KNOCKS:
        line += f"; {KNOCKS - len(seen.opened)} of {KNOCKS} single knocks did not open"
    return line


def clean_up() -> None:
    """What a lab that was interrupted while it was made has left."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for line in listed.splitlines():
        name = line.partition(" ")[0]
        if name.startswith(f"{PREFIX}-"):
            subprocess.run(["ip", "netns", "del", name], check=False)


def end(_number: int, _frame: Optional[FrameType]) -> None:
    raise KeyboardInterrupt


def main(names: Sequence[str]) -> int:
    if os.geteuid() != 0:
        print("The back ends are measured in network namespaces, which needs root.", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, end)
    try:
        rows = list(contenders(names or [*BACK_ENDS]))
        print(HEAD, flush=True)
        failed = False
        for contender in rows:
            try:
                print(row(contender), flush=True)
            except AssertionError as exc:
                # How the laboratory says that something does not work; the others are measured nevertheless.
                print(f"{contender.name:20}  not measured: {exc}", flush=True)
                failed = True
    except PortknockError as exc:
        print(exc, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        # What is under way now is not to be interrupted once more.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        clean_up()
    print(f"load of this machine in the last minute: {os.getloadavg()[0]:.1f}, processors: {os.cpu_count()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
