# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The back end iptables: the gate as chains of iptables and ip6tables, in whichever variant the host has, and sets of ipset."""

from __future__ import annotations

import os
import re
import shlex
from typing import Any, Mapping, Optional, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._backends import FILES, HostFile, files_of
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._iptables import (
    CHAIN,
    NO_RULES4,
    NO_RULES6,
    NO_SETS,
    SET,
    SOURCES,
    digests,
    forgetting,
    openings,
    program,
    read_recent,
    read_save,
    read_sets,
    rules_text,
    text_of,
    ticks_per_second,
    window_seconds,
    windows,
)
from ansible_collections.fleet.portknock.plugins.module_utils._nft import Opening, Source
from ansible_collections.fleet.portknock.plugins.module_utils._procnet import Peer
from ansible_collections.fleet.portknock.plugins.module_utils._system import (
    SEARCH_PATH,
    Completed,
    Runner,
    read_text,
)
from ansible_collections.fleet.portknock.plugins.module_utils._system import run as run_program

_NOT_INSTALLED = 127
# Where Debian's netfilter-persistent keeps rules.
_SAVED = ("/etc/iptables/rules.v4", "/etc/iptables/rules.v6")
# What the kernel's lists hold unless they are told otherwise, and where it says so.
_FEW_SOURCES = 100
_XT_RECENT = "/sys/module/xt_recent"

# What the gate can't do without, and what it does better with: a table, and a rule of a chain in it. {reject} and {any} are the
# family's.
_NEEDED = {
    "the match conntrack": ("mangle", "-m conntrack --ctstate NEW,UNTRACKED -j RETURN"),
    "the match multiport": ("mangle", "-p tcp -m multiport --dports 1,2 -j RETURN"),
    "the match addrtype": ("mangle", "-m addrtype ! --dst-type LOCAL -j RETURN"),
    "the match socket": ("mangle", "-p tcp -m socket -j RETURN"),
    "the match recent": ("mangle", f"-m recent --name {SET}-probe --rcheck --seconds 5 --rsource -j RETURN"),
    "the table security": ("security", "-m conntrack --ctdir ORIGINAL --ctproto tcp --ctorigdstport 7 -j DROP"),
    "the table nat": ("nat", "-p tcp -m tcp --dport 7 -j REDIRECT --to-ports 9"),
    "the target REJECT": ("filter", "-p tcp -j REJECT --reject-with tcp-reset"),
}
_WANTED = {
    "zones": ("raw", "-j CT --zone-orig 25637"),
    "dnat_port": ("nat", "-p tcp -m tcp --dport 7 -j DNAT --to-destination :9"),
    "clock": ("mangle", "-m time --datestart 2026-01-01T00:00:00 --datestop 2037-12-31T23:59:59 -j RETURN"),
    "echo": ("mangle", "-p icmp -m length --length 128:1228 -j RETURN"),
    "ipset": (
        "mangle",
        f"-m set --match-set {SET}-probe-@ src -j SET --add-set {SET}-probe-@ src --exist --timeout 5",
    ),
}
# Run in a network namespace of its own, where that can be had; what it leaves in the other case, it takes away.
_PROBE = f"""
PATH={SEARCH_PATH}
LC_ALL=C
export PATH LC_ALL
families=iptables
[ ! -e /proc/net/if_inet6 ] || families="iptables ip6tables"
sets() {{
    ipset create {SET}-probe-iptables hash:ip timeout 0 && ipset create {SET}-probe-ip6tables hash:ip family inet6 timeout 0 &&
        ipset create {SET}-probe-net hash:net,iface family inet6 timeout 0 &&
        ipset create {SET}-probe-port bitmap:port range 0-65535
}}
drop() {{ for name in iptables ip6tables net port; do ipset destroy "{SET}-probe-$name"; done; }}
try() {{
    code=0
    for family in $families; do
        echo "$2" | sed "s/-@/-$family/g" | $family-restore -w 10 --noflush || code=1
        for table in $(echo "$2" | sed -n 's/^\\*//p'); do
            printf '*%s\\n:FPK-PROBE - [0:0]\\n-X FPK-PROBE\\nCOMMIT\\n' "$table" | $family-restore -w 10 --noflush
        done
    done
    [ "$code" -ne 0 ] || echo "$1" >&3
}}
exec 3>&1 >/dev/null 2>&1
sets
@TRIES@
drop
echo end >&3
"""
# What a host's own INPUT says of strays.
_DROPS_INVALID = re.compile(r"^-A INPUT -m (?:conntrack --ct|state --)state INVALID -j DROP$")
_DROPS_STRAYS = re.compile(r"^-A INPUT (?:-m (?:conntrack --ct|state --)state INVALID )?-j (?:DROP|REJECT\b.*)$")
_RESETS = re.compile(r"^-A INPUT -p tcp (?:-m tcp )?-j REJECT --reject-with tcp-reset$")
# Twice, so that the time between the two says how fast the kernel counts.
_RECENT = (
    "cd /proc/net/xt_recent 2>/dev/null || exit 0; "
    f'for name in {SET}-open-4 {SET}-open-6 {SET}-by*; do [ ! -e "$name" ] || {{ echo "#$name"; cat "$name"; }}; done; '
    f"[ -e {SET}-clock ] || exit 0; "
    f'for again in 1 2; do echo +192.0.2.0 >{SET}-clock; echo "#clock$again"; cat {SET}-clock; sleep 0.25; done'
)


