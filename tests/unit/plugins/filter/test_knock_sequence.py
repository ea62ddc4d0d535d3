# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter, by itself and in a real run of ansible-playbook; no host is connected to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleTemplatePluginError
from ansible_collections.fleet.portknock.plugins.filter.knock_sequence import DOCUMENTATION, knock_sequence
from ansible_collections.fleet.portknock.plugins.module_utils import _derivation
from ansible_collections.fleet.portknock.plugins.module_utils._derivation import derive_sequence

SECRET = "0f1e2d3c4b5a69788796a5b4c3d2e1f00112233445566778899aabbccddeeff0"
COLLECTIONS = Path(_derivation.__file__).parents[5]
WEB1 = ["61361/tcp", "53824/tcp", "63111/tcp", "46735/tcp"]
BIN = Path(sys.executable).parent

FINE = {
    "encrypted | fleet.portknock.knock_sequence(host=inventory_hostname)": WEB1,
    "plain | fleet.portknock.knock_sequence(host='web1')": WEB1,
    "(plain ~ '\n') | fleet.portknock.knock_sequence(host='web1', protected_ports=['22/tcp', '443/tcp'])": WEB1,
    "encrypted | fleet.portknock.knock_sequence(host='web1', operator='alice', generation='7', length=5, protocols=mine, "
    "protected_ports=['22/tcp', '51820/udp'])": [
        str(knock)
        for knock in derive_sequence(SECRET, "web1", "alice", 7, length=5, protocols=["tcp", "udp"], protected={51820})
    ],
}
REFUSED = {
    "undecrypted | fleet.portknock.knock_sequence(host='web1')": "secret: expected a random text of at least 16 bytes, "
    "such as openssl rand -hex 32 prints; got text that Ansible's vault has encrypted and nothing decrypted.",
    "encrypted[:15] | fleet.portknock.knock_sequence(host='web1')": "got 15 bytes.",
    "[encrypted] | fleet.portknock.knock_sequence(host='web1')": "got a list.",
    "encrypted | fleet.portknock.knock_sequence(host=[encrypted])": "host: expected the host's name in the inventory; got "
    "a list.",
    "encrypted | fleet.portknock.knock_sequence(host='web1', operator=[encrypted])": "operator: expected a name",
    "encrypted | fleet.portknock.knock_sequence(host='web1', generation=0)": "generation: expected a whole number",
    "encrypted | fleet.portknock.knock_sequence(host='web1', length=2)": "length: expected a whole number from 3 to 16",
    "encrypted | fleet.portknock.knock_sequence(host='web1', protocols='x')": "protocols: expected a list of tcp, udp",
    "encrypted | fleet.portknock.knock_sequence(host='web1', protected_ports=[22])": "protected_ports: expected",
    "encrypted | fleet.portknock.knock_sequence": "host",
    "encrypted | fleet.portknock.knock_sequence('web1')": "positional",
}


def ansible(folder: Path, *command: str, given: str | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "KNOCK_"))}
    environment.update(
        ANSIBLE_COLLECTIONS_PATH=str(COLLECTIONS),
        ANSIBLE_HOME=str(folder / "ansible"),
        ANSIBLE_NOCOLOR="1",
        ANSIBLE_VAULT_PASSWORD_FILE=str(folder / "password"),
        COLUMNS="10000",
    )
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=folder,
        env=environment,
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The result of a task for each expression, and everything that the run printed at -vvv."""
    folder = tmp_path_factory.mktemp("rendered")
    (folder / "password").write_text("the password of the tests\n")
    # As a person does it: the line's end is encrypted, too.
    encrypted = ansible(folder, "ansible-vault", "encrypt_string", "--stdin-name", "encrypted", given=f"{SECRET}\n")
    encrypted = encrypted[encrypted.index("encrypted: ") :]
    text = encrypted.replace("encrypted: !vault |", "undecrypted: |")
    (folder / "vars.yml").write_text(f"plain: {SECRET}\nmine: [udp, tcp]\n{encrypted}\n{text}\n")
    expressions = [*FINE, *REFUSED]
    # What is as it should be would be printed.
    tasks: list[dict[str, Any]] = [
        {
            "debug": {"msg": f"{{{{ {expression} }}}}"},
            "register": f"result{number}",
            "ignore_errors": True,
            "no_log": expression in FINE,
        }
        for number, expression in enumerate(expressions)
    ]
    names = ", ".join(f"result{number}" for number in range(len(expressions)))
    write = {"content": f"{{{{ [{names}] | map(attribute='msg') | to_json }}}}", "dest": str(folder / "results")}
    tasks.append({"copy": write, "no_log": True})
    play = {"hosts": "all", "gather_facts": False, "connection": "local", "vars_files": ["vars.yml"], "tasks": tasks}
    (folder / "play.yml").write_text(json.dumps([play]))
    python = f"ansible_python_interpreter={sys.executable}"
    printed = ansible(folder, "ansible-playbook", "-i", "web1,", "-e", python, "-vvv", "play.yml")
    return dict(zip(expressions, json.loads((folder / "results").read_text()))), printed


@pytest.mark.parametrize("expression", FINE)
def test_in_a_template(rendered: tuple[dict[str, Any], str], expression: str) -> None:
    assert rendered[0][expression] == FINE[expression]


@pytest.mark.parametrize("expression", REFUSED)
def test_an_error_says_what_is_wrong(rendered: tuple[dict[str, Any], str], expression: str) -> None:
    assert REFUSED[expression] in rendered[0][expression]


def test_neither_the_secret_nor_a_port_is_printed(rendered: tuple[dict[str, Any], str]) -> None:
    printed = rendered[1]
    assert "generation: expected a whole number" in printed
    assert SECRET[:15] not in printed
    assert not any(knock.partition("/")[0] in printed for knock in WEB1)


def test_a_protected_port_is_in_no_sequence() -> None:
    found = knock_sequence(SECRET, host="web1", protected_ports=["53824/tcp", "46735/udp"])
    assert found == ["46691/tcp", "61361/tcp", "63111/tcp", "21113/tcp"]


def test_the_error_stands_alone() -> None:
    with pytest.raises(AnsibleTemplatePluginError) as caught:
        knock_sequence("short", host="web1")
    assert caught.value.__suppress_context__


def test_the_documented_defaults_are_those_that_apply() -> None:
    options = yaml.safe_load(DOCUMENTATION)["options"]
    documented = {name: option["default"] for name, option in options.items() if "default" in option}
    assert knock_sequence(SECRET, host="web1", **documented) == knock_sequence(SECRET, host="web1") == WEB1
    assert sorted(documented) == ["generation", "length", "operator", "protected_ports", "protocols"]
