# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Brings the gate back when another program takes its table away, and says so in the journal.

Runs on the host as fleet-portknock-watch.service, with Python's standard library alone. The kernel tells every change of
its tables; between changes this process sleeps. What packets do to a set it does not tell: a gate with one-time sequences is
asked twice a second how many have opened. Nor does it tell of the tables of iptables-legacy: where the gate is made of iptables'
rules, their numbers and sizes are asked for twice a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import subprocess
import sys
import time
from typing import Iterator, NamedTuple, Optional

TABLE = "fleet_portknock"
GATE = "/etc/fleet-portknock/gate.rules"
LOADER = "/etc/fleet-portknock/load.sh"
STOCK = "/etc/fleet-portknock/stock.py"
LOCK = "/run/fleet-portknock/lock"
TRIAL = "/run/fleet-portknock/trial"
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# A run holds the lock while it loads a gate, which takes well under a second.
LOCK_SECONDS = 1.0
# How soon to try again what did not work.
RETRY_SECONDS = 1.0
# How long the kernel may take to say who changed its tables; it does so at once.
NAME_SECONDS = 0.05
PROGRAM_SECONDS = 30
# How often to ask what has opened, how soon to try again where nothing could be armed, and how long the kernel may take to
# answer; it does so at once.
ONE_TIME_SECONDS = 0.5
ONE_TIME_RETRY_SECONDS = 10.0
ANSWER_SECONDS = 5.0

# What the gate's file says where its rules are of iptables, and how often to ask for these.
XTABLES_MARK = "# fleet.portknock rules: iptables"
XTABLES_SECONDS = 0.5
# How often to compare them rule by rule, whatever was told.
XTABLES_FULL_SECONDS = 60.0
XTABLES_NAMES = (
    ("/proc/net/ip_tables_names", socket.AF_INET, socket.IPPROTO_IP),
    ("/proc/net/ip6_tables_names", socket.AF_INET6, socket.IPPROTO_IPV6),
)
# linux/netfilter_ipv4/ip_tables.h: IPT_SO_GET_INFO and what it fills in, which begins with the table's name.
_GET_INFO = 64
_INFO_SIZE = 84

# linux/netlink.h, linux/netfilter/nfnetlink.h and linux/netfilter/nf_tables.h
_NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_NFNLGRP_NFTABLES = 7
_NFNL_SUBSYS_NFTABLES = 10
_NFT_MSG_DELTABLE = _NFNL_SUBSYS_NFTABLES << 8 | 2
_NFT_MSG_NEWSETELEM = _NFNL_SUBSYS_NFTABLES << 8 | 12
_NFT_MSG_GETSETELEM = _NFNL_SUBSYS_NFTABLES << 8 | 13
_NFT_MSG_NEWGEN = _NFNL_SUBSYS_NFTABLES << 8 | 15
_NFTA_TABLE_NAME = 1
_NFTA_SET_ELEM_LIST_TABLE = 1
_NFTA_SET_ELEM_LIST_SET = 2
_NFTA_SET_ELEM_LIST_ELEMENTS = 3
_NFTA_GEN_PROC_PID = 2
_NFTA_GEN_PROC_NAME = 3
_ATTRIBUTE_TYPE = 0x3FFF
_MESSAGE_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE_HEADER = struct.Struct("=HH")
_FAMILY_HEADER_SIZE = 4
_FAMILY_HEADER = struct.Struct("=BBH")
_FAMILY_INET = 1
_NLM_F_REQUEST = 1
_NLM_F_DUMP = 0x300
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
# Asked for beyond the administrator's limit: a ruleset with large sets is told element by element.
_SO_RCVBUFFORCE = 33
_BUFFER_SIZE = 4 << 20
_DATAGRAM_SIZE = 1 << 17


class Change(NamedTuple):
    """What the kernel said at once: whether the gate's table went, and which program did what it tells of."""

    took_away: bool
    program: Optional[str]


def read_change(datagram: bytes) -> Change:
    """What a datagram of the kernel's says."""
    took_away = False
    program = None
    for kind, attributes in _messages(datagram):
        if kind == _NFT_MSG_DELTABLE:
            took_away = took_away or _text(attributes.get(_NFTA_TABLE_NAME)) == TABLE
        elif kind == _NFT_MSG_NEWGEN and _NFTA_GEN_PROC_NAME in attributes:
            pid = int.from_bytes(attributes.get(_NFTA_GEN_PROC_PID, b""), "big")
            program = f"{_text(attributes[_NFTA_GEN_PROC_NAME])} (process {pid})"
    return Change(took_away, program)


def _messages(datagram: bytes) -> Iterator[tuple[int, dict[int, bytes]]]:
    position = 0
    while position + _MESSAGE_HEADER.size <= len(datagram):
        length, kind, _flags, _sequence, _port = _MESSAGE_HEADER.unpack_from(datagram, position)
        if length < _MESSAGE_HEADER.size:
            return
        body = datagram[position + _MESSAGE_HEADER.size + _FAMILY_HEADER_SIZE : position + length]
        yield kind, dict(_attributes(body))
        position += _aligned(length)


