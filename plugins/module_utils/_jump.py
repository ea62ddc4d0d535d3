# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Knocking from where the connection will come from: from here, or from the last jump host on the way.

Through a jump host's own forwarding a knock would be a failed connection in its log, port and all. So these very modules are
run there, by ssh: a short command waits for them, they come with the request over standard input and are kept in memory. No
disk, argument, environment or log of the jump host gets to hold a sequence; whoever is root there can read it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import re
import socket
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, NamedTuple, Optional, Protocol

from ansible_collections.fleet.portknock.plugins.module_utils._arrival import start
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._jumped import close, connect, knock, send_once
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import (
    Address,
    KnockResult,
    knock_until_closed,
    knock_with_any,
    send,
)
from ansible_collections.fleet.portknock.plugins.module_utils._ports import HIGHEST_PORT, Knock
from ansible_collections.fleet.portknock.plugins.module_utils._relay import relay

_PACKAGE = __name__.rpartition(".")[0]
_IMPORT = re.compile(rf"^from {re.escape(_PACKAGE)}\.(\w+) import ", re.MULTILINE)
_OLDEST = (3, 8)
# Nothing is sent before this has come: what is no shell, such as a menu, gets to see nothing. No character of the command means
# more than itself within single quotes, in any usual shell.
_READY = re.compile(rb"portknock jump ([0-9]+)\.([0-9]+)\r?\n")
_WAIT = (
    'import sys,zlib,json;print("portknock","jump","%d.%d"%sys.version_info[:2],flush=True);i=sys.stdin.buffer;'
    'g=json.loads(zlib.decompress(i.read(int(i.readline()))));s={};exec(g["start"],s);s["start"](g)'
)
# Without modules of the user's or the installation's own, and leaving no compiled ones behind.
COMMAND = f"python3 -IBSc '{_WAIT}'"
# Bytes that a login may say first, and of the longest answer.
_LONGEST_WELCOME = 1 << 16
_LONGEST_ANSWER = 1 << 20
# Seconds for the way there and back, beyond what is asked for takes.
_GRACE = 5.0
# Seconds that a process may take to end once nothing more comes from it.
_LEAVE = 2.0
_CHUNK = 65536
_SSH_FAILED = 255
# What ssh says where it may connect and forward, and start nothing.
_NO_SESSION = re.compile(r"open failed|administratively prohibited|request failed")
# No shell that ssh starts for the hops before it shall find more than a name.
_HOP = re.compile(
    r"(?:ssh://)?(?:(?P<user>[^\s,'\"`$\\;&<>|(){}*?!]+)@)?"
    r"(?:\[(?P<bracketed>[\w.:%-]+)\]|(?P<plain>[\w.%][\w.%-]*))(?::(?P<port>[0-9]{1,5}))?/?"
)
# A jump host only carries: whatever else ssh's configuration asks of a session there is not for this one. It goes over a master
# that is alive and becomes none itself, since one would hold on to standard error.
_OPTIONS = (
    *("-T", "-a", "-x", "-o", "ControlMaster=no", "-o", "ClearAllForwardings=yes"),
    *("-o", "PermitLocalCommand=no", "-o", "RemoteCommand=none"),
)


class JumpError(PortknockError):
    """A jump host did not do what it was asked for; ``is_unable`` where it never will, as nothing can be run there."""

    def __init__(self, text: str, is_unable: bool = False) -> None:
        super().__init__(text)
        self.is_unable = is_unable


