# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host with the role's own gate, and a client, in two network namespaces joined by a pair of interfaces.

Everything runs in this process: a socket stays in the namespace in which it was made.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import itertools
import json
import os
import select
import shlex
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import jinja2
from ansible_collections.fleet.portknock.plugins.module_utils._gate import Honoured, build_model, settings_from
from ansible_collections.fleet.portknock.plugins.module_utils._nft import TABLE, read_listing, replace_transaction
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

TEMPLATES = Path(__file__).resolve().parents[2] / "roles/knock_server/templates"
# Another release's nft can be tried: a command that runs it in the network namespace that it is started in.
NFT = shlex.split(os.environ.get("PORTKNOCK_TEST_NFT", "nft"))
PREFIX = f"fpk{os.getpid() % 100000}"
SEED = bytes(range(32))
SEQUENCE = (Knock(48396, "tcp"), Knock(39508, "udp"), Knock(30222, "tcp"))
HOST4, HOST6 = "192.0.2.1", "2001:db8::1"
CLIENT4, CLIENT6 = "192.0.2.2", "2001:db8::2"
SSH, WIREGUARD, PUBLISHED = 22, 51820, 2222
BANNER = b"SSH-2.0-test\r\n"
# How long a test waits before it calls a silence one; everything happens on one machine.
SILENCE = 1.0

_CLONE_NEWNET = 0x40000000
_TCP_REPAIR = 19
_SO_RCVBUFFORCE = 33
_libc = ctypes.CDLL(None, use_errno=True)


def command(*argv: str, given: Optional[str] = None) -> str:
    """Run a command; its error output is the test's failure."""
    done = subprocess.run(argv, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done.stdout


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"Not within {seconds} s: {what}."
        time.sleep(0.01)


class Namespace:
    """One network namespace."""

    def __init__(self, name: str) -> None:
        self.name = f"{PREFIX}-{name}"
        command("ip", "netns", "add", self.name)
        self.ip("link", "set", "lo", "up")

    def ip(self, *arguments: str) -> str:
        said = command("ip", "-n", self.name, *arguments)
        if arguments[:2] == ("addr", "add") and ":" in arguments[2]:
            # The kernel hears whoever asks for a new address a little later: on a busy machine later than the first question.
            address = ipaddress.IPv6Interface(arguments[2]).ip.packed
            group = (b"\xff\x02" + bytes(9) + b"\x01\xff" + address[-3:]).hex()
            wait_for(lambda: group in self.run("cat", "/proc/net/igmp6"), 5, f"{arguments[2]} can be found")
        return said

    def run(self, *argv: str, given: Optional[str] = None) -> str:
        return command("ip", "netns", "exec", self.name, *argv, given=given)

    def nft(self, text: str) -> None:
        self.run(*NFT, "-f", "-", given=text)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """What this thread makes in here belongs to the namespace."""
        with open("/proc/thread-self/ns/net") as here, open(f"/run/netns/{self.name}") as there:
            assert _libc.setns(there.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                _libc.setns(here.fileno(), _CLONE_NEWNET)

    def socket(self, *arguments: int) -> socket.socket:
        with self.inside():
            return socket.socket(*arguments)

    def mac(self, interface: str) -> str:
        return json.loads(self.ip("-j", "link", "show", interface))[0]["address"]

    def address(self, text: str, port: int) -> tuple[Any, ...]:
        """A socket address; a scope's name counts in this namespace."""
        plain, _, interface = text.partition("%")
        if not interface:
            return plain, port
        return plain, port, 0, json.loads(self.ip("-j", "link", "show", interface))[0]["ifindex"]

    def remove(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True, check=False)


class Service:
    """Answers on one port of a namespace: tcp with a banner and then an echo, udp with an echo."""

    def __init__(self, where: Namespace, port: int, proto: str) -> None:
        self._made_with = (where, port, proto)
        self._tcp = proto == "tcp"
        self._socket = where.socket(socket.AF_INET6, socket.SOCK_STREAM if self._tcp else socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("::", port))
        if self._tcp:
            self._socket.listen(1024)
        else:
            # A test may send faster than this answers.
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 23)
        self._sessions: list[socket.socket] = []
        self._wake, self._stopper = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def again(self) -> Service:
        """The same service anew."""
        return Service(*self._made_with)

    def _serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._wake, self._socket, *self._sessions], [], [])
            if self._wake in ready:
                return
            for one in ready:
                with contextlib.suppress(OSError):
                    self._answer(one)

    def _answer(self, one: socket.socket) -> None:
        if one is not self._socket:
            data = b""
            with contextlib.suppress(OSError):
                data = one.recv(4096)
            if data:
                one.sendall(data)
            else:
                self._sessions.remove(one)
                one.close()
        elif self._tcp:
            session, _ = one.accept()
            session.sendall(BANNER)
            self._sessions.append(session)
        else:
            data, peer = one.recvfrom(4096)
            one.sendto(data, peer)

    def forget(self) -> None:
        """End the service and its sessions without a packet, as a crash does: conntrack goes on believing in them."""
        self._end()
        for one in self._sessions:
            one.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
        self._close()

    def stop(self) -> None:
        if self._socket.fileno() >= 0:
            self._end()
            self._close()

    def _end(self) -> None:
        self._stopper.send(b"x")
        self._thread.join()

    def _close(self) -> None:
        for one in (*self._sessions, self._socket, self._wake, self._stopper):
            one.close()


