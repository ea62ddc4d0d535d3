# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``knock_server_input_policy: drop``: reached is what is open, what the gate opens, and what no host can do without."""

from __future__ import annotations

import json
import socket
import subprocess
from typing import Any

import pytest
from netlab import CLIENT4, CLIENT6, HOST4, HOST6, SSH, WIREGUARD, Lab, network, wait_for
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, ICMPv6PacketTooBig, IPv6
from scapy.packet import Packet
from test_look import CLOSED, FLAGS, _shows

FAMILIES = (4, 6)
CLIENTS = {4: CLIENT4, 6: CLIENT6}
OPEN, OPEN_UDP, SHUT, SHUT_UDP = 8080, 8125, 9100, 9125
# The first has a socket match that tells listeners from sessions, as nft 0.9.8 hasn't.
PROBES = [{"socket_wildcard": True}, {"socket_wildcard": False}]


def serve_more(lab: Lab) -> None:
    """Services of both protocols on ports that are to stay open, and on others."""
    for port, proto in ((OPEN, "tcp"), (SHUT, "tcp"), (OPEN_UDP, "udp"), (SHUT_UDP, "udp")):
        lab.serve(port, proto)


@pytest.fixture
def served(lab: Lab) -> Lab:
    serve_more(lab)
    return lab


def close(lab: Lab, **options: Any) -> dict[str, Any]:
    return lab.gate(input_policy="drop", **{"open_ports": [f"{OPEN}/tcp", f"{OPEN_UDP}/udp"], **options})


