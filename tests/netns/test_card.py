# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The commands of an operator's card, as they stand on it, from a client container against the role's own gate.

The gate is ``strict``: a packet to any port that is not the next knock closes it again. Without the tools of the client's image
there is nothing to try.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._card import CardHost, card_files
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from netlab import HOST4, HOST6, PREFIX, Lab, Namespace, command, wait_for

IMAGE = "portknock-test:client"
SSHD = "/usr/sbin/sshd"
TCP = (Knock(48396, "tcp"), Knock(39508, "tcp"), Knock(30222, "tcp"), Knock(52111, "tcp"))
MIXED = (Knock(57203, "tcp"), Knock(41871, "udp"), Knock(61009, "udp"), Knock(33217, "tcp"))
NAME = "gate.example"
HOSTS = {4: HOST4, 6: HOST6}
NETWORKS = {4: "192.0.2.0/24", 6: "2001:db8::/48"}
# On the port of the card a real sshd listens, on 22 the lab's own service.
PORT = 2222
JUMP, BEHIND, JUMP_OF_HOST = "203.0.113.2", "198.51.100.1", "198.51.100.2"
KNOCK, NC, BASH = "knock (Debian: package knockd)", "nc (Debian: package netcat-openbsd)", "bash, without any package"
BROWSER, THEN, TO_JUMP = "A web browser's address line", "Then", "First, to the jump host"
EVERYTHING = {
    *(("tcp", tool) for tool in (KNOCK, "nmap", NC, BASH, "curl", BROWSER)),
    *(("mixed", tool) for tool in (KNOCK, "nmap", NC, BASH, "curl")),
}
# What nothing on the client can run; the phone has a code instead of a command.
UNTRIED = ("PowerShell",)
# How a closed port looks from outside, by the host's own firewall.
FIREWALLS = {
    "reset": ("", "accept"),
    "silent": (f"meta l4proto ipv6-icmp accept\ntcp dport {{ 22, {PORT} }} accept", "drop"),
}
PATIENCE = 60.0
# More would keep each other waiting for a processor.
AT_ONCE = 6
# Where a knock must not go, on the gate's own host: it would reset the sequence.
PROXY = f"http://{HOST4}:9"


