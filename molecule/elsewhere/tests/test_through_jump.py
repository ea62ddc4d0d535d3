# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A gate that is entered and proved from a jump host, and knows its address alone. The tests build on each other."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import FAMILIES, ROOT, Fleet, Run, differences

SSH = 22
LINE = "fleet.portknock.knock_ssh"
HELPER = ROOT / "plugins" / "plugin_utils" / "_program.py"
# Every command line and environment that there is on a host, until its input ends.
SAMPLER = """
import glob, os, select, sys
seen = set()
while not select.select([0], [], [], 0.01)[0]:
    for path in glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/proc/[0-9]*/environ"):
        try:
            seen.add(open(path, "rb").read().replace(b"\\0", b" "))
        except OSError:
            pass
sys.stdout.buffer.write(b"\\n".join(seen))
"""


class Behind:
    """The box as it is reached through a jump host: by an inventory, and by a person's ssh_config."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.config = fleet.directory / "ssh_config"
        self.program = fleet.directory / "portknock"
        self.secrets = fleet.directory / "secrets.json"

    def configure(self, *eye: str) -> None:
        """What ssh has to know of jump hosts.

        :param eye: more lines for the other one.
        """
        shared = [
            *("User root", f"IdentityFile {self.fleet.directory}/id_ed25519", "BatchMode yes"),
            *(f"UserKnownHostsFile {self.fleet.directory}/known_hosts", "StrictHostKeyChecking yes"),
        ]
        lines = [f"Host jump carrier\n  HostName {self.fleet.hosts['jump']['ipv4']}"]
        # Where it was hardened by now, root is shut out.
        lines += [
            f"Host eye\n  HostName {self.fleet.hosts['eye']['ipv4']}\n  User admin",
            *(f"  {line}" for line in eye),
        ]
        self.config.write_text("\n".join((*lines, "Host *", *(f"  {line}" for line in shared), "")))

    def inventory(self, way: str) -> Path:
        content = json.loads(self.fleet.inventory.read_text())
        box = content["all"]["hosts"]["box"]
        content["all"]["hosts"] = {"box": {"ansible_host": box["ansible_host"]}}
        content["all"]["vars"] |= {"ansible_ssh_extra_args": f"-F {self.config} -J {way}"}
        return self.fleet.write("behind.yml", content)

    def run(
        self,
        *arguments: str,
        way: str = "jump",
        playbook: str | Path = "fleet.portknock.site",
        control: Path | None = None,
        **more: object,
    ) -> Run:
        """A play for the box.

        :param control: folder for a ControlPersist master; without one every connection is a real one.
        """
        ssh = {"ANSIBLE_SSH_ARGS": "-o ControlMaster=no -o ControlPath=none"}
        return self.fleet.play(
            playbook,
            *("--limit", "box", "-v", *arguments),
            inventory=self.inventory(way),
            variables={"ansible_connection": LINE, **more},
            **({"ANSIBLE_SSH_CONTROL_PATH_DIR": str(control)} if control else ssh),
        )

    def helper(self, *options: str, secrets: Path | None = None, name: str = "box") -> str:
        given = ("--secrets", secrets or self.secrets, "--name", name, *options)
        return f"{sys.executable} {self.program} connect {' '.join(map(str, given))} %h %p"

    def keep(self, path: Path, name: str, **more: str) -> None:
        """A person's file of secrets, with one host."""
        host = {"hostname": self.fleet.hosts[name]["ipv4"], "port": SSH, "sequences": [self.fleet.knocks(name)]}
        path.write_text(json.dumps({"format": 2, "operator": "default", "hosts": {name: {**host, **more}}}))
        path.chmod(0o600)

    def ssh(self, host: str, proxy: str) -> subprocess.CompletedProcess[str]:
        argv = ["ssh", "-F", str(self.config), "-o", f"ProxyCommand={proxy}", self.fleet.hosts["box"]["ipv4"]]
        return subprocess.run([*argv, host], capture_output=True, text=True, timeout=60, check=False)

    def sources(self) -> set[str]:
        """Where the gate was opened from, by its own record."""
        shown = {"msg": "opened from {{ found.openings | map(attribute='source') | join(' ') }} by then"}
        tasks = [{"fleet.portknock.knock_gate_info": {}, "register": "found"}, {"ansible.builtin.debug": shown}]
        play = {"hosts": "all", "gather_facts": False, "tasks": tasks}
        run = self.run(playbook=self.fleet.write("openings.yml", [play]))
        found = re.search(r"opened from (.*) by then", run.output)
        assert found, run.output
        return set(found[1].split())


