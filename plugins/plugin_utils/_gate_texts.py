# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a host's secrets and settings to the texts that are deployed there."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.fleet.portknock.plugins.module_utils._backends import BACK_ENDS, check_seen, mode_of
from ansible_collections.fleet.portknock.plugins.module_utils._gate import USUAL_PROBE, GateSettings, build_model
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import (
    HostSecrets,
    read_host_state,
    utc_now,
)
from ansible_collections.fleet.portknock.plugins.module_utils._planning import plan_secrets
from ansible_collections.fleet.portknock.plugins.module_utils._ports import (
    GNUPG,
    SEQUENCE,
    Knock,
    parse_knocks,
)
from ansible_collections.fleet.portknock.plugins.plugin_utils._rendering import render

_FIRST_UNPRIVILEGED = 1024


def gate_texts(
    templates: Path,
    backend: str,
    settings: GateSettings,
    operators: Sequence[str],
    entry: HostSecrets,
    found: Mapping[str, Any],
) -> dict[str, Any]:
    """The fields of the host's ``Wanted``.

    :param found: what knock_gate_info reported.
    :raises PortknockError: secrets and settings that don't fit together, or a template that does not render.
    """
    in_use = parse_knocks(found["ports_in_use"], "ports_in_use")
    # A service that has come since must not be what an un-knocked source is answered by; what is above 1024 stays
    # as it was when the secrets were made, so that a service that comes and goes changes nothing.
    avoid = entry.avoid | {knock.port for knock in in_use if knock.port < _FIRST_UNPRIVILEGED}
    honoured = entry.honoured(operators)
    check_seen(backend, (knock.proto for one in honoured.values() for knocks in one.every_sequence for knock in knocks))
    probe, opener = found["backend"]["capabilities"] or USUAL_PROBE, BACK_ENDS[backend].opener
    gate = build_model(settings, honoured, entry.tripwire_seed, avoid, probe, opener)
    return {
        "texts": render(templates, backend, gate),
        "keyring": entry.keyring_id,
        "generation": entry.generation,
        "fingerprint": entry.fingerprint,
        "operators": {f"{operator.number:x}": name for name, operator in honoured.items()},
    }


def with_throwaway_secrets(
    entry: HostSecrets | None,
    host: str,
    operators: Sequence[str],
    settings: GateSettings,
    found: Mapping[str, Any],
    backend: str,
) -> HostSecrets:
    """The entry as a check needs it: with secrets for whoever has none yet, which are written nowhere."""
    in_use = parse_knocks(found["ports_in_use"], "ports_in_use")
    mode = mode_of(backend, settings.spa_keys)
    known = entry.operators.values() if entry else ()
    has_echo = any(knock.proto == "icmp" for one in known for knocks in one.every_sequence for knock in knocks)
    return plan_secrets(
        entry,
        keyring_id=entry.keyring_id if entry else str(uuid.uuid4()),
        host=host,
        operators=operators,
        now=utc_now(),
        length=BACK_ENDS[backend].length,
        # What there is stays, whatever new ones are made of.
        protocols=("tcp", "icmp") if has_echo else ("tcp",),
        protected={*settings.protected_tcp, *settings.protected_udp},
        in_use={knock.port for knock in in_use},
        one_time=settings.one_time,
        close_sequence=settings.close_sequence,
        state=read_host_state(found["gate"]) if settings.one_time else None,
        is_bare=found["gate"]["present"] is False,
        spa=_any_port(settings) if mode != SEQUENCE else None,
        gnupg=mode == GNUPG,
    ).secrets


def _any_port(settings: GateSettings) -> Knock:
    """A protected port."""
    return (
        Knock(settings.protected_tcp[0], "tcp") if settings.protected_tcp else Knock(settings.protected_udp[0], "udp")
    )


__all__ = ("gate_texts", "with_throwaway_secrets")
