# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A person with nothing but a bundle gets in, and stays in while sequences change. The tests build on each other."""

from __future__ import annotations

import base64
import io
import json
import shlex
import subprocess
import tarfile

import pytest
from lab import SSH, Fleet, Run
from sequences_in_use import changed, leaks, put_up_gates, rotate, sequences

CLIENT = "fleet.portknock.client"
# What she has of her own, without a last line's end.
OWN = b"# mine\nHost elsewhere\n  Port 99\nHost *\n  User admin\n  ConnectTimeout 20"


def shut(fleet: Fleet, host: str) -> None:
    """Close every window."""
    fleet.execute(host, "for family in 4 6; do nft flush set inet fleet_portknock open$family; done")


class Person:
    """An account on the client container, with a key, and a config of its own."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.home = "/home/alice"
        self.run("getent passwd alice || useradd -m -s /bin/bash alice", user="root")
        self.give(".ssh/id_ed25519", (fleet.directory / "id_ed25519").read_bytes())
        self.give(".ssh/known_hosts", (fleet.directory / "known_hosts").read_bytes())
        self.give(".ssh/config", OWN)

    def run(
        self, script: str, given: bytes = b"", user: str = "alice", check: bool = True
    ) -> subprocess.CompletedProcess[bytes]:
        argv = ["docker", "exec", "-i", "-u", user, "-w", self.home if user == "alice" else "/", self.fleet.client]
        done = subprocess.run([*argv, "sh", "-euc", script], input=given, capture_output=True, check=False, timeout=90)
        assert done.returncode == 0 or not check, done.stderr.decode()
        return done

    def give(self, name: str, content: bytes) -> None:
        self.run(f"umask 077; mkdir -p $(dirname {name}); cat >{name}", content)

    def content(self, name: str) -> bytes:
        return self.run(f"cat {name}").stdout

    def state(self) -> str:
        """Everything in her home, and what it has in it."""
        return self.run("find . -type f -exec sha256sum {} + -o -printf '%p %m\\n' | sort").stdout.decode()

    def gets_in(self, *hosts: str) -> None:
        """By a knock: no window is open when she comes."""
        for host in hosts:
            shut(self.fleet, host)
            source, target = self.fleet.description["client"]["ipv4"], self.fleet.hosts[host]["ipv4"]
            assert self.fleet.outside(["connect", source, target, SSH]) == ["reset"]
            done = self.run(f"ssh -vvv {host} hostname", check=False)
            assert (done.returncode, done.stdout.decode().strip()) == (0, host), done.stderr.decode()
            assert leaks(done.stderr.decode(), sequences(self.fleet), sequences(self.fleet, "next")) == []


@pytest.fixture(scope="module", autouse=True)
def gates(fleet: Fleet) -> None:
    put_up_gates(fleet)


@pytest.fixture(scope="module")
def alice(fleet: Fleet) -> Person:
    return Person(fleet)


def make(fleet: Fleet, *arguments: str, operator: str = "alice") -> Run:
    run = fleet.play(CLIENT, "-vvv", *arguments, variables={"portknock_operator": operator})
    assert leaks(run.output, sequences(fleet), sequences(fleet, "next")) == []
    assert fleet.leaks(run.output) == []
    # No host is asked for anything.
    assert "SSH: EXEC" not in run.output
    return run


def tar(fleet: Fleet) -> bytes:
    return (fleet.directory / "portknock_bundles" / "alice.tar").read_bytes()


def secrets_file(fleet: Fleet) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(tar(fleet))) as archive:
        member = archive.extractfile("portknock/secrets.json")
        assert member is not None
        return member.read()


def test_a_bundle_has_her_hosts_and_her_sequences_only(fleet: Fleet) -> None:
    run = make(fleet, "--check", "--diff")
    assert run.status == 0, run.output
    assert "+  db: " in run.output
    assert not (fleet.directory / "portknock_bundles").exists()
    run = make(fleet)
    assert (run.status, sum(changed(run).values())) == (0, 1), run.output
    folder = fleet.directory / "portknock_bundles"
    assert [oct(path.stat().st_mode) for path in (folder, folder / "alice.tar")] == ["0o40700", "0o100600"]
    hosts = json.loads(secrets_file(fleet))["hosts"]
    assert set(hosts) == set(fleet.hosts)
    kept = [sequences(fleet), sequences(fleet, "next")]
    for host, access in hosts.items():
        assert access["sequences"] == [known[host, "alice"] for known in kept if (host, "alice") in known]
    text = tar(fleet).decode(errors="replace")
    # Bob's, whether or not he was let go before.
    others = [fleet.knocks(host, "bob") for host in ("web-1", "db")]
    forms = [form for knocks in others for knock in knocks for form in (f'"{knock}"', knock.replace("/", ":"))]
    assert [form for form in forms if form in text] == []
    before = tar(fleet)
    run = make(fleet, "--diff")
    assert (run.status, sum(changed(run).values())) == (0, 0), run.output
    assert tar(fleet) == before
    run = make(fleet, operator="mallory")
    assert run.status != 0
    assert "portknock_operator: expected an operator whom one of the hosts lets in; got 'mallory'" in run.output


def test_two_commands_and_she_is_in(fleet: Fleet, alice: Person) -> None:
    alice.give("alice.tar", tar(fleet))
    said = alice.run("tar -xf alice.tar && portknock/portknock install").stdout.decode()
    assert said.startswith("Installed: ~/.ssh/portknock, for the operator alice on ")
    assert "Delete /home/alice/portknock and the file that it came in" in said
    assert alice.content(".ssh/config") == b"Include ~/.ssh/portknock/config\n" + OWN
    alice.gets_in(*fleet.hosts)
    alice.give("page", b"content\n")
    alice.run("scp -q page web2:/tmp/page; scp -q web2:/tmp/page copy; cmp page copy")


def test_a_second_time_changes_nothing(alice: Person) -> None:
    before = alice.state()
    said = alice.run("portknock/portknock install; ~/.ssh/portknock/portknock install").stdout.decode()
    assert said.count("Nothing to change: ~/.ssh/portknock, ") == 2
    assert said.count("Delete ") == 1
    assert alice.state() == before


def test_the_secrets_are_in_one_place(fleet: Fleet, alice: Person) -> None:
    alice.run("rm -r portknock alice.tar")
    every = [knock for knocks in sequences(fleet).values() for knock in knocks]
    patterns = {*(f'"{knock}"' for knock in every), *(knock.replace("/", ":") for knock in every)}
    found = alice.run(
        "grep -rIlF -f - /home /root /tmp /var /run || true", "\n".join(patterns).encode(), user="root"
    ).stdout.decode()
    names = ("card.html", "card.txt", "secrets.json")
    assert sorted(found.split()) == [f"/home/alice/.ssh/portknock/{name}" for name in names]
    modes = alice.run("stat -c '%a %n' .ssh/portknock .ssh/portknock/*").stdout.decode().splitlines()
    assert {line for line in modes if not line.startswith("600 ")} == {
        "700 .ssh/portknock",
        "700 .ssh/portknock/portknock",
    }


def test_her_bundle_lasts_through_a_time_of_grace(fleet: Fleet, alice: Person) -> None:
    former = tar(fleet)
    run = rotate(fleet, knock_server_grace="7d")
    assert run.status == 0, run.output
    alice.gets_in("web2", "db")
    run = make(fleet, "--diff")
    assert (run.status, sum(changed(run).values())) == (0, 1), run.output
    assert "2 reusable, 0 one-time, changed" in run.output
    assert tar(fleet) != former
    alice.give("alice.tar", tar(fleet))
    assert "Installed: " in alice.run("tar -xf alice.tar && portknock/portknock install").stdout.decode()
    alice.gets_in("web2", "db")
    # With the former ones gone, what she has been given since opens alone.
    run = rotate(fleet)
    assert run.status == 0, run.output
    alice.gets_in(*fleet.hosts)


def test_by_a_jump_host_that_has_a_gate_itself(fleet: Fleet, alice: Person) -> None:
    """Its own block of the bundle opens the jump host, and from there the knock leaves."""
    path = fleet.directory / "host_vars" / "db.yml"
    path.write_text(json.dumps({"knock_client_jump": "web-1"}))
    try:
        run = make(fleet)
    finally:
        path.unlink()
    assert run.status == 0, run.output
    alice.give("alice.tar", tar(fleet))
    alice.run("tar -xf alice.tar && portknock/portknock install")
    for host in ("web-1", "db"):
        shut(fleet, host)
    came_from = alice.run("ssh -o LogLevel=ERROR db 'echo $SSH_CONNECTION'").stdout.decode().split()[0]
    assert came_from == fleet.hosts["web-1"]["ipv4"]


def test_it_goes_without_a_trace(alice: Person) -> None:
    said = alice.run("portknock/portknock uninstall; portknock/portknock uninstall").stdout.decode()
    assert said == "Removed: ~/.ssh/portknock.\nNothing to remove: there is no ~/.ssh/portknock.\n"
    assert alice.content(".ssh/config") == OWN
    assert alice.run("ls .ssh").stdout.split() == [b"config", b"id_ed25519", b"known_hosts"]
    alice.run("rm -r portknock alice.tar")


def test_the_role_does_the_same(fleet: Fleet) -> None:
    """On a machine with the oldest Python that the helper takes, for a user whom Ansible becomes."""
    machine, host = "web2", "db"
    key = (fleet.directory / "id_ed25519").read_text() + "END\n"
    copy = f"cat >.ssh/id_ed25519 <<'END'\n{key}cat >.ssh/known_hosts <<'END'\n"
    copy += (fleet.directory / "known_hosts").read_text() + "END\n"

    def as_admin(script: str, check: bool = True) -> str:
        return fleet.execute(machine, f"cd /home/admin; exec runuser -u admin -- sh -euc {shlex.quote(script)}", check)

    as_admin(f"umask 077; {copy}")
    before = as_admin("find .ssh -printf '%p %m\\n' | sort")
    assert make(fleet).status == 0
    # As it goes to the host.
    sent = base64.b64encode(secrets_file(fleet))[:80].decode()
    fleet.write("client.yml", [{"hosts": machine, "gather_facts": False, "roles": ["fleet.portknock.knock_client"]}])

    def role(*arguments: str, **variables: object) -> Run:
        given = {"knock_client_user": "admin", "knock_client_operator": "alice", **variables}
        run = fleet.play("client.yml", "-vvvv", *arguments, variables=given)
        assert run.status == 0, run.output
        assert leaks(run.output, sequences(fleet)) == []
        assert sent not in run.output
        return run

    assert changed(role("--check", "--diff"))[machine] == 1
    assert as_admin("find .ssh -printf '%p %m\\n' | sort") == before
    assert changed(role("--diff"))[machine] == 1
    assert changed(role("--diff"))[machine] == 0
    assert as_admin("cat .ssh/config; stat -c %a .ssh/config") == "Include ~/.ssh/portknock/config\n600\n"
    shut(fleet, host)
    target = fleet.hosts[host]["ipv4"]
    assert as_admin(f"timeout 5 bash -c '</dev/tcp/{target}/{SSH}' || echo closed").split()[-1] == "closed"
    assert as_admin(f"ssh {host} hostname").strip() == host
    journal = fleet.execute(machine, "journalctl --no-pager -o cat")
    assert "Invoked with state=present" in journal
    assert sent not in journal
    assert fleet.leaks(journal) == []
    assert changed(role("--diff", knock_client_state="absent"))[machine] == 1
    assert as_admin("find .ssh -printf '%p %m\\n' | sort") == before
