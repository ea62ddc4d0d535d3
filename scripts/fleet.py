# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Starts and removes a test fleet: containers with systemd and sshd, and a client host that stands outside.

``fleet.py up NAME web1=debian12 web2=debian13`` makes the network ``portknock-NAME``, one container for each host,
``portknock-NAME-client``, and a folder ``.cache/fleet/NAME`` with all that Ansible needs: ``inventory.yml``, ``ansible.cfg``,
the ssh key, ``known_hosts``, a vault password and ``fleet.json`` for programs. ``fleet.py down NAME`` removes it all again.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PREFIX = "portknock-"
LABEL = "fleet.portknock.fleet"
IMAGES = "portknock-test"
CLIENT = "client"
ROOT = Path(__file__).resolve().parent.parent
FLEETS = ROOT / ".cache" / "fleet"
BOOT_SECONDS = 60
# Capabilities instead of --privileged, which asks for more than some build machines may give.
CAPABILITIES = ("NET_ADMIN", "NET_RAW", "SYS_ADMIN")
# Whoever works in the fleet's folder needs no options and no variables.
CONFIGURATION = """\
[defaults]
inventory = inventory.yml
vault_password_file = vault-password
collections_path = {collections}
inject_facts_as_vars = false
"""


def run(*argv: str, check: bool = True, stdin: str | None = None) -> str:
    """Run a command and return its output; what it complained of becomes the error."""
    done = subprocess.run(argv, capture_output=True, text=True, input=stdin, check=False)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(argv[:4])} ... failed ({done.returncode}): {done.stderr.strip()}")
    return done.stdout


def docker(*argv: str, check: bool = True, stdin: str | None = None) -> str:
    return run("docker", *argv, check=check, stdin=stdin)


def taken_networks() -> list[ipaddress.IPv4Network]:
    """Every IPv4 network that this machine has a route to: a test network must not hide one."""
    taken = []
    for line in run("ip", "-4", "route", "show").splitlines():
        words = line.split()
        target = words[1] if words[0] in ("unreachable", "blackhole", "broadcast") else words[0]
        if target != "default":
            taken.append(ipaddress.IPv4Network(target, strict=False))
    return taken


