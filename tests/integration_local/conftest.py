# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A closed host in a network namespace: a real sshd behind a real nftables gate.

Needs root, ip, nft and sshd, and touches nothing outside of its own namespace and folder::

    PYTHONPATH=.cache python -m pytest tests/integration_local
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ansible.parsing.vault import VaultSecret
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import HostSecrets, Operator, StoredSequence
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.plugin_utils._keyring import Keyring, RunVault

ROOT = Path(__file__).parents[2]
PORT = 22
CLIENT4, SERVER4, ABSENT4 = "198.18.77.1", "198.18.77.2", "198.18.77.3"
CLIENT6, SERVER6 = "fd5a:77::1", "fd5a:77::2"
RIGHT = (Knock(48396, "tcp"), Knock(31207, "udp"), Knock(57011, "tcp"))
STALE = (Knock(41873, "tcp"), Knock(60291, "tcp"), Knock(33877, "udp"))
RETIRED = (Knock(28461, "tcp"), Knock(44119, "tcp"), Knock(52263, "udp"))
VAULT_PASSWORD = "correct horse"
# Everything by which a port of a sequence could show. Digits within a time, a checksum or a temporary folder's name
# (ansible-tmp-TIME-PID-NUMBER) are none.
SECRETS = re.compile(
    rf"(?<![\w.-])(?:{'|'.join(str(knock.port) for knock in (*RIGHT, *STALE, *RETIRED))})(?![\w-]|\.\d)"
)

GATE = """
table inet gate {{
  set one4 {{ type ipv4_addr; flags dynamic,timeout; timeout 5s; size 1024; }}
  set two4 {{ type ipv4_addr; flags dynamic,timeout; timeout 5s; size 1024; }}
  set open4 {{ type ipv4_addr; flags dynamic,timeout; timeout 30s; size 1024; }}
  set one6 {{ type ipv6_addr; flags dynamic,timeout; timeout 5s; size 1024; }}
  set two6 {{ type ipv6_addr; flags dynamic,timeout; timeout 5s; size 1024; }}
  set open6 {{ type ipv6_addr; flags dynamic,timeout; timeout 30s; size 1024; }}
  counter knocks {{ }}
  counter connections {{ }}
  counter stale {{ }}
  chain input {{
    type filter hook input priority 0; policy accept;
    {extra}
    tcp dport {one} tcp flags & (syn | ack) == syn counter name knocks
    ip saddr @two4 tcp dport {three} update @open4 {{ ip saddr }}
    ip saddr @one4 udp dport {two} update @two4 {{ ip saddr }}
    meta nfproto ipv4 tcp dport {one} update @one4 {{ ip saddr }}
    ip6 saddr @two6 tcp dport {three} update @open6 {{ ip6 saddr }}
    ip6 saddr @one6 udp dport {two} update @two6 {{ ip6 saddr }}
    meta nfproto ipv6 tcp dport {one} update @one6 {{ ip6 saddr }}
    tcp dport {port} tcp flags & (syn | ack) == syn ip saddr @open4 counter name connections accept
    tcp dport {port} tcp flags & (syn | ack) == syn ip6 saddr @open6 counter name connections accept
    tcp dport {port} tcp flags & (syn | ack) == syn {closed}
  }}
}}
"""


def run(*command: str, given: str | None = None) -> str:
    return subprocess.run(command, input=given, check=True, capture_output=True, text=True).stdout


@dataclass
class Outcome:
    """What a run of Ansible gave."""

    code: int
    output: str

    @property
    def ssh_calls(self) -> int:
        return self.output.count("SSH: EXEC ")


