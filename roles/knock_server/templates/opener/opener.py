# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeps a sniffing daemon at work on each interface that packets from outside can come in at, or one on all of them.

Runs on the host, with Python's standard library alone, as fleet-portknock-opener.service: ``opener.py FOLDER``, whose file
opener.json says which daemon that is. The daemons that there are look at their interface once, when they start: one that has
no address then is deaf for ever, one whose address changes goes on waiting at the former. So the kernel is asked which
interfaces there are, and tells every change; a daemon runs where there is an address, is started anew when these change, and
when it ends, however that comes. One that listens everywhere is but kept alive. What it opened the kernel closes.

Where it has one-time sequences, it waits for those that may open now and some of the next, not for a whole stock: the kernel,
which knows what has been used, tells when others are armed.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import ipaddress
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import AbstractSet, Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence

SETTINGS = "opener.json"
RUN_FOLDER = "/run/fleet-portknock"
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What a daemon's commands find in their environment.
FOLDER_VARIABLE = "FLEET_PORTKNOCK_FOLDER"
INTERFACE_VARIABLE = "FLEET_PORTKNOCK_INTERFACE"
# How soon a daemon that ended is started again: at once, then later each time, as long as none lives for a while.
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 5.0
LIVES_SECONDS = 1.0
# How long a daemon may take to end by itself.
STOP_SECONDS = 1.0
# How long the kernel may take to answer; it does so at once.
ANSWER_SECONDS = 5.0
PROGRAM_SECONDS = 30
GNUPG_SECONDS = 15
# How often, at most, to ask which one-time sequences are armed, and how many of an operator's to wait for: twice as many as
# are armed at a time, so that the daemon need not be started anew after each.
ARMED_SECONDS = 0.2
ONE_TIME = 8
TABLE = "fleet_portknock"

# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h and linux/if.h
_NETLINK_ROUTE = 0
_NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_NFNLGRP_NFTABLES = 7
_RTMGRP_LINK = 0x1
_RTMGRP_IPV4_IFADDR = 0x10
_RTMGRP_IPV6_IFADDR = 0x100
_RTM_NEWLINK = 16
_RTM_GETLINK = 18
_RTM_NEWADDR = 20
_RTM_GETADDR = 22
_NLM_F_REQUEST = 1
_NLM_F_DUMP = 0x300
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_IFLA_IFNAME = 3
_IFLA_MASTER = 10
_IFLA_LINKINFO = 18
_IFLA_INFO_SLAVE_KIND = 4
_IFA_ADDRESS = 1
_IFA_LOCAL = 2
_IFF_UP = 0x1
_IFF_LOOPBACK = 0x8
_ATTRIBUTE_TYPE = 0x3FFF
_MESSAGE_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE_HEADER = struct.Struct("=HH")
_LINK_HEADER = struct.Struct("=BxHiII")
_ADDRESS_HEADER = struct.Struct("=BBBBI")
# Asked for beyond the administrator's limit, so that no change is lost.
_SO_RCVBUFFORCE = 33
_BUFFER_SIZE = 1 << 20
_DATAGRAM_SIZE = 1 << 17
# linux/prctl.h
_PR_SET_PDEATHSIG = 1

_ONE_TIME_PART = re.compile(r"^# one-time ([0-9a-f]+) ([0-9a-f]+)\n", re.MULTILINE)


class Settings(NamedTuple):
    """What opener.json says of the daemon.

    ``argv`` is its command, ``expand`` names files of the folder of which it is given a copy of its own. In both
    ``{folder}`` stands for the folder, ``{interface}`` for the interface's name, and ``{run}`` for the folder of the copies,
    which only root can read and which goes with the daemon. ``memory`` bounds its address space, in bytes; 0 does not.
    ``one_time`` is the one of these files that has one-time sequences, see :func:`selected`; empty for none.
    ``everywhere`` is one that listens on all interfaces at once, and ``state`` a folder that has to be there for it.
    ``keys`` are GnuPG's, in base64, for a folder ``gnupg`` among the copies, and ``trusted`` the fingerprints of those whose
    signatures count.
    """

    argv: Sequence[str]
    expand: Sequence[str]
    memory: int
    one_time: str
    everywhere: bool = False
    state: str = ""
    keys: Sequence[str] = ()
    trusted: Sequence[str] = ()


class Link(NamedTuple):
    """An interface as the kernel tells it; ``master`` says what it is a part of (``bridge``, ``bond``), empty for nothing."""

    number: int
    name: str
    flags: int
    master: str


