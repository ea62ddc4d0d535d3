# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Harden sshd as one task: who is to get in afterwards proves it before and after, and the change is on trial between."""

from __future__ import annotations

import copy
import re
import secrets
from typing import Any

from ansible import constants
from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure, AnsibleError
from ansible.plugins.loader import become_loader
from ansible.utils.display import Display
from ansible_collections.fleet.portknock.plugins.connection.knock_ssh import Connection
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._sshd_config import (
    OPTION_PREFIX,
    SshdSettings,
    packed,
    settings_from,
    wanted_value,
)
from ansible_collections.fleet.portknock.plugins.plugin_utils._confirmed import ConfirmedAction
from ansible_collections.fleet.portknock.plugins.plugin_utils._connections import (
    is_ssh,
    knock_ssh_as,
    knock_ssh_of,
    pipelined,
)

display = Display()

# ssh takes the first value that it meets: what stands here can't be softened by anybody's configuration.
_KEY_ONLY = (
    "-o PreferredAuthentications=publickey -o PubkeyAuthentication=yes -o PasswordAuthentication=no "
    "-o KbdInteractiveAuthentication=no -o BatchMode=yes"
)
_NO_METHOD = "-o PreferredAuthentications=none -o BatchMode=yes"
_REFUSED = re.compile(r"Permission denied \(([^)]*)\)")
_PASSWORD_METHODS = {"password": "PasswordAuthentication", "keyboard-interactive": "KbdInteractiveAuthentication"}
_ROOT_SHUT_OUT = ("no", "forced-commands-only")
_STATES = ("applied", "absent")
_ANSWERS = ("fail", "skip")


class _NotReadyError(PortknockError):
    """Whoever is to get in afterwards can't be shown to: nothing was changed."""


