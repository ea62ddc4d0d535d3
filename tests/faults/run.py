# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tries to break the commit-confirmed gate: kills, cuts and spoils things at every step, and judges from outside.

Usage: ``run.py short|full``. Each try is one fault at one step of a first apply, a change of settings, a rotation or a
removal, on one container. Prints a table; the exit status is 0 only if nobody was locked out, nothing was left open,
nothing was left behind, and every host converged.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from catalogue import FAULTS, Attempt, Fault
from driver import PHASES, Driver
from hosts import WRITINGS, Host, Step
from lab import ROOT, Fleet
from protections import PROTECTIONS, Protection, without

NAME = "break"
IMAGES = ("debian11", "debian11", "debian12", "debian12", "debian12", "debian12", "debian12", "debian13")
VARIABLES = Path(__file__).with_name("vars.yml")
FLEET = [sys.executable, str(ROOT / "scripts" / "fleet.py")]
# The short form: a play of each kind, with one try a host; how many steps of which faults.
SHORT: dict[tuple[str, bool], dict[str, int]] = {
    ("first", False): {
        "process on the host killed": 1,
        "network cut": 1,
        "host restarted": 1,
        "nft fails": 1,
        "systemctl fails, later flushed": 1,
        "disk full: /run": 1,
        "disk full: /etc/systemd/system": 1,
        "second run": 1,
    },
    ("broken", True): {
        "clock stepped, controller killed": 2,
        "systemd-run fails, controller killed": 1,
        "controller killed": 5,
    },
    ("change", False): {
        "host restarted": 1,
        "wrong sequence planted": 1,
        "systemctl fails, later flushed": 1,
        "disk full: /etc/fleet-portknock": 1,
        "foreign sequence planted": 1,
        "second run": 1,
        "flushed by a stranger": 1,
        "daemon killed, then flushed": 1,
    },
    ("rotate", True): {"controller killed": 8},
    ("remove", False): {
        "process on the host killed": 2,
        "network cut": 1,
        "host restarted": 2,
        "nft fails": 1,
        "systemctl fails, later flushed": 1,
        "disk full: /run": 1,
    },
}
# The phases, those first in which most is at stake.
STAKES = (
    *(*WRITINGS, "apply both", "confirm both", "apply alone", "confirm alone", "after apply alone"),
    *("apply", "take away", "confirm", "after apply", "after take away", "way back", "after confirm"),
    *("look", "rollback", "after look", "after rollback"),
    *("after apply both", "after confirm both", "after confirm alone"),
)


class Try(NamedTuple):
    """One fault at one step of one kind of play."""

    kind: str
    fault: Fault
    step: Step

    def suits(self, host: Host) -> bool:
        return self.step in host.steps[self.kind] and self.fault.fits(self.kind, self.step, host)


def all_tries(hosts: Sequence[Host]) -> list[Try]:
    """Every fault at every step of every kind of play that any host knows."""
    return list(
        dict.fromkeys(
            Try(kind, fault, step)
            for kind in PHASES
            for fault in FAULTS
            for host in hosts
            for step in host.steps[kind]
            if fault.fits(kind, step, host)
        )
    )


def some_tries(tries: Sequence[Try]) -> list[Try]:
    """The short form's selection: the same as long as the product's steps are, and of each fault where most is at stake."""
    chosen = []
    for (kind, _kills), counts in SHORT.items():
        for offset, (name, count) in enumerate(counts.items()):
            fitting = [entry for entry in tries if entry.kind == kind and entry.fault.name == name]
            fitting.sort(key=lambda entry: STAKES.index(entry.step.phase))
            if any(kind in entry.fault.everywhere for entry in fitting):
                # Once in each phase, where most of it has been done.
                fitting = list({entry.step.phase: entry for entry in fitting}.values())
                chosen += fitting[:count]
                continue
            # Not all faults at the same step.
            chosen += [fitting[(3 * offset + 5 * turn) % len(fitting)] for turn in range(min(count, len(fitting)))]
    return chosen