@dataclass
class Lab:
    """The closed host, and a folder to run Ansible from."""

    namespace: str
    key: Path
    folder: Path = field(default_factory=Path)
    variables: dict[str, str] = field(default_factory=dict)

    def inside(self, *command: str, given: str | None = None) -> str:
        return run("ip", "netns", "exec", self.namespace, *command, given=given)

    def gate(self, closed: str = "reject with tcp reset", extra: str = "") -> None:
        one, two, three = (knock.port for knock in RIGHT)
        rules = GATE.format(one=one, two=two, three=three, port=PORT, closed=closed, extra=extra)
        self.inside("nft", "-f", "-", given="flush ruleset\n" + rules)

    def count(self, name: str) -> int:
        listing = self.inside("nft", "list", "counter", "inet", "gate", name)
        return int(listing.split("packets")[1].split()[0])

    @property
    def knocks(self) -> int:
        return self.count("knocks")

    def keep(
        self,
        *operators: tuple[str, Operator],
        host: str = "web1",
        encrypted: bool = True,
        single_use: bool = False,
    ) -> Path:
        """Write a host's entry of the keyring."""
        vault = RunVault([("default", VaultSecret(VAULT_PASSWORD.encode()))])
        keyring = Keyring(self.folder / "knock_keyring", vault, plaintext=not encrypted)
        path = keyring.path(host)
        path.unlink(missing_ok=True)
        chosen = dict(operators or [("default", operator(RIGHT))])
        keyring.update(
            host,
            lambda _kept: HostSecrets(
                str(keyring.id), host, 1, b"\x5a" * 32, frozenset(), chosen, single_use=single_use
            ),
        )
        return path

    def inventory(self, *more: str) -> None:
        (self.folder / "hosts").write_text("\n".join((f"web1 ansible_host={SERVER4}", *more, "")))
        (self.folder / "group_vars").mkdir(exist_ok=True)
        lines = "".join(f"{name}: {value!r}\n" for name, value in self.variables.items())
        (self.folder / "group_vars" / "all").write_text(lines)

    def ansible(
        self, tool: str, *arguments: str, vault: bool = True, environment: dict[str, str] | None = None
    ) -> Outcome:
        secret = ["--vault-password-file", str(self.folder / "vault")] if vault else []
        finished = subprocess.run(
            [_tool(tool), *arguments, *secret],
            cwd=self.folder,
            env={**os.environ, "ANSIBLE_CONFIG": str(self.folder / "ansible.cfg"), **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        return Outcome(finished.returncode, finished.stdout + finished.stderr)

    def adhoc(self, *arguments: str, hosts: str = "web1", vault: bool = True, **environment: str) -> Outcome:
        return self.ansible("ansible", hosts, *arguments, vault=vault, environment=environment)

    def play(self, text: str, *arguments: str, **environment: str) -> Outcome:
        (self.folder / "play.yml").write_text(text)
        return self.ansible("ansible-playbook", "play.yml", *arguments, environment=environment)


def operator(knocks: tuple[Knock, ...], following: tuple[Knock, ...] | None = None, active: bool = True) -> Operator:
    created = "2026-01-31T08:15:00Z"
    return Operator(
        active,
        StoredSequence(1, knocks, "given", created),
        None if following is None else StoredSequence(1, following, "given", created),
    )


def _tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _missing() -> list[str]:
    needed = [
        name for name in ("ip", "nft", "ssh", "sftp", "scp", "ssh-keygen", "git", "rsync") if shutil.which(name) is None
    ]
    return needed + [name for name in ("/usr/sbin/sshd",) if not os.access(name, os.X_OK)]


def _remove_left_links() -> None:
    """Those of runs that were killed: they have the addresses that this one needs."""
    for link in json.loads(run("ip", "-j", "link", "show", "type", "veth") or "[]"):
        owner = re.fullmatch(r"acc([0-9]+)a", link["ifname"])
        if owner is not None and not os.path.exists(f"/proc/{owner[1]}"):
            run("ip", "link", "delete", link["ifname"])


@contextlib.contextmanager
def serving(namespace: str, configuration: Path, port: int, *options: str) -> Iterator[None]:
    """A real sshd in a network namespace, once it waits on the port."""
    inside = ("ip", "netns", "exec", namespace)
    sshd = subprocess.Popen([*inside, "/usr/sbin/sshd", "-D", "-f", str(configuration), *options])
    try:
        until = time.monotonic() + 20
        while f":{port}" not in run(*inside, "ss", "-Hltn"):
            assert sshd.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        yield
    finally:
        sshd.terminate()
        sshd.wait()


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if os.geteuid() != 0 or _missing():
        pytest.skip(f"needs root and {', '.join(_missing()) or 'nothing else'}")
    folder = tmp_path_factory.mktemp("machine")
    namespace = f"acc-{os.getpid()}"
    outer, inner = f"acc{os.getpid()}a", f"acc{os.getpid()}b"
    lab = Lab(namespace, folder / "key")
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(lab.key))
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
    os.makedirs("/run/sshd", exist_ok=True)
    (folder / "sshd_config").write_text(
        f"Port {PORT}\nHostKey {folder}/host_key\nAuthorizedKeysFile {lab.key}.pub\nStrictModes no\nUsePAM no\n"
        f"PermitRootLogin yes\nPidFile none\nMaxStartups 200\nSubsystem sftp internal-sftp\n"
        # Whatever root's own shell does at its start is not what is tried here.
        f"SetEnv HOME={folder}\n"
    )
    _remove_left_links()
    with contextlib.ExitStack() as cleaning:
        run("ip", "netns", "add", namespace)
        cleaning.callback(run, "ip", "netns", "delete", namespace)
        run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", namespace)
        # A process that outlives the tests would keep the namespace, and with it the link.
        cleaning.callback(run, "ip", "link", "delete", outer)
        run("ip", "address", "add", f"{CLIENT4}/29", "dev", outer)
        run("ip", "address", "add", f"{CLIENT6}/64", "dev", outer, "nodad")
        run("ip", "link", "set", outer, "up")
        lab.inside("ip", "address", "add", f"{SERVER4}/29", "dev", inner)
        lab.inside("ip", "address", "add", f"{SERVER6}/64", "dev", inner, "nodad")
        lab.inside("ip", "link", "set", inner, "up")
        lab.inside("ip", "link", "set", "lo", "up")
        cleaning.enter_context(serving(namespace, folder / "sshd_config", PORT))
        yield lab


@pytest.fixture
def lab(machine: Lab, tmp_path: Path) -> Iterator[Lab]:
    """The host, closed, with an encrypted entry in a keyring beside the inventory."""
    # A ControlPath has to be short.
    control = Path("/tmp") / f"{machine.namespace}-cp"
    control.mkdir(mode=0o700, exist_ok=True)
    machine.folder = tmp_path
    machine.variables = {
        "ansible_connection": "fleet.portknock.knock_ssh",
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(machine.key),
        "ansible_python_interpreter": "/usr/bin/python3",
        "ansible_control_path_dir": str(control),
    }
    (tmp_path / "vault").write_text(VAULT_PASSWORD)
    (tmp_path / "ansible.cfg").write_text(
        f"[defaults]\ninventory = hosts\ncollections_path = {ROOT / '.cache'}\nhost_key_checking = False\n"
        f"local_tmp = {tmp_path}/local\nremote_tmp = {tmp_path}/remote\nretry_files_enabled = False\n"
        "[ssh_connection]\n"
        "ssh_args = -F none -o ControlMaster=auto -o ControlPersist=30s -o UserKnownHostsFile=/dev/null\n"
    )
    machine.keep()
    machine.inventory()
    machine.gate()
    yield machine
    for path in control.iterdir():
        subprocess.run(
            ["ssh", "-F", "none", "-O", "exit", "-o", f"ControlPath={path}", "x"], capture_output=True, check=False
        )
    shutil.rmtree(control)