class Interface(NamedTuple):
    """An interface that a daemon is to listen on, with the addresses that the daemon finds there."""

    number: int
    name: str
    addresses: frozenset[str]


# Where one daemon listens to all there are, as libpcap calls it. It needs no address, and nothing changes it.
EVERYWHERE = {0: Interface(0, "any", frozenset())}


class OpenerError(Exception):
    """What a person has to know."""


def read_settings(text: str) -> Settings:
    """What opener.json holds.

    :raises OpenerError: another text.
    """
    try:
        found = json.loads(text)
        settings = Settings(
            found["argv"],
            found.get("expand", []),
            found.get("memory", 0),
            found.get("one_time", ""),
            found.get("everywhere", False),
            found.get("state", ""),
            found.get("gnupg", {}).get("keys", []),
            found.get("gnupg", {}).get("trusted", []),
        )
        names = [*settings.argv, *settings.expand, settings.one_time, *settings.keys, *settings.trusted]
        if (
            not settings.argv
            or not all(isinstance(name, str) for name in names)
            or not isinstance(settings.memory, int)
            or not isinstance(settings.everywhere, bool)
            or not isinstance(settings.state, str)
        ):
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError):
        raise OpenerError(f"{SETTINGS}: expected argv, and where they are needed expand and memory.") from None
    return settings


def expanded(text: str, folder: str, interface: str, run: str) -> str:
    """The text with what stands for the daemon's folders and interface filled in; other braces are left alone."""
    return text.replace("{folder}", folder).replace("{interface}", interface).replace("{run}", run)


def selected(text: str, armed: AbstractSet[int]) -> tuple[str, frozenset[int]]:
    """The part of a daemon's file that it is to be given, and the ids of the one-time sequences in it.

    :param text: its last parts begin with a line ``# one-time OPERATOR ID`` each, in the order of the ids, which are in hex.
    :param armed: ids that may open now.
    """
    head, *parts = _ONE_TIME_PART.split(text)
    chosen, ids = [head], set()
    count: dict[str, int] = {}
    for operator, identity, part in zip(parts[::3], parts[1::3], parts[2::3]):
        number = int(identity, 16)
        # From an operator's first that may open on.
        if (number in armed or operator in count) and count.get(operator, 0) < ONE_TIME:
            count[operator] = count.get(operator, 0) + 1
            chosen.append(part)
            ids.add(number)
    return "".join(chosen), frozenset(ids)


def sniffable(links: Iterable[Link], addresses: Iterable[tuple[int, str]]) -> dict[int, Interface]:
    """The interfaces to listen on, by index: up, with an address, and not a part of another one that has the packets too.

    :param addresses: each with its interface's index.
    """
    of: dict[int, set[str]] = {}
    for index, address in addresses:
        of.setdefault(index, set()).add(address)
    return {
        link.number: Interface(link.number, link.name, frozenset(of[link.number]))
        for link in links
        # What belongs to a routing domain of its own (vrf) has its own addresses and packets.
        if link.flags & _IFF_UP and not link.flags & _IFF_LOOPBACK and link.master in ("", "vrf") and link.number in of
    }


def links_in(datagram: bytes) -> Iterator[Link]:
    """The interfaces that an answer of the kernel's tells of."""
    for kind, body in _messages(datagram):
        if kind == _RTM_NEWLINK and len(body) >= _LINK_HEADER.size:
            _family, _type, index, flags, _change = _LINK_HEADER.unpack_from(body)
            attributes = dict(_attributes(body[_LINK_HEADER.size :]))
            info = dict(_attributes(attributes.get(_IFLA_LINKINFO, b"")))
            master = "" if _IFLA_MASTER not in attributes else _text(info.get(_IFLA_INFO_SLAVE_KIND, b"?"))
            yield Link(index, _text(attributes.get(_IFLA_IFNAME, b"")), flags, master)


def addresses_in(datagram: bytes) -> Iterator[tuple[int, str]]:
    """The addresses that an answer of the kernel's tells of, each with its interface's index."""
    for kind, body in _messages(datagram):
        if kind == _RTM_NEWADDR and len(body) >= _ADDRESS_HEADER.size:
            *_rest, index = _ADDRESS_HEADER.unpack_from(body)
            attributes = dict(_attributes(body[_ADDRESS_HEADER.size :]))
            # Between two ends the one is the other's; what is this side's own is said beside it.
            packed = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS, b""))
            with contextlib.suppress(ValueError):
                yield index, str(ipaddress.ip_address(packed))


