# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""sshd's settings on their host, changed under the same trial as a gate.

While they are on trial nothing on disk has changed: the configuration that sshd reads is covered by a bind mount of a file
under /run, so a reboot is a way back, too. The confirmation writes the file and takes the mount away.
"""

from __future__ import annotations

import getopt
import json
import os
import re
import shlex
import shutil
import stat
import tempfile
import time
from typing import Any, Mapping, NamedTuple, Optional, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._backends import CONFIG_FOLDER
from ansible_collections.fleet.portknock.plugins.module_utils._changes import Change, Difference, planned, run_change
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._host import RUN_FOLDER
from ansible_collections.fleet.portknock.plugins.module_utils._procnet import ssh_connection
from ansible_collections.fleet.portknock.plugins.module_utils._sshd_config import (
    HEADER,
    Directive,
    Effective,
    SshdSettings,
    as_text,
    chosen_directives,
    includes,
    overruled,
    places,
    read_effective,
    unpacked,
    with_blocks,
    without_blocks,
)
from ansible_collections.fleet.portknock.plugins.module_utils._system import (
    Completed,
    Runner,
    read_text,
    remove_file,
    write_text,
)
from ansible_collections.fleet.portknock.plugins.module_utils._system import (
    run as run_program,
)
from ansible_collections.fleet.portknock.plugins.module_utils._trial import Trial

SSHD = "/usr/sbin/sshd"
MAIN = "/etc/ssh/sshd_config"
# Sorted before what distributions and cloud-init put there: of each setting sshd keeps the first value.
DROP_IN = "/etc/ssh/sshd_config.d/00-fleet-portknock.conf"
_PRIVILEGE_SEPARATION = "/run/sshd"
_SERVICES = ("ssh.service", "sshd.service")
_SOCKETS = ("ssh.socket", "sshd.socket")
# What `ssh -Q` calls the algorithms of a keyword. It has known the signatures by this name since OpenSSH 8.2 at least.
_QUERIES = {
    "kexalgorithms": "kex",
    "ciphers": "cipher",
    "macs": "mac",
    "hostkeyalgorithms": "HostKeyAlgorithms",
    "pubkeyacceptedalgorithms": "key-sig",
}
_LISTENER = re.compile(r"^sshd: (?P<arguments>.*?)(?: \[listener\].*)?$")
# sshd is there again within some ten milliseconds of the signal.
_RELOAD_SECONDS = 5.0
_MOUNTS = "/proc/self/mountinfo"


class _Service(NamedTuple):
    """How sshd runs: the unit, whether systemd holds its socket, and the options of its command line for ``sshd -T``."""

    unit: str
    by_socket: bool
    pid: int
    options: tuple[str, ...]
    main: str


class _Plan(NamedTuple):
    """``file`` is to hold ``text`` (None: not be there).

    On trial ``covered`` shows ``cover`` instead of its own text; ``settings`` are ours alone.
    """

    file: str
    before: Optional[str]
    text: Optional[str]
    covered: str
    cover: str
    settings: str


class SshdChange(Change):
    """The settings that sshd is to have, or None where ours are to be taken away.

    :param users: accounts whose effective settings have to be the wanted ones, too.
    """

    def __init__(
        self,
        settings: Optional[SshdSettings],
        run: str,
        seconds: int,
        users: Sequence[str],
        pid: int,
        runner: Runner = run_program,
    ) -> None:
        self._settings = settings
        self._run_id = run
        self._seconds = seconds
        self._users = users
        self._run = runner
        # For a run that does not come by ssh: an address that is nobody's (RFC 5737).
        client, server, self._port = ssh_connection(pid) or ("192.0.2.1", "127.0.0.1", "22")
        self._client, self._server = (address.partition("%")[0] for address in (client, server))
        self.trial = Trial(RUN_FOLDER, runner)

    def plan(self) -> dict[str, Any]:
        if self._settings is None and not _has_ours():
            return planned([])
        self._service = self._running_sshd()
        for path in (self._service.main, DROP_IN):
            if _covered(path):
                raise PortknockError(f"{path}: expected the file itself; got a mount over it: another trial may be on.")
        self._plan = plan = self._planned()
        changed = plan.before != plan.text
        warnings: list[str] = []
        with tempfile.TemporaryDirectory(prefix="fleet-portknock-") as folder:
            view = _view(plan, folder) if changed else ()
            if changed:
                self._check_accepted(view)
            if self._settings is not None:
                warnings = self._check_effective(plan, view, folder)
        result = planned([Difference(plan.file, plan.before or "", plan.text or "")] if changed else [])
        return {**result, "warnings": warnings} if changed else result

    def settled(self) -> None:
        self._forget_where_alone()

    def begin(self) -> dict[str, Any]:
        plan = self._plan
        if os.readlink("/proc/self/ns/mnt") != os.readlink("/proc/1/ns/mnt"):
            raise PortknockError(
                "Expected to run where init runs; this session has mounts of its own, under which sshd would see no change."
            )
        file, covered = shlex.quote(plan.file), shlex.quote(plan.covered)
        uncover = f"while {_covered_condition(covered)}; do umount -l {covered} || break; done; ! {_covered_condition(covered)}"
        wanted = shlex.quote(self.trial.path("wanted"))
        done = f"[ ! -e {file} ]" if plan.text is None else f"cmp -s {wanted} {file}"
        self.trial.begin(
            self._run_id,
            self._seconds,
            load=f"{{ {uncover}; }} && {self._reload_command()}",
            files=":",
            # While the trial covers the file itself, it looks like what is wanted.
            committed=f"! {_covered_condition(file)} && {done}",
            finish=uncover,
            texts={
                "kind": "sshd",
                "cover": plan.cover,
                "settings": plan.settings,
                "wanted": plan.text or "",
                "plan": json.dumps({"file": plan.file, "covered": plan.covered, "absent": plan.text is None}),
            },
        )
        cover = self.trial.path("cover")
        os.chmod(cover, stat.S_IMODE(os.stat(plan.covered).st_mode))
        done_mounting = self._run(["mount", "--bind", cover, plan.covered], None)
        if done_mounting.code != 0:
            raise PortknockError(f"{plan.covered} can't be covered for the trial: {_complaint(done_mounting)}.")
        self._reload()
        return {}

    def confirm(self) -> None:
        self.trial.require(self._run_id)
        plan = json.loads(read_text(self.trial.path("plan")) or "{}")
        file, covered = plan["file"], plan["covered"]
        if not _covered(covered):
            raise PortknockError(f"The settings on trial are no longer in effect: the mount over {covered} is gone.")
        if covered == file:
            self._uncover(covered)
        if plan["absent"]:
            remove_file(file)
        else:
            os.makedirs(os.path.dirname(file), mode=0o755, exist_ok=True)
            write_text(file, read_text(self.trial.path("wanted")) or "", 0o644)
        self._uncover(covered)
        self.trial.end()
        self._forget_where_alone()

    def _forget_where_alone(self) -> None:
        """Where ours is taken away and there is no gate either, nothing is left."""
        if self._settings is None and not os.path.isdir(CONFIG_FOLDER):
            self.trial.forget()

    def outcome(self) -> Optional[str]:
        pending = self.trial.pending()
        if pending is not None and pending.run == self._run_id:
            return None
        self._service = self._running_sshd()
        plan = self._planned()
        return "confirmed" if plan.before == plan.text else "restored"

    def _planned(self) -> _Plan:
        """What has to be written where."""
        main_path = os.path.realpath(self._service.main)
        main = read_text(main_path)
        if main is None:
            raise PortknockError(f"{main_path}: expected sshd's configuration there; got no such file.")
        settings = self._settings
        directives = self._directives(settings) if settings is not None else ()
        matches = settings.matches if settings is not None else ()
        alone = as_text(directives, matches)
        if main_path != MAIN or not includes(main, MAIN, DROP_IN):
            text = with_blocks(main, directives, matches) if settings is not None else without_blocks(main)
            return _Plan(main_path, main, text, main_path, text, alone)
        before = read_text(DROP_IN)
        drop_in = HEADER + alone if settings is not None else None
        if before is not None:
            return _Plan(DROP_IN, before, drop_in, DROP_IN, drop_in or HEADER, alone)
        # There is no file yet that could be covered, but the main one; an Include keeps its Match blocks to itself.
        return _Plan(DROP_IN, None, drop_in, MAIN, f"Include {self.trial.path('settings')}\n{main}", alone)

    def _directives(self, settings: SshdSettings) -> tuple[Directive, ...]:
        """The settings that the installed sshd knows, with the algorithms that it offers.

        :raises PortknockError: sshd refuses the configuration that is there, or does not answer.
        """
        known = self._effective((), None)
        offered = {}
        for choice in settings.algorithms:
            keyword = choice.keyword.lower()
            done = self._run(["ssh", "-Q", _QUERIES[keyword]], None)
            if done.code != 0:
                raise PortknockError(
                    f"ssh -Q {_QUERIES[keyword]}: expected a list of algorithms; got {_complaint(done)}."
                )
            offered[keyword] = done.stdout.split()
        return chosen_directives(settings, lambda keyword: keyword in known, offered)

    def _check_accepted(self, view: Sequence[str]) -> None:
        done = self._sshd(view, "-t", *self._service.options)
        if done.code != 0:
            raise PortknockError(
                f"sshd_hardening_settings, sshd_hardening_match: sshd refuses them: {_complaint(done)}."
            )

    def _check_effective(self, plan: _Plan, view: Sequence[str], folder: str) -> list[str]:
        """Make sure that no other file's directive wins.

        :returns: warnings: where exceptions for some connections stand.
        :raises PortknockError: one does; says where it stands.
        """
        alone = os.path.join(folder, "alone")
        with open(alone, "w", encoding="utf-8") as stream:
            stream.write(plan.settings)
        keywords = [line.split()[0] for line in plan.settings.splitlines() if line and not line.startswith("Match ")]
        for user in (None, *self._users):
            wanted = self._effective((), user, "-f", alone)
            effective = self._effective(view, user)
            for keyword in overruled(wanted, effective, keywords):
                # In a Match block what it says there wins over everything that stands outside of all.
                found = places(keyword, self._service.main, read_text, [DROP_IN])
                found.sort(key=lambda place: place.in_match, reverse=user is not None)
                where = f"{found[0]} wins" if found else "sshd's command line, or a line that can't be found, wins"
                raise PortknockError(
                    f"{keyword}: expected {' '.join(wanted.get(keyword, ()))!r} to be in effect{f' for {user}' if user else ''};"
                    f" got {' '.join(effective.get(keyword, ()))!r}: {where}. Take that line away, or name the value that you "
                    "want in sshd_hardening_settings or sshd_hardening_match."
                )
        exceptions = [
            (keyword, place)
            for keyword in dict.fromkeys(keywords)
            for place in places(keyword, self._service.main, read_text, [DROP_IN])
            if place.in_match
        ]
        return [f"{keyword} is set otherwise for some connections: {place}" for keyword, place in exceptions]

    def _effective(self, view: Sequence[str], user: Optional[str], *more: str) -> Effective:
        connection = []
        if user is not None:
            place = f"host={self._client},addr={self._client},laddr={self._server},lport={self._port}"
            connection = ["-C", f"user={user},{place}"]
        options = more or self._service.options
        done = self._sshd(view, "-T", *options, *connection)
        if done.code != 0:
            raise PortknockError(f"sshd -T: expected sshd to accept its configuration; got {_complaint(done)}.")
        return read_effective(done.stdout)

    def _sshd(self, view: Sequence[str], *arguments: str) -> Completed:
        """Run sshd on a configuration as it would be, which nobody else sees (a mount: source and target)."""
        # Without a running sshd, systemd takes it away.
        os.makedirs(_PRIVILEGE_SEPARATION, mode=0o755, exist_ok=True)
        if not view:
            return self._run([SSHD, *arguments], None)
        script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
        apart = ["unshare", "--mount", "--propagation", "private", "--", "/bin/sh", "-c", script, "sh"]
        return self._run([*apart, *view, SSHD, *arguments], None)

    def _running_sshd(self) -> _Service:
        done = self._run(["systemctl", "show", "--property=Id,ActiveState,MainPID", *_SERVICES, *_SOCKETS], None)
        units: dict[str, dict[str, str]] = {}
        for block in done.stdout.split("\n\n"):
            properties = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
            units.setdefault(properties.get("Id", ""), properties)
        active = {name for name, properties in units.items() if properties.get("ActiveState") == "active"}
        service = next((name for name in _SERVICES if name in active), None)
        by_socket = bool(active.intersection(_SOCKETS))
        if service is None and not by_socket:
            raise PortknockError(
                f"sshd: expected one of the units {', '.join((*_SERVICES, *_SOCKETS))} to be active; got none, so sshd can't "
                "be told of new settings."
            )
        pid = int(units[service].get("MainPID", "0")) if service else 0
        options, main = _command_line(pid) if pid else ((), MAIN)
        return _Service(service or _SERVICES[0], by_socket, pid, options, main)

    def _reload_command(self) -> str:
        # A reload is the end of an sshd that has its socket from systemd; a restart ends no session of either.
        return f"systemctl {'try-restart' if self._service.by_socket else 'reload-or-restart'} {self._service.unit}"

    def _reload(self) -> None:
        """Let sshd read its configuration again, and wait until it has.

        :raises PortknockError: it refuses.
        """
        pid = self._service.pid
        before = _image(pid)
        done = self._run(self._reload_command().split(), None)
        if done.code != 0:
            raise PortknockError(
                f"sshd does not take the settings: {self._reload_command()} failed: {_complaint(done)}."
            )
        deadline = time.monotonic() + _RELOAD_SECONDS
        # The listener executes itself anew; until then it would still let in by the former settings.
        while not self._service.by_socket and _image(pid) == before and time.monotonic() < deadline:
            time.sleep(0.02)

    def _uncover(self, path: str) -> None:
        while _covered(path):
            done = self._run(["umount", "-l", path], None)
            if done.code != 0:
                raise PortknockError(
                    f"{path}: expected to be able to take the trial's mount away; got {_complaint(done)}."
                )


def run_sshd_phase(
    phase: str, state: str, payload: Mapping[str, Any], pid: int, check_mode: bool, run: Runner = run_program
) -> dict[str, Any]:
    """Do one phase of a change of sshd's settings; see :func:`run_change`.

    :param payload: ``run`` (id), ``seconds`` (of the trial), and for wanted settings ``settings`` (packed) and ``users``.
    :param pid: a process of the ssh connection that this came through.
    """
    change = SshdChange(
        unpacked(payload["settings"]) if state == "applied" else None,
        str(payload["run"]),
        int(payload["seconds"]),
        payload.get("users", ()),
        pid,
        run,
    )
    return run_change(phase, change, change.trial, str(payload["run"]), check_mode)


def _has_ours() -> bool:
    """Whether anything of ours is where sshd's configuration usually is."""
    main = read_text(MAIN) or ""
    return read_text(DROP_IN) is not None or without_blocks(main) != main


