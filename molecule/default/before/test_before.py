# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The hosts as they are: what later tests compare with, and proof that the tests can see an open port."""

from __future__ import annotations

import json

import pytest
from lab import FAMILIES, Fleet


@pytest.mark.parametrize("family", FAMILIES)
def test_ssh_is_open_and_nothing_else(fleet: Fleet, family: str) -> None:
    seen = fleet.scan(family)
    assert seen == {host: {"22": "open", "others": "closed"} for host in fleet.hosts}
    (fleet.directory / f"before-{family}.json").write_text(json.dumps(seen))


def test_remember_the_hosts(fleet: Fleet) -> None:
    states = {host: fleet.state(host) for host in fleet.hosts}
    (fleet.directory / "before-state.json").write_text(json.dumps(states))
    assert not any(fleet.has_gate(host) for host in fleet.hosts)
