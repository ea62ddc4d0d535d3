# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._procnet import (
    Peer,
    Session,
    global_ipv6_addresses,
    ports_in_use,
    reachable_ports,
    ssh_peer,
    ssh_session,
    tcp_listeners,
    tcp_sessions,
)


def test_sockets_that_wait_are_in_use_and_connected_ones_are_not() -> None:
    with socket.socket() as listener, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as bound:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        bound.bind(("::1", 0))
        with socket.create_connection(listener.getsockname()) as client:
            in_use = ports_in_use()
            assert Knock(listener.getsockname()[1], "tcp") in in_use
            assert Knock(bound.getsockname()[1], "udp") in in_use
            assert Knock(client.getsockname()[1], "tcp") not in in_use


@pytest.mark.parametrize(
    ("family", "address", "expected"),
    [
        (socket.AF_INET, "0.0.0.0", ["inet"]),
        (socket.AF_INET, "127.0.0.1", []),
        (socket.AF_INET6, "::", ["inet", "inet6"]),
        (socket.AF_INET6, "::1", []),
        (socket.AF_INET6, "::ffff:127.0.0.1", []),
    ],
)
def test_listeners_that_can_be_reached(family: int, address: str, expected: list[str]) -> None:
    with socket.socket(family) as listener:
        listener.bind((address, 0))
        listener.listen()
        found = tcp_listeners()
        assert [name for name in found if listener.getsockname()[1] in found[name]] == expected


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_sessions_with_a_service(family: int, address: str) -> None:
    with socket.socket(family) as listener:
        listener.bind((address, 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert tcp_sessions({port}) == []
        with socket.create_connection((address, port)) as client:
            served, _ = listener.accept()
            with served:
                assert tcp_sessions({port}) == [Session(port, address, client.getsockname()[1])]
                assert tcp_sessions({client.getsockname()[1]}) == [Session(client.getsockname()[1], address, port)]
                assert tcp_sessions(set()) == []


def test_a_session_with_a_service_for_both_families_has_its_own_address() -> None:
    with socket.socket(socket.AF_INET6) as listener:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            assert tcp_sessions({port}) == [Session(port, "127.0.0.1", client.getsockname()[1])]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("192.0.2.7 40000 192.0.2.1 22", Session(22, "192.0.2.7", 40000)),
        ("fe80::7%eth0 40000 fe80::1%eth0 22", Session(22, "fe80::7", 40000)),
        ("nonsense 40000 192.0.2.1 22", None),
        ("192.0.2.7 x 192.0.2.1 22", None),
    ],
)
def test_the_ssh_session_of_a_process(value: str, expected: Session | None) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={"SSH_CONNECTION": value}
    ) as process:
        try:
            while f"SSH_CONNECTION={value}".encode() not in Path(f"/proc/{process.pid}/environ").read_bytes():
                pass
            assert ssh_session(process.pid) == expected
        finally:
            process.communicate(b"\n")


def test_a_host_without_ipv6_has_no_such_table(tmp_path: Path) -> None:
    assert global_ipv6_addresses(str(tmp_path)) == []
    assert ports_in_use(str(tmp_path)) == []


def test_only_global_addresses_count(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net/if_inet6").write_text(
        "00000000000000000000000000000001 01 80 10 80       lo\n"
        "20010db8000000000000000000000007 02 40 00 80     eth0\n"
        "fe800000000000000242acfffe1f4d02 02 40 20 80     eth0\n"
    )
    assert global_ipv6_addresses(str(tmp_path)) == ["2001:db8::7"]


def _peer_seen_by_a_grandchild(connection: str) -> str:
    """As with sudo: the process itself has lost the variable, an ancestor has it."""
    look = (
        "import os; from ansible_collections.fleet.portknock.plugins.module_utils._procnet import ssh_peer; "
        "print(ssh_peer(os.getpid()))"
    )
    inner = f"env -u SSH_CONNECTION {sys.executable} -c '{look}'; true"
    environment = {**os.environ, "SSH_CONNECTION": connection, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["sh", "-c", inner], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_peer_is_found_in_an_ancestor() -> None:
    assert _peer_seen_by_a_grandchild("192.0.2.9 50000 192.0.2.7 22") == str(Peer("192.0.2.9", None))


def test_link_local_peer_has_its_interface() -> None:
    assert _peer_seen_by_a_grandchild("fe80::1%eth0 50000 fe80::2%eth0 22") == str(Peer("fe80::1", "eth0"))


def test_peer_that_is_no_address_is_none() -> None:
    assert _peer_seen_by_a_grandchild("UNKNOWN 65535 UNKNOWN 65535") == "None"


def test_no_peer_without_ssh(tmp_path: Path) -> None:
    assert ssh_peer(1) is None
    assert ssh_peer(4, str(tmp_path)) is None


def test_datagrams_that_can_be_sent_from_outside() -> None:
    """Not those to a loopback address, and none of a socket that is connected: it takes answers only."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(3)]
        sockets[0].bind(("0.0.0.0", 0))
        sockets[1].bind(("127.0.0.1", 0))
        sockets[2].bind(("0.0.0.0", 0))
        sockets[2].connect(("127.0.0.1", 9))
        both = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        both.bind(("::", 0))
        listener = stack.enter_context(socket.create_server(("0.0.0.0", 0)))
        found = reachable_ports()
        ports = [Knock(one.getsockname()[1], "udp") for one in (*sockets, both)]
        assert [port in found for port in ports] == [True, False, False, True]
        assert Knock(listener.getsockname()[1], "tcp") in found
