# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs plays against the fleet, lets each host have its fault at its step, and has it judged."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from catalogue import CLOCK, CONFIRMED_TRIAL_SECONDS, GRACE_SECONDS, HOUR, KEPT, Attempt
from hosts import TRIAL, WRITINGS, Host, Step, steps_of
from judge import Judge, Prober
from lab import Fleet, wait_until
from play import Play

# What the module's processes are in each kind of play, in their order.
PHASES = {
    "first": ("look", "apply", "confirm"),
    "change": ("look", "apply", "confirm"),
    "broken": ("look", "apply", "rollback"),
    "rotate": ("look", "apply both", "confirm both", "apply alone", "confirm alone"),
    "remove": ("take away", "confirm"),
}
# The preloaded library that steps a clock breaks the sleep of Python 3.11 and newer.
CLOCK_IMAGE = "debian11"
# How long a second run is waited for, which waits itself for the first; and where it need not, as long as it takes.
SECOND_RUN_SECONDS = 10
UNHINDERED_RUN_SECONDS = 40
POLL_SECONDS = 0.02
CLOCK_LIBRARY = "/usr/lib/$(uname -m)-linux-gnu/faketime/libfaketime.so.1"
# A clock of their own for the programs of ssh's sessions and for those that a timer starts; systemd's own event loop does not
# survive one, but counts its timers by the monotonic clock in any case.
CLOCK_SETUP = f"""\
[ -e {CLOCK_LIBRARY} ] || {{ apt-get -qq update && apt-get -qq install -y libfaketime; }} >/dev/null 2>&1
echo +0 >/{CLOCK}
{{ echo LD_PRELOAD={CLOCK_LIBRARY}; echo DONT_FAKE_MONOTONIC=1; echo FAKETIME_NO_CACHE=1
   echo FAKETIME_TIMESTAMP_FILE=/{CLOCK}; }} >>/etc/environment
for unit in fleet-portknock-rollback- fleet-portknock-watch; do
    mkdir -p /etc/systemd/system/$unit.service.d
    printf '[Service]\\nEnvironmentFile=/etc/environment\\n' >/etc/systemd/system/$unit.service.d/clock.conf
done
systemctl daemon-reload
echo ready
"""