def _messages(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + _MESSAGE_HEADER.size <= len(datagram):
        length, kind, _flags, _sequence, _port = _MESSAGE_HEADER.unpack_from(datagram, position)
        if length < _MESSAGE_HEADER.size:
            return
        yield kind, datagram[position + _MESSAGE_HEADER.size : position + length]
        position += (length + 3) & ~3


def _attributes(body: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + _ATTRIBUTE_HEADER.size <= len(body):
        length, kind = _ATTRIBUTE_HEADER.unpack_from(body, position)
        if length < _ATTRIBUTE_HEADER.size:
            return
        yield kind & _ATTRIBUTE_TYPE, body[position + _ATTRIBUTE_HEADER.size : position + length]
        position += (length + 3) & ~3


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="surrogateescape")


def subscribe() -> socket.socket:
    """A socket on which the kernel tells every change of interfaces and addresses."""
    channel = _route_socket()
    channel.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_SIZE)
    channel.bind((0, _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR))
    channel.setblocking(False)
    return channel


def subscribe_to_tables() -> socket.socket:
    """A socket on which the kernel tells every change of its packet filter's tables."""
    channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    channel.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_SIZE)
    channel.bind((0, 0))
    channel.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
    channel.setblocking(False)
    return channel


def read_armed() -> frozenset[int]:
    """The ids of the one-time sequences that may open now; none where the kernel does not say."""
    try:
        done = subprocess.run(
            ["nft", "-j", "list", "set", "inet", TABLE, "armed"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=PROGRAM_SECONDS,
            env={"PATH": SEARCH_PATH, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    # An element is 7:ID.
    return frozenset(int(identity, 16) for identity in re.findall(r'"7:([0-9a-f]+)"', done.stdout))


def read_interfaces() -> dict[int, Interface]:
    """Ask the kernel for the interfaces to listen on, by index."""
    links = [link for datagram in _dump(_RTM_GETLINK) for link in links_in(datagram)]
    addresses = [one for datagram in _dump(_RTM_GETADDR) for one in addresses_in(datagram)]
    return sniffable(links, addresses)


def _dump(kind: int) -> list[bytes]:
    # An interface's header is the longer one: what is beyond an address's is not looked at.
    body = _LINK_HEADER.pack(0, 0, 0, 0, 0)
    header = _MESSAGE_HEADER.pack(_MESSAGE_HEADER.size + len(body), kind, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0)
    datagrams = []
    with _route_socket() as channel:
        channel.settimeout(ANSWER_SECONDS)
        channel.send(header + body)
        while True:
            datagrams.append(channel.recv(_DATAGRAM_SIZE))
            kinds = {found for found, _body in _messages(datagrams[-1])}
            if _NLMSG_ERROR in kinds:
                raise OSError(errno.EIO, "the kernel refuses to tell")
            if _NLMSG_DONE in kinds:
                return datagrams


def _route_socket() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE)


class Daemon:
    """The daemon on one interface."""

    def __init__(self, settings: Settings, folder: str, interface: Interface) -> None:
        self.interface = interface
        self._settings = settings
        self._folder = folder
        self._run = f"{_copies_folder(os.getpid())}/{interface.number}"
        self._name = os.path.basename(settings.argv[0])
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._began = 0.0
        self._pause = 0.0
        self._due = 0.0
        self._told = ""
        # The one-time sequences that it is to wait for, and those that it waits for.
        self.armed: frozenset[int] = frozenset()
        self._awaited: frozenset[int] = frozenset()

    def look(self, now: float) -> Optional[float]:
        """Start it where it does not run and its time has come.

        :param now: seconds of the monotonic clock.
        :returns: when to look again, None where a signal will tell.
        """
        if self._process is not None:
            end = _end_of(self._process)
            if end is None:
                return None
            self._process = None
            self._failed(now, 4, f"{self._name} on {self.interface.name} ended, {end}: it is started again.")
        if now < self._due:
            return self._due
        self._start(now)
        return None if self._process is not None else self._due

    def arm(self, armed: frozenset[int]) -> None:
        """Have it wait for these one-time sequences; it is started anew where it does not."""
        self.armed = armed
        if self._process is not None and not armed <= self._awaited:
            self._end()
            self._due = 0.0

    def stop(self) -> None:
        """End it, and take its files away."""
        self._end()
        if self._settings.keys:
            # Its agent would notice that the folder is gone, a while later.
            for command in (["--kill", "all"], ["--remove-socketdir"]):
                with contextlib.suppress(OSError, subprocess.SubprocessError):
                    _run_gnupg(["gpgconf", "--homedir", self._home, *command], b"")
        shutil.rmtree(self._run, ignore_errors=True)

    def _end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _start(self, now: float) -> None:
        name = self.interface.name
        self._began = now
        try:
            for file in self._settings.expand:
                self._copy(file)
            if self._settings.keys and not os.path.isdir(self._home):
                self._make_home()
            self._process = subprocess.Popen(
                [expanded(word, self._folder, name, self._run) for word in self._settings.argv],
                stdin=subprocess.DEVNULL,
                # What daemons write may hold what they were told.
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PATH": SEARCH_PATH, "LC_ALL": "C", FOLDER_VARIABLE: self._folder, INTERFACE_VARIABLE: name},
                preexec_fn=self._prepare,
            )
        except (OSError, subprocess.SubprocessError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else type(exc).__name__
            self._failed(now, 3, f"{self._name} can't be started on {name}: {reason}.")

    def _prepare(self) -> None:
        """What holds for the daemon: it ends when this process does, and leaves no image of its memory.

        Runs in the new process, of which this one's single thread is all there is.
        """
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if self._settings.memory:
            resource.setrlimit(resource.RLIMIT_AS, (self._settings.memory, self._settings.memory))

    def _copy(self, file: str) -> None:
        with open(os.path.join(self._folder, file), encoding="utf-8") as stream:
            text = stream.read()
        if file == self._settings.one_time:
            text, self._awaited = selected(text, self.armed)
        text = expanded(text, self._folder, self.interface.name, self._run)
        os.makedirs(self._run, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(os.path.join(self._run, file), flags, 0o600), "w", encoding="utf-8") as stream:
            stream.write(text)

    @property
    def _home(self) -> str:
        return f"{self._run}/gnupg"

    def _make_home(self) -> None:
        """Make GnuPG's folder: the keys, and whose signatures count. What it adds there, goes with it."""
        os.makedirs(self._home, 0o700)
        try:
            with open(os.path.join(self._home, "gpg.conf"), "w", encoding="ascii") as stream:
                # Nothing is to be looked up anywhere.
                stream.write("disable-dirmngr\n")
                # The older versions take no whole fingerprint. fwknopd compares that itself.
                stream.writelines(f"trusted-key {fingerprint[-16:]}\n" for fingerprint in self._settings.trusted)
            _run_gnupg(
                ["gpg", "--homedir", self._home, "--batch", "--no-tty", "--quiet", "--import"],
                b"".join(map(base64.b64decode, self._settings.keys)),
            )
        except BaseException:
            shutil.rmtree(self._home, ignore_errors=True)
            raise

    def _failed(self, now: float, priority: int, sentence: str) -> None:
        """Say so, and have it started again after a while."""
        has_lived = now - self._began >= LIVES_SECONDS
        self._pause = (
            FIRST_PAUSE_SECONDS if has_lived else min(LONGEST_PAUSE_SECONDS, max(FIRST_PAUSE_SECONDS, 2 * self._pause))
        )
        self._due = now + self._pause
        # Where it never works, once.
        if has_lived or sentence != self._told:
            _say(priority, sentence)
        self._told = sentence


def _run_gnupg(command: Sequence[str], given: bytes) -> None:
    subprocess.run(
        command,
        input=given,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
        timeout=GNUPG_SECONDS,
        cwd="/",
        env={"PATH": SEARCH_PATH, "LC_ALL": "C"},
    )


def _end_of(process: subprocess.Popen[bytes]) -> Optional[str]:
    """How it ended, None where it has not. One that somebody has stopped hears as little as one that is dead."""
    stopped = None
    with contextlib.suppress(ChildProcessError):
        stopped = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG)
    if stopped is not None:
        process.kill()
        process.wait()
        return "stopped by a signal"
    code = process.poll()
    if code is None:
        return None
    return f"exit code {code}" if code >= 0 else f"by signal {-code}"


class Opener:
    """A daemon on each interface."""

    def __init__(self, settings: Settings, folder: str) -> None:
        self._settings = settings
        self._folder = folder
        self._daemons: dict[int, Daemon] = {}
        self._armed: frozenset[int] = frozenset()

    def follow(self, interfaces: Mapping[int, Interface]) -> None:
        """Have a daemon on each of these, started after the interface became what it is now, and no other."""
        for index, daemon in list(self._daemons.items()):
            if interfaces.get(index) != daemon.interface:
                daemon.stop()
                del self._daemons[index]
                if index not in interfaces:
                    _say(5, f"{daemon.interface.name} is not listened on any more: it is down, or has no address.")
        for index, interface in interfaces.items():
            if index not in self._daemons:
                self._daemons[index] = Daemon(self._settings, self._folder, interface)
                self._daemons[index].armed = self._armed
                _say(5, f"{interface.name} is listened on.")

    def arm(self, armed: frozenset[int]) -> None:
        """Have each wait for these one-time sequences."""
        self._armed = armed
        for daemon in self._daemons.values():
            daemon.arm(armed)

    def look(self) -> Optional[float]:
        """Start what does not run; returns the seconds after which to look again, None where a signal will tell."""
        now = time.monotonic()
        due = [when for when in (daemon.look(now) for daemon in self._daemons.values()) if when is not None]
        return max(0.0, min(due) - now) if due else None

    def stop(self) -> None:
        """End every daemon."""
        for daemon in self._daemons.values():
            daemon.stop()
        self._daemons.clear()


def _copies_folder(pid: int) -> str:
    return f"{RUN_FOLDER}/opener-{pid}"


def _forget_the_dead() -> None:
    """Take away the copies that belong to a process that was killed."""
    with contextlib.suppress(OSError):
        for name in os.listdir(RUN_FOLDER):
            pid = name[7:] if name.startswith("opener-") else ""
            if pid.isdecimal() and (int(pid) == os.getpid() or not os.path.exists(f"/proc/{pid}")):
                shutil.rmtree(f"{RUN_FOLDER}/{name}", ignore_errors=True)


def _say(priority: int, sentence: str) -> None:
    """A line for the journal; the number in front is its priority."""
    print(f"<{priority}>{sentence}", file=sys.stderr, flush=True)


def _tell_ready() -> None:
    """Tell systemd that a daemon was started wherever one is to run."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
            notifier.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)


def _has_changed(channel: socket.socket) -> bool:
    """Whether the kernel has told anything since, which is then asked for as a whole."""
    changed = False
    while True:
        try:
            channel.recv(_DATAGRAM_SIZE)
        except BlockingIOError:
            return changed
        except OSError as exc:
            if exc.errno != errno.ENOBUFS:
                raise
        changed = True


def _signals() -> tuple[socket.socket, list[int]]:
    """A socket that can be read when a signal came, and the list that those to end are noted in."""
    receiver, sender = socket.socketpair()
    receiver.setblocking(False)
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)
    ends: list[int] = []
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda which, _frame: ends.append(which))
    return receiver, ends


def main(folder: str) -> None:
    """Run until a signal says to end.

    :raises OpenerError: the folder does not say what to run.
    """
    try:
        with open(os.path.join(folder, SETTINGS), encoding="utf-8") as stream:
            settings = read_settings(stream.read())
    except OSError as exc:
        raise OpenerError(f"{SETTINGS}: expected to be able to read it; got {exc.strerror}.") from None
    os.umask(0o077)
    if settings.state:
        with contextlib.suppress(OSError):
            os.makedirs(settings.state, exist_ok=True)
    _forget_the_dead()
    channel = subscribe()
    tables = subscribe_to_tables() if settings.one_time else None
    wake, ends = _signals()
    opener = Opener(settings, os.path.abspath(folder))
    is_known, is_ready = False, False
    asked, is_asked = 0.0, False
    try:
        while not ends:
            is_asked = is_asked and not (tables and _has_changed(tables))
            wait = asked + ARMED_SECONDS - time.monotonic()
            if tables and not is_asked and wait <= 0:
                asked, is_asked = time.monotonic(), True
                opener.arm(read_armed())
            if _has_changed(channel) or not is_known:
                try:
                    opener.follow(EVERYWHERE if settings.everywhere else read_interfaces())
                    is_known = True
                except OSError as exc:
                    is_known = False
                    _say(3, f"The kernel does not tell which interfaces there are: {exc.strerror}.")
            pauses = [opener.look() if is_known else LONGEST_PAUSE_SECONDS]
            if is_known and not is_ready:
                _tell_ready()
                is_ready = True
            if tables and not is_asked:
                pauses.append(max(0.0, wait))
            pause = min((one for one in pauses if one is not None), default=None)
            select.select([channel, wake, *([tables] if tables else [])], [], [], pause)
            with contextlib.suppress(BlockingIOError):
                wake.recv(4096)
    finally:
        opener.stop()
        shutil.rmtree(_copies_folder(os.getpid()), ignore_errors=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: opener.py FOLDER")
    try:
        main(sys.argv[1])
    except OpenerError as exc:
        sys.exit(f"<2>{exc}")