class Wire:
    """Raw frames between the client's end of a pair and the host."""

    def __init__(self, client: Namespace, interface: str, host_mac: str) -> None:
        self._ethernet = Ether(src=client.mac(interface), dst=host_mac)
        with client.inside():
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            self.socket.bind((interface, 0))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)

    def frame(self, packet: Packet) -> bytes:
        return bytes(self._ethernet / packet)

    def send(self, packet: Packet) -> None:
        self.socket.send(self.frame(packet))

    def drain(self) -> None:
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.socket.recv(65536)

    def received(self, seconds: float, enough: Callable[[list[Packet]], bool]) -> list[Packet]:
        """Packets that came from the host, until there are enough or the time is over."""
        packets: list[Packet] = []
        end = time.monotonic() + seconds
        while not enough(packets):
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.socket], [], [], left)[0]:
                break
            data, address = self.socket.recvfrom(65536)
            if address[2] != socket.PACKET_OUTGOING:
                packets.append(Ether(data).payload)
        return packets

    def close(self) -> None:
        self.socket.close()


class Lab:
    """The host, the client and what a test does with them."""

    TEMPLATES = "nftables/{}.nft.j2"

    def __init__(self, client: Optional[Namespace] = None) -> None:
        """:param client: stands outside in place of a namespace of the lab's own, and is removed with it."""
        self.host = Namespace("h")
        self.client = client or Namespace("c")
        self._namespaces = [self.host, self.client]
        self.link("h0", "c0", self.client)
        self.host.ip("addr", "add", f"{HOST4}/24", "dev", "h0")
        self.host.ip("addr", "add", f"{HOST6}/48", "dev", "h0", "nodad")
        self.client.ip("addr", "add", f"{CLIENT4}/24", "dev", "c0")
        self.client.ip("addr", "add", f"{CLIENT6}/48", "dev", "c0", "nodad")
        self.wire = Wire(self.client, "c0", self.host.mac("h0"))
        self._services: list[Service] = []
        self._sockets: list[socket.socket] = []
        # All of them now: an IPv6 address takes a moment until the kernel delivers to it.
        self._fresh = {
            4: [f"192.0.2.{number}" for number in range(10, 50)],
            6: [f"2001:db8:0:{number:x}::2" for number in range(10, 50)],
        }
        lines = [f"addr add {address}/24 dev c0" for address in self._fresh[4]]
        lines += [f"addr add {address}/48 dev c0 nodad" for address in self._fresh[6]]
        command("ip", "-n", self.client.name, "-batch", "-", given="\n".join(lines))
        self._source_port = itertools.count(20000)
        self.text = ""

    def link(self, at_host: str, at_peer: str, peer: Namespace) -> None:
        """Join the host and another namespace."""
        command(
            *("ip", "link", "add", at_host, "netns", self.host.name, "type", "veth"),
            *("peer", "name", at_peer, "netns", peer.name),
        )
        for where, interface in ((self.host, at_host), (peer, at_peer)):
            # No waiting for duplicate addresses: nobody else is on this wire.
            where.run("sysctl", "-qw", f"net.ipv6.conf.{interface}.accept_dad=0")
            where.ip("link", "set", interface, "up")

    def namespace(self, name: str) -> Namespace:
        self._namespaces.append(Namespace(name))
        return self._namespaces[-1]

    def close(self) -> None:
        for one in self._sockets:
            one.close()
        for service in self._services:
            service.stop()
        self.wire.close()
        for where in self._namespaces:
            where.remove()

    # What the host has.

    def serve(self, port: int = SSH, proto: str = "tcp", where: Optional[Namespace] = None) -> Service:
        self._services.append(Service(where or self.host, port, proto))
        return self._services[-1]

    def crash(self, service: int = 0) -> None:
        """Let a service die without a packet, sessions and all, and start again."""
        self._services[service].forget()
        self._services[service] = self._services[service].again()

    def render(
        self,
        sequences: Optional[Mapping[str, Sequence[Sequence[Knock]]]] = None,
        template: str = "gate",
        probe: Optional[Mapping[str, object]] = None,
        avoid: frozenset[int] = frozenset(),
        validity: Optional[Mapping[str, tuple[int, int]]] = None,
        one_time: Optional[Mapping[str, Mapping[int, Sequence[Knock]]]] = None,
        close: Optional[Mapping[str, Sequence[Sequence[Knock]]]] = None,
        opener: str = "kernel",
        **options: object,
    ) -> tuple[str, dict[str, Any]]:
        """The role's template with a real model, and the model.

        :param validity: from when and until when operators may knock, in seconds since 1970.
        :param opener: what watches for knocks.
        """
        settings = settings_from({"protected_ports": ["22/tcp", "51820/udp"], "tripwires": 200, **options})
        operators = {
            name: Honoured(number, several)
            for number, (name, several) in enumerate((sequences or {"default": [SEQUENCE]}).items(), start=1)
        }
        if one_time is not None:
            operators = {
                name: Honoured(number, [], one_time=stock) for number, (name, stock) in enumerate(one_time.items(), 1)
            }
        for name, (begin, end) in (validity or {}).items():
            operators[name] = operators[name]._replace(valid_from=begin, valid_until=end)
        for name, several in (close or {}).items():
            operators[name] = operators[name]._replace(close=several)
        probe = probe or {"socket_wildcard": True, "one_time": True}
        model = build_model(settings, operators, SEED, avoid, probe, opener)
        return self.rendered(self.TEMPLATES.format(template), model), model

    def rendered(self, template: str, model: Mapping[str, Any]) -> str:
        """Any of the role's templates."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES),
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            undefined=jinja2.StrictUndefined,
            autoescape=False,  # noqa: S701
        )
        return environment.get_template(template).render(gate=model)

    def gate(self, **options: Any) -> dict[str, Any]:
        """Load the gate as the module does; returns the model."""
        self.text, model = self.render(**options)
        self.host.nft(replace_transaction(self.text, self.listing()))
        return model

    def listing(self) -> Optional[dict[str, Any]]:
        done = subprocess.run(
            ["ip", "netns", "exec", self.host.name, *NFT, "-j", "list", "table", "inet", TABLE],
            capture_output=True,
            text=True,
            check=False,
        )
        return read_listing(done.stdout) if done.returncode == 0 else None

    def close_windows(self) -> None:
        """End every open window."""
        self.host.nft("".join(f"flush set inet {TABLE} {name}\n" for name in ("open4", "open6", "open_ll6")))

    def elements(self, name: str) -> list[str]:
        """The elements of a set or map, as text without their timeouts."""
        for entry in (self.listing() or {})["nftables"]:
            for kind in ("set", "map"):
                if entry.get(kind, {}).get("name") == name:
                    return [json.dumps(element) for element in entry[kind].get("elem", ())]
        raise AssertionError(f"No set {name}.")

    def count(self, name: str) -> int:
        return len(self.elements(name))

    def policy(self, rules: str, policy: str = "drop") -> None:
        """A firewall of the host's own, as administrators write them."""
        self.host.nft(
            "table inet filter\ndelete table inet filter\n"
            f"table inet filter {{ chain input {{ type filter hook input priority 0; policy {policy};\n{rules}\n}}\n}}\n"
        )

    # What the client does.

    def source(self, family: int = 4) -> str:
        """An address of the client that has not been used yet."""
        return self._fresh[family].pop()

    def host_of(self, source: str) -> str:
        return HOST6 if ":" in source else HOST4

    def source_port(self) -> int:
        return next(self._source_port)

    def dial(self, source: str, proto: str, sport: int = 0) -> socket.socket:
        family = socket.AF_INET6 if ":" in source else socket.AF_INET
        one = self.client.socket(family, socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(self.client.address(source, sport))
        self._sockets.append(one)
        return one

    def touch(self, source: str, *knocks: Knock, host: Optional[str] = None) -> None:
        """One packet to each port, back to back."""
        for knock in knocks:
            one = self.dial(source, knock.proto)
            one.setblocking(False)
            one.connect_ex(self.client.address(host or self.host_of(source), knock.port))
            if knock.proto == "udp":
                with contextlib.suppress(OSError):
                    one.send(b"")
            one.close()

    def knock(self, source: str, host: Optional[str] = None) -> None:
        self.touch(source, *SEQUENCE, host=host)

    def connect(
        self, source: str, port: int = SSH, sport: int = 0, host: Optional[str] = None, seconds: float = SILENCE
    ) -> tuple[str, socket.socket]:
        """Try a TCP connection: open, reset or silent, and its socket."""
        one = self.dial(source, "tcp", sport)
        one.settimeout(seconds)
        try:
            one.connect(self.client.address(host or self.host_of(source), port))
            assert one.recv(100) == BANNER
        except ConnectionRefusedError:
            return "reset", one
        except OSError:
            one.close()
            return "silent", one
        return "open", one

    def look(self, source: str, port: int = SSH, **options: Any) -> str:
        """Try a TCP connection and drop it: open, reset or silent."""
        state, one = self.connect(source, port, **options)
        one.close()
        return state

    def ask(self, source: str, port: int = WIREGUARD, sport: int = 0, host: Optional[str] = None) -> str:
        """Send a datagram: answered, refused or silent."""
        one = self.dial(source, "udp", sport)
        one.settimeout(SILENCE)
        try:
            one.connect(self.client.address(host or self.host_of(source), port))
            one.send(b"hello")
            one.recv(100)
        except ConnectionRefusedError:
            return "refused"
        except OSError:
            return "silent"
        finally:
            one.close()
        return "answered"

    def flood(self, first: int, count: int, port: int, proto: str, sources: str = "10.0.0.0") -> None:
        """Packets to one port from that many spoofed IPv4 sources, as fast as this machine sends them."""
        for frame in self.spoofed(first, count, port, proto, sources):
            self.wire.socket.send(frame)

    def spoofed(self, first: int, count: int, port: int, proto: str, sources: str = "10.0.0.0") -> Iterator[bytes]:
        """The frames of a flood."""
        base = struct.unpack("!I", socket.inet_aton(sources))[0] + first
        layer = TCP(sport=1025, dport=port, flags="S") if proto == "tcp" else UDP(sport=1025, dport=port, chksum=0)
        frame = bytearray(self.wire.frame(IP(src=sources, dst=HOST4, flags=0) / layer))
        header = sum(struct.unpack_from("!10H", frame, 14)) - struct.unpack_from("!H", frame, 24)[0]
        header -= sum(struct.unpack_from("!2H", frame, 26))
        length = len(frame) - 34
        rest = bytes(frame[38:50] if proto == "tcp" else b"")
        for address in range(base, base + count):
            high, low = address >> 16, address & 0xFFFF
            struct.pack_into("!HH", frame, 26, high, low)
            struct.pack_into("!H", frame, 24, fold(header + high + low))
            if proto == "tcp":
                pseudo = high + low + sum(struct.unpack_from("!2H", frame, 30)) + 6 + length
                pseudo += 1025 + port + sum(struct.unpack("!6H", rest))
                struct.pack_into("!H", frame, 50, fold(pseudo))
            yield bytes(frame)


def fold(total: int) -> int:
    """The Internet checksum of words that add up to this."""
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def network(source: str, target: str) -> Packet:
    """The network header between two addresses."""
    return IPv6(src=source, dst=target) if ":" in source else IP(src=source, dst=target)