class Driver:
    """The fleet, and what is done with it."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.judge = Judge(fleet)
        self.hosts = [Host(fleet, name) for name in fleet.hosts]
        self.pool = ThreadPoolExecutor(max_workers=2 * len(self.hosts))
        # Of their own, since a play that waits for its strikes takes one of the others.
        self.strikers = ThreadPoolExecutor(max_workers=len(self.hosts))
        self.seconds = time.monotonic()

    def each(self, work: Callable[[Host], object], hosts: Iterable[Host] | None = None) -> None:
        """Do something to all hosts at once."""
        list(self.pool.map(work, self.hosts if hosts is None else hosts))

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.seconds:6.0f} s] {text}", flush=True)

    # Getting ready.

    def prepare(self) -> None:
        clocks = [host for host in self.hosts if host.image == CLOCK_IMAGE]
        list(self.pool.map(self.give_clock, clocks, (HOUR, -HOUR)))
        self.each(Host.prepare)

        def look(host: Host) -> None:
            host.virgin = self.judge.state(host)

        self.each(look)
        self.neighbours = {host.name: host.neighbour() for host in self.hosts}

    def give_clock(self, host: Host, step: int) -> None:
        """Let the host's clock be stepped by so many seconds, if the library for it can be had."""
        if host.execute(CLOCK_SETUP, check=False).strip() == "ready":
            host.clock_step = step
        else:
            self.say(f"{host.name}: no clock can be stepped, since libfaketime can't be installed")

    def trace(self) -> None:
        """Learn the steps of each kind of play from one that nothing disturbs, on one host of each image."""
        examples = list({host.image: host for host in self.hosts}.values())
        names = [host.name for host in examples]
        for kind, phases in PHASES.items():
            self.each(Host.arm, examples)
            run = Play(self.fleet, kind, names, names if kind == "broken" else ()).wait()
            if (run.status == 0) == (kind == "broken"):
                raise SystemExit(f"a play ({kind}) that nothing disturbs went otherwise than it should:\n{run.output}")
            for example in examples:
                example.disarm()
                steps = steps_of(example.calls(), phases)
                if kind == "rotate":
                    steps.update({Step(name): 0 for name in WRITINGS})
                for host in self.hosts:
                    if host.image == example.image:
                        host.steps[kind] = steps

    def to_base(self, kind: str, hosts: Sequence[Host]) -> None:
        """Bring hosts to where a kind of play begins: without a gate for the first apply, with one for all others."""
        others = [host.name for host in hosts if host.is_gated == (kind == "first")]
        self.bring("remove" if kind == "first" else "first", others, kind)
        if kind == "rotate":
            # A fleet that is used again may have been left in the middle.
            rotating = [host.name for host in hosts if self.judge.keyring.is_rotating(host.name)]
            self.bring("rotate", rotating, kind)
            self.judge.keyring.forget_rotations()

    def bring(self, play: str, hosts: Sequence[str], kind: str) -> None:
        if hosts:
            run = Play(self.fleet, play, hosts).wait()
            if run.status:
                raise SystemExit(f"hosts can't be brought to where a play ({kind}) begins:\n{run.output}")

    def converge(self, hosts: Sequence[Host]) -> dict[str, str]:
        """Run site.yml twice; what was wrong, by host."""
        wrong: dict[str, str] = {}
        for which in ("the next run", "the run after it"):
            run = Play(self.fleet, "first", [host.name for host in hosts]).wait()
            for host in hosts:
                numbers = run.recap.get(host.name, {"failed": 1})
                if numbers.get("failed") or numbers.get("unreachable"):
                    wrong.setdefault(host.name, f"{which} of site.yml fails")
                elif which != "the next run" and numbers["changed"]:
                    wrong.setdefault(host.name, f"{which} of site.yml changes something")
                if host.name in wrong:
                    (self.fleet.directory / f"wrong-{host.name}.log").write_text(run.output)
        return wrong

    def end_rotation(self, attempts: Sequence[Attempt]) -> dict[str, str]:
        """Run rotate.yml once more; what was wrong, by host."""
        wrong: dict[str, str] = {}
        run = Play(self.fleet, "rotate", [attempt.host.name for attempt in attempts]).wait()

        def look(attempt: Attempt) -> None:
            numbers = run.recap.get(attempt.host.name, {"failed": 1})
            problems = self.judge.unrotated(attempt.host, attempt.former)
            if numbers.get("failed") or numbers.get("unreachable"):
                problems.append("the next run of rotate.yml fails")
            if problems:
                wrong[attempt.host.name] = ", ".join(problems)
                (self.fleet.directory / f"wrong-{attempt.host.name}.log").write_text(run.output)

        list(self.pool.map(look, attempts))
        return wrong

    def reset(self, host: Host) -> None:
        """By hand, for a host that nothing else brings back."""
        host.disarm()
        host.execute(
            "systemctl stop 'fleet-portknock*' 2>/dev/null || true; nft delete table inet fleet_portknock 2>/dev/null || true\n"
            "systemctl --quiet disable fleet-portknock.service 2>/dev/null || true\n"
            "rm -rf /etc/fleet-portknock /run/fleet-portknock /etc/systemd/system/fleet-portknock*.service\n"
            "find /etc/systemd/system -name 'fleet-portknock*.service' -delete; systemctl daemon-reload"
        )
        self.judge.keyring.path(host.name).unlink(missing_ok=True)

    # Breaking.

    def break_one_play(self, attempts: Sequence[Attempt]) -> None:
        """One play, with one attempt on each of its hosts; then judge, and let the product put it right."""
        # Whoever kills the controller at a step of its own can't wait until other hosts have got to theirs.
        alone = [[attempt] for attempt in attempts if attempt.is_controllers and attempt.fault.kills_controller]
        together = [attempt for attempt in attempts if [attempt] not in alone]
        self.strike_and_judge([*alone, *([together] if together else [])])
        rotated = self.end_rotation(attempts) if attempts[0].kind == "rotate" else {}
        converged = self.converge([attempt.host for attempt in attempts])
        for attempt in attempts:
            wrong = [found[attempt.host.name] for found in (rotated, converged) if attempt.host.name in found]
            attempt.others += wrong
            if wrong:
                self.reset(attempt.host)
            for verdict in attempt.verdicts:
                self.say(f"{attempt.host.name}: {attempt.fault.name}, {attempt.label}: {verdict}")

    def break_unprotected(self, attempts: Sequence[Attempt]) -> None:
        """A play for each attempt, with a collection of its own; the harm that it does is undone by hand."""
        self.strike_and_judge([[attempt] for attempt in attempts])
        self.each(self.reset, [attempt.host for attempt in attempts])

    def strike_and_judge(self, plays: Sequence[Sequence[Attempt]]) -> None:
        """Run plays at once, let each host have its fault, wait until it has come to rest, and look at it."""
        attempts = [attempt for play in plays for attempt in play]
        for kind in PHASES:
            self.to_base(kind, [attempt.host for attempt in attempts if attempt.kind == kind])
        for attempt in attempts:
            attempt.keyring, attempt.begin_second_run = self.judge.keyring, self.begin_second_run
            attempt.fault.before(attempt)
            self.note_former(attempt)
            number = attempt.host.steps[attempt.kind][attempt.step] if attempt.step.call else 0
            attempt.host.arm(number, attempt.fault.action)
        watched = [attempt.host for attempt in attempts if attempt.kind in KEPT]
        prober = Prober(self.fleet, self.judge, watched)
        list(self.pool.map(self.play, plays))
        self.each(self.wait_for_rest, [attempt.host for attempt in attempts])
        list(self.pool.map(lambda attempt: attempt.fault.mend(attempt), attempts))
        list(self.pool.map(partial(self.look, holes=prober.end()), attempts))
        list(self.pool.map(lambda attempt: attempt.fault.tidy(attempt), attempts))

    def play(self, attempts: Sequence[Attempt]) -> None:
        """Run one, and strike each host when it has got to its step."""
        play = Play(
            self.fleet,
            attempts[0].kind,
            [attempt.host.name for attempt in attempts],
            [attempt.host.name for attempt in attempts if attempt.is_broken],
            {attempt.host.name: attempt.trials for attempt in attempts},
            attempts[0].collections,
        )
        waiting = list(attempts)
        strikes = []
        while waiting and not play.is_over:
            for attempt in filter(self.is_there, list(waiting)):
                waiting.remove(attempt)
                strikes.append(self.strikers.submit(attempt.fault.strike, attempt))
            time.sleep(POLL_SECONDS)
        if attempts[0].fault.kills_controller:
            for strike in strikes:
                strike.result()
            play.kill()
            for attempt in attempts:
                attempt.host.go_on()
            if attempts[0].kind == "rotate":
                list(self.pool.map(self.look_at_once, attempts))
        run = play.wait()
        for strike in strikes:
            strike.result()
        for attempt in attempts:
            if attempt.second_run is not None:
                attempt.second_run.wait()
        # The last call of a play may have been what was waited for.
        for attempt in itertools.filterfalse(self.is_there, waiting):
            attempt.others.append("the step was not reached")
            (self.fleet.directory / f"missed-{attempt.host.name}.log").write_text(run.output)

    def note_former(self, attempt: Attempt) -> None:
        """Note what the keyring holds before the play."""
        if attempt.kind == "rotate":
            attempt.former = self.judge.keyring.sequences(attempt.host.name)
            attempt.former_generation = self.judge.keyring.read(attempt.host.name)["generation"]

    def is_there(self, attempt: Attempt) -> bool:
        host = attempt.host
        if attempt.step.call:
            return bool(host.reached())
        if attempt.step.phase in WRITINGS:
            return self.is_written(attempt)
        number = host.steps[attempt.kind][attempt.step]
        calls = [call for call in host.calls() if call.number == number]
        return bool(calls) and not host.is_running(calls[0].process)

    def is_written(self, attempt: Attempt) -> bool:
        """Whether the keyring has what the step begins with. A file that was looked at is not decrypted again."""
        keyring, host = self.judge.keyring, attempt.host.name
        status = keyring.path(host).stat()
        file = (status.st_ino, status.st_mtime_ns)
        if file == attempt.seen_file:
            return False
        attempt.seen_file = file
        return keyring.stage(host, attempt.former_generation) == attempt.step.phase

    def begin_second_run(self, attempt: Attempt) -> Play:
        """Another run for the host, with a change that would lock out.

        Returns when it has loaded its change, which it must not as long as the first run holds the lock, or after a while.
        """
        host = attempt.host
        first = {call.process for call in host.calls()}
        play = Play(
            self.fleet, "broken", [host.name], [host.name], {host.name: (CONFIRMED_TRIAL_SECONDS,)}, attempt.collections
        )

        def has_loaded() -> bool:
            return any(call.label == "nft -f" and call.process not in first for call in host.calls())

        seconds = UNHINDERED_RUN_SECONDS if attempt.collections else SECOND_RUN_SECONDS
        with contextlib.suppress(AssertionError):
            wait_until(lambda: play.is_over or has_loaded(), seconds, "the second run has loaded its change")
        return play

    @staticmethod
    def wait_for_rest(host: Host) -> None:
        """Until nobody works on the host and no change is on trial any more, or the time that is promised has passed."""

        def is_worked_on() -> bool:
            return any(host.is_running(process) for process in {call.process for call in host.calls()})

        with contextlib.suppress(AssertionError):
            wait_until(
                lambda: not is_worked_on() and not host.has(TRIAL),
                CONFIRMED_TRIAL_SECONDS + GRACE_SECONDS,
                "the trial is over",
            )
        host.disarm()

    def look_at_once(self, attempt: Attempt) -> None:
        """The keyring holds a secret that opens at any time, not only once the host has come to rest."""
        attempt.locked_out = not self.judge.knocked(attempt.host, "ipv4")

    def look(self, attempt: Attempt, holes: Sequence[tuple[str, float]]) -> None:
        host = attempt.host
        reachable, is_open = self.judge.reachable(host)
        attempt.locked_out = attempt.locked_out or not reachable
        attempt.longest_hole = max((length for name, length in holes if name == host.name), default=0.0)
        wants_gate = host.is_gated or attempt.kind in KEPT
        attempt.left_open = (is_open and wants_gate) or attempt.longest_hole > attempt.fault.bearable_hole
        attempt.others += self.judge.leftovers(host)
        if attempt.fault.spares_others and host.neighbour() != self.neighbours[host.name]:
            attempt.others.append("other people's rules have changed")