def _attributes(body: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + _ATTRIBUTE_HEADER.size <= len(body):
        length, kind = _ATTRIBUTE_HEADER.unpack_from(body, position)
        if length < _ATTRIBUTE_HEADER.size:
            return
        yield kind & _ATTRIBUTE_TYPE, body[position + _ATTRIBUTE_HEADER.size : position + length]
        position += _aligned(length)


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _text(value: Optional[bytes]) -> str:
    return (value or b"").rstrip(b"\0").decode(errors="replace")


def subscribe() -> socket.socket:
    """A socket on which the kernel tells every change of its tables."""
    channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    channel.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_SIZE)
    channel.bind((0, 0))
    channel.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
    return channel


def count_burnt() -> Optional[int]:
    """How many one-time sequences have opened since the table was made; None where the gate has none."""
    attributes = b"".join(
        _ATTRIBUTE_HEADER.pack(_ATTRIBUTE_HEADER.size + len(value), kind).ljust(4)
        + value.ljust(_aligned(len(value)), b"\0")
        for kind, value in ((_NFTA_SET_ELEM_LIST_TABLE, TABLE.encode() + b"\0"), (_NFTA_SET_ELEM_LIST_SET, b"burnt\0"))
    )
    body = _FAMILY_HEADER.pack(_FAMILY_INET, 0, 0) + attributes
    header = _MESSAGE_HEADER.pack(
        _MESSAGE_HEADER.size + len(body), _NFT_MSG_GETSETELEM, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0
    )
    count = 0
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as channel:
        channel.settimeout(ANSWER_SECONDS)
        channel.send(header + body)
        while True:
            for kind, found in _messages(channel.recv(_DATAGRAM_SIZE)):
                if kind == _NLMSG_ERROR:
                    return None
                if kind == _NLMSG_DONE:
                    return count
                if kind == _NFT_MSG_NEWSETELEM:
                    count += sum(1 for _element in _attributes(found.get(_NFTA_SET_ELEM_LIST_ELEMENTS, b"")))


class OneTime:
    """Sees to it that one-time sequences are armed where others have been used."""

    def __init__(self) -> None:
        self._known: Optional[int] = None
        self._failed = False

    def look(self, command: str = "arm") -> Optional[float]:
        """Look, and let ``stock.py`` do its work where something has opened, or where that has not worked yet.

        :param command: what it is to do: ``renew`` where another program may have loaded what it once listed.
        :returns: the seconds after which to look again; None where the gate has no such sequences.
        """
        try:
            burnt = count_burnt()
        except OSError:
            return ONE_TIME_RETRY_SECONDS
        if burnt is None:
            self._known = None
            return None
        if burnt != self._known or self._failed or command != "arm":
            done = _run(sys.executable, "-I", "-S", STOCK, command)
            has_failed = done is None or done.returncode != 0
            if has_failed and not self._failed:
                sys.stderr.write(done.stderr if done else "<2>The one-time sequences can't be armed.\n")
            self._failed = has_failed
        self._known = burnt
        return ONE_TIME_RETRY_SECONDS if self._failed else ONE_TIME_SECONDS


def is_xtables() -> bool:
    """Whether the confirmed gate is made of iptables' rules."""
    try:
        with open(GATE, encoding="utf-8") as stream:
            return any(line.startswith(XTABLES_MARK) for _number, line in zip(range(4), stream))
    except OSError:
        return False


def xtables() -> list[bytes]:
    """Numbers and sizes of the rules in iptables-legacy's tables: the same as long as nobody loads others."""
    found = []
    libc = ctypes.CDLL(None, use_errno=True)
    for path, family, level in XTABLES_NAMES:
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        with contextlib.suppress(OSError), open(path, encoding="utf-8") as names, socket.socket(family, kind) as asking:
            for name in sorted(names.read().split()):
                answer = ctypes.create_string_buffer(name.encode(), _INFO_SIZE)
                size = ctypes.c_uint32(_INFO_SIZE)
                libc.getsockopt(asking.fileno(), level, _GET_INFO, answer, ctypes.byref(size))
                found.append(answer.raw)
    return found


class Xtables:
    """Sees whether a gate of iptables' rules is still whole."""

    def __init__(self) -> None:
        self._known: Optional[list[bytes]] = None
        self._next = 0.0

    def is_gone(self, told: bool) -> bool:
        """Whether anything of it is missing, as far as anything has changed since it was last there.

        :param told: whether the kernel told of a change; it does so for iptables-nft alone.
        """
        now = xtables()
        if not told and now == self._known and time.monotonic() < self._next:
            return False
        if is_loaded() is False:
            self._known = None
            return True
        self._known, self._next = now, time.monotonic() + XTABLES_FULL_SECONDS
        return False


