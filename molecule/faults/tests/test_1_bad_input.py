# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Each kind of bad input stops the host before anything on it has changed, with the option's name in the message."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab import Fleet, Run, differences

GIVEN = ["40961/tcp", "51203/tcp", "22/tcp", "47129/tcp"]


@pytest.fixture(scope="module")
def before(fleet: Fleet) -> dict[str, dict[str, str]]:
    return {host: fleet.state(host) for host in fleet.hosts}


def assert_stopped(fleet: Fleet, before: dict[str, dict[str, str]], run: Run, *words: str) -> None:
    assert run.status == 2, run.output
    assert all(host["failed"] for host in run.recap.values()), run.output
    assert [word for word in words if word not in run.output] == [], run.output
    assert [differences(before[host], fleet.state(host)) for host in fleet.hosts] == [[]] * len(before)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("knock_server_protected_ports", ["70000/tcp"]),
        ("knock_server_protected_ports", ["22/tcp", "22/tcp"]),
        ("knock_server_protected_ports", ["ssh"]),
        ("knock_server_backend", "ipfw"),
        ("knock_server_sequence_length", 17),
        ("knock_server_sequence_length", 2),
        ("knock_server_operators", ["mallory/../root"]),
        ("knock_server_step_timeout", -1),
        ("knock_server_open_window", -5),
        ("knock_server_open_window", 0),
        ("knock_server_trusted_sources", ["10.0.0.300/8"]),
        ("knock_server_tripwires", 60000),
    ],
)
def test_bad_value(fleet: Fleet, before: dict[str, dict[str, str]], option: str, value: object) -> None:
    run = fleet.play("fleet.portknock.site", variables={option: value})
    assert_stopped(fleet, before, run, option)


def test_a_protected_port_in_a_given_sequence(fleet: Fleet, before: dict[str, dict[str, str]]) -> None:
    run = fleet.play("fleet.portknock.site", variables={"knock_server_sequences": {"default": GIVEN}})
    assert_stopped(fleet, before, run, "knock_server_sequences")
    assert not any(knock in run.output for knock in GIVEN if knock != "22/tcp")


def test_a_keyring_folder_that_can_not_be_made(fleet: Fleet, before: dict[str, dict[str, str]]) -> None:
    run = fleet.play("fleet.portknock.site", variables={"knock_keyring_dir": "/proc/nowhere"})
    assert_stopped(fleet, before, run, "knock_keyring_dir", "/proc/nowhere")


def test_no_vault_secret(fleet: Fleet, before: dict[str, dict[str, str]]) -> None:
    configuration = fleet.directory / "without-vault.cfg"
    kept = [line for line in (fleet.directory / "ansible.cfg").read_text().splitlines() if "vault" not in line]
    configuration.write_text("\n".join(kept) + "\n")
    keyring = fleet.directory / "never_made"
    run = fleet.play(
        "fleet.portknock.site", variables={"knock_keyring_dir": str(keyring)}, ANSIBLE_CONFIG=str(configuration)
    )
    assert_stopped(fleet, before, run, "vault")
    assert not list(keyring.glob("**/*.yml"))


@pytest.fixture
def useless_nft(fleet: Fleet) -> Iterator[None]:
    """An nft that knows nothing of what is asked: too old, as far as anybody can tell."""
    for host in fleet.hosts:
        fleet.execute(
            host,
            "mv /usr/sbin/nft /usr/sbin/nft.kept\n"
            "printf '#!/bin/sh\\ncase \"$*\" in --version|-v|-V) echo nftables v0.4;; *) exit 1;; esac\\n' >/usr/sbin/nft\n"
            "chmod 755 /usr/sbin/nft",
        )
    yield
    for host in fleet.hosts:
        fleet.execute(host, "mv /usr/sbin/nft.kept /usr/sbin/nft")


def test_nft_too_old(fleet: Fleet, useless_nft: None) -> None:
    run = fleet.play("fleet.portknock.site")
    assert run.status == 2, run.output
    assert all(host["failed"] for host in run.recap.values()), run.output
    assert "nft" in run.output
    assert [fleet.execute(host, "ls -d /etc/fleet-portknock", check=False) for host in fleet.hosts] == ["", ""]
