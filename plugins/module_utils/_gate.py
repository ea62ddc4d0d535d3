# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a gate is: its settings, checked, and the model that a back end's templates render.

The model is an automaton for all operators together, so that what a packet costs does not depend on their number.
No error text of this module holds a port of a sequence.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import AbstractSet, NamedTuple, Optional, Union

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock, parse_knocks
from ansible_collections.fleet.portknock.plugins.module_utils._sequences import (
    ECHO_LENGTHS,
    derive_echo_tripwires,
    derive_tripwires,
)
from ansible_collections.fleet.portknock.plugins.module_utils._spa import PORT as SPA_PORT
from ansible_collections.fleet.portknock.plugins.module_utils._spa import gnupg_keys_of, keys_of, uses_gnupg
from ansible_collections.fleet.portknock.plugins.module_utils._stock import check_one_time

GUARDS = ("tripwires", "strict", "loose")
CLOSED_RESPONSES = ("mimic", "drop", "reset")
INPUT_POLICIES = ("accept", "drop")
SPA_KEYS = ("symmetric", "gnupg")

# A client whose first SYN after the knock is lost sends it again after 1 s and after 3 s: a window must outlast both.
SHORTEST_WINDOW = 5
LONGEST_SECONDS = 86400
MOST_TRIPWIRES = 20000
LARGEST_SET = 2**24
LONGEST_AUDIT_DAYS = 3650
# A clock that says less is wrong: no gate that lets operators expire is as old (2026-01-01T00:00:00Z).
EARLIEST_TIME = 1767225600

# How long the first packet of the flow that used up a window may be said again: clients repeat it after 1, 3 and 7 s.
BEGIN_TIMEOUT = 8

_OPTION = "knock_server_"
# What a host can do, as far as a check knows where the back end is still to be installed.
USUAL_PROBE = dict.fromkeys(
    ("socket_wildcard", "clock", "one_time", "counts", "echo", "ipset", "zones", "dnat_port"), True
)
# Why there are no icmp knocks on a host.
NO_ECHO = (
    "expected no icmp knocks on a host whose nft can't look up the length of a packet together with a source's progress (0.9.8, "
    "Debian 11), or whose iptables lacks the match length; nft 1.0.6 and newer can, and so can the back end iptables there."
)
# Answers to these come in under any policy.
_DHCP_CLIENTS = (Knock(68, "udp"), Knock(546, "udp"))
_PROTOCOL_NUMBERS = {"tcp": 6, "udp": 17}
_ALL_PORTS = 65535
# The words of YAML 1.1, as Ansible takes them.
_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}

# Progress and what a packet does to it, as the rules' scratch register holds it (a traffic class, major:minor in hex).
# Majors 1 are states on the way, majors 2 the last knock of an operator with that number, majors 7 the last knock of the
# one-time sequence with that id, majors 8 that of an operator's close sequence; these are the rest. The template's vmap names
# the same values.
_NOTHING = "0:0"
_AGAIN = "3:0"
_HIGHEST_STATE = 0xFFFF
_LAST_SECOND = 2145916799

# knockd's own bounds: knocks in a sequence, and in all of them together. Of more it makes a packet filter that the kernel does
# not take, and takes seconds and hundreds of megabytes to make it.
_KNOCKD_LONGEST = 32
_KNOCKD_MOST = 600
# How many of an operator's one-time sequences it waits for at a time, as opener.py has it.
_KNOCKD_ONE_TIME = 8

# Where stand-ins come from: ports that no service is registered for, so that no firewall treats them specially, and
# below 600, where glibc's bindresvport begins.
_STAND_INS = tuple(
    port
    for block in (range(225, 242), range(249, 256), range(272, 280), range(288, 308), range(325, 333), range(334, 344))
    for port in block
)
_STAND_IN_LABEL = b"fleet.portknock stand-ins version 1\0"

_Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


