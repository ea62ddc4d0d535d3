# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host's side of apply, prove and confirm: one call a phase, asked for by the action plugin."""

from __future__ import annotations

from typing import Any, Mapping, Optional

from ansible_collections.fleet.portknock.plugins.module_utils._backends import BackEnd, back_end
from ansible_collections.fleet.portknock.plugins.module_utils._changes import (
    Change,
    Difference,
    planned,
    run_change,
)
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._host import GateHost, Wanted
from ansible_collections.fleet.portknock.plugins.module_utils._ports import parse_knocks
from ansible_collections.fleet.portknock.plugins.module_utils._procnet import (
    Peer,
    Session,
    ports_in_use,
    ssh_peer,
    ssh_session,
    tcp_listeners,
)
from ansible_collections.fleet.portknock.plugins.module_utils._proof import is_trusted
from ansible_collections.fleet.portknock.plugins.module_utils._shutting import find, numbers_of, preview, shut
from ansible_collections.fleet.portknock.plugins.module_utils._system import Runner
from ansible_collections.fleet.portknock.plugins.module_utils._system import run as run_program


class GateChange(Change):
    """A gate that is to be there, or to be gone.

    :param wanted: None where it is to be gone.
    :param payload: as for :func:`run_phase`.
    :param pid: a process of the ssh connection that this came through.
    """

    def __init__(
        self,
        host: GateHost,
        enforcer: BackEnd,
        wanted: Optional[Wanted],
        payload: Mapping[str, Any],
        pid: int,
        run: Runner = run_program,
    ) -> None:
        self._host = host
        self._enforcer = enforcer
        self._wanted = wanted
        self._payload = payload
        self._run = str(payload["run"])
        self._pid = pid
        self._runner = run
        self._shut_out = numbers_of(payload)
        self._ends_sessions = bool(payload.get("end_sessions"))

    def preview(self) -> dict[str, Any]:
        result = self.plan()
        if self._wanted is not None and result["changed"]:
            if self._found.version is None:
                result["warnings"] = ["The rules were not validated: the back end is not installed on this host yet."]
            else:
                self._host.check(self._wanted)
        if self._shut_out:
            found = find(self._enforcer, self._shut_out, self._protected_tcp(), self._own_sessions(), self._runner)
            result.update(preview(found, self._ends_sessions))
            result["changed"] = result["changed"] or bool(result["windows_closed"] or result["sessions_ended"])
        return result

    def plan(self) -> dict[str, Any]:
        self._found = self._host.inspect()
        if self._wanted is not None:
            return planned(self._host.differences(self._wanted, self._found))
        if self._host.exists(self._found):
            return planned([Difference("the gate", "a gate with its table, files and unit\n", "")])
        return planned([])

    def settled(self) -> Optional[dict[str, Any]]:
        if self._wanted is None:
            self._host.forget()
            return None
        done = self._shut()
        return {**done, "changed": bool(done.get("windows_closed") or done.get("sessions_ended"))}

    def begin(self) -> dict[str, Any]:
        seconds, peer = int(self._payload["seconds"]), ssh_peer(self._pid)
        if self._wanted is not None:
            self._host.apply(self._wanted, self._found, self._run, seconds)
            # The proof begins with sources that have not knocked.
            knocked = [*(Peer(source, None) for source in self._payload["sources"]), *([peer] if peer else ())]
            for source in dict.fromkeys(knocked):
                self._enforcer.close_window(source)
        else:
            self._host.take_away(self._found, self._run, seconds)
        return {
            "source_trusted": is_trusted(peer.address if peer else None, self._payload.get("trusted", ())),
            "ports_in_use": [str(knock) for knock in ports_in_use()],
            "listeners": tcp_listeners(),
            "sessions": self._own_sessions(),
        }

    def confirm(self) -> Optional[dict[str, Any]]:
        if self._wanted is None:
            warnings = self._host.confirm_away(self._run)
            self._host.forget()
            return {"warnings": warnings} if warnings else None
        warnings = self._host.confirm(self._wanted, self._run)
        # Not before: a change that goes back must have cut nobody off.
        done = self._shut()
        return {**done, "warnings": [*warnings, *done.get("warnings", ())]} if warnings else done

    def outcome(self) -> Optional[str]:
        return self._host.outcome(self._run, removal=self._wanted is None)

    def _shut(self) -> dict[str, Any]:
        if not self._shut_out:
            return {}
        ports, own = self._protected_tcp(), self._own_sessions()
        try:
            return shut(self._enforcer, self._shut_out, ports, self._ends_sessions, own, self._runner)
        except PortknockError as exc:
            # The gate itself is confirmed.
            warning = f"shut: whether what they opened has ended is not known: {exc}"
            return {"windows_closed": 0, "sessions_ended": 0, "sessions_left": 0, "warnings": [warning]}

    def _protected_tcp(self) -> frozenset[int]:
        protected = parse_knocks(self._payload["protected"], "protected")
        return frozenset(knock.port for knock in protected if knock.proto == "tcp")

    def _own_sessions(self) -> list[Session]:
        """The sessions that this run came through: this one, and the one that the change was made over."""
        session = ssh_session(self._pid)
        return [*(Session(*own) for own in self._payload.get("sessions", ())), *([session] if session else ())]


def run_phase(
    phase: str,
    state: str,
    backend: str,
    payload: Mapping[str, Any],
    pid: int,
    check_mode: bool,
    run: Runner = run_program,
    root: str = "",
) -> dict[str, Any]:
    """Do one phase of a gate's change; see :func:`run_change`.

    :param payload: ``run`` (id), ``seconds`` (of the trial), and for a wanted gate ``trusted`` (CIDRs), ``sources``
        (addresses that the proof will look from) and ``wanted`` (the fields of :class:`Wanted`). Besides, where operators are
        to be shut out, ``shut`` (their numbers), ``end_sessions``, ``protected`` (port/protocol) and ``sessions`` (those that
        the run came through, as :class:`Session`).
    :param pid: a process of the ssh connection that this came through.
    :returns: the module's result.
    :raises PortknockError: with nothing changed, or with the way back armed.
    """
    enforcer = back_end(backend, run)
    host = GateHost(enforcer, root, run)
    wanted = Wanted(**payload["wanted"]) if state == "applied" else None
    change = GateChange(host, enforcer, wanted, payload, pid, run)
    return run_change(phase, change, host.trial, str(payload["run"]), check_mode)


__all__ = ("GateChange", "run_phase")