def _view(plan: _Plan, folder: str) -> tuple[str, str]:
    """The configuration as it will be after the confirmation, as a mount: source and target."""
    shown = os.path.join(folder, "shown")
    if plan.file != DROP_IN:
        _write(shown, plan.text or "")
        return shown, plan.file
    drop_ins = os.path.dirname(DROP_IN)
    if not os.path.isdir(drop_ins):
        # Nobody else's file comes before ours there, so the trial's own view is the same.
        _write(f"{shown}.settings", plan.settings)
        _write(shown, f"Include {shown}.settings\n{read_text(MAIN)}")
        return shown, MAIN
    shutil.copytree(drop_ins, shown)
    ours = os.path.join(shown, os.path.basename(DROP_IN))
    if plan.text is not None:
        _write(ours, plan.text)
    elif os.path.exists(ours):
        os.unlink(ours)
    return shown, drop_ins


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)


def _command_line(pid: int) -> tuple[tuple[str, ...], str]:
    """The options of a running sshd that decide over its settings, and its main configuration file."""
    text = (read_text(f"/proc/{pid}/cmdline") or "").replace("\0", " ").strip()
    found = _LISTENER.match(text)
    words = (found["arguments"] if found else text).split()
    try:
        options, _rest = getopt.getopt(words[1:], "C:E:b:c:f:g:h:k:o:p:u:46DGQRTdeiqrtV")
    except getopt.GetoptError:
        return (), MAIN
    main = next((value for name, value in options if name == "-f"), MAIN)
    kept = [part for name, value in options if name in ("-f", "-o", "-p", "-4", "-6") for part in (name, value) if part]
    return tuple(kept), main


def _image(pid: int) -> bytes:
    """Something that differs each time the process executes a program: where the kernel has put its random bytes."""
    try:
        with open(f"/proc/{pid}/auxv", "rb") as stream:
            return stream.read()
    except OSError:
        return b""


def _covered(path: str) -> bool:
    text = read_text(_MOUNTS) or ""
    return any(line.split()[4] == path for line in text.splitlines())


def _covered_condition(path: str) -> str:
    """The same as a shell condition; the path is quoted already."""
    return f"""awk -v path={path} '$5 == path {{ found = 1 }} END {{ exit !found }}' {_MOUNTS}"""


def _complaint(done: Completed) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else f"exit code {done.code}"


__all__ = ("DROP_IN", "MAIN", "SshdChange", "run_sshd_phase")
