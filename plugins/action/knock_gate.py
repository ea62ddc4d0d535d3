# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Apply, prove and confirm as one task: no strategy, serial, tag or fork can come between the three."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.utils.display import Display
from ansible_collections.fleet.portknock.plugins.module_utils._backends import BACK_ENDS, check_name, mode_of
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._gate import (
    INPUT_POLICIES,
    SPA_KEYS,
    GateSettings,
    Honoured,
    check_spa_keys,
    guard_warnings,
    settings_from,
)
from ansible_collections.fleet.portknock.plugins.module_utils._jump import JumpError, JumpHost
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import (
    HostSecrets,
    check_operators,
    check_same_secrets,
    read_host_state,
    utc_now,
)
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import check_echo
from ansible_collections.fleet.portknock.plugins.module_utils._ports import (
    SEQUENCE,
    Knock,
    parse_knocks,
)
from ansible_collections.fleet.portknock.plugins.module_utils._proof import answer, is_trusted, packed_addresses
from ansible_collections.fleet.portknock.plugins.module_utils._spa import asking_for
from ansible_collections.fleet.portknock.plugins.plugin_utils._confirmed import ConfirmedAction
from ansible_collections.fleet.portknock.plugins.plugin_utils._connections import action_on, is_ssh, knock_ssh_of, quiet
from ansible_collections.fleet.portknock.plugins.plugin_utils._destination import Destination
from ansible_collections.fleet.portknock.plugins.plugin_utils._gate_texts import gate_texts, with_throwaway_secrets
from ansible_collections.fleet.portknock.plugins.plugin_utils._keyring import Keyring, keyring_options, open_keyring

display = Display()

_CONNECTION = "fleet.portknock.knock_ssh"
# What the result says of operators who were shut out.
_SHUT = ("windows_closed", "sessions_ended", "sessions_left")
_OUTSIDE, _HOST = "outside", "host"
_SSH_PORT = 22
# One for each family of addresses, and some for what another client or a boot has used up.
_PROOF_TICKETS = 16
# How long one question to a jump host may take; a trial that is shorter ends by itself.
_JUMP_SECONDS = 90.0