class Client(Namespace):
    """A client container of the fleet's image; its network is this lab's."""

    def __init__(self, name: str) -> None:
        self.name = f"{PREFIX}-{name}"
        self.container = f"portknock-{self.name}"
        command(
            *(
                "docker",
                "run",
                "-d",
                "--rm",
                "--init",
                "--name",
                self.container,
                "--label",
                "fleet.portknock.fleet=card",
            ),
            *("--network", "none", "--cap-add", "NET_ADMIN", "--cap-add", "NET_RAW"),
            *("--add-host", f"{NAME}:{HOST4}", "--add-host", f"{NAME}:{HOST6}", IMAGE),
        )
        command(
            "ip",
            "netns",
            "attach",
            self.name,
            command("docker", "inspect", "-f", "{{.State.Pid}}", self.container).strip(),
        )
        self.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=0", "net.ipv6.conf.default.disable_ipv6=0")
        self.ip("link", "set", "lo", "up")

    def shell(self, line: str, user: int, given: str = "") -> subprocess.CompletedProcess[str]:
        """What a person types who has a proxy for the web."""
        home = "/tmp" if user else "/root"
        environment = ("-e", f"HOME={home}", "-e", f"http_proxy={PROXY}")
        return subprocess.run(
            ["docker", "exec", "-i", "-u", str(user), *environment, self.container, "bash", "-c", line],
            input=given,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def remove(self) -> None:
        subprocess.run(["docker", "rm", "-f", self.container], capture_output=True, check=False)
        super().remove()


class Outside:
    """The gated host, and people at the client who knock on it at the same time, each from addresses of their own."""

    def __init__(self, client: Client, lab: Lab) -> None:
        self.client, self.lab = client, lab
        self._users = 2000

    def person(self, families: Collection[int], root: bool = False) -> tuple[int, dict[int, str]]:
        """A user of the client's, and the addresses that only they have, by family.

        Their routes say where their packets come from, for no command of the card does.
        """
        sources = {family: self.lab.source(family) for family in families}
        self._users += not root
        user = 0 if root else self._users
        for family, source in sources.items():
            table = str(user) if user else "main"
            if user:
                self.client.ip(f"-{family}", "rule", "add", "uidrange", f"{user}-{user}", "lookup", table)
            # Ahead of the route that came with the interface.
            metric = ("metric", "1") if family == 6 else ()
            route = ("route", "replace", NETWORKS[family], "dev", "c0", "src", source, "table", table, *metric)
            self.client.ip(f"-{family}", *route)
        return user, sources


def on_card(text: str) -> dict[str, dict[str, list[str]]]:
    """The commands on a card as they are printed, by host and by the heading of the tool."""
    found: dict[str, dict[str, list[str]]] = {}
    for heading, body in re.findall(r"^(\S+): .*\n-+\n((?:.*\n)*?)(?=\n\n|\Z)", text, re.MULTILINE):
        ways = re.findall(r"^\* (.*)\n((?:  .*\n)*)", body, re.MULTILINE)
        found[heading] = {tool: re.findall("^    (.*)$", lines, re.MULTILINE) for tool, lines in ways}
    return found


def card(*hosts: CardHost) -> dict[str, dict[str, list[str]]]:
    return on_card(card_files("alice", hosts)["card.txt"].decode())


def typed(tool: str, lines: list[str]) -> str:
    """What is entered in the client container for one way to knock."""
    if tool != BROWSER:
        return "\n".join(lines)
    # A person goes on to the next address without waiting for a page.
    return "\n".join(f"timeout 1 w3m -no-proxy -dump {line} </dev/null" for line in lines)


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    if not shutil.which("docker") or not Path(SSHD).exists():
        pytest.skip(f"needs docker and {SSHD}")
    if subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True, check=False).returncode:
        pytest.skip(f"needs the image {IMAGE}")
    client = Client("k")
    lab = Lab(client)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        lab.serve()
        lab.gate(sequences={"alice": [TCP], "bob": [MIXED]}, guard="strict", protected_ports=["22/tcp", f"{PORT}/tcp"])
        folder = tmp_path_factory.mktemp("sshd")
        jump = lab.namespace("j")
        lab.link("h1", "j1", jump)
        lab.host.ip("addr", "add", f"{BEHIND}/24", "dev", "h1")
        jump.ip("addr", "add", f"{JUMP_OF_HOST}/24", "dev", "j1")
        command(
            "ip", "link", "add", "j0", "netns", jump.name, "type", "veth", "peer", "name", "c1", "netns", client.name
        )
        for where, interface, address in ((jump, "j0", JUMP), (client, "c1", "203.0.113.1")):
            where.ip("addr", "add", f"{address}/24", "dev", interface)
            where.ip("link", "set", interface, "up")
        daemons += [sshd(folder, lab.host, PORT), sshd(folder, jump, 22)]
        settings = "Host *\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nBatchMode yes\nConnectTimeout 5\n"
        place = "umask 077; mkdir -p /root/.ssh; cat >/root/.ssh/"
        client.shell(f"{place}id_ed25519", 0, (folder / "key").read_text())
        client.shell(f"{place}config", 0, settings)
        client.shell("cat >/tmp/.curlrc", 0, f"proxy = {PROXY}\n")
        yield Outside(client, lab)
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait()
        lab.close()