class Iptables:
    """The gate as chains of the iptables family, with sets of ipset where that is there and lists of xt_recent elsewhere."""

    name = "iptables"
    kernel = "iptables"
    program = "iptables"
    files: Mapping[str, HostFile] = files_of(
        *("closed_rules", "load", "recent_limit", "watch", "unit", "sets_unit", "watch_unit"),
        gate=HostFile("iptables/gate.rules.j2", FILES["gate"].path, FILES["gate"].mode),
    )
    closed = "closed_rules"
    units: Sequence[str] = (
        "fleet-portknock.service",
        "fleet-portknock-sets.service",
        "fleet-portknock-watch.service",
    )
    services: Sequence[str] = ("fleet-portknock-watch.service",)
    opener: Optional[str] = None
    opener_files: Sequence[str] = ()

    def __init__(self, run: Runner = run_program, root: str = "") -> None:
        self._run = run
        self._root = root

    def version(self) -> Optional[str]:
        """Version and variant of iptables, such as ``1.8.9 (nf_tables)``; None where it isn't installed."""
        done = self._run([self.program, "--version"], None)
        found = re.search(r"v([0-9]\S*(?: \(\w+\))?)", done.stdout)
        return found.group(1) if done.code == 0 and found else None

    def missing_programs(self) -> list[str]:
        """Programs that have to be installed."""
        has_ipset = self._run(["ipset", "--version"], None).code == 0
        return [*([] if self.version() else [self.program]), *([] if has_ipset else ["ipset"])]

    def capabilities(self) -> dict[str, bool]:
        """Which of the optional ways this host's programs and kernel can go; the templates read it as ``gate.probe``.

        :raises PortknockError: something that the gate can't do without is refused.
        """
        accepted = self._probe({"all": [*_NEEDED.values(), *_WANTED.values()]})
        if accepted != {"all"}:
            accepted = self._probe({name: [rule] for name, rule in {**_NEEDED, **_WANTED}.items()})
            for feature in _NEEDED:
                if feature not in accepted:
                    raise PortknockError(
                        f"knock_server_backend: {self.name} needs {feature}; this host's iptables {self.version()} and kernel "
                        "refuse it."
                    )
        return {
            **{name: "all" in accepted or name in accepted for name in _WANTED},
            **self._strays(),
        }

    def left_behind(self) -> list[str]:
        """What others have kept of its rules that harms once these are gone, in sentences."""
        return [
            f"{path} holds rules of the gate that is gone: as long as it names their sets, none of its rules load at a boot. "
            "Save the rules again."
            for path in _SAVED
            if CHAIN in (read_text(f"{self._root}{path}") or "")
        ]

    def notes(self, capabilities: Mapping[str, bool]) -> list[str]:
        """What the user has to know of what this host can't do, in sentences."""
        notes = []
        if not capabilities.get("ipset"):
            limit = int(read_text(f"{self._root}{_XT_RECENT}/parameters/ip_list_tot") or SOURCES)
            # A module that can be unloaded has a state.
            built_in = not os.path.exists(f"{self._root}{_XT_RECENT}/initstate")
            raised = f"xt_recent.ip_list_tot={SOURCES} on the kernel's command line" if built_in else "the next boot"
            if limit <= _FEW_SOURCES:
                notes.append(
                    f"This host's iptables has no sets of ipset, and its lists (xt_recent) hold {limit} sources each: as many "
                    f"spoofed first knocks between two knocks lock an operator out. It takes {raised} to raise that."
                )
            notes.append(
                "Without sets of ipset, the guard tripwires is not to be had, IPv6 link-local sources can't knock, and who "
                "opened the gate is known of the latest sources alone."
            )
        if not capabilities.get("zones"):
            notes.append(
                "This host's kernel has no zones of conntrack: who came too early is refused from the same port, as long as "
                "conntrack remembers."
            )
        return notes

    def _probe(self, tries: Mapping[str, Sequence[tuple[str, str]]]) -> set[str]:
        """Which of these are accepted: rules, each in its table."""
        lines = []
        for name, rules in tries.items():
            text = "\n".join(
                f"*{table}\n:FPK-PROBE - [0:0]\n"
                + "".join(f"-A FPK-PROBE {rule}\n" for where, rule in rules if where == table)
                + "COMMIT"
                for table in dict.fromkeys(where for where, _rule in rules)
            )
            lines.append(f"try {shlex.quote(name)} {shlex.quote(text)}")
        script = _PROBE.replace("@TRIES@", "\n".join(lines))
        for around in (["unshare", "--net"], []):
            said = self._run([*around, "/bin/sh", "-s"], script).stdout.splitlines()
            if "end" in said:
                return set(said) - {"end"}
        return set()

    def _strays(self) -> dict[str, bool]:
        """What the host's own rules do with packets that belong to no session and come to no open port: by family, whether
        they drop them, and whether they reset them. Where neither, the host's stack answers."""
        found = {}
        for name in ("iptables", "ip6tables"):
            rules = self._run([name, "-S", "INPUT"], None).stdout.splitlines() or [""]
            drops = "-P INPUT DROP" in rules or any(map(_DROPS_STRAYS.match, rules))
            resets = any(map(_RESETS.match, rules)) and not any(map(_DROPS_INVALID.match, rules))
            family = "6" if name == "ip6tables" else "4"
            found[f"drops{family}"], found[f"resets{family}"] = drops and not resets, resets
        return found

    def check(self, texts: Mapping[str, str]) -> None:
        """Let ``iptables-restore --test`` check the rules among the files' texts.

        :raises PortknockError: some are refused; says which section of which template, never what.
        """
        for name in ("gate", self.closed):
            done = self._do("test", program(texts[name]))
            if done.code != 0:
                template = os.path.basename(self.files[name].template)
                raise PortknockError(f"{template}: expected rules that iptables accepts; {_cause(done)}.")

    def boot_text(self, text: str) -> str:
        """What is kept on disk: a program that loads the text, whatever is in the kernel."""
        return program(text)

    def body(self, boot_text: str) -> Optional[str]:
        """The template's text inside :meth:`boot_text`, or None where it isn't one."""
        return text_of(boot_text)

    def listing(self) -> Optional[dict[str, Any]]:
        """What the kernel has of the gate: rules, sets and, where there are no sets, lists; None where it has no rules.

        :raises PortknockError: that can't be told.
        """
        saves = {}
        for family, command in (("4", "iptables-save"), ("6", "ip6tables-save")):
            done = self._run([command], None)
            if done.code == _NOT_INSTALLED:
                return None
            if done.code != 0 and (family == "4" or os.path.exists("/proc/net/if_inet6")):
                raise PortknockError(f"{command} can't list the gate's rules (exit code {done.code}).")
            saves[family] = read_save(done.stdout)
        if not any(save.rules for save in saves.values()):
            return None
        done = self._run(["ipset", "save"], None)
        sets = read_sets(done.stdout)
        if window_seconds(saves):
            sets = self._recent_sets(window_seconds(saves))
        return {"saves": saves, "sets": sets}

    def _recent_sets(self, window: int) -> dict[str, list[str]]:
        """The lists of windows and of openings, as if they were sets."""
        lists = read_recent(self._run(["/bin/sh", "-c", _RECENT], None).stdout)
        clock = [lists.pop(name, []) for name in ("clock1", "clock2")]
        if not all(clock):
            return {}
        now = clock[1][0][1]
        rate = ticks_per_second(now - clock[0][0][1], 0.25)
        sets = {}
        for name, seen in lists.items():
            lasts = window if name.startswith(f"{SET}-open") else _FOREVER
            left = [(source, lasts - (now - last) // rate) for source, last in seen]
            sets[name] = [f"create {name} recent timeout {lasts}"]
            sets[name] += [f"add {name} {source} timeout {seconds}" for source, seconds in left if seconds > 0]
        return sets

    def kernel_text(self) -> Optional[str]:
        """What the kernel has as a text that can be loaded again; None where there is none."""
        listing = self.listing()
        if listing is None:
            return None
        uses_lists = window_seconds(listing["saves"])
        return rules_text(listing["saves"], {} if uses_lists else listing["sets"])

    def accepts(self, text: str) -> bool:
        """Whether the host would load what is kept on disk (see :meth:`boot_text`)."""
        return text_of(text) is not None and self._do("test", text).code == 0

    def digests(self, listing: dict[str, Any]) -> dict[str, str]:
        """What the kernel has, apart from what comes and goes in it: a digest of each chain, of the jumps, and of each set."""
        uses_lists = window_seconds(listing["saves"])
        return digests(listing["saves"], {} if uses_lists else listing["sets"])

    def load(self, text: str, listing: Optional[dict[str, Any]]) -> None:
        """Put the text in place of what is loaded: sets, then each table whole; windows and records of openings stay.

        :raises PortknockError: it is refused; then both families have what they had.
        """
        done = self._do("load", program(text))
        if done.code != 0:
            raise PortknockError(f"The gate can't be loaded: {_cause(done)}.")

    def unload(self) -> None:
        """Take chains, jumps and sets away.

        :raises PortknockError: the kernel refuses it.
        """
        done = self._do("load", self.unload_text())
        if done.code != 0:
            raise PortknockError(f"The gate can't be taken away: {_cause(done)}.")

    def arm(self, texts: Mapping[str, str]) -> None:
        """Nothing to arm: there are no one-time sequences."""

    def arm_command(self, root: str = "") -> str:
        """Nothing to arm."""
        return ":"

    def stock(self, text: str, root: str = "") -> dict[str, Any]:
        """There are no one-time sequences."""
        return {}

    def one_time_operators(self, text: str) -> dict[str, str]:
        """There are no one-time sequences."""
        return {}

    def close_window(self, peer: Peer) -> None:
        """End the open window of one source, where it has one."""
        if ":" in peer.address and peer.address.lower().startswith("fe8"):
            name, member = f"{SET}-open-ll", f"{peer.address},{peer.interface}"
        else:
            name, member = f"{SET}-open-{'6' if ':' in peer.address else '4'}", peer.address
        self._run(["ipset", "-exist", "del", name, member], None)
        path = f"/proc/net/xt_recent/{name}"
        self._run(["/bin/sh", "-c", f"[ ! -e {path} ] || echo {shlex.quote('-' + peer.address)} >{path}"], None)

    def windows(self, listing: Mapping[str, Any]) -> set[Source]:
        """The sources that have an open window."""
        return windows(listing["sets"]) if listing else set()

    def openings(self, listing: Mapping[str, Any]) -> list[Opening]:
        """Who opened the gate from where."""
        return openings(listing["sets"]) if listing else []

    def forgetting(self, text: str) -> str:
        """The text as :meth:`load` takes it, for a load that leaves no record of openings."""
        return forgetting(text)

    def restore_command(self, path: str) -> str:
        """Shell command that loads a kept text (see :meth:`boot_text`)."""
        return f"/bin/sh {path} load"

    def unload_text(self) -> str:
        """What :meth:`restore_command` loads to leave nothing."""
        return program("")

    def unload_command(self) -> str:
        """Shell command that leaves nothing."""
        return f"printf %s {shlex.quote(self.unload_text())} | /bin/sh -s load"

    def _do(self, what: str, text: str) -> Completed:
        return self._run(["/bin/sh", "-s", what], text)


_FOREVER = 2147483


def _cause(done: Completed) -> str:
    if done.code == _NOT_INSTALLED:
        return "it is not installed"
    return {
        NO_SETS: "the sets are refused",
        NO_RULES4: "the IPv4 rules are refused",
        NO_RULES6: "the IPv6 rules are refused",
    }.get(done.code, f"exit code {done.code}")


__all__ = ("Iptables",)
