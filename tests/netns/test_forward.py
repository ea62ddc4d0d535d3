# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Row 6: a host that forwards, as one with Docker does: what it publishes is gated by name, the rest is left alone."""

from __future__ import annotations

import pytest
from netlab import CLIENT4, CLIENT6, HOST4, HOST6, PUBLISHED, SEQUENCE, SSH, Lab, network
from scapy.layers.inet import TCP

CONTAINER4, CONTAINER6 = "198.51.100.2", "2001:db8:c::2"
# What Docker writes for `-p 2222:22` and `-p 8080:22`.
DOCKER = f"""
table inet docker {{
  chain pre {{
    type nat hook prerouting priority -100; policy accept;
    fib daddr type local tcp dport {{ {PUBLISHED}, 8080 }} goto published
  }}
  chain published {{
    meta nfproto ipv4 meta l4proto tcp dnat ip to {CONTAINER4}:22
    meta nfproto ipv6 meta l4proto tcp dnat ip6 to [{CONTAINER6}]:22
  }}
}}
"""


def put_container(lab: Lab) -> None:
    """A container behind the host, which forwards."""
    container = lab.namespace("b")
    lab.link("h1", "b0", container)
    for address, net, gateway in ((CONTAINER4, 24, "198.51.100.1"), (CONTAINER6, 64, "2001:db8:c::1")):
        lab.host.ip("addr", "add", f"{gateway}/{net}", "dev", "h1", *(("nodad",) if ":" in gateway else ()))
        container.ip("addr", "add", f"{address}/{net}", "dev", "b0", *(("nodad",) if ":" in gateway else ()))
        family = "-6" if ":" in gateway else "-4"
        container.ip(family, "route", "add", "default", "via", gateway)
        lab.client.ip(family, "route", "add", "default", "via", HOST6 if ":" in gateway else HOST4)
    lab.host.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    lab.serve(SSH, where=container)


@pytest.fixture
def docker(lab: Lab) -> Lab:
    """The host with a container behind it that publishes its ssh port as 2222 and as 8080."""
    put_container(lab)
    lab.host.nft(DOCKER)
    return lab


FAMILIES = [pytest.param(CLIENT4, CONTAINER4, id="ipv4"), pytest.param(CLIENT6, CONTAINER6, id="ipv6")]


@pytest.mark.parametrize(("source", "container"), FAMILIES)
def test_forwarded_traffic_is_left_alone(docker: Lab, source: str, container: str) -> None:
    """To a container's own port 22, to a port that is published and not protected, and out of the container."""
    docker.gate(protected_ports=["22/tcp", f"{PUBLISHED}/tcp"], guard="strict")
    assert docker.look(source, host=container) == "open"
    assert docker.look(source, 8080) == "open"
    assert docker.look(source) == "reset"


@pytest.mark.parametrize(("source", "container"), FAMILIES)
def test_forwarded_packets_are_no_knocks(docker: Lab, source: str, container: str) -> None:
    model = docker.gate(guard="strict")
    docker.touch(source, *SEQUENCE, host=container)
    assert docker.look(source) == "reset"
    docker.touch(source, *SEQUENCE[:2])
    docker.touch(source, type(SEQUENCE[0])(40001, "tcp"), host=container)
    docker.touch(source, SEQUENCE[2])
    assert docker.look(source) == "open"
    assert not model["tripwires"]


@pytest.mark.parametrize("response", ["mimic", "reset", "drop"])
@pytest.mark.parametrize(("source", "container"), FAMILIES)
def test_a_published_port_is_gated_by_name(docker: Lab, source: str, container: str, response: str) -> None:
    docker.gate(protected_ports=["22/tcp", f"{PUBLISHED}/tcp"], closed_response=response)
    closed = "silent" if response == "drop" else "reset"
    assert (docker.look(source, PUBLISHED), docker.look(source)) == (closed, closed)
    docker.knock(source)
    sport = docker.source_port()
    state, session = docker.connect(source, PUBLISHED, sport=sport)
    assert (state, docker.look(source)) == ("open", "open")
    docker.close_windows()
    assert docker.look(source, PUBLISHED) == closed
    session.send(b"hello")
    assert session.recv(100) == b"hello", "the session lives on"
    # Row 8: conntrack knows this flow and where it led, also when its far end has forgotten it.
    for crashed in (False, True):
        if crashed:
            docker.crash(-1)
        docker.wire.drain()
        docker.wire.send(network(source, docker.host_of(source)) / TCP(sport=sport, dport=PUBLISHED, flags="S", seq=1))
        answers = docker.wire.received(0.5, lambda _: False)
        assert not any(TCP in answer and "S" in str(answer[TCP].flags) for answer in answers)


@pytest.mark.parametrize(("source", "container"), FAMILIES)
def test_a_published_port_opens_for_one_connection(docker: Lab, source: str, container: str) -> None:
    docker.gate(protected_ports=["22/tcp", f"{PUBLISHED}/tcp"], single_use=True)
    for _ in range(2):
        docker.knock(source)
        state, session = docker.connect(source, PUBLISHED)
        assert (state, docker.look(source, PUBLISHED), docker.look(source)) == ("open", "reset", "reset")
        session.send(b"hello")
        assert session.recv(100) == b"hello"


def test_a_session_to_a_published_port_older_than_the_gate(docker: Lab) -> None:
    for source in (CLIENT4, CLIENT6):
        _, session = docker.connect(source, PUBLISHED)
        docker.gate(protected_ports=["22/tcp", f"{PUBLISHED}/tcp"])
        session.send(b"hello")
        assert session.recv(100) == b"hello"
        assert docker.look(source, PUBLISHED) == "reset"
        docker.host.nft("delete table inet fleet_portknock")
