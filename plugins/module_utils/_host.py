# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A gate on its host: what is there, what differs from what is wanted, and the way from the one to the other.

What a reboot brings back is one of the back end's files, the gate; replacing or removing it is the moment of commitment.
Everything else is either harmless without it (units, the closed table) or volatile (the kernel's table, the trial).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from types import MappingProxyType
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Optional

from ansible_collections.fleet.portknock.plugins.module_utils._backends import (
    BACK_ENDS,
    CONFIG_FOLDER,
    FILES,
    OPENER_ON_TRIAL,
    SERVICES,
    UNIT_FOLDER,
    UNITS,
    BackEnd,
    back_end,
)
from ansible_collections.fleet.portknock.plugins.module_utils._changes import Difference
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

RUN_FOLDER = "/run/fleet-portknock"
# What pulls the units in at boot, as their [Install] sections say.
WANTED_BY = "sysinit.target"
_STATE_MARK = "# fleet.portknock state: "
_HEADER = "# Written by fleet.portknock. Changes made by hand are found and undone by its next run.\n"


class Wanted(NamedTuple):
    """The gate that a host is to have.

    ``texts`` are the rendered files, by the names that the back end gives them; ``keyring``, ``generation`` and
    ``fingerprint`` say whose secrets these are, so that a stale keyring is noticed. ``operators`` are the names of those who
    may knock, by their number in hexadecimal digits.
    """

    texts: Mapping[str, str]
    keyring: str
    generation: int
    fingerprint: str
    operators: Mapping[str, str] = MappingProxyType({})


class Found(NamedTuple):
    """What the host has: the texts of its files, None where one is missing, the recorded state, and what the kernel has.

    ``enforcer`` is the back end of the gate that is there, where none is the one that is asked for, and ``version`` that of the
    latter. ``enabled`` and ``running`` are the gate's units that boot starts, and those that run now.
    """

    texts: Mapping[str, Optional[str]]
    state: Mapping[str, Any]
    is_on_disk: bool
    private: bool
    enabled: frozenset[str]
    running: frozenset[str]
    listing: Optional[dict[str, Any]]
    version: Optional[str]
    enforcer: BackEnd


class GateHost:
    """The gate of the host that this runs on.

    :param backend: what is asked for.
    :param root: prefix of every path, for tests.
    :param others: makes the back end that another gate was made with.
    """

    def __init__(
        self,
        backend: BackEnd,
        root: str = "",
        run: Runner = run_program,
        others: Callable[[str, Runner], BackEnd] = back_end,
    ) -> None:
        self._backend = backend
        self._run = run
        self._others = others
        self._root = root
        self._config = root + CONFIG_FOLDER
        self._units = root + UNIT_FOLDER
        # Other back ends' files, too: a change of the back end leaves none of them.
        others_files = {name: file for name, file in FILES.items() if name not in backend.files}
        self._paths = {name: root + file.path for name, file in {**others_files, **backend.files}.items()}
        self._every_unit = tuple(dict.fromkeys((*UNITS, *backend.units)))
        self._every_service = tuple(dict.fromkeys((*SERVICES, *backend.services)))
        self._gate = self._paths["gate"]
        self.trial = Trial(root + RUN_FOLDER, run)
        # What keeps a packaged service from running beside: in a folder of that service's own.
        self._off = {name: path for name, path in self._paths.items() if os.path.dirname(path).endswith(".service.d")}
        # There during a trial of nothing but the gate itself.
        self._installed = self.trial.path("installed")

    def inspect(self) -> Found:
        """Read files and kernel; changes nothing."""
        texts = {name: read_text(path) for name, path in self._paths.items()}
        boot_text = texts["gate"]
        state = _state_in(boot_text or "")
        enforcer = self._enforcer(state)
        if boot_text is not None:
            texts["gate"] = enforcer.body(boot_text)
        enabled = frozenset(unit for unit in self._every_unit if os.path.islink(self._link(unit)))
        return Found(
            texts=texts,
            state=state,
            is_on_disk=boot_text is not None,
            private=boot_text is None or self._is_private(enforcer),
            enabled=enabled,
            running=frozenset(unit for unit in self._every_service if unit in enabled and self._runs(unit)),
            listing=enforcer.listing(),
            version=self._backend.version(),
            enforcer=enforcer,
        )

    def _enforcer(self, state: Mapping[str, Any]) -> BackEnd:
        """The back end of the gate with that state."""
        name = str(state.get("backend"))
        if name == self._backend.name or name not in BACK_ENDS:
            return self._backend
        return self._others(name, self._run)

    def exists(self, found: Found) -> bool:
        """Whether anything of a gate is there."""
        has_files = any(text is not None for text in found.texts.values()) or os.path.isdir(self._config)
        return bool(found.listing is not None or has_files or found.enabled)

    def differences(self, wanted: Wanted, found: Found) -> list[Difference]:
        """What is not as wanted, in files and kernel; empty when there is nothing to do."""
        differences = []
        for name, path in self._paths.items():
            before, after = found.texts[name], wanted.texts.get(name)
            if before != after:
                differences.append(Difference(path, *masked(before or "", after or "")))
        if found.is_on_disk:
            differences.extend(self._state_differences(wanted, found))
        kernel = self._kernel_difference(found) if found.enforcer.name == self._backend.name else None
        if kernel:
            differences.append(Difference("the kernel's table", f"{kernel}\n", "the gate is loaded as confirmed\n"))
        return differences

    def check(self, wanted: Wanted) -> None:
        """Let the back end's own checker read the rules.

        :raises PortknockError: some are refused.
        """
        self._backend.check(wanted.texts)

    def apply(self, wanted: Wanted, found: Found, run: str, seconds: int) -> None:
        """Arm the way back, then load the wanted gate. The trial's lock must be held.

        :raises PortknockError: nothing has changed, or the way back is armed.
        """
        self.check(wanted)
        committed = f"cmp -s {shlex.quote(self._gate)} {shlex.quote(self.trial.path('committed'))}"
        moves = found.enforcer.kernel != self._backend.kernel
        # Another kind of rules takes their place: gone is what the former ones are meant to be, whoever watches over them.
        self._begin(run, seconds, "moved" if moves else "applied", committed, found, wanted)
        write_text(self.trial.path("names"), _as_text(_names(found.state, wanted)), 0o600)
        text = wanted.texts["gate"]
        # A number that is another operator's from now on must not put former openings down to them.
        self._backend.load(
            self._backend.forgetting(text) if _renames(found.state, wanted) else text,
            self._backend.listing() if moves else found.listing,
        )
        self._backend.arm(wanted.texts)
        write_text(self.trial.path("loaded"), _as_text(self._digests()), 0o600)
        if self._is_installed(wanted, found):
            write_text(self._installed, "", 0o600)
        else:
            self._change_opener(wanted, found)
        if moves:
            found.enforcer.unload()

    def _change_opener(self, wanted: Wanted, found: Found) -> None:
        """Stop what opened the former gate, and start what opens the wanted one, with its files in the trial's folder."""
        if found.enforcer.opener in found.running:
            self._systemctl("stop", str(found.enforcer.opener))
        if self._backend.opener is None:
            return
        folder = self.trial.path("opener")
        os.makedirs(folder, mode=0o700)
        for name in self._backend.opener_files:
            file = self._backend.files[name]
            write_text(os.path.join(folder, os.path.basename(file.path)), wanted.texts[name], file.mode)
        program = os.path.join(folder, os.path.basename(self._backend.files[self._backend.opener_files[0]].path))
        started = self._run(
            [
                *("systemd-run", "--quiet", "--collect", f"--unit={OPENER_ON_TRIAL}"),
                "--description=Open the port knocking gate that is on trial",
                *("--property=Restart=always", "--property=RestartSec=100ms", "--property=StartLimitIntervalSec=0"),
                *(sys.executable, "-I", "-S", program, folder),
            ],
            None,
        )
        if started.code != 0:
            raise PortknockError(
                f"What opens the gate can't be started: systemd-run failed with exit code {started.code}."
            )

    def confirm(self, wanted: Wanted, run: str) -> list[str]:
        """Make the loaded gate the one that a reboot brings back, then disarm. The trial's lock must be held.

        :returns: what the user has to know of what is left of a former one, in sentences.
        :raises PortknockError: the trial has ended, or what is loaded is not what was loaded for it.
        """
        self.trial.require(run)
        digests = self._digests()
        if not digests or _as_text(digests) != read_text(self.trial.path("loaded")):
            raise PortknockError("The gate on trial is no longer loaded as it was: another program has changed it.")
        # New secrets alone, as in a rotation, change nothing but the gate. What is on disk now would not say so: a confirmation
        # that died in this trial may have written it, without having told systemd.
        if not os.path.exists(self._installed) or not all(map(self._runs, self._backend.services)):
            self._install(wanted)
        state = _state_in(read_text(self._gate) or "")
        former = self._enforcer(state)
        text = self._boot_text(wanted, digests, run, _names(state, wanted))
        write_text(self.trial.path("committed"), text, 0o600)
        write_text(self._gate, text, 0o600)
        left = self._leftovers_command(
            [name for name, path in self._paths.items() if name not in wanted.texts and os.path.exists(path)]
        )
        if self._run(["/bin/sh", "-c", left], None).code != 0:
            raise PortknockError(f"{self._config}: expected to be able to remove what the former back end had there.")
        self.trial.end()
        return former.left_behind() if former.kernel != self._backend.kernel else []

    def _install(self, wanted: Wanted) -> None:
        """Put everything but the gate in its place, and start what watches over it."""
        _make_private_folder(self._config)
        for name, file in self._backend.files.items():
            if name != "gate":
                if not os.path.isdir(os.path.dirname(self._paths[name])):
                    _make_folder(os.path.dirname(self._paths[name]))
                write_text(self._paths[name], wanted.texts[name], file.mode)
        # As `systemctl enable` would, but with no moment at which a boot found files and did not look after them.
        for unit in self._backend.units:
            _make_link(os.path.join(self._units, unit), self._link(unit))
        self._systemctl("daemon-reload")
        # They answer before the gate is kept: one that nobody watches over would not stay closed.
        self._systemctl("restart", *self._backend.services)

    def _is_installed(self, wanted: Wanted, found: Found) -> bool:
        """Whether everything but the gate was in its place, and running, when this run came to the host."""
        same = all(found.texts[name] == wanted.texts.get(name) for name in self._paths if name != "gate")
        has_units = found.enabled == set(self._backend.units) and found.running == set(self._backend.services)
        return same and found.private and has_units

    def names(self, found: Found) -> Mapping[str, str]:
        """The names of the operators whom the loaded gate's numbers mean, those of former gates among them."""
        on_trial = read_text(self.trial.path("names"))
        return _recorded(found.state) if on_trial is None else _mapping(on_trial)

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
        committed = f"[ ! -e {gate} ]" if found.is_on_disk else f"[ -e {marker} ]"
        self._begin(run, seconds, "absent", committed, found, None)
        found.enforcer.unload()

    def confirm_away(self, run: str) -> list[str]:
        """Remove what is left of the gate, then disarm. The trial's lock must be held.

        :returns: as :meth:`confirm`.
        """
        self.trial.require(run)
        former = self._enforcer(_state_in(read_text(self._gate) or ""))
        remove_file(self._gate)
        done = self._run(["/bin/sh", "-c", self._removal_command()], None)
        if done.code != 0:
            raise PortknockError(f"What is left of the gate can't be removed: exit code {done.code}.")
        write_text(self.trial.path("committed"), "", 0o600)
        self.trial.end()
        return former.left_behind()

    def forget(self) -> None:
        """Remove the run-time folder: the last trace of a gate that was taken away."""
        self.trial.forget()

    def _begin(self, run: str, seconds: int, kind: str, committed: str, found: Found, wanted: Optional[Wanted]) -> None:
        former = found.enforcer
        # Where the rules that the former gate falls back on are lost, the wanted one may have them, too.
        closed = found.texts[former.closed]
        if wanted is not None and (closed is None or former.kernel == self._backend.kernel):
            closed = wanted.texts.get(former.closed, closed)
        texts = {"kind": kind, "former": self._way_back(found, closed)}
        # A confirmation that died half-way has written these already.
        commands = ['restored="${restored-}"']
        for name, path in self._paths.items():
            if path == self._gate:
                continue
            text = found.texts[name]
            target, kept = shlex.quote(path), shlex.quote(self.trial.path(f"former.{name}"))
            if text is None:
                gone = " ".join(shlex.quote(each) for each in (path, *self._beside(name)))
                commands.append(f"{{ [ ! -e {target} ] || {{ rm -f {gone} && restored=yes; }}; }}")
                commands += [_rmdir_command(path)] if name in self._off else []
            else:
                texts[f"former.{name}"] = text
                commands.append(f"{{ cmp -s {kept} {target} || {{ cp {kept} {target} && restored=yes; }}; }}")
        left = [self._link(unit) for unit in self._every_unit if unit not in found.enabled]
        left += [temporary_path(path) for path in self._paths.values()]
        commands.append(f"rm -f {' '.join(map(shlex.quote, left))}")
        if not os.path.isdir(self._config):
            commands.append(f"rm -rf {shlex.quote(self._config)}")
        concerned = dict.fromkeys((*former.services, *self._backend.services))
        services = "".join(f" systemctl {'restart' if unit in found.running else 'stop'} {unit};" for unit in concerned)
        commands.append(f'{{ [ -z "$restored" ] || {{ systemctl daemon-reload;{services} :; }}; }}')
        if self._backend.opener is not None:
            commands.append(f"{{ systemctl stop {OPENER_ON_TRIAL} || :; }}")
        if former.opener in found.running:
            # It must be there for somebody to get in: tried until it is.
            commands.append(f"systemctl start {former.opener}")
        # What the former gate had armed went with its table.
        commands.append(former.arm_command(self._root))
        load = former.restore_command(shlex.quote(self.trial.path("former")))
        if kind == "moved":
            load = f"{load} && {self._backend.unload_command()}"
        if wanted is None:
            finish = self._removal_command()
        else:
            finish = self._leftovers_command(
                [name for name, text in found.texts.items() if text is not None and name not in wanted.texts]
            )
        self.trial.begin(
            run, seconds, load=load, files=" && ".join(commands), committed=committed, finish=finish, texts=texts
        )

    def _leftovers_command(self, names: Iterable[str]) -> str:
        """Shell command that ends what only the former gate needed, once the wanted one is committed.

        :param names: the files that are left of it.
        """
        commands = [] if self._backend.opener is None else [f"{{ systemctl stop {OPENER_ON_TRIAL} || :; }}"]
        files = [path for name in names for path in (self._paths[name], *self._beside(name))]
        units = [unit for unit in self._every_unit if os.path.join(self._units, unit) in files]
        if units:
            # A service whose unit is gone would go on without anybody who knows it.
            commands.append(f"{{ systemctl stop {' '.join(units)} || :; }}")
            files += map(self._link, units)
        if files:
            commands.append(f"rm -f {' '.join(map(shlex.quote, files))}")
        commands += [_rmdir_command(self._off[name]) for name in names if name in self._off]
        if units:
            commands.append("{ systemctl daemon-reload || :; }")
        return " && ".join(commands) or ":"

    def _beside(self, name: str) -> list[str]:
        """What goes with a file: written by the program that reads it."""
        file = FILES.get(name)
        return [self._root + file.beside] if file is not None and file.beside else []

    def _removal_command(self) -> str:
        """Shell command that removes everything on disk but the gate itself, whose removal is the moment of commitment."""
        paths = [*(os.path.join(self._units, unit) for unit in self._every_unit), *self._off.values()]
        files = " ".join(shlex.quote(path) for path in (*paths, *map(self._link, self._every_unit)))
        units = [unit for unit in self._every_unit if os.path.exists(os.path.join(self._units, unit))]
        services = [unit for unit in self._every_service if unit in units]
        # With a full /run systemd reloads nothing, and disabling reloads: what has to go does not wait for that.
        # Once more where it fails: a service whose unit is gone would go on without anybody who knows it.
        stop = f"systemctl stop {' '.join(services or self._backend.services)}"
        return (
            f"{{ {stop} || {stop}; }}; systemctl --quiet disable {' '.join(units or self._backend.units)}; "
            f"rm -f {files} && {' && '.join([*map(_rmdir_command, self._off.values()), 'rm -rf'])} {shlex.quote(self._config)}"
            " && systemctl daemon-reload"
        )

    def _way_back(self, found: Found, closed: Optional[str]) -> str:
        """What brings the former state of the kernel back.

        The confirmed file, even where the kernel has lost it or somebody changed it there: coming back without a gate
        would leave the port open. Where there is none that loads, what the kernel has; and where a gate was wanted and
        neither is to be had, the closed table.
        """
        enforcer = found.enforcer
        former = read_text(self._gate)
        if former is not None and enforcer.accepts(former):
            return former
        kernel = enforcer.kernel_text() if found.listing is not None else None
        if kernel is not None and enforcer.accepts(enforcer.boot_text(kernel)):
            return enforcer.boot_text(kernel)
        if former is not None and closed is not None:
            return enforcer.boot_text(closed)
        return enforcer.unload_text()

    def _boot_text(self, wanted: Wanted, digests: Mapping[str, str], run: str, names: Mapping[str, str]) -> str:
        state = {
            "backend": self._backend.name,
            "digests": digests,
            "fingerprint": wanted.fingerprint,
            "generation": wanted.generation,
            "keyring": wanted.keyring,
            "operators": names,
            "run": run,
            "version": self._backend.version(),
        }
        return _HEADER + _STATE_MARK + _as_text(state) + "\n" + self._backend.boot_text(wanted.texts["gate"])

    def _state_differences(self, wanted: Wanted, found: Found) -> list[Difference]:
        differences = []
        if found.enforcer.name != self._backend.name:
            differences.append(Difference("the back end", f"{found.enforcer.name}\n", f"{self._backend.name}\n"))
        for key in ("keyring", "generation", "fingerprint"):
            after = getattr(wanted, key)
            if found.state.get(key) != after:
                differences.append(Difference(key, f"{found.state.get(key)}\n", f"{after}\n"))
        if not found.private:
            differences.append(
                Difference(self._config, "others than root can read or write it\n", "only root can read and write it\n")
            )
        for unit in self._every_unit:
            if unit in self._backend.units:
                if unit not in found.enabled:
                    differences.append(Difference(unit, "not started at boot\n", "started at boot\n"))
                elif unit in self._backend.services and unit not in found.running:
                    differences.append(Difference(unit, "not running\n", "running\n"))
            elif unit in found.enabled:
                differences.append(Difference(unit, "started at boot\n", "not started at boot\n"))
        return differences

    def _kernel_difference(self, found: Found) -> Optional[str]:
        """What of the kernel's table isn't as it was confirmed, a line each, without the names' contents."""
        if found.listing is None:
            return "no gate is loaded in the kernel"
        if found.texts["gate"] is None:
            return "a table of the gate's name is loaded, and no gate was confirmed"
        if found.state.get("version") != found.version:
            return f"confirmed with {self._backend.program} {found.state.get('version')}, which lists it differently"
        confirmed, loaded = found.state.get("digests"), self._backend.digests(found.listing)
        if not isinstance(confirmed, dict):
            return "what was confirmed is not recorded"
        return "\n".join(
            f"{name} {'is missing' if name not in loaded else 'was added' if name not in confirmed else 'was changed'}"
            for name in sorted({*confirmed, *loaded})
            if confirmed.get(name) != loaded.get(name)
        )

    def _digests(self) -> dict[str, str]:
        listing = self._backend.listing()
        return self._backend.digests(listing) if listing is not None else {}

    def _link(self, unit: str) -> str:
        return os.path.join(self._units, f"{WANTED_BY}.wants", unit)

    def _runs(self, unit: str) -> bool:
        return self._run(["systemctl", "--quiet", "is-active", unit], None).code == 0

    def _is_private(self, enforcer: BackEnd) -> bool:
        secret = [self._paths[name] for name, file in enforcer.files.items() if not file.mode & 0o077]
        return _is_private(self._config, *filter(os.path.exists, secret))

    def _systemctl(self, *arguments: str) -> None:
        done = self._run(["systemctl", "--quiet", *arguments], None)
        if done.code != 0:
            raise PortknockError(f"systemctl {' '.join(arguments)} failed with exit code {done.code}.")


def _as_text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)


