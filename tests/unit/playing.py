# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real runs of ansible-playbook that connect to no host."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from ansible_collections.fleet.portknock.plugins.plugin_utils import _keyring

COLLECTIONS = Path(_keyring.__file__).parents[5]


class Run:
    """One folder with an inventory, a vault password and a playbook."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ring = folder / "knock_keyring"
        (folder / "hosts").write_text("[all]\nweb1\nweb2\n")
        (folder / "ansible.cfg").write_text("[defaults]\n")
        (folder / "password").write_text("the password of the tests\n")

    def __call__(
        self,
        arguments: dict[str, Any] | list[dict[str, Any]],
        *options: str,
        inventory: str = "hosts",
        vaulted: bool = True,
        **environ: str,
    ) -> str:
        """Run knock_keyring, once for each set of arguments; return all that was printed."""
        every = arguments if isinstance(arguments, list) else [arguments]
        tasks = [{"fleet.portknock.knock_keyring": one} for one in every]
        return self.tasks(tasks, *options, inventory=inventory, vaulted=vaulted, **environ)

    def tasks(self, tasks: list[dict[str, Any]], *options: str, **more: Any) -> str:
        """Run tasks on all hosts; return all that was printed."""
        (self.folder / "play.yml").write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
        return self.play("play.yml", *options, **more)

    def play(self, playbook: str, *options: str, inventory: str = "hosts", vaulted: bool = True, **environ: str) -> str:
        """Run a playbook; return all that was printed."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "KNOCK_"))}
        environment.update(
            ANSIBLE_COLLECTIONS_PATH=str(COLLECTIONS),
            ANSIBLE_HOME=str(self.folder / "ansible"),
            ANSIBLE_NOCOLOR="1",
            ANSIBLE_CONFIG=str(self.folder / "ansible.cfg"),
            COLUMNS="10000",
            **environ,
        )
        secret = ["--vault-password-file", "password"] if vaulted else []
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", inventory, playbook]
        done = subprocess.run(
            [*command, *secret, *options],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.stdout

    def view(self, host: str) -> str:
        """What plain ansible-vault shows."""
        command = [str(Path(sys.executable).with_name("ansible-vault")), "view", "--vault-password-file", "password"]
        return subprocess.run(
            [*command, str(self.ring / f"{host}.yml")], cwd=self.folder, capture_output=True, text=True, check=True
        ).stdout


def counts(printed: str) -> dict[str, tuple[int, int]]:
    """Each host's changed and failed."""
    lines = re.findall(r"^(\S+)\s+: ok=\d+\s+changed=(\d+).*failed=(\d+)", printed, re.MULTILINE)
    return {host: (int(changed), int(failed)) for host, changed, failed in lines}
