# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Carrying bytes between a pair of descriptors and a connection, as a ProxyCommand has to."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from queue import SimpleQueue
from typing import Callable

_CHUNK = 65536


def relay(sock: socket.socket, source: int = 0, sink: int = 1, hang_up: bool = False) -> OSError | None:
    """Carry both ways until both have ended, or nothing more can come.

    The end of one way is passed on and leaves the other alone. What can't be written yet isn't read either. The sink is
    spent afterwards, and a thread that still waits for the source may be left behind: the process is meant to end.

    :param source: descriptor of what is to be sent.
    :param sink: descriptor for what is received.
    :param hang_up: nothing more is to be sent, either, once the connection has ended: for a sink by whose end nobody is told.
    :return: what broke the connection; None where nothing did, or this side had said all that it wanted.
    """
    # A thread for each way, because only a socket can be made non-blocking without doing it to whoever shares a terminal
    # or a pipe.
    for descriptor in (source, sink):
        os.set_blocking(descriptor, True)
    sock.settimeout(None)
    ended: SimpleQueue[tuple[str, OSError | None]] = SimpleQueue()
    said_all = threading.Event()

    def shut() -> None:
        # Noted first: the far side may answer before this thread goes on.
        said_all.set()
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)

    def carry(way: str, read: Callable[[], bytes], write: Callable[[bytes], None], end: Callable[[], None]) -> None:
        failure = None
        try:
            while True:
                data = read()
                if not data:
                    break
                write(data)
            end()
        except OSError as exc:
            # Without an end: whoever waits for one might end this process before it has told what happened.
            failure = exc
        ended.put((way, failure))

    ways: tuple[tuple[str, Callable[[], bytes], Callable[[bytes], None], Callable[[], None]], ...] = (
        ("out", lambda: _read(source), sock.sendall, shut),
        ("in", lambda: sock.recv(_CHUNK), lambda data: _write(sink, data), lambda: _end(sink)),
    )
    for way in ways:
        threading.Thread(target=carry, args=way, daemon=True).start()
    failures: dict[str, OSError | None] = {}
    # Where sending fails, what has been received is still carried on; where receiving fails, there is nothing to wait for.
    while len(failures) < len(ways) and failures.get("in") is None and not (hang_up and "in" in failures):
        way_ended, failure = ended.get()
        failures[way_ended] = failure
    if said_all.is_set():
        return None
    # A broken pipe is the sink's, or a far side's that had ended before.
    return next((exc for exc in failures.values() if exc is not None and not isinstance(exc, BrokenPipeError)), None)


def _read(source: int) -> bytes:
    """What there is to be sent; nothing where it has ended or can't be read any more."""
    try:
        return os.read(source, _CHUNK)
    except OSError:
        return b""


def _write(sink: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(sink, rest) :]


def _end(sink: int) -> None:
    """Tell whoever reads the sink that nothing more comes."""
    if stat.S_ISSOCK(os.fstat(sink).st_mode):
        # Source and sink may be one socket, which goes on being read.
        with socket.socket(fileno=os.dup(sink)) as twin:
            twin.shutdown(socket.SHUT_WR)
    # In place of closing it, so that nothing else comes to have its number.
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), sink)


__all__ = ("relay",)
