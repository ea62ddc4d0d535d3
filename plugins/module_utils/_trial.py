# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Commit-confirmed changes: a change is on trial until somebody confirms it; otherwise the host goes back by itself.

The order is what protects: the way back is written and the timer armed first, the change is made in volatile state only
(kernel and /run), and what survives a reboot is written by the confirmation alone. So whatever dies, the timer or the
next boot brings back what was there. The run-time folder belongs to root alone: whoever can open the lock file could
keep the way back waiting for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import time
from typing import Iterator, Mapping, NamedTuple, Optional

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._system import (
    SEARCH_PATH,
    Runner,
    read_text,
    write_text,
)
from ansible_collections.fleet.portknock.plugins.module_utils._system import (
    run as run_program,
)

UNIT_PREFIX = "fleet-portknock-rollback-"
# How long a second run waits for the lock: a load takes well under a second.
LOCK_SECONDS = 15.0
# How much later than its deadline a trial may still be there before it counts as abandoned.
GRACE_SECONDS = 15.0
_STOP_TRIES = 3
# systemctl's exit code for a unit that isn't there.
_NOT_LOADED = 5

# {committed}, {load}, {files} and {finish} are shell commands; {folder} and {run} are quoted already.
_SCRIPT = """\
#!/bin/sh
# Goes back to what was there before the trial; where it has been confirmed meanwhile, does what the confirmation left undone.
PATH={path}
exec 9>>{folder}/lock || exit 1
flock 9 || exit 1
current=$(cat {folder}/trial/run 2>/dev/null)
# Nothing was changed yet when whoever began the trial died before it wrote the run's id.
[ -n "$current" ] || rm -rf {folder}/trial
[ "$current" = {run} ] || exit 0
loaded=
go_back() {{
    if [ -z "$loaded" ]; then
        {{ {load}; }} || return 1
        loaded=yes
    fi
    {files}
}}
if {{ {committed}; }}; then
    {{ {finish}; }} >/dev/null 2>&1
else
    tries=0
    until go_back >/dev/null 2>&1; do
        tries=$((tries + 1))
        if [ "$tries" -ge 20 ]; then
            logger -t fleet-portknock -p daemon.crit "A change was not confirmed, and the former state does not come back."
            exit 1
        fi
        sleep 1
    done
    logger -t fleet-portknock -p daemon.warning "A change was not confirmed: the former state is back." || true
fi
timer=$(cat {folder}/trial/timer 2>/dev/null)
rm -rf {folder}/trial
# Nothing is left for it to do where this was not started by it.
[ -z "$timer" ] || systemctl --no-block stop "$timer.timer" >/dev/null 2>&1 || true
"""


class Pending(NamedTuple):
    """A trial under way: who began it and for how many seconds it may go on (0 and less: overdue)."""

    run: str
    seconds_left: float