class Honoured(NamedTuple):
    """What a gate honours of one operator.

    ``number`` tells operators apart in the kernel and stays the operator's own on that host; ``sequences`` are newest first.
    ``valid_until`` is in seconds since 1970, UTC; a host whose clock is before ``valid_from`` lets nobody in who expires.
    ``one_time`` are sequences that open once each, by ids that are never used again on that host. ``close`` are those that shut
    the window of whoever sends one.
    """

    number: int
    sequences: Sequence[Sequence[Knock]]
    valid_until: Optional[int] = None
    valid_from: int = EARLIEST_TIME
    one_time: Mapping[int, Sequence[Knock]] = MappingProxyType({})
    close: Sequence[Sequence[Knock]] = ()

    @property
    def every_sequence(self) -> Iterator[Sequence[Knock]]:
        """All that opens, for good or once, and all that closes."""
        return chain(self.sequences, self.one_time.values(), self.close)


@dataclass(frozen=True)
class GateSettings:
    """A gate without its secrets. Times in seconds; trusted sources as CIDR, sorted and without overlap."""

    protected_tcp: tuple[int, ...]
    protected_udp: tuple[int, ...]
    guard: str = "tripwires"
    step_timeout: int = 5
    open_window: int = 30
    trusted4: tuple[str, ...] = ()
    trusted6: tuple[str, ...] = ()
    closed_response: str = "mimic"
    tripwires: int = 2000
    max_sources: int = 262144
    max_windows: int = 65536
    single_use: bool = False
    audit_days: int = 30
    one_time: int = 0
    close_sequence: bool = False
    input_policy: str = "accept"
    open_ports: tuple[Knock, ...] = ()
    spa_keys: str = "symmetric"

    @property
    def protected(self) -> frozenset[int]:
        """The protected ports of either protocol."""
        return frozenset((*self.protected_tcp, *self.protected_udp))

    @property
    def served(self) -> tuple[Knock, ...]:
        """The ports that are open where all others are closed, sorted; none where the host's own policy decides."""
        return self.open_ports if self.input_policy == "drop" else ()

    def shuts(self, port: Knock) -> bool:
        """Whether the gate closes a port that is not protected."""
        is_protected = port.port in (self.protected_tcp if port.proto == "tcp" else self.protected_udp)
        return self.input_policy == "drop" and not is_protected and port not in (*self.open_ports, *_DHCP_CLIENTS)


def settings_from(options: Mapping[str, object]) -> GateSettings:
    """Check the role's settings. Options are named without ``knock_server_``; one that isn't given has its default.

    :raises PortknockError: names the option, what was expected and what came.
    """
    protected = parse_knocks(options.get("protected_ports", ["22/tcp"]), f"{_OPTION}protected_ports")
    if not protected:
        raise PortknockError(f"{_OPTION}protected_ports: expected at least one port such as 22/tcp; got an empty list.")
    if max(_count(protected, proto) for proto in ("tcp", "udp")) > len(_STAND_INS) // 2:
        raise PortknockError(
            f"{_OPTION}protected_ports: expected at most {len(_STAND_INS) // 2} ports of each protocol; got more."
        )
    trusted4, trusted6 = _trusted(options.get("trusted_sources", ()))
    served = parse_knocks(options.get("open_ports", []), f"{_OPTION}open_ports")
    both = [str(knock) for knock in served if knock in protected]
    if both:
        raise PortknockError(
            f"{_OPTION}open_ports: expected no port of {_OPTION}protected_ports, which knocks open; got {', '.join(both)}."
        )
    return GateSettings(
        protected_tcp=tuple(sorted(knock.port for knock in protected if knock.proto == "tcp")),
        protected_udp=tuple(sorted(knock.port for knock in protected if knock.proto == "udp")),
        guard=_choice(options, "guard", GUARDS),
        step_timeout=_number(options, "step_timeout", 1, LONGEST_SECONDS, " of seconds"),
        open_window=_number(options, "open_window", SHORTEST_WINDOW, LONGEST_SECONDS, " of seconds"),
        trusted4=trusted4,
        trusted6=trusted6,
        closed_response=_choice(options, "closed_response", CLOSED_RESPONSES),
        tripwires=_number(options, "tripwires", 1, MOST_TRIPWIRES),
        max_sources=_number(options, "max_sources", 1, LARGEST_SET),
        max_windows=_number(options, "max_windows", 1, LARGEST_SET),
        single_use=_flag(options, "single_use"),
        audit_days=_number(options, "audit_days", 0, LONGEST_AUDIT_DAYS, " of days"),
        one_time=check_one_time(options.get("one_time", 0)),
        close_sequence=_flag(options, "close_sequence"),
        input_policy=_choice(options, "input_policy", INPUT_POLICIES),
        open_ports=tuple(sorted(served)),
        spa_keys=check_spa_keys(options.get("spa_keys", SPA_KEYS[0])),
    )


