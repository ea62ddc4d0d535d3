# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The supervisor of sniffing daemons, with Debian's own knockd, on a host whose interfaces come, go and change.

What counts is whether a knock from another namespace opens the port; a knock is repeated until a daemon has had the time to
start.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from netlab import HOST4, SEQUENCE, Lab, Namespace, wait_for
from openlab import SECONDS, Opener, knocks_open, wait_until_open

pytestmark = pytest.mark.skipif(not shutil.which("knockd", path="/usr/sbin:/sbin"), reason="needs knockd")


@pytest.fixture
def opener(lab: Lab, tmp_path: Path) -> Iterator[Opener]:
    """A host with a gate that knockd opens, and a supervisor that has not been started."""
    made = Opener(lab, tmp_path)
    made.gate()
    try:
        yield made
    finally:
        made.stop()


@pytest.mark.parametrize("family", [4, 6])
def test_a_knock_opens(lab: Lab, opener: Opener, family: int) -> None:
    opener.start()
    source, stranger = lab.source(family), lab.source(family)
    wait_until_open(lab, source)
    assert lab.look(stranger) == "reset"
    assert json.loads(lab.elements(f"open{family}")[0])["elem"]["val"] == source


def test_a_link_local_source_opens_on_its_interface_alone(lab: Lab, opener: Opener) -> None:
    other = lab.namespace("o")
    lab.link("h1", "o0", other)
    address = "fe80::77"
    for where, interface in ((lab.client, "c0"), (other, "o0")):
        where.ip("addr", "add", f"{address}/64", "dev", interface, "nodad")
    mine = json.loads(lab.host.ip("-j", "addr", "show", "dev", "h0"))[0]
    host = next(one["local"] for one in mine["addr_info"] if one["scope"] == "link")
    opener.start()
    wait_for(
        lambda: knocks_open(lab, f"{address}%c0", f"{host}%c0"), SECONDS, "the knock opens for a link-local address"
    )
    concat = json.loads(lab.elements("open_ll6")[0])["elem"]["val"]["concat"]
    assert concat == ["h0", address]


def test_a_window_is_refreshed(lab: Lab, opener: Opener) -> None:
    opener.gate(open_window=600)
    opener.start()
    source = lab.source()
    wait_until_open(lab, source)

    def expires() -> float:
        return float(json.loads(lab.elements("open4")[0])["elem"]["expires"])

    wait_for(lambda: expires() < 598, SECONDS, "part of the window's time is over")

    def is_refreshed() -> bool:
        lab.knock(source)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: expires() >= 598, 0.5, "a refreshed window")
            return True
        return False

    wait_for(is_refreshed, SECONDS, "the window is refreshed")


def test_the_kernel_closes_what_a_dead_daemon_opened(lab: Lab, opener: Opener) -> None:
    """There is no command that closes, and nothing is left when it dies with windows open."""
    opener.gate(open_window=5)
    opener.start()
    first, second = lab.source(), lab.source(6)
    wait_until_open(lab, first)
    wait_until_open(lab, second)
    daemon = Path(f"/proc/{opener.daemons()['h0']}")
    opener.stop(signal.SIGKILL)
    wait_for(lambda: not daemon.exists(), SECONDS, "the daemon ends with the supervisor")
    wait_for(lambda: lab.count("open4") == 0 and lab.count("open6") == 0, SECONDS, "the kernel closes the windows")
    assert (lab.look(first), lab.look(second)) == ("reset", "reset")


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGABRT, signal.SIGSEGV, signal.SIGSTOP]
)
def test_a_daemon_that_ends_is_started_again(lab: Lab, opener: Opener, how: int) -> None:
    opener.start()
    wait_until_open(lab, lab.source())
    before = opener.daemons()["h0"]
    os.kill(before, how)
    wait_for(lambda: opener.daemons().get("h0", before) != before, SECONDS, "another daemon")
    opener.close()
    wait_until_open(lab, lab.source())
    assert "knockd on h0 ended, " in opener.said()
    assert str(SEQUENCE[0].port) not in opener.said()


def test_an_interface_that_has_no_address_at_first(lab: Lab, opener: Opener) -> None:
    """Not even a link-local one: knockd would start, and be deaf for ever."""
    lab.host.run("sysctl", "-qw", "net.ipv6.conf.h0.addr_gen_mode=1")
    lab.host.ip("addr", "flush", "dev", "h0")
    lab.link("h1", "o0", lab.namespace("o"))
    opener.start()
    # By then it has looked at the other one, too.
    wait_for(lambda: set(opener.daemons()) == {"h1"}, SECONDS, "a daemon where there is an address")
    lab.host.ip("addr", "add", f"{HOST4}/24", "dev", "h0")
    wait_until_open(lab, lab.source())


