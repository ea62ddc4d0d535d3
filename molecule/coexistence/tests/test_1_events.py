# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What other programs do to a host with a gate, one event after the other, while the client looks at the port."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import pytest
from lab import FAMILIES, ROOT, SSH, Fleet, Stretch, wait_until

# Within so many seconds the gate is back by itself; the product promises it.
BACK_WITHIN = 2.0
PUBLISHED = 8080
WATCHER = "fleet-portknock-watch"
NEW_ADDRESSES = "eth0 gets new addresses"
# The end of these, where the fleet's own addresses end in 10 and so on.
NEW = 30


class Event(NamedTuple):
    """Something that happens on a host.

    ``flushes`` says that it takes every table of the kernel away, the gate's among them.
    """

    name: str
    script: str
    flushes: bool = False


NFTABLES = (
    Event("nftables starts", "systemctl start nftables", flushes=True),
    Event("nftables restarts", "systemctl restart nftables", flushes=True),
    Event("nftables reloads", "systemctl reload nftables", flushes=True),
    Event("nftables stops", "systemctl stop nftables", flushes=True),
    Event("nftables starts again", "systemctl start nftables", flushes=True),
    Event("nft -f nftables.conf", "nft -f /etc/nftables.conf", flushes=True),
    Event("nft flush ruleset", "nft flush ruleset", flushes=True),
    Event("nft delete table", "nft delete table inet fleet_portknock", flushes=True),
)
SSHD = (
    Event("sshd restarts", "systemctl restart ssh"),
    Event(
        "ssh by socket activation",
        "systemctl disable --now ssh; systemctl enable --now ssh.socket; systemctl is-active ssh.socket",
    ),
    Event(
        "ssh by itself again",
        "systemctl disable --now ssh.socket; systemctl stop ssh; systemctl enable --now ssh; systemctl is-active ssh",
    ),
)
INTERFACE = (
    Event(
        "eth0 down and up",
        "six=$(ip -6 -o address show dev eth0 scope global | awk '{ print $4; exit }')\n"
        "via4=$(ip -4 route show default | awk '{ print $3 }'); via6=$(ip -6 route show default | awk '{ print $3 }')\n"
        "ip link set eth0 down; ip link set eth0 up; ip address add $six dev eth0 nodad\n"
        "ip route add default via $via4; ip -6 route add default via $via6",
    ),
    Event(
        NEW_ADDRESSES,
        f"ip -o address show dev eth0 scope global | awk '{{ print $4 }}' | sed -E 's/[^.:]+(\\/.*)/{NEW}\\1/'"
        " | while read -r address; do ip address add $address dev eth0; done",
    ),
)
# The container is one of the host's own files: there is nowhere to get an image from.
CONTAINER = """
mkdir -p /tmp/image/usr; for name in bin lib lib64; do ln -s usr/$name /tmp/image/$name; done
tar -C /tmp/image -c . | docker import - own
docker run -d --name web --restart=always -v /usr:/usr:ro -p 8080:80 own python3 -m http.server 80
"""
EVENTS: dict[str, tuple[Event, ...]] = {
    "plain": (*NFTABLES, *SSHD, *INTERFACE, Event("nftables at boot", "systemctl enable nftables")),
    "ufw": (
        *NFTABLES[1:],
        Event("nftables stops for good", "systemctl stop nftables", flushes=True),
        Event("ufw enable", "ufw allow 22/tcp; ufw --force enable"),
        Event("ufw reload", "ufw reload"),
        Event("ufw disable", "ufw --force disable"),
        Event("ufw at boot", "systemctl enable ufw; ufw --force enable"),
    ),
    "firewalld": (
        Event("firewalld starts", "systemctl start firewalld; firewall-cmd --state"),
        Event("firewalld reloads", "firewall-cmd --reload"),
        Event("firewalld reloads whole", "firewall-cmd --complete-reload"),
        Event("firewalld closes a port", "firewall-cmd --add-port 443/tcp; firewall-cmd --remove-port 443/tcp"),
        Event("firewalld restarts", "systemctl restart firewalld; firewall-cmd --state"),
        Event("firewalld stops", "systemctl stop firewalld"),
        Event("firewalld at boot", "systemctl enable --now firewalld; firewall-cmd --state"),
    ),
    "docker": (
        Event(
            "fail2ban starts",
            "systemctl start fail2ban; timeout 20 sh -c 'until fail2ban-client ping; do sleep 0.2; done'",
        ),
        Event(
            "fail2ban bans", "fail2ban-client set sshd banip 203.0.113.5; fail2ban-client set sshd banip 2001:db8::5"
        ),
        Event("fail2ban unbans", "fail2ban-client set sshd unbanip 203.0.113.5"),
        Event("fail2ban stops", "systemctl stop fail2ban"),
        Event("conntrack forgets", "conntrack -F"),
        Event("docker starts", "systemctl start docker; docker info"),
        Event("docker makes a network", "docker network create backstage"),
        Event("docker publishes a port", CONTAINER),
        Event("docker restarts", "systemctl restart docker; docker exec web true"),
        Event("docker stops", "systemctl stop docker.socket docker"),
        Event(
            "both at boot",
            "systemctl enable --now docker containerd fail2ban\n"
            "timeout 20 sh -c 'until fail2ban-client ping && docker exec web true; do sleep 0.2; done'\n"
            "fail2ban-client set sshd banip 203.0.113.6; fail2ban-client set sshd banip 2001:db8::6",
        ),
    ),
    "persistent": (
        *NFTABLES[1:],
        Event("nftables stops for good", "systemctl stop nftables", flushes=True),
        Event(
            "iptables gets rules",
            "for ip in iptables ip6tables; do\n"
            "$ip -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT; $ip -A INPUT -p tcp --dport 22 -j ACCEPT\n"
            "$ip -A INPUT -p tcp --dport 23 -j DROP; done",
        ),
        Event("netfilter-persistent save", "netfilter-persistent save; test -s /etc/iptables/rules.v6"),
        Event(
            "netfilter-persistent flush", "netfilter-persistent flush; ! iptables -C INPUT -p tcp --dport 23 -j DROP"
        ),
        Event(
            "netfilter-persistent reload", "netfilter-persistent reload; ip6tables -C INPUT -p tcp --dport 23 -j DROP"
        ),
        Event("iptables -F", "iptables -F; ip6tables -F; iptables -X; ip6tables -X"),
        Event(
            "iptables-restore",
            "iptables-restore /etc/iptables/rules.v4; ip6tables-restore /etc/iptables/rules.v6\n"
            "iptables -C INPUT -p tcp --dport 23 -j DROP",
        ),
        *SSHD,
        Event("netfilter-persistent at boot", "systemctl enable --now netfilter-persistent"),
    ),
}
ALL = [(host, event.name) for host, events in EVENTS.items() for event in events]
FLUSHING = [(host, event.name) for host, events in EVENTS.items() for event in events if event.flushes]
everything = pytest.mark.parametrize(("host", "event"), ALL)


