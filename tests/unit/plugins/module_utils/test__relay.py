# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Carrying bytes between pipes and real sockets."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._relay import relay

_SECONDS = 30.0
# More than pipes and sockets hold together.
_MUCH = os.urandom(8 * 2**20)


class Ends:
    """A relay between pipes and a connection, and the far ends of them."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.near = socket.create_connection(listener.getsockname())
            self.far = listener.accept()[0]
        self.far.settimeout(_SECONDS)
        self.source, self.writer = os.pipe()
        self.reader, self.sink = os.pipe()
        self.failure: OSError | None = None
        self.hang_up = False
        self.thread = threading.Thread(target=self._relay, daemon=True)

    def _relay(self) -> None:
        self.failure = relay(self.near, self.source, self.sink, self.hang_up)

    def start(self) -> None:
        self.thread.start()

    def goes_on(self) -> bool:
        self.thread.join(0.2)
        return self.thread.is_alive()

    def finish(self) -> OSError | None:
        self.thread.join(_SECONDS)
        assert not self.thread.is_alive()
        return self.failure

    def break_connection(self) -> None:
        self.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.far.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    for descriptor in {made.source, made.writer, made.reader, made.sink}:
        # Some tests close an end themselves.
        try:
            os.close(descriptor)
        except OSError:
            continue
    made.near.close()
    made.far.close()


def all_of(descriptor: int) -> bytes:
    received = []
    while True:
        assert select.select([descriptor], [], [], _SECONDS)[0]
        received.append(os.read(descriptor, 65536))
        if not received[-1]:
            return b"".join(received)


def all_from(sock: socket.socket) -> bytes:
    with sock.makefile("rb") as file:
        return file.read()


def test_an_end_from_here_leaves_the_other_way_open(ends: Ends) -> None:
    ends.start()
    os.write(ends.writer, b"question")
    os.close(ends.writer)
    assert all_from(ends.far) == b"question"
    assert ends.goes_on()
    ends.far.sendall(b"answer")
    ends.far.close()
    assert all_of(ends.reader) == b"answer"
    assert ends.finish() is None


def test_an_end_from_there_leaves_the_other_way_open(ends: Ends) -> None:
    ends.start()
    ends.far.sendall(b"answer")
    ends.far.shutdown(socket.SHUT_WR)
    assert all_of(ends.reader) == b"answer"
    assert ends.goes_on()
    os.write(ends.writer, b"question")
    os.close(ends.writer)
    assert all_from(ends.far) == b"question"
    assert ends.finish() is None


def test_an_end_from_there_that_ends_all(ends: Ends) -> None:
    ends.hang_up = True
    ends.start()
    ends.far.sendall(b"all")
    ends.far.close()
    # Nobody has ended the other way.
    assert ends.finish() is None
    assert all_of(ends.reader) == b"all"


def test_an_end_from_here_that_is_answered(ends: Ends) -> None:
    ends.hang_up = True
    ends.start()
    os.close(ends.writer)
    assert ends.goes_on()
    ends.far.sendall(b"answer")
    ends.far.close()
    assert ends.finish() is None
    assert all_of(ends.reader) == b"answer"


def test_what_nobody_takes_yet_waits(ends: Ends) -> None:
    ends.start()

    def write() -> None:
        with open(os.dup(ends.writer), "wb") as file:
            file.write(_MUCH)
        os.close(ends.writer)

    def send() -> None:
        ends.far.sendall(_MUCH)
        ends.far.shutdown(socket.SHUT_WR)

    writing = threading.Thread(target=write, daemon=True)
    sending = threading.Thread(target=send, daemon=True)
    writing.start()
    sending.start()
    # Neither can end before somebody reads at the other end.
    writing.join(0.2)
    assert writing.is_alive()
    assert sending.is_alive()
    received: list[bytes] = []
    reading = threading.Thread(target=lambda: received.append(all_of(ends.reader)), daemon=True)
    reading.start()
    assert all_from(ends.far) == _MUCH
    reading.join(_SECONDS)
    assert received == [_MUCH]
    assert ends.finish() is None


def test_a_sink_that_takes_less_at_a_time(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    ends.start()
    os.close(ends.writer)
    ends.far.sendall(b"a longer answer")
    ends.far.close()
    assert all_of(ends.reader) == b"a longer answer"
    assert ends.finish() is None


def test_a_sink_that_nobody_reads_any_more(ends: Ends) -> None:
    ends.start()
    os.close(ends.reader)
    ends.far.sendall(b"answer")
    # The source is still open.
    assert ends.finish() is None


def test_a_connection_that_breaks(ends: Ends) -> None:
    ends.start()
    ends.break_connection()
    assert isinstance(ends.finish(), ConnectionResetError)


def test_a_connection_that_breaks_after_all_was_said(ends: Ends) -> None:
    ends.start()
    os.close(ends.writer)
    assert ends.far.recv(1) == b""
    ends.break_connection()
    assert ends.finish() is None


def test_one_socket_for_source_and_sink(ends: Ends) -> None:
    """As some clients give it; its end has to be told, since the descriptor of the source stays open."""
    mine, theirs = socket.socketpair()
    with mine, theirs:
        theirs.settimeout(_SECONDS)
        for descriptor in (ends.source, ends.sink):
            os.dup2(mine.fileno(), descriptor)
        mine.close()
        ends.start()
        ends.far.sendall(b"answer")
        ends.far.shutdown(socket.SHUT_WR)
        assert all_from(theirs) == b"answer"
        theirs.sendall(b"question")
        theirs.shutdown(socket.SHUT_WR)
        assert all_from(ends.far) == b"question"
        assert ends.finish() is None


def test_descriptors_that_do_not_block(ends: Ends) -> None:
    os.set_blocking(ends.source, False)
    os.set_blocking(ends.sink, False)
    ends.near.setblocking(False)
    ends.start()
    ends.far.sendall(b"answer")
    assert os.read(ends.reader, 10) == b"answer"
    os.write(ends.writer, b"question")
    assert ends.far.recv(10) == b"question"
    ends.far.close()
    os.close(ends.writer)
    assert ends.finish() is None
