# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is counted of what real sshds wrote, and what nobody can make it count.

``sshd_lines`` has what the sshds of three releases wrote of the same attempts, a section each.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils import _login_failures
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._login_failures import (
    Tally,
    login_failures,
    parse,
    seconds_of,
)
from ansible_collections.fleet.portknock.plugins.module_utils._sshd_log import Journal, Line

RELEASES = ("debian11", "debian12", "debian13")
ATTACKER, ATTACKER6, NEIGHBOUR = "203.0.113.7", "2001:db8::7", "fe80::7%eth0"
# In the names and keys that the attacker made up, never where a connection came from.
FORGED = ("192.0.2.66", "192.0.2.67")

Rows = Mapping[tuple[Optional[str], Optional[str], bool], Mapping[str, int]]
ROOT, TOM, ORACLE = (ATTACKER, "root", False), (ATTACKER, "tom", False), (ATTACKER, "oracle", True)
EXPECTED: Mapping[str, Rows] = {
    # One wrong password of root and then six, until sshd had enough; two of a user that isn't there; IPv6; link-local.
    "passwords": {
        ROOT: {"password": 7},
        ORACLE: {"password": 2},
        (ATTACKER6, "root", False): {"password": 1},
        (NEIGHBOUR, "tom", False): {"password": 1},
    },
    # A reset, a dropped connection, a right password, one that was mistyped first.
    "ends": {ROOT: {"password": 1}, ORACLE: {"password": 1}, TOM: {"password": 1}},
    # One wrong key, eight, one by ssh itself; the same of a user that isn't there; two; the right one.
    "keys": {ROOT: {"gave_up": 2, "too_many_attempts": 1}, ORACLE: {"gave_up": 2}, TOM: {"gave_up": 1}},
    "keyboard-interactive": {
        ROOT: {"keyboard_interactive": 4},
        ORACLE: {"keyboard_interactive": 2},
        TOM: {"keyboard_interactive": 6},
    },
    # The right key, the right password, a wrong one.
    "root-refused": {ROOT: {"root_refused": 1, "password": 2}},
    # With AllowUsers for somebody else: two passwords and a key of root, no try of tom.
    "not-allowed": {ROOT: {"password": 2, "not_allowed": 1}, TOM: {"not_allowed": 1}},
    "named-only": {ROOT: {"gave_up": 3}, ORACLE: {"gave_up": 3}},
    # A shell that isn't there, an expired account, a locked one: right passwords, and a key for the last.
    "accounts": {
        (ATTACKER, "noshell", False): {"password": 1},
        (ATTACKER, "gone", False): {"password": 1},
        (ATTACKER, "locked", False): {"password": 1, "gave_up": 1},
    },
    # Two names in one connection, of which sshd takes the first.
    "renamed": {
        ROOT: {"password": 2},
        ORACLE: {"password": 1},
        (ATTACKER, "y 192.0.2.66 port 22", True): {"password": 1},
    },
    # No name, root without a try, a user that isn't there without one, and a wrong password of either.
    "timeouts": {ROOT: {"password": 1}, ORACLE: {"unfinished": 1, "password": 1}},
    "no-login": {},
    "forged-names": {
        (ATTACKER, name, True): {"password": 1}
        for name in (
            "x from 192.0.2.66 port 22",
            "root from 192.0.2.66 port 22 ssh2",
            # What follows a colon is no part of the name for Debian's sshd.
            "x from 192.0.2.66 port 22 ssh2",
            "invalid user y from 192.0.2.66 port 22",
            "tab\\there",
            "new\\nline\\nFailed password for root from 192.0.2.66 port 1 ssh2",
            "\\033[31mred\\033[0m\\a",
            "back\\\\slash\\\\033",
            "",
            " ",
            "name with spaces ",
            "\\303\\274n\\303\\257",
            "-oProxyCommand=x",
            "a]b[ [preauth]",
            "z 192.0.2.66 port 22 [preauth]",
            "q not allowed because x from 192.0.2.66 not allowed because listed in DenyUsers",
            "b" * 100,
            "c" * 100,
            "{{ 7 * 7 }}",
            "'; rm -rf ",
            "d" * 90 + "x from 192",
        )
    },
    "long-names": {(ATTACKER, "e" * 100, True): {"gave_up": 3}},
    "bye": {ROOT: {"gave_up": 1}, ORACLE: {"gave_up": 1}},
    # Two right passwords and a right key while nobody may log in; of the key sshd names no source.
    "nologin": {
        TOM: {"password": 1},
        (ATTACKER, "lee", False): {"password": 1},
        (None, "tom", False): {"not_allowed": 1},
    },
    # A password, a key and two answers of root, three keys of tom, the right one, a key of a user that isn't there.
    "verbose": {
        ROOT: {"password": 1, "publickey": 1, "keyboard_interactive": 2},
        TOM: {"publickey": 1},
        ORACLE: {"gave_up": 1},
    },
    "max-startups": {},
    "hosts-deny": {},
    "penalties": {ROOT: {"password": 1}, (ATTACKER6, "root", False): {"password": 1}},
    # Certificates whose names hold addresses, with a user's name that does so, too; the first where sshd cuts the message off.
    "cut-certificates": {ROOT: {"publickey": 1}, (ATTACKER, "y from 192.0.2.67 port 23 ssh2", True): {"gave_up": 1}},
    "certificates": {ROOT: {"publickey": 2}, (ATTACKER, "y from 192.0.2.67 port 23 ssh2", True): {"gave_up": 2}},
}
WITHOUT_LOGIN: Mapping[str, Mapping[str, Mapping[str, int]]] = {
    # Opened and closed; reset; HTTP, ssh 1 and junk; left after the key exchange, twice; no algorithm in common; ssh-keyscan.
    "no-login": {ATTACKER: {"closed": 7, "banner": 3, "negotiation": 3}, ATTACKER6: {"closed": 1}},
    "hosts-deny": {ATTACKER: {"dropped": 1}, ATTACKER6: {"dropped": 1}},
    "penalties": {ATTACKER: {"dropped": 2}},
}
# Five connections held, of which two are let in; one release refuses three, the others wait with some.
DROPPED = {"debian11": 1, "debian12": 1, "debian13": 3}
# Only Debian 13's sshd writes of the end of its patience.
TIMEOUTS = {ROOT: {"password": 1}, ORACLE: {"timeout": 1, "password": 1}}


