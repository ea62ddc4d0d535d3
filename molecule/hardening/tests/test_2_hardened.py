# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What hardening does, seen from outside, on every release; then all other ways in which sshd may run and be told."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest
from lab import Fleet, differences
from ways_in import DROP_IN, command, effective, enter, enter_by_password, harden, inventory, methods, port, soften

HOSTS = ("web-1", "old", "new")
# The one warning about an sshd that has no key exchange which resists a quantum computer.
NOT_OFFERED = {"old": {"does not provide protection against post-quantum attacks"}}


@pytest.fixture(scope="module")
def before(fleet: Fleet) -> dict[str, dict[str, str]]:
    # Nothing of ours is there but the lock of earlier tests, which goes with it.
    assert soften(fleet).status == 0
    return {host: state(fleet, host) for host in HOSTS}


@pytest.fixture(scope="module")
def old_sessions(fleet: Fleet, before: object) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A shell of root's on each host, from before the hardening."""
    key = ("-i", str(fleet.directory / "id_ed25519"))
    sessions = {
        host: subprocess.Popen(
            [*command(fleet, host, "root", *key), "sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for host in HOSTS
    }
    assert {host: answer(session) for host, session in sessions.items()} == dict.fromkeys(HOSTS, "root")
    yield sessions
    for session in sessions.values():
        session.communicate("exit\n")


@pytest.fixture(scope="module")
def hardened(fleet: Fleet, old_sessions: object) -> None:
    checked = harden(fleet, "--check", "--diff")
    assert checked.status == 0, checked.output
    assert "+PermitRootLogin no" in checked.output
    assert [host for host in HOSTS if enter(fleet, host, "root").stdout != "root\n"] == []
    run = harden(fleet)
    assert run.status == 0, run.output
    assert {host: numbers["changed"] for host, numbers in run.recap.items()} == dict.fromkeys(HOSTS, 1)


def state(fleet: Fleet, host: str) -> dict[str, str]:
    """Everything that could be left behind, with the texts of sshd's configuration."""
    texts = fleet.execute(host, "cd /etc/ssh && sha256sum sshd_config $(find sshd_config.d -type f | sort)")
    return {**fleet.state(host), "texts": texts}


def answer(session: subprocess.Popen[str]) -> str:
    assert session.stdin is not None
    assert session.stdout is not None
    session.stdin.write("id -un\n")
    session.stdin.flush()
    return session.stdout.readline().strip()


def failed_units(fleet: Fleet, host: str) -> str:
    return fleet.execute(host, "systemctl list-units --failed --no-legend 'ssh*'")


@pytest.mark.usefixtures("hardened")
@pytest.mark.parametrize("host", HOSTS)
class TestSeenFromOutside:
    def test_root_is_refused_with_key_and_password(self, fleet: Fleet, host: str) -> None:
        for tried in (enter(fleet, host, "root"), enter_by_password(fleet, host, "root")):
            assert (tried.returncode, tried.stdout) == (255, "")
            assert "Permission denied" in tried.stderr

    def test_the_administrator_gets_in_by_key_alone(self, fleet: Fleet, host: str) -> None:
        assert enter(fleet, host, "admin").stdout == "admin\n"
        assert "Permission denied" in enter_by_password(fleet, host, "admin").stderr
        assert methods(fleet, host) == {"publickey"}

    @pytest.mark.parametrize(
        "option",
        [
            "KexAlgorithms=diffie-hellman-group14-sha256",
            "Ciphers=aes128-cbc",
            "MACs=hmac-sha1",
            "HostKeyAlgorithms=ecdsa-sha2-nistp256",
        ],
    )
    def test_a_weak_algorithm_is_refused(self, fleet: Fleet, host: str, option: str) -> None:
        # The ciphers that need no MAC of their own are best left out.
        ciphers = ("-o", "Ciphers=aes256-ctr") if option.startswith("MACs") else ()
        tried = enter(fleet, host, "admin", "-o", option, *ciphers)
        assert tried.returncode == 255
        assert "no matching" in tried.stderr

    def test_ssh_audit_finds_nothing(self, fleet: Fleet, host: str) -> None:
        address = f"{fleet.hosts[host]['ipv4']}:{port(host)}"
        done = subprocess.run(
            ["ssh-audit", "--json", "--skip-rate-test", address], capture_output=True, text=True, check=False
        )
        report = json.loads(done.stdout)
        notes = [entry.get("notes", {}) for part in ("kex", "key", "enc", "mac") for entry in report[part]]
        assert [note for found in notes for note in found.get("fail", [])] == []
        assert {note for found in notes for note in found.get("warn", [])} == NOT_OFFERED.get(host, set())

    def test_an_old_session_lives_on(self, host: str, old_sessions: dict[str, subprocess.Popen[str]]) -> None:
        assert answer(old_sessions[host]) == "root"


@pytest.mark.usefixtures("hardened")
def test_what_failed_is_counted_by_source_and_user(fleet: Fleet) -> None:
    """What the tests before this one have tried, and what a stranger tries now."""
    for host in HOSTS:
        assert enter(fleet, host, "stranger").returncode == 255
    tasks = [
        {"fleet.portknock.login_failures_info": {"since": "15m"}, "register": "found"},
        {
            "ansible.builtin.copy": {
                "content": "{{ found | to_json }}",
                "dest": "{{ playbook_dir }}/failures-{{ inventory_hostname }}",
            },
            "delegate_to": "localhost",
            "connection": "local",
            "become": False,
        },
    ]
    playbook = fleet.write("failures.yml", [{"hosts": "all", "gather_facts": False, "become": True, "tasks": tasks}])
    run = fleet.play(playbook, inventory=inventory(fleet))
    assert run.status == 0, run.output
    for host in HOSTS:
        found = json.loads((fleet.directory / f"failures-{host}").read_text())
        rows = {(row["source"], row["user"], row["invalid_user"]) for row in found["failures"]}
        gateway = fleet.description["gateway4"]
        assert {(gateway, "root", False), (gateway, "stranger", True)} <= rows, found
        assert found["read_from"] == ["journal"]


@pytest.mark.usefixtures("hardened")
def test_nothing_to_change_is_one_round_trip(fleet: Fleet) -> None:
    # A bare no of YAML's is false.
    variables = {"sshd_hardening_permit_root_login": False}
    run = harden(fleet, "-vvv", variables=variables, ANSIBLE_SSH_ARGS="-o ControlMaster=no")
    assert run.status == 0, run.output
    assert {host: numbers["changed"] for host, numbers in run.recap.items()} == dict.fromkeys(HOSTS, 0)
    assert run.output.count("SSH: EXEC ssh") == len(HOSTS)


@pytest.mark.usefixtures("hardened")
def test_what_a_hand_has_changed_is_shown_and_repaired(fleet: Fleet) -> None:
    fleet.execute("new", f"sed -i 's/^MaxAuthTries .*/MaxAuthTries 6/' {DROP_IN} && systemctl reload ssh")
    run = harden(fleet, "--diff", hosts="new")
    assert "-MaxAuthTries 6" in run.output
    assert "+MaxAuthTries 4" in run.output
    assert effective(fleet, "new", "maxauthtries") == "4"


@pytest.mark.usefixtures("hardened")
def test_settings_exceptions_and_what_is_left_to_the_host(fleet: Fleet) -> None:
    run = harden(
        fleet,
        variables={
            "sshd_hardening_settings": {"MaxSessions": 3, "AcceptEnv": ["ONE", "TWO"], "LoginGraceTime": None},
            "sshd_hardening_match": [{"criteria": "User guest", "settings": {"PasswordAuthentication": True}}],
        },
    )
    assert run.status == 0, run.output
    for host in HOSTS:
        assert effective(fleet, host, "maxsessions") == "3"
        assert {"ONE", "TWO"} <= set(effective(fleet, host, "acceptenv").split("\n"))
        assert effective(fleet, host, "logingracetime") == "120"
        assert methods(fleet, host, "guest") == {"publickey", "password"}
        assert methods(fleet, host) == {"publickey"}
    assert enter_by_password(fleet, "old", "guest").stdout == "guest\n"
    back = harden(fleet)
    assert {host: numbers["changed"] for host, numbers in back.recap.items()} == dict.fromkeys(HOSTS, 1)


@pytest.mark.usefixtures("hardened")
@pytest.mark.parametrize("host", ["old", "new"])
def test_sshd_that_systemd_starts_for_a_connection(fleet: Fleet, host: str) -> None:
    fleet.execute(host, "systemctl stop ssh.service; systemctl start ssh.socket")
    key = ("-i", str(fleet.directory / "id_ed25519"))
    session = subprocess.Popen(
        [*command(fleet, host, "admin", *key), "sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert answer(session) == "admin"
        run = harden(fleet, hosts=host, variables={"sshd_hardening_password_authentication": True})
        assert run.status == 0, run.output
        assert methods(fleet, host) == {"publickey", "password"}
        back = harden(fleet, hosts=host)
        assert back.recap[host]["changed"] == 1, back.output
        assert methods(fleet, host) == {"publickey"}
        assert harden(fleet, hosts=host).recap[host]["changed"] == 0
        assert answer(session) == "admin"
        assert failed_units(fleet, host) == ""
    finally:
        session.communicate("exit\n")
        fleet.execute(host, "systemctl stop ssh.socket ssh.service; systemctl start ssh.service")


@pytest.mark.usefixtures("hardened")
def test_taken_away_again(fleet: Fleet, before: dict[str, dict[str, str]]) -> None:
    run = soften(fleet)
    assert run.status == 0, run.output
    for host in HOSTS:
        assert differences(before[host], state(fleet, host)) == []
        assert enter(fleet, host, "root").stdout == "root\n"
        assert "password" in methods(fleet, host)
    assert {numbers["changed"] for numbers in soften(fleet).recap.values()} == {0}


def test_an_sshd_that_reads_no_drop_ins(fleet: Fleet) -> None:
    """A block at the top, and exceptions at the end, of the one file that it reads."""
    fleet.execute("web-1", "cd /etc/ssh && cp -p sshd_config /var/tmp/kept && sed -i '/^Include/d' sshd_config")
    fleet.execute("web-1", "printf 'Port 2222\\nMatch User nobody\\n  X11Forwarding yes\\n' >> /etc/ssh/sshd_config")
    earlier = state(fleet, "web-1")
    variables = {"sshd_hardening_match": [{"criteria": "User guest", "settings": {"PasswordAuthentication": True}}]}
    try:
        run = harden(fleet, hosts="web-1", variables=variables)
        assert run.status == 0, run.output
        assert "X11Forwarding is set otherwise for some connections" in " ".join(run.output.split())
        assert methods(fleet, "web-1") == {"publickey"}
        assert methods(fleet, "web-1", "guest") == {"publickey", "password"}
        assert effective(fleet, "web-1", "permitrootlogin") == "no"
        assert harden(fleet, hosts="web-1", variables=variables).recap["web-1"]["changed"] == 0
        assert soften(fleet, hosts="web-1").status == 0
        assert differences(earlier, state(fleet, "web-1")) == []
    finally:
        fleet.execute("web-1", "mv /var/tmp/kept /etc/ssh/sshd_config && systemctl reload ssh")


def test_an_administrator_is_made_where_there_was_only_root(fleet: Fleet) -> None:
    key = (fleet.directory / "id_ed25519.pub").read_text().strip()
    variables = {
        "sshd_hardening_admin_user": "keeper",
        "sshd_hardening_admin_create": True,
        "sshd_hardening_admin_keys": [key],
    }
    run = harden(fleet, user="root", hosts="new", variables=variables)
    assert run.status == 0, run.output
    assert "Set `ansible_user: keeper` for this host in the inventory" in " ".join(run.output.split())
    assert enter(fleet, "new", "keeper").stdout == "keeper\n"
    assert enter(fleet, "new", "root").returncode == 255
    assert harden(fleet, user="keeper", hosts="new", variables=variables).recap["new"]["changed"] == 0
    assert soften(fleet, hosts="new").status == 0


def test_the_last_step_of_the_fleet_s_playbook(fleet: Fleet) -> None:
    """Behind the gate, by the playbooks that come with the collection, and away again with the gate."""
    earlier = state(fleet, "old")
    path = inventory(fleet)
    arguments = ("--limit", "old")
    site = fleet.play("fleet.portknock.site", *arguments, inventory=path)
    assert site.status == 0, site.output
    assert fleet.judge("old") == []
    assert fleet.play("fleet.portknock.site", *arguments, inventory=path).recap["old"]["changed"] == 0
    # A change of one while both are there goes through the gate.
    changed = harden(fleet, hosts="old", variables={"sshd_hardening_max_auth_tries": 5})
    assert changed.recap["old"]["changed"] == 1, changed.output
    removed = fleet.play("fleet.portknock.remove", *arguments, inventory=path)
    assert removed.status == 0, removed.output
    assert differences(earlier, state(fleet, "old")) == []
