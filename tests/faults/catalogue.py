# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The faults: what each does to a host, or to who works on it, at the step that a run has reached."""

from __future__ import annotations

import contextlib
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hosts import WRITINGS, Host, Step
from judge import Keyring
from lab import wait_until
from play import Play

# What begins with a gate and keeps one.
KEPT = ("change", "broken", "rotate")
# Until here a rotation has put nothing but the first of its two changes on trial.
FIRST_HALF = ("look", "after look", WRITINGS[0], "apply both", "after apply both", "confirm both")
# How long a change is on trial, and how much later the host must have gone back at the latest. A change that is to be
# confirmed gets time for it, on a machine that has other things to do.
TRIAL_SECONDS = 10
CONFIRMED_TRIAL_SECONDS = 40
GRACE_SECONDS = 20
HOUR = 3600
# What the product promises where another program takes the gate away.
REPAIR_SECONDS = 2.0
# And where the watch was killed at the same moment, and systemd has to start it first.
RESTART_SECONDS = 5.0
CLOCK = "etc/faketimerc"
RESTORE_NEIGHBOUR = "nft list table inet neighbour >/dev/null 2>&1 || systemctl restart neighbour"
_UNUSED = range(20000, 60000)


@dataclass(eq=False)
class Attempt:
    """One fault, on one host, at one step of one play, and what came of it."""

    fault: Fault
    kind: str
    step: Step
    host: Host = field(init=False)
    keyring: Keyring = field(init=False)
    begin_second_run: Callable[[Attempt], Play] = field(init=False)
    second_run: Play | None = None
    # A copy of the collection that lacks a protection.
    collections: Path | None = None
    locked_out: bool = False
    left_open: bool = False
    others: list[str] = field(default_factory=list)
    longest_hole: float = 0.0
    kept: bytes | None = None
    # What was in the keyring before the play: the sequences, the entry's generation, and which file it was.
    former: list[list[str]] = field(default_factory=list)
    former_generation: int = 0
    seen_file: tuple[int, int] = (0, 0)

    @property
    def is_broken(self) -> bool:
        """Whether the change that the play makes would lock everybody out if it stayed."""
        return self.kind == "broken" or (
            self.kind == "first" and self.fault.dies and self.step.phase not in ("confirm", "after confirm")
        )

    @property
    def trial(self) -> int:
        """Seconds for which the change that the step belongs to is on trial."""
        may_be_confirmed = "confirm" in self.step.phase or not (self.fault.dies or self.is_broken)
        return CONFIRMED_TRIAL_SECONDS if may_be_confirmed else TRIAL_SECONDS

    @property
    def trials(self) -> tuple[int, ...]:
        """Seconds for which each of the play's changes is on trial; the last holds for those that come after it, too."""
        is_second = self.kind == "rotate" and self.step.phase not in FIRST_HALF
        return (CONFIRMED_TRIAL_SECONDS, self.trial) if is_second else (self.trial,)

    @property
    def is_controllers(self) -> bool:
        """Whether the step is the controller's own, which goes on at once: no call on the host can be stopped there."""
        return self.kind == "rotate" and not self.step.call

    @property
    def verdicts(self) -> list[str]:
        """What is wrong, in words; nothing where all is well."""
        locked_out, left_open = ["locked out"] * self.locked_out, ["left open"] * self.left_open
        return [*locked_out, *left_open, *self.others]

    @property
    def label(self) -> str:
        return f"{self.kind}: {self.step.label}"


class Fault:
    """What goes wrong. Nothing does in this one."""

    name = "nothing"
    # What the stopped call is told to do: wait for a word, or fail.
    action = "hold"
    # Somebody dies of it, so that only the way back is left.
    dies = False
    kills_controller = False
    needs_clock = False
    # At how many steps of a kind of play the full form tries it.
    most = 4
    # The kinds of play of which it tries every step.
    everywhere: tuple[str, ...] = ()
    # How long an un-knocked source may get in, in seconds.
    bearable_hole = 0.0
    # Whether other people's rules stay as they were.
    spares_others = True

    def fits(self, _kind: str, step: Step, _host: Host) -> bool:
        return bool(step.call)

    def before(self, attempt: Attempt) -> None:
        """Before the play starts."""

    def strike(self, attempt: Attempt) -> None:
        """At the step."""
        attempt.host.go_on()

    def mend(self, attempt: Attempt) -> None:
        """When the host has come to rest, before it is looked at: what a person would put right."""

    def tidy(self, attempt: Attempt) -> None:
        """After it has been looked at."""