def addresses(fleet: Fleet, host: str) -> set[str]:
    return {fleet.hosts[host][family] for family in FAMILIES}


def proof(run: Run) -> dict[str, Any]:
    assert run.status == 0, run.output
    _before, found, rest = run.output.partition('"proof": {')
    assert found, run.output
    seen: dict[str, Any] = json.JSONDecoder().raw_decode("{" + rest)[0]
    return seen


@contextlib.contextmanager
def sampled(fleet: Fleet, host: str) -> Iterator[list[str]]:
    """What every process on a host had for arguments and environment meanwhile."""
    found: list[str] = []
    argv = ["docker", "exec", "-i", fleet.hosts[host]["container"], "python3", "-c", SAMPLER]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sampling:
        try:
            yield found
        finally:
            found += sampling.communicate(timeout=60)[0].decode(errors="replace").splitlines()


@pytest.fixture(scope="module")
def behind(fleet: Fleet) -> Behind:
    behind = Behind(fleet)
    behind.configure()
    # One that may pass through, and start nothing.
    made = "useradd -m -s /usr/sbin/nologin carrier; cp -r /root/.ssh /home/carrier/; chown -R carrier: /home/carrier"
    fleet.execute("jump", f"id carrier 2>/dev/null || {{ {made}; }}")
    program = subprocess.run([sys.executable, str(HELPER)], capture_output=True, check=True).stdout
    behind.program.write_bytes(program)
    gated = fleet.play("fleet.portknock.site", "--limit", "eye", variables={"ansible_connection": LINE})
    assert gated.status == 0, gated.output
    return behind


@pytest.fixture(scope="module", autouse=True)
def before(fleet: Fleet) -> dict[str, str]:
    return fleet.state("box")


def test_a_jump_host_that_can_not_knock_closes_nothing(fleet: Fleet, behind: Behind, before: dict[str, str]) -> None:
    run = behind.run(way="carrier@jump")
    assert run.recap["box"]["failed"] == 1, run.output
    assert re.search(
        r"The jump host jump can't knock: expected a shell there that runs `python3` of version 3\.8 or newer; got .*the gate "
        r"was not closed\. Make the jump host's address one of knock_server_trusted_sources .*knock_server_prove_from",
        run.output,
    ), run.output
    assert [line for line in differences(before, fleet.state("box")) if not line.startswith("run: ")] == []


def test_one_that_is_trusted_need_not(fleet: Fleet, behind: Behind) -> None:
    """As before there was any knocking from jump hosts."""
    trusted = sorted(addresses(fleet, "jump"))
    note = "Not proved from outside: the host is reached through a ProxyJump or ProxyCommand."
    assert proof(behind.run(way="carrier@jump", knock_server_trusted_sources=trusted))["notes"] == [note]


def test_rolled_back_where_the_knock_does_not_arrive_from_there(fleet: Fleet, behind: Behind, tmp_path: Path) -> None:
    """The gate as it is trusts the jump host, and goes on to."""
    former = fleet.state("box")
    chain = "add table inet deaf; add chain inet deaf early { type filter hook prerouting priority -500; }; "
    rules = "; ".join(
        f"add rule inet deaf early {family} saddr {fleet.hosts['jump'][name]} tcp flags syn tcp dport 1024-65535 drop"
        for family, name in (("ip", "ipv4"), ("ip6", "ipv6"))
    )
    fleet.execute("box", f"nft '{chain}{rules}'")
    try:
        run = behind.run(control=tmp_path, knock_server_closed_response="reset")
    finally:
        fleet.execute("box", "nft delete table inet deaf")
    assert run.recap["box"]["failed"] == 1, run.output
    assert re.search(
        r"Not opened: port 22/tcp of \S+, seen from \S+ on the jump host jump, showed reset after", run.output
    )
    assert "The host has gone back to what it had." in run.output
    assert differences(former, fleet.state("box")) == []


