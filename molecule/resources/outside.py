# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a machine outside can do and see. Runs in the client container and shares no code with the collection.

Standard input: a JSON list of steps, each a list of a word and arguments. Standard output: a JSON list, one result a
step. Knocks are raw packets made here, so that a mistake in the product's own knocking can't hide behind the test.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

TCP_SYN = 2
TCP_SYN_ACK = 18
SEGMENT_SIZE_OPTION = 0x020405B4
OFFSET_OF_TCP_FLAGS = 13
OFFSET_OF_TCP_CHECKSUM = 16
IPV6_CHECKSUM = 7  # not in the socket module of every Python
ANSWER_SECONDS = 1.5
POLL_SECONDS = 0.05
WATCH_SECONDS = 0.02
# Two answers that are not further apart belong to one stretch of time, though others between them were lost.
SAME_STRETCH_SECONDS = 0.25


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def internet_checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def raw_tcp(source: str, target: str) -> socket.socket:
    """Sends packets from the one address to the other, and receives what comes back."""
    raw = socket.socket(family_of(target), socket.SOCK_RAW, socket.IPPROTO_TCP)
    if raw.family == socket.AF_INET6:
        raw.setsockopt(socket.IPPROTO_IPV6, IPV6_CHECKSUM, OFFSET_OF_TCP_CHECKSUM)
    raw.bind((source, 0))
    raw.connect((target, 0))
    return raw


def syn_packet(source: str, target: str, source_port: int, port: int) -> bytes:
    sequence = random.getrandbits(32)

    def header(checksum: int) -> bytes:
        # With the one option that every client's SYN has.
        fields = (source_port, port, sequence, 0, 6 << 4, TCP_SYN, 64240, checksum, 0, SEGMENT_SIZE_OPTION)
        return struct.pack("!HHIIBBHHHI", *fields)

    packet = header(0)
    if ":" in target:
        return packet  # the kernel adds the checksum
    pseudo = socket.inet_aton(source) + socket.inet_aton(target)
    pseudo += struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(packet))
    return header(internet_checksum(pseudo + packet))


def syn(source: str, target: str, port: int, times: int) -> None:
    """The same SYN, as often as asked: what a retransmission looks like."""
    packet = syn_packet(source, target, random.randrange(32768, 61000), port)
    with raw_tcp(source, target) as raw:
        for _ in range(times):
            raw.send(packet)