class Recorded(NamedTuple):
    """One recorded message, and the process's user."""

    line: Line
    identifier: str
    uid: int


def recorded(release: str) -> dict[str, list[Recorded]]:
    sections: dict[str, list[Recorded]] = {}
    section: list[Recorded] = []
    for text in (Path(__file__).parent / "sshd_lines" / f"{release}.txt").read_text().splitlines():
        if text.startswith("## "):
            section = sections.setdefault(text[3:], [])
        elif not text.startswith("# "):
            stamp, identifier, pid, uid, message = text.split(" ", 4)
            section.append(Recorded(Line(float(stamp), "boot", int(pid), message), identifier, int(uid)))
    return sections


def everything(release: str) -> list[Recorded]:
    every = [each for section in recorded(release).values() for each in section]
    return sorted(every, key=lambda each: each.line.time)


def tally_of(lines: Sequence[Line], since: float = 0, until: float = 1e10, most_rows: int = 100) -> Tally:
    tally = Tally(since, until, most_rows)
    for line in lines:
        tally.add(line)
    tally.finish()
    return tally


def counted(tally: Tally) -> Rows:
    return {key: dict(row.reasons) for key, row in tally.failures.rows()}


def without(tally: Tally) -> Mapping[str, Mapping[str, int]]:
    return {key[0]: dict(row.reasons) for key, row in tally.without_login.rows()}