@pytest.mark.parametrize("probe", PROBES, ids=["socket", "no socket"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_open_is_all_that_is(served: Lab, family: int, probe: dict[str, object]) -> None:
    close(served, probe=probe)
    source = served.source(family)
    assert (served.look(source, OPEN), served.ask(source, OPEN_UDP)) == ("open", "answered")
    for port in (SHUT, SSH, CLOSED):
        assert served.look(source, port) == "silent", port
    for port in (SHUT_UDP, WIREGUARD, CLOSED):
        assert served.ask(source, port) == "silent", port
    served.knock(source)
    assert (served.look(source), served.ask(source), served.look(source, SHUT)) == ("open", "answered", "silent")
    assert served.look(served.source(family)) == "silent"


@pytest.mark.parametrize("family", FAMILIES)
def test_with_nothing_open(served: Lab, family: int) -> None:
    close(served, open_ports=[])
    source = served.source(family)
    served.knock(source)
    assert (served.look(source), served.look(source, OPEN), served.ask(source, OPEN_UDP)) == (
        "open",
        "silent",
        "silent",
    )


def neighbours(lab: Lab) -> None:
    """Nobody knows where anybody is any more."""
    for where in (lab.host, lab.client):
        where.ip("neigh", "flush", "all")
        assert not [entry for entry in json.loads(where.ip("-j", "neigh", "show")) if "lladdr" in entry]


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_are_found(served: Lab, family: int) -> None:
    """By whoever asks first: the client that comes in, and the host that goes out."""
    close(served)
    source = served.source(family)
    neighbours(served)
    assert served.look(source, OPEN) == "open"
    served.serve(7000, where=served.client)
    neighbours(served)
    with served.host.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_STREAM) as out:
        out.settimeout(3)
        out.connect((CLIENTS[family], 7000))


@pytest.mark.parametrize("probe", PROBES, ids=["socket", "no socket"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_load_cuts_no_session(served: Lab, family: int, probe: dict[str, object]) -> None:
    """Conntrack has seen nothing of them, and there is no word of theirs between the load and the next packet."""
    source = served.source(family)
    served.serve(7000, where=served.client)
    sessions = [served.connect(source, port)[1] for port in (SHUT, SSH, OPEN)]
    with served.host.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_STREAM) as out:
        out.settimeout(3)
        out.connect((CLIENTS[family], 7000))
        assert out.recv(100)
        close(served, probe=probe)
        for session in sessions:
            session.send(b"hello")
            assert session.recv(100) == b"hello"
        (far,) = served._services[-1]._sessions
        far.sendall(b"from outside first")
        assert out.recv(100) == b"from outside first"
        out.sendall(b"and back")
        assert out.recv(100) == b"and back"
    assert served.look(source, SHUT) == "silent"


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_to_datagrams_come_in(served: Lab, family: int) -> None:
    served.serve(7001, "udp", where=served.client)
    # So that the answer comes from the address that was asked.
    served.client.ip("route", "replace", served.host_of(CLIENTS[family]), "dev", "c0", "src", CLIENTS[family])
    close(served)
    with served.host.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.settimeout(3)
        out.sendto(b"hello", (CLIENTS[family], 7001))
        assert out.recv(100) == b"hello"


@pytest.mark.parametrize("family", FAMILIES)
def test_pings_are_answered(served: Lab, family: int) -> None:
    close(served)
    source = CLIENTS[family]
    request, reply = (ICMP(id=7), ICMP) if family == 4 else (ICMPv6EchoRequest(id=7), ICMPv6EchoReply)
    served.wire.drain()
    served.wire.send(network(source, served.host_of(source)) / request / b"payload")
    assert any(reply in one for one in served.wire.received(3, lambda packets: any(reply in one for one in packets)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_path_tells_its_mtu(served: Lab, family: int) -> None:
    """Without which a connection hangs at its first large packet; of a flow, too, that conntrack knows nothing of."""
    close(served)
    source, far = CLIENTS[family], served.source(family)
    host = served.host_of(source)
    inner = network(host, far) / UDP(sport=OPEN_UDP, dport=7000) / (b"x" * 64)
    if family == 4:
        told: Packet = IP(src=source, dst=host) / ICMP(type=3, code=4, nexthopmtu=1300) / inner
    else:
        told = IPv6(src=source, dst=host) / ICMPv6PacketTooBig(mtu=1300) / inner
    served.wire.send(told)
    wait_for(
        lambda: "mtu 1300" in served.host.ip(f"-{family}", "route", "get", far), 3, "the host knows the path's MTU"
    )


def received(lab: Lab, family: int, port: int, packet: Packet) -> bool:
    """Whether a datagram gets to a program of the host's that waits on a port."""
    with lab.host.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind(("::" if family == 6 else "0.0.0.0", port))
        client.settimeout(0.5)
        lab.wire.send(packet)
        try:
            return bool(client.recv(100))
        except TimeoutError:
            return False


def test_dhcp_answers_come_in(served: Lab) -> None:
    close(served)
    served.host.ip("addr", "add", "fe80::1/64", "dev", "h0", "nodad")

    def dhcp4(sport: int, dport: int = 68) -> Packet:
        return IP(src="192.0.2.99", dst=HOST4) / UDP(sport=sport, dport=dport) / b"offer"

    def dhcp6(source: str, sport: int) -> Packet:
        return IPv6(src=source, dst="fe80::1") / UDP(sport=sport, dport=546) / b"reply"

    assert [received(served, 4, 68, dhcp4(sport)) for sport in (67, 1067)] == [True, False]
    assert not received(served, 4, 67, dhcp4(67, 67))
    cases = (("fe80::99", 547), ("fe80::99", 1547), ("2001:db8::99", 547))
    assert [received(served, 6, 546, dhcp6(*case)) for case in cases] == [True, False, False]


@pytest.mark.parametrize("probe", PROBES, ids=["socket", "no socket"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_protected_port_looks_like_every_closed_one(lab: Lab, family: int, probe: dict[str, object]) -> None:
    """For whatever a scanner sends, also from the port of a session that has been: silence, or on a host whose nft can't tell
    listeners from sessions the same answer from each port."""
    lab.serve(443)
    close(lab, open_ports=["443/tcp"], probe=probe)
    source = CLIENTS[family]
    lab.client.ip("route", "replace", lab.host_of(source), "dev", "c0", "src", source)
    host, used = lab.host_of(source), lab.source_port()
    lab.knock(source)
    assert lab.look(source, sport=used) == "open"
    lab.host.nft("flush set inet fleet_portknock open4; flush set inet fleet_portknock open6;")
    wait_for(lambda: not lab.host.run("ss", "-Htn"), 3, "the session has ended on the host, too")
    differences, answered = [], set()
    for flags in FLAGS:
        for sport in (lab.source_port(), used):
            header: dict[str, Any] = {"sport": sport, "flags": flags, "seq": 1000, "ack": 2000, "window": 1024}
            shown = [
                _shows(lab, source, port, network(source, host) / TCP(dport=port, **header))
                for port in (SSH, CLOSED, 81)
            ]
            if sport != used and shown[0] != shown[1]:
                differences.append((flags, shown))
            if sport == used and flags == "S" and shown[0]:
                differences.append((flags, shown))
            if shown[1] or shown[2]:
                answered.add(flags)
    for payload in (b"", b"x" * 64):
        for port in (WIREGUARD, CLOSED):
            packet = network(source, host) / UDP(sport=lab.source_port(), dport=port) / payload
            if _shows(lab, source, port, packet):
                differences.append((f"udp {port}", []))
    assert not differences
    if probe["socket_wildcard"]:
        assert not answered


def test_it_is_beside_what_others_say(served: Lab) -> None:
    """Who accepts a port opens none, who refuses one closes it, and answers in its own words as before."""
    served.policy(f"tcp dport {OPEN} reject with tcp reset\n tcp dport {SHUT} accept", policy="accept")
    close(served)
    for family in FAMILIES:
        source = served.source(family)
        assert (served.look(source, OPEN), served.look(source, SHUT)) == ("reset", "silent")
    before = served.host.run("nft", "list", "table", "inet", "filter")
    close(served, open_ports=[])
    served.host.nft("delete table inet fleet_portknock")
    assert served.host.run("nft", "list", "table", "inet", "filter") == before
    assert served.look(served.source(), SHUT) == "open"


def test_a_refusing_host_goes_on_refusing(served: Lab) -> None:
    """The look is what the host shows: where its own filter refuses, so does the protected port."""
    served.policy(
        "meta l4proto tcp tcp flags & (fin|syn|rst|ack) == syn tcp dport != 22 reject with tcp reset", "accept"
    )
    close(served)
    for family in FAMILIES:
        source = served.source(family)
        assert [served.look(source, port) for port in (SSH, CLOSED)] == ["reset"] * 2


def test_an_open_port_that_is_led_elsewhere(served: Lab) -> None:
    served.host.nft(
        "table inet moved { chain pre { type nat hook prerouting priority -100;\n"
        f"tcp dport {OPEN} redirect to :{SHUT}\n udp dport {OPEN_UDP} redirect to :{SHUT_UDP}\n"
        f"tcp dport 8443 redirect to :{SHUT}\n}}\n}}\n"
    )
    close(served)
    for family in FAMILIES:
        source = served.source(family)
        assert (served.look(source, OPEN), served.ask(source, OPEN_UDP)) == ("open", "answered")
        assert (served.look(source, 8443), served.look(source, SHUT)) == ("silent", "silent")


def test_trusted_sources_need_no_knock_and_get_no_more(served: Lab) -> None:
    close(served, trusted_sources=["192.0.2.0/24", "2001:db8::/32"])
    for family in FAMILIES:
        source = served.source(family)
        assert (served.look(source), served.look(source, OPEN), served.look(source, SHUT)) == ("open", "open", "silent")


def test_the_host_reaches_itself(served: Lab) -> None:
    close(served, open_ports=[])
    for family, host in ((socket.AF_INET, HOST4), (socket.AF_INET6, HOST6), (socket.AF_INET6, "::1")):
        with served.host.socket(family, socket.SOCK_STREAM) as one:
            one.settimeout(2)
            one.connect((host, SHUT))


def test_on_and_off_and_other_ports(served: Lab) -> None:
    """One transaction each: open windows stay, and so do sessions."""
    served.gate(open_window=600)
    source = served.source()
    served.knock(source)
    _, session = served.connect(source, SHUT)
    for options, expected in (
        ({"input_policy": "drop", "open_ports": []}, "silent"),
        ({"input_policy": "drop", "open_ports": [f"{SHUT}/tcp"]}, "open"),
        ({"input_policy": "drop", "single_use": True, "open_ports": []}, "silent"),
        ({"input_policy": "accept", "open_ports": [f"{OPEN}/tcp"]}, "open"),
    ):
        served.gate(**{"open_window": 600, **options})
        assert served.look(source, SHUT) == expected, options
        session.send(b"hello")
        assert session.recv(100) == b"hello"
        assert served.look(source) == "open"
        served.knock(source)
    assert "served" not in served.text


def test_no_tripwire_and_no_stand_in_is_an_open_port(lab: Lab) -> None:
    _, plain = lab.render()
    taken = [plain["tripwires"][0], plain["look_tcp"][0]["stand_in"]]
    _, model = lab.render(input_policy="drop", open_ports=[f"{port}/tcp" for port in taken])
    assert not {*model["tripwires"], *(pair["stand_in"] for pair in model["look_tcp"])} & set(taken)


@pytest.mark.parametrize("ports", [[], [f"{OPEN}/tcp"]], ids=["none open", "one open"])
def test_where_the_gate_does_not_load(served: Lab, ports: list[str]) -> None:
    """What boot loads instead closes what it can without connection tracking."""
    text, _ = served.render(template="closed", input_policy="drop", open_ports=ports)
    _, session = served.connect(served.source(), SHUT)
    served.host.nft(text)
    for family in FAMILIES:
        source = served.source(family)
        assert (served.look(source), served.look(source, SHUT)) == ("silent", "silent")
        assert served.look(source, OPEN) == ("open" if ports else "silent")
    session.send(b"hello")
    assert session.recv(100) == b"hello"
    done = subprocess.run(
        ["ip", "netns", "exec", served.host.name, "conntrack", "-C"], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() in ("0", "")
