# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which hosts and sequences an operator's file of secrets holds."""

from __future__ import annotations

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._helper_secrets import Access, HelperSecrets
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import HostSecrets, Operator, StoredSequence
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.plugin_utils._bundle import Target, bundle


def sequence(first: int) -> StoredSequence:
    knocks = tuple(Knock(first + step, "tcp") for step in (0, 20, 10))
    return StoredSequence(1, knocks, "generated", "2026-01-31T08:15:00Z")


def target(host: str, hostname: str, removed: bool = False, **operators: Operator) -> Target:
    return Target(HostSecrets("id", host, 1, b"\x5a" * 32, frozenset(), operators, removed=removed), hostname, 22)


ALICE, ROTATED, BOB = sequence(41000), sequence(42000), sequence(43000)


def test_her_hosts_and_her_sequences_only() -> None:
    targets = [
        target("web1", "192.0.2.1", alice=Operator(True, ALICE), bob=Operator(True, BOB)),
        target("web2", "web2.example.org", bob=Operator(True, BOB), alice=Operator(True, ALICE, ROTATED)),
        target("web3", "192.0.2.3", bob=Operator(True, BOB)),
        target("web4", "192.0.2.4", alice=Operator(False, ALICE)),
        target("web5", "192.0.2.5", removed=True, alice=Operator(True, ALICE)),
    ]
    assert bundle("alice", targets) == HelperSecrets(
        "alice",
        {
            "web1": Access("192.0.2.1", 22, (ALICE.knocks,)),
            "web2": Access("web2.example.org", 22, (ALICE.knocks, ROTATED.knocks)),
        },
    )


@pytest.mark.parametrize("operator", ["carol", "bob"])
def test_nothing_to_open(operator: str) -> None:
    targets = [target("web1", "192.0.2.1", alice=Operator(True, ALICE), bob=Operator(False, BOB))]
    with pytest.raises(PortknockError) as caught:
        bundle(operator, targets)
    assert str(caught.value) == (
        f"portknock_operator: expected an operator whom one of the hosts lets in; got {operator!r}, who has an active "
        "sequence on none."
    )