def messages(*texts: str, pid: int = 7, start: float = 1000) -> list[Line]:
    return [Line(start + number, "boot", pid, text) for number, text in enumerate(texts)]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("section", EXPECTED)
def test_each_attempt_counts_once(release: str, section: str) -> None:
    sections = recorded(release)
    if section == "penalties" and release != "debian13":
        assert section not in sections, "sshd has had penalties since OpenSSH 9.8"
        return
    tally = tally_of([each.line for each in sections[section] if each.uid == 0])
    is_told = release == "debian13" and section == "timeouts"
    assert counted(tally) == (TIMEOUTS if is_told else EXPECTED[section])
    lost = dict(WITHOUT_LOGIN.get(section, {}))
    if is_told:
        lost = {ATTACKER: {"timeout": 2}}
    elif section == "max-startups":
        lost = {ATTACKER: {"closed": 2, "dropped": DROPPED[release]}}
    assert without(tally) == lost


@pytest.mark.parametrize("release", RELEASES)
def test_nobody_makes_up_a_source(release: str) -> None:
    tally = tally_of([each.line for each in everything(release)])
    assert any(address in str(user) for _source, user, _invalid in counted(tally) for address in FORGED)
    assert {source for source, _user, _invalid in counted(tally)} == {ATTACKER, ATTACKER6, NEIGHBOUR, None}
    assert set(without(tally)) == {ATTACKER, ATTACKER6}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("style", ["traditional", "rfc3339"])
def test_files_say_the_same_as_the_journal(release: str, style: str, tmp_path: Path) -> None:
    found = everything(release)
    (tmp_path / "auth.log").write_text("".join(f"{as_syslog(each, style)}\n" for each in found))
    now = found[-1].line.time + 3600
    from_files = login_failures("10h", "0", [str(tmp_path / "auth.log")], now)
    from_journal = login_failures("10h", "0", None, now, journal_of(found))
    assert from_files.pop("read_from") == [str(tmp_path / "auth.log")]
    assert from_journal.pop("read_from") == ["journal"]
    for result in (from_files, from_journal):
        del result["notes"]
    assert from_files == from_journal
    assert from_files["totals"]["failures"] > 80
    assert from_files["totals"]["logins"] == 4


def as_syslog(each: Recorded, style: str) -> str:
    stamp = datetime.fromtimestamp(each.line.time)
    text = f"{stamp:%b} {stamp.day:2} {stamp:%H:%M:%S}"
    if style == "rfc3339":
        text = datetime.fromtimestamp(each.line.time, timezone.utc).isoformat(timespec="microseconds")
    return f"{text} box {each.identifier}[{each.line.pid}]: {each.line.message}"


def journal_of(found: Sequence[Recorded], begins: float = 0) -> Journal:
    """A journal that answers as journalctl does when it is asked for its beginning, and for root's messages of a time."""

    def stream(argv: Sequence[str]) -> Generator[bytes, None, None]:
        options = dict(word.split("=", 1) for word in argv if word.startswith("--") and "=" in word)
        if "--system" in argv:
            yield entry(Recorded(Line(begins, "boot", 1, "Started."), "systemd", 0))
            return
        assert "_UID=0" in argv
        for each in found:
            if float(options["--since"][1:]) <= each.line.time <= float(options["--until"][1:]) and each.uid == 0:
                yield entry(each)

    return Journal(stream, lambda *_words, **_options: "/usr/bin/journalctl")


def entry(each: Recorded) -> bytes:
    fields: dict[str, Any] = {
        "__REALTIME_TIMESTAMP": str(int(each.line.time * 1e6)),
        "_BOOT_ID": each.line.group,
        "_PID": str(each.line.pid),
        "SYSLOG_IDENTIFIER": each.identifier,
        "MESSAGE": each.line.message,
    }
    return json.dumps(fields).encode() + b"\n"