def test_an_interface_that_changes_its_address(lab: Lab, opener: Opener) -> None:
    opener.start()
    wait_until_open(lab, lab.source())
    lab.host.ip("addr", "del", f"{HOST4}/24", "dev", "h0")
    lab.host.ip("addr", "add", "192.0.2.200/24", "dev", "h0")
    wait_until_open(lab, lab.source(), "192.0.2.200")
    lab.host.ip("addr", "add", "2001:db8::200/48", "dev", "h0", "nodad")
    wait_until_open(lab, lab.source(6), "2001:db8::200")


def test_an_interface_that_vanishes_and_comes_back(lab: Lab, opener: Opener) -> None:
    opener.start()
    wait_until_open(lab, lab.source())
    sources = [lab.source() for _ in range(2)]
    lab.host.ip("link", "del", "h0")
    wait_for(lambda: not opener.daemons(), SECONDS, "no daemon without an interface")
    lab.link("h0", "c0", lab.client)
    lab.host.ip("addr", "add", f"{HOST4}/24", "dev", "h0")
    for source in sources:
        lab.client.ip("addr", "add", f"{source}/24", "dev", "c0")
    wait_until_open(lab, sources[0])
    lab.host.ip("link", "set", "h0", "down")
    lab.host.ip("link", "set", "h0", "up")
    wait_until_open(lab, sources[1])


def test_every_interface_and_no_part_of_one(lab: Lab, opener: Opener) -> None:
    """One that comes later, whatever its name; a bridge, and not what is plugged into it; nothing on the loopback."""
    opener.start()
    wait_until_open(lab, lab.source())
    other = lab.namespace("o")
    lab.link("wan-7", "o0", other)
    lab.host.ip("link", "add", "br0", "type", "bridge")
    lab.host.ip("link", "set", "wan-7", "master", "br0")
    lab.host.ip("link", "set", "br0", "up")
    lab.host.ip("addr", "add", "198.51.100.1/24", "dev", "br0")
    wait_for(lambda: set(opener.daemons()) == {"h0", "br0"}, SECONDS, "a daemon on the bridge")
    lab.host.ip("link", "del", "br0")
    lab.host.ip("addr", "add", "198.51.100.1/24", "dev", "wan-7")
    other.ip("addr", "add", "198.51.100.2/24", "dev", "o0")
    wait_for(lambda: set(opener.daemons()) == {"h0", "wan-7"}, SECONDS, "a daemon on the other interface")
    wait_for(lambda: opens_from(lab, other, "198.51.100.2", "198.51.100.1"), SECONDS, "the knock opens there, too")


def opens_from(lab: Lab, where: Namespace, source: str, host: str) -> bool:
    client, lab.client = lab.client, where
    try:
        return knocks_open(lab, source, host)
    finally:
        lab.client = client


def test_what_does_not_start_is_told_once(lab: Lab, opener: Opener) -> None:
    opener.write("knockd.conf", "[options]\n[door]\nsequence = 48396:junk\n")
    opener.start()
    wait_for(lambda: "exit code 1" in opener.said(), SECONDS, "what became of it")
    opener.write("knockd.conf", f"[options]\n[door]\nsequence = {SEQUENCE[0].port}\ncommand = true\n")
    wait_for(lambda: bool(opener.daemons()), SECONDS, "it is tried again")
    assert opener.said().count("exit code 1") == 1
    assert "48396" not in opener.said()


def test_nothing_of_it_is_left(lab: Lab, opener: Opener) -> None:
    opener.write("extra.conf", "{folder} {interface} {run} {other}\n")
    settings = json.loads((opener.folder / "opener.json").read_text())
    opener.write("opener.json", json.dumps({**settings, "expand": ["extra.conf"]}))
    opener.start()
    wait_until_open(lab, lab.source())
    copies = Path(f"/run/fleet-portknock/opener-{opener.pid}")
    copy = next(copies.glob("*/extra.conf"))
    assert copy.read_text() == f"{opener.folder} h0 {copy.parent} {{other}}\n"
    assert copy.stat().st_mode & 0o777 == 0o600
    assert copies.stat().st_mode & 0o777 == 0o700
    opener.stop(signal.SIGKILL)
    opener.start()
    wait_until_open(lab, lab.source())
    assert not copies.exists()
    copies = Path(f"/run/fleet-portknock/opener-{opener.pid}")
    assert copies.exists()
    opener.stop()
    assert not copies.exists()