def make_network(name: str) -> tuple[ipaddress.IPv4Network, ipaddress.IPv6Network]:
    """A bridge with a free IPv4 /24 and an IPv6 /56, so that a test can take a /64 of its own for every source.

    Two fleets that start at once may pick the same number: the engine refuses the second, which then takes the next.
    """
    taken = taken_networks()
    error = ""
    for number in range(256):
        net4 = ipaddress.IPv4Network(f"10.213.{number}.0/24")
        net6 = ipaddress.IPv6Network(f"fd6b:6e6f:636b:{number:x}00::/56")
        if any(net4.overlaps(other) for other in taken):
            continue
        made = subprocess.run(
            [
                *("docker", "network", "create", "--label", f"{LABEL}={name}", "--ipv6"),
                *("--subnet", str(net4), "--gateway", str(net4[1])),
                *("--subnet", str(net6), "--gateway", str(net6[1]), PREFIX + name),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode == 0:
            return net4, net6
        error = made.stderr.strip()
        if "overlap" not in error:
            break
    raise SystemExit(f"no network for the fleet: {error or 'all of 10.213.0.0/16 is taken'}")


def cgroup_arguments() -> tuple[list[str], list[str]]:
    """Options for the engine and words for systemd's command line."""
    options = ["--cgroupns", "host", "-v", "/sys/fs/cgroup:/sys/fs/cgroup"]
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        return options, []
    # On cgroup v1 a systemd of 256 or later starts only when it is told to.
    return options, ["SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1", "systemd.unified_cgroup_hierarchy=0"]


def start_container(fleet: str, host: str, image: str, address4: str, address6: str) -> None:
    name = f"{PREFIX}{fleet}-{host}"
    argv = ["run", "-d", "--name", name, "--hostname", host, "--label", f"{LABEL}={fleet}"]
    argv += ["--network", PREFIX + fleet, "--ip", address4, "--ip6", address6]
    # AppArmor's default profile for containers forbids the mounts that systemd makes.
    argv += ["--security-opt", "apparmor=unconfined"]
    if image == CLIENT:
        argv += ["--cap-add", "NET_ADMIN", "--cap-add", "NET_RAW", "--init", f"{IMAGES}:{image}"]
        docker(*argv)
        return
    for capability in CAPABILITIES:
        argv += ["--cap-add", capability]
    options, words = cgroup_arguments()
    argv += [*options, "--tmpfs", "/run", "--tmpfs", "/run/lock", "--tmpfs", "/tmp", "-e", "container=docker"]  # noqa: S108
    docker(*argv, "--stop-signal", "SIGRTMIN+3", "-t", f"{IMAGES}:{image}", "/sbin/init", *words)


def wait_for_host(fleet: str, host: str) -> None:
    """Until systemd has finished starting and sshd listens."""
    name = f"{PREFIX}{fleet}-{host}"
    deadline = time.monotonic() + BOOT_SECONDS
    state = ""
    while time.monotonic() < deadline:
        state = docker("exec", name, "systemctl", "is-system-running", check=False).strip()
        listening = docker("exec", name, "ss", "-Hltn", "sport = :22", check=False).strip()
        if state in ("running", "degraded") and listening:
            return
        time.sleep(0.2)
    raise SystemExit(f"{name} did not start within {BOOT_SECONDS} s; systemd says {state or 'nothing'}")


def prepare_host(fleet: str, host: str, public_key: str) -> str:
    """Let the run's key in, as root and as admin; return the host's own key."""
    name = f"{PREFIX}{fleet}-{host}"
    wait_for_host(fleet, host)
    script = "umask 077; cat >/root/.ssh/authorized_keys; cp /root/.ssh/authorized_keys /home/admin/.ssh/; "
    script += "chown admin: /home/admin/.ssh/authorized_keys; cat /etc/ssh/ssh_host_ed25519_key.pub"
    return " ".join(docker("exec", "-i", name, "sh", "-euc", script, stdin=public_key).split()[:2])


def inventory(directory: Path, hosts: dict[str, dict[str, str]]) -> str:
    """What a user would write; JSON is YAML."""
    ssh = f"-o UserKnownHostsFile={directory}/known_hosts -o StrictHostKeyChecking=yes"
    shared = {
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(directory / "id_ed25519"),
        "ansible_ssh_common_args": ssh,
        "ansible_python_interpreter": "/usr/bin/python3",
    }
    entries = {name: {"ansible_host": host["ipv4"]} for name, host in hosts.items()}
    return json.dumps({"all": {"vars": shared, "hosts": entries}}, indent=2) + "\n"


def write_private(path: Path, text: str) -> None:
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)


def up(fleet: str, wanted: dict[str, str], variables: Path | None) -> None:
    down(fleet)
    directory = FLEETS / fleet
    directory.mkdir(parents=True, mode=0o700)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", PREFIX + fleet, "-f", f"{directory}/id_ed25519")
    public_key = (directory / "id_ed25519.pub").read_text()
    write_private(directory / "vault-password", secrets.token_hex(16) + "\n")

    net4, net6 = make_network(fleet)
    machines = {**wanted, CLIENT: CLIENT}
    known = {
        name: {
            "container": f"{PREFIX}{fleet}-{name}",
            "image": image,
            "ipv4": str(net4[10 + index]),
            "ipv6": str(net6[10 + index]),
        }
        for index, (name, image) in enumerate(machines.items())
    }
    with ThreadPoolExecutor(max_workers=4) as pool:
        list(
            pool.map(
                lambda name: start_container(fleet, name, machines[name], known[name]["ipv4"], known[name]["ipv6"]),
                machines,
            )
        )
        keys = dict(zip(wanted, pool.map(lambda name: prepare_host(fleet, name, public_key), wanted)))

    hosts = {name: known[name] for name in wanted}
    lines = [f"{known[name]['ipv4']},{known[name]['ipv6']},{name} {key}\n" for name, key in keys.items()]
    # The same keys on another port, for scenarios that move sshd.
    lines += [f"[{known[name][family]}]:2222 {key}\n" for name, key in keys.items() for family in ("ipv4", "ipv6")]
    write_private(directory / "known_hosts", "".join(lines))
    write_private(directory / "inventory.yml", inventory(directory, hosts))
    write_private(directory / "ansible.cfg", CONFIGURATION.format(collections=ROOT / ".cache"))
    if variables is not None:
        (directory / "group_vars").mkdir()
        shutil.copy(variables, directory / "group_vars" / "all.yml")
    description = {
        "name": fleet,
        "ipv4": str(net4),
        "ipv6": str(net6),
        "gateway4": str(net4[1]),
        "gateway6": str(net6[1]),
        "client": known[CLIENT],
        "hosts": hosts,
    }
    write_private(directory / "fleet.json", json.dumps(description, indent=2) + "\n")


def down(fleet: str | None) -> None:
    """Remove a fleet, or with None every fleet; only what carries the label and the name's prefix."""
    chosen = f"label={LABEL}" if fleet is None else f"label={LABEL}={fleet}"
    containers = docker("ps", "-aq", "--filter", chosen, "--filter", f"name=^/?{PREFIX}").split()
    if containers:
        docker("rm", "-f", "-v", *containers)
    networks = docker("network", "ls", "-q", "--filter", chosen, "--filter", f"name=^{PREFIX}").split()
    if networks:
        docker("network", "rm", *networks)
    shutil.rmtree(FLEETS if fleet is None else FLEETS / fleet, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    starting = commands.add_parser("up", help="start a fleet, in place of one of the same name")
    starting.add_argument("name")
    starting.add_argument("--vars", type=Path, metavar="FILE", help="group variables for all hosts")
    starting.add_argument("hosts", nargs="+", metavar="HOST=IMAGE")
    stopping = commands.add_parser("down", help="remove a fleet, or all of them")
    stopping.add_argument("name", nargs="?")
    arguments = parser.parse_args()
    if arguments.command == "down":
        down(arguments.name)
        return 0
    up(arguments.name, dict(pair.split("=", 1) for pair in arguments.hosts), arguments.vars)
    return 0


if __name__ == "__main__":
    sys.exit(main())
