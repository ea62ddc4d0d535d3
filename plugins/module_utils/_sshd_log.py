# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where sshd's messages are: the systemd journal, or the files that a syslog daemon writes. Both are read as a stream."""

from __future__ import annotations

import contextlib
import glob
import gzip
import json
import os
import re
import shutil
import time
import zlib
from datetime import datetime, timezone
from typing import IO, Any, Callable, Generator, Iterator, Match, NamedTuple, Optional, Protocol, Sequence, cast

from ansible_collections.fleet.portknock.plugins.module_utils._system import SEARCH_PATH, Streamer, lines
from ansible_collections.fleet.portknock.plugins.module_utils._system import stream as stream_program

DEFAULT_FILES = ("/var/log/auth.log*", "/var/log/secure*")
# sshd names itself by its three programs since OpenSSH 9.8 (sshd-session) and 10.0 (sshd-auth).
_IDENTIFIERS = ("sshd", "sshd-session", "sshd-auth")
# systemd's catalogue: messages of a service were dropped because there were too many (SD_MESSAGE_JOURNAL_DROPPED).
_DROPPED = "a596d6fe7bfa4994828e72309e95d61e"
_SUPPRESSED = re.compile(r"Suppressed (\d+) messages from (ssh\S*)")
_FIELDS = "MESSAGE,MESSAGE_ID,SYSLOG_IDENTIFIER,_PID"
_OTHER_COMPRESSION = (".bz2", ".lz4", ".xz", ".zst")
_STAMP = (
    r"(?:(?P<iso>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:[.,]\d+)?(?P<zone>Z|[+-]\d\d:?\d\d)"
    r"|(?P<month>[A-Z][a-z]{2}) (?P<day>[ \d]\d) (?P<clock>\d\d:\d\d:\d\d))"
)
_ANY_LINE = re.compile(_STAMP + " ")
_LINE = re.compile(rf"{_STAMP} (?P<host>\S+) (?:{'|'.join(_IDENTIFIERS)})\[(?P<pid>\d+)\]: (?P<message>.*)")
# Not strptime's, which change with the locale.
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
# A leap day is found at most this many years back.
_YEARS = 9
_DAY = 86400


class Line(NamedTuple):
    """One message of sshd: seconds since 1970, what tells equal process numbers apart (the boot, or the host), the process."""

    time: float
    group: str
    pid: int
    message: str


class Source(Protocol):
    """What is read."""

    title: str

    @property
    def begins(self) -> Optional[float]:
        """The first time that is there; None if nothing is."""

    @property
    def notes(self) -> list[str]:
        """After reading: sentences about what could not be read."""

    def names(self) -> list[str]:
        """What was read: ``journal``, or the files' paths."""

    def lines(self, begin: float, end: float) -> Iterator[Line]:
        """What sshd wrote in this time (seconds since 1970), in the order in which it was written."""


class Journal:
    """The systemd journal of this host, all boots.

    Only what root's processes wrote counts: any user can write to it under sshd's name.
    """

    title = "the journal"

    def __init__(self, stream: Streamer = stream_program, which: Callable[..., Optional[str]] = shutil.which) -> None:
        self._stream = stream
        self._suppressed = 0
        self.begins: Optional[float] = None
        if which("journalctl", path=SEARCH_PATH) is not None:
            with contextlib.closing(self._entries("--system")) as entries:
                self.begins = next((_time_of(entry) for entry in entries), None)

    @property
    def notes(self) -> list[str]:
        if not self._suppressed:
            return []
        return [
            f"The journal dropped {self._suppressed} messages of sshd in this time, since they were too many at once "
            "(RateLimitBurst in journald.conf): failures are missing."
        ]

    def names(self) -> list[str]:
        return ["journal"]

    def lines(self, begin: float, end: float) -> Iterator[Line]:
        """:raises PortknockError: journalctl fails."""
        matches = [f"SYSLOG_IDENTIFIER={name}" for name in _IDENTIFIERS]
        period = (f"--since=@{max(0, int(begin))}", f"--until=@{int(end) + 1}")
        for entry in self._entries(*period, *matches, "_UID=0", "+", f"MESSAGE_ID={_DROPPED}"):
            message = _message_of(entry)
            if entry.get("MESSAGE_ID") == _DROPPED:
                suppressed = _SUPPRESSED.match(message)
                self._suppressed += int(suppressed[1]) if suppressed else 0
            elif str(entry.get("_PID", "")).isdigit():
                yield Line(_time_of(entry), str(entry.get("_BOOT_ID")), int(entry["_PID"]), message)

    def _entries(self, *arguments: str) -> Generator[dict[str, Any], None, None]:
        argv = ["journalctl", "--quiet", "--no-pager", "--output=json", f"--output-fields={_FIELDS}", *arguments]
        with contextlib.closing(self._stream(argv)) as found:
            for text in found:
                yield json.loads(text)


