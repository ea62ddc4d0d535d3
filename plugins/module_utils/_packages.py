# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Removing what was installed for a gate, where nobody else needs it.

A host's packages may have come to be needed by others since. So the package managers' own tools are used, which refuse
where another package depends on it, instead of those that take the dependents along; and what a package's removal would do
beside, such as flushing everybody's rules, has to be ruled out first.
"""

from __future__ import annotations

import functools
import re
from typing import Callable, Mapping, NamedTuple, Optional, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._iptables import CHAIN, SET
from ansible_collections.fleet.portknock.plugins.module_utils._nft import TABLE
from ansible_collections.fleet.portknock.plugins.module_utils._system import Completed, Runner
from ansible_collections.fleet.portknock.plugins.module_utils._system import run as run_program

# A package manager must not be cut off in the middle; only one that hangs is.
_PATIENCE_SECONDS = 600
_NOT_INSTALLED = 127
_NOT_RUNNING = ("inactive", "failed", "unknown")
_NOT_AT_BOOT = ("disabled", "masked", "masked-runtime", "not-found", "")
_DEPENDENT = re.compile(r"^\s*(?:package )?(\S+)(?: \(\S+\))? (?:pre-)?depends on ", re.MULTILINE)
_NEEDED_BY = re.compile(r" is needed by (?:\(installed\) )?(\S+)")


class Outcome(NamedTuple):
    """What became of the packages.

    ``gone`` are no longer installed, ``removed`` those of them that this call removed (or would); ``kept`` are sentences
    that say which one stays, and why.
    """

    gone: tuple[str, ...]
    removed: tuple[str, ...]
    kept: tuple[str, ...]


def uninstall(packages: Sequence[str], dry_run: bool, run: Optional[Runner] = None) -> Outcome:
    """Remove those of the packages that nobody else needs.

    :raises PortknockError: neither dpkg nor rpm is there.
    """
    run = run or functools.partial(run_program, timeout=_PATIENCE_SECONDS)
    manager = _manager(run)
    installed = [name for name in packages if manager.is_installed(name)]
    removed: list[str] = []
    kept: list[str] = []
    for name in installed:
        reason = _NEEDS[name](run, dry_run) if name in _NEEDS else None
        problem = reason or manager.remove(name, dry_run)
        if problem is None:
            removed.append(name)
        else:
            kept.append(f"The package {name} stays: {problem}.")
    gone = [name for name in packages if name in removed or name not in installed]
    return Outcome(tuple(gone), tuple(removed), tuple(kept))


class Dpkg:
    """Debian's packages."""

    def __init__(self, run: Runner) -> None:
        self._run = run

    def is_installed(self, name: str) -> bool:
        """Whether any of the package's programs may be there; its configuration alone does not count."""
        done = self._run(["dpkg-query", "--show", "--showformat=${db:Status-Status}", "--", name], None)
        return done.code == 0 and done.stdout.strip() not in ("", "not-installed", "config-files")

    def remove(self, name: str, dry_run: bool) -> Optional[str]:
        """Remove the package, and its configuration where nobody has changed that; returns why it stays, or None."""
        words = ["--purge" if self._has_own_configuration(name) else "--remove", "--", name]
        tried = self._run(["dpkg", "--no-act", *words], None)
        if tried.code == 0 and not dry_run:
            tried = self._run(["env", "DEBIAN_FRONTEND=noninteractive", "dpkg", *words], None)
        return None if tried.code == 0 else _refusal("dpkg", tried, _DEPENDENT)

    def _has_own_configuration(self, name: str) -> bool:
        """Whether the configuration files are as the package brought them."""
        listed = self._run(["dpkg-query", "--show", "--showformat=${Conffiles}", "--", name], None)
        files = [line.split() for line in listed.stdout.splitlines() if line.strip()]
        text = "".join(f"{words[1]}  {words[0]}\n" for words in files if words[2:] != ["obsolete"])
        return listed.code == 0 and (not text or self._run(["md5sum", "--check", "--status"], text).code == 0)


class Rpm:
    """The packages of EL and its relatives, whose tool keeps changed configuration by itself."""

    def __init__(self, run: Runner) -> None:
        self._run = run

    def is_installed(self, name: str) -> bool:
        """Whether the package is installed."""
        return self._run(["rpm", "--query", "--quiet", "--", name], None).code == 0

    def remove(self, name: str, dry_run: bool) -> Optional[str]:
        """Remove the package; returns why it stays, or None."""
        tried = self._run(["rpm", "--erase", "--test", "--", name], None)
        if tried.code == 0 and not dry_run:
            tried = self._run(["rpm", "--erase", "--", name], None)
        return None if tried.code == 0 else _refusal("rpm", tried, _NEEDED_BY)


def _manager(run: Runner) -> Dpkg | Rpm:
    if run(["dpkg-query", "--version"], None).code == 0:
        return Dpkg(run)
    if run(["rpm", "--version"], None).code == 0:
        return Rpm(run)
    raise PortknockError("knock_server_remove_packages: expected dpkg or rpm on the host; neither is there.")


def _refusal(tool: str, tried: Completed, pattern: re.Pattern[str]) -> str:
    needing = sorted(set(pattern.findall(tried.stderr)))
    if needing:
        return f"{', '.join(needing)} would not work without it"
    return f"{tool} does not remove it (exit code {tried.code})"


def _nftables_is_needed(run: Runner, dry_run: bool) -> Optional[str]:
    """Why nft must stay: other rules of the kernel may be kept by it, and stopping its service flushes all of them."""
    for question, fine in (("is-active", _NOT_RUNNING), ("is-enabled", _NOT_AT_BOOT)):
        said = run(["systemctl", question, "nftables.service"], None).stdout.strip()
        if said not in fine:
            return f"nftables.service is {said or 'in a state that systemctl does not tell'}"
    tables = run(["nft", "list", "tables"], None)
    if tables.code == _NOT_INSTALLED:
        return None
    if tables.code != 0:
        return f"nft does not say whether other tables are loaded (exit code {tables.code})"
    own = f"table inet {TABLE}"
    # A check finds the gate where it still is.
    others = [line for line in tables.stdout.splitlines() if line.strip() and not (dry_run and line == own)]
    if others:
        return f"the kernel has other tables, which may need it ({', '.join(others)})"
    return None


def _iptables_is_needed(run: Runner, dry_run: bool) -> Optional[str]:
    """Why iptables must stay: rules of others, which some program of theirs keeps."""
    for program in ("iptables-save", "ip6tables-save"):
        saved = run([program], None)
        if saved.code == _NOT_INSTALLED:
            continue
        if saved.code != 0:
            return f"{program} does not say whether there are other rules (exit code {saved.code})"
        lines = saved.stdout.splitlines()
        others = [
            line for line in lines if line.startswith("-A ") and not re.search(rf"^-A {CHAIN}|-[jg] {CHAIN}", line)
        ]
        # A check finds the gate where it still is; so does a policy that is not the kernel's own.
        if others or any(re.match(r":[A-Z]+ DROP ", line) for line in lines):
            return f"{program} lists rules of others, which may need it"
    sets = run(["ipset", "list", "-name"], None)
    if sets.code == 0 and any(not name.startswith(SET) for name in sets.stdout.split()):
        return "the kernel has sets of others, which may need it"
    return None


# By the package's name.
_NEEDS: Mapping[str, Callable[[Runner, bool], Optional[str]]] = {
    "nftables": _nftables_is_needed,
    "iptables": _iptables_is_needed,
    "ipset": _iptables_is_needed,
}

__all__ = ("Dpkg", "Outcome", "Rpm", "uninstall")