def test_proved_and_entered_from_the_jump_host(fleet: Fleet, behind: Behind) -> None:
    with sampled(fleet, "jump") as processes:
        run = behind.run("-vvvv")
        seen = proof(run)
        again = behind.run()
    assert (seen["seen_from"], seen["notes"]) == ("jump", [])
    assert {look["address"] for look in seen["closed"]} == {look["address"] for look in seen["opened"]}
    assert {look["address"] for look in seen["closed"]} == addresses(fleet, "box")
    assert {look["showed"] for look in seen["closed"]} == {"reset"}
    assert (again.status, again.recap["box"]["changed"]) == (0, 0), again.output
    for output in (run.output, again.output):
        assert fleet.leaks(output, "box") == []
        assert "Not proved" not in output
    assert any("python3 -IBSc" in text for text in processes)
    assert fleet.leaks("\n".join(processes), "box") == []


def test_closed_to_everyone_else(fleet: Fleet, behind: Behind) -> None:
    assert fleet.judge("box") == []
    # The controller has opened nothing for itself.
    for family in FAMILIES:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((fleet.hosts["box"][family], SSH), 5)
    sources = behind.sources()
    assert addresses(fleet, "jump") <= sources
    assert not sources & {fleet.description["gateway4"], fleet.description["gateway6"]}


@pytest.mark.parametrize("way", ["jump", "eye,jump"])
def test_a_person_gets_in_from_the_jump_host(fleet: Fleet, behind: Behind, way: str) -> None:
    """The other one of the chain has a gate of its own, for which it has a helper of its own."""
    eye = fleet.directory / "eye.json"
    behind.keep(eye, "eye")
    behind.configure(f"ProxyCommand {behind.helper(secrets=eye, name='eye')}")
    behind.keep(behind.secrets, "box", jump=way)
    with sampled(fleet, "jump") as processes:
        finished = behind.ssh("echo $SSH_CONNECTION", behind.helper("-F", str(behind.config)))
    assert finished.stdout.split()[:1] == [fleet.hosts["jump"]["ipv4"]], finished.stderr
    assert fleet.leaks("\n".join(processes), "box", "eye") == []
    assert fleet.leaks(finished.stderr, "box", "eye") == []


def test_ansible_goes_by_a_chain_whose_first_has_a_gate(behind: Behind) -> None:
    run = behind.run(way="eye,jump")
    assert (run.status, run.recap["box"]["changed"]) == (0, 0), run.output


def test_nothing_secret_stays_on_the_jump_hosts(fleet: Fleet) -> None:
    for host in ("jump", "eye"):
        new = "-type f -size -1000k -newer /root/.ssh/authorized_keys -print"
        found = fleet.execute(host, f"find / -xdev \\( -path /proc -o -path /sys -o -path /usr \\) -prune -o {new}")
        found += fleet.execute(host, f"find /run /tmp /dev/shm -xdev {new}", check=False)
        texts = {
            path: fleet.inside(host).file(path).content.decode(errors="replace") for path in found.split("\n") if path
        }
        assert [path for path, text in texts.items() if fleet.leaks(text, "box")] == []
        journal = fleet.execute(host, "journalctl --no-pager -o cat")
        assert "Accepted publickey" in journal
        assert fleet.leaks(journal, "box") == []


def test_removed_through_it(fleet: Fleet, behind: Behind, before: dict[str, str]) -> None:
    run = behind.run(playbook="fleet.portknock.remove", portknock_hosts="box")
    assert run.status == 0, run.output
    assert differences(before, fleet.state("box")) == []
