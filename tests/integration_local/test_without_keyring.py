# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A controller without files: what opens is in a variable, given or derived, and there is no keyring."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._derivation import derive_sequence
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock

from . import conftest as acc
from .conftest import Lab, Outcome

SECRET = "5b0ad2d6f8c94e17a3650f1e8d7b29c4"
NO_PERSIST = "-F none -o ControlMaster=no -o UserKnownHostsFile=/dev/null"
RIGHT, STALE, RETIRED = ([str(knock) for knock in knocks] for knocks in (acc.RIGHT, acc.STALE, acc.RETIRED))
EXPRESSION = "{{ knock_secret | fleet.portknock.knock_sequence(host=inventory_hostname, generation=%s, length=3) }}"
WHAT_ARGV_SHOWED = 'cat /proc/[0-9]*/cmdline 2>/dev/null | tr "\\\\0" "\\\\n"'


@pytest.fixture(autouse=True)
def no_keyring(lab: Lab) -> Path:
    folder = lab.folder / "knock_keyring"
    shutil.rmtree(folder)
    return folder


def derived(host: str, generation: int = 1) -> tuple[Knock, ...]:
    return derive_sequence(SECRET, host, generation=generation, length=3)


def leaks(text: str, *sequences: tuple[Knock, ...]) -> list[str]:
    """What of these, or of the namespace's own sequences, a text gives away."""
    ports = {str(knock.port) for knocks in sequences for knock in knocks}
    found = re.findall(r"(?<![\w.-])\d{4,5}(?![\w-]|\.\d)", text)
    return sorted(ports & set(found)) + acc.SECRETS.findall(text) + re.findall(SECRET, text)


def given(lab: Lab, sequences: object, *arguments: str, **environment: str) -> Outcome:
    (lab.folder / "vars.json").write_text(json.dumps({"knock_sequences": sequences}))
    outcome = lab.adhoc(
        *("-m", "raw", "-a", "echo arrived", "-e", "@vars.json", "-vvv", *arguments), vault=False, **environment
    )
    assert not leaks(outcome.output)
    return outcome


def honour(lab: Lab, knocks: tuple[Knock, ...]) -> None:
    """A gate that another sequence of three knocks opens."""
    lab.gate()
    rules = lab.inside("nft", "list", "table", "inet", "gate")
    for former, knock in zip(acc.RIGHT, knocks):
        rules = rules.replace(f"{former.proto} dport {former.port}", f"{knock.proto} dport {knock.port}")
    lab.inside("nft", "-f", "-", given="flush ruleset\n" + rules)


def keep_secret(lab: Lab, *more: str, knock_sequences: Any) -> None:
    """In the inventory's group variables, with the secret encrypted as a person would."""
    (lab.folder / "secret.yml").write_text(f"{SECRET}\n")
    command = f"{Path(acc._tool('ansible-vault'))} encrypt_string --vault-password-file vault --stdin-name knock_secret"
    encrypted = acc.run("sh", "-ec", f"cd {lab.folder} && {command} <secret.yml")
    (lab.folder / "secret.yml").unlink()
    lab.inventory(*more)
    lines = (lab.folder / "group_vars" / "all").read_text()
    (lab.folder / "group_vars" / "all").unlink()
    (lab.folder / "group_vars" / "all.yml").write_text(
        f"{lines}{encrypted}\nknock_sequences: {json.dumps(knock_sequences)}\n"
    )


@pytest.mark.parametrize(
    "sequences", [RIGHT, [RIGHT], [STALE, RIGHT], [STALE, STALE, RIGHT]], ids=["one", "list", "next", "again"]
)
@pytest.mark.parametrize("arguments", ["", NO_PERSIST], ids=["master", "no master"])
def test_a_given_sequence_opens(lab: Lab, no_keyring: Path, sequences: object, arguments: str) -> None:
    environment = {"ANSIBLE_SSH_ARGS": arguments} if arguments else {}
    outcome = given(lab, sequences, **environment)
    assert outcome.code == 0, outcome.output
    assert "arrived" in outcome.output
    assert lab.knocks == 1, outcome.output
    assert not no_keyring.exists()


def test_later_connections_repeat_what_worked(lab: Lab) -> None:
    (lab.folder / "vars.json").write_text(json.dumps({"knock_sequences": [STALE, RIGHT]}))
    outcome = lab.play(
        "- hosts: web1\n  gather_facts: false\n  tasks:\n    - raw: 'true'\n      loop: '{{ range(5) | list }}'\n",
        *("-e", "@vars.json", "-vvv"),
        ANSIBLE_SSH_ARGS=NO_PERSIST,
    )
    assert outcome.code == 0, outcome.output
    # Only the first one is preceded by a look.
    assert (lab.knocks, lab.count("connections")) == (5, 6)
    assert not leaks(outcome.output)


def test_it_comes_before_the_keyring(lab: Lab) -> None:
    path = lab.keep(encrypted=False)
    path.write_text("damaged")
    assert given(lab, RIGHT).code == 0


