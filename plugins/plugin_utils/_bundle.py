# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The secrets that an operator takes along: one file for the helper, from the keyring's entries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._helper_secrets import Access, HelperSecrets
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import HostSecrets


class Target(NamedTuple):
    """A host: its secrets, and where an operator's ssh goes."""

    secrets: HostSecrets
    hostname: str
    port: int


def bundle(operator: str, targets: Iterable[Target]) -> HelperSecrets:
    """Return what an operator's helper needs: those hosts only that they may open, by the names of the inventory.

    Within a rotation that is the current sequence and the next one. A host whose gate was removed is left out.

    :raises PortknockError: there is no such host.
    """
    hosts = {
        target.secrets.host: _access(target, operator)
        for target in targets
        if not target.secrets.removed and _may_open(target.secrets, operator)
    }
    if not hosts:
        raise PortknockError(
            f"portknock_operator: expected an operator whom one of the hosts lets in; got {operator!r}, who has an active "
            "sequence on none."
        )
    return HelperSecrets(operator, hosts)


def _access(target: Target, operator: str) -> Access:
    reusable = tuple(knocks for _name, knocks in target.secrets.candidates(operator))
    once = {
        identity: knocks for _name, group in target.secrets.one_time(operator) for identity, knocks in group.items()
    }
    if not once:
        return Access(target.hostname, target.port, reusable)
    return Access(target.hostname, target.port, reusable, once, target.secrets.stamp)


def _may_open(secrets: HostSecrets, operator: str) -> bool:
    entry = secrets.operators.get(operator)
    return entry is not None and entry.active


__all__ = ("Target", "bundle")