def check_spa_keys(value: object) -> str:
    """Return the kind of keys that packets have.

    :raises PortknockError: there is no such kind.
    """
    return _choice({"spa_keys": value}, "spa_keys", SPA_KEYS)


def build_model(
    settings: GateSettings,
    operators: Mapping[str, Honoured],
    tripwire_seed: bytes,
    avoid: AbstractSet[int],
    probe: Mapping[str, object],
    opener: str = "kernel",
) -> dict[str, object]:
    """What the templates see as ``gate``: numbers, strings and lists, the same for the same arguments.

    :param operators: what opens, by operator.
    :param avoid: ports that are in use on the host: neither a tripwire nor a stand-in is made of them.
    :param probe: what the host can do: ``socket_wildcard`` (nft and kernel can tell a listening socket from another),
        ``clock`` (its rules can ask for the time), ``one_time`` (they can use a sequence up), ``counts`` (a command can
        write how often a source has opened), ``echo`` (its rules can look up lengths of packets), ``gnupg`` (it has GnuPG).
    :param opener: what watches for knocks, see the back end's abilities.
    :raises PortknockError: sequences that can't be told apart, or that hold a protected port; an operator who expires on a host
        whose rules can't, or one-time sequences where nothing uses one up.
    """
    if probe.get("clock") is False:
        expiring = sorted(name for name, operator in operators.items() if operator.valid_until is not None)
        if expiring:
            raise PortknockError(
                f"{_OPTION}valid_until: expected a host whose nft and kernel can compare the time in a rule (meta time); "
                f"this one's can't, so it would never shut out {', '.join(expiring)}."
            )
    if settings.guard == "tripwires" and probe.get("ipset") is False:
        raise PortknockError(
            f"{_OPTION}guard: expected strict or loose on a host whose iptables has no sets (the program ipset, and a kernel "
            "with ip_set and xt_set); got tripwires, which are thousands of ports."
        )
    if probe.get("gnupg") is False and any(
        uses_gnupg(knock) for operator in operators.values() for knocks in operator.sequences for knock in knocks
    ):
        raise PortknockError(
            f"{_OPTION}spa_keys: expected symmetric on a host without GnuPG (Debian's packages gpg and gpg-agent); got gnupg."
        )
    is_spa = any(knocks[0].spa for operator in operators.values() for knocks in operator.sequences if knocks)
    steps = [] if is_spa else _automaton(settings, operators)
    if any(operator.one_time for operator in operators.values()) and probe.get("one_time") is not True:
        raise PortknockError(
            f"{_OPTION}one_time: expected a host whose nft and kernel can count the bytes of an element (quota); this one's "
            "can't, so nothing would use a sequence up."
        )
    every = [knock for operator in operators.values() for knocks in operator.every_sequence for knock in knocks]
    lengths = {knock.port for knock in every if knock.proto == "icmp"}
    if lengths and probe.get("echo") is not True:
        raise PortknockError(f"{_OPTION}sequence_protocols: {NO_ECHO}")
    in_sequences = {knock.port for knock in every if knock.proto != "icmp"}
    barred = settings.protected | in_sequences | avoid | {knock.port for knock in settings.served}
    tripwires: tuple[int, ...] = ()
    if settings.guard == "tripwires" and not is_spa:
        tripwires = derive_tripwires(tripwire_seed, settings.tripwires, barred)
    stand_ins = _stand_ins(tripwire_seed, barred)
    look = {
        "tcp": _pair(settings.protected_tcp, stand_ins, settings),
        "udp": _pair(settings.protected_udp, stand_ins, settings),
    }
    return {
        "opener": opener,
        "protected_tcp": list(settings.protected_tcp),
        "protected_udp": list(settings.protected_udp),
        "trusted4": list(settings.trusted4),
        "trusted6": list(settings.trusted6),
        "guard": settings.guard,
        "closed_response": settings.closed_response,
        "step_timeout": settings.step_timeout,
        "open_window": settings.open_window,
        "max_sources": settings.max_sources,
        "max_windows": settings.max_windows,
        "audit_days": settings.audit_days,
        "operators": [
            {
                "name": name,
                "number": f"{operator.number:x}",
                "valid_until": operator.valid_until,
                "valid_from": operator.valid_from,
            }
            for name, operator in sorted(operators.items())
        ],
        "one_time": [
            {"id": f"{identity:x}", "number": f"{operator.number:x}"}
            for _name, operator in sorted(operators.items())
            for identity in sorted(operator.one_time)
        ],
        "steps": steps,
        "close": [
            {
                "name": name,
                "number": f"{operator.number:x}",
                "knocks": [{"proto": knock.proto, "port": knock.port} for knock in knocks],
            }
            for name, operator in sorted(operators.items())
            for knocks in operator.close
        ],
        "doors": _doors(settings, operators) if opener == "knockd" else [],
        "echo": {
            "shortest": ECHO_LENGTHS[0],
            "longest": ECHO_LENGTHS[-1],
            "tripwires": sorted(derive_echo_tripwires(tripwire_seed, lengths)) if tripwires else [],
        }
        if lengths
        else None,
        "tripwires": sorted(tripwires),
        "look_tcp": look["tcp"],
        "look_udp": look["udp"],
        "single_use": settings.single_use,
        "input_policy": settings.input_policy,
        "served": [str(knock) for knock in settings.served],
        "served_tcp": [knock.port for knock in settings.served if knock.proto == "tcp"],
        # Not every fwknopd sees packets before a filter does.
        "served_udp": [knock.port for knock in settings.served if knock.proto == "udp"] + [SPA_PORT] * is_spa,
        "begin_timeout": BEGIN_TIMEOUT,
        "socket_wildcard": probe.get("socket_wildcard") is True,
        "counts": probe.get("counts") is not False,
        **({"spa": _spa(settings, operators)} if is_spa else {}),
        **(_for_iptables(operators, steps, probe) if opener == "iptables" else {}),
    }