def _state_in(boot_text: str) -> Mapping[str, Any]:
    """What was recorded of a gate when it was confirmed."""
    line = next((line for line in boot_text.splitlines() if line.startswith(_STATE_MARK)), _STATE_MARK)
    return _mapping(line[len(_STATE_MARK) :])


def _mapping(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _recorded(state: Mapping[str, Any]) -> Mapping[str, str]:
    """The operators' names in a state, by number; none in one that an earlier release wrote."""
    operators = state.get("operators")
    return operators if isinstance(operators, dict) else {}


def _renames(former: Mapping[str, Any], wanted: Wanted) -> bool:
    """Whether a number means another operator than it did."""
    names = _recorded(former)
    return former.get("keyring") != wanted.keyring or any(
        names.get(number, name) != name for number, name in wanted.operators.items()
    )


def _names(former: Mapping[str, Any], wanted: Wanted) -> dict[str, str]:
    """Names by number, with those of operators who are no longer there: what they opened is still on record."""
    return {**({} if _renames(former, wanted) else _recorded(former)), **wanted.operators}


def _is_private(*paths: str) -> bool:
    for path in paths:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return False
        if status.st_mode & 0o077 or status.st_uid != os.geteuid():
            return False
    return True


def _rmdir_command(path: str) -> str:
    """Shell command that takes away the folder of a file that is gone, unless somebody else has another one there."""
    return f"{{ rmdir {shlex.quote(os.path.dirname(path))} 2>/dev/null || :; }}"


def _make_link(target: str, path: str) -> None:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not os.path.islink(path):
            os.symlink(target, path)
        sync_folder(os.path.dirname(path))
    except OSError as exc:
        raise PortknockError(f"{path}: expected to be able to make it; got {exc.strerror}.") from None


def _make_private_folder(path: str) -> None:
    _make_folder(path, 0o700)


def _make_folder(path: str, mode: int = 0o755) -> None:
    try:
        os.makedirs(path, mode=mode, exist_ok=True)
        os.chmod(path, mode)
        sync_folder(os.path.dirname(path))
    except OSError as exc:
        raise PortknockError(f"{path}: expected to be able to make it; got {exc.strerror}.") from None


__all__ = (
    "RUN_FOLDER",
    "WANTED_BY",
    "Found",
    "GateHost",
    "Wanted",
)
