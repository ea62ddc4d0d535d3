# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host that deploys its own gate with ansible-pull, judged by a stranger. The tests build on each other."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator

import pytest
from deriving import OPENS, SITE, STAYS_CLOSED, Deriving
from lab import FAMILIES, ROOT, RUN_SECONDS, Fleet, Run, differences, recap_of, wait_until

HOST = "self"
COLLECTION = "/usr/share/ansible/collections/ansible_collections/fleet/portknock"
PARTS = ("galaxy.yml", "meta", "playbooks", "plugins", "roles")
CHECKOUT = "/var/lib/pull"
LOG = "/run/pull.log"
LOG_PREFIX = re.compile(r"^\S+ \S+ p=[0-9]+ u=\S+ n=\S+ [A-Z]+\| ", re.MULTILINE)
INVENTORY = {"all": {"hosts": {HOST: {"ansible_connection": "local"}}}}
VARIABLES = {
    "knock_server_proof": "host",
    # Its logins would have to be proved over ssh.
    "sshd_hardening_enabled": False,
    "knock_keyring_dir": "/var/lib/knock_keyring",
    "knock_server_confirm_timeout": 30,
    "knock_generation": 1,
    "knock_server_sequences": {
        "default": "{{ knock_secret | fleet.portknock.knock_sequence(host=inventory_hostname, generation=knock_generation) }}"
    },
}
NOTE = "Not proved from outside: seen from a network namespace on the host itself (knock_server_proof=host)."
# Every command line and environment that there is, until it is told to stop.
SAMPLER = """
import glob, os, time
seen = set()
while not os.path.exists("/run/stop-sampling"):
    for path in glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/proc/[0-9]*/environ"):
        try:
            seen.add(open(path, "rb").read().replace(b"\\0", b" "))
        except OSError:
            pass
    time.sleep(0.01)
open("/run/sampled", "wb").write(b"\\n".join(seen))
"""