class JumpHost(NamedTuple):
    """A jump host: its name for messages, and the arguments of what begins :data:`COMMAND` there.

    What is called there is a function of this package's modules, whose arguments and answer survive JSON.
    """

    name: str
    command: tuple[str, ...]

    def ask(self, function: Callable[..., Any], *arguments: Any, patience: float, timeout: float) -> dict[str, Any]:
        """Call a function there and return its answer.

        :param patience: seconds until the jump host has to be there.
        :param timeout: seconds that the function itself may take.
        :raises JumpError: no answer came.
        """
        with _Call(self, is_quiet=True) as call:
            call.wait_until_ready(patience)
            return call.answer(_packed(function, arguments), timeout)

    def connect(self, request: Mapping[str, Any], deadline: float) -> tuple[dict[str, Any], socket.socket]:
        """Call ``connect`` there; return its answer, and the socket that carries the connection where there is one.

        What ssh says goes to standard error, then and later.

        :param deadline: when the timeout, which the request lacks, is over (monotonic clock).
        :raises JumpError: no answer came.
        """
        with _Call(self, is_quiet=False) as call:
            call.wait_until_ready(max(0.1, deadline - time.monotonic()))
            left = max(0.0, deadline - time.monotonic())
            content = _packed(connect, [{**request, "timeout": left}], carry=True)
            answer = call.answer(content, left)
            return answer, call.leave()


def jump_host(text: str, option: str, executable: str = "ssh", config: str | None = None) -> JumpHost:
    """The last jump host of a ProxyJump, reached as ssh itself reaches it there.

    :param text: ``[user@]host[:port]``, or several of these with commas between.
    :param option: what gave it, for the error.
    :param config: ssh's configuration file, where it is told another one; nothing else of what it is told holds for jump hosts.
    :raises PortknockError: anything else.
    """
    hops = [_HOP.fullmatch(hop) for hop in text.split(",")]
    match = hops[-1]
    if match is None or not all(hop and 1 <= int(hop["port"] or 1) <= HIGHEST_PORT for hop in hops):
        raise PortknockError(
            f"{option}: expected a jump host as [user@]host[:port], as ssh's ProxyJump takes it, or several with commas between; "
            f"got {text!r}."
        )
    before = text.rpartition(",")[0]
    name = match["bracketed"] or match["plain"]
    command = (
        *(executable, *_OPTIONS),
        *(("-l", match["user"]) if match["user"] else ()),
        *(("-p", match["port"]) if match["port"] else ()),
        *(("-J", before) if before else ()),
        *(("-F", config) if config else ()),
        *("--", name, COMMAND),
    )
    return JumpHost(name, command)


class Way(Protocol):
    """Where knocks leave from, towards one port."""

    def knock(
        self,
        sequences: Sequence[Sequence[Knock]],
        timeout: float,
        banner: float = 0.0,
        single_use: bool = False,
        once: Sequence[Sequence[Knock]] = (),
    ) -> KnockResult:
        """As :func:`knock_with_any`.

        :raises JumpError: the jump host did not do it.
        """

    def close(self, sequences: Sequence[Sequence[Knock]], timeout: float) -> KnockResult:
        """As :func:`knock_until_closed`.

        :raises JumpError: the jump host did not do it.
        """

    def send(self, address: str, knocks: Sequence[Knock], gap: float) -> bool:
        """Send one sequence to one of the host's addresses, without looking; whether the host still has it.

        :raises OSError: there is no way to the address.
        :raises JumpError: the jump host did not do it.
        """


class FromHere(NamedTuple):
    """Straight from this machine, from the local address ``source`` where it is set."""

    addresses: Sequence[Address]
    port: int
    source: Optional[str] = None

    def knock(
        self,
        sequences: Sequence[Sequence[Knock]],
        timeout: float,
        banner: float = 0.0,
        single_use: bool = False,
        once: Sequence[Sequence[Knock]] = (),
    ) -> KnockResult:
        """See :class:`Way`."""
        return knock_with_any(
            self.addresses,
            sequences,
            self.port,
            timeout,
            source=self.source,
            banner=banner,
            single_use=single_use,
            once=once,
        )

    def close(self, sequences: Sequence[Sequence[Knock]], timeout: float) -> KnockResult:
        """See :class:`Way`."""
        return knock_until_closed(self.addresses, sequences, self.port, timeout, source=self.source)

    def send(self, address: str, knocks: Sequence[Knock], gap: float) -> bool:
        """See :class:`Way`."""
        found = next((entry for entry in self.addresses if entry.host == address), None)
        if found is not None:
            send(found, knocks, gap, self.source)
        return found is not None


