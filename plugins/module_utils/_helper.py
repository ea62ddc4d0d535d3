# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The helper for people's own ssh: what ``portknock connect`` does as a ProxyCommand, and ``portknock close`` by hand.

The former knocks with the sequences of a file, and relays standard input and output through the connection that opened. Writes
nothing else to standard output; an error is one line on standard error. No secret is an argument or part of an error.

``portknock install`` and ``portknock uninstall`` are in ``_setup.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import socket
import sys
import time
from typing import TYPE_CHECKING, NoReturn, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._helper_secrets import Access, read_secrets
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import (
    KnockResult,
    knock_and_connect,
    knock_until_closed,
    resolve,
)
from ansible_collections.fleet.portknock.plugins.module_utils._ports import HIGHEST_PORT, Knock
from ansible_collections.fleet.portknock.plugins.module_utils._relay import relay
from ansible_collections.fleet.portknock.plugins.module_utils._spa import asking_for, check_source
from ansible_collections.fleet.portknock.plugins.module_utils._usage import Usage

if TYPE_CHECKING:
    from ansible_collections.fleet.portknock.plugins.module_utils._jump import FromJump

# Leaves some of the ten seconds that Ansible gives ssh by default, and that many people set as ConnectTimeout, for the
# exchange of banners, which ssh counts too.
DEFAULT_TIMEOUT = 8.0
_LONGEST_TIMEOUT = 3600.0
_SECRETS = "secrets.json"
_NO_KNOCKS = (
    " Ask whoever runs the hosts: where the jump host is one of the gate's trusted sources, ssh gets through by ProxyJump alone, "
    "without the helper."
)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"portknock: {message}. Run: {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the helper; return its exit status."""
    begun = time.monotonic()
    options = _parser().parse_args(arguments)
    try:
        if options.command == "close":
            return _close(options)
        if options.command != "connect":
            # Read only where it is needed: ssh waits for each connection.
            from ansible_collections.fleet.portknock.plugins.module_utils._setup import run_setup

            return run_setup(options)
        sock = _connect(options, begun)
        with sock:
            # As ssh does with a connection of its own. macOS refuses where the far side has gone already.
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            failure = relay(sock)
        if failure is not None:
            raise PortknockError(f"The connection to {options.host} broke: {failure.strerror or 'no reason is known'}.")
    except PortknockError as exc:
        sys.stderr.write(f"portknock: {exc}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="portknock", description="Knock, then connect.", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    connect = commands.add_parser(
        "connect",
        help="knock, and relay standard input and output to what opens",
        description="Knock, and relay standard input and output to what opens. For ssh: "
        "ProxyCommand portknock connect --secrets FILE %h %p",
        allow_abbrev=False,
    )
    connect.add_argument("host", metavar="HOST", help="a name in FILE, or the host's name or address: ssh's %%h")
    connect.add_argument("port", metavar="PORT", type=_port, help="the protected port: ssh's %%p")
    connect.add_argument("--secrets", metavar="FILE", required=True, help="your file of secrets, mode 0600")
    _add_common(connect)
    close = commands.add_parser(
        "close",
        help="shut your window at a host before its time",
        description="Shut the window that your knock has opened, before its time. Sessions go on. For hosts that have a close "
        "sequence (knock_server_close_sequence).",
        allow_abbrev=False,
    )
    close.add_argument("host", metavar="HOST", help="a name in FILE, or the host's name or address")
    close.add_argument(
        "port", metavar="PORT", type=_port, nargs="?", help="the protected port (default: the one in FILE)"
    )
    close.add_argument(
        "--secrets",
        metavar="FILE",
        help=f"your file of secrets (default: {_SECRETS} beside this program, as in a bundle)",
    )
    _add_common(close)
    install = commands.add_parser(
        "install",
        help="make ssh use the bundle that this program came in",
        description="Put the bundle that this program came in into ~/.ssh, and one Include line at the top of ~/.ssh/config.",
        allow_abbrev=False,
    )
    install.add_argument(
        "--replace", action="store_true", help="take the place of another operator's or fleet's bundle"
    )
    commands.add_parser(
        "uninstall",
        help="undo that",
        description="Take the bundle that this program came in out of ~/.ssh, and its line out of ~/.ssh/config.",
        allow_abbrev=False,
    )
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", metavar="NAME", help="the host's name in FILE, where HOST is another one")
    family = parser.add_mutually_exclusive_group()
    family.add_argument("-4", dest="family", action="store_const", const="inet", help="IPv4 only")
    family.add_argument("-6", dest="family", action="store_const", const="inet6", help="IPv6 only")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=DEFAULT_TIMEOUT,
        help="give up after this time; a little less than ssh's ConnectTimeout (default: %(default)g)",
    )
    parser.add_argument(
        "--jump",
        metavar="[USER@]HOST[:PORT]",
        help="knock and connect from this host, as ssh's ProxyJump names it, in place of the one in FILE; none: from here",
    )
    parser.add_argument(
        "--spa-source",
        metavar="ADDRESS",
        default="",
        help="the IPv4 address that a gate of fwknop is to let in, where it sees another one than this machine has (NAT)",
    )
    parser.add_argument(
        "-F", dest="config", metavar="FILE", help="ssh's configuration file for the jump host, where not its own"
    )
    parser.set_defaults(family="any")