def test_without_a_value_it_is_the_keyring(lab: Lab) -> None:
    lab.keep()
    outcome = lab.adhoc("-m", "raw", "-a", "true", "-e", '{"knock_sequences": null}')
    assert outcome.code == 0, outcome.output
    assert lab.knocks == 1


@pytest.mark.parametrize("sequences", [STALE, [STALE, RETIRED]])
def test_a_wrong_one_gives_the_error_of_ssh_and_a_hint(lab: Lab, sequences: object) -> None:
    outcome = given(lab, sequences, "-e", "knock_timeout=0.6")
    assert outcome.code != 0
    assert f"connect to host {acc.SERVER4} port 22: Connection refused" in outcome.output
    assert "The knock did not open port 22: reset after" in outcome.output


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "expected a sequence, which is a list of port/protocol, or a list of sequences; got an empty list."),
        ([[]], "expected at least one knock in each sequence; got an empty list."),
        (
            RIGHT[0],
            "expected a sequence, which is a list of port/protocol, or a list of sequences; got another type.",
        ),
        (
            {"web1": RIGHT},
            "expected a sequence, which is a list of port/protocol, or a list of sequences; got another type.",
        ),
        (
            [*RIGHT[:2], "48396/tpc"],
            "expected port/protocol, a port from 1 to 65535 and tcp or udp (or bytes/icmp, 1 to 65507), such as 22/tcp; got",
        ),
        (
            [*RIGHT, RIGHT],
            "expected port/protocol, a port from 1 to 65535 and tcp or udp (or bytes/icmp, 1 to 65507), such as 22/tcp; got",
        ),
        ([RIGHT, *RIGHT], "expected a list such as [22/tcp]; got another type."),
        ([*RIGHT, RIGHT[0]], "expected each port once; got one twice."),
    ],
)
def test_what_is_no_sequence_is_not_repeated(lab: Lab, sequences: object, message: str) -> None:
    outcome = given(lab, sequences)
    assert outcome.code != 0
    assert f"knock_sequences: {message}" in outcome.output.replace("\n", " ")
    assert lab.knocks == 0


def test_the_vaulted_expression_opens_and_shows_nothing(lab: Lab) -> None:
    honour(lab, derived("web1", 2))
    keep_secret(lab, knock_sequences=[EXPRESSION % 3, EXPRESSION % 2])
    outcome = lab.play(
        "- hosts: web1\n  gather_facts: false\n  tasks:\n"
        "    - raw: 'true'\n"
        f"    - shell: {json.dumps(WHAT_ARGV_SHOWED)}\n      delegate_to: localhost\n      connection: local\n"
        "    - ping:\n",
        "-vvv",
    )
    assert outcome.code == 0, outcome.output
    # The run's own arguments, so the processes' have been seen.
    assert "--vault-password-file" in outcome.output
    assert not leaks(outcome.output, derived("web1", 2), derived("web1", 3))
    for path in lab.folder.rglob("*"):
        assert not path.is_file() or not leaks(path.read_text(errors="replace"), derived("web1", 2), derived("web1", 3))


def test_a_delegated_task_knocks_with_the_other_hosts_sequence(lab: Lab) -> None:
    honour(lab, derived("web1"))
    keep_secret(lab, f"web2 ansible_host={acc.ABSENT4}", knock_sequences=EXPRESSION % 1)
    own = derived("web2")[0]
    lab.inside("nft", "add", "counter", "inet", "gate", "foreign")
    lab.inside("nft", f"insert rule inet gate input {own.proto} dport {own.port} counter name foreign")
    outcome = lab.play(
        "- hosts: web2\n  gather_facts: false\n  tasks:\n"
        "    - raw: 'true'\n      delegate_to: '{{ item }}'\n      loop: [web1]\n"
        "    - debug: {var: inventory_hostname}\n",
        "-vvv",
    )
    assert outcome.code == 0, outcome.output
    assert (lab.count("foreign"), lab.knocks) == (0, 1)
    assert '"inventory_hostname": "web2"' in outcome.output
    assert not leaks(outcome.output, derived("web1"), derived("web2"))


def test_the_knock_as_a_task_takes_it_too(lab: Lab) -> None:
    (lab.folder / "vars.json").write_text(json.dumps({"knock_sequences": [STALE, RIGHT]}))
    play = "- hosts: web1\n  gather_facts: false\n  tasks:\n    - fleet.portknock.knock: {expect: open}\n"
    outcome = lab.play(play, "-e", "@vars.json", "-e", "ansible_connection=local", "-vvv")
    assert outcome.code == 0, outcome.output
    assert lab.knocks == 1
    assert not leaks(outcome.output)
    assert "48396" not in outcome.output
    lab.gate()
    (lab.folder / "vars.json").write_text(json.dumps({"knock_sequences": STALE}))
    outcome = lab.play(play.replace("open}", "open, timeout: 0.5}"), "-e", "@vars.json", "-vvv")
    assert f"expect: expected port 22 of {acc.SERVER4} to be open; got reset after 0.5 s and " in outcome.output
    assert not leaks(outcome.output)