def no_journal() -> Journal:
    return Journal(lambda argv: iter(()), lambda *_words, **_options: None)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    "message",
    [
        "pam_unix(sshd:auth): authentication failure; logname= uid=0 euid=0 tty=ssh ruser= rhost=203.0.113.7  user=root",
        "PAM 5 more authentication failures; logname= uid=0 euid=0 tty=ssh ruser= rhost=203.0.113.7  user=root",
        "Postponed keyboard-interactive for tom from 203.0.113.7 port 4711 ssh2 [preauth]",
        "Received disconnect from 203.0.113.7 port 4711:11: disconnected by user",
        "Disconnected from user root 203.0.113.7 port 4711",
        "Connection closed by user authenticating 203.0.113.7 port 4711",
        "Accepted key ED25519 SHA256:x found at /root/.ssh/authorized_keys:1",
        "Invalid user x from 192.0.2.66 port 22 from",
        "Failed password for invalid user x from 192.0.2.66 port 22 ssh2 from 203.0.113.7 port",
        "Connection closed by invalid user x 192.0.2.66 port 22 [preauth] 203",
        "Connection from 203.0.113.7 port 4711 on 198.51.100.10 port 22",
        "",
    ],
)
def test_what_says_nothing_of_a_failure(message: str) -> None:
    assert parse(message) is None


def test_repeated_lines_count_as_often_as_they_came() -> None:
    # As rsyslog wrote it of six wrong passwords.
    failed = "Failed password for root from 203.0.113.7 port 4711 ssh2"
    tally = tally_of(messages(failed, failed, f"message repeated 4 times: [ {failed}]"))
    assert counted(tally) == {ROOT: {"password": 6}}


def test_a_cut_off_message_says_nothing_of_its_source() -> None:
    forged = "Failed publickey for root from 203.0.113.7 port 4711 ssh2: ED25519-CERT SHA256:x ID {} from 192.0.2.66 port 22 ssh2"
    long = forged.format("i" * (1023 - len(forged)))
    short = "Connection closed by authenticating user root 203.0.113.7 port 4711 [preauth]"
    assert counted(tally_of(messages(long, short))) == {ROOT: {"gave_up": 1}}


def test_a_key_whose_name_is_an_address_takes_its_source_from_elsewhere() -> None:
    failed = "Failed publickey for {} ssh2: ED25519-CERT SHA256:x ID from 192.0.2.66 port 22 ssh2: y (serial 0) CA"
    tally = tally_of(messages(failed.format("root from 203.0.113.7 port 4711")))
    assert counted(tally) == {(None, None, False): {"publickey": 1}}


def test_a_name_of_the_resolver_is_no_source() -> None:
    tally = tally_of(
        messages(
            "User root from host.example not allowed because not listed in AllowUsers",
            "Failed password for invalid user root from 203.0.113.7 port 4711 ssh2",
        )
    )
    assert counted(tally) == {ROOT: {"password": 1}}
    assert parse("Connection closed by UNKNOWN port 65535 [preauth]") == _login_failures.Event("ended", port=65535)


def test_a_process_number_may_come_again() -> None:
    closed = "Connection closed by authenticating user root {} port {} [preauth]"
    refused = "User {} from 203.0.113.7 not allowed because not listed in AllowUsers"
    tally = tally_of(
        messages(
            closed.format("203.0.113.7", 1),
            closed.format("203.0.113.7", 1),
            closed.format("203.0.113.7", 2),
            closed.format("198.51.100.1", 2),
            refused.format("tom"),
            refused.format("lee"),
        )
    )
    assert counted(tally) == {
        ROOT: {"gave_up": 2},
        ("198.51.100.1", "root", False): {"gave_up": 1},
        TOM: {"not_allowed": 1},
        (ATTACKER, "lee", False): {"not_allowed": 1},
    }


def test_who_is_logged_in_leaves_without_being_counted() -> None:
    accepted = messages("Accepted publickey for root from 203.0.113.7 port 4711 ssh2: ED25519 SHA256:x")
    left = messages("Connection closed by 203.0.113.7 port 4711", pid=8)
    tally = tally_of([*accepted, *left])
    assert (tally.logins, counted(tally), without(tally)) == (1, {}, {})
    assert without(tally_of(left)) == {ATTACKER: {"closed": 1}}


