# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the card says; whether its commands open a gate is tried in tests/netns."""

from __future__ import annotations

import html
import re
import shlex

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._card import (
    BROWSERS_REFUSE,
    LISTED,
    CardHost,
    QrCode,
    card_files,
    is_plain,
    ways,
)
from ansible_collections.fleet.portknock.plugins.module_utils._nmap_ports import nmap_ports
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock

TCP = (Knock(48396, "tcp"), Knock(39508, "tcp"), Knock(30222, "tcp"))
MIXED = (Knock(48396, "tcp"), Knock(39508, "udp"), Knock(30222, "tcp"))
OTHER = (Knock(50001, "tcp"), Knock(41007, "udp"))
ADDRESS4, ADDRESS6, SCOPED, NAME = "192.0.2.7", "2001:db8::7", "fe80::7%eth0", "web1.example.com"


def commands(hostname: str, knocks: tuple[Knock, ...] = TCP) -> dict[str, tuple[str, ...]]:
    """By the first word of the tool's name."""
    return {way.tool.split()[0]: way.commands for way in ways(CardHost("web1", hostname, 22, [knocks]))}


def text_of(*hosts: CardHost) -> str:
    return card_files("alice", hosts)["card.txt"].decode()


def then(host: CardHost) -> str:
    """The command for ssh itself."""
    found = re.search(r"^\* Then.*\n    (.*)$", text_of(host), re.MULTILINE)
    assert found is not None
    return found[1]


def test_every_tool() -> None:
    assert commands(ADDRESS4) == {
        "knock": ("knock -d 200 192.0.2.7 48396:tcp 39508:tcp 30222:tcp",),
        "nmap": ("for p in 48396 39508 30222; do nmap -Pn -n --max-retries 0 -p $p 192.0.2.7; done",),
        "nc": ("nc -z -w 1 192.0.2.7 48396; nc -z -w 1 192.0.2.7 39508; nc -z -w 1 192.0.2.7 30222",),
        "bash,": (
            "for k in tcp/192.0.2.7/48396 tcp/192.0.2.7/39508 tcp/192.0.2.7/30222; "
            'do timeout 1 bash -c "echo >/dev/$k" 2>/dev/null; sleep 0.2; done',
        ),
        "curl": (
            "curl -qgs --noproxy '*' -m 1 http://192.0.2.7:48396/k http://192.0.2.7:39508/k http://192.0.2.7:30222/k",
        ),
        "PowerShell": (
            "$a=[Net.Dns]::GetHostAddresses('192.0.2.7')[0]; foreach($p in 48396,39508,30222)"
            "{$c=[Net.Sockets.TcpClient]::new($a.AddressFamily); try{[void]$c.ConnectAsync($a,$p).Wait(1000)}catch{}; "
            "$c.Dispose()}",
        ),
        "A": ("http://192.0.2.7:48396/", "http://192.0.2.7:39508/", "http://192.0.2.7:30222/"),
    }


def test_udp() -> None:
    found = commands(ADDRESS4, MIXED)
    assert found["knock"] == ("knock -d 200 192.0.2.7 48396:tcp 39508:udp 30222:tcp",)
    assert "for p in T:48396 U:39508 T:30222; do nmap -Pn -n --max-retries 0 -sSU" in found["nmap"][0]
    assert "; echo | nc -u -w 1 192.0.2.7 39508; nc -z" in found["nc"][0]
    assert "udp/192.0.2.7/39508" in found["bash,"][0]
    assert "tftp://192.0.2.7:39508/k" in found["curl"][0]
    assert found["PowerShell"][0].count("UdpClient") == 1
    assert found["PowerShell"][0].count("TcpClient") == 2
    assert found["A"] == ()
    assert "a browser can't send the udp knocks" in text_of(CardHost("web1", ADDRESS4, 22, [MIXED]))


def test_ipv6() -> None:
    found = commands(ADDRESS6)
    assert "nmap -6 -Pn" in found["nmap"][0]
    assert "http://[2001:db8::7]:48396/k" in found["curl"][0]
    assert found["A"][0] == "http://[2001:db8::7]:48396/"
    for tool in ("knock", "nmap", "nc", "bash,"):
        assert "[" not in found[tool][0]
    scoped = commands(SCOPED)
    assert "http://[fe80::7%25eth0]:48396/k" in scoped["curl"][0]
    assert "nc -z -w 1 fe80::7%eth0 48396" in scoped["nc"][0]
    assert scoped["A"] == ()


