# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a machine outside can do and see. Runs in the client container and shares no code with the collection.

Standard input: a JSON list of steps, each a list of a word and arguments. Standard output: a JSON list, one result a
step. Knocks are raw packets made here, so that a mistake in the product's own knocking can't hide behind the test.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import sys
import time
from typing import Any

TCP_SYN = 2
OFFSET_OF_TCP_CHECKSUM = 16
IPV6_CHECKSUM = 7  # not in the socket module of every Python
ANSWER_SECONDS = 1.5
POLL_SECONDS = 0.05


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def internet_checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def syn(source: str, target: str, port: int, times: int) -> None:
    """The same SYN, as often as asked: what a retransmission looks like."""
    family = family_of(target)

    def header(checksum: int) -> bytes:
        return struct.pack("!HHIIBBHHH", source_port, port, sequence, 0, 5 << 4, TCP_SYN, 64240, checksum, 0)

    source_port, sequence = random.randrange(32768, 61000), random.getrandbits(32)
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.bind((source, 0))
        packet = header(0)
        if family == socket.AF_INET6:
            raw.setsockopt(socket.IPPROTO_IPV6, IPV6_CHECKSUM, OFFSET_OF_TCP_CHECKSUM)
        else:
            pseudo = socket.inet_aton(source) + socket.inet_aton(target)
            pseudo += struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(packet))
            packet = header(internet_checksum(pseudo + packet))
        for _ in range(times):
            raw.sendto(packet, (target, 0))


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

    def hold(self, source: str, target: str, port: int) -> str:
        self.held = socket.create_connection((target, port), ANSWER_SECONDS, (source, 0))
        return self.held.recv(64).decode(errors="replace").strip()

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
