# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The back end nftables: the gate as one table of the kernel's own packet filter."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from typing import Any, Mapping, Optional, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._backends import HostFile, files_of
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._nft import (
    TABLE,
    Opening,
    Source,
    close_window,
    forget_openings,
    has_one_time,
    is_dormant,
    kept_elements,
    listing_digests,
    openings,
    read_listing,
    replace_transaction,
    windows,
    without_armed,
)
from ansible_collections.fleet.portknock.plugins.module_utils._procnet import Peer
from ansible_collections.fleet.portknock.plugins.module_utils._system import Completed, Runner
from ansible_collections.fleet.portknock.plugins.module_utils._system import run as run_program

# On one line with what follows it, so that the line that nft names is the template's.
_FRESH_TABLE = f"add table inet {TABLE}; delete table inet {TABLE}; "

# What the gate can't do without: loaded as a check only, and named in the error when nft or the kernel refuses it.
_NEEDED = {
    "sets that rules write with a timeout for each element": (
        "set s { type ipv4_addr; flags dynamic,timeout; size 8; }\n"
        "chain c { type filter hook prerouting priority -150; update @s { ip saddr timeout 5s }; }"
    ),
    "deleting set elements in a rule": (
        "set s { type ipv4_addr; flags dynamic,timeout; size 8; }\n"
        "chain c { type filter hook prerouting priority -150; delete @s { ip saddr }; }"
    ),
    "maps with concatenated keys": (
        "map m { type classid . inet_proto . inet_service : classid; elements = { 0:0 . tcp . 7 : 0:1 }; }\n"
        "chain c { type filter hook prerouting priority -150; meta priority set meta priority . meta l4proto . th dport map @m; }"
    ),
    "the fib expression": "chain c { type filter hook prerouting priority -150; fib daddr type != local accept; }",
    "rewriting a port outside NAT": (
        "chain c { type filter hook prerouting priority -150; tcp dport set tcp dport map { 7 : 9 }; }"
    ),
    "rejecting before routing": "chain c { type filter hook prerouting priority -150; tcp dport 7 reject with tcp reset; }",
}
# What it does better with; the templates have another way.
_WANTED = {
    "one_time": (
        "set s { type classid; flags dynamic; size 8; }\n"
        "chain c { type filter hook prerouting priority -150; add @s { meta priority quota until 87 bytes }; }"
    ),
    "echo": (
        "map m { typeof meta priority . ip length : meta priority; elements = { 0:0 . 328 : 0:1 }; }\n"
        "chain c { type filter hook prerouting priority -150; meta priority set meta priority . ip length map @m; }"
    ),
    "socket_wildcard": "chain c { type filter hook prerouting priority -150; socket wildcard 0 accept; }",
    "clock": "chain c { type filter hook prerouting priority -150; meta time >= 1767225600 meta time < 4102444800 accept; }",
}
# What a command of a daemon's does with records, and rules need not; nft 0.9.8 crashes over it.
_COUNT = (
    "set s { type ipv4_addr; flags dynamic,timeout; timeout 1d; elements = { 192.0.2.1 counter packets 2 bytes 0 } }"
)
# The kernel's reasons for refusing a rule; nft prints them after this phrase, and nothing of the rule with them.
_KERNEL_REASON = re.compile(r"Could not process rule: ([A-Za-z ,'-]+)")
_ELEMENT_COUNT = re.compile(r"\bcounter packets [0-9]+ bytes [0-9]+ (?=timeout |expires )")
_NO_TABLE = "No such file or directory"
_NOT_INSTALLED = 127
# As the gate's template names them.
_ONE_TIME_OPERATOR = re.compile(r"^  # Operator ([0-9a-f]+) with one-time sequences: (\S+)$", re.MULTILINE)
_PYTHON = (sys.executable, "-I", "-S")
_LINE = re.compile(r"^[^\n:]*:([0-9]+):[0-9]+", re.MULTILINE)


