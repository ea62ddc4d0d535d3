# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The file of secrets that one operator's helper reads: its format, and who may have it.

JSON of this shape, without any other key::

    {
      "format": 1,
      "operator": "alice",
      "hosts": {
        "web1": {"hostname": "192.0.2.7", "port": 22, "sequences": [["11111/tcp", "33333/udp", "22222/tcp"]]}
      }
    }

The keys of ``hosts`` are the names that a person uses, ``hostname`` and ``port`` what ssh connects to, ``sequences``
what opens it, likeliest first. Format 2 says that a host has one more key. One with sequences that open once each has them by
their ids, and one that is reached through jump hosts has these as ssh's ProxyJump takes them::

        "web2": {
          "hostname": "192.0.2.8",
          "port": 22,
          "sequences": [],
          "one_time": {"stamp": "0123456789abcdef", "sequences": {"41": ["11111/tcp", "33333/udp", "22222/tcp"]}},
          "jump": "alice@bastion.example.org:2222"
        }

and one with sequences that shut a window early has them as ``"close": [["44444/tcp", "12345/tcp", "33330/tcp"]]``.

No error text of this module quotes the file.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
from types import MappingProxyType
from typing import Mapping, NamedTuple

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._ports import (
    HIGHEST_PORT,
    SENT_PROTOCOLS,
    Knock,
    parse_knocks,
)

FORMAT = 1
FORMAT_WITH_MORE = 2

_TOP_KEYS = {"format", "operator", "hosts"}
_HOST_KEYS = {"hostname", "port", "sequences"}
_MORE_KEYS = {"one_time", "jump", "close"}
_ONE_TIME_KEYS = {"stamp", "sequences"}
_ID = re.compile(r"[1-9][0-9]{0,4}", re.ASCII)
_PRINTABLE = re.compile(r"[^\x00-\x1f\x7f]+")


class Access(NamedTuple):
    """Where a host is, and what opens it: at least one sequence, likeliest first.

    ``one_time`` are sequences that open once each, by id, and ``stamp`` tells these ids from those of another time. ``jump`` is
    the way there as ssh's ProxyJump takes it, empty where there is no host on it. ``close`` are sequences that shut the window.
    """

    hostname: str
    port: int
    sequences: tuple[tuple[Knock, ...], ...]
    one_time: Mapping[int, tuple[Knock, ...]] = MappingProxyType({})
    stamp: str = ""
    jump: str = ""
    close: tuple[tuple[Knock, ...], ...] = ()

    def to_mapping(self) -> dict[str, object]:
        """Return what the file has of it."""
        mapping: dict[str, object] = {
            "hostname": self.hostname,
            "port": self.port,
            "sequences": [[str(knock) for knock in knocks] for knocks in self.sequences],
        }
        if self.one_time:
            once = {str(identity): [str(knock) for knock in knocks] for identity, knocks in self.one_time.items()}
            mapping["one_time"] = {"stamp": self.stamp, "sequences": once}
        if self.jump:
            mapping["jump"] = self.jump
        if self.close:
            mapping["close"] = [[str(knock) for knock in knocks] for knocks in self.close]
        return mapping


class HelperSecrets(NamedTuple):
    """What one operator may open, by the hosts' names."""

    operator: str
    hosts: Mapping[str, Access]

    def to_text(self) -> str:
        """Return the file's content; the same secrets give the same text."""
        content = {
            "format": FORMAT_WITH_MORE
            if any(access.one_time or access.jump or access.close for access in self.hosts.values())
            else FORMAT,
            "operator": self.operator,
            "hosts": {name: access.to_mapping() for name, access in self.hosts.items()},
        }
        return json.dumps(content, indent=2) + "\n"

    def find(self, host: str, port: int | None, name: str | None = None) -> tuple[str, Access]:
        """Return the name of a host and what opens it.

        :param host: a name in the file or the hostname that is written there, in any case.
        :param port: tells hosts apart that share a hostname, as behind one NAT; None where it isn't known.
        :param name: the name in the file, which settles it.
        :raises PortknockError: none fits, or more than one.
        """
        if name is not None:
            if name not in self.hosts:
                raise PortknockError(f"--name: expected the name of a host in the file of secrets; got {name!r}.")
            return name, self.hosts[name]
        wanted = host.lower()
        found = [entry for entry in self.hosts.items() if entry[0].lower() == wanted]
        found = found or [entry for entry in self.hosts.items() if entry[1].hostname.lower() == wanted]
        # A gate may protect more ports than the one that is written down.
        found = [entry for entry in found if entry[1].port == port] or found
        if not found:
            raise PortknockError(
                f"HOST: expected a host that the file of secrets knows; got {host!r}. If it is known by another name, give "
                "that by --name."
            )
        if len(found) > 1:
            names = ", ".join(entry[0] for entry in found)
            raise PortknockError(f"--name: expected one of {names}, which share {host!r}; got none.")
        return found[0]