class FromJump(NamedTuple):
    """From a jump host, which resolves the name. It has to be there within ``patience`` seconds."""

    jump: JumpHost
    host: str
    port: int
    family: str
    patience: float

    def knock(
        self,
        sequences: Sequence[Sequence[Knock]],
        timeout: float,
        banner: float = 0.0,
        single_use: bool = False,
        once: Sequence[Sequence[Knock]] = (),
    ) -> KnockResult:
        """See :class:`Way`."""
        request = {**self._request(sequences, once), "timeout": timeout, "banner": banner, "single_use": single_use}
        return KnockResult.from_mapping(self._ask(knock, request, timeout + banner))

    def close(self, sequences: Sequence[Sequence[Knock]], timeout: float) -> KnockResult:
        """See :class:`Way`."""
        request = {**self._request(sequences, ()), "timeout": timeout}
        return KnockResult.from_mapping(self._ask(close, request, timeout))

    def send(self, address: str, knocks: Sequence[Knock], gap: float) -> bool:
        """See :class:`Way`."""
        texts = [str(knock) for knock in knocks]
        request = {**self._place, "address": address, "knocks": texts, "gap": gap}
        return bool(self._ask(send_once, request, gap * len(texts))["sent"])

    def connect(
        self, sequences: Sequence[Sequence[Knock]], once: Sequence[Sequence[Knock]], deadline: float
    ) -> tuple[KnockResult, socket.socket | None]:
        """As ``knock_and_connect``, but that the connection is carried by a socket between processes.

        :param deadline: when time is up, the jump host's patience included (monotonic clock).
        :raises JumpError: the jump host did not do it.
        """
        answer, sock = self.jump.connect(self._request(sequences, once), deadline)
        with contextlib.ExitStack() as stack:
            stack.enter_context(sock)
            result = KnockResult.from_mapping(self._checked(answer))
            if result.state == "open":
                stack.pop_all()
                return result, sock
        return result, None

    def _ask(self, function: Callable[..., Any], request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        return self._checked(self.jump.ask(function, request, patience=self.patience, timeout=timeout))

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "problem" in answer:
            raise JumpError(f"Seen from the jump host {self.jump.name}: {answer['problem']}")
        return answer

    def _request(self, sequences: Sequence[Sequence[Knock]], once: Sequence[Sequence[Knock]]) -> dict[str, Any]:
        return {
            **self._place,
            "sequences": [[str(knock) for knock in knocks] for knocks in sequences],
            "once": [[str(knock) for knock in knocks] for knocks in once],
        }

    @property
    def _place(self) -> dict[str, Any]:
        return {"host": self.host, "port": self.port, "family": self.family}


class _Call:
    """A process that runs something on a jump host; it ends with the block, unless it is left to the caller.

    :param is_quiet: keep what ssh says for the error, instead of letting it be read at once.
    """

    def __init__(self, jump: JumpHost, is_quiet: bool) -> None:
        self._name = jump.name
        self._is_ready = False
        self._said: list[bytes] = []
        self._listener: threading.Thread | None = None
        # One socket for both ways, so that a caller can go on with it as with any connection.
        self._sock, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    jump.command,
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.PIPE if is_quiet else None,
                )
            except (OSError, ValueError) as exc:
                self._sock.close()
                raise JumpError(f"expected {jump.command[0]!r} to run; got {exc}.") from None
        if self._process.stderr is not None:
            self._listener = threading.Thread(target=self._listen, args=(self._process.stderr,), daemon=True)
            self._listener.start()

    def __enter__(self) -> _Call:
        return self

    def __exit__(self, *_unused: object) -> None:
        if self._sock.fileno() < 0:
            return
        self._sock.close()
        self._process.terminate()
        self._process.wait()

    def leave(self) -> socket.socket:
        """The socket, with whose end the process will end by itself."""
        return socket.socket(fileno=self._sock.detach())

    def wait_until_ready(self, seconds: float) -> None:
        """Wait until it can be told what to do.

        :raises JumpError: it can't, or time is up.
        """
        deadline = time.monotonic() + seconds
        received = 0
        while received < _LONGEST_WELCOME:
            line = self._line(deadline, f"within {seconds:.1f} s")
            match = _READY.fullmatch(line)
            if match is not None:
                version = int(match[1]), int(match[2])
                if version < _OLDEST:
                    raise self._unable("Python {}.{}".format(*version))
                self._is_ready = True
                return
            if not line:
                raise self._ended("can't be reached")
            received += len(line)
        raise self._unable("another answer")

    def answer(self, content: bytes, seconds: float) -> dict[str, Any]:
        """Say what to do, and return the answer.

        :raises JumpError: none came.
        """
        deadline = time.monotonic() + seconds + _GRACE
        # Who is gone already is noticed by what it has left unsaid.
        with contextlib.suppress(OSError):
            self._sock.settimeout(seconds + _GRACE)
            self._sock.sendall(b"%d\n%b" % (len(content), content))
        line = self._line(deadline, f"within {seconds + _GRACE:.1f} s")
        try:
            answer = json.loads(line)
        except ValueError:
            raise self._ended("broke off") from None
        self._sock.settimeout(None)
        return dict(answer)

    def _line(self, deadline: float, when: str) -> bytes:
        """What comes up to the end of a line, and nothing of what follows it; less at the end.

        :raises JumpError: it does not come in time.
        """
        line = b""
        try:
            while not line.endswith(b"\n") and len(line) < _LONGEST_ANSWER:
                self._sock.settimeout(max(0.01, deadline - time.monotonic()))
                seen = self._sock.recv(_CHUNK, socket.MSG_PEEK)
                if not seen:
                    break
                line += self._sock.recv(seen.find(b"\n") + 1 or len(seen))
        except socket.timeout:
            raise JumpError(f"The jump host {self._name} did not answer {when}.") from None
        except OSError:
            # It has ended, and has not read all.
            return line
        return line

    def _ended(self, what: str) -> JumpError:
        """Why there is nothing more.

        :param what: what the jump host did where it is ssh that has failed.
        """
        try:
            code = self._process.wait(_LEAVE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if self._listener is not None:
            # Whoever was started by it may hold on to that for longer.
            self._listener.join(_LEAVE)
        said = b"".join(self._said).decode(errors="replace").strip().splitlines()
        last = said[-1].strip() if said else ""
        if self._is_ready or (code == _SSH_FAILED and not any(_NO_SESSION.search(line) for line in said)):
            return JumpError(f"The jump host {self._name} {what}: {last or f'ssh has ended with code {code}'}.")
        return self._unable(last or f"exit code {code}")

    def _unable(self, came: str) -> JumpError:
        return JumpError(
            f"The jump host {self._name} can't knock: expected a shell there that runs `python3` of version 3.8 or newer; got "
            f"{came}.",
            is_unable=True,
        )

    def _listen(self, errors: IO[bytes]) -> None:
        with errors:
            for line in errors:
                self._said = [*self._said[-20:], line]


def _packed(function: Callable[..., Any], arguments: Sequence[Any], carry: bool = False) -> bytes:
    """What ``_arrival.start`` is given, and that itself, as :data:`COMMAND` reads it."""
    given = {
        "start": _source(start.__module__),
        "modules": _sources(function.__module__, *([relay.__module__] if carry else [])),
        "entry": [function.__module__, function.__name__],
        "arguments": arguments,
        "carry": [relay.__module__, relay.__name__] if carry else None,
    }
    return zlib.compress(json.dumps(given).encode())


@functools.lru_cache(maxsize=None)
def _sources(*names: str) -> dict[str, str | None]:
    """The sources of these modules and all that they import of this package, by name; None for the packages around them."""
    parts = _PACKAGE.split(".")
    found: dict[str, str | None] = {".".join(parts[:count]): None for count in range(1, len(parts) + 1)}
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            text = found[name] = _source(name)
            left += [f"{_PACKAGE}.{other}" for other in _IMPORT.findall(text)]
    return found


def _source(name: str) -> str:
    # Whatever the modules are loaded from: files, the helper's archive, or Ansible, whose loader gives bytes.
    loader: Any = importlib.import_module(name).__loader__
    source = loader.get_source(name)
    return source.decode() if isinstance(source, bytes) else str(source)


__all__ = ("COMMAND", "FromHere", "FromJump", "JumpError", "JumpHost", "Way", "jump_host")
