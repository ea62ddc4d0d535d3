# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The card in an operator's bundle: the knock for each host, as commands of tools that are there without Python.

Each command leaves a closed port after a second at the most, so that the next knock comes within the step timeout, and
sends nothing to a port that is no knock. What every command does to a gate is tried by ``tests/netns/test_card.py``, which
takes the commands from the text that is made here.
"""

from __future__ import annotations

import base64
import html
import ipaddress
import re
import shlex
from typing import Callable, Mapping, NamedTuple, Optional, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._spa import uses_gnupg

# The ports that browsers refuse to connect to: the "bad ports" of the Fetch standard.
# fmt: off
BROWSERS_REFUSE = frozenset((
    0, 1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104,
    109, 110, 111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515,
    526, 530, 531, 532, 540, 548, 554, 556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049,
    3659, 4045, 4190, 5060, 5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080,
))
# fmt: on
# Of a stock of one-time sequences no more than four can open at a time, and a boot takes up to four away.
LISTED = 8

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)
_ZONE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*", re.ASCII)
_JUMP = re.compile(r"((?:[^@]+@)?)(?:\[([^]]+)\]|([^][:@]+))(?::([0-9]+))?")


class CardHost(NamedTuple):
    """A host on the card.

    ``name`` is what the inventory calls it, ``hostname`` and ``port`` are what ssh connects to, ``user`` whom it logs in as
    (empty: not stated). ``sequences`` are those that open it, the one to try first at the head; with ``one_time`` each of them
    opens once. ``jump`` is the host that the knock has to leave from, in the words of ssh's ProxyJump (empty: none). ``close``
    shuts the window early (empty: none).
    """

    name: str
    hostname: str
    port: int
    sequences: Sequence[Sequence[Knock]]
    jump: str = ""
    user: str = ""
    one_time: bool = False
    close: Sequence[Knock] = ()


class QrCode(NamedTuple):
    """A QR code: ``text`` for a terminal with a dark background, and a picture."""

    text: str
    png: bytes


class Way(NamedTuple):
    """One tool's commands for one host, each one line, and what to know about them."""

    tool: str
    commands: tuple[str, ...]
    notes: tuple[str, ...] = ()
    qr: Optional[QrCode] = None


class _Part(NamedTuple):
    """A host on the card."""

    title: str
    intro: tuple[str, ...]
    ways: tuple[Way, ...]


def ways(host: CardHost) -> tuple[Way, ...]:
    """Return how to knock with the first sequence of a host whose ``hostname`` is plain (:func:`is_plain`)."""
    knocks = host.sequences[0]
    if knocks[0].spa:
        return () if uses_gnupg(knocks[0]) else (_fwknop(host.name),)
    if _has_echo(knocks):
        return (_ping(host.hostname, knocks),)
    return (
        _knock(host.hostname, knocks),
        _nmap(host.hostname, knocks),
        _nc(host.hostname, knocks),
        _bash(host.hostname, knocks),
        _curl(host.hostname, knocks),
        _powershell(host.hostname, knocks),
        _browser(host.hostname, knocks),
    )


def is_plain(hostname: str) -> bool:
    """Whether a name or an address means itself in every tool's language, so that no command quotes it."""
    return _NAME.fullmatch(hostname) is not None or _is_ipv6(hostname)


def card_files(
    operator: str, hosts: Sequence[CardHost], qr: Callable[[str], QrCode] | None = None
) -> Mapping[str, bytes]:
    """Return the card as files for a bundle, by name: ``card.txt`` and, the same with pictures of the
    QR codes, ``card.html``.

    Both hold secrets.

    :param qr: makes QR codes; None leaves them out, and the card says how to get them.
    """
    parts = [_part(host, qr) for host in hosts]
    title = f"Ways in for {_printable(operator)}, without the helper"
    return {"card.txt": _text(title, parts).encode(), "card.html": _html(title, parts).encode()}


_INTRO = (
    "Whoever has this card can open these hosts: keep it like a key.",
    "For each host: knock in one of the ways below, then use ssh. The port stays open to your address for 30 seconds, unless "
    "your administrator has chosen another time. Each line is one command.",
    "What a knock prints does not matter: refused, filtered and timed out are all as it should be. If ssh does not get in, "
    "wait ten seconds and knock again, or in another way.",
    "The knock and ssh have to leave from the same address: not one through a VPN or a proxy and the other not, not one over "
    "IPv4 and the other over IPv6.",
)


