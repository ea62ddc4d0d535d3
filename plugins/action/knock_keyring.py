# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Glue between the task's arguments and the keyring; runs in the controller's process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.fleet.portknock.plugins.module_utils._backends import (
    BACK_ENDS,
    check_name,
    check_seen,
    mode_of,
)
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._gate import NO_ECHO, SPA_KEYS, check_spa_keys
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import (
    SEQUENCES_OPTION,
    HostSecrets,
    check_host_state,
    check_not_all_expire,
    check_operators,
    check_packages,
    parse_given,
    parse_valid_until,
    read_host_state,
    utc_now,
)
from ansible_collections.fleet.portknock.plugins.module_utils._nmap_ports import nmap_ports, read_nmap_services
from ansible_collections.fleet.portknock.plugins.module_utils._planning import Plan, plan_secrets
from ansible_collections.fleet.portknock.plugins.module_utils._ports import (
    GNUPG,
    HIGHEST_PORT,
    KNOCK_PROTOCOLS,
    SPA,
    Knock,
    parse_knock,
    parse_knocks,
)
from ansible_collections.fleet.portknock.plugins.module_utils._rotation import (
    GIVEN_BY_HAND,
    Step,
    begin,
    finish,
    parse_grace,
    revoke,
    scope_of,
)
from ansible_collections.fleet.portknock.plugins.module_utils._sequences import DEFAULT_LENGTH, check_protocols
from ansible_collections.fleet.portknock.plugins.module_utils._stock import check_one_time
from ansible_collections.fleet.portknock.plugins.plugin_utils._keyring import (
    Keyring,
    keyring_options,
    open_keyring,
    read_as_inventory,
)

_STATES = ["present", "promoted", "rotated", "retired", "rotation_ended", "revoked", "removed", "absent"]
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "state": {"type": "str", "choices": _STATES, "default": "present"},
    "operators": {"type": "list", "elements": "str", "default": ["default"]},
    "length": {"type": "int", "default": DEFAULT_LENGTH},
    "protocols": {"type": "list", "elements": "str", "choices": list(KNOCK_PROTOCOLS), "default": ["tcp"]},
    # Raw, since the check of a type would print what it was given.
    "sequences": {"type": "raw", "default": {}},
    "protected_ports": {"type": "list", "elements": "str", "default": ["22/tcp"]},
    "ports_in_use": {"type": "list", "elements": "raw", "default": []},
    "nmap_services": {"type": "path"},
    "host_state": {"type": "dict", "default": {}},
    "adopt": {"type": "bool", "default": False},
    "packages": {"type": "list", "elements": "str", "default": []},
    "single_use": {"type": "bool", "default": False},
    "readmit": {"type": "list", "elements": "str", "default": []},
    "operator": {"type": "str"},
    "grace": {"type": "raw", "default": 0},
    "scope": {"type": "str", "default": ""},
    # Raw, since the check of a dict takes texts apart.
    "valid_until": {"type": "raw"},
    "trusted_sources": {"type": "list", "elements": "str", "default": []},
    "one_time": {"type": "raw", "default": 0},
    "close_sequence": {"type": "bool", "default": False},
    "backend": {"type": "dict", "default": {}},
    "spa_keys": {"type": "str", "default": SPA_KEYS[0]},
}