class ControllerKilled(Fault):
    """SIGKILL of ansible-playbook and of everything that it started."""

    name = "controller killed"
    dies = True
    kills_controller = True
    everywhere = ("rotate",)

    def fits(self, _kind: str, _step: Step, _host: Host) -> bool:
        return True

    def strike(self, attempt: Attempt) -> None:
        """One controller serves all hosts: the driver kills it once each has got to its step."""


class ModuleKilled(Fault):
    """SIGKILL of whoever makes the call on the host: the module's process, or the script that goes back."""

    name = "process on the host killed"
    dies = True

    def strike(self, attempt: Attempt) -> None:
        attempt.host.kill(*attempt.host.reached())
        attempt.host.go_on("die")


class NetworkCut(Fault):
    """The host's cable out for longer than the trial, then in again."""

    name = "network cut"
    dies = True

    def fits(self, _kind: str, _step: Step, _host: Host) -> bool:
        return True

    def strike(self, attempt: Attempt) -> None:
        attempt.host.set_link("down")
        try:
            attempt.host.go_on()
            time.sleep(attempt.trial + 3)
        finally:
            attempt.host.set_link("up")


class PowerLoss(Fault):
    """The host loses power and starts again."""

    name = "host restarted"
    dies = True

    def fits(self, _kind: str, _step: Step, _host: Host) -> bool:
        return True

    def strike(self, attempt: Attempt) -> None:
        attempt.host.power_loss()
        attempt.host.wait_for_boot()


class CallFails(Fault):
    """One call of a program fails."""

    action = "fail"

    def __init__(self, program: str) -> None:
        self.name = f"{program} fails"
        self._program = program

    def fits(self, _kind: str, step: Step, _host: Host) -> bool:
        return step.call.split()[:1] == [self._program]

    def strike(self, attempt: Attempt) -> None:
        """The call has failed already."""


class TimerFails(CallFails):
    """systemd-run can't arm the timer, and the controller is killed."""

    dies = True
    kills_controller = True

    def __init__(self) -> None:
        super().__init__("systemd-run")
        self.name = "systemd-run fails, controller killed"


class DiskFull(Fault):
    """Not a byte more can be written to a folder."""

    def __init__(self, folder: str) -> None:
        self.name = f"disk full: {folder}"
        self._folder = folder
        self._filler = f"{folder}/.filler"

    def fits(self, kind: str, step: Step, _host: Host) -> bool:
        if kind == "first" and self._folder == "/etc/fleet-portknock":
            return False
        # Before a confirmation nothing is written outside of /run.
        return bool(step.call) and (self._folder == "/run" or step.phase.startswith("confirm"))

    def before(self, attempt: Attempt) -> None:
        if self._folder != "/run":
            attempt.host.execute(
                f"mount -t tmpfs -o size=2m,mode=700 none /mnt; cp -a {self._folder}/. /mnt\n"
                f"mount --move /mnt {self._folder}"
            )

    def strike(self, attempt: Attempt) -> None:
        resize = "mount -o remount,size=$(($(df -k --output=used /run | tail -n 1) + 8))k /run; "
        attempt.host.execute(
            f"{resize if self._folder == '/run' else ''}dd if=/dev/zero of={self._filler} bs=4k 2>/dev/null || true"
        )
        attempt.host.go_on()

    def mend(self, attempt: Attempt) -> None:
        """Make room; what was written stays on the disk beneath, and counts at the next boot."""
        folder, host = self._folder, attempt.host
        host.execute(f"rm -f {self._filler}", check=False)
        if folder == "/run":
            # systemd refuses to reload while there is no room; with room, the next reload makes it forget what is gone.
            host.execute("mount -o remount,size=64m /run; systemctl daemon-reload")
            return
        host.execute(
            f"mount --bind / /mnt; find /mnt{folder} -mindepth 1 -delete; cp -a {folder}/. /mnt{folder}; umount /mnt\n"
            f"umount {folder}; rmdir {folder} 2>/dev/null || true; systemctl daemon-reload"
        )
        host.power_loss()
        host.wait_for_boot()


