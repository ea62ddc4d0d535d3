# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A path between this machine and a namespace on which packets take their time, and overtake each other.

Two tun devices with a thread between them: not every kernel has netem.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import select
import struct
import threading
import time

# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
_ENOUGH = 65536


class SlowPath:
    """Carries packets both ways; those from ``near`` to ``far`` are kept for a while, each for its own.

    Both devices are made here; a device keeps its file when it is moved to a namespace.
    """

    def __init__(self, near: str, far: str) -> None:
        self._near, self._far = _tun(near), _tun(far)
        self._delays = (0.0, 0.0)
        self._random = random.Random(20240229)
        self._ends, self._end = os.pipe()
        self._thread = threading.Thread(target=self._carry)
        self._thread.start()

    def delay(self, shortest: float, longest: float) -> None:
        """How long a packet takes, in seconds."""
        self._delays = (shortest, longest)

    def close(self) -> None:
        os.close(self._end)
        self._thread.join()
        for handle in (self._near, self._far, self._ends):
            os.close(handle)

    def _carry(self) -> None:
        waiting: list[tuple[float, int, bytes]] = []
        count = 0
        while True:
            wait = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            ready, _writable, _failed = select.select([self._near, self._far, self._ends], [], [], wait)
            if self._ends in ready:
                return
            if self._far in ready:
                _put(self._near, os.read(self._far, _ENOUGH))
            if self._near in ready:
                count += 1
                due = time.monotonic() + self._random.uniform(*self._delays)
                heapq.heappush(waiting, (due, count, os.read(self._near, _ENOUGH)))
            while waiting and waiting[0][0] <= time.monotonic():
                _put(self._far, heapq.heappop(waiting)[2])


def _put(device: int, packet: bytes) -> None:
    # A device that is not up yet takes nothing.
    with contextlib.suppress(OSError):
        os.write(device, packet)


def _tun(name: str) -> int:
    handle = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return handle


__all__ = ("SlowPath",)