def _spa(settings: GateSettings, operators: Mapping[str, Honoured]) -> dict[str, object]:
    """What opens a gate by one packet: where it comes, what it may ask for, and a stanza for each key."""
    return {
        "port": SPA_PORT,
        "asked": _asked(settings, operators),
        "stanzas": [
            {
                "operator": name,
                "number": f"{operator.number:x}",
                "valid_until": operator.valid_until,
                **_stanza(knock),
            }
            for name, operator in sorted(operators.items())
            for knocks in operator.sequences
            for knock in knocks
        ],
        "gnupg": _gnupg(operators),
    }


def _stanza(knock: Knock) -> dict[str, str]:
    """What tells a packet from others: a key and the HMAC's, or GnuPG's fingerprints of whom it is for and from."""
    if not uses_gnupg(knock):
        return dict(zip(("key", "hmac_key"), keys_of(knock)))
    keys = gnupg_keys_of(knock)
    return {"key": "", "hmac_key": keys.hmac_key, "recipient": keys.own_fingerprint, "signer": keys.peer_fingerprint}


def _gnupg(operators: Mapping[str, Honoured]) -> dict[str, list[str]]:
    """GnuPG's keys that the host has to have, in base64, and the fingerprints of those whose signatures count."""
    every = [
        gnupg_keys_of(knock)
        for _name, operator in sorted(operators.items())
        for knocks in operator.sequences
        for knock in knocks
        if uses_gnupg(knock)
    ]
    return {
        "keys": [key for keys in every for key in (keys.own, keys.peer)],
        "trusted": [keys.peer_fingerprint for keys in every],
    }


