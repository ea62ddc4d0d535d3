# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The connection against a closed host, run by the real commands."""

from __future__ import annotations

import json

import pytest

from . import conftest as acc
from .conftest import Lab

NO_PERSIST = "-F none -o ControlMaster=no -o UserKnownHostsFile=/dev/null"


def test_one_knock_for_many_calls(lab: Lab) -> None:
    outcome = lab.play(
        "- hosts: web1\n  gather_facts: false\n  tasks:\n"
        "    - raw: 'true'\n      loop: '{{ range(25) | list }}'\n"
        "    - raw: 'true'\n      loop: '{{ range(26) | list }}'\n",
        "-vvv",
    )
    assert outcome.code == 0, outcome.output
    assert (outcome.ssh_calls, lab.knocks) == (51, 1)
    # The look that saw the port open, and ssh's own.
    assert lab.count("connections") == 2
    assert not acc.SECRETS.search(outcome.output)


@pytest.mark.parametrize(
    ("method", "pipelining"), [("sftp", "true"), ("sftp", "false"), ("scp", "false"), ("piped", "false")]
)
def test_one_knock_for_each_connection_without_a_master(lab: Lab, method: str, pipelining: str) -> None:
    (lab.folder / "file").write_text("content\n")
    outcome = lab.adhoc(
        *("-m", "copy", "-a", f"src=file dest={lab.folder}/copied", "-vvv"),
        ANSIBLE_SSH_ARGS=NO_PERSIST,
        ANSIBLE_PIPELINING=pipelining,
        ANSIBLE_SSH_TRANSFER_METHOD=method,
    )
    assert outcome.code == 0, outcome.output
    assert (lab.folder / "copied").read_text() == "content\n"
    assert lab.knocks == outcome.ssh_calls > 2
    # Only the first one is preceded by a look.
    assert lab.count("connections") == outcome.ssh_calls + 1
    assert not acc.SECRETS.search(outcome.output)


@pytest.mark.parametrize("method", ["sftp", "scp", "piped"])
def test_transfers_over_a_master(lab: Lab, method: str) -> None:
    outcome = lab.adhoc(
        *("-m", "fetch", "-a", f"src=/proc/version dest={lab.folder}/ flat=true", "-vvv"),
        ANSIBLE_SSH_TRANSFER_METHOD=method,
    )
    assert outcome.code == 0, outcome.output
    assert lab.knocks == 1


def test_a_knock_that_got_lost_is_made_good(lab: Lab) -> None:
    """Every second knock is lost on the way, so that what worked for the first connection fails for the next."""
    lab.gate(extra=f"tcp dport {acc.RIGHT[0].port} numgen inc mod 2 1 drop")
    forget = "; ".join(f"flush set inet gate {name}" for name in ("one4", "two4", "open4"))
    close = f"ip netns exec {lab.namespace} nft '{forget}'"
    outcome = lab.play(
        "- hosts: web1\n  gather_facts: false\n  tasks:\n"
        "    - raw: 'true'\n"
        f"    - command: {close}\n      delegate_to: localhost\n      connection: local\n"
        "    - raw: echo arrived\n",
        "-vvv",
        ANSIBLE_SSH_ARGS=NO_PERSIST,
    )
    assert outcome.code == 0, outcome.output
    assert "arrived" in outcome.output
    # Two runs of ssh by Ansible; one more by the connection, after the refused one.
    assert outcome.ssh_calls == 3
    assert not acc.SECRETS.search(outcome.output)


def test_a_command_that_talks_like_ssh_runs_once(lab: Lab) -> None:
    command = f"echo ran >> {lab.folder}/log; echo 'ssh: connect to host elsewhere port 22: refused' >&2; exit 255"
    outcome = lab.play(
        "- hosts: web1\n  gather_facts: false\n  tasks:\n    - raw: 'true'\n"
        f"    - raw: {json.dumps(command)}\n      ignore_unreachable: true\n",
        ANSIBLE_SSH_ARGS=NO_PERSIST,
        ANSIBLE_SSH_USETTY="false",
    )
    assert (lab.folder / "log").read_text() == "ran\n", outcome.output