class Trial:
    """The one change on trial that a host can have.

    :param folder: run-time folder, volatile and root's alone (``/run/fleet-portknock``).
    """

    def __init__(self, folder: str, run: Runner = run_program) -> None:
        self.folder = folder
        self._run = run
        self._trial = os.path.join(folder, "trial")

    def path(self, name: str) -> str:
        """Where a text that the way back needs is kept for the time of the trial."""
        return os.path.join(self._trial, name)

    @contextlib.contextmanager
    def lock(self, wait: float = LOCK_SECONDS) -> Iterator[None]:
        """Keep other runs and the timer's script away.

        :raises PortknockError: another run held the lock all the while.
        """
        deadline = time.monotonic() + wait
        path = os.path.join(self.folder, "lock")
        while True:
            try:
                os.makedirs(self.folder, mode=0o700, exist_ok=True)
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as exc:
                raise PortknockError(f"{path}: expected to be able to write it; got {exc.strerror}.") from None
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A removal may have unlinked the file while this run waited for it.
                if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
                    break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(handle)
                    raise PortknockError(
                        f"Another run is changing this host: it has held {path} for more than {wait:.0f} s. "
                        "Try again when it has ended."
                    ) from None
            os.close(handle)
            time.sleep(0.05)
        try:
            yield
        finally:
            os.close(handle)

    def pending(self) -> Optional[Pending]:
        """The trial under way, if there is one."""
        run = read_text(self.path("run"))
        if run is None:
            return None
        deadline = read_text(self.path("deadline")) or "0"
        return Pending(run, float(deadline) - _uptime())

    @contextlib.contextmanager
    def turn(self, run: str) -> Iterator[None]:
        """Hold the lock, once another run's trial has ended by its confirmation or by its timer.

        :raises PortknockError: another run holds the lock all the while.
        """
        tried = ""
        while True:
            with self.lock():
                pending = self.pending()
                # One that is overdue and can't go back is taken over: whoever comes next finds a way of its own.
                if pending is None or pending.run in (run, tried):
                    yield
                    return
            # The lock is free while this waits: the confirmation and the way back need it.
            if pending.seconds_left < -GRACE_SECONDS:
                self.restore(pending.run)  # the timer is gone: do its work
                tried = pending.run
            else:
                time.sleep(0.2)

    def begin(
        self,
        run: str,
        seconds: int,
        *,
        load: str,
        files: str,
        committed: str,
        finish: str,
        texts: Mapping[str, str],
    ) -> None:
        """Write down the way back and arm the timer, while the lock is held. Nothing may be changed before this returns.

        :param run: the run's id: hexadecimal digits.
        :param seconds: how long the change is on trial.
        :param load: shell command that brings the former state of the kernel back; tried until it succeeds.
        :param files: shell command that brings the former files back, then; likewise.
        :param committed: shell condition that holds once the change has been confirmed.
        :param finish: shell command for what is left to do where a confirmation died after that condition came to hold.
        :param texts: name and content of the files that the commands use, see :meth:`path`.
        :raises PortknockError: the way back can't be written, or the timer can't be armed.
        """
        self.end()
        # First of all: what is written below is then taken away again, whoever dies in between.
        armed = self._arm(run, seconds)
        try:
            os.makedirs(self._trial, mode=0o700)
            for name, text in zip(("timer", "pid"), armed):
                if text is not None:
                    write_text(self.path(name), text, 0o600)
            for name, text in texts.items():
                write_text(self.path(name), text, 0o600)
            script = _SCRIPT.format(
                path=SEARCH_PATH,
                folder=shlex.quote(self.folder),
                run=shlex.quote(run),
                committed=committed,
                load=load,
                files=files,
                finish=finish,
            )
            write_text(self._script(run), script, 0o700)
            write_text(self.path("deadline"), f"{_uptime() + seconds:.2f}", 0o600)
            # Last: without it the script does nothing.
            write_text(self.path("run"), run, 0o600)
        except BaseException as exc:
            self._disarm(armed)
            shutil.rmtree(self._trial, ignore_errors=True)
            if isinstance(exc, OSError):
                raise PortknockError(f"{self._trial}: expected to be able to write it; got {exc.strerror}.") from None
            raise

    def require(self, run: str) -> None:
        """Make sure that this run's trial is still on.

        :raises PortknockError: it has ended: the host has gone back, or another run took over.
        """
        pending = self.pending()
        if pending is None or pending.run != run:
            raise PortknockError(
                "The trial has ended already: it was not confirmed in time and the host has gone back."
            )

    def end(self) -> None:
        """Disarm the timer and forget the way back, while the lock is held."""
        self._disarm(self._armed())
        shutil.rmtree(self._trial, ignore_errors=True)

    def forget(self) -> None:
        """Remove the run-time folder, while the lock is held: the last trace of what was taken away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def restore(self, run: str) -> None:
        """Let this run's trial go back now instead of waiting for the timer. The lock must be free: the script takes it.

        A change that was confirmed stays; so does the trial where the way back fails.
        """
        pending = self.pending()
        if pending is None or pending.run != run:
            return
        armed = self._armed()
        self._run(["/bin/sh", self._script(run)], None)
        if self.pending() is None:
            self._disarm(armed)

    def _script(self, run: str) -> str:
        return self.path(f"restore-{run}.sh")

    def _armed(self) -> tuple[Optional[str], Optional[str]]:
        """The timer's unit, and the process that stands in for it."""
        return read_text(self.path("timer")), read_text(self.path("pid"))

    def _disarm(self, armed: tuple[Optional[str], Optional[str]]) -> None:
        timer, pid = armed
        if timer is not None:
            # A timer that is left would find nothing to do; a person would wonder about it all the same.
            for _attempt in range(_STOP_TRIES):
                if self._run(["systemctl", "stop", f"{timer}.timer"], None).code in (0, _NOT_LOADED):
                    break
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid), signal.SIGTERM)

    def _arm(self, run: str, seconds: int) -> tuple[Optional[str], Optional[str]]:
        """Start the timer; returns its unit, or the process that stands in for it.

        :raises PortknockError: neither can be started.
        """
        script, lock = shlex.quote(self._script(run)), shlex.quote(os.path.join(self.folder, "lock"))
        # Without a script, or with one and no run's id, whoever armed this died before anything was changed.
        command = (
            f"[ ! -e {script} ] || exec /bin/sh {script}; "
            f"exec 9>>{lock} && flock 9 && {{ [ -e {shlex.quote(self.path('run'))} ] || rm -rf {shlex.quote(self._trial)}; }}"
        )
        # A name of its own for each arming: a timer that was left behind must not be in the way.
        timer = f"{UNIT_PREFIX}{run}-{secrets.token_hex(3)}"
        armed = self._run(
            [
                "systemd-run",
                "--quiet",
                "--collect",
                f"--unit={timer}",
                "--description=Bring back what was there before an unconfirmed change",
                f"--on-active={seconds}",
                "--timer-property=AccuracySec=100ms",
                "/bin/sh",
                "-c",
                command,
            ],
            None,
        )
        if armed.code == 0:
            return timer, None
        # No systemd that answers: a process of its own session, which outlives the connection that started it.
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", f"sleep {int(seconds)}; {command}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        except OSError as exc:
            raise PortknockError(
                f"Neither systemd-run (exit code {armed.code}) nor a process of its own ({exc.strerror}) can be started "
                "to bring the host back, so nothing was changed."
            ) from None
        return None, str(process.pid)


def _uptime() -> float:
    """Seconds since boot; stepping the clock does not move it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME if hasattr(time, "CLOCK_BOOTTIME") else time.CLOCK_MONOTONIC)


__all__ = ("GRACE_SECONDS", "LOCK_SECONDS", "UNIT_PREFIX", "Pending", "Trial")