def jump_of(arguments: Sequence[str]) -> str:
    """The jump host that the helper would go by with these arguments; empty for none.

    :raises PortknockError: it would not get that far.
    """
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            options = _parser().parse_args(arguments)
    except SystemExit:
        raise PortknockError(told.getvalue().strip()) from None
    secrets = read_secrets(os.path.expanduser(options.secrets))
    return _jump(options, secrets.find(options.host, options.port, options.name)[1])


def _jump(options: argparse.Namespace, access: Access) -> str:
    named: str = access.jump if options.jump is None else options.jump
    return "" if named.lower() == "none" else named


def _port(value: str) -> int:
    if value.isdecimal() and 1 <= int(value[:6]) <= HIGHEST_PORT:
        return int(value)
    raise argparse.ArgumentTypeError(f"expected a port from 1 to {HIGHEST_PORT}; got {value!r}")


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _LONGEST_TIMEOUT:
        raise argparse.ArgumentTypeError(
            f"expected a number of seconds above 0 and up to {_LONGEST_TIMEOUT:g}; got {value!r}"
        )
    return seconds


def _connect(options: argparse.Namespace, begun: float) -> socket.socket:
    """Knock until the port opens; return the connection that it opened for.

    :param begun: when the timeout began (monotonic clock).
    :raises PortknockError: it did not open.
    """
    secrets = read_secrets(options.secrets)
    name, access = secrets.find(options.host, options.port, options.name)
    # A name of the file is no more than that: where it leads is in the file.
    host = access.hostname if options.host.lower() == name.lower() else options.host
    usage = Usage(f"{options.secrets}.used", access.stamp, f"{name} ")
    tickets = usage.tickets([(secrets.operator, access.one_time)]) if access.one_time else []
    once = [ticket.knocks for ticket in tickets]
    jump = _jump(options, access)
    source = check_source(options.spa_source, "--spa-source")
    sequences = [asking_for(knocks, source) for knocks in access.sequences]
    deadline = begun + options.timeout
    if jump:
        result, sock = _from_jump(options, deadline, host, jump, sequences, once)
    else:
        addresses = resolve(host, options.port, options.family)
        left = max(0.0, deadline - time.monotonic())
        result, sock = knock_and_connect(addresses, sequences, options.port, left, once=once)
    usage.note(tickets, result, len(access.sequences))
    if sock is None:
        raise PortknockError(_explain(result, options, name, secrets.operator))
    return sock


def _close(options: argparse.Namespace) -> int:
    """Shut the window; return the exit status.

    :raises PortknockError: it is still open, or nobody can say.
    """
    path = options.secrets or os.path.join(os.path.dirname(os.path.realpath(sys.argv[0])), _SECRETS)
    secrets = read_secrets(path)
    name, access = secrets.find(options.host, options.port, options.name)
    if not access.close:
        raise PortknockError(
            f"HOST: expected a host with a close sequence in the file of secrets; {name} has none. Where its gate has one "
            "(knock_server_close_sequence), ask for new secrets; its window shuts by itself in any case."
        )
    port = options.port or access.port
    host = access.hostname if options.host.lower() == name.lower() else options.host
    jump = _jump(options, access)
    if jump:
        result = _way_from_jump(options, host, port, jump).close(access.close, options.timeout)
    else:
        addresses = resolve(host, port, options.family)
        result = knock_until_closed(addresses, access.close, port, options.timeout)
    if result.state == "unreachable":
        raise PortknockError(_explain(result, options, name, secrets.operator))
    if result.state == "open":
        raise PortknockError(
            f"Port {port} of {name} ({result.address.host if result.address else host}) is still open after "
            f"{result.elapsed:.1f} s. Either this address needs no knock there, or the sequence is out of date: ask for new "
            f"secrets for the operator {secrets.operator}. The window shuts by itself in any case."
        )
    sys.stdout.write(f"Port {port} of {name} is closed to this address.\n")
    return 0


def _way_from_jump(options: argparse.Namespace, host: str, port: int, jump: str) -> FromJump:
    # Where nobody jumps, its modules would only take time.
    from ansible_collections.fleet.portknock.plugins.module_utils._jump import FromJump, jump_host

    return FromJump(jump_host(jump, "--jump", config=options.config), host, port, options.family, options.timeout)


def _from_jump(
    options: argparse.Namespace,
    deadline: float,
    host: str,
    jump: str,
    sequences: Sequence[Sequence[Knock]],
    once: Sequence[Sequence[Knock]],
) -> tuple[KnockResult, socket.socket | None]:
    from ansible_collections.fleet.portknock.plugins.module_utils._jump import JumpError

    way = _way_from_jump(options, host, options.port, jump)
    try:
        return way.connect(sequences, once, deadline)
    except JumpError as exc:
        advice = _NO_KNOCKS if exc.is_unable else ""
        raise PortknockError(f"{exc}{advice}") from None


def _explain(result: KnockResult, options: argparse.Namespace, name: str, operator: str) -> str:
    where = name if result.address is None else f"{name} ({result.address.host})"
    if result.state == "unreachable":
        code = getattr(errno, result.error, None)
        reason = os.strerror(code) if code else "no address leads there"
        return (
            f"There is no way to {where}: {reason}. Check the network and the address, and whether -4 or -6 is right."
        )
    return (
        f"The knock did not open port {options.port} of {where}: {result.state} after {result.elapsed:.1f} s and "
        f"{result.attempts} tries. If others get in, ask for new secrets for the operator {operator} and see that nothing "
        "on the way holds the knocks back."
    )


__all__ = ("DEFAULT_TIMEOUT", "jump_of", "main")
