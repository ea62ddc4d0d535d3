# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One secret in a vault instead of a keyring, through the role and the connection. The tests build on each other."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from deriving import OPENS, SITE, STAYS_CLOSED, Deriving
from lab import RUN_SECONDS, Fleet, Run, recap_of

HOST = "web1"
ONLY = "{{{{ knock_secret | fleet.portknock.knock_sequence(host=inventory_hostname, generation={}) }}}}"
PING = "ping.yml"
ENCRYPTED = {"knock_secret": "$ANSIBLE_VAULT;1.1;AES256\n3061"}
# What a boot loads, and what the kernel has.
GATE = "sha256sum /etc/fleet-portknock/*; nft -s list map inet fleet_portknock step"
NO_MASTER = "-o ControlMaster=no -o ControlPath=none"


class Controller(Deriving):
    """The fleet's folder, with a secret beside the inventory."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet, HOST)
        path = fleet.directory / "host_vars" / f"{HOST}.yml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(self.encrypted_secret())

    def play(self, playbook: str | Path, generation: int = 1, folder: Path | None = None, **variables: object) -> Run:
        """A run at -vvv that shows nothing of any generation."""
        run = self.fleet.play(
            playbook,
            *("-vvv", "--limit", HOST, "--extra-vars", f"knock_generation={generation}"),
            inventory=folder / "inventory.yml" if folder else None,
            variables=variables,
            ANSIBLE_SSH_ARGS=NO_MASTER,
        )
        self.check(run.output)
        return run


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
    controller.fleet.write(PING, [{"hosts": "all", "gather_facts": False, "tasks": [{"ping": None}]}])
    run = controller.play(PING, folder=empty)
    assert run.status == 0, run.output
    assert "Knocked: open after" in run.output
    assert sorted(path.name for path in empty.iterdir()) == ["group_vars", "host_vars", "inventory.yml"]


def test_during_the_grace_period_two_generations_open(controller: Controller) -> None:
    """Whoever knows only one of them gets in; a live port in the new one is a warning."""
    controller.live = controller.sequence(2)[1]
    port, _slash, _proto = controller.live.partition("/")
    controller.fleet.execute(HOST, f"systemd-run --unit=live python3 -m http.server {port}")
    try:
        assert controller.opens(2) == STAYS_CLOSED
        run = controller.play(SITE, generation=2, knock_grace=True)
        assert run.status == 0, run.output
        assert run.recap[HOST]["changed"]
        assert "1 knock goes to a port on which a service of the host listens." in run.output.replace("\n", " ")
        since = controller.fleet.secrets(HOST)["operators"]["default"]["both_since"]
        again = controller.play(SITE, generation=2, knock_grace=True)
        assert (again.status, again.recap[HOST]["changed"]) == (0, 0), again.output
        assert controller.fleet.secrets(HOST)["operators"]["default"]["both_since"] == since
    finally:
        controller.fleet.execute(HOST, "systemctl stop live")
        controller.live = ""
    assert (controller.opens(1), controller.opens(2)) == (OPENS, OPENS)
    for number in (1, 2):
        ping = controller.play(PING, knock_sequences=ONLY.format(number))
        assert ping.status == 0, ping.output
        assert "Knocked: open after" in ping.output


def test_afterwards_the_new_generation_opens_alone(controller: Controller) -> None:
    """Which the host itself is asked to prove, over ssh."""
    run = controller.play(SITE, generation=2, knock_server_proof="host")
    assert run.status == 0, run.output
    assert run.recap[HOST]["changed"]
    assert f'"seen_from": "{HOST}"' in run.output
    assert (controller.opens(1), controller.opens(2)) == (STAYS_CLOSED, OPENS)
    assert "both_since" not in controller.fleet.secrets(HOST)["operators"]["default"]


def test_a_gate_that_the_connection_could_not_open_is_not_loaded(controller: Controller) -> None:
    before = controller.fleet.execute(HOST, GATE)
    run = controller.play(SITE, generation=3, knock_sequences=ONLY.format(2))
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


class Runner:
    """ansible-runner with a private data folder that holds an inventory and nothing else, as a job's container does."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.folder = controller.fleet.directory / "runner"

    def empty(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        inventory = self.folder / "inventory"
        inventory.mkdir(parents=True)
        fleet = self.controller.fleet
        shutil.copy(fleet.inventory, inventory / "hosts.yml")
        for variables in ("group_vars", "host_vars"):
            shutil.copytree(fleet.directory / variables, inventory / variables)

    def play(self, name: str, generation: int, **variables: object) -> Run:
        """A run at -vvv; neither what it shows nor what the runner keeps of it gives anything away."""
        given = {"knock_generation": generation, "knock_keyring_dir": str(self.folder / "keyring"), **variables}
        words = ["-vvv", "--limit", HOST, "--extra-vars", json.dumps(given)]
        argv = [
            "ansible-runner",
            "run",
            str(self.folder),
            "-p",
            SITE,
            "--ident",
            name,
            f"--cmdline={shlex.join(words)}",
        ]
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.controller.fleet.environment(ANSIBLE_SSH_ARGS=NO_MASTER),
            timeout=RUN_SECONDS,
            check=False,
        )
        kept = [path for path in self.folder.glob("artifacts/**/*") if path.is_file()]
        assert len(kept) > 10
        for text in (done.stdout, *(path.read_text(errors="replace") for path in kept)):
            self.controller.check(text)
        return Run(done.returncode, done.stdout, recap_of(done.stdout))


def test_a_job_s_empty_folder_deploys_and_rotates(controller: Controller) -> None:
    runner = Runner(controller)
    runner.empty()
    first = runner.play("first", 3, knock_server_adopt=True)
    assert first.status == 0, first.output
    assert first.recap[HOST]["changed"]
    again = runner.play("again", 3)
    assert (again.status, again.recap[HOST]["changed"]) == (0, 0), again.output
    assert (controller.opens(3), controller.opens(4)) == (OPENS, STAYS_CLOSED)
    runner.empty()
    rotated = runner.play("rotated", 4, knock_server_adopt=True)
    assert rotated.status == 0, rotated.output
    assert (controller.opens(3), controller.opens(4)) == (STAYS_CLOSED, OPENS)
