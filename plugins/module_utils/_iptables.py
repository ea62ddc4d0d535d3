# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the iptables family is told and what it says, as plain functions: nothing here runs it.

A gate's text has three sections: ``#sets`` as ``ipset restore`` takes them, ``#4`` and ``#6`` as ``iptables-restore`` and
``ip6tables-restore`` do. Around it comes the loader, which makes it a program of its own: what is kept on disk.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Optional

from ansible_collections.fleet.portknock.plugins.module_utils._nft import Opening, Source
from ansible_collections.fleet.portknock.plugins.module_utils._system import SEARCH_PATH

CHAIN = "FPK-"
SET = "fpk"
MARK = "# fleet.portknock rules: iptables\n"
# The loader's exit codes.
NO_SETS, NO_RULES4, NO_RULES6 = 3, 4, 6
# How many sources a list of xt_recent is to hold; it takes 16 bytes for each and a list.
SOURCES = 4096

_DATA_BEGINS = "data() {\ncat <<'END_OF_RULES'\n"
_DATA_ENDS = "END_OF_RULES\n}\n"
_FORGET = "#forget\n"
_LOADED_NAME = re.compile(rf"\b{SET}[abc]-")
_WANTED_NAME = f"{SET}@-"
# Sets whose elements only a load writes.
_FIXED_SETS = frozenset(f"{_WANTED_NAME}{name}" for name in ("trusted-4", "trusted-6", "tcp", "udp", "trip"))
_RECORD = re.compile(rf"^{SET}-by([0-9a-f]+)-(?:4|6|ll)$")
_TIMEOUT = re.compile(r"\btimeout ([0-9]+)")