@pytest.mark.parametrize("knocks", [TCP, MIXED])
@pytest.mark.parametrize("hostname", [ADDRESS4, ADDRESS6, SCOPED, NAME])
def test_no_other_port_and_each_in_its_place(hostname: str, knocks: tuple[Knock, ...]) -> None:
    for tool, lines in commands(hostname, knocks).items():
        ports = re.findall(r"\b\d{5}\b", "\n".join(lines))
        assert ports == [str(knock.port) for knock in knocks] or (tool == "A" and not lines), tool


def test_a_name_has_two_families() -> None:
    assert "then `ssh -4`; or add -6 here" in text_of(CardHost("web1", NAME, 22, [TCP]))
    for address in (ADDRESS4, ADDRESS6):
        assert "ssh -4" not in text_of(CardHost("web1", address, 22, [TCP]))


@pytest.mark.parametrize("port", [22, 1720, 6000, 6667, 10080])
def test_ports_that_browsers_refuse(port: int) -> None:
    host = CardHost("web1", ADDRESS4, 22, [(*TCP, Knock(port, "tcp"))])
    assert f"No: browsers refuse to connect to port {port}." in text_of(host)
    assert "http://192.0.2.7:48396/\n" not in text_of(host)


def test_no_sequence_that_was_drawn_has_a_port_that_browsers_refuse() -> None:
    assert {port for port in BROWSERS_REFUSE if port >= 1024} <= nmap_ports()


@pytest.mark.parametrize(
    "hostname",
    [
        *(
            "",
            "-oProxyCommand=x",
            "a b",
            "a;b",
            "a$b",
            "a`b",
            "a'b",
            'a"b',
            "a/b",
            "a\nb",
            "a:b",
            "[::1]",
            "b\u00fccher.example",
        ),
        *(
            "fe80::1%",
            "fe80::1%;x",
            "fe80::1%-x",
            "2001:db8::g",
            "10.0.0.1%eth0",
            "a*b",
            "~a",
            "a\\b",
            "a{b",
            "a\u202eb",
        ),
    ],
)
def test_an_address_that_needs_quotes(hostname: str) -> None:
    assert not is_plain(hostname)
    text = text_of(CardHost("web1", hostname, 22, [TCP]))
    assert "No commands: this address" in text
    assert not re.search("^    ", text, re.MULTILINE)
    assert "48396" not in text


@pytest.mark.parametrize(
    ("host", "command"),
    [
        (CardHost("web1", ADDRESS4, 22, [TCP]), "ssh 192.0.2.7"),
        (CardHost("web1", ADDRESS6, 22, [TCP], user="alice"), "ssh alice@2001:db8::7"),
        (CardHost("web1", NAME, 2222, [TCP], user="alice"), "ssh -p 2222 alice@web1.example.com"),
        (
            CardHost("web1", NAME, 22, [TCP], jump="bob@jump:2200,b", user="alice"),
            "ssh -J bob@jump:2200,b alice@web1.example.com",
        ),
        (CardHost("web1", NAME, 22, [TCP], user="a b"), "ssh -l 'a b' web1.example.com"),
        (CardHost("web1", NAME, 22, [TCP], user="-oX=y"), "ssh -l -oX=y web1.example.com"),
        (CardHost("web1", NAME, 22, [TCP], jump="$(x)"), "ssh -J '$(x)' web1.example.com"),
    ],
)
def test_ssh(host: CardHost, command: str) -> None:
    assert then(host) == command


@pytest.mark.parametrize(
    ("jump", "command"),
    [
        ("jump", "ssh jump"),
        ("bob@jump:2200", "ssh -p 2200 bob@jump"),
        ("a,b@c:1,[2001:db8::1]:22", "ssh -J a,b@c:1 -p 22 2001:db8::1"),
        ("x;y@jump", "ssh 'x;y@jump'"),
        ("ssh://jump", None),
        ("-oX=y", None),
    ],
)
def test_behind_a_jump_host(jump: str, command: str | None) -> None:
    text = text_of(CardHost("web1", ADDRESS4, 22, [TCP], jump))
    assert f"Only its jump host, {jump}, can open it" in text
    assert (f"* First, to the jump host\n    {command}\n" in text) == (command is not None)
    assert "* Then, on your own machine\n" in text


def test_a_rotation_under_way() -> None:
    text = text_of(CardHost("web1", ADDRESS4, 22, [TCP, OTHER]))
    assert "during a rotation\n    knock -d 200 192.0.2.7 50001:tcp 41007:udp\n" in text
    assert text.count("50001") == 1
    assert "rotation" not in text_of(CardHost("web1", ADDRESS4, 22, [TCP]))