def _asked(settings: GateSettings, operators: Mapping[str, Honoured]) -> list[dict[str, str]]:
    """What packets may ask for: the protected ports, and what a key was made for that have been protected then."""
    ports = {Knock(port, "tcp") for port in settings.protected_tcp} | {
        Knock(port, "udp") for port in settings.protected_udp
    }
    ports |= {
        knock._replace(spa="") for operator in operators.values() for knocks in operator.sequences for knock in knocks
    }
    return [
        {"name": f"{port.proto}/{port.port}", "number": f"{_PROTOCOL_NUMBERS[port.proto]}/{port.port}"}
        for port in sorted(ports)
    ]


def guess_cost(settings: GateSettings, length: int, opener: str = "kernel") -> float:
    """The chance that one sweep, which sends a packet to each port once in random order, opens the gate.

    For one sequence of ``length`` knocks of one protocol, without regard to the step timeout.

    :param opener: what watches for knocks; not fwknop, whose packets are no ports.
    """
    chance = 1.0
    # knockd ignores wrong ports, whatever the guard.
    guard = "loose" if opener == "knockd" else settings.guard
    if guard == "strict":
        for index in range(length - 1):
            chance /= _ALL_PORTS - index
        return chance
    tripwires = settings.tripwires if guard == "tripwires" else 0
    for index in range(2, length + 1):
        chance /= tripwires + index
    return chance


def guard_warnings(settings: GateSettings, length: int, opener: str = "kernel") -> list[str]:
    """What to tell the user of how the gate is guarded against guesses.

    :param length: of a sequence.
    :param opener: what watches for knocks.
    """
    if opener == "knockd":
        return _knockd_warnings(settings, length)
    if opener == "fwknop":
        return _meaningless(settings, "fwknop, whose packets nobody can guess")
    warning = _loose_warning(settings, length)
    return [warning] if warning else []


def _knockd_warnings(settings: GateSettings, length: int) -> list[str]:
    cases = round(1 / guess_cost(settings, length, "knockd"))
    return [
        f"{_OPTION}backend: knockd ignores ports that are in none of its sequences, so one sweep over all ports in random order "
        f"opens a sequence of {length} knocks in about 1 of {cases} cases; nftables makes that practically "
        "impossible, and one-time sequences make what was guessed worthless.",
        *_meaningless(settings, "knockd, which has a guard of its own"),
    ]


def _meaningless(settings: GateSettings, whom: str) -> list[str]:
    return [
        f"{_OPTION}{key}: {getattr(settings, key)} means nothing to {whom}."
        for key in ("guard", "tripwires")
        if getattr(settings, key) != getattr(GateSettings, key)
    ]


def _loose_warning(settings: GateSettings, length: int) -> Optional[str]:
    if settings.guard != "loose":
        return None
    return (
        f"{_OPTION}guard: loose ignores wrong ports, so one sweep over all ports in random order opens a sequence of "
        f"{length} knocks in about 1 of {round(1 / guess_cost(settings, length))} cases, and {length} sweeps open any; "
        "tripwires or strict make that practically impossible."
    )


def _count(knocks: Iterable[Knock], proto: str) -> int:
    return sum(knock.proto == proto for knock in knocks)


def _choice(options: Mapping[str, object], key: str, choices: Sequence[str]) -> str:
    value = options.get(key, choices[0])
    if not isinstance(value, str) or value not in choices:
        raise PortknockError(f"{_OPTION}{key}: expected one of {', '.join(choices)}; got {value!r}.")
    return value


def _number(options: Mapping[str, object], key: str, lowest: int, highest: int, unit: str = "") -> int:
    value = options.get(key, getattr(GateSettings, key))
    # -e key=value on the command line gives text.
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise PortknockError(
            f"{_OPTION}{key}: expected a whole number{unit} from {lowest} to {highest}; got {value!r}."
        )
    return value


def _flag(options: Mapping[str, object], key: str) -> bool:
    value = options.get(key, getattr(GateSettings, key))
    # -e key=value on the command line gives text.
    if isinstance(value, str):
        value = _FLAGS.get(value.lower(), value)
    if not isinstance(value, bool):
        raise PortknockError(f"{_OPTION}{key}: expected true or false; got {value!r}.")
    return value