def is_loaded() -> Optional[bool]:
    """Whether the gate's rules are in the kernel; None where its programs don't say."""
    if is_xtables():
        # While another gate is on trial, it is there if any is.
        how = "any" if _read("run") is not None and _read("kind") != "sshd" else "check"
        done = _run("/bin/sh", GATE, how)
        return None if done is None else done.returncode == 0
    done = _run("nft", "list", "tables")
    if done is None or done.returncode != 0:
        return None
    return f"table inet {TABLE}" in done.stdout.splitlines()


def bring_back(reason: str) -> bool:
    """Load the gate where it is missing.

    :param reason: how it came to be missing, for the journal; empty where that was told already.
    :returns: False where it has to be tried again.
    """
    began = time.monotonic()
    with _lock() as held:
        loaded = is_loaded()
        if loaded is not False or not os.path.exists(GATE):
            return loaded is not None
        run, kind = _read("run"), _read("kind")
        # What sshd is told is another matter: its trial goes on.
        if run is None or kind == "sshd":
            return _load(reason, began)
    if kind in ("absent", "moved"):
        return (
            True  # a removal, or a change to rules of another kind, is on trial: gone is what this gate is meant to be
        )
    # Any other change that is on trial goes back now; the way back takes the lock itself, and may be under way already.
    if held:
        _say(2, reason and f"{reason} while a change was on trial: going back to what was confirmed.")
        _run("/bin/sh", os.path.join(TRIAL, f"restore-{run}.sh"))
    return bool(is_loaded())


def _load(reason: str, began: float) -> bool:
    # Sets of ipset, which windows are in, are nobody's rules and have stayed.
    keeps, left = (["keep"], "") if is_xtables() else ([], ", without open windows")
    done = _run("/bin/sh", LOADER, *keeps)
    seconds = time.monotonic() - began
    if done is not None and done.returncode == 0:
        _say(2, f"{reason or 'The gate was missing'}: it was loaded again within {seconds:.3f} s{left}.")
        return True
    if reason:
        _say(2, f"{reason}, and it does not load again.")
        sys.stderr.write(done.stderr if done else "")
    return bool(is_loaded())


@contextlib.contextmanager
def _lock() -> Iterator[bool]:
    """Keep runs away, as they keep each other away. Where one holds the lock for long, go on without it (False)."""
    os.makedirs(os.path.dirname(LOCK), mode=0o700, exist_ok=True)
    handle = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        held = False
        while not held and time.monotonic() < deadline:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                time.sleep(0.02)
        yield held
    finally:
        os.close(handle)


def _read(name: str) -> Optional[str]:
    try:
        with open(os.path.join(TRIAL, name), encoding="utf-8") as stream:
            return stream.read()
    except OSError:
        return None


def _run(*argv: str) -> Optional[subprocess.CompletedProcess[str]]:
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=PROGRAM_SECONDS,
            env={"PATH": SEARCH_PATH, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def _say(priority: int, sentence: str) -> None:
    """A line for the journal; the number in front is its priority."""
    if sentence:
        print(f"<{priority}>{sentence.rstrip()}", file=sys.stderr, flush=True)


def _tell_ready() -> None:
    """Tell systemd that every change from now on is seen."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
            notifier.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)


def _program_behind(change: Change, channel: socket.socket) -> str:
    """Which program it was: the kernel says so at the end of what it tells of one transaction."""
    channel.settimeout(NAME_SECONDS)
    with contextlib.suppress(OSError):
        while change.program is None:
            change = read_change(channel.recv(_DATAGRAM_SIZE))
    return change.program or "an unknown program"


def main() -> None:
    channel = subscribe()
    _tell_ready()
    is_well = bring_back("The gate was missing when the watch began")
    one_time, rules = OneTime(), Xtables()
    pause = one_time.look()
    while True:
        if is_xtables():
            pause = XTABLES_SECONDS
        channel.settimeout(pause if is_well else RETRY_SECONDS)
        reason = ""
        change: Optional[Change] = None
        try:
            change = read_change(channel.recv(_DATAGRAM_SIZE))
            if change.took_away and not is_xtables():
                reason = f"The gate was taken away by {_program_behind(change, channel)}"
        except socket.timeout:
            pass
        except OSError as exc:
            if exc.errno != errno.ENOBUFS:
                raise
            reason = "The gate was taken away, in more changes than could be followed"
        if is_xtables() and is_well and rules.is_gone(change is not None):
            who = _program_behind(change, channel) if change else "another program"
            reason = f"Rules of the gate were taken away by {who}"
        if reason or not is_well:
            is_well = bring_back(reason)
        # A table that is there again may be a copy, with sequences armed that have opened since.
        pause = one_time.look("renew" if reason else "arm")


if __name__ == "__main__":
    main()