def test_reset_and_wait(lab: Lab) -> None:
    outcome = lab.play(
        "- hosts: web1\n  gather_facts: false\n  tasks:\n"
        "    - raw: 'true'\n"
        "    - meta: reset_connection\n"
        "    - raw: 'true'\n"
        "    - wait_for_connection: {timeout: 20}\n"
        "    - meta: reset_connection\n",
        "-vvv",
    )
    assert outcome.code == 0, outcome.output
    # wait_for_connection resets the connection by itself.
    assert lab.knocks == 3
    assert not acc.SECRETS.search(outcome.output)


@pytest.mark.parametrize("closed", ["reject with tcp reset", "drop"])
def test_the_next_sequence_is_tried(lab: Lab, closed: str) -> None:
    lab.gate(closed)
    lab.keep(("retired", acc.operator(acc.RETIRED, active=False)), ("alice", acc.operator(acc.STALE, acc.RIGHT)))
    outcome = lab.adhoc("-m", "raw", "-a", "true")
    assert outcome.code == 0, outcome.output
    assert lab.knocks == 1


def test_the_operator_is_chosen(lab: Lab) -> None:
    lab.keep(("bob", acc.operator(acc.STALE)), ("alice", acc.operator(acc.RIGHT)))
    assert lab.adhoc("-m", "raw", "-a", "true", "-e", "knock_operator=alice").code == 0
    assert lab.knocks == 1
    outcome = lab.adhoc("-m", "raw", "-a", "true", "-e", "knock_operator=carol", ANSIBLE_SSH_ARGS=NO_PERSIST)
    assert outcome.code != 0
    assert (
        "knock_operator: expected an operator that the keyring knows on web1 (bob, alice); got 'carol'."
        in outcome.output
    )


def test_ipv6(lab: Lab) -> None:
    assert lab.adhoc("-m", "raw", "-a", "true", "-e", f"ansible_host={acc.SERVER6}").code == 0
    assert lab.knocks == 1


def test_a_delegated_task_knocks_with_the_other_hosts_entry(lab: Lab) -> None:
    lab.inventory(*(f"peer{number} ansible_host={acc.ABSENT4}" for number in range(8)))
    outcome = lab.play(
        "- hosts: peer*\n  gather_facts: false\n  tasks:\n    - raw: 'true'\n      delegate_to: web1\n",
        "--forks=8",
    )
    assert outcome.code == 0, outcome.output
    assert lab.knocks >= 1


def test_alias_and_port_of_ssh_config(lab: Lab) -> None:
    (lab.folder / "config").write_text(f"Host shop\n  HostName {acc.SERVER4}\n  Port {acc.PORT}\n")
    lab.variables["ansible_ssh_common_args"] = f"-F {lab.folder}/config"
    lab.inventory()
    outcome = lab.adhoc(
        *("-m", "raw", "-a", "true", "-e", "ansible_host=shop", "-vvv"),
        ANSIBLE_SSH_ARGS="-o ControlMaster=auto -o ControlPersist=30s -o UserKnownHostsFile=/dev/null",
    )
    assert outcome.code == 0, outcome.output
    assert lab.knocks == 1


def test_no_knock_through_a_foreign_command(lab: Lab) -> None:
    outcome = lab.adhoc("-m", "raw", "-a", "true", "--ssh-common-args=-o ProxyCommand=/bin/false")
    assert "web1 is reached through a ProxyCommand: a knock from here" in outcome.output.replace("\n", " ")
    assert "UNREACHABLE" in outcome.output
    assert lab.knocks == 0


@pytest.mark.parametrize("folder", [True, False])
def test_without_an_entry_it_is_plain_ssh(lab: Lab, folder: bool) -> None:
    entry = lab.folder / "knock_keyring" / "web1.yml"
    entry.rename(entry.with_name("web2.yml"))
    if not folder:
        entry.parent.rename(lab.folder / "elsewhere")
    outcome = lab.adhoc("-m", "raw", "-a", "true", vault=False)
    assert "UNREACHABLE" in outcome.output
    assert f"connect to host {acc.SERVER4} port 22: Connection refused" in outcome.output
    assert lab.knocks == 0