# Usage: sh FILE load|fresh|test|check|any|sets. `fresh` loads without open windows, `check` asks whether all is there, `any`
# whether a gate is, and `sets` makes those that somebody's saved rules name, ours among them. What iptables and ipset say may
# quote a rule with its ports, so nothing of it is passed on; exit codes 3, 4 and 6 say that sets, IPv4 or IPv6 rules are refused.
_LOADER = r"""
PATH=@PATH@
LC_ALL=C
TMPDIR=/run
export PATH LC_ALL TMPDIR
umask 077

families=4
[ ! -e /proc/net/if_inet6 ] || families="4 6"
program() { if [ "$1" = 4 ]; then echo iptables; else echo ip6tables; fi; }
part() { data | awk -v want="#$1" '/^#/ { on = ($0 == want); next } on'; }
# What is loaded, asked once: nothing here reads its own changes.
save4=$(iptables-save 2>/dev/null) || exit 4
save6=
if [ "$families" = "4 6" ]; then save6=$(ip6tables-save 2>/dev/null) || exit 6; fi
saved() { if [ "$1" = 4 ]; then echo "$save4"; else echo "$save6"; fi; }
sets() { ipset list -n 2>/dev/null; }

# What of the gate is loaded, as a section of rules.
own() {
    saved "$1" | awk '
        /^\*/ { table = $0; next }
        /^:FPK-/ || ($1 == "-A" && ($2 ~ /^FPK-/ || / -[jg] FPK-/)) { if (table != "") print table; table = ""; print; some = 1 }
        $1 == "COMMIT" { if (some) print; some = 0 }'
}

# The section on standard input as what puts it in place of all that is loaded: each jump once and first of its chain.
compose() {
    { saved "$1"; echo "#wanted"; cat; } | awk '
        $0 == "#wanted" { wanted = 1; next }
        /^#/ || $1 == "COMMIT" { next }
        /^\*/ { table = $1; if (wanted) { is_wanted[table] = 1; order[++count] = table } else there[++last] = table; next }
        !wanted && /^:FPK-/ { old[table] = old[table] " " substr($1, 2) }
        !wanted && $1 == "-A" && $2 !~ /^FPK-/ && / -[jg] FPK-/ { cut[table] = cut[table] "-D" substr($0, 3) "\n" }
        !wanted { next }
        /^:/ { chains[table] = chains[table] $0 "\n"; has[table, substr($1, 2)] = 1; next }
        $1 == "-A" && $2 !~ /^FPK-/ { jumps[table] = jumps[table] "-I " $2 " 1" substr($0, 4 + length($2)) "\n"; next }
        { rules[table] = rules[table] $0 "\n" }
        END {
            for (i = 1; i <= last; i++)
                if (!is_wanted[there[i]] && (old[there[i]] != "" || cut[there[i]] != "")) order[++count] = there[i]
            for (i = 1; i <= count; i++) {
                table = order[i]
                print table
                printf "%s", chains[table]
                gone = ""
                number = split(old[table], names, " ")
                for (j = 1; j <= number; j++)
                    if (!has[table, names[j]]) { print ":" names[j] " - [0:0]"; gone = gone "-X " names[j] "\n" }
                printf "%s%s%s%s", cut[table], jumps[table], rules[table], gone
                print "COMMIT"
            }
        }'
}

# Puts a section in place; the kernel takes each of its tables whole or not at all.
put() {
    family=$1
    shift
    compose "$family" | "$(program "$family")-restore" -w 10 --noflush "$@" >/dev/null 2>&1
}

letter() {
    used=$(for family in $families; do saved "$family"; done | grep -o 'fpk[abc]-' | sort -u)
    for letter in a b c; do
        case $used in *"fpk$letter-"*) ;; *) return ;; esac
    done
}

drop_sets() {
    sets | grep "$1" | while read -r name; do ipset destroy "$name" 2>/dev/null; done
}

# A set that outlives the rules, of another size or timeout than it was: made anew with what it holds.
keep() {
    ipset -exist create "$@" 2>/dev/null && return
    name=$1
    shift
    other="fpk$letter-kept"
    ipset create "$other" "$@" 2>/dev/null || return
    lasts() { sed -n 's/^create .* timeout \([0-9]*\).*/\1/p'; }
    before=$(ipset save "$name" | lasts)
    after=$(echo "create $*" | lasts)
    # The longest first: a smaller set may not hold all.
    ipset save "$name" | awk -v name="$name" -v other="$other" -v more="$((after - before))" '
        $1 == "add" && $2 == name { for (i = 4; i < NF; i++) if ($i == "timeout" && $(i + 1) + more > 0)
            print $(i + 1), "add", other, $3, "timeout", $(i + 1) + more }' |
        sort -rn | while read -r _ line; do
            # shellcheck disable=SC2086
            ipset -exist $line 2>/dev/null
        done
    ipset swap "$other" "$name" 2>/dev/null && ipset destroy "$other" 2>/dev/null
}

# Every set that the rules name, under names that nothing loaded uses.
make_sets() {
    letter
    if [ -z "$(part sets)" ]; then
        # A module that nothing uses is loaded anew, with longer lists; where it is part of the kernel, both do nothing.
        if data | grep -q -- '-m recent ' && ! echo "$save4$save6" | grep -q -- '-m recent '; then
            { modprobe -r xt_recent; modprobe xt_recent ip_list_tot=@SOURCES@; } >/dev/null 2>&1
        fi
        return 0
    fi
    drop_sets "^fpk$letter-"
    part sets | grep '^create fpk-' | while read -r _ line; do
        # shellcheck disable=SC2086
        keep $line || exit 1
    done || return 1
    part sets | grep -v '^create fpk-' | sed "s/fpk@/fpk$letter/" | ipset -exist restore >/dev/null 2>&1
}

rules() { part "$1" | sed "s/fpk@/fpk$letter/g"; }

# Whether what is there before the others are loaded is all that there is after them.
test_rules() {
    before=$(sets)
    code=0
    make_sets || code=3
    for family in $families; do
        [ "$code" -ne 0 ] || rules "$family" | put "$family" --test || code=$family
    done
    drop_sets "^fpk$letter-"
    sets | grep '^fpk-' | while read -r name; do
        case "
$before
" in *"
$name
"*) ;; *) ipset destroy "$name" 2>/dev/null ;; esac
    done
    return "$code"
}

load_rules() {
    make_sets || return 3
    former=$(own 4)
    rules 4 | put 4 || return 4
    case $families in *6*)
        if ! rules 6 | put 6; then
            # Both or neither.
            save4=$(iptables-save 2>/dev/null)
            echo "$former" | put 4
            return 6
        fi ;;
    esac
    # Of what the rules no longer name only the records stay, and those only beside others.
    wanted=$(part sets | sed -n 's/^create \(fpk-[^ ]*\) .*/\1/p')
    for name in $(sets | grep '^fpk'); do
        case "
$wanted
" in *"
$name
"*) continue ;; esac
        case $name in "fpk$letter-"*) continue ;; fpk-by*) case $wanted in *fpk-by*) continue ;; esac ;; esac
        ipset destroy "$name" 2>/dev/null
    done
    return 0
}

# Empties sets and lists whose names begin so.
empty() {
    sets | grep "^$1" | while read -r name; do ipset flush "$name"; done
    for list in /proc/net/xt_recent/"$1"*; do
        [ ! -e "$list" ] || echo / >"$list"
    done
}

# Whether each jump is there, and each chain with as many rules.
check_rules() {
    for family in $families; do
        { saved "$family"; echo "#wanted"; part "$family"; } | awk '
            $0 == "#wanted" { wanted = 1; next }
            /^\*/ { table = $1; next }
            $1 == "-A" && $2 ~ /^FPK-/ { balance[table, $2] += wanted ? -1 : 1; next }
            $1 == "-A" && / -[jg] FPK-/ { if (!wanted) there[table, $0] = 1; else if (!there[table, $0]) missing = 1 }
            END { for (chain in balance) if (balance[chain]) missing = 1; exit missing }' || return 1
    done
}

# Whether any gate's lock and knocks are in their places.
any_rules() {
    for family in $families; do
        saved "$family" | awk '
            /^\*/ { table = $1; next }
            table == "*security" && ($0 == "-A INPUT -j FPK-LOCK" || $0 == "-A FORWARD -j FPK-PASS") { good++ }
            table == "*mangle" && $0 == "-A PREROUTING -j FPK-KNOCK" { good++ }
            $2 == "FPK-LOCK-T" && $NF == "DROP" { good++ }
            END { exit good < 4 }' || return 1
    done
}

# Rules that were saved with ours among them load only where the sets are there that they name.
make_saved_sets() {
    letter=a
    for file in /etc/iptables/rules.v4 /etc/iptables/rules.v6 /etc/sysconfig/iptables /etc/sysconfig/ip6tables; do
        [ -e "$file" ] || continue
        kind="family inet"
        case $file in *v6 | *ip6*) kind="family inet6" ;; esac
        for name in $(grep -o -E '(--match-set|--add-set|--del-set) fpk[abc]?-[^ ]*' "$file" | awk '{ print $2 }' | sort -u); do
            # shellcheck disable=SC2046
            set -- $(part sets | awk -v name="$name" '
                { wanted = name; sub(/^fpk[abc]-/, "fpk@-", wanted) }
                $1 == "create" && $2 == wanted { $1 = ""; $2 = name; print }')
            if [ $# -gt 0 ]; then ipset -exist create "$@"; else
                # shellcheck disable=SC2086
                ipset -exist create "$name" hash:ip $kind
            fi
        done
    done 2>/dev/null
}

case ${1-load} in
    load | fresh)
        load_rules || exit
        [ "${1-load}" = load ] || empty fpk-open
        if data | grep -q '^#forget$'; then empty fpk-by; fi ;;
    test) test_rules ;;
    check) check_rules ;;
    any) any_rules ;;
    sets) make_saved_sets ;;
esac
""".replace("@PATH@", SEARCH_PATH).replace("@SOURCES@", str(SOURCES))


