# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""portknock install and uninstall, by the program itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._client import Bundle, Manifest, put
from ansible_collections.fleet.portknock.plugins.module_utils._helper_secrets import Access, HelperSecrets
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.plugin_utils._program import helper_program

SEQUENCE = tuple(Knock(port, "tcp") for port in (41823, 60211, 52999))


class Machine:
    """A home, and a bundle that was unpacked there."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.place = self.home / "portknock"
        self.home.mkdir()
        self.unpack()

    def unpack(self, operator: str = "alice", hosts: int = 1) -> None:
        known = {f"web{number}": Access("192.0.2.7", 22, (SEQUENCE,)) for number in range(1, hosts + 1)}
        secrets = HelperSecrets(operator, known).to_text().encode()
        files = {"config": b"Host web1\n", "portknock": helper_program(), "secrets.json": secrets}
        put(Bundle(Manifest("portknock", operator, (), tuple(files)), files), str(self.place))

    def run(self, *arguments: str, program: str = "") -> subprocess.CompletedProcess[str]:
        # Neither the interpreter that the tests run in nor what it finds is a person's.
        environment = {"HOME": str(self.home), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}"}
        finished = subprocess.run(
            [program or str(self.place / "portknock"), *arguments],
            env=environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not any(str(knock.port) in finished.stdout + finished.stderr for knock in SEQUENCE)
        assert "Traceback" not in finished.stderr
        return finished


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_there_and_back(machine: Machine) -> None:
    place = f"Delete {machine.place} and the file that it came in: they hold the same secrets.\n"
    found = "~/.ssh/portknock, for the operator alice on web1.\nNow ssh gets in: ssh web1\n"
    for said in ("Installed", "Nothing to change"):
        finished = machine.run("install", program="portknock/portknock")
        assert (finished.returncode, finished.stdout) == (0, f"{said}: {found}{place}")
        # Only a home that ssh would not look into.
        assert finished.stderr.startswith("portknock: ssh reads ")
        assert finished.stderr.endswith(
            f"/.ssh, and HOME is {machine.home}: use ssh -F {machine.home}/.ssh/portknock/config.\n"
        )
    installed = machine.home / ".ssh" / "portknock"
    finished = machine.run("install", program=str(installed / "portknock"))
    assert finished.stdout == f"Nothing to change: {found}"
    (installed / "notes").write_text("")
    finished = machine.run("uninstall", program=str(installed / "portknock"))
    left = "Left in ~/.ssh/portknock, since they are not the bundle's: notes.\n"
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, f"Removed: ~/.ssh/portknock.\n{left}", "")
    (installed / "notes").unlink()
    installed.rmdir()
    assert machine.run("uninstall").stdout == "Nothing to remove: there is no ~/.ssh/portknock.\n"
    assert list((machine.home / ".ssh").iterdir()) == []


def test_many_hosts(machine: Machine) -> None:
    machine.unpack(hosts=7)
    assert "on web1, web2, web3, web4, web5 and 2 more.\nNow ssh gets in: ssh web1\n" in machine.run("install").stdout


def test_somebody_elses(machine: Machine) -> None:
    assert machine.run("install").returncode == 0
    machine.unpack("bob")
    finished = machine.run("install")
    assert (finished.returncode, finished.stdout, finished.stderr.count("\n")) == (1, "", 1)
    assert finished.stderr.startswith(
        f"portknock: {machine.home}/.ssh/portknock: expected no bundle, or an older one of"
    )
    assert machine.run("install", "--replace").returncode == 0


def test_the_program_alone(machine: Machine) -> None:
    (machine.place / "bundle.json").unlink()
    for command in ("install", "uninstall"):
        finished = machine.run(command)
        assert (finished.returncode, finished.stdout) == (1, "")
        assert finished.stderr == (
            f"portknock: {machine.place}: expected a bundle, with a file bundle.json; got none.\n"
        )