def _trusted(values: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    option = f"{_OPTION}trusted_sources"
    if not isinstance(values, (list, tuple)):
        raise PortknockError(f"{option}: expected a list such as [192.0.2.0/24]; got {values!r}.")
    networks4: list[ipaddress.IPv4Network] = []
    networks6: list[ipaddress.IPv6Network] = []
    for value in values:
        network = _network(value, option)
        if isinstance(network, ipaddress.IPv4Network):
            networks4.append(network)
        else:
            networks6.append(network)
    # An interval set refuses ranges that overlap.
    collapsed4 = tuple(ipaddress.collapse_addresses(networks4))
    collapsed6 = tuple(ipaddress.collapse_addresses(networks6))
    trusted4, trusted6 = tuple(map(str, collapsed4)), tuple(map(str, collapsed6))
    for everything in ("0.0.0.0/0", "::/0"):
        if everything in (*trusted4, *trusted6):
            raise PortknockError(f"{option}: expected less than every address there is; got {everything} in sum.")
    return trusted4, trusted6


def _network(value: object, option: str) -> _Network:
    # A scoped address would be taken without its scope by some versions of Python and refused by others.
    if isinstance(value, str) and "%" not in value:
        try:
            return ipaddress.ip_network(value)
        except ValueError:
            pass
    raise PortknockError(
        f"{option}: expected networks such as 192.0.2.0/24 or 2001:db8::/32, without bits beyond the prefix; got {value!r}."
    )


def _automaton(settings: GateSettings, operators: Mapping[str, Honoured]) -> list[dict[str, object]]:
    """The transitions that knocks make: in ``state``, a packet to ``proto`` and ``port`` leads to ``next``."""
    option = f"{_OPTION}sequences"
    steps: list[dict[str, object]] = []
    first_of: dict[Knock, str] = {}
    states = 0

    def add(state: str, knock: Knock, follows: str) -> None:
        steps.append({"state": state, "proto": knock.proto, "port": knock.port, "next": follows})

    for operator, honoured in sorted(operators.items()):
        finals = [(knocks, f"2:{honoured.number:x}") for knocks in honoured.sequences]
        finals += [(knocks, f"7:{identity:x}") for identity, knocks in sorted(honoured.one_time.items())]
        finals += [(knocks, f"8:{honoured.number:x}") for knocks in honoured.close]
        for knocks, final in finals:
            if not knocks or len(set(knocks)) != len(knocks):
                raise PortknockError(f"{option}: expected each port of {operator}'s sequence once, and one at least.")
            if any(knock.is_among(settings.protected) for knock in knocks):
                raise PortknockError(f"{option}: expected no protected port; {operator}'s sequence holds one.")
            if knocks[0] in first_of:
                raise PortknockError(
                    f"{option}: expected sequences that begin differently; one of {operator} and one of "
                    f"{first_of[knocks[0]]} begin with the same knock."
                )
            first_of[knocks[0]] = operator
            state = _NOTHING
            for index, knock in enumerate(knocks):
                is_last = index == len(knocks) - 1
                states += 0 if is_last else 1
                follows = final if is_last else f"1:{states:x}"
                add(state, knock, follows)
                if not is_last:
                    # The first knock said again is a new start; a later one changes nothing, its timeout included.
                    add(follows, knock, _AGAIN if index else follows)
                state = follows
    if states > _HIGHEST_STATE:
        raise PortknockError(
            f"{option}, {_OPTION}one_time: expected at most {_HIGHEST_STATE} knocks in all, the last ones of the sequences not "
            f"counted; got {states}. Have fewer one-time sequences, shorter ones, or fewer operators."
        )
    return steps


def _doors(settings: GateSettings, operators: Mapping[str, Honoured]) -> list[dict[str, object]]:
    """What knockd waits for: each sequence with its operator's number, whether it shuts, and its id where it opens once; those
    come last.

    knockd has one time for a whole sequence, in whole seconds of the clock, so that one which has just begun may count: as long
    as every step may take, and one more.
    """
    every = [one for _name, one in sorted(operators.items())]
    reusable = [(one.number, "", False, knocks) for one in every for knocks in one.sequences]
    reusable += [(one.number, "", True, knocks) for one in every for knocks in one.close]
    once = [
        (one.number, f"{identity:x}", False, knocks)
        for one in every
        for identity, knocks in sorted(one.one_time.items())
    ]
    option = f"{_OPTION}sequences"
    for *_door, knocks in (*reusable, *once):
        if len(knocks) > _KNOCKD_LONGEST:
            raise PortknockError(
                f"{option}: expected at most {_KNOCKD_LONGEST} knocks with {_OPTION}backend=knockd; got {len(knocks)}."
            )
    most = max((len(knocks) for *_door, knocks in once), default=0)
    waiting = sum(min(_KNOCKD_ONE_TIME, len(operator.one_time)) for operator in operators.values()) * most
    waiting += sum(len(knocks) for *_door, knocks in reusable)
    if waiting > _KNOCKD_MOST:
        raise PortknockError(
            f"{_OPTION}operators: expected at most {_KNOCKD_MOST} knocks in all of the sequences that knockd waits for; got "
            f"{waiting}. Have fewer operators, shorter sequences, or another {_OPTION}backend."
        )
    return [
        {
            "number": f"{number:x}",
            "id": identity,
            "shuts": shuts,
            "knocks": [f"{knock.port}:{knock.proto}" for knock in knocks],
            "timeout": settings.step_timeout * (len(knocks) - 1) + 1,
        }
        for number, identity, shuts, knocks in (*reusable, *once)
    ]


def _for_iptables(
    operators: Mapping[str, Honoured], steps: Iterable[Mapping[str, object]], probe: Mapping[str, object]
) -> dict[str, object]:
    """What rules of iptables need besides: what the host can do, the states on the way, and when operators may knock."""
    return {
        "probe": {name: value is True for name, value in sorted(probe.items())},
        "states": _states(steps),
        "times": {
            f"{operator.number:x}": {"begins": _utc(operator.valid_from), "ends": _utc(operator.valid_until - 1)}
            for operator in operators.values()
            if operator.valid_until is not None
        },
    }


def _states(steps: Iterable[Mapping[str, object]]) -> list[dict[str, object]]:
    """The states on the way, each with the one that it comes after (None behind a first knock)."""
    after: dict[str, Optional[str]] = {}
    for step in steps:
        state, follows = str(step["state"]), str(step["next"])
        if follows.startswith("1:") and state != follows:
            after[follows[2:]] = None if state == _NOTHING else f"s{state[2:]}"
    return [{"number": number, "name": f"s{number}", "after": former} for number, former in after.items()]


def _utc(seconds: int) -> str:
    """A time as xt_time takes it, which ends with the year 2037."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(max(0, min(seconds, _LAST_SECOND))))


def _stand_ins(seed: bytes, barred: AbstractSet[int]) -> list[int]:
    """Low ports that nothing uses, in an order that only the host's secret gives."""

    def rank(port: int) -> bytes:
        return hmac.new(seed, _STAND_IN_LABEL + port.to_bytes(2, "big"), hashlib.sha256).digest()

    return sorted((port for port in _STAND_INS if port not in barred), key=rank)


def _pair(protected: Sequence[int], stand_ins: Sequence[int], settings: GateSettings) -> list[dict[str, int]]:
    if settings.closed_response != "mimic":
        return []
    if len(stand_ins) < len(protected):
        raise PortknockError(
            f"{_OPTION}closed_response: mimic needs an unused low port for each protected port of a protocol, "
            f"{len(protected)}; this host leaves {len(stand_ins)}."
        )
    return [{"port": port, "stand_in": stand_in} for port, stand_in in zip(protected, stand_ins)]


__all__ = (
    "CLOSED_RESPONSES",
    "EARLIEST_TIME",
    "GUARDS",
    "INPUT_POLICIES",
    "LONGEST_SECONDS",
    "NO_ECHO",
    "SHORTEST_WINDOW",
    "SPA_KEYS",
    "USUAL_PROBE",
    "GateSettings",
    "Honoured",
    "build_model",
    "check_spa_keys",
    "guard_warnings",
    "guess_cost",
    "settings_from",
)