# What each tool makes of a sequence.


def _fwknop(name: str) -> Way:
    # The keys are in a file: nothing that is typed, or seen in a list of processes, holds them.
    return Way(
        "fwknop (Debian: package fwknop-client)",
        (f"fwknop --no-save-args --rc-file fwknoprc -n {shlex.quote(name)} -a 192.0.2.7",),
        (
            "In the folder of this card, and with the IPv4 address that your packets come from in the place of 192.0.2.7. Your "
            "clock must not be wrong by more than two minutes.",
        ),
    )


def _knock(hostname: str, knocks: Sequence[Knock]) -> Way:
    return Way("knock (Debian: package knockd)", (_knock_command(hostname, knocks),))


def _knock_command(hostname: str, knocks: Sequence[Knock]) -> str:
    # A gap, for packets that are sent back to back overtake each other on real paths.
    return f"knock -d 200 {hostname} " + " ".join(f"{knock.port}:{knock.proto}" for knock in knocks)


def _line(hostname: str, knocks: Sequence[Knock]) -> str:
    """One command that sends any sequence."""
    return _ping(hostname, knocks).commands[0] if _has_echo(knocks) else _knock_command(hostname, knocks)


def _ping(hostname: str, knocks: Sequence[Knock]) -> Way:
    others = {
        proto: f'timeout 1 bash -c "echo >/dev/{proto}/{hostname}/{{}}" 2>/dev/null; sleep 0.2'
        for proto in ("tcp", "udp")
    }
    # Without an answer ping waits for a second.
    steps = (
        f"ping -n -c 1 -W 1 -s {knock.port} {hostname} >/dev/null"
        if knock.proto == "icmp"
        else others[knock.proto].format(knock.port)
        for knock in knocks
    )
    tool = "ping" if all(knock.proto == "icmp" for knock in knocks) else "ping and bash"
    return Way(
        f"{tool} (Debian: package iputils-ping)",
        ("; ".join(steps),),
        (
            "Other tools can't send what bytes/icmp stands for, an echo request with so many bytes of payload. On macOS it is "
            "-t 1 instead of -W 1.",
        ),
    )


def _has_echo(knocks: Sequence[Knock]) -> bool:
    return any(knock.proto == "icmp" for knock in knocks)


def _nmap(hostname: str, knocks: Sequence[Knock]) -> Way:
    # One call for each port: within a call nmap chooses the order.
    options = "-6 -Pn -n --max-retries 0" if _is_ipv6(hostname) else "-Pn -n --max-retries 0"
    notes = []
    if not _is_ipv6(hostname) and not _is_ipv4(hostname):
        notes.append("It takes the name's IPv4 address: then `ssh -4`; or add -6 here.")
    if _is_tcp(knocks):
        ports = " ".join(str(knock.port) for knock in knocks)
    else:
        ports = " ".join(f"{knock.proto[0].upper()}:{knock.port}" for knock in knocks)
        options += " -sSU"
        notes.append("As root: nmap sends nothing to a udp port otherwise.")
    return Way("nmap", (f"for p in {ports}; do nmap {options} -p $p {hostname}; done",), tuple(notes))


def _nc(hostname: str, knocks: Sequence[Knock]) -> Way:
    # With -z Debian's nc sends no datagram, unless it is to be verbose.
    udp, tcp = "echo | nc -u", "nc -z"
    commands = (f"{udp if knock.proto == 'udp' else tcp} -w 1 {hostname} {knock.port}" for knock in knocks)
    return Way("nc (Debian: package netcat-openbsd)", ("; ".join(commands),))


def _bash(hostname: str, knocks: Sequence[Knock]) -> Way:
    targets = " ".join(f"{knock.proto}/{hostname}/{knock.port}" for knock in knocks)
    return Way(
        "bash, without any package",
        (f'for k in {targets}; do timeout 1 bash -c "echo >/dev/$k" 2>/dev/null; sleep 0.2; done',),
    )


def _curl(hostname: str, knocks: Sequence[Knock]) -> Way:
    # No settings of the user's, no proxy, no patterns in addresses.
    urls = " ".join(
        f"{'tftp' if knock.proto == 'udp' else 'http'}://{_in_url(hostname)}:{knock.port}/k" for knock in knocks
    )
    return Way("curl", (f"curl -qgs --noproxy '*' -m 1 {urls}",))


