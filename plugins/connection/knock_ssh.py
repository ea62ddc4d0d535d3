# Copyright (c) 2026, fleet.portknock contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: knock_ssh
author:
  - fleet.portknock contributors (@fleet-portknock)
short_description: Knock, then connect by ssh
description:
  - This is P(ansible.builtin.ssh#connection) with one knock before each real connection, and none where a living
    ControlPersist master carries the command.
  - The sequences come from the keyring on the controller, or from O(knock_sequences) on one that can't keep files. A host
    that has neither is reached by plain ssh.
  - Where the knock does not open the port, ssh is run all the same, so that the error is its own.
version_added: 0.1.0
extends_documentation_fragment:
  - ansible.builtin.connection_pipelining
  - fleet.portknock.core_ssh
  - fleet.portknock.keyring
notes:
  - A knock must come from the address that the connection comes from. Where ssh goes through a C(ProxyJump), the knock is sent
    from the last jump host, where the account that ssh uses has to be able to run C(python3) of version 3.8 or newer. The
    sequence goes there over standard input and is kept in memory. Whoever is root there could read it; see O(knock_from_jump).
  - Where ssh goes through a C(ProxyCommand), nothing is sent, and a warning says so. If that is this collection's helper, it is
    left out for a host whose sequences are known here, which is then knocked at as without it.
  - Where the jump host runs no Python, nothing is sent either, which is all right if the gate trusts its address.
  - To see that the port has opened, the first real connection of a run to a host is preceded by one that is closed at
    once. Later ones rely on what worked and look only after ssh was refused, because OpenSSH 9.8 and newer holds
    connections that never log in against their source (C(PerSourcePenalties)).
  - At a single-use gate each of these is knocked for. Where another fork of the run, or somebody who shares its address, uses
    up what a knock has opened, the refused connection is knocked for again, a few times.
  - A gate of fwknop is opened by one packet (SPA), which the program C(fwknop) sends. It has to be installed where the knock
    leaves from (Debian's package C(fwknop-client)). fwknop has no IPv6, so ssh is told to use IPv4 there, unless it goes through
    a jump host.
  - Of sequences that open once, each is sent once, the next one at each connection. Which is next is noted beside the keyring's
    file of the host; where that is not known, the first ones are tried in their order until one opens.
  - ssh's C(BindAddress) is used for the knock too; C(BindInterface) is not.
options:
  inventory_hostname:
    description:
      - The host's name in the inventory, by which the keyring knows it.
    type: string
    vars:
      - name: inventory_hostname
  knock_delegate:
    description:
      - The host that the task is delegated to, which the keyring then knows by this name.
    type: string
    keyword:
      - name: delegate_to
  knock_from_jump:
    description:
      - Whether to knock from the jump host where ssh goes through a C(ProxyJump).
      - Turn it off where the jump host is one of the gate's trusted sources, which need no knock, or is not to get to know the
        sequences.
    type: boolean
    default: true
    version_added: 0.1.0
    vars:
      - name: knock_from_jump
    env:
      - name: KNOCK_FROM_JUMP
    ini:
      - section: portknock
        key: from_jump
  knock_operator:
    description:
      - The operator whose sequence is sent.
      - Where it is not set, each operator's sequence that the keyring holds for the host is tried, until one opens.
    type: string
    vars:
      - name: knock_operator
    env:
      - name: KNOCK_OPERATOR
    ini:
      - section: portknock
        key: operator
  knock_sequences:
    description:
      - The host's sequence, a list of C(port/protocol) or C(bytes/icmp), or a list of such lists in the order in which they are
        tried, until one opens. Where it is set, the keyring is not looked at, and O(knock_operator) says nothing.
      - During a rotation, name the new sequence and the former one.
      - Meant for what P(fleet.portknock.knock_sequence#filter) derives. The type is C(raw) so that no error repeats a port.
      - For a delegated task the expression is evaluated anew, with the name of the other host as C(inventory_hostname).
    type: raw
    vars:
      - name: knock_sequences
  knock_spa_source:
    description:
      - The IPv4 address that the packet for a gate of fwknop asks to be let in for. Where it is not set, that is the local
        address from which packets to the host leave. Behind address translation (NAT) that is wrong; there, set what the host
        sees.
    type: string
    vars:
      - name: knock_spa_source
    env:
      - name: KNOCK_SPA_SOURCE
    ini:
      - section: portknock
        key: spa_source
  knock_single_use:
    description:
      - Whether what a knock opens is good for one connection only, so that a second knock has to follow one whose effect was
        looked at. The keyring knows this of the hosts that it has an entry of, unless the gate was changed without it.
      - A second knock does no harm at a gate that needs none. One that was left out costs a connection that is refused.
    type: boolean
    default: false
    version_added: 0.1.0
    vars:
      - name: knock_server_single_use
      - name: knock_single_use
  knock_timeout:
    description:
      - The most seconds that knocking goes on before ssh is run all the same.
      - Half of O(timeout) where that is less, so that a host that is down takes no longer than with plain ssh.
    type: float
    default: 5
    vars:
      - name: knock_timeout
    env:
      - name: KNOCK_TIMEOUT
    ini:
      - section: portknock
        key: timeout
"""

import contextlib
import hashlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from ansible import constants
from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.module_utils.common.text.converters import to_bytes, to_text
from ansible.plugins.connection.ssh import Connection as CoreConnection
from ansible.utils.display import Display
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._jump import (
    FromHere,
    FromJump,
    JumpError,
    JumpHost,
    Way,
    jump_host,
)
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import KnockResult, resolve
from ansible_collections.fleet.portknock.plugins.module_utils._ports import (
    SENT_PROTOCOLS,
    Knock,
    parse_sequences,
)
from ansible_collections.fleet.portknock.plugins.module_utils._spa import asking_for, check_source
from ansible_collections.fleet.portknock.plugins.module_utils._usage import Stocks, Ticket, Usage
from ansible_collections.fleet.portknock.plugins.plugin_utils._destination import (
    Destination,
    configuration_file,
    locate,
    ssh_arguments,
)
from ansible_collections.fleet.portknock.plugins.plugin_utils._keyring import open_keyring

display = Display()

_CONTROL_PATH = re.compile(r'(?:-o)?controlpath[ =]+"?(?P<path>.*?)"?', re.IGNORECASE)
_SEQUENCES_OPTION = "knock_sequences"
# How often what worked is sent again for a connection that was refused: another fork of this run, or whoever else shares its
# address, may have used up what a knock opened. Once where nothing is known of a single-use gate.
_AGAIN = {False: 1, True: 8}
# What ssh says when a connection through a jump host was refused, or not answered, before there was a session.
_REFUSED_BEHIND_JUMP = ("stdio forwarding failed", "timed out during banner exchange")
_PROXY_ENDED = "kex_exchange_identification: "
_FRESH = (b"-o", b"ControlMaster=no", b"-o", b"ControlPath=none")
# What a daemon has needed to open is given to it again where nobody looks, up to so many seconds.
_LONGEST_WAIT = 0.5

# How ssh ended: its code, standard output and standard error.
_Ran = tuple[int, bytes, bytes]


class _Note(NamedTuple):
    """What opened the port: the address, the place of the sequence, its operator where it opens once, the seconds between two
    knocks, and how many it took."""

    address: str
    sequence: int
    operator: str | None
    gap: float
    took: float


class HostSequences(NamedTuple):
    """What may open a host, likeliest first.

    ``identity`` tells these from the sequences of another time, as far as that can be said without what is in them.
    With ``single_use`` what they open is good for one connection. ``once`` are those that open once themselves, in groups with
    their operators' names, and ``usage`` says which of these to send next. ``close`` are those that shut the window.
    """

    host: str
    sequences: list[tuple[Knock, ...]]
    identity: tuple[object, ...]
    single_use: bool
    once: Stocks = ()
    usage: Usage = Usage(None, "")
    close: Sequence[tuple[Knock, ...]] = ()

    @property
    def is_spa(self) -> bool:
        """Whether it is one packet that opens, likeliest."""
        return bool(self.sequences and self.sequences[0][0].spa)

    @property
    def has_any(self) -> bool:
        """Whether there is anything to knock with."""
        return bool(self.sequences or self.once)

    def knock(self, way: Way, timeout: float, banner: float = 0.0) -> tuple[KnockResult, _Note | None]:
        """Knock until the port opens.

        :return: how it went, and what opened; None where nothing did.
        :raises JumpError: the jump host did not do it.
        """
        tickets = self.usage.tickets(self.once) if self.once else []
        once = [ticket.knocks for ticket in tickets]
        result = way.knock(self.sequences, timeout, banner, self.single_use, once)
        self.usage.note(tickets, result, len(self.sequences))
        if result.address is None or result.state != "open":
            return result, None
        place = result.sequence - len(self.sequences)
        operator = tickets[place].operator if place >= 0 else None
        return result, _Note(result.address.host, result.sequence, operator, result.gap, result.elapsed)

    def send_again(self, way: Way, note: _Note) -> Ticket | bool:
        """Send, without looking, what has opened the port, or the next of its kind where it opens once.

        :return: what was sent, if it is to be noted that it has opened; else whether anything was.
        :raises OSError: there is no way to the address.
        :raises JumpError: the jump host did not do it.
        """
        if note.operator is None:
            return way.send(note.address, self.sequences[note.sequence], note.gap)
        ticket = self.usage.take(self.once, note.operator)
        return ticket if ticket is not None and way.send(note.address, ticket.knocks, note.gap) else False


class _Gate(NamedTuple):
    """A closed port, and the sequences that may open it."""

    destination: Destination
    way: Way
    known: HostSequences
    memory: str


class Connection(CoreConnection):
    """ssh connections behind a knock."""

    transport = "ssh"

    # When True, every command makes a connection of its own and knocks for it, whatever master is alive: what an old
    # connection reaches proves nothing.
    fresh: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._located: dict[tuple[str, ...], Destination] = {}
        self._templating: tuple[dict[str, Any], Any] | None = None

    def destination(self) -> Destination:
        """Where ssh would really go.

        :raises PortknockError: ssh does not say.
        """
        return self._locate()

    def set_options(
        self,
        task_keys: dict[str, Any] | None = None,
        var_options: dict[str, Any] | None = None,
        direct: dict[str, Any] | None = None,
    ) -> None:
        super().set_options(task_keys=task_keys, var_options=var_options, direct=direct)
        delegate = self.get_option("knock_delegate")
        if delegate and self.get_option(_SEQUENCES_OPTION) is not None:
            # Core gives the other host's variables, but with this host's name: whatever is derived from it would be this
            # host's sequence, sent to another one.
            self.set_option(_SEQUENCES_OPTION, self._sequences_of(delegate))

    def _resolve_option_variables(self, variables: dict[str, Any], templar: Any) -> dict[str, Any]:
        self._templating = variables, templar
        resolved: dict[str, Any] = super()._resolve_option_variables(variables, templar)
        return resolved

    def _sequences_of(self, host: str) -> Any:
        """The option's value for another host than the task's own, whose variables are here."""
        if self._templating is None:
            return None
        variables, templar = self._templating
        former = templar.available_variables
        templar.available_variables = {**variables, "inventory_hostname": host}
        try:
            return templar.template(variables[_SEQUENCES_OPTION])
        finally:
            templar.available_variables = former

    @property
    def is_single_use(self) -> bool:
        """Whether the host's variables say that a knock opens for one connection only."""
        return bool(self.get_option("knock_single_use"))

    @property
    def spa_source(self) -> str:
        """The address that a packet asks for; empty for the one that it leaves from.

        :raises PortknockError: it is none.
        """
        return check_source(self.get_option("knock_spa_source"), "knock_spa_source")

    def given_sequences(self) -> list[tuple[Knock, ...]] | None:
        """The sequences that the option gives instead of the keyring; None where it is not set.

        :raises PortknockError: it holds anything else; no value is in the text.
        """
        value = self.get_option(_SEQUENCES_OPTION)
        return None if value is None else parse_sequences(value, _SEQUENCES_OPTION, SENT_PROTOCOLS)

    def host_sequences(self, operator: str | None = None) -> HostSequences | None:
        """What the option gives for this host, or else what the keyring holds; None where there is nothing.

        :param operator: of the keyring's, only this one's; None for what the option knock_operator says.
        :raises PortknockError: the option, the keyring or the host's entry can't be read.
        """
        # A delegated task's variables still carry the name of the host that it is for.
        name = self.get_option("knock_delegate") or self.get_option("inventory_hostname")
        given, source = self.given_sequences(), self.spa_source
        if given is not None:
            given = [asking_for(knocks, source) for knocks in given]
            return HostSequences(name, given, (_SEQUENCES_OPTION, len(given)), self.is_single_use)
        try:
            keyring = open_keyring(self.get_option)
        except PortknockError:
            # No folder is named, so this user has no keyring: there is nothing to knock with.
            return None
        secrets = keyring.load(name) if name else None
        if secrets is None:
            return None
        name = operator or self.get_option("knock_operator")
        return HostSequences(
            secrets.host,
            [asking_for(knocks, source) for _operator, knocks in secrets.candidates(name)],
            (secrets.keyring_id, secrets.generation),
            secrets.single_use or self.is_single_use,
            secrets.one_time(name),
            keyring.usage(secrets),
            secrets.close_sequences(name),
        )

    def _locate(self, *more: str) -> Destination:
        executable, host = self.get_option("ssh_executable"), self.get_option("host") or self._play_context.remote_addr
        arguments = [*ssh_arguments(self.get_option), *more]
        key = (executable, host, *arguments)
        if key not in self._located:
            self._located[key] = locate(executable, arguments, host, self.get_option("timeout"))
        return self._located[key]

    def _build_command(self, binary: str, subsystem: str, *other_args: bytes | str) -> list[bytes]:
        command = super()._build_command(binary, subsystem, *other_args)
        return self._with_first_options(command, *_FRESH) if self.fresh else command

    def _persistence_controls(self, b_command: list[bytes]) -> tuple[bool, bool]:
        """Core adds no ControlPath to a command that has its own."""
        return (False, True) if self.fresh else CoreConnection._persistence_controls(b_command)

    def _with_first_options(self, command: list[bytes], *options: bytes) -> list[bytes]:
        """The command with options before all others: ssh, scp and sftp take the first value that they meet."""
        binaries = [to_bytes(self.get_option(f"{name}_executable")) for name in ("ssh", "sftp", "scp")]
        position = next((index for index, part in enumerate(command) if part in binaries), 0) + 1
        return [*command[:position], *options, *command[position:]]

    def _bare_run(
        self, cmd: list[bytes], in_data: bytes | None, sudoable: bool = True, checkrc: bool = True
    ) -> tuple[int, bytes, bytes]:
        """Core comes here once for each run of ssh, sftp and scp, at each of its retries: the one place to knock."""
        begun = time.monotonic()
        gate = None if self._has_master(cmd) else self._gate()
        if gate is None:
            return super()._bare_run(cmd, in_data, sudoable=sudoable, checkrc=checkrc)
        if gate.destination.instead:
            cmd = self._with_first_options(cmd, b"-o", to_bytes(gate.destination.instead))
        if gate.known.is_spa and not gate.destination.proxied:
            # An IPv6 address, which stays closed, would be tried first, and in silence for as long as ssh waits.
            cmd = self._with_first_options(cmd, b"-o", b"AddressFamily=inet")
        run = partial(super()._bare_run, cmd, in_data, sudoable=sudoable, checkrc=checkrc)
        # A password goes through a pipe that is made with the command and serves one run only.
        has_one_run = cmd[0] == b"sshpass"
        sent = False if self.fresh or has_one_run else self._knock_as_before(gate)
        if sent:
            result = self._unless_refused(gate, cmd, run)
            if result is not None:
                self._note_opened(gate, sent)
                return result
            self._remember(gate, None)
        opened = self._knock(gate)
        if opened is None:
            # What knocking took is taken off, so that a host that is down costs no more time than with plain ssh.
            left = max(1, math.ceil(self.get_option("timeout") - (time.monotonic() - begun)))
            cmd = self._with_first_options(cmd, b"-o", b"ConnectTimeout=%d" % left)
            return super()._bare_run(cmd, in_data, sudoable=sudoable, checkrc=checkrc)
        sent = False
        if gate.known.single_use:
            # What the look has used up was sent once more.
            self._let_open(opened)
        for _again in range(0 if has_one_run else _AGAIN[gate.known.single_use]):
            result = self._unless_refused(gate, cmd, run)
            if result is not None:
                self._note_opened(gate, sent)
                return result
            display.vvv("Refused after the port was open: what the knock opened was used up; knocking again", self.host)
            with contextlib.suppress(OSError, PortknockError):
                sent = gate.known.send_again(gate.way, opened)
                self._let_open(opened)
        return run()

    @staticmethod
    def _note_opened(gate: _Gate, sent: Ticket | bool) -> None:
        """Note that the port was open after this was sent."""
        if isinstance(sent, Ticket):
            gate.known.usage.opened(sent)

    def _unless_refused(self, gate: _Gate, command: list[bytes], run: Callable[[], _Ran]) -> _Ran | None:
        """Run ssh; None where the port was closed to it, so that nothing ran on the host that must not run twice."""
        try:
            result = run()
        except AnsibleConnectionFailure as exc:
            if not self._is_refusal(gate, command, str(exc)):
                raise
            return None
        silent = result[0] == 255 and not result[1]
        return None if silent and self._is_refusal(gate, command, to_text(result[2])) else result

    def _is_refusal(self, gate: _Gate, command: list[bytes], said: str) -> bool:
        """Whether ssh says that it did not get as far as the host."""
        if isinstance(gate.way, FromHere):
            # What ssh itself says of this very port.
            return f"ssh: connect to host {gate.destination.host} port {gate.destination.port}: " in said
        makes_master, _unused = self._persistence_controls(command)
        if makes_master and self._has_master(command):
            # A session had begun, whatever its command may say.
            return False
        # Whoever makes a master silences the ssh that goes to the jump host.
        return any(words in said for words in _REFUSED_BEHIND_JUMP) or (makes_master and _PROXY_ENDED in said)

    def _has_master(self, command: Sequence[bytes]) -> bool:
        """Does a living ControlPersist master carry this command?"""
        if self.fresh:
            return False
        matches = (_CONTROL_PATH.fullmatch(to_text(part)) for part in command)
        match = next(filter(None, matches), None)
        path: str | None = match["path"] if match else None
        if path is None or re.search(r"[%~$]", path):
            try:
                path = self._locate(*(["-o", f"ControlPath={path}"] if path else [])).control_path
            except PortknockError:
                return False
        if path is None or path.lower() == "none":
            return False
        # A socket that a dead master left behind refuses the connect.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(1)
            try:
                sock.connect(path)
            except OSError:
                return False
        return True

    def _gate(self) -> _Gate | None:
        """What to knock at, or None where plain ssh is what serves."""
        try:
            known = self.host_sequences()
        except PortknockError as exc:
            raise AnsibleError(str(exc)) from None
        if known is None or not known.has_any:
            return None
        try:
            destination = self.destination()
            way = self._way(known, destination)
        except PortknockError as exc:
            display.v(f"No knock: {exc}", host=known.host)
            return None
        if way is None:
            return None
        identity = [*known.identity, known.host, destination.host, destination.port, destination.jump]
        return _Gate(destination, way, known, self._memory(identity))

    def _way(self, known: HostSequences, destination: Destination) -> Way | None:
        """Where to knock from; None where that can't be.

        :raises PortknockError: the host's name does not resolve, or ssh does not say.
        """
        if not destination.proxied:
            addresses = resolve(destination.host, destination.port, destination.family)
            return FromHere(addresses, destination.port, destination.source)
        jump = self.jump_host()
        if jump is not None:
            if os.path.exists(self._memory(["unable", *jump.command])):
                return None
            patience = float(self.get_option("timeout"))
            return FromJump(jump, destination.host, destination.port, destination.family, patience)
        if not destination.jump:
            display.warning(
                f"{known.host} is reached through a ProxyCommand: a knock from here would come from the wrong address, so none "
                "is sent. From the jump host of a ProxyJump one would be."
            )
        return None

    def jump_host(self) -> JumpHost | None:
        """The last jump host on the way to the host, where knocks are to leave from there.

        :raises PortknockError: ssh does not say.
        """
        jump = self.destination().jump
        if not jump or not self.get_option("knock_from_jump"):
            return None
        config = configuration_file(ssh_arguments(self.get_option))
        return jump_host(jump, "ProxyJump", self.get_option("ssh_executable"), config)

    @staticmethod
    def _memory(identity: Sequence[object]) -> str:
        """A file in the run's own folder, which goes with it."""
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
        return os.path.join(constants.DEFAULT_LOCAL_TMP, f"portknock-{digest}")

    def _knock(self, gate: _Gate) -> _Note | None:
        """Knock and look until the port opens.

        :returns: what opened it; None where nothing did.
        """
        budget = min(self.get_option("knock_timeout"), self.get_option("timeout") / 2)
        try:
            result, note = gate.known.knock(gate.way, budget)
        except JumpError as exc:
            self._tell(gate, exc)
            return None
        except PortknockError as exc:
            raise AnsibleError(str(exc)) from None
        if note is not None:
            if not os.path.exists(gate.memory):
                self._remember(gate, note._asdict())
            display.vvv(f"Knocked: open after {result.elapsed:.3f} s, {result.attempts} sent", host=self.host)
        else:
            display.v(
                f"The knock did not open port {gate.destination.port}: {result.state} after {result.elapsed:.1f} s and "
                f"{result.attempts} tries. Connecting all the same.",
                host=self.host,
            )
        return note

    def _tell(self, gate: _Gate, failure: JumpError) -> None:
        """Say why there was no knock, and remember for the run where there will never be one."""
        if not failure.is_unable:
            display.v(f"No knock: {failure} Connecting all the same.", host=gate.known.host)
            return
        jump = self.jump_host()
        if jump is not None:
            self._write(self._memory(["unable", *jump.command]), None)
        display.warning(
            f"{gate.known.host}: no knock is sent. {failure} That is all right where the jump host is one of the gate's trusted "
            "sources (knock_server_trusted_sources); then say so by knock_from_jump=false."
        )

    def _knock_as_before(self, gate: _Gate) -> Ticket | bool:
        """Send again, without looking, what opened the port earlier in this run; False where nothing is known to."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, PortknockError):
            with open(gate.memory, encoding="ascii") as file:
                note = _Note(**json.load(file))
            sent = gate.known.send_again(gate.way, note)
            if sent:
                self._let_open(note)
            return sent
        return False

    @staticmethod
    def _let_open(note: _Note) -> None:
        """Wait as long as the port took to open before, where nobody looks: a daemon takes longer than ssh does to begin."""
        time.sleep(min(note.took, _LONGEST_WAIT))

    def _remember(self, gate: _Gate, known: dict[str, object] | None) -> None:
        """Note for the run's later workers what opened the port, or None: that one has to look each time.

        The note holds no secret: which sequence, not what is in it.
        """
        self._write(gate.memory, known)

    @staticmethod
    def _write(path: str, note: dict[str, object] | None) -> None:
        with contextlib.suppress(OSError), open(path, "w", encoding="ascii") as file:
            json.dump(note, file)


__all__ = ("Connection", "HostSequences")