class Planted(Fault):
    """The host's entry of the keyring is replaced by one with other knocks, and later put right from a backup.

    :param foreign: the entry is one of another keyring, as from a wrong checkout; else only the knocks differ.
    """

    def __init__(self, foreign: bool) -> None:
        self.name = f"{'foreign' if foreign else 'wrong'} sequence planted"
        self._foreign = foreign

    def fits(self, kind: str, step: Step, host: Host) -> bool:
        # Before a first run reads the keyring, nothing says that what is planted is wrong: the host gets it, and the backup
        # would be the wrong one then.
        is_what_is_read = not self._foreign and kind == "first" and step.phase == "look"
        # Later in a rotation the backup is out of date before it is put back, and the host's generation says so.
        is_outdated = kind == "rotate" and step.phase != "look"
        return super().fits(kind, step, host) and not is_what_is_read and not is_outdated

    def strike(self, attempt: Attempt) -> None:
        keyring, host = attempt.keyring, attempt.host.name
        attempt.kept = keyring.backup(host)
        if attempt.kept is not None:
            entry = keyring.read(host)
            for operator in entry["operators"].values():
                knocks = operator["current"]["knocks"]
                knocks[:] = [f"{port}/tcp" for port in random.sample(_UNUSED, len(knocks))]
            if self._foreign:
                entry["keyring"] = str(uuid.uuid4())
            keyring.write(host, entry)
        attempt.host.go_on()

    def mend(self, attempt: Attempt) -> None:
        if attempt.kept is not None:
            attempt.keyring.restore(attempt.host.name, attempt.kept)


class ClockStepped(Fault):
    """The clock of the host's programs is stepped by an hour, and the controller is killed: the timer is all there is."""

    name = "clock stepped, controller killed"
    dies = True
    kills_controller = True
    needs_clock = True
    most = 3

    def fits(self, _kind: str, _step: Step, host: Host) -> bool:
        return bool(host.clock_step)

    def strike(self, attempt: Attempt) -> None:
        (attempt.host.root / CLOCK).write_text(f"{attempt.host.clock_step:+d}\n")

    def tidy(self, attempt: Attempt) -> None:
        (attempt.host.root / CLOCK).write_text("+0\n")


class SecondRun(Fault):
    """Another run of site.yml, with a change that would lock out, begins meanwhile."""

    name = "second run"

    def strike(self, attempt: Attempt) -> None:
        attempt.second_run = attempt.begin_second_run(attempt)
        attempt.host.go_on()


class Flushed(Fault):
    """A stranger flushes every table; with `daemon`, the watcher is killed first."""

    spares_others = False

    def __init__(self, daemon: bool) -> None:
        self.name = "daemon killed, then flushed" if daemon else "flushed by a stranger"
        self.bearable_hole = RESTART_SECONDS if daemon else REPAIR_SECONDS
        self._daemon = daemon

    def fits(self, kind: str, _step: Step, _host: Host) -> bool:
        return kind in KEPT

    def strike(self, attempt: Attempt) -> None:
        if self._daemon:
            attempt.host.execute("systemctl kill -s KILL --kill-who=main fleet-portknock-watch.service", check=False)
        attempt.host.execute("nft flush ruleset")
        attempt.host.go_on()

    def mend(self, attempt: Attempt) -> None:
        # Whoever looks away before the hole is closed can't say how long it was.
        wait_for_gate(attempt.host, self.bearable_hole)

    def tidy(self, attempt: Attempt) -> None:
        attempt.host.execute(RESTORE_NEIGHBOUR)


class UnitFails(CallFails):
    """systemctl fails; whether what it was to do was needed shows when somebody flushes every table later."""

    bearable_hole = REPAIR_SECONDS

    def __init__(self) -> None:
        super().__init__("systemctl")
        self.name = "systemctl fails, later flushed"

    def mend(self, attempt: Attempt) -> None:
        host = attempt.host
        host.execute("nft flush ruleset")
        wait_for_gate(host, REPAIR_SECONDS)
        host.execute(RESTORE_NEIGHBOUR)


def wait_for_gate(host: Host, seconds: float) -> None:
    """Until a host that is to have a gate has it again, or the time that is promised has passed."""
    if host.is_gated:
        with contextlib.suppress(AssertionError):
            wait_until(host.has_table, seconds, "the gate is back")


# First what only some hosts can have, so that these begin with it.
FAULTS: tuple[Fault, ...] = (
    ClockStepped(),
    ControllerKilled(),
    ModuleKilled(),
    NetworkCut(),
    PowerLoss(),
    CallFails("nft"),
    UnitFails(),
    TimerFails(),
    DiskFull("/run"),
    DiskFull("/etc/fleet-portknock"),
    DiskFull("/etc/systemd/system"),
    Planted(foreign=True),
    Planted(foreign=False),
    SecondRun(),
    Flushed(daemon=False),
    Flushed(daemon=True),
)
