# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A keyring that isn't the one that a host's gate was made from, in the hands of somebody who gets in all the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from lab import Fleet, differences


@pytest.fixture(scope="module", autouse=True)
def trusted(fleet: Fleet) -> dict[str, object]:
    """The controller needs no knock, so that the keyring is all that stops it."""
    settings: dict[str, object] = {
        "knock_server_trusted_sources": [fleet.description[key] for key in ("gateway4", "gateway6")]
    }
    run = fleet.play("fleet.portknock.site", variables=settings)
    assert run.status == 0, run.output
    return settings


@pytest.fixture
def older(fleet: Fleet, trusted: dict[str, object]) -> Path:
    """A copy of the keyring, made before an operator was added."""
    copy = fleet.directory / "keyring_of_yesterday"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(fleet.directory / "knock_keyring", copy)
    run = fleet.play("fleet.portknock.site", variables={**trusted, "knock_server_operators": ["default", "alice"]})
    assert run.status == 0, run.output
    return copy


@pytest.fixture
def empty(fleet: Fleet) -> Path:
    folder = fleet.directory / "keyring_of_nobody"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


@pytest.mark.parametrize("keyring", ["older", "empty"])
def test_a_keyring_that_does_not_know_the_gate_is_refused(
    fleet: Fleet, trusted: dict[str, object], request: pytest.FixtureRequest, keyring: str
) -> None:
    folder: Path = request.getfixturevalue(keyring)
    before = {host: fleet.state(host) for host in fleet.hosts}
    run = fleet.play("fleet.portknock.site", variables={**trusted, "knock_keyring_dir": str(folder)})
    assert run.status == 2, run.output
    assert {host: numbers["failed"] for host, numbers in run.recap.items()} == dict.fromkeys(fleet.hosts, 1)
    assert "knock_server_adopt" in run.output
    assert [differences(before[host], fleet.state(host)) for host in fleet.hosts] == [[], []]


def test_a_keyring_that_is_to_take_over_does(fleet: Fleet, trusted: dict[str, object], empty: Path) -> None:
    settings = {**trusted, "knock_keyring_dir": str(empty)}
    run = fleet.play("fleet.portknock.site", variables={**settings, "knock_server_adopt": True})
    assert run.status == 0, run.output
    assert fleet.leaks(run.output) == []
    again = fleet.play("fleet.portknock.site", variables=settings)
    assert {host: numbers["changed"] for host, numbers in again.recap.items()} == dict.fromkeys(fleet.hosts, 0)
    back = fleet.play("fleet.portknock.site", variables={"knock_server_adopt": True})
    assert back.status == 0, back.output
