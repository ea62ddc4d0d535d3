# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The controller's side of a commit-confirmed change: the phases of the module, and the way back where one fails."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ansible import constants
from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.plugin_utils._connections import is_ssh, knock_ssh_of, pipelined

_SHORTEST_TRIAL = 10
_LONGEST_TRIAL = 3600


class Opaque(str):
    """A text that core's debug output, which shows a module's arguments, shows nothing of."""

    def __repr__(self) -> str:
        return "(secret)"


class SecretiveAction(ActionBase):
    """An action whose module's arguments may hold secrets. ``_module`` is its name."""

    _supports_check_mode = True
    _supports_async = False
    _connection: Any
    _module = ""

    def _check_kept_secret(self) -> None:
        """See to it that the module's arguments are written nowhere.

        :raises PortknockError: they would be.
        """
        name = self._module.rpartition(".")[2]
        if constants.DEFAULT_KEEP_REMOTE_FILES:
            raise PortknockError(
                f"ANSIBLE_KEEP_REMOTE_FILES: expected to be off for {name}, whose arguments hold secrets."
            )
        if not pipelined(self):
            raise PortknockError(
                "ansible_become_method, ansible_connection: expected ones that work with pipelining, such as sudo over ssh, "
                f"since the arguments of {name} hold secrets and would be put into a file on the host; got "
                f"{self._connection.become.name if self._connection.become else 'none'} over {self._connection.transport}."
            )


class ConfirmedAction(SecretiveAction):
    """An action whose module changes the host on trial.

    ``_timeout_option`` is the role's variable for the task's ``confirm_timeout``, and ``_internal`` are the keys of its results
    that are not the user's. ``_confirmed`` is what the host said when it confirmed.
    """

    _vars: dict[str, Any]
    _timeout_option = ""
    _internal: tuple[str, ...] = ("on_trial",)
    _confirmed: Mapping[str, Any] = {}

    def _arguments(self) -> dict[str, Any]:
        """The module's arguments but for phase and payload.

        :raises PortknockError: they can't be given.
        """
        raise NotImplementedError

    def _phase(self, phase: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """One call of the module on the host."""
        arguments = {**self._arguments(), "phase": phase, "payload": Opaque(json.dumps(payload))}
        outcome: dict[str, Any] = self._execute_module(
            module_name=self._module, module_args=arguments, task_vars=self._vars
        )
        return outcome

    def _confirm(self, payload: dict[str, Any], over: Any = None) -> dict[str, Any] | None:
        """Confirm over a connection made for it; returns the failure, None when it worked.

        :param over: the connection, unless it is to be made as the task's own one is.
        """
        former = self._connection
        fresh = over or (knock_ssh_of(self, self._vars) if is_ssh(former) else None)
        try:
            if fresh is not None:
                if over is None:
                    fresh.set_become_plugin(former.become)
                fresh.fresh = True
                self._connection = fresh
            outcome = self._phase("confirm", payload)
            problem = str(outcome["msg"]) if outcome.get("failed") else None
            self._confirmed = outcome
        except AnsibleError as exc:
            problem = f"no fresh connection could be made ({exc})."
        finally:
            if fresh is not None and over is None:
                fresh.fresh = False
            self._connection = former
        return self._rolled_back(payload, f"Not confirmed: {problem}") if problem else None

    def _rolled_back(self, payload: dict[str, Any], reason: str) -> dict[str, Any] | None:
        """Bring the host back now if the old connection still serves; else its timer does.

        :returns: the failure; None where the host says that it has the change confirmed: only the answer was lost.
        """
        try:
            outcome = self._phase("rollback", payload).get("outcome")
        except AnsibleError:
            outcome = None
        if outcome == "confirmed":
            return None
        how = (
            "The host has gone back to what it had."
            if outcome == "restored"
            else f"The host goes back to what it had by itself, at most {payload['seconds']} s after the change."
        )
        return {"failed": True, "changed": False, "rolled_back": outcome == "restored", "msg": f"{reason} {how}"}

    def _shown(self, outcome: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in outcome.items() if key not in self._internal}

    def _seconds(self) -> int:
        given = self._task.args.get("confirm_timeout", 60)
        try:
            seconds = int(str(given))
        except ValueError:
            seconds = 0
        if not _SHORTEST_TRIAL <= seconds <= _LONGEST_TRIAL:
            raise PortknockError(
                f"{self._timeout_option}: expected {_SHORTEST_TRIAL} to {_LONGEST_TRIAL} seconds; got {given!r}."
            )
        return seconds


__all__ = ("ConfirmedAction", "Opaque", "SecretiveAction")