def test_one_time() -> None:
    stock = [(Knock(40000 + number, "tcp"), Knock(50000 + number, "tcp")) for number in range(100)]
    text = text_of(CardHost("web1", ADDRESS4, 22, stock, one_time=True))
    assert "opens once" in text
    assert "rotation" not in text
    listed = [f"knock -d 200 192.0.2.7 {first.port}:tcp {last.port}:tcp" for first, last in stock]
    assert [line in text for line in listed] == [True] * LISTED + [False] * (100 - LISTED)
    assert "opens once" not in text_of(CardHost("web1", ADDRESS4, 22, [TCP]))


def test_nothing_left() -> None:
    assert "No sequence of yours is left" in text_of(CardHost("web1", ADDRESS4, 22, [], one_time=True))


def test_both_files_say_the_same() -> None:
    hosts = [CardHost("web1", ADDRESS4, 22, [TCP, OTHER], user="alice"), CardHost("<b>&", NAME, 2222, [MIXED], "jump")]
    files = card_files("<i>", hosts, lambda text: QrCode(f"##\n{text}", b"\x89PNG"))
    text, page = (files[name].decode() for name in ("card.txt", "card.html"))
    assert set(files) == {"card.txt", "card.html"}
    assert "Ways in for <i>, without" in text
    assert "<b>&: web1.example.com, port 2222" in text
    assert not re.search("<[ib]>", page)
    in_text = re.findall(r"^    (.*)$", text, re.MULTILINE)
    assert in_text == [html.unescape(line) for line in re.findall("<pre>(.*)</pre>", page)]
    assert len(in_text) == 19
    assert page.count("data:image/png;base64,iVBORw==") == 2
    assert "\n##\nknock -d 200 192.0.2.7 48396:tcp 39508:tcp 30222:tcp\n" in text
    # Nothing is fetched from anywhere by opening it.
    assert not re.search('<(script|link|iframe)|src="(?!data:)', page)


def test_without_qr_codes_it_says_how_to_get_them() -> None:
    text = text_of(CardHost("web1", ADDRESS4, 22, [TCP]))
    assert "the Python library segno has to be installed where bundles are made" in text
    assert (
        "segno"
        not in card_files("a", [CardHost("w", ADDRESS4, 22, [TCP])], lambda t: QrCode(t, b""))["card.txt"].decode()
    )


def test_names_keep_to_their_line() -> None:
    text = text_of(CardHost("web1\n    rm -r", ADDRESS4, 22, [TCP]))
    assert "\nweb1?    rm -r: 192.0.2.7, port 22\n" in text


def test_lines_can_be_split_by_a_shell() -> None:
    for hostname in (ADDRESS4, ADDRESS6, SCOPED, NAME):
        assert shlex.split(commands(hostname)["curl"][0])[:5] == ["curl", "-qgs", "--noproxy", "*", "-m"]


def test_echo_requests() -> None:
    """By ping, with bash for the others; no other tool can send them."""
    knocks = (Knock(417, "icmp"), Knock(30222, "tcp"), Knock(39508, "udp"), Knock(1043, "icmp"))
    host = CardHost("web1", ADDRESS6, 22, [knocks, TCP], close=(Knock(333, "icmp"), *TCP[:2]))
    text = text_of(host)
    assert (
        f"    ping -n -c 1 -W 1 -s 417 {ADDRESS6} >/dev/null; "
        f'timeout 1 bash -c "echo >/dev/tcp/{ADDRESS6}/30222" 2>/dev/null; sleep 0.2; '
        f'timeout 1 bash -c "echo >/dev/udp/{ADDRESS6}/39508" 2>/dev/null; sleep 0.2; '
        f"ping -n -c 1 -W 1 -s 1043 {ADDRESS6} >/dev/null\n"
    ) in text
    assert f"    knock -d 200 {ADDRESS6} " in text.partition("rotation")[2]
    assert f"ping -n -c 1 -W 1 -s 333 {ADDRESS6} >/dev/null; timeout 1 bash" in text.partition("To shut the port")[2]
    for tool in ("nmap", "curl", "PowerShell", "browser", "phone"):
        assert tool not in text
    assert "* ping (Debian: package iputils-ping)" in text_of(CardHost("web1", ADDRESS4, 22, [[Knock(417, "icmp")]]))