class Pulling(Deriving):
    """The host, with a repository that it pulls from, the vault's password, and a folder for its keyring."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet, HOST)
        # A container may not change sysctls, and has no IPv6 on new interfaces: not what a machine is like.
        self.run("mount -o remount,rw /proc/sys")
        self.run(f"mkdir -p {COLLECTION}")
        argv = ["tar", "-C", str(ROOT), "--exclude=__pycache__", "-cf", "-", *PARTS]
        parts = subprocess.run(argv, check=True, capture_output=True).stdout
        self.run(f"tar -C {COLLECTION} --no-same-owner -xf -", parts)
        password = (fleet.directory / "vault-password").read_text()
        self.run("umask 077; cat >/root/vault-password", password.encode())
        for name, text in {
            "inventory.yml": json.dumps(INVENTORY),
            "group_vars/all/gate.yml": json.dumps(VARIABLES),
            "group_vars/all/secret.yml": self.encrypted_secret(),
            "site.yml": json.dumps([{"import_playbook": SITE}]),
            "remove.yml": json.dumps([{"import_playbook": "fleet.portknock.remove"}]),
        }.items():
            self.run(f"mkdir -p $(dirname /srv/pulled/{name}); cat >/srv/pulled/{name}", text.encode())
        self.run(
            "cd /srv/pulled; git init -q; git add .; git -c user.name=admin -c user.email=admin@example.org commit -q -m site; "
            "git clone -q --bare /srv/pulled /srv/fleet.git; rm -r /srv/pulled"
        )

    def run(self, script: str, given: bytes = b"") -> None:
        argv = ["docker", "exec", "-i", self.fleet.hosts[HOST]["container"], "sh", "-euc", script]
        subprocess.run(argv, input=given, check=True, capture_output=True)

    def pull(self, playbook: str = "site.yml", **variables: object) -> Run:
        """ansible-pull at -vvv, which shows nothing of any generation, nor do the arguments of its programs.

        What the run said is read from a log: ansible-pull mixes what its playbook writes to its two streams, in mid-line.
        """
        argv = ["ansible-pull", "-vvv", "-U", "/srv/fleet.git", "-d", CHECKOUT, "-i", "inventory.yml"]
        argv += ["--vault-password-file", "/root/vault-password", "-e", json.dumps(variables), playbook]
        environment = ["-e", "ANSIBLE_NOCOLOR=1", "-e", f"ANSIBLE_LOG_PATH={LOG}"]
        with self.sampled():
            done = subprocess.run(
                ["docker", "exec", *environment, self.fleet.hosts[HOST]["container"], *argv],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=RUN_SECONDS,
                check=False,
            )
        self.check(done.stdout)
        log = self.fleet.execute(HOST, f"cat {LOG}; rm {LOG}")
        self.check(log)
        said = LOG_PREFIX.sub("", log)
        # The first recap is that of the checkout.
        return Run(done.returncode, said, recap_of(said.rpartition("PLAY RECAP")[2]))

    @contextlib.contextmanager
    def sampled(self) -> Iterator[None]:
        self.run("rm -f /run/stop-sampling /run/sampled")
        container = self.fleet.hosts[HOST]["container"]
        subprocess.run(["docker", "exec", "-d", container, "python3", "-c", SAMPLER], check=True)
        try:
            yield
        finally:
            self.run("touch /run/stop-sampling")
            wait_until(lambda: self.fleet.succeeds(HOST, "test -s /run/sampled"), 20, "the sampler has ended")
        sampled = self.fleet.execute(HOST, "cat /run/sampled; rm /run/sampled")
        assert "ansible-playbook" in sampled
        self.check(sampled)


@pytest.fixture(scope="module")
def pulling(fleet: Fleet) -> Pulling:
    return Pulling(fleet)


@pytest.fixture(scope="module")
def before(pulling: Pulling) -> dict[str, str]:
    return pulling.fleet.state(HOST)


def unchanged(pulling: Pulling, before: dict[str, str]) -> bool:
    """Nothing of a gate is there; what ansible-pull and the keyring keep is the controller's, not the host's."""
    own = (CHECKOUT, "/var/lib/knock_keyring", "/run/fleet-portknock", "/root/.ansible")
    found = differences(before, pulling.fleet.state(HOST))
    return [line for line in found if not any(path in line for path in own)] == []


def test_refused_before_anything_changes(pulling: Pulling, before: dict[str, str]) -> None:
    program = "/usr/bin/ip"
    pulling.run(f"mv {program} {program}.away")
    try:
        run = pulling.pull()
    finally:
        pulling.run(f"mv {program}.away {program}")
    assert run.recap[HOST]["failed"] == 1, run.output
    assert "knock_server_proof: expected the program ip on the host" in run.output.replace("\n", " ")
    assert unchanged(pulling, before)


BY_INTERFACE = "add table inet mine; add chain inet mine in { type filter hook input priority 0; }; "
BY_INTERFACE += "add rule inet mine in iifname != eth0 iifname != lo drop"


def test_rolled_back_where_the_namespace_s_packets_are_dropped(pulling: Pulling, before: dict[str, str]) -> None:
    pulling.fleet.execute(HOST, f"nft '{BY_INTERFACE}'")
    try:
        run = pulling.pull(knock_server_confirm_timeout=15)
    finally:
        pulling.fleet.execute(HOST, "nft delete table inet mine")
    assert run.recap[HOST]["failed"] == 1, run.output
    output = run.output.replace("\n", " ")
    assert re.search(
        r"Not opened: port 22/tcp of \S+, seen from 198\.\S+ on a network namespace on self, showed", output
    )
    assert "such as a packet filter that names interfaces" in output
    assert "The host has gone back to what it had." in output
    assert unchanged(pulling, before)


def test_a_host_that_pulls_its_own_gate(pulling: Pulling) -> None:
    run = pulling.pull()
    assert run.status == 0, run.output
    # Warnings are wrapped, anywhere.
    assert f"[WARNING]: {HOST}: {NOTE}".replace(" ", "") in "".join(run.output.split())
    # The option of that name is there, too.
    proof = json.JSONDecoder().raw_decode(run.output, run.output.index('"proof": {') + len('"proof": '))[0]
    addresses = {pulling.fleet.hosts[HOST][family] for family in FAMILIES}
    assert {look["address"] for look in proof["closed"]} == {look["address"] for look in proof["opened"]} == addresses
    assert (proof["seen_from"], proof["notes"]) == (HOST, [NOTE])
    assert pulling.opens(1) == OPENS


def test_the_second_pull_changes_nothing(pulling: Pulling) -> None:
    gate = "sha256sum /etc/fleet-portknock/*; nft -s list map inet fleet_portknock step; ip -br link"
    before = pulling.fleet.execute(HOST, gate)
    run = pulling.pull()
    assert (run.status, run.recap[HOST]["changed"]) == (0, 0), run.output
    assert pulling.fleet.execute(HOST, gate) == before


def test_the_next_generation(pulling: Pulling) -> None:
    run = pulling.pull(knock_generation=2)
    assert run.status == 0, run.output
    assert (pulling.opens(1), pulling.opens(2)) == (STAYS_CLOSED, OPENS)


def test_nothing_secret_lies_about(pulling: Pulling) -> None:
    """But in the gate's own files; the keyring's and the repository's are encrypted."""
    folders = f"/root /home /tmp /var/tmp /var/log /srv /run {CHECKOUT} /var/lib/knock_keyring"
    texts = pulling.fleet.execute(
        HOST, f"find {folders} -xdev -type f -size -2000k -exec cat {{}} + | tr -cd '[:print:]\\n'"
    )
    assert "$ANSIBLE_VAULT" in texts
    pulling.check(texts)
    pulling.check(pulling.fleet.execute(HOST, "journalctl --no-pager -o cat"))


def test_taken_away_by_the_host_itself(pulling: Pulling, before: dict[str, str]) -> None:
    run = pulling.pull("remove.yml", portknock_hosts=HOST)
    assert run.status == 0, run.output
    assert unchanged(pulling, before)
    for family in FAMILIES:
        (source,), target = pulling.fleet.sources.take(family), pulling.fleet.hosts[HOST][family]
        assert pulling.fleet.outside(["connect", source, target, 22]) == ["open"]
