# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import io

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._system import lines, run, stream


def test_output_comes_line_by_line() -> None:
    assert list(stream(["printf", "a\\nb"])) == [b"a\n", b"b"]


def test_whoever_stops_early_ends_the_program() -> None:
    # Without that, closing would wait for ever.
    endless = stream(["sh", "-c", "trap '' PIPE; while :; do echo again || :; done"])
    assert next(endless) == b"again\n"
    endless.close()


def test_a_program_that_fails() -> None:
    with pytest.raises(PortknockError, match="sh: expected it to succeed; got exit code 3"):
        list(stream(["sh", "-c", "echo a; exit 3"]))
    with pytest.raises(PortknockError, match="no-such-program: expected this program to be installed"):
        list(stream(["no-such-program"]))


def test_a_line_without_end_comes_in_pieces() -> None:
    pieces = list(lines(io.BytesIO(b"x" * 200_000 + b"\ny")))
    assert max(map(len, pieces)) <= 65536
    assert b"".join(pieces) == b"x" * 200_000 + b"\ny"


def test_programs_write_times_alike_for_every_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    assert run(["date", "-d", "@0", "+%H:%M"]).stdout == "00:00\n"