def test_without_a_folder_it_is_plain_ssh(lab: Lab) -> None:
    variables = [part for name, value in lab.variables.items() for part in ("-e", f"{name}={value}")]
    outcome = lab.ansible("ansible", "all", "-i", f"{acc.SERVER4},", "-m", "raw", "-a", "true", *variables, vault=False)
    assert "Connection refused" in outcome.output
    assert "knock_keyring_dir" not in outcome.output


def test_missing_vault_secret(lab: Lab) -> None:
    outcome = lab.adhoc("-m", "raw", "-a", "true", vault=False)
    assert outcome.code != 0
    assert "web1.yml: expected a vault secret to decrypt it with; got none." in outcome.output.replace("\n", " ")
    assert lab.knocks == 0


def test_damaged_entry(lab: Lab) -> None:
    path = lab.keep(encrypted=False)
    path.write_text(path.read_text().replace("48396/tcp", "48396/tpc"))
    outcome = lab.adhoc("-m", "raw", "-a", "true", "-vvv", "-e", "knock_keyring_plaintext=true")
    assert outcome.code != 0
    assert "web1.yml" in outcome.output
    assert "UNREACHABLE" not in outcome.output
    assert not acc.SECRETS.search(outcome.output)


def test_a_host_that_is_down_is_unreachable_and_the_others_go_on(lab: Lab) -> None:
    lab.inventory(f"web2 ansible_host={acc.ABSENT4}")
    lab.keep(host="web2")
    outcome = lab.adhoc("-m", "raw", "-a", "echo arrived", "-v", "-T", "4", hosts="web1,web2")
    assert "web1 | CHANGED" in outcome.output
    assert "web2 | UNREACHABLE!" in outcome.output
    assert f"connect to host {acc.ABSENT4} port 22: " in outcome.output


def test_a_stale_keyring_gives_the_error_of_ssh_and_a_hint(lab: Lab) -> None:
    lab.keep(("default", acc.operator(acc.STALE)))
    outcome = lab.adhoc("-m", "raw", "-a", "true", "-vvv", "-e", "knock_timeout=0.3")
    assert f"connect to host {acc.SERVER4} port 22: Connection refused" in outcome.output
    assert "The knock did not open port 22: reset after" in outcome.output
    assert not acc.SECRETS.search(outcome.output)


FRESH_ACTION = """
from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):
    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        self._connection.exec_command("true")
        self._connection.fresh = True
        code, out, err = self._connection.exec_command("echo $SSH_CONNECTION")
        self._connection.put_file("/etc/hostname", "/dev/null")
        self._connection.fresh = False
        self._connection.exec_command("true")
        where = self._connection.destination()
        result.update(code=code, client=out.decode().split()[0], host=where.host, port=where.port)
        return result
"""


def test_fresh_connections_leave_the_master_alone(lab: Lab) -> None:
    (lab.folder / "action_plugins").mkdir()
    (lab.folder / "library").mkdir()
    (lab.folder / "action_plugins" / "fresh.py").write_text(FRESH_ACTION)
    (lab.folder / "library" / "fresh.py").write_text("")
    outcome = lab.play("- hosts: web1\n  gather_facts: false\n  tasks:\n    - fresh:\n", "-vvv")
    assert outcome.code == 0, outcome.output
    commands = [line for line in outcome.output.splitlines() if "SSH: EXEC " in line]
    fresh = [line for line in commands if "ControlPath=none" in line]
    assert (len(commands), len(fresh), lab.knocks) == (4, 2, 3)
    for line in fresh:
        assert line.split("SSH: EXEC ")[1].split()[1:5] == ["-o", "ControlMaster=no", "-o", "ControlPath=none"]
        assert line.count("ControlPath") == 1
