# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One secret in a vault instead of a keyring, through the role and the connection. The tests build on each other."""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess
from pathlib import Path

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._derivation import derive_sequence
from lab import FAMILIES, Fleet, Run

HOST = "web1"
SITE = "fleet.portknock.site"
FORMER = "{{ knock_secret | fleet.portknock.knock_sequence(host=inventory_hostname, generation=2) }}"
ENCRYPTED = {"knock_secret": "$ANSIBLE_VAULT;1.1;AES256\n3061"}
# What a boot loads, and what the kernel has.
GATE = "sha256sum /etc/fleet-portknock/*; nft -s list map inet fleet_portknock step"
NO_MASTER = "-o ControlMaster=no -o ControlPath=none"


class Controller:
    """The fleet's folder, with a secret beside the inventory."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.secret = secrets.token_hex(32)
        # What a service of the host waits on is in what is found there, whatever else it is used for.
        self.live = ""
        path = fleet.directory / "host_vars" / f"{HOST}.yml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"knock_secret: {self.secret}\n")
        subprocess.run(
            ["ansible-vault", "encrypt", str(path)], env=fleet.environment(), check=True, capture_output=True
        )

    def sequence(self, generation: int) -> list[str]:
        return [str(knock) for knock in derive_sequence(self.secret, HOST, generation=generation)]

    def play(self, playbook: str | Path, generation: int = 1, folder: Path | None = None, **variables: object) -> Run:
        """A run at -vvv that shows nothing of three generations."""
        run = self.fleet.play(
            playbook,
            *("-vvv", "--extra-vars", f"knock_generation={generation}"),
            inventory=folder / "inventory.yml" if folder else None,
            variables=variables,
            ANSIBLE_SSH_ARGS=NO_MASTER,
        )
        numbers = set(re.findall(r"(?<![\w.])\d{4,5}(?![\w.])", run.output))
        for number in (1, 2, 3):
            knocks = [knock for knock in self.sequence(number) if knock != self.live]
            assert not any(knock in run.output for knock in knocks)
            # One may stand there by chance, as a process id or a size.
            assert len(numbers & {knock.partition("/")[0] for knock in knocks}) < 2
        assert self.secret not in run.output
        return run

    def opens(self, generation: int) -> dict[str, tuple[str, str]]:
        """How the port looks without and with a generation's knock, from a source of its own for each family."""
        seen = {}
        for family in FAMILIES:
            (source,), target = self.fleet.sources.take(family), self.fleet.hosts[HOST][family]
            before, _knocked, after = self.fleet.outside(
                ["connect", source, target, 22],
                ["knock", source, target, self.sequence(generation)],
                ["connect", source, target, 22],
            )
            seen[family] = (before, after)
        return seen


OPENS = dict.fromkeys(FAMILIES, ("reset", "open"))
STAYS_CLOSED = dict.fromkeys(FAMILIES, ("reset", "reset"))


@pytest.fixture(scope="module")
def controller(fleet: Fleet) -> Controller:
    return Controller(fleet)


@pytest.fixture
def empty(fleet: Fleet) -> Path:
    """A folder of the inventory and its variables alone, as a checkout is."""
    folder = fleet.directory / "checkout"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(fleet.inventory, folder)
    for variables in ("group_vars", "host_vars"):
        shutil.copytree(fleet.directory / variables, folder / variables)
    return folder


def test_the_role_takes_the_expression(controller: Controller) -> None:
    first = controller.play(SITE)
    assert first.status == 0, first.output
    assert first.recap[HOST]["changed"]
    assert controller.fleet.knocks(HOST) == controller.sequence(1)
    again = controller.play(SITE)
    assert (again.status, again.recap[HOST]["changed"]) == (0, 0), again.output
    assert controller.opens(1) == OPENS


def test_a_controller_without_files_gets_in(controller: Controller, empty: Path) -> None:
    ping = controller.fleet.write("ping.yml", [{"hosts": "all", "gather_facts": False, "tasks": [{"ping": None}]}])
    run = controller.play(ping, folder=empty)
    assert run.status == 0, run.output
    assert "Knocked: open after" in run.output
    assert sorted(path.name for path in empty.iterdir()) == ["group_vars", "host_vars", "inventory.yml"]


def test_the_next_generation_rotates_and_a_live_port_is_a_warning(controller: Controller) -> None:
    controller.live = controller.sequence(2)[1]
    port, _slash, _proto = controller.live.partition("/")
    controller.fleet.execute(HOST, f"systemd-run --unit=live python3 -m http.server {port}")
    try:
        assert controller.opens(2) == STAYS_CLOSED
        run = controller.play(SITE, generation=2)
        assert run.status == 0, run.output
        assert run.recap[HOST]["changed"]
        assert "1 knock goes to a port on which a service of the host listens." in run.output.replace("\n", " ")
        again = controller.play(SITE, generation=2)
        assert (again.status, again.recap[HOST]["changed"]) == (0, 0), again.output
    finally:
        controller.fleet.execute(HOST, "systemctl stop live")
        controller.live = ""
    assert (controller.opens(1), controller.opens(2)) == (STAYS_CLOSED, OPENS)


def test_a_gate_that_the_connection_could_not_open_is_not_loaded(controller: Controller) -> None:
    before = controller.fleet.execute(HOST, GATE)
    run = controller.play(SITE, generation=3, knock_sequences=FORMER)
    assert run.status == 2
    assert "knock_sequences: expected a sequence that the gate is to honour" in run.output
    assert controller.fleet.execute(HOST, GATE) == before
    assert controller.opens(2) == OPENS


def test_an_empty_folder_takes_over_and_deploys(controller: Controller, empty: Path) -> None:
    refused = controller.play(SITE, generation=3, folder=empty)
    assert refused.status == 2
    assert "knock_server_adopt" in refused.output
    run = controller.play(SITE, generation=3, folder=empty, knock_server_adopt=True)
    assert run.status == 0, run.output
    assert (controller.opens(2), controller.opens(3)) == (STAYS_CLOSED, OPENS)


def test_a_secret_that_nothing_decrypted_is_refused(controller: Controller, empty: Path) -> None:
    run = controller.play(SITE, generation=3, folder=empty, **ENCRYPTED)
    assert run.status != 0
    assert "got text that Ansible's vault has encrypted and nothing decrypted." in run.output.replace("\n", " ")