class ActionModule(ConfirmedAction):
    """Convert the task's options, do the phases on the host, and convert what comes back."""

    _module = "fleet.portknock.sshd_settings"
    _timeout_option = f"{OPTION_PREFIX}confirm_timeout"

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        self._vars = task_vars or {}
        try:
            unready = self._one_of("without_proof", _ANSWERS, "fail")
            state = self._one_of("state", _STATES, "applied")
            settings = settings_from(self._task.args.get("settings") or {}) if state == "applied" else None
            try:
                result.update(self._change(settings))
            except _NotReadyError as exc:
                if unready == "fail":
                    raise
                display.warning(f"{self._vars['inventory_hostname']}: sshd is left as it is. {exc}")
                result.update(changed=False, skipped=True, skip_reason=str(exc))
        except PortknockError as exc:
            raise AnsibleActionFail(str(exc)) from None
        return result

    def _arguments(self) -> dict[str, Any]:
        # Nothing of it is secret; only faster that way.
        pipelined(self)
        return {"state": self._task.args.get("state", "applied")}

    def _change(self, settings: SshdSettings | None) -> dict[str, Any]:
        if not is_ssh(self._connection):
            raise _NotReadyError(
                f"ansible_connection: expected one over ssh, by which the account that gets in afterwards can prove it; got "
                f"{self._connection.transport}."
            )
        present = knock_ssh_of(self, self._vars).destination().user
        user = str(self._task.args.get("admin_user") or "") or present
        if settings is not None:
            self._check_root(settings, user)
        payload: dict[str, Any] = {
            "run": secrets.token_hex(6),
            "seconds": self._seconds(),
            "settings": packed(settings) if settings else None,
            "users": list(dict.fromkeys((user, "root"))),
        }
        outcome = self._phase("compare", payload)
        if outcome.get("failed") or not outcome["changed"]:
            return outcome
        warnings = outcome.get("warnings", [])
        becomes = self._become_for(user)
        by_key = self._is_key_needed(settings, user)
        options = _KEY_ONLY if by_key else ""
        way_in = knock_ssh_as(self, self._vars, user, becomes, options, with_password=not by_key and user == present)
        try:
            self._prove(way_in, user)
        except _NotReadyError as exc:
            if not self._task.check_mode:
                raise
            display.warning(f"{self._vars['inventory_hostname']}: {exc}")
        if self._task.check_mode:
            return outcome
        outcome = self._phase("apply", payload)
        if outcome.get("failed") or not outcome.get("on_trial"):
            return outcome
        try:
            methods = self._methods_seen(user)
            self._check_methods(settings, methods)
        except PortknockError as exc:
            return self._rolled_back(payload, str(exc)) or self._shown(outcome)
        failure = self._confirm(payload, way_in)
        if failure:
            return failure
        if user != present and settings is not None and wanted_value(settings, "PermitRootLogin") in _ROOT_SHUT_OUT:
            display.warning(
                f"{self._vars['inventory_hostname']}: Ansible still connects as {present}. Set `ansible_user: {user}` for this "
                "host in the inventory: a connection that is still open hides until it ends that root is shut out."
            )
        return {**self._shown(outcome), "warnings": warnings, "proof": {"user": user, "methods": methods}}

    def _check_root(self, settings: SshdSettings, user: str) -> None:
        """Stop where root alone would get in now, and nobody afterwards; exceptions are for the trial to judge."""
        root = wanted_value(settings, "PermitRootLogin")
        if user == "root" and root in _ROOT_SHUT_OUT and not settings.matches:
            raise _NotReadyError(
                f"{OPTION_PREFIX}permit_root_login: expected another account than root to get in afterwards, since {root!r} "
                f"shuts out root, as whom Ansible connects. Name one in {OPTION_PREFIX}admin_user (it is made with "
                f"{OPTION_PREFIX}admin_create=true), set `ansible_user`, or set {OPTION_PREFIX}permit_root_login to "
                "prohibit-password."
            )

    @staticmethod
    def _is_key_needed(settings: SshdSettings | None, user: str) -> bool:
        """Whether the account gets in by a key alone afterwards."""
        if settings is None:
            return False
        root = wanted_value(settings, "PermitRootLogin")
        return wanted_value(settings, "PasswordAuthentication") == "no" or (user == "root" and root != "yes")

    def _become_for(self, user: str) -> Any:
        if user == "root":
            return None
        if self._connection.become is not None:
            # It keeps what it waits for, which is not the same for an account that is root already.
            return copy.copy(self._connection.become)
        become = become_loader.get(constants.DEFAULT_BECOME_METHOD)
        names = constants.config.get_plugin_vars("become", become._load_name)
        become.set_options(
            var_options={name: self._templar.template(self._vars[name]) for name in names if name in self._vars}
        )
        return become

    def _prove(self, way_in: Connection, user: str) -> None:
        """See that the account gets in over a fresh connection and becomes root."""
        former = self._connection
        self._connection = way_in
        try:
            outcome = self._phase("prove", {})
            problem = str(outcome["msg"]) if outcome.get("failed") else ""
            if not problem and not outcome["is_root"]:
                problem = "it does not become root: set `become: true`"
        except AnsibleError as exc:
            problem = str(exc)
        finally:
            self._connection = former
        if problem:
            raise _NotReadyError(
                f"{OPTION_PREFIX}admin_user: expected {user} to get in over a fresh connection, as it has to afterwards, and to "
                f"become root; it does not ({problem.strip().rstrip('.')}). Nothing was changed."
            )

    def _methods_seen(self, user: str) -> list[str]:
        """The ways to log in that sshd offers to a connection from here.

        :raises PortknockError: sshd does not say.
        """
        stranger = knock_ssh_as(self, self._vars, user, None, _NO_METHOD)
        try:
            code, _output, complaint = stranger.exec_command("true", sudoable=False)
            text = f"exit code {code}: {complaint.decode(errors='replace')}"
        except (AnsibleConnectionFailure, AnsibleError) as exc:
            text = str(exc)
        refused = _REFUSED.search(text)
        if refused is None:
            raise PortknockError(
                f"Not proved: expected sshd to refuse {user} who shows neither key nor password, and to name the ways in; got "
                f"{text.strip().rstrip('.')}."
            )
        return refused[1].split(",")

    @staticmethod
    def _check_methods(settings: SshdSettings | None, methods: list[str]) -> None:
        if settings is None or settings.matches:
            return
        for method, keyword in _PASSWORD_METHODS.items():
            if method in methods and wanted_value(settings, keyword) == "no":
                raise PortknockError(f"Not in effect: sshd still offers {method}, where {keyword} no was set.")

    def _one_of(self, option: str, choices: tuple[str, ...], default: str) -> str:
        value = str(self._task.args.get(option) or default)
        if value not in choices:
            raise PortknockError(f"{option}: expected one of {', '.join(choices)}; got {value!r}.")
        return value