def parse_secrets(text: str, path: str) -> HelperSecrets:
    """Read what :meth:`HelperSecrets.to_text` made.

    :param path: the file, for the error.
    :raises PortknockError: anything else; the text says where, never what came.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        # What the parser says may quote the text.
        raise _damaged(path, "JSON", "the content") from None
    if isinstance(data, dict) and _is_newer(data.get("format")):
        raise PortknockError(
            f"{path}: expected a file of format {FORMAT_WITH_MORE} or before; got one of a newer format. Use the helper "
            "that came with it."
        )
    if not isinstance(data, dict) or set(data) != _TOP_KEYS:
        raise _damaged(path, f"a mapping of {', '.join(sorted(_TOP_KEYS))}", "the content")
    if data["format"] not in (FORMAT, FORMAT_WITH_MORE) or isinstance(data["format"], bool):
        raise _damaged(path, f"{FORMAT} or {FORMAT_WITH_MORE}", "format")
    if not _is_printable(data["operator"]):
        raise _damaged(path, "a name", "operator")
    hosts = data["hosts"]
    if not isinstance(hosts, dict) or not all(_is_printable(name) for name in hosts):
        raise _damaged(path, "a mapping from the names of hosts", "hosts")
    return HelperSecrets(
        data["operator"],
        {name: _parse_access(value, path, number) for number, (name, value) in enumerate(hosts.items(), 1)},
    )


def read_secrets(path: str) -> HelperSecrets:
    """Read the file, if it is the user's own and nobody else can read it.

    :raises PortknockError: it isn't, it can't be read, or as :func:`parse_secrets`.
    """
    try:
        # Not waiting: what isn't a file, such as a pipe, is refused by what is known of it when it is open.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            _check_private(path, os.fstat(file.fileno()))
            content = file.read()
    except FileNotFoundError:
        raise PortknockError(
            f"{path}: expected the file of secrets; there is none. Ask whoever runs the hosts for yours, or correct "
            "--secrets."
        ) from None
    except OSError as exc:
        reason = os.strerror(exc.errno) if exc.errno else "an error without a number"
        raise PortknockError(f"{path}: expected a file that you can read; got: {reason}.") from None
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise _damaged(path, "UTF-8", "the content") from None
    return parse_secrets(text, path)


def _check_private(path: str, status: os.stat_result) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode):
        raise PortknockError(f"{path}: expected a regular file; got something else. Correct --secrets.")
    if status.st_uid != os.geteuid():
        raise PortknockError(
            f"{path}: expected a file of your own (user id {os.geteuid()}); got one of user id {status.st_uid}. Run: "
            f"sudo chown {os.geteuid()} {shlex.quote(path)}"
        )
    if mode & 0o077:
        raise PortknockError(
            f"{path}: expected a file that only you can read (mode 0600); got mode {mode:04o}. Run: chmod 600 "
            f"{shlex.quote(path)}"
        )


def _parse_access(value: object, path: str, number: int) -> Access:
    where = f"host number {number}"
    if not isinstance(value, dict) or set(value) - _MORE_KEYS != _HOST_KEYS:
        raise _damaged(path, f"a mapping of {', '.join(sorted(_HOST_KEYS))}", where)
    hostname, port, sequences = value["hostname"], value["port"], value["sequences"]
    if not _is_printable(hostname):
        raise _damaged(path, "a name or an address", f"hostname of {where}")
    if not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= HIGHEST_PORT:
        raise _damaged(path, f"a port from 1 to {HIGHEST_PORT}", f"port of {where}")
    jump = value.get("jump", "")
    if "jump" in value and not _is_printable(jump):
        raise _damaged(path, "a jump host as [user@]host[:port]", f"jump of {where}")
    once, stamp = _parse_one_time(value["one_time"], path, where) if "one_time" in value else ({}, "")
    knocks = _parse_sequences(sequences, path, f"sequences of {where}")
    if not (knocks or once):
        raise _damaged(path, "a list of lists of port/protocol", f"sequences of {where}")
    close = _parse_sequences(value["close"], path, f"close of {where}") if "close" in value else ()
    return Access(hostname, port, knocks, once, stamp, jump, close)


def _parse_sequences(value: object, path: str, place: str) -> tuple[tuple[Knock, ...], ...]:
    if not isinstance(value, list) or not all(value):
        raise _damaged(path, "a list of lists of port/protocol", place)
    try:
        return tuple(parse_knocks(sequence, "sequences", secret=True, protocols=SENT_PROTOCOLS) for sequence in value)
    except PortknockError:
        raise _damaged(path, "a list of lists of port/protocol, tcp, udp or icmp", place) from None


def _parse_one_time(value: object, path: str, where: str) -> tuple[dict[int, tuple[Knock, ...]], str]:
    place = f"one_time of {where}"
    if not isinstance(value, dict) or set(value) != _ONE_TIME_KEYS or not _is_printable(value["stamp"]):
        raise _damaged(path, f"a mapping of {', '.join(sorted(_ONE_TIME_KEYS))}", place)
    sequences = value["sequences"]
    if not isinstance(sequences, dict) or not all(_ID.fullmatch(key) and knocks for key, knocks in sequences.items()):
        raise _damaged(path, "a mapping from ids", place)
    try:
        return {
            int(key): parse_knocks(knocks, "sequences", secret=True, protocols=SENT_PROTOCOLS)
            for key, knocks in sequences.items()
        }, value["stamp"]
    except PortknockError:
        raise _damaged(path, "lists of port/protocol, tcp, udp or icmp", place) from None


def _is_printable(value: object) -> bool:
    return isinstance(value, str) and _PRINTABLE.fullmatch(value) is not None


def _is_newer(value: object) -> bool:
    return isinstance(value, int) and value > FORMAT_WITH_MORE


def _damaged(path: str, expected: str, place: str) -> PortknockError:
    return PortknockError(
        f"{path}: expected {expected} as {place}; got something else. The file is damaged or of another kind: ask for it "
        "again, or correct --secrets."
    )


__all__ = ("FORMAT", "Access", "HelperSecrets", "parse_secrets", "read_secrets")