class Nftables:
    """The gate as one table of the kernel's own packet filter."""

    name = "nftables"
    kernel = "nft"
    program = "nft"
    files: Mapping[str, HostFile] = files_of("closed", "load", "watch", "stock", "unit", "watch_unit", "gate")
    closed = "closed"
    units: Sequence[str] = ("fleet-portknock.service", "fleet-portknock-watch.service")
    services: Sequence[str] = ("fleet-portknock-watch.service",)
    opener: Optional[str] = None
    opener_files: Sequence[str] = ()

    def __init__(self, run: Runner = run_program) -> None:
        self._run = run

    def version(self) -> Optional[str]:
        """Version of nft, such as ``1.0.6``; None where it isn't installed."""
        done = self._run([self.program, "--version"], None)
        found = re.search(r"v([0-9][^ ]*)", done.stdout)
        return found.group(1) if done.code == 0 and found else None

    def missing_programs(self) -> list[str]:
        """Programs that have to be installed."""
        return [] if self.version() else [self.program]

    def capabilities(self) -> dict[str, bool]:
        """Which of the optional ways this host's nft and kernel can go; the templates read it as ``gate``'s probe.

        :raises PortknockError: something that the gate can't do without is refused.
        """
        # One call answers for the usual host; only where it fails are they asked one by one.
        if self._check(*_NEEDED.values(), *_WANTED.values()).code == 0:
            return dict.fromkeys(_WANTED, True)
        for feature, text in _NEEDED.items():
            done = self._check(text)
            if done.code != 0:
                raise PortknockError(
                    f"knock_server_backend: {self.name} needs {feature}; this host's nft {self.version()} and kernel refuse it"
                    f" ({_cause(done)})."
                )
        return {name: self._check(text).code == 0 for name, text in _WANTED.items()}

    def notes(self, capabilities: Mapping[str, bool]) -> list[str]:
        """Nothing: what can't be gone round is refused."""
        return []

    def left_behind(self) -> list[str]:
        """Nothing: a table that somebody saved is one that somebody loads, by itself."""
        return []

    def check(self, texts: Mapping[str, str]) -> None:
        """Let nft and the kernel check the rules among the files' texts without loading them.

        :raises PortknockError: some are refused; says where, never what, since nft quotes the line with its ports.
        """
        for name in ("gate", "closed"):
            done = self._run([self.program, "-c", "-f", "-"], _FRESH_TABLE + texts[name])
            if done.code != 0:
                template = os.path.basename(self.files[name].template)
                raise PortknockError(f"{template}: expected rules that nft accepts; it refuses them ({_cause(done)}).")

    def boot_text(self, text: str) -> str:
        """What is kept on disk: loads whatever is in the kernel, in one transaction."""
        return _FRESH_TABLE + text

    def body(self, boot_text: str) -> Optional[str]:
        """The template's text inside :meth:`boot_text`, or None where it isn't one."""
        _header, found, text = boot_text.partition(_FRESH_TABLE)
        return text if found else None

    def listing(self) -> Optional[dict[str, Any]]:
        """The kernel's table as ``nft -j`` lists it; None where there is none.

        :raises PortknockError: nft does not say. To take that for an empty kernel would load the gate on top of another.
        """
        done = self._run([self.program, "-j", "list", "table", "inet", TABLE], None)
        if done.code == _NOT_INSTALLED or (done.code != 0 and _NO_TABLE in done.stderr):
            return None
        listing = read_listing(done.stdout) if done.code == 0 else None
        if listing is None:
            raise PortknockError(f"nft can't list the gate's table ({_cause(done)}).")
        return listing

    def kernel_text(self) -> Optional[str]:
        """The kernel's table as rules that can be loaded again; None where there is none or it can't be listed."""
        done = self._run([self.program, "list", "table", "inet", TABLE], None)
        start = done.stdout.find(f"table inet {TABLE} ")
        if done.code != 0 or start < 0:
            return None
        # Over elements with counts nft 0.9.8 crashes.
        return without_armed(_ELEMENT_COUNT.sub("", done.stdout[start:]))

    def accepts(self, text: str) -> bool:
        """Whether nft and the kernel would load what is kept on disk (see :meth:`boot_text`)."""
        return self._run([self.program, "-c", "-f", "-"], text).code == 0

    def digests(self, listing: dict[str, Any]) -> dict[str, str]:
        """What the table says, apart from what comes and goes in it: a digest of each chain, set and map."""
        return listing_digests(listing)

    def load(self, text: str, listing: Optional[dict[str, Any]]) -> None:
        """Put the text in place of what is loaded: one transaction; open windows and records of openings stay.

        :raises PortknockError: the kernel refuses it; then nothing has changed.
        """
        # A table that somebody has set dormant can't be changed rule by rule.
        if listing is None or is_dormant(listing):
            done = self._run([self.program, "-f", "-"], self.boot_text(text))
        else:
            done = self._run([self.program, "-f", "-"], replace_transaction(text, listing))
            if done.code < 0:
                # nft 0.9.8 crashes over some of these before it has told the kernel anything.
                done = self._run([self.program, "-f", "-"], self.boot_text(text) + kept_elements(text, listing))
        if done.code != 0:
            raise PortknockError(f"The gate can't be loaded: nft refuses it ({_cause(done)}).")

    def arm(self, texts: Mapping[str, str]) -> None:
        """Let one-time sequences open, where the gate that has been loaded has any.

        :raises PortknockError: they can't.
        """
        if not has_one_time(texts["gate"]):
            return
        done = self._run([*_PYTHON, "-", "arm"], texts["stock"])
        if done.code != 0:
            # Its own words hold no secret.
            raise PortknockError(f"The one-time sequences can't be armed: {done.stderr.strip()[3:] or done.code}")

    def arm_command(self, root: str = "") -> str:
        """Shell command that does so after the former gate was loaded again; it succeeds whether or not they can be."""
        program = shlex.quote(root + self.files["stock"].path)
        return f"{{ [ ! -e {program} ] || {' '.join(map(shlex.quote, _PYTHON))} {program} arm || :; }}"

    def stock(self, text: str, root: str = "") -> dict[str, Any]:
        """How many one-time sequences of the gate's text are left, as ``stock.py`` reports it; empty where there are none."""
        if not has_one_time(text):
            return {}
        done = self._run([*_PYTHON, root + self.files["stock"].path, "report"], None)
        try:
            report = json.loads(done.stdout) if done.code == 0 else {}
        except ValueError:
            report = {}
        return report if isinstance(report, dict) else {}

    def one_time_operators(self, text: str) -> dict[str, str]:
        """The operators with one-time sequences in a gate's text: names by numbers."""
        return {str(int(number, 16)): name for number, name in _ONE_TIME_OPERATOR.findall(text)}

    def unload(self) -> None:
        """Take the table away.

        :raises PortknockError: the kernel refuses it.
        """
        done = self._run([self.program, "-f", "-"], _FRESH_TABLE)
        if done.code != 0:
            raise PortknockError(f"The gate can't be taken away: nft refuses it ({_cause(done)}).")

    def close_window(self, peer: Peer) -> None:
        """End the open window of one source, where it has one."""
        for command in close_window(peer.address, peer.interface):
            self._run([self.program, "-f", "-"], command)

    def windows(self, listing: Mapping[str, Any]) -> set[Source]:
        """The sources that have an open window."""
        return windows(listing)

    def openings(self, listing: Mapping[str, Any]) -> list[Opening]:
        """Who opened the gate from where."""
        return openings(listing)

    def forgetting(self, text: str) -> str:
        """The text as :meth:`load` takes it, for a load that leaves no record of openings."""
        return forget_openings(text)

    def restore_command(self, path: str) -> str:
        """Shell command that loads a kept text (see :meth:`boot_text`)."""
        # What the kernel listed has its times in UTC.
        return f"TZ=UTC {self.program} -f {path}"

    def unload_text(self) -> str:
        """What :meth:`restore_command` loads to leave nothing."""
        return _FRESH_TABLE

    def unload_command(self) -> str:
        """Shell command that leaves nothing."""
        return f"{self.program} {shlex.quote(_FRESH_TABLE)}"

    def _counts(self) -> bool:
        """Whether a command can write how often a source has opened."""
        return self._check(_COUNT).code == 0

    def _check(self, *tables: str) -> Completed:
        text = "".join(f"table inet {TABLE}_probe{index} {{\n{table}\n}}\n" for index, table in enumerate(tables))
        return self._run([self.program, "-c", "-f", "-"], text)


def _cause(done: Completed) -> str:
    if done.code == _NOT_INSTALLED:
        return "it is not installed"
    line = _LINE.search(done.stderr)
    where = f"line {line.group(1)}: " if line else ""
    reason = _KERNEL_REASON.search(done.stderr)
    if reason:
        return f"{where}{reason.group(1).strip()}"
    return f"{where}{'syntax error' if 'syntax error' in done.stderr else f'exit code {done.code}'}"


__all__ = ("Nftables",)
