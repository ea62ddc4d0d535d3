# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A gate on its host: what is there, what differs from what is wanted, and the way from the one to the other.

What a reboot brings back is one file, ``gate.nft``; replacing or removing it is the moment of commitment. Everything
else is either harmless without it (the unit, the closed table) or volatile (the kernel's table, the trial).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from typing import Any, Mapping, NamedTuple, Optional

from ansible_collections.fleet.portknock.plugins.module_utils._backends import Nftables
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._masking import masked
from ansible_collections.fleet.portknock.plugins.module_utils._system import (
    Runner,
    read_text,
    remove_file,
    sync_folder,
    temporary_path,
    write_text,
)
from ansible_collections.fleet.portknock.plugins.module_utils._system import (
    run as run_program,
)
from ansible_collections.fleet.portknock.plugins.module_utils._trial import Trial

CONFIG_FOLDER = "/etc/fleet-portknock"
RUN_FOLDER = "/run/fleet-portknock"
UNIT_FOLDER = "/etc/systemd/system"
UNIT = "fleet-portknock.service"
# Targets and services that pull the unit in, as its [Install] section says.
WANTED_BY = ("sysinit.target", "nftables.service")
_STATE_MARK = "# fleet.portknock state: "
_HEADER = "# Written by fleet.portknock. Changes made by hand are found and undone by its next run.\n"


class Wanted(NamedTuple):
    """The gate that a host is to have.

    ``gate`` and ``closed`` are rendered rules, ``unit`` a systemd service; ``keyring`` and ``generation`` say whose
    secrets these are, so that a stale keyring is noticed.
    """

    gate: str
    closed: str
    unit: str
    keyring: str
    generation: int


class Found(NamedTuple):
    """What the host has: rendered rules or None, the recorded state, the other files, and the kernel's table."""

    gate: Optional[str]
    state: Mapping[str, Any]
    closed: Optional[str]
    unit: Optional[str]
    is_on_disk: bool
    private: bool
    enabled: bool
    listing: Optional[dict[str, Any]]
    version: Optional[str]


class Difference(NamedTuple):
    """One thing that is not as it is wanted; the texts are masked and may be shown."""

    what: str
    before: str
    after: str


class GateHost:
    """The gate of the host that this runs on.

    :param root: prefix of every path, for tests.
    """

    def __init__(self, backend: Nftables, root: str = "", run: Runner = run_program) -> None:
        self._backend = backend
        self._run = run
        self._config = root + CONFIG_FOLDER
        self._units = root + UNIT_FOLDER
        self._gate = os.path.join(self._config, "gate.nft")
        self._closed = os.path.join(self._config, "closed.nft")
        self._unit = os.path.join(self._units, UNIT)
        self.trial = Trial(root + RUN_FOLDER, run)

    def inspect(self) -> Found:
        """Read files and kernel; changes nothing."""
        text = read_text(self._gate)
        return Found(
            gate=None if text is None else self._backend.body(text),
            state=_state_in(text or ""),
            closed=read_text(self._closed),
            unit=read_text(self._unit),
            is_on_disk=text is not None,
            private=text is None or _is_private(self._config, self._gate, self._closed),
            enabled=all(os.path.islink(link) for link in self._links()),
            listing=self._backend.listing(),
            version=self._backend.version(),
        )

    def exists(self, found: Found) -> bool:
        """Whether anything of a gate is there."""
        return bool(found.listing is not None or found.unit is not None or found.enabled or os.path.isdir(self._config))

    def differences(self, wanted: Wanted, found: Found) -> list[Difference]:
        """What is not as wanted, in files and kernel; empty when there is nothing to do."""
        differences = []
        for path, before, after in (
            (self._gate, found.gate, wanted.gate),
            (self._closed, found.closed, wanted.closed),
            (self._unit, found.unit, wanted.unit),
        ):
            if before != after:
                differences.append(Difference(path, *masked(before or "", after)))
        if found.is_on_disk:
            differences.extend(self._state_differences(wanted, found))
        kernel = self._kernel_difference(found)
        if kernel:
            differences.append(Difference("the kernel's table", f"{kernel}\n", "the gate is loaded as confirmed\n"))
        return differences

    def check(self, wanted: Wanted) -> None:
        """Let the back end's own checker read both rulesets.

        :raises PortknockError: one is refused.
        """
        self._backend.check(wanted.gate, "gate.nft.j2")
        self._backend.check(wanted.closed, "closed.nft.j2")

    def apply(self, wanted: Wanted, found: Found, run: str, seconds: int) -> None:
        """Arm the way back, then load the wanted gate. The trial's lock must be held.

        :raises PortknockError: nothing has changed, or the way back is armed.
        """
        self.check(wanted)
        committed = f"cmp -s {shlex.quote(self._gate)} {shlex.quote(self.trial.path('committed'))}"
        self._begin(run, seconds, committed, found, wanted.closed)
        self._backend.load(wanted.gate, found.listing)
        listing = self._backend.listing()
        write_text(self.trial.path("loaded"), self._backend.digest(listing) if listing else "", 0o600)

    def confirm(self, wanted: Wanted, run: str) -> None:
        """Make the loaded gate the one that a reboot brings back, then disarm. The trial's lock must be held.

        :raises PortknockError: the trial has ended, or what is loaded is not what was loaded for it.
        """
        self.trial.require(run)
        listing = self._backend.listing()
        digest = self._backend.digest(listing) if listing else None
        if digest is None or digest != read_text(self.trial.path("loaded")):
            raise PortknockError("The gate on trial is no longer loaded as it was: another program has changed it.")
        _make_private_folder(self._config)
        write_text(self._closed, wanted.closed, 0o600)
        write_text(self._unit, wanted.unit, 0o644)
        self._systemctl("daemon-reload")
        self._systemctl("enable", UNIT)
        for link in self._links():
            sync_folder(os.path.dirname(link))
        text = self._boot_text(wanted, digest, run)
        write_text(self.trial.path("committed"), text, 0o600)
        write_text(self._gate, text, 0o600)
        self.trial.end()

    def outcome(self, run: str, removal: bool) -> Optional[str]:
        """What became of a run's change: ``confirmed`` or ``restored``; None while it is still on trial."""
        pending = self.trial.pending()
        if pending is not None and pending.run == run:
            return None
        text = read_text(self._gate)
        confirmed = _state_in(text or "").get("run") == run
        if removal:
            confirmed = text is None and self._backend.listing() is None
        return "confirmed" if confirmed else "restored"

    def take_away(self, found: Found, run: str, seconds: int) -> None:
        """Arm the way back, then take the gate out of the kernel. The trial's lock must be held."""
        gate, marker = shlex.quote(self._gate), shlex.quote(self.trial.path("committed"))
        self._begin(run, seconds, f"[ ! -e {gate} ]" if found.is_on_disk else f"[ -e {marker} ]", found, found.closed)
        self._backend.unload()

    def confirm_away(self, run: str) -> None:
        """Remove what is left of the gate, then disarm. The trial's lock must be held."""
        self.trial.require(run)
        remove_file(self._gate)
        self._remove_files()
        write_text(self.trial.path("committed"), "", 0o600)
        self.trial.end()

    def forget(self) -> None:
        """Remove the run-time folder: the last trace of a gate that was taken away."""
        shutil.rmtree(self.trial.folder, ignore_errors=True)

    def _remove_files(self) -> None:
        """Remove everything on disk but ``gate.nft`` itself, whose removal is the moment of commitment."""
        if os.path.exists(self._unit) or any(os.path.islink(link) for link in self._links()):
            self._systemctl("disable", UNIT)
            remove_file(self._unit)
            self._systemctl("daemon-reload")
        shutil.rmtree(self._config, ignore_errors=True)

    def _begin(self, run: str, seconds: int, committed: str, found: Found, closed: Optional[str]) -> None:
        texts = {"former.nft": self._way_back(found, closed)}
        # A confirmation that died half-way has written these already.
        commands = []
        for name, target in (("former.closed", self._closed), ("former.unit", self._unit)):
            text = read_text(target)
            if text is None:
                commands.append(f"rm -f {shlex.quote(target)}")
            else:
                texts[name] = text
                former = shlex.quote(self.trial.path(name))
                commands.append(f"{{ cmp -s {former} {shlex.quote(target)} || cp {former} {shlex.quote(target)}; }}")
        left = [link for link in self._links() if not os.path.islink(link)]
        left += [temporary_path(target) for target in (self._gate, self._closed, self._unit)]
        commands.append(f"rm -f {' '.join(map(shlex.quote, left))}")
        if not os.path.isdir(self._config):
            commands.append(f"rm -rf {shlex.quote(self._config)}")
        load = self._backend.restore_command(shlex.quote(self.trial.path("former.nft")))
        self.trial.begin(run, seconds, load, " && ".join(commands), committed, texts)

    def _way_back(self, found: Found, closed: Optional[str]) -> str:
        """What brings the former state of the kernel back.

        The confirmed file, even where the kernel has lost it or somebody changed it there: coming back without a gate
        would leave the port open. Where there is none that loads, what the kernel has; and where a gate was wanted and
        neither is to be had, the closed table.
        """
        former = read_text(self._gate)
        if former is not None and self._backend.accepts(former):
            return former
        kernel = self._backend.kernel_text() if found.listing is not None else None
        if kernel is not None and self._backend.accepts(self._backend.boot_text(kernel)):
            return self._backend.boot_text(kernel)
        if former is not None and closed is not None:
            return self._backend.boot_text(closed)
        return self._backend.unload_text()

    def _boot_text(self, wanted: Wanted, digest: str, run: str) -> str:
        state = {
            "backend": self._backend.name,
            "digest": digest,
            "generation": wanted.generation,
            "keyring": wanted.keyring,
            "run": run,
            "version": self._backend.version(),
        }
        return _HEADER + _STATE_MARK + json.dumps(state, sort_keys=True) + "\n" + self._backend.boot_text(wanted.gate)

    def _state_differences(self, wanted: Wanted, found: Found) -> list[Difference]:
        differences = []
        for key, after in (("keyring", wanted.keyring), ("generation", wanted.generation)):
            if found.state.get(key) != after:
                differences.append(Difference(key, f"{found.state.get(key)}\n", f"{after}\n"))
        if not found.private:
            differences.append(
                Difference(self._config, "others than root can read or write it\n", "only root can read and write it\n")
            )
        if not found.enabled:
            differences.append(Difference(UNIT, "not started at boot\n", "started at boot\n"))
        return differences

    def _kernel_difference(self, found: Found) -> Optional[str]:
        if found.listing is None:
            return "no gate is loaded in the kernel"
        if found.gate is None:
            return "a table of the gate's name is loaded, and no gate was confirmed"
        if found.state.get("version") != found.version:
            return f"confirmed with {self._backend.program} {found.state.get('version')}, which lists it differently"
        if found.state.get("digest") != self._backend.digest(found.listing):
            return "the loaded table is not the one that was confirmed"
        return None

    def _links(self) -> list[str]:
        return [os.path.join(self._units, f"{target}.wants", UNIT) for target in WANTED_BY]

    def _systemctl(self, *arguments: str) -> None:
        done = self._run(["systemctl", "--quiet", *arguments], None)
        if done.code != 0:
            raise PortknockError(f"systemctl {' '.join(arguments)} failed with exit code {done.code}.")


def _state_in(boot_text: str) -> Mapping[str, Any]:
    """What was recorded of a gate when it was confirmed."""
    line = next((line for line in boot_text.splitlines() if line.startswith(_STATE_MARK)), _STATE_MARK)
    try:
        state = json.loads(line[len(_STATE_MARK) :])
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}


def _is_private(*paths: str) -> bool:
    for path in paths:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return False
        if status.st_mode & 0o077 or status.st_uid != os.geteuid():
            return False
    return True


def _make_private_folder(path: str) -> None:
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        os.chmod(path, 0o700)
        sync_folder(os.path.dirname(path))
    except OSError as exc:
        raise PortknockError(f"{path}: expected to be able to make it; got {exc.strerror}.") from None


__all__ = (
    "CONFIG_FOLDER",
    "RUN_FOLDER",
    "UNIT",
    "WANTED_BY",
    "Difference",
    "Found",
    "GateHost",
    "Wanted",
)