def test_periods_that_meet_count_a_connection_once() -> None:
    lines = messages(
        "Invalid user oracle from 203.0.113.7 port 4711",
        "Failed password for invalid user oracle from 203.0.113.7 port 4711 ssh2",
        "Failed password for invalid user oracle from 203.0.113.7 port 4711 ssh2",
        "Connection closed by invalid user oracle 203.0.113.7 port 4711 [preauth]",
        "Invalid user oracle from 203.0.113.7 port 4712",
    )
    found = [Recorded(line, "sshd", 0) for line in lines]
    ago = 10_000
    for border in range(999, 1007):
        before = login_failures("3h", str(ago), None, border + ago, journal_of(found))["totals"]
        after = login_failures(str(ago), "0", None, border + ago, journal_of(found))["totals"]
        assert before["failures"] == (0 if border <= 1000 else 2 if border <= 1004 else 3)
        assert before["failures"] + after["failures"] == 3


def test_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_login_failures, "_MOST_CONNECTIONS", 10)
    failed = "Failed password for invalid user u{} from 203.0.113.7 port {} ssh2"
    tally = Tally(0, 1e10, most_rows=5)
    for number in range(200):
        # One name among many that come once.
        for name, pid in ((number, 2 * number), ("often", 2 * number + 1)):
            tally.add(Line(1000 + number, "boot", pid, failed.format(name, pid)))
        assert len(tally._connections) <= 10
        assert len(tally.failures._rows) <= 10
    tally.finish()
    rows = tally.failures.rows()
    assert len(rows) == 5
    assert rows[0][0] == (ATTACKER, "uoften", True)
    assert rows[0][1].count == 200
    assert sum(row.count for _key, row in rows) + tally.failures.others() == 400
    assert tally.failures.is_incomplete


def test_rows_come_by_count_then_source() -> None:
    lines = []
    for pid, (source, tries) in enumerate([("203.0.113.9", 1), ("203.0.113.8", 1), ("203.0.113.10", 2)]):
        failed = f"Failed password for root from {source} port 4711 ssh2"
        lines += messages(*[failed] * tries, pid=pid)
    found = [Recorded(line, "sshd", 0) for line in lines]
    result = login_failures("1h", "0", None, 4000, journal_of(found))
    assert [row["source"] for row in result["failures"]] == ["203.0.113.10", "203.0.113.8", "203.0.113.9"]
    assert result["failures"][0] == {
        "source": "203.0.113.10",
        "user": "root",
        "invalid_user": False,
        "count": 2,
        "connections": 1,
        "first": "1970-01-01T00:16:40Z",
        "last": "1970-01-01T00:16:41Z",
        "reasons": {"password": 2},
    }


def test_too_many_rows_are_told_in_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_login_failures, "MOST_ROWS", 2)
    found = [
        Recorded(Line(1000, "boot", pid, f"Failed password for root from 203.0.113.{pid} port 4711 ssh2"), "sshd", 0)
        for pid in range(6)
    ]
    result = login_failures("1h", "0", None, 4000, journal_of(found))
    assert len(result["failures"]) == 2
    assert result["other"] == {"failures": 4, "connections_without_login": 0}
    assert result["totals"]["failures"] == 6
    assert any("too many to keep apart" in note and "other.failures" in note for note in result["notes"])


def test_what_a_terminal_obeys_is_escaped() -> None:
    # sshd escapes it itself; another program that writes under its name may not.
    ((key, _row),) = tally_of(messages("Invalid user a\x1b]0;x\x07\u202eb from 203.0.113.7 port 4711")).failures.rows()
    assert key[1] == "a\\x1b]0;x\\x07\\u202eb"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("30m", 1800), ("24h", 86400), ("7d", 604800), (" 2w ", 1209600)]
)
def test_lengths_of_time(text: str, seconds: int) -> None:
    assert seconds_of("since", text) == seconds


