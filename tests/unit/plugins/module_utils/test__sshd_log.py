# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the journal is asked for, and how lines of files and their times are read."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Generator, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._sshd_log import Journal, Line, LogFiles, as_utc

FAILED = "Failed password for root from 203.0.113.7 port 4711 ssh2"
HOUR = 3600


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc).timestamp()


@pytest.fixture(params=["UTC", "America/St_Johns"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


def write(path: Path, written: float, *texts: str) -> Path:
    body = "".join(f"{text}\n" for text in texts).encode()
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)
    os.utime(path, (written, written))
    return path


def times(path: Path, begin: float = 0, end: float = 1e11) -> list[str]:
    return [as_utc(line.time) for line in LogFiles([str(path)], begin).lines(begin, end)]


def test_what_journalctl_is_asked_for() -> None:
    asked: list[Sequence[str]] = []

    def stream(argv: Sequence[str]) -> Generator[bytes, None, None]:
        asked.append(argv)
        yield from ()

    journal = Journal(stream, lambda *_words, **_options: "/usr/bin/journalctl")
    assert journal.begins is None
    assert list(journal.lines(100.7, 200.2)) == []
    assert all(argv[0] == "journalctl" and "--output=json" in argv for argv in asked)
    assert asked[1][-8:] == [
        "--since=@100",
        "--until=@201",
        "SYSLOG_IDENTIFIER=sshd",
        "SYSLOG_IDENTIFIER=sshd-session",
        "SYSLOG_IDENTIFIER=sshd-auth",
        "_UID=0",
        "+",
        "MESSAGE_ID=a596d6fe7bfa4994828e72309e95d61e",
    ]


def test_journal_entries() -> None:
    base = {"__REALTIME_TIMESTAMP": "1500000", "_BOOT_ID": "b", "_PID": "7", "MESSAGE": FAILED}
    dropped = {**base, "MESSAGE_ID": "a596d6fe7bfa4994828e72309e95d61e"}
    entries = [
        base,
        {**base, "MESSAGE": list(b"caf\xe9")},
        {**base, "MESSAGE": None},
        {**base, "_PID": None},
        {**dropped, "MESSAGE": "Suppressed 40 messages from ssh.service"},
        {**dropped, "MESSAGE": "Suppressed 2 messages from sshd@1-203.0.113.7.service"},
        {**dropped, "MESSAGE": "Suppressed 9 messages from cron.service"},
    ]
    closed = []

    def stream(_argv: Sequence[str]) -> Generator[bytes, None, None]:
        try:
            for each in entries:
                yield json.dumps(each).encode()
        finally:
            closed.append(True)

    journal = Journal(stream, lambda *_words, **_options: "/usr/bin/journalctl")
    assert journal.begins == 1.5
    # It isn't read to its end for that.
    assert closed == [True]
    assert journal.notes == []
    assert list(journal.lines(0, 10)) == [
        Line(1.5, "b", 7, FAILED),
        Line(1.5, "b", 7, "caf\ufffd"),
        Line(1.5, "b", 7, ""),
    ]
    assert len(journal.notes) == 1
    assert "dropped 42 messages of sshd" in journal.notes[0]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"2026-11-21T19:00:16.110635+00:00 box sshd[7]: {FAILED}", "2026-11-21T19:00:16Z"),
        (f"2026-11-21T19:00:16Z box sshd-session[7]: {FAILED}", "2026-11-21T19:00:16Z"),
        (f"2026-11-21T21:00:16.5+02:00 box sshd-auth[7]: {FAILED}", "2026-11-21T19:00:16Z"),
        (f"2026-11-21T15:30:16-0330 box sshd[7]: {FAILED}", "2026-11-21T19:00:16Z"),
    ],
)
def test_lines_with_whole_times(line: str, expected: str, tmp_path: Path, zone: str) -> None:
    path = write(tmp_path / "auth.log", at("2026-11-22T00:00:00"), line)
    found = list(LogFiles([str(path)], 0).lines(0, 1e11))
    assert [(as_utc(each.time), each.group, each.pid, each.message) for each in found] == [(expected, "box", 7, FAILED)]