def _powershell(hostname: str, knocks: Sequence[Knock]) -> Way:
    address = f"$a=[Net.Dns]::GetHostAddresses('{hostname}')[0]"
    tcp = "$c=[Net.Sockets.TcpClient]::new($a.AddressFamily); try{[void]$c.ConnectAsync($a,$p).Wait(1000)}catch{}; $c.Dispose()"
    udp = (
        "$u=[Net.Sockets.UdpClient]::new($a.AddressFamily); [void]$u.Send([byte[]](1),1,[Net.IPEndPoint]::new($a,$p)); "
        "$u.Dispose()"
    )
    steps = (f"$p={knock.port}; {udp if knock.proto == 'udp' else tcp}" for knock in knocks)
    if _is_tcp(knocks):
        ports = ",".join(str(knock.port) for knock in knocks)
        command = f"{address}; foreach($p in {ports}){{{tcp}}}"
    else:
        command = "; ".join((address, *steps))
    return Way("PowerShell", (command,), ("Not tried by any test.",))


def _browser(hostname: str, knocks: Sequence[Knock]) -> Way:
    tool = "A web browser's address line"
    if not _is_tcp(knocks):
        return Way(tool, (), ("No: a browser can't send the udp knocks.",))
    refused = [str(knock.port) for knock in knocks if knock.port in BROWSERS_REFUSE]
    if refused:
        return Way(tool, (), (f"No: browsers refuse to connect to port {', '.join(refused)}.",))
    if "%" in hostname:
        return Way(tool, (), ("No: browsers don't take an address with an interface.",))
    return Way(
        tool,
        tuple(f"http://{_in_url(hostname)}:{knock.port}/" for knock in knocks),
        (
            "One after the other in the same tab, each within 5 seconds of the one before and without waiting for a page: none "
            "loads. Not through a proxy. Where the browser says at once that it can't connect, this works; where it goes on "
            "trying, it disturbs its own knocks: take another way.",
        ),
    )


def _is_tcp(knocks: Sequence[Knock]) -> bool:
    return all(knock.proto == "tcp" for knock in knocks)


def _is_ipv4(hostname: str) -> bool:
    try:
        ipaddress.IPv4Address(hostname)
    except ValueError:
        return False
    return True


def _is_ipv6(hostname: str) -> bool:
    address, percent, zone = hostname.partition("%")
    if percent and not _ZONE.fullmatch(zone):
        return False
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        return False
    return True


def _in_url(hostname: str) -> str:
    return f"[{hostname.replace('%', '%25')}]" if _is_ipv6(hostname) else hostname


# ssh.


def _ssh(host: CardHost) -> str:
    words = ["ssh"]
    if host.jump:
        words += ["-J", host.jump]
    if host.port != 22:
        words += ["-p", str(host.port)]
    if host.user and not _USER.fullmatch(host.user):
        # As an argument of its own, whatever it begins with.
        words += ["-l", host.user]
    target = f"{host.user}@{host.hostname}" if _USER.fullmatch(host.user) else host.hostname
    return " ".join(map(shlex.quote, (*words, target)))


def _to_jump(jump: str) -> str | None:
    """Return the command that logs in to the host that the connection comes from, the last of a chain."""
    before, _comma, last = jump.rpartition(",")
    match = _JUMP.fullmatch(last)
    if match is None or last.startswith("-"):
        return None
    user, ipv6, name, port = match.groups()
    words = ["ssh", *(["-J", before] if before else []), *(["-p", port] if port else []), f"{user}{ipv6 or name}"]
    return " ".join(map(shlex.quote, words))


# The layout.