def many_tries(tries: Sequence[Try]) -> list[Try]:
    """The full form's: of each fault in each kind of play as many steps as it asks for, from the first to the last."""
    chosen = []
    for kind in PHASES:
        for fault in FAULTS:
            fitting = [entry for entry in tries if entry.kind == kind and entry.fault is fault]
            count = len(fitting) if kind in fault.everywhere else min(fault.most, len(fitting))
            chosen += [fitting[turn * (len(fitting) - 1) // max(1, count - 1)] for turn in range(count)]
    return chosen


def unprotected_tries(hosts: Sequence[Host], folder: Path) -> list[tuple[Protection, Attempt]]:
    """For each fault the step at which it does harm to a collection that lacks a protection."""
    tries = []
    for number, protection in enumerate(PROTECTIONS):
        fault = next(fault for fault in FAULTS if fault.name == protection.fault)
        able = [host for host in hosts if not fault.needs_clock or host.clock_step < 0]
        if not able:
            continue
        host = able[number % len(able)]
        attempt = Attempt(fault, protection.kind, protection.step)
        attempt.host, attempt.collections = host, without(protection, folder / str(number))
        tries.append((protection, attempt))
    return tries


def batches(tries: Sequence[Try], hosts: Sequence[Host]) -> Iterator[list[Attempt]]:
    """Put tries together so that one play serves as many hosts as there are."""
    groups: dict[tuple[str, bool], list[Try]] = defaultdict(list)
    for entry in tries:
        groups[entry.kind, entry.fault.kills_controller].append(entry)
    for waiting in groups.values():
        while waiting:
            chosen = []
            for host in hosts:
                fitting = next((entry for entry in waiting if entry.suits(host)), None)
                if fitting is not None:
                    waiting.remove(fitting)
                    attempt = Attempt(fitting.fault, fitting.kind, fitting.step)
                    attempt.host = host
                    chosen.append(attempt)
            yield chosen


def apart(tries: Sequence[tuple[Protection, Attempt]]) -> Iterator[list[tuple[Protection, Attempt]]]:
    """Put attempts together that are on different hosts."""
    waiting = list(tries)
    while waiting:
        chosen = list({attempt.host.name: (protection, attempt) for protection, attempt in reversed(waiting)}.values())
        waiting = [entry for entry in waiting if entry not in chosen]
        yield chosen


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """A table; check.py shows lines that begin so."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]


def table(attempts: Sequence[Attempt]) -> list[str]:
    """What was tried, and how often it went wrong."""
    rows: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for attempt in attempts:
        for key in ((attempt.fault.name, attempt.label), ("all", "")):
            rows[key]["tries"] += 1
            rows[key]["locked out"] += attempt.locked_out
            rows[key]["left open"] += attempt.left_open
            rows[key]["other"] += bool(attempt.others)
    rows["all", ""] = rows.pop(("all", ""))
    columns = ("tries", "locked out", "left open", "other")
    lines = [(*key, *(str(row[column]) for column in columns)) for key, row in rows.items()]
    return aligned([("fault", "step", *columns), *lines])


def table_without(tries: Sequence[tuple[Protection, Attempt]]) -> list[str]:
    """What the same faults do to a collection that lacks a protection."""
    lines = [
        (attempt.fault.name, attempt.label, protection.name, str(int(attempt.locked_out)), str(int(attempt.left_open)))
        for protection, attempt in tries
    ]
    return aligned([("fault", "step", "without", "locked out", "left open"), *lines])


def run(
    driver: Driver, form: str, chosen: Callable[[Try], bool]
) -> tuple[list[Attempt], list[tuple[Protection, Attempt]]]:
    """Do all the tries of a form; those against the product, and those against what lacks a protection."""
    driver.prepare()
    driver.trace()
    selection = {"short": some_tries, "full": many_tries, "unprotected": lambda _tries: []}[form]
    tries = selection(list(filter(chosen, all_tries(driver.hosts))))
    driver.say(f"{len(tries)} tries")
    attempts: list[Attempt] = []
    for batch in batches(tries, driver.hosts):
        driver.break_one_play(batch)
        attempts += batch
        driver.say(f"{len(attempts)} of {len(tries)} tries done: {batch[0].kind}")
    harmed = [
        entry
        for entry in unprotected_tries(driver.hosts, driver.fleet.directory / "without")
        if chosen(Try(entry[1].kind, entry[1].fault, entry[1].step))
    ]
    for group in apart(harmed):
        driver.break_unprotected([attempt for _protection, attempt in group])
        harm = sum(attempt.locked_out or attempt.left_open for _protection, attempt in group)
        driver.say(f"{len(group)} without a protection done, {harm} of them did harm")
    return attempts, harmed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("form", choices=("short", "full", "unprotected"))
    parser.add_argument("--fault", default="", help="only faults whose name contains this")
    parser.add_argument("--kind", default="", choices=("", *PHASES), help="only this kind of play")
    parser.add_argument("--fleet", default=NAME, help="name of the fleet")
    parser.add_argument("--keep", action="store_true", help="use a fleet that is up, and leave it up")
    arguments = parser.parse_args()
    begun = time.monotonic()
    if os.geteuid() != 0:
        print("Root is needed, to cut cables and to look into containers.\n1 skipped in 0.00s")
        return 0
    if not arguments.keep:
        hosts = [f"h{index}={image}" for index, image in enumerate(IMAGES, 1)]
        subprocess.run([*FLEET, "up", arguments.fleet, "--vars", str(VARIABLES), *hosts], check=True)
    try:
        attempts, harmed = run(
            Driver(Fleet(arguments.fleet)),
            arguments.form,
            lambda entry: arguments.fault in entry.fault.name and arguments.kind in ("", entry.kind),
        )
    finally:
        if not arguments.keep:
            subprocess.run([*FLEET, "down", arguments.fleet], check=True)
    if attempts:
        print("\n".join(table(attempts)))
    if harmed:
        print("\n".join(table_without(harmed)))
    holes = [attempt.longest_hole for attempt in attempts if attempt.fault.bearable_hole]
    if holes:
        print(f"The longest hole after a flush: {max(holes):.2f} s.")
    harmless = [attempt for _protection, attempt in harmed if not (attempt.locked_out or attempt.left_open)]
    for attempt in harmless:
        print(f"No harm without the protection: {attempt.fault.name}, {attempt.label}; this fault can't fail.")
    wanted = {fault.name for fault in FAULTS if arguments.fault in fault.name and arguments.form != "unprotected"}
    untried = wanted - {attempt.fault.name for attempt in attempts}
    for name in sorted(untried):
        print(f"Not tried: {name}")
    bad = sum(bool(attempt.verdicts) for attempt in attempts) + len(harmless)
    counts = {"failed": bad, "passed": len(attempts) + len(harmed) - bad, "skipped": len(untried)}
    told = ", ".join(f"{number} {outcome}" for outcome, number in counts.items() if number)
    print(f"{told} in {time.monotonic() - begun:.2f}s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