@pytest.mark.parametrize(
    "line",
    [
        f"2026-11-21T19:00:16+00:00 box cron[7]: {FAILED}",
        f"2026-11-21T19:00:16+00:00 box sshd: {FAILED}",
        f"2026-11-21T19:00:16+00:00 box su[7]: sshd[7]: {FAILED}",
        f"2026-13-21T19:00:16+00:00 box sshd[7]: {FAILED}",
        f"2026-11-21T19:00:16 box sshd[7]: {FAILED}",
        f"Foo 21 19:00:16 box sshd[7]: {FAILED}",
        f"Feb 30 19:00:16 box sshd[7]: {FAILED}",
        f"Nov 21 25:00:16 box sshd[7]: {FAILED}",
        f"sshd[7]: {FAILED}",
        "\0" * 200_000 + "sshd",
    ],
)
def test_other_lines_are_passed_over(line: str, tmp_path: Path) -> None:
    assert times(write(tmp_path / "auth.log", at("2026-11-22T00:00:00"), line)) == []


def test_times_without_a_year(tmp_path: Path, zone: str) -> None:
    offset = {"UTC": 0, "America/St_Johns": 3.5 * HOUR}[zone]
    path = write(
        tmp_path / "auth.log",
        at("2027-01-05T12:00:00"),
        f"Jan  6 08:00:00 box sshd[7]: {FAILED}",
        f"Feb 29 01:02:03 box sshd[7]: {FAILED}",
        f"Dec 31 20:00:00 box sshd[7]: {FAILED}",
        f"Jan  5 03:00:00 box sshd[7]: {FAILED}",
        f"Jan  6 12:00:01 box sshd[7]: {FAILED}",
    )
    # A clock may have been set back by a day, not by more.
    expected = [
        "2027-01-06T08:00:00",
        "2024-02-29T01:02:03",
        "2026-12-31T20:00:00",
        "2027-01-05T03:00:00",
        "2026-01-06T12:00:01",
    ]
    assert times(path) == [as_utc(at(each) + offset) for each in expected]


def test_months_are_english_whatever_the_locale(tmp_path: Path) -> None:
    year = at("2026-12-31T23:00:00")
    months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
    path = write(tmp_path / "auth.log", year, *(f"{month} 10 00:00:00 box sshd[7]: {FAILED}" for month in months))
    assert len(times(path)) == 12


def test_rotated_files_are_read_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    stamp = "2026-11-{:02}T00:00:00Z box sshd[7]: " + FAILED
    write(tmp_path / "auth.log", at("2026-11-21T00:00:00"), stamp.format(20), stamp.format(21))
    write(tmp_path / "auth.log.1", at("2026-11-14T00:00:00"), stamp.format(14))
    write(tmp_path / "auth.log.2.gz", at("2026-11-07T00:00:00"), "rubbish", stamp.format(7))
    write(tmp_path / "auth.log.3.xz", at("2026-11-01T00:00:00"), stamp.format(1))
    write(tmp_path / "auth.log.4.gz", at("2026-10-20T00:00:00"), stamp.format(5))
    os.symlink(tmp_path / "auth.log", tmp_path / "auth.log.link")
    (tmp_path / "auth.log.d").mkdir()
    patterns = [str(tmp_path / "auth.log*"), str(tmp_path / "auth.log")]
    files = LogFiles(patterns, at("2026-11-03T00:00:00"))
    assert [os.path.basename(path) for path in files.names()] == ["auth.log.2.gz", "auth.log.1", "auth.log"]
    # The oldest isn't read, and tells how far back they go all the same.
    assert files.begins == at("2026-11-05T00:00:00")
    found = [line.time for line in files.lines(at("2026-11-07T00:00:00"), at("2026-11-21T00:00:00"))]
    assert found == [at(f"2026-11-{day:02}T00:00:00") for day in (7, 14, 20)]
    assert len(files.notes) == 1
    assert "auth.log.3.xz: compressed otherwise" in files.notes[0]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    lines = [f"2026-11-21T00:00:00Z box sshd[{pid}]: {os.urandom(20).hex()}" for pid in range(5000)]
    path = write(tmp_path / "auth.log.1.gz", at("2026-11-21T00:00:00"), *lines)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    (tmp_path / "auth.log.2.gz").write_bytes(b"no gzip")
    files = LogFiles([str(tmp_path / "auth.log*")], 0)
    assert 0 < len(list(files.lines(0, 1e11))) < 5000
    assert sorted(os.path.basename(note) for note in files.notes) == [
        "auth.log.1.gz: not read to its end (damaged).",
        "auth.log.2.gz: not read to its end (damaged).",
    ]


def test_no_files(tmp_path: Path) -> None:
    files = LogFiles([str(tmp_path / "*")], 0)
    assert (files.is_there, files.begins, files.names(), list(files.lines(0, 1e11))) == (False, None, [], [])