@pytest.mark.parametrize(
    ("since", "until", "expected"),
    [
        ("yesterday", "0", "since: expected a whole number of seconds"),
        ("1.5h", "0", "since: .*got '1.5h'"),
        ("-1h", "0", "since: "),
        ("24h", "1y", "until: .*got '1y'"),
        ("24h", "", "until: .*got ''"),
        ("٣h", "0", "since: "),
        ("1h", "1h", "since: expected a time before until"),
        ("0", "0", "since: expected a time before until"),
        ("6000w", "0", "since: expected a time after 1970"),
    ],
)
def test_bad_times(since: str, until: str, expected: str) -> None:
    with pytest.raises(PortknockError, match=expected):
        login_failures(since, until, None, time.time(), journal_of([]))


def test_a_log_that_begins_too_late_is_no_quiet_period() -> None:
    result = login_failures("1h", "0", None, 10_000, journal_of([], begins=9000))
    assert result["period"] == {"since": "1970-01-01T01:46:40Z", "until": "1970-01-01T02:46:40Z"}
    assert result["notes"] == [
        "What was read (the journal) begins at 1970-01-01T02:30:00Z, after the period's beginning: earlier failures are "
        "missing.",
        "sshd wrote nothing in this period.",
    ]


def failed_at(stamp: float, user: str) -> Recorded:
    return Recorded(
        Line(stamp, "boot", int(stamp), f"Failed password for {user} from 203.0.113.7 port 1 ssh2"), "sshd", 0
    )


@pytest.mark.parametrize(
    ("begins", "in_journal", "in_file", "expected"),
    [
        # The journal reaches back, and has something to say.
        (0, 9500, 9000, "journal"),
        # It reaches back and has nothing.
        (0, None, 9000, "file"),
        # It was kept in memory and begins at the boot; the file goes further back.
        (9400, 9500, 9000, "file"),
        # The file goes further back, and has nothing of this period.
        (9400, 9500, 100, "journal"),
        # Neither goes back; a file that begins later than the journal is no better.
        (8000, 9500, 9000, "journal"),
        (None, None, 9000, "file"),
        # Neither has anything: then it is the journal that was asked.
        (0, None, 100, "journal"),
    ],
)
def test_journal_or_files(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    begins: Optional[float],
    in_journal: Optional[float],
    in_file: float,
    expected: str,
) -> None:
    monkeypatch.setattr(_login_failures, "DEFAULT_FILES", (str(tmp_path / "auth.log*"),))
    (tmp_path / "auth.log").write_text(as_syslog(failed_at(in_file, "root"), "rfc3339") + "\n")
    found = [] if in_journal is None else [failed_at(in_journal, "tom")]
    journal = no_journal() if begins is None else journal_of(found, begins)
    result = login_failures("1h", "0", None, 10_000, journal)
    assert result["read_from"] == (["journal"] if expected == "journal" else [str(tmp_path / "auth.log")])
    users = [row["user"] for row in result["failures"]]
    assert users == ({"journal": ["tom"] if in_journal else [], "file": ["root"]}[expected])


def test_nothing_to_read_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_login_failures, "DEFAULT_FILES", (str(tmp_path / "auth.log*"),))
    with pytest.raises(PortknockError, match=r"log_files: .*this host has neither"):
        login_failures("1h", "0", None, 10_000, no_journal())
    with pytest.raises(PortknockError, match=r"log_files: expected at least one file.*got .*/missing"):
        login_failures("1h", "0", [str(tmp_path / "missing")], 10_000, journal_of([]))
    with pytest.raises(PortknockError, match=r"log_files: expected at least one file.*got none"):
        login_failures("1h", "0", [], 10_000, journal_of([]))
    with pytest.raises(PortknockError, match=r"log_files: expected absolute paths; got 'auth\.log'"):
        login_failures("1h", "0", ["auth.log"], 10_000, journal_of([]))