def sshd(folder: Path, where: Namespace, port: int) -> subprocess.Popen[bytes]:
    """Root gets in by the key in the folder."""
    Path("/run/sshd").mkdir(exist_ok=True)
    if not (folder / "key").exists():
        for name in ("key", "host_key"):
            command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{folder}/{name}")
    settings = folder / f"{port}.conf"
    settings.write_text(
        f"Port {port}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/key.pub\nStrictModes no\nUsePAM no\n"
        # What root's own shell does at its start is not what is tried here.
        f"PermitRootLogin yes\nPidFile none\nSetEnv HOME={folder}\n"
    )
    daemon = subprocess.Popen(["ip", "netns", "exec", where.name, SSHD, "-D", "-f", str(settings)])
    wait_for(lambda: f":{port}" in where.run("ss", "-Hltn"), 20, f"sshd listens on port {port}")
    return daemon


def tried(outside: Outside, family: int, tool: str, lines: list[str], root: bool) -> str:
    """What one way to knock did to the port: ``closed, open``."""
    user, sources = outside.person([family], root)
    before = outside.lab.look(sources[family])
    outside.client.shell(typed(tool, lines), user)
    return f"{before}, {outside.lab.look(sources[family])}"


@pytest.mark.parametrize("closed", FIREWALLS)
@pytest.mark.parametrize("family", HOSTS)
def test_every_command_opens(outside: Outside, family: int, closed: str) -> None:
    outside.lab.policy(*FIREWALLS[closed])
    hosts = [CardHost(name, HOSTS[family], 22, [knocks]) for name, knocks in (("tcp", TCP), ("mixed", MIXED))]
    ways = {
        (name, tool): lines
        for name, tools in card(*hosts).items()
        for tool, lines in tools.items()
        if lines and tool not in (*UNTRIED, THEN)
    }
    assert set(ways) == EVERYTHING
    stranger = outside.lab.source(family)
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        seen = {
            # Only root can have nmap send datagrams.
            way: pool.submit(tried, outside, family, way[1], lines, way == ("mixed", "nmap"))
            for way, lines in ways.items()
        }
    assert {way: done.result() for way, done in seen.items()} == dict.fromkeys(EVERYTHING, f"{closed}, open")
    assert outside.lab.look(stranger) == closed


def test_by_name(outside: Outside) -> None:
    """Of a host with addresses of both families a tool opens those that the card says."""
    outside.lab.policy(*FIREWALLS["reset"])
    opened = {}
    for tool, lines in card(CardHost("tcp", NAME, 22, [TCP]))["tcp"].items():
        if lines and tool not in (*UNTRIED, THEN):
            user, sources = outside.person(HOSTS)
            outside.client.shell(typed(tool, lines), user)
            opened[tool] = {family for family in HOSTS if outside.lab.look(sources[family]) == "open"}
    assert opened.pop("nmap") == {4}
    # What ssh tries first.
    assert [tool for tool, families in opened.items() if 6 not in families] == []
    assert len(opened) == 5


@pytest.mark.parametrize("hostname", [HOST4, HOST6, NAME])
def test_ssh(outside: Outside, hostname: str) -> None:
    outside.lab.policy(*FIREWALLS["reset"])
    outside.person(HOSTS, root=True)
    commands = card(CardHost("web", hostname, PORT, [TCP], user="root"))["web"]
    (line,) = commands[THEN]
    assert "Connection refused" in outside.client.shell(f"{line} echo arrived", 0).stderr
    outside.client.shell(typed(KNOCK, commands[KNOCK]), 0)
    assert outside.client.shell(f"{line} echo arrived", 0).stdout == "arrived\n"


def test_behind_a_jump_host(outside: Outside) -> None:
    """The host can be reached from its jump host only; the knock is typed there."""
    outside.lab.policy(*FIREWALLS["reset"])
    commands = card(CardHost("inner", BEHIND, PORT, [MIXED], f"root@{JUMP}", "root"))["inner"]
    (log_in,), (line,) = commands[TO_JUMP], commands["Then, on your own machine"]
    assert outside.client.shell(f"{line} echo arrived", 0).stdout == ""
    there = typed(BASH, commands[BASH])
    knocked = outside.client.shell(f"{log_in} {shlex.quote(there)}", 0)
    assert knocked.returncode == 0, knocked.stderr
    assert outside.client.shell(f"{line} echo arrived", 0).stdout == "arrived\n"
