# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Connects without pause to hosts that it never knocks at. Runs in the client container until its input ends.

The first line of standard input is a JSON list of ``[name, source, target, port]``. Standard output: a line ``ready``, then
a JSON list ``[name, seconds, is_open]`` each time a target changes between closed and open, seconds on a steady clock. Open
means that the service's banner came.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import sys
import time

PAUSE_SECONDS = 0.03
ANSWER_SECONDS = 1.0


class Target:
    """One address, and the one connection to it that is under way."""

    def __init__(self, name: str, source: str, target: str, port: int) -> None:
        self.name = name
        self._source, self._goal = (source, 0), (target, port)
        self._family = socket.AF_INET6 if ":" in target else socket.AF_INET
        self.is_open = False
        self.next = 0.0
        self.is_connecting = False
        self.connection = socket.socket(self._family, socket.SOCK_STREAM)

    def begin(self, now: float) -> bool:
        """Start to connect; False where that failed at once."""
        self.connection = socket.socket(self._family, socket.SOCK_STREAM)
        self.connection.setblocking(False)
        try:
            self.connection.bind(self._source)
            self.connection.connect(self._goal)
        except BlockingIOError:
            pass
        except OSError:
            self.end(now, False)
            return False
        self.is_connecting, self.next = True, now + ANSWER_SECONDS
        return True

    def end(self, now: float, is_open: bool) -> None:
        """Close, and say so where things have changed."""
        self.connection.close()
        self.is_connecting = False
        self.next = now + PAUSE_SECONDS
        if is_open != self.is_open:
            self.is_open = is_open
            print(json.dumps([self.name, round(now, 3), is_open]), flush=True)


def main() -> None:
    targets = [Target(*entry) for entry in json.loads(sys.stdin.readline())]
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ, None)
        print("ready", flush=True)
        while True:
            now = time.monotonic()
            for target in targets:
                if now < target.next:
                    continue
                if target.is_connecting:
                    selector.unregister(target.connection)
                    target.end(now, False)
                elif target.begin(now):
                    # Readable with a banner, with the end of a connection, and with its refusal.
                    selector.register(target.connection, selectors.EVENT_READ, target)
            for key, _events in selector.select(PAUSE_SECONDS):
                if key.data is None:
                    return
                banner = b""
                with contextlib.suppress(OSError):
                    banner = key.data.connection.recv(64)
                selector.unregister(key.fileobj)
                key.data.end(time.monotonic(), bool(banner))


if __name__ == "__main__":
    main()