class ActionModule(ActionBase):
    """See the module's documentation."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(argument_spec=_ARGUMENTS)
        variables = task_vars or {}
        host = str(variables["inventory_hostname"])
        try:
            keyring = open_keyring(keyring_options(variables, self._templar))
            result.update(self._act(keyring, host, arguments))
        except PortknockError as exc:
            # Core appends the text of each cause to the message: it would say everything twice.
            raise AnsibleActionFail(str(exc)) from None
        warning = read_as_inventory(keyring.directory, "The keyring", "knock_keyring_dir", variables)
        if warning:
            self._display.warning(warning)
        return result

    def _act(self, keyring: Keyring, host: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        state, dry_run = arguments["state"], bool(self._task.check_mode)
        before = keyring.load(host)
        after = before
        created: tuple[str, ...] = ()
        warnings: tuple[str, ...] = ()
        extra: dict[str, Any] = {}
        if state == "rotation_ended":
            ended = keyring.end_rotation(arguments["scope"], dry_run)
            return {"changed": ended, "keyring_id": keyring.id}
        if state in ("present", "rotated"):
            option = "knock_server_sequence_protocols"
            _check_protocols(
                check_protocols(arguments["protocols"], option, KNOCK_PROTOCOLS), arguments["backend"], option
            )
        if state == "present":
            before, (after, _changed, created, warnings) = self._present(keyring, host, arguments)
        elif state == "promoted":
            after = keyring.promote(host, utc_now(), dry_run)
        elif state == "rotated":
            before, step = self._step(keyring, host, partial(self._begin, keyring, host, arguments))
            after, extra = step.secrets, {"rotation": step.done, "until": None}
            if GIVEN_BY_HAND in step.done.values():
                warnings = ("Sequences that knock_server_sequences gives are not rotated: change them there.",)
        elif state == "retired":
            before, step = self._step(keyring, host, partial(self._finish, arguments))
            after, extra = step.secrets, {"rotation": step.done, "until": step.until}
        elif state == "revoked":
            operator, operators = self._operator(arguments), check_operators(arguments["operators"])
            now = utc_now()
            if before is not None:
                trusted = bool(arguments["trusted_sources"])
                after = keyring.update(
                    host, lambda kept: revoke(kept or before, operator, operators, now, trusted), dry_run
                )[0]
            extra = {"known": before is not None and operator in before.operators}
        elif state == "removed":
            after = keyring.mark_removed(host, check_packages(arguments["packages"]), dry_run)
        else:
            keyring.purge(host, dry_run)
            after = None
        latest = after or before
        return {
            "changed": before != after,
            "path": str(keyring.path(host)),
            "keyring_id": keyring.id,
            "keyring_created": keyring.founded,
            "generation": after.generation if after else None,
            "created": list(created),
            "packages": list(latest.packages) if latest else [],
            "warnings": [*warnings, *_news(keyring)],
            **extra,
            "diff": {
                "before_header": str(keyring.path(host)),
                "after_header": str(keyring.path(host)),
                "before": _shown(before),
                "after": _shown(after),
            },
        }

    def _step(
        self, keyring: Keyring, host: str, step: Callable[[HostSecrets], Step]
    ) -> tuple[HostSecrets | None, Step]:
        """Take a step of a rotation; return what was kept, and what became of it."""
        history: list[tuple[HostSecrets | None, Step]] = []

        def change(kept: HostSecrets | None) -> HostSecrets:
            if kept is None:
                raise PortknockError(
                    f"The keyring {keyring.directory}: expected an entry for {host}, which site.yml makes; got none."
                )
            taken = step(kept)
            history.append((kept, taken))
            return taken.secrets

        keyring.update(host, change, bool(self._task.check_mode))
        return history[-1]

    def _begin(self, keyring: Keyring, host: str, arguments: Mapping[str, Any], kept: HostSecrets) -> Step:
        state = read_host_state(arguments["host_state"])
        check_host_state(state, kept, keyring.id, host, adopt=False)
        protected = parse_knocks(arguments["protected_ports"], "knock_server_protected_ports")
        return begin(
            kept,
            scope_of(check_operators(arguments["operators"]), arguments["operator"], kept),
            rotation=keyring.rotation(arguments["scope"], time.time(), bool(self._task.check_mode)),
            now=utc_now(),
            state=state,
            length=arguments["length"],
            protocols=arguments["protocols"],
            protected={knock.port for knock in protected},
            nmap_ports=_avoided(arguments["nmap_services"]),
            in_use=frozenset(_port(value) for value in arguments["ports_in_use"]),
            spa=_asked(arguments["backend"], protected),
            gnupg=_is_gnupg(arguments["spa_keys"], arguments["backend"]),
        )

    @staticmethod
    def _finish(arguments: Mapping[str, Any], kept: HostSecrets) -> Step:
        scope = scope_of(check_operators(arguments["operators"]), arguments["operator"], kept)
        return finish(kept, scope, grace=parse_grace(arguments["grace"]), now=utc_now())

    @staticmethod
    def _operator(arguments: Mapping[str, Any]) -> str:
        if not arguments["operator"]:
            raise PortknockError("portknock_operator: expected the name of an operator; got nothing.")
        return check_operators([arguments["operator"]])[0]

    def _present(self, keyring: Keyring, host: str, arguments: Mapping[str, Any]) -> tuple[HostSecrets | None, Plan]:
        """Return what was kept, and what became of it."""
        operators = check_operators(arguments["operators"])
        given = parse_given(arguments["sequences"], operators)
        protos = {knock.proto for several in given.values() for knocks in several for knock in knocks}
        _check_protocols(protos, arguments["backend"], SEQUENCES_OPTION)
        valid_until = arguments["valid_until"]
        if valid_until is not None:
            valid_until = parse_valid_until(valid_until, operators)
        protected = parse_knocks(arguments["protected_ports"], "knock_server_protected_ports")
        in_use = frozenset(_port(value) for value in arguments["ports_in_use"])
        packages = check_packages(arguments["packages"])
        avoided = _avoided(arguments["nmap_services"])
        state = read_host_state(arguments["host_state"])
        now = utc_now()
        spa = _asked(arguments["backend"], protected, check_one_time(arguments["one_time"]))
        gnupg = _is_gnupg(arguments["spa_keys"], arguments["backend"])
        known_id = keyring.id
        # The keyring calls again where another writer came between; the last call counts.
        history: list[tuple[HostSecrets | None, Plan]] = []

        def change(kept: HostSecrets | None) -> HostSecrets:
            check_host_state(state, kept, known_id, host, arguments["adopt"])
            plan = plan_secrets(
                kept,
                keyring_id=keyring.id or "",
                host=host,
                operators=operators,
                now=now,
                length=arguments["length"],
                protocols=arguments["protocols"],
                given=given,
                protected={knock.port for knock in protected},
                nmap_ports=avoided,
                in_use=in_use,
                state=state,
                packages=packages,
                single_use=arguments["single_use"],
                readmit=arguments["readmit"],
                valid_until=valid_until,
                one_time=check_one_time(arguments["one_time"]),
                close_sequence=arguments["close_sequence"],
                is_bare=arguments["host_state"].get("present") is False,
                spa=spa,
                gnupg=gnupg,
            )
            if not arguments["trusted_sources"]:
                check_not_all_expire(operators, plan.secrets)
            history.append((kept, plan))
            return plan.secrets

        keyring.update(host, change, bool(self._task.check_mode))
        return history[-1]


def _asked(backend: Mapping[str, Any], protected: Sequence[Knock], one_time: int = 0) -> Knock | None:
    """What the packet asks for that opens the gate; None where a sequence opens it.

    :param backend: what knock_gate_info reported; empty where nobody says.
    """
    if "name" not in backend or BACK_ENDS[check_name(backend["name"])].mode != SPA:
        return None
    if one_time:
        able = [name for name, abilities in BACK_ENDS.items() if abilities.one_time]
        raise PortknockError(
            f"knock_server_one_time: expected 0 with knock_server_backend={backend['name']}, each of whose packets is good once; "
            f"got {one_time}. One-time sequences are for {' and '.join(able)}."
        )
    if not protected:
        raise PortknockError(
            "knock_server_protected_ports: expected at least one port such as 22/tcp; got an empty list."
        )
    return protected[0]


def _is_gnupg(kind: object, backend: Mapping[str, Any]) -> bool:
    """Whether packets have keys of GnuPG's.

    :raises PortknockError: no such kind, or a back end without packets.
    """
    return "name" in backend and mode_of(check_name(backend["name"]), check_spa_keys(kind)) == GNUPG


def _check_protocols(protocols: Iterable[str], backend: Mapping[str, Any], option: str) -> None:
    """Stop before sequences are kept that the host's gate could not honour.

    :param backend: what knock_gate_info reported; empty where nobody says.
    :param option: names what gave them in the error.
    """
    wanted = set(protocols)
    if "name" in backend:
        check_seen(backend["name"], wanted, option)
    if "icmp" in wanted and backend.get("capabilities", {}).get("echo") is False:
        raise PortknockError(f"{option}: {NO_ECHO}")


def _port(value: object) -> int:
    """A port in use: a number, or port/protocol."""
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= HIGHEST_PORT:
        # Ansible's tagged numbers are not what YAML writes.
        return int(value)
    return parse_knock(value, "ports_in_use").port


def _avoided(path: str | None) -> frozenset[int]:
    """nmap's ports, with those of the file that the user names."""
    if not path:
        return nmap_ports()
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as exc:
        raise PortknockError(
            f"knock_server_nmap_services: expected a file on the controller that this user can read; got {path}: "
            f"{exc.strerror}."
        ) from exc
    return nmap_ports() | read_nmap_services(text)


def _news(keyring: Keyring) -> list[str]:
    if not keyring.founded:
        return []
    return [
        f"The keyring {keyring.directory} is new, with the id {keyring.id}. Without it and its vault secret nobody can "
        f"open the gates: keep copies of both."
    ]


def _shown(secrets: HostSecrets | None) -> str:
    """What a diff shows: no port and no seed."""
    return "" if secrets is None else yaml.safe_dump(secrets.describe(), sort_keys=False)


__all__ = ("ActionModule",)