def welcomed(raw: socket.socket) -> Iterator[int]:
    """The source ports of those SYNs that a SYN-ACK has come for meanwhile."""
    while True:
        try:
            packet = raw.recv(256, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            continue  # an ICMP error, told once
        if raw.family == socket.AF_INET:
            packet = packet[(packet[0] & 15) * 4 :]
        if packet[OFFSET_OF_TCP_FLAGS] & TCP_SYN_ACK == TCP_SYN_ACK:
            yield struct.unpack_from("!H", packet, 2)[0]


def datagram(source: str, target: str, port: int, times: int) -> None:
    with socket.socket(family_of(target), socket.SOCK_DGRAM) as sender:
        sender.bind((source, 0))
        for _ in range(times):
            sender.sendto(b"", (target, port))


class Outside:
    """The steps, by name; a connection that is held lasts from one step to the next."""

    def __init__(self) -> None:
        self.held: socket.socket | None = None

    def knock(self, source: str, target: str, knocks: list[str], gap: float = 0.0, times: int = 1) -> None:
        for knock in knocks:
            port, proto = knock.split("/")
            (syn if proto == "tcp" else datagram)(source, target, int(port), times)
            time.sleep(gap)

    def authorize(self, source: str, target: str, port: int, key: str, hmac_key: str) -> bool:
        """Send one packet of fwknop's that asks for the port; whether it was sent."""
        lines = [
            *("[host]", f"SPA_SERVER {target}", f"ACCESS tcp/{port}", f"ALLOW_IP {source}", "SPOOF_USER outside"),
            *(f"KEY_BASE64 {key}", "USE_HMAC Y", f"HMAC_KEY_BASE64 {hmac_key}"),
        ]
        with tempfile.NamedTemporaryFile("w") as stanza:
            print("\n".join(lines), file=stanza, flush=True)
            argv = ["fwknop", "--rc-file", stanza.name, "--named-config", "host", "--no-save-args"]
            return subprocess.run(argv, capture_output=True, check=False).returncode == 0

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def connect(self, source: str, target: str, port: int) -> str:
        """``open`` with a banner, ``mute`` without, ``reset``, ``silent`` or ``unreachable``."""
        with socket.socket(family_of(target), socket.SOCK_STREAM) as caller:
            caller.settimeout(ANSWER_SECONDS)
            try:
                caller.bind((source, 0))
                caller.connect((target, port))
            except ConnectionRefusedError:
                return "reset"
            except socket.timeout:
                return "silent"
            except OSError:
                return "unreachable"
            try:
                return "open" if caller.recv(64) else "mute"
            except OSError:
                return "mute"

    def until(self, state: str, seconds: float, source: str, target: str, port: int) -> str:
        """Connect again and again until the state is there; the last state seen."""
        deadline = time.monotonic() + seconds
        while True:
            seen = self.connect(source, target, port)
            if seen == state or time.monotonic() > deadline:
                return seen
            time.sleep(POLL_SECONDS)

    def states(self, seconds: float, source: str, target: str, port: int) -> list[str]:
        """Every different state seen within so many seconds."""
        deadline = time.monotonic() + seconds
        seen = set()
        while time.monotonic() < deadline:
            seen.add(self.connect(source, target, port))
            time.sleep(POLL_SECONDS)
        return sorted(seen)

    def watch(self, stop: str, seconds: float, source: str, target: str, port: int) -> dict[str, Any]:
        """Send a SYN every few milliseconds until the file ``stop`` is there; a line of its own says when it begins.

        Bare SYNs: a connection would cost the host a process, and slow down what is watched. Returns how many there were,
        and each stretch of time in which they were answered by a SYN-ACK: when it began (seconds since the epoch) and how
        many seconds it took.
        """
        deadline = time.monotonic() + seconds
        sent: dict[int, float] = {}
        stretches: list[list[float]] = []
        tries = 0
        with raw_tcp(source, target) as raw:
            print("watching", flush=True)
            while time.monotonic() < deadline and not os.path.exists(stop):
                source_port = 32768 + tries % 28000
                tries += 1
                sent[source_port] = time.time()
                with contextlib.suppress(OSError):  # its interface may be down
                    raw.send(syn_packet(source, target, source_port, port))
                time.sleep(WATCH_SECONDS)
                for answered in welcomed(raw):
                    now = time.time()
                    if not stretches or sent[answered] > stretches[-1][1] + SAME_STRETCH_SECONDS:
                        stretches.append([sent[answered], now])
                    stretches[-1][1] = now
        return {"tries": tries, "open": [[began, ended - began] for began, ended in stretches]}

    def hold(self, source: str, target: str, port: int) -> str:
        self.held = socket.create_connection((target, port), ANSWER_SECONDS, (source, 0))
        return self.held.recv(64).decode(errors="replace").strip()

    def wait(self, path: str, seconds: float) -> bool:
        """Wait until the file is there; whether it came in time."""
        deadline = time.monotonic() + seconds
        while not os.path.exists(path) and time.monotonic() < deadline:
            time.sleep(0.05)
        return os.path.exists(path)

    def speak(self) -> bool:
        """Whether sshd still answers on the held connection: it sends its key exchange once it knows our version."""
        if self.held is None:
            return False
        self.held.settimeout(ANSWER_SECONDS)
        try:
            self.held.sendall(b"SSH-2.0-outside\r\n")
            return bool(self.held.recv(64))
        except OSError:
            return False


def main() -> None:
    outside = Outside()
    steps: list[list[Any]] = json.load(sys.stdin)
    print(json.dumps([getattr(outside, word)(*arguments) for word, *arguments in steps]))


if __name__ == "__main__":
    main()