class LogFiles:
    """Files that a syslog daemon writes, with those that were rotated away, also by gzip.

    Times without a year are taken for the last ones before the file was last written, in the host's own time zone. So a
    file that spans more than a year is misread.
    """

    title = "the log files"

    def __init__(self, patterns: Sequence[str], begin: float) -> None:
        """:param begin: files that were last written before this time (in seconds since 1970) are not read."""
        self.notes: list[str] = []
        self.begins: Optional[float] = None
        self._files: list[tuple[str, float]] = []
        found = []
        for path in {os.path.realpath(path) for pattern in patterns for path in glob.glob(pattern)}:
            if path.endswith(_OTHER_COMPRESSION):
                self.notes.append(f"{path}: compressed otherwise than by gzip, and not read.")
                continue
            # One that is rotated away at this moment is there under its next name.
            with contextlib.suppress(OSError):
                if os.path.isfile(path):
                    found.append((os.stat(path).st_mtime, path))
        for written, path in sorted(found):
            if self.begins is None:
                stamps = (_time_at(_ANY_LINE.match(text), written) for text in self._open(path))
                self.begins = next((stamp for stamp in stamps if stamp is not None), None)
            if written >= begin:
                self._files.append((path, written))
        self.is_there = bool(found)

    def names(self) -> list[str]:
        return [path for path, _written in self._files]

    def lines(self, begin: float, end: float) -> Iterator[Line]:
        for path, written in self._files:
            for text in self._open(path):
                match = _LINE.match(text) if "sshd" in text else None
                stamp = _time_at(match, written)
                if match and stamp is not None and begin <= stamp < end:
                    yield Line(stamp, match["host"], int(match["pid"]), match["message"].rstrip("\n"))

    def _open(self, path: str) -> Iterator[str]:
        try:
            with open(path, "rb") as file, contextlib.ExitStack() as stack:
                packed = path.endswith(".gz")
                stream = cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=file))) if packed else file
                for line in lines(stream):
                    yield line.decode("utf-8", "replace")
        except (OSError, EOFError, zlib.error) as exc:
            self._note(f"{path}: not read to its end ({getattr(exc, 'strerror', None) or 'damaged'}).")

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def as_utc(seconds: float) -> str:
    """A time as ISO 8601 in UTC, whole seconds."""
    return datetime.fromtimestamp(int(seconds), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _time_of(entry: dict[str, Any]) -> float:
    return int(entry["__REALTIME_TIMESTAMP"]) / 1e6


def _message_of(entry: dict[str, Any]) -> str:
    """The text; journalctl gives bytes that aren't UTF-8 as numbers, and nothing where there is too much."""
    message = entry.get("MESSAGE")
    if isinstance(message, list) and all(isinstance(each, int) for each in message):
        return bytes(message).decode("utf-8", "replace")
    return message if isinstance(message, str) else ""


def _time_at(match: Optional[Match[str]], written: float) -> Optional[float]:
    """The time at a line's beginning, in seconds since 1970; None where there is none.

    :param written: when the file was last written.
    """
    if match is None:
        return None
    if match["iso"]:
        zone = match["zone"].replace("Z", "+00:00")
        return _time_with_zone(match["iso"], zone if ":" in zone else f"{zone[:3]}:{zone[3:]}")
    return _time_without_year(match["month"], int(match["day"]), match["clock"], int(written))


def _time_with_zone(text: str, zone: str) -> Optional[float]:
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(text + zone).timestamp()
    return None


def _time_without_year(month: str, day: int, clock: str, written: int) -> Optional[float]:
    if month not in _MONTHS:
        return None
    newest = time.localtime(written).tm_year + 1
    for year in range(newest, newest - _YEARS, -1):
        # A leap day isn't there in every year.
        with contextlib.suppress(ValueError, OverflowError):
            hour, minute, second = map(int, clock.split(":"))
            stamp = datetime(year, _MONTHS.index(month) + 1, day, hour, minute, second).timestamp()
            # A day's grace for clocks that were set.
            if stamp <= written + _DAY:
                return stamp
    return None


__all__ = ("DEFAULT_FILES", "Journal", "Line", "LogFiles", "Source", "as_utc")
