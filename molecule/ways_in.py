# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""For the scenario hardening: the ways into a host, tried by a real ssh client, and the plays that close them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from lab import Fleet, Run

PORTS = {"web-1": 2222}
PASSWORD = "open sesame"  # noqa: S105
DROP_IN = "/etc/ssh/sshd_config.d/00-fleet-portknock.conf"
PLAY = [
    {
        "hosts": "all",
        "gather_facts": False,
        "become": True,
        "tasks": [{"ansible.builtin.include_role": {"name": "fleet.portknock.sshd_hardening"}}],
    }
]


def port(host: str) -> int:
    return PORTS.get(host, 22)


def inventory(fleet: Fleet, user: str = "admin") -> Path:
    """The fleet's inventory, with an account of its own and each host's port."""
    content = json.loads(fleet.inventory.read_text())
    content["all"]["vars"]["ansible_user"] = user
    for name, host in content["all"]["hosts"].items():
        host["ansible_port"] = port(name)
    return fleet.write(f"{user}.yml", content)


def harden(
    fleet: Fleet,
    *arguments: str,
    user: str = "admin",
    hosts: str = "all",
    variables: Mapping[str, object] | None = None,
    **environment: str,
) -> Run:
    playbook = fleet.write("harden.yml", PLAY)
    options = ("--limit", hosts, *arguments)
    return fleet.play(playbook, *options, inventory=inventory(fleet, user), variables=variables, **environment)


def soften(fleet: Fleet, hosts: str = "all") -> Run:
    """Take it all back by the role's own way, as root, who may get in only then."""
    task = {"ansible.builtin.include_role": {"name": "fleet.portknock.sshd_hardening", "tasks_from": "remove"}}
    playbook = fleet.write("soften.yml", [{**PLAY[0], "tasks": [task]}])
    return fleet.play(playbook, "--limit", hosts, inventory=inventory(fleet))


def command(fleet: Fleet, host: str, user: str, *options: str) -> list[str]:
    """ssh as nobody's configuration would have it."""
    argv = ["ssh", "-F", "none", "-o", "BatchMode=no", "-o", f"UserKnownHostsFile={fleet.directory}/known_hosts"]
    # The fleet's file knows hosts by port 22.
    argv += ["-o", f"HostKeyAlias={fleet.hosts[host]['ipv4']}", "-o", "StrictHostKeyChecking=yes"]
    argv += ["-o", "ConnectTimeout=10", "-o", "IdentitiesOnly=yes", "-p", str(port(host)), *options]
    return [*argv, f"{user}@{fleet.hosts[host]['ipv4']}"]


def enter(fleet: Fleet, host: str, user: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Try to get in by the fleet's key."""
    key = ("-i", str(fleet.directory / "id_ed25519"), "-o", "NumberOfPasswordPrompts=0")
    return _run([*command(fleet, host, user, *key, *options), "id -un"])


def enter_by_password(fleet: Fleet, host: str, user: str) -> subprocess.CompletedProcess[str]:
    """Try to get in by the password that everybody has."""
    asking = fleet.directory / "askpass"
    asking.write_text(f"#!/bin/sh\necho '{PASSWORD}'\n")
    asking.chmod(0o700)
    options = ("-o", "PubkeyAuthentication=no", "-o", "NumberOfPasswordPrompts=1")
    return _run([*command(fleet, host, user, *options), "id -un"], SSH_ASKPASS=str(asking), SSH_ASKPASS_REQUIRE="force")


def methods(fleet: Fleet, host: str, user: str = "admin") -> set[str]:
    """The ways to log in that sshd offers."""
    refused = _run([*command(fleet, host, user, "-o", "PreferredAuthentications=none"), "true"]).stderr
    return set(refused.rpartition("(")[2].partition(")")[0].split(","))


def effective(fleet: Fleet, host: str, keyword: str, user: str = "admin") -> str:
    """What sshd's configuration on disk makes of a keyword."""
    place = f"user={user},host=192.0.2.9,addr=192.0.2.9,laddr=192.0.2.1,lport=22"
    return fleet.execute(host, f"mkdir -p /run/sshd; /usr/sbin/sshd -T -C {place} | sed -n 's/^{keyword} //p'").strip()


def is_covered(fleet: Fleet, host: str) -> bool:
    """Whether a trial is on."""
    return "/etc/ssh/" in fleet.execute(host, "cut -d' ' -f5 /proc/self/mountinfo")


def _run(argv: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=env, timeout=60
    )