def program(text: str) -> str:
    """The text with the loader around it: a program for ``/bin/sh`` that loads it."""
    return MARK + _DATA_BEGINS + text + _DATA_ENDS + _LOADER


def text_of(kept: str) -> Optional[str]:
    """The text inside :func:`program`, or None where there is none."""
    _header, found, rest = kept.partition(MARK + _DATA_BEGINS)
    text, ended, _loader = rest.partition(_DATA_ENDS)
    return text if found and ended else None


def forgetting(text: str) -> str:
    """The text for a load that leaves no record of openings."""
    return _FORGET + text


class Save(NamedTuple):
    """What of the gate is loaded of one family: rules by table and chain, and the jumps into these by table."""

    rules: Mapping[tuple[str, str], list[str]]
    jumps: Mapping[str, list[str]]


def read_save(output: str) -> Save:
    """What ``iptables-save`` printed."""
    rules: dict[tuple[str, str], list[str]] = {}
    jumps: dict[str, list[str]] = {}
    table = ""
    for line in output.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(f":{CHAIN}"):
            rules[table, line[1:].split(" ", 1)[0]] = []
        elif line.startswith(f"-A {CHAIN}"):
            rules.setdefault((table, line.split(" ", 2)[1]), []).append(line)
        elif line.startswith("-A ") and re.search(rf" -[jg] {CHAIN}", line):
            jumps.setdefault(table, []).append(line)
    return Save(rules, jumps)


def read_sets(output: str) -> dict[str, list[str]]:
    """What ``ipset save`` printed, of the gate's sets alone: the lines of each, its own first."""
    found: dict[str, list[str]] = {}
    for line in output.splitlines():
        words = line.split(" ", 2)
        if len(words) == 3 and re.match(rf"{SET}([abc])?-", words[1]):
            found.setdefault(words[1], []).append(line)
    return found