class Seen(NamedTuple):
    """How an event went: when it began, what the host and the client had to say, and what the journal got."""

    began: float
    error: str
    problems: list[str]
    alerts: str


class Story(NamedTuple):
    """All events, and for each family of each host when the port was open to somebody who had not knocked."""

    seen: dict[tuple[str, str], Seen]
    open: dict[tuple[str, str], list[Stretch]]

    def holes(self, host: str, event: str) -> list[Stretch]:
        """When the port was open between the beginning of an event and that of the next one."""
        began = self.seen[host, event].began
        later = [seen.began for (name, _event), seen in self.seen.items() if name == host and seen.began > began]
        until = min(later, default=float("inf"))
        return [hole for family in FAMILIES for hole in self.open[host, family] if began <= hole.began < until]


def addresses(fleet: Fleet, host: str, event: str) -> list[str]:
    known = [fleet.hosts[host][family] for family in FAMILIES]
    new = [re.sub(r"[^.:]+$", str(NEW), address) for address in known]
    return [*known, *new] if event == NEW_ADDRESSES else known


def ports(host: str, event: str) -> tuple[int, ...]:
    published = host == "docker" and event in ("docker publishes a port", "docker restarts", "both at boot")
    return (SSH, PUBLISHED) if published else (SSH,)


# One flush at a time: how long the gate takes to come back is not to be measured against other hosts' gates.
FLUSH = threading.Lock()


def let_happen(fleet: Fleet, host: str) -> dict[tuple[str, str], Seen]:
    """All events of a host, one after the other."""
    seen = {}
    for event in EVENTS[host]:
        error = ""
        with FLUSH if event.flushes else contextlib.nullcontext():
            began = time.time()
            try:
                fleet.execute(host, event.script)
                if event.flushes:
                    wait_until(partial(fleet.has_gate, host), BACK_WITHIN, "the gate is back")
            except AssertionError as exc:
                error = str(exc)
        problems = fleet.judge(host, *addresses(fleet, host, event.name), ports=ports(host, event.name))
        alerts = fleet.execute(host, f"journalctl -q --no-pager -o cat -p err -u {WATCHER} --since @{began:.3f}")
        seen[host, event.name] = Seen(began, error, problems, alerts)
    return seen


@pytest.fixture(scope="module")
def story(fleet: Fleet) -> Story:
    with fleet.watched("plain") as before:
        time.sleep(0.3)
    # An eye that sees nothing would find no hole later.
    assert all(before.open.values()), before
    run = fleet.play("fleet.portknock.site", ANSIBLE_FORKS="5")
    assert run.status == 0, run.output
    seen: dict[tuple[str, str], Seen] = {}
    with fleet.watched(*EVENTS) as watch, ThreadPoolExecutor(max_workers=len(EVENTS)) as pool:
        for part in pool.map(partial(let_happen, fleet), EVENTS):
            seen.update(part)
    told = Story(seen, watch.open)
    lines = [f"{hole.seconds:.3f} s  {host}: {event}" for host, event in ALL for hole in told.holes(host, event)]
    (ROOT / ".cache" / "logs" / "coexistence-holes.log").write_text("\n".join(lines) + "\n")
    return told


@everything
def test_closed_and_openable_after_it(story: Story, host: str, event: str) -> None:
    assert story.seen[host, event].problems == []


@everything
def test_it_works_beside_the_gate(story: Story, host: str, event: str) -> None:
    assert story.seen[host, event].error == ""


@everything
def test_no_hole_or_a_short_one(story: Story, host: str, event: str) -> None:
    holes = story.holes(host, event)
    if (host, event) not in FLUSHING:
        assert holes == []
    assert [hole for hole in holes if hole.seconds >= BACK_WITHIN] == []


@pytest.mark.parametrize(("host", "event"), FLUSHING)
def test_the_journal_says_so(story: Story, host: str, event: str) -> None:
    assert "The gate was taken away by nft" in story.seen[host, event].alerts