def _part(host: CardHost, qr: Callable[[str], QrCode] | None) -> _Part:
    title = f"{_printable(host.name)}: {_printable(host.hostname)}, port {host.port}"
    if not is_plain(host.hostname):
        return _Part(title, ("No commands: this address does not mean the same to every tool. Use the helper.",), ())
    if not host.sequences:
        return _Part(title, ("No sequence of yours is left: ask for new ones.",), ())
    if host.sequences[0][0].spa:
        if host.jump:
            return _Part(title, (f"Only its jump host, {_printable(host.jump)}, can open it: use the helper.",), ())
        if uses_gnupg(host.sequences[0][0]):
            return _Part(title, ("One packet that GnuPG signs opens it, over IPv4 only: use the helper.",), ())
        only = (
            "One packet opens it, which a program has to make: IPv4 only. There is no other way, and none for a phone."
        )
        return _Part(title, (only,), (*ways(host), Way("Then", (_ssh(host),))))
    first, *others = (_line(host.hostname, knocks) for knocks in host.sequences[:LISTED])
    intro = ["Knocks, in this order: " + " ".join(map(str, host.sequences[0]))]
    spare = "If that does not open: another sequence, which may be in force during a rotation"
    if host.one_time:
        spare = "The sequences after that; for another tool change the ports in its command"
        intro.append(
            "Each sequence of this host opens once: cross it out when you have used it, and go on to the next where one does not "
            "open. The helper uses up the same ones, and so do restarts of the host: get a new card now and then."
        )
    found: list[Way] = []
    if host.jump:
        intro.append(f"Only its jump host, {_printable(host.jump)}, can open it: log in there and knock there.")
        log_in = _to_jump(host.jump)
        found += [Way("First, to the jump host", (log_in,))] if log_in else []
    found += ways(host)
    if others:
        found.append(Way(spare, tuple(others)))
    found.append(Way("Then, on your own machine" if host.jump else "Then", (_ssh(host),)))
    if host.close:
        found.append(_closing(host))
    if not _has_echo(host.sequences[0]):
        found.append(_phone(first, qr))
    return _Part(title, tuple(intro), tuple(found))


def _closing(host: CardHost) -> Way:
    has_echo = _has_echo(host.close)
    tools = (
        (_ping(host.hostname, host.close),)
        if has_echo
        else (_knock(host.hostname, host.close), _bash(host.hostname, host.close))
    )
    how = "" if has_echo else "By knock, or by bash; for another tool change the ports in its command. "
    where = ", on its jump host" if host.jump else ""
    return Way(
        f"To shut the port again before its time{where}",
        tuple(command for way in tools for command in way.commands),
        (
            "Another sequence, which shuts it for your address: " + " ".join(map(str, host.close)),
            f"{how}Sessions go on.",
        ),
    )


def _phone(command: str, qr: Callable[[str], QrCode] | None) -> Way:
    apps = "type the host and the ports into a knocking app, or run it in a terminal app. No app is known that takes a QR code."
    if qr is None:
        return Way(
            "A phone",
            (),
            (
                f"From the command of `knock` {apps}",
                "For a QR code of that command, the Python library segno has to be installed where bundles are made.",
            ),
        )
    return Way("A phone", (), (f"This is the command of `knock`: {apps}",), qr(command))


def _text(title: str, parts: Sequence[_Part]) -> str:
    lines = [title, "=" * len(title), "", *_INTRO]
    for part in parts:
        lines += ["", "", part.title, "-" * len(part.title), *part.intro]
        for way in part.ways:
            lines += ["", f"* {way.tool}", *(f"  {note}" for note in way.notes)]
            lines += [f"    {command}" for command in way.commands]
            if way.qr is not None:
                lines += ["", *way.qr.text.splitlines()]
    return "\n".join((*lines, ""))


def _html(title: str, parts: Sequence[_Part]) -> str:
    lines = [_HTML_BEGIN.format(title=html.escape(title)), *(_element("p", line) for line in _INTRO)]
    for part in parts:
        lines += [_element("h2", part.title), *(_element("p", line) for line in part.intro)]
        for way in part.ways:
            lines += [_element("h3", way.tool), *(_element("p", note) for note in way.notes)]
            lines += [_element("pre", command) for command in way.commands]
            if way.qr is not None:
                lines.append(f'<img alt="QR code" src="data:image/png;base64,{base64.b64encode(way.qr.png).decode()}">')
    return "\n".join((*lines, "</body>", "</html>", ""))


_HTML_BEGIN = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>body {{ font-family: sans-serif; max-width: 60em; margin: 1em auto }} pre {{ white-space: pre-wrap }}</style>
</head>
<body>
<h1>{title}</h1>"""


def _element(name: str, content: str) -> str:
    return f"<{name}>{html.escape(content)}</{name}>"


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


__all__ = ("BROWSERS_REFUSE", "LISTED", "CardHost", "QrCode", "Way", "card_files", "is_plain", "ways")