class ActionModule(ConfirmedAction):
    """Convert the task's options, do the three phases on the host, and convert what comes back."""

    _module = "fleet.portknock.knock_gate"
    _timeout_option = "knock_server_confirm_timeout"
    _internal = ("on_trial", "source_trusted", "ports_in_use", "listeners", "sessions")
    # The last jump host on the way, where this connection needs its knock; the same where the proof is made from there; and why
    # it is not, where that can't be.
    _jump: JumpHost | None = None
    _looker: JumpHost | None = None
    _unseen = ""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        self._vars = task_vars or {}
        self._run_id = secrets.token_hex(6)
        self._prover: ActionModule | None = None
        try:
            state = self._task.args.get("state", "applied")
            steps = {"applied": self._apply, "absent": self._remove, "checked": self._check}
            if state not in steps:
                raise PortknockError(f"state: expected one of {', '.join(steps)}; got {state!r}.")
            self._place = self._proving_place()
            result.update(steps[state]())
        except PortknockError as exc:
            raise AnsibleActionFail(str(exc)) from None
        return result

    def _check(self) -> dict[str, Any]:
        settings = settings_from(self._required("settings"))
        self._check_abilities(settings)
        check_operators(self._required("operators"))
        check_name(self._backend())
        self._seconds()
        found = self._required("found")
        self._check_init(found)
        destination = self._destination()
        self._check_open_ports(settings, destination, found)
        self._choose_jump(settings, destination, found)
        if (self._place or self._jump) and not self._task.check_mode:
            self._view(destination, found["ipv6_addresses"])
        elif self._mode != SEQUENCE and not self._task.check_mode and not destination.proxied:
            self._scout(destination, [])
        return {"changed": False}

    def _apply(self) -> dict[str, Any]:
        settings = settings_from(self._required("settings"))
        operators = check_operators(self._required("operators"))
        templates, found = Path(self._required("templates")), self._required("found")
        self._check_init(found)
        self._check_backend(found["backend"])
        self._check_abilities(settings)
        keyring = open_keyring(keyring_options(self._vars, self._templar))
        host = self._vars["inventory_hostname"]
        entry = keyring.load(host)
        if self._task.check_mode:
            entry = with_throwaway_secrets(entry, host, operators, settings, found, self._backend())
        if entry is None:
            raise PortknockError(
                f"knock_keyring_dir: expected an entry for {host} in {keyring.directory}; got none. knock_keyring makes it."
            )
        entry.check_mode(self._mode)
        if not self._task.check_mode:
            check_same_secrets(read_host_state(found["gate"]), entry)
        prover = entry.prover(operators)
        stocks = [(prover, entry.operators[prover].once)] if entry.operators[prover].opens_once else []
        usage = keyring.usage(entry)
        tickets = usage.tickets(stocks)[:_PROOF_TICKETS]
        sequences = [ticket.knocks for ticket in tickets] if stocks else [entry.to_prove(operators)]
        if not sequences:
            raise PortknockError(
                f"knock_server_one_time: expected a one-time sequence of operator {prover} that has not been used, to prove "
                "the gate with; got none."
            )
        destination, connection = self._destination(), knock_ssh_of(self, self._vars)
        sequences = [asking_for(knocks, connection.spa_source) for knocks in sequences]
        warnings = guard_warnings(settings, len(sequences[0]), BACK_ENDS[self._backend()].opener)
        warnings += [f"{host}: {note}" for note in found["backend"].get("notes", ())]
        payload: dict[str, Any] = {
            "run": self._run_id,
            "seconds": self._seconds(),
            "trusted": [*settings.trusted4, *settings.trusted6],
            "wanted": gate_texts(templates, self._backend(), settings, operators, entry, found),
            "protected": [
                *(f"{port}/tcp" for port in settings.protected_tcp),
                *(f"{port}/udp" for port in settings.protected_udp),
            ],
            **self._shut(entry),
        }
        self._choose_jump(settings, destination, found)
        given, operator = connection.given_sequences(), connection.get_option("knock_operator")
        self._check_open_ports(settings, destination, found)
        self._check_way_in(settings, destination, found, given, operator, entry.honoured(operators))
        if not self._place and not self._jump and any(knock.proto == "icmp" for one in sequences for knock in one):
            # Otherwise the proof would find out, with the gate loaded.
            check_echo()
        self._warn_of_shut(settings, found)
        gate = {
            "protected": payload["protected"],
            "closed_response": settings.closed_response,
            "trusted": payload["trusted"],
            "knocks": [] if stocks else [str(knock) for knock in sequences[0]],
            "once": [[str(knock) for knock in knocks] for knocks in sequences] if stocks else [],
            "served": [str(knock) for knock in settings.served],
            "without_ipv6": "",
        }
        if found["backend"]["capabilities"].get("ipv6") is False:
            gate["without_ipv6"] = f"{self._backend()} has no IPv6 here"
            warnings.append(
                f"knock_server_backend: {gate['without_ipv6']}: on hosts that have it, the protected ports are closed on IPv6 "
                "to all but the trusted sources."
            )
        outcome = self._change(payload, destination, found["ipv6_addresses"], gate)
        # Said at each change, and not at every run.
        for warning in warnings if outcome.get("reasons") or outcome.get("failed") else ():
            display.warning(warning)
        if outcome.get("failed"):
            return outcome
        proof = outcome.get("proof")
        sent = proof.pop("sent_once", 0) if proof else 0
        if sent:
            usage.opened(tickets[sent - 1])
        if proof or not outcome["reasons"]:
            # Unchanged, too: an earlier run may have died before it noted that the host has what the entry wants.
            self._promote(keyring, host, entry, settings.single_use)
        if proof:
            for note in proof["notes"]:
                display.warning(f"{host}: {note}")
            if self._connection.ansible_name == _CONNECTION and not self._vars["hostvars"][host].get(
                "ansible_connection"
            ):
                display.warning(
                    "Only plays that set their connection themselves get in now: add the line "
                    f"`ansible_connection: {_CONNECTION}` to the inventory, so that every play does."
                )
        return outcome

    def _shut_out(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """What the host said of operators who were shut out when it confirmed."""
        done = {key: self._confirmed[key] for key in (*_SHUT, "warnings") if key in self._confirmed}
        if payload.get("shut") and not done.keys() >= set(_SHUT):
            display.warning(
                f"{self._vars['inventory_hostname']}: shut: the gate is confirmed, but the answer is lost that says whether open "
                "windows and sessions were ended: run it again."
            )
        return done

    def _shut(self, entry: HostSecrets) -> dict[str, Any]:
        """What the host has to know of operators who are shut out; nothing where there are none."""
        names = self._task.args.get("shut") or []
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise PortknockError(f"shut: expected a list of operators' names; got {names!r}.")
        # Of whom the keyring knows nothing here, nothing can be open.
        numbers = [number for number, name in enumerate(entry.operators, start=1) if name in names]
        if not numbers:
            return {}
        try:
            return {"shut": numbers, "end_sessions": boolean(self._task.args.get("end_sessions", False))}
        except TypeError:
            raise PortknockError(
                f"end_sessions: expected true or false; got {self._task.args['end_sessions']!r}."
            ) from None

    def _remove(self) -> dict[str, Any]:
        payload = {"run": self._run_id, "seconds": self._seconds()}
        return self._change(payload, self._destination(), [], None)

    def _change(
        self,
        payload: dict[str, Any],
        destination: Destination,
        further: Sequence[str],
        gate: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Put a change on trial, let it be proved, and confirm it.

        :param further: IPv6 addresses of the host that are looked at, too, where they can be reached.
        :param gate: what a proof has to know of the gate; None where it is taken away.
        :returns: the task's result; with ``proof`` where a gate was proved and confirmed.
        """
        view: dict[str, Any] | None = None
        if not self._task.check_mode:
            if self._place or self._jump:
                # So that a run that has nothing to change troubles no other host and makes no namespace.
                outcome = self._phase("compare", payload)
                if outcome.get("failed") or not outcome["reasons"]:
                    return outcome
            view = self._view(destination, further)
        payload = {**payload, "sources": view["sources"] if view else []}
        # What this run's forks open for the controller, or for the jump host, is nothing to whoever looks from elsewhere.
        if (self._place and not self._looker) or self._task.check_mode:
            return self._try_out(payload, view, gate)
        with quiet(self._vars["inventory_hostname"], watched=True):
            return self._try_out(payload, view, gate)

    def _try_out(
        self, payload: dict[str, Any], view: Mapping[str, Any] | None, gate: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Apply, prove, confirm."""
        outcome = self._phase("apply", payload)
        if outcome.get("failed") or not outcome.get("on_trial"):
            return outcome
        try:
            proof = self._prove(view, gate, outcome)
        except (PortknockError, OSError) as exc:
            return self._rolled_back(payload, str(exc)) or self._shown(outcome)
        # These sessions are the run's own, which it must not end where it ends operators' ones.
        payload = {**payload, "sessions": outcome["sessions"]}
        failure = self._confirm(payload)
        if failure:
            return failure
        return self._shown(outcome) | self._shut_out(payload) | ({"proof": proof} if proof else {})

    def _prove(
        self, view: Mapping[str, Any] | None, gate: Mapping[str, Any] | None, outcome: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See from outside that the gate holds and opens, or where it is taken away, that the host can be reached.

        :param view: what the scout said; None where nothing can be seen from here.
        :param outcome: what the host said when the change was made.
        """
        if view is None:
            # Only let through where the jump host is a trusted source; the fresh connection is all there is.
            note = f"Not proved from outside: the host is reached through a ProxyJump or ProxyCommand.{self._unseen}"
            return {"seen_from": "", "closed": [], "opened": [], "notes": [note]} if gate else {}
        request = {**view, "timeout": self._timeout()}
        if gate is None:
            self._ask("prove_removed", request)
            return {}
        request.update(
            gate,
            # What is open shows more than a closed port, whether or not anything waits there.
            ports_in_use=sorted({*outcome["ports_in_use"], *gate.get("served", ())}),
            listeners=outcome["listeners"],
            # The host sees the connection's source itself, behind whatever translates addresses on the way.
            source_trusted=outcome["source_trusted"] and (not self._place or self._looker is not None),
        )
        seen = self._ask("prove", request)
        if not self._is_apart:
            return {"seen_from": self._looker.name if self._looker else self._place, **seen}
        note = "Not proved from outside: seen from a network namespace on the host itself (knock_server_proof=host)."
        return {"seen_from": self._vars["inventory_hostname"], **seen, "notes": [note, *seen["notes"]]}

    @property
    def _is_apart(self) -> bool:
        """Whether the gate's own host looks, from a namespace."""
        return self._task.args.get("proof", _OUTSIDE) == _HOST

    def _proving_place(self) -> str:
        """Where the proof is made from, in words; empty for the controller.

        :raises PortknockError: it can't be made from there.
        """
        proof, place = self._task.args.get("proof", _OUTSIDE), str(self._task.args.get("prove_from") or "")
        if proof not in (_OUTSIDE, _HOST):
            raise PortknockError(f"knock_server_proof: expected {_OUTSIDE} or {_HOST}; got {proof!r}.")
        if proof == _HOST and place:
            raise PortknockError(
                f"knock_server_prove_from: expected none with knock_server_proof={_HOST}, since the host itself looks; "
                f"got {place!r}."
            )
        if proof == _HOST:
            return f"a network namespace on {self._vars['inventory_hostname']}"
        if place and place == self._vars["inventory_hostname"]:
            raise PortknockError(
                f"knock_server_prove_from: expected another host than {place} itself, whose own packets its gate lets "
                "through; got that one."
            )
        if place and place not in self._vars["hostvars"]:
            raise PortknockError(f"knock_server_prove_from: expected a host of the inventory; got {place!r}.")
        return place

    def _destination(self) -> Destination:
        """Where people's ssh would go: what is looked at first."""
        if self._is_apart and not is_ssh(self._connection):
            # The controller is the host: no ssh leads there, and no client need be installed that could be asked.
            context = self._play_context
            return Destination(str(context.remote_addr), int(context.port or _SSH_PORT))
        return knock_ssh_of(self, self._vars).destination()

    def _choose_jump(self, settings: GateSettings, destination: Destination, found: Mapping[str, Any]) -> None:
        """Find out whether a jump host has to knock, which then also looks, where no other host does.

        :raises PortknockError: ssh does not say.
        """
        # From a trusted source there is neither a need to knock nor anything to see.
        if destination.jump and not is_trusted(found["ssh_source"], (*settings.trusted4, *settings.trusted6)):
            jump = knock_ssh_of(self, self._vars).jump_host()
            if jump is None:
                return
            if destination.port in settings.protected_tcp:
                self._jump = jump
            if not self._place:
                self._looker, self._place = jump, f"the jump host {jump.name}"

    def _view(self, destination: Destination, further: Sequence[str]) -> dict[str, Any] | None:
        """What a proof would look at, and from which sources; None where nothing can be seen from anywhere.

        :raises PortknockError: nobody can look who has to, or a jump host can't knock that has to.
        """
        try:
            if self._jump is not None and self._looker is None:
                # Nothing is to be seen from there; only whether it could.
                request = {**self._asked_of_scout(destination, []), "addresses": [], "place": self._jump.name}
                answered = self._ask_jump(self._jump, "scout", request)
                if "problem" in answered:
                    raise JumpError(str(answered["problem"]))
            if self._place or not destination.proxied:
                return self._scout(destination, further)
        except JumpError as exc:
            if self._jump is not None:
                raise PortknockError(
                    f"{exc} The connection that confirms the gate, and all that follow, would have to knock from there, so the "
                    "gate was not closed. Make the jump host's address one of knock_server_trusted_sources (another host "
                    "can then prove the gate: knock_server_prove_from), or see that ssh gets there and `python3` runs there."
                ) from None
            self._looker, self._place, self._unseen = None, "", f" {exc}"
        return None

    def _scout(self, destination: Destination, further: Sequence[str]) -> dict[str, Any]:
        """What a proof would look at, and from which sources."""
        return self._ask("scout", self._asked_of_scout(destination, further))

    def _asked_of_scout(self, destination: Destination, further: Sequence[str]) -> dict[str, Any]:
        # A name behind a jump host is the jump host's to resolve, never this machine's; this machine knows its own addresses.
        unknown = destination.proxied or (self._is_apart and not is_ssh(self._connection))
        addresses = [] if unknown else packed_addresses(destination.host, destination.port, destination.family)
        return {
            "host": destination.host,
            "port": destination.port,
            "family": destination.family,
            "addresses": addresses,
            "further": list(further),
            "mode": self._mode if self._task.args.get("state", "applied") != "absent" else SEQUENCE,
        }

    def _ask(self, question: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Have one question about the host answered, here or on the host that the proof is made from.

        :raises PortknockError: what was seen is not as it must be, or nobody could look.
        """
        request = {**request, "place": self._place}
        answered = self._answer_of_prover(question, request) if self._place else answer(question, request)
        if "problem" in answered:
            problem = str(answered["problem"])
            if self._place and question == "scout":
                problem = f"{self._proof_option}: {problem}"
            elif self._is_apart:
                problem += (
                    f" It was seen from {self._place}, whose packets come in on an interface of their own: look for what "
                    "the host does with those, such as a packet filter that names interfaces, or a reverse path filter."
                )
            raise PortknockError(problem)
        return answered

    @property
    def _proof_option(self) -> str:
        if self._looker is not None:
            return "ProxyJump"
        return "knock_server_proof" if self._is_apart else "knock_server_prove_from"

    def _answer_of_prover(self, question: str, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._looker is not None:
            return self._ask_jump(self._looker, question, request)
        try:
            if self._is_apart:
                outcome = self._phase(question, {**request, "apart": True})
            else:
                outcome = self._phase_elsewhere(question, request)
            problem = str(outcome["msg"]) if outcome.get("failed") else None
        except (AnsibleError, PortknockError) as exc:
            problem = str(exc)
        if problem is not None:
            raise PortknockError(
                f"{self._proof_option}: expected {self._place} to be able to look at the host; it is not: "
                f"{problem.strip().rstrip('.')}."
            )
        answered: dict[str, Any] = outcome["answer"]
        return answered

    def _ask_jump(self, jump: JumpHost, question: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Have a question answered on a jump host.

        :raises JumpError: it does not answer.
        """
        patience = float(knock_ssh_of(self, self._vars).get_option("timeout"))
        return jump.ask(answer, question, request, patience=patience, timeout=_JUMP_SECONDS)

    def _phase_elsewhere(self, question: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """A call of the module on the host of the inventory that looks."""
        if self._prover is None:
            prover, variables = action_on(self, self._place, self._vars)
            prover._vars = variables
            self._prover = prover
        with quiet(self._place, watched=False):
            return self._prover._phase(question, request)

    def _promote(self, keyring: Keyring, host: str, entry: HostSecrets, single_use: bool) -> None:
        """Note in the keyring what the host has been proved to honour. The gate stands whether or not that works."""
        now = utc_now()
        if self._task.check_mode or entry.promoted(now, single_use) == entry:
            return
        try:
            keyring.promote(host, now, single_use=single_use)
        except PortknockError as exc:
            display.warning(
                f"{host}: the gate is confirmed, and the next run of the role will note it in the keyring: {exc}"
            )

    def _backend(self) -> str:
        return str(self._task.args.get("backend", "nftables"))

    @property
    def _mode(self) -> str:
        """What the gate is opened with."""
        kind = check_spa_keys((self._task.args.get("settings") or {}).get("spa_keys", SPA_KEYS[0]))
        return mode_of(check_name(self._backend()), kind)

    def _timeout(self) -> float:
        """Seconds that the proof goes on knocking: well inside the trial, so that the way back isn't raced."""
        return min(10.0, self._seconds() / 3)

    def _required(self, option: str) -> Any:
        if option not in self._task.args:
            raise PortknockError(f"{option}: required but with state=absent; got nothing.")
        return self._task.args[option]

    @staticmethod
    def _check_init(found: dict[str, Any]) -> None:
        if found["init"] != "systemd":
            raise PortknockError(
                "knock_server_backend: expected systemd as the host's init system, which loads the gate at boot; "
                f"got {found['init']}."
            )

    def _check_backend(self, backend: dict[str, Any]) -> None:
        """Stop where the back end can't work, before anything on the host changes."""
        if backend["problem"]:
            raise PortknockError(backend["problem"])
        if backend["missing_programs"] and not self._task.check_mode:
            missing = ", ".join(backend["missing_programs"])
            raise PortknockError(f"knock_server_backend: {backend['name']} needs {missing}; it is not installed.")

    def _check_abilities(self, settings: GateSettings) -> None:
        """Stop where the back end can't use a sequence up, or shut a window on request."""
        if settings.spa_keys != SPA_KEYS[0]:
            mode_of(check_name(self._backend()), settings.spa_keys)
        able = sorted(name for name, abilities in BACK_ENDS.items() if abilities.one_time)
        if settings.one_time and self._backend() not in able:
            raise PortknockError(
                f"knock_server_one_time: expected a back end that can use a sequence up ({', '.join(able)}); got "
                f"{self._backend()}."
            )
        able = sorted(name for name, abilities in BACK_ENDS.items() if abilities.single_use)
        if settings.single_use and self._backend() not in able:
            raise PortknockError(
                "knock_server_single_use: expected a back end whose windows can let one connection through "
                f"({', '.join(able)}); got {self._backend()}."
            )
        able = sorted(name for name, abilities in BACK_ENDS.items() if abilities.close_sequence)
        if settings.close_sequence and self._backend() not in able:
            raise PortknockError(
                f"knock_server_close_sequence: expected a back end that can shut a window on request ({', '.join(able)}); got "
                f"{self._backend()}."
            )

        able = sorted(name for name, abilities in BACK_ENDS.items() if abilities.input_policy)
        if settings.input_policy != INPUT_POLICIES[0] and self._backend() not in able:
            raise PortknockError(
                f"knock_server_input_policy: expected a back end that can close all other ports ({', '.join(able)}); got "
                f"{self._backend()}."
            )

    @staticmethod
    def _check_open_ports(settings: GateSettings, destination: Destination, found: Mapping[str, Any]) -> None:
        """Stop where the port that this connection came by would be neither protected nor open.

        :raises PortknockError: it would.
        """
        # The host's own port, whatever it is called outside; where the connection isn't ssh, the one that ssh would use.
        port = Knock(found["ssh_port"] or destination.port, "tcp")
        if settings.shuts(port):
            listed = ", ".join(map(str, settings.open_ports)) or "none"
            raise PortknockError(
                f"knock_server_open_ports: expected {port} among them, or among knock_server_protected_ports, since ssh comes in "
                f"there and knock_server_input_policy=drop closes all others; got {listed}."
            )

    def _warn_of_shut(self, settings: GateSettings, found: Mapping[str, Any]) -> None:
        """Tell of services that can't be reached any more, once: when the ports that stay open change."""
        if settings.input_policy == INPUT_POLICIES[0] or found["gate"]["open_ports"] == [
            str(knock) for knock in settings.served
        ]:
            return
        waiting = parse_knocks(found["reachable_ports"], "reachable_ports")
        shut = [str(port) for port in waiting if settings.shuts(port)]
        if shut:
            display.warning(
                f"{self._vars['inventory_hostname']}: knock_server_input_policy=drop closes ports on which services of the host "
                f"wait: {', '.join(shut)}. Those that others are to reach belong into knock_server_open_ports."
            )

    def _check_way_in(
        self,
        settings: GateSettings,
        destination: Destination,
        found: dict[str, Any],
        given: Sequence[tuple[Knock, ...]] | None,
        operator: str | None,
        honoured: Mapping[str, Honoured],
    ) -> None:
        """Stop where Ansible itself could not get in any more.

        :param given: what the connection knocks with instead of the keyring; None where it uses that.
        :param operator: whose sequence of the keyring it knocks with; None for anyone's.
        :param honoured: what the gate is to honour, by operator.
        """
        is_closed = destination.port in settings.protected_tcp
        if not is_closed or is_trusted(found["ssh_source"], (*settings.trusted4, *settings.trusted6)):
            return
        if destination.proxied and self._jump is None:
            raise PortknockError(
                f"{destination.host} is reached through a ProxyCommand, or a ProxyJump with knock_from_jump=false: a knock from "
                "here would come from another address than the connection, so the gate was not closed. Make the jump host's "
                "address one of knock_server_trusted_sources, go by a ProxyJump that is knocked from, or run the play on the "
                "jump host."
            )
        if is_ssh(self._connection) and self._connection.ansible_name != _CONNECTION:
            raise PortknockError(
                f"The gate would close port {destination.port}/tcp to this very connection, which does not knock: set "
                f"`ansible_connection: {_CONNECTION}` for this host in the inventory, or `connection:` in the play."
            )
        if settings.one_time and given is not None and is_ssh(self._connection):
            raise PortknockError(
                "knock_sequences: expected to be unset where knock_server_one_time is set: the keyring says which sequence is "
                "next."
            )
        opens = {tuple(knocks) for operator in honoured.values() for knocks in operator.sequences}
        # A check has made up the sequences that are missing.
        if given is not None and not self._task.check_mode and not set(given) & opens and is_ssh(self._connection):
            raise PortknockError(
                "knock_sequences: expected a sequence that the gate is to honour, since the connection knocks with nothing "
                "else; got others only. Give it what knock_server_sequences gives the gate, during a rotation beside the former "
                "sequence, or leave it unset."
            )
        if given is None and operator and operator not in honoured and is_ssh(self._connection):
            raise PortknockError(
                f"knock_operator: expected an operator whom the gate is to let in ({', '.join(honoured)}), since the connection "
                f"knocks as nobody else; got {operator}."
            )

    def _arguments(self) -> dict[str, Any]:
        """One call of the module on the host, with its arguments on standard input only."""
        self._check_kept_secret()
        return {"state": self._task.args.get("state", "applied"), "backend": self._backend()}