def rules_text(saves: Mapping[str, Save], sets: Mapping[str, list[str]]) -> str:
    """What is loaded, as a text that can be loaded again: without open windows."""
    lines = ["#sets"]
    for name, members in sets.items():
        fixed = _wanted(name) in _FIXED_SETS or _RECORD.match(name)
        lines += [_wanted(_stable_set(line)) for line in (members if fixed else members[:1])]
    for family, save in saves.items():
        lines.append(f"#{family}")
        for table in dict.fromkeys([*(table for table, _chain in save.rules), *save.jumps]):
            lines.append(f"*{table}")
            chains = [chain for where, chain in save.rules if where == table]
            lines += [f":{chain} - [0:0]" for chain in chains]
            lines += save.jumps.get(table, [])
            lines += [_wanted(line) for chain in chains for line in save.rules[table, chain]]
            lines.append("COMMIT")
    return "\n".join(lines) + "\n"


def digests(saves: Mapping[str, Save], sets: Mapping[str, list[str]]) -> dict[str, str]:
    """A digest of each chain, of the jumps into a table's, and of each set, apart from what packets write."""
    texts: dict[str, list[str]] = {}
    for family, save in saves.items():
        for (table, chain), rules in save.rules.items():
            texts[f"IPv{family} chain {table} {chain}"] = [_wanted(rule) for rule in rules]
        for table, jumps in save.jumps.items():
            texts[f"IPv{family} jumps of {table}"] = sorted(jumps)
    for name, members in sets.items():
        kept = sorted(members[1:]) if _wanted(name) in _FIXED_SETS else []
        # Records of who has gone may stay or go.
        if not _RECORD.match(name):
            texts[f"set {_wanted(name)}"] = [_wanted(_stable_set(line)) for line in (members[0], *kept)]
    return {name: hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] for name, lines in texts.items()}


def windows(sets: Mapping[str, list[str]]) -> set[Source]:
    """The sources that have an open window."""
    found = set()
    for name in ("4", "6", "ll"):
        for source, remaining in _members(sets.get(f"{SET}-open-{name}", ())):
            if remaining:
                found.add(source)
    return found


def openings(sets: Mapping[str, list[str]]) -> list[Opening]:
    """Who opened the gate from where: one record a source and operator, without a count."""
    records = []
    for name, members in sets.items():
        record = _RECORD.match(name)
        lasts = _TIMEOUT.search(members[0]) if record else None
        if record and lasts:
            for source, remaining in _members(members):
                records.append(Opening(record.group(1), source, max(0, int(lasts.group(1)) - remaining), None))
    return records


def read_recent(output: str) -> dict[str, list[tuple[Source, int]]]:
    """Lists of xt_recent, each with its sources and the time at which they were last seen, in the kernel's ticks.

    :param output: the lists, each behind a line with ``#`` and its name.
    """
    lists: dict[str, list[tuple[Source, int]]] = {}
    name = ""
    for line in output.splitlines():
        if line.startswith("#"):
            name = line[1:]
            lists[name] = []
            continue
        found = re.match(r"src=(\S+) .*\blast_seen: ([0-9]+)", line)
        if found:
            lists[name].append((Source(str(ipaddress.ip_address(found.group(1)))), int(found.group(2))))
    return lists


def ticks_per_second(ticks: int, seconds: float) -> int:
    """How often the kernel's clock ticks, by how often it did; there are four kinds of kernels."""
    return min((100, 250, 300, 1000), key=lambda rate: abs(rate - ticks / seconds))


def window_seconds(saves: Mapping[str, Save]) -> int:
    """How long a window is open, by rules that go by lists of xt_recent; 0 where there are none."""
    for save in saves.values():
        for rules in save.rules.values():
            for rule in rules:
                found = re.search(rf"--seconds ([0-9]+) --name {SET}-open-", rule)
                if found:
                    return int(found.group(1))
    return 0


def _members(lines: Iterable[str]) -> Iterator[tuple[Source, int]]:
    """The elements of a set, each with the seconds that it has left."""
    for line in lines:
        words = line.split()
        if words[0] == "add":
            address, _comma, interface = words[2].partition(",")
            left = _TIMEOUT.search(line)
            source = Source(str(ipaddress.ip_address(address.partition("/")[0])), interface or None)
            yield source, int(left.group(1)) if left else 0


def _wanted(text: str) -> str:
    return _LOADED_NAME.sub(_WANTED_NAME, text)


def _stable_set(line: str) -> str:
    """A set without what the kernel chooses."""
    return re.sub(r" (?:hashsize|bucketsize|initval) \S+", "", line) if line.startswith("create ") else line


__all__ = (
    "CHAIN",
    "MARK",
    "NO_RULES4",
    "NO_RULES6",
    "NO_SETS",
    "SET",
    "SOURCES",
    "Save",
    "digests",
    "forgetting",
    "openings",
    "program",
    "read_recent",
    "read_save",
    "read_sets",
    "rules_text",
    "text_of",
    "ticks_per_second",
    "window_seconds",
    "windows",
)
