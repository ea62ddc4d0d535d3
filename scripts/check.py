# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the project's checks: one line a check, everything else in ``.cache/logs``.

Usage: ``check.py STEP...``; a step is one of STEPS, ``molecule:SCENARIO`` or ``faults:full``. All steps run, whatever fails
on the way. The last line counts what really ran: where a check is pytest, its tests, of the faults each try, and everything
else as one. Lines of a check's output that are a table's (``| ... |``) are shown whatever comes of it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
LOGS = CACHE / "logs"
TAIL_LINES = 40
# pytest's closing line: "12 passed, 1 skipped in 3.21s", with or without a frame of = around it. tests/faults ends likewise.
CLOSING = re.compile(r"(?:=+ )?((?:\d+ (?:failed|passed|skipped|error|x|desel|warn)\w*(?:, )?)+) in [\d.]+s")
COUNTED = re.compile(r"(\d+) (failed|passed|skipped|error)")
TABLE = re.compile(r"\|( .* \|)+")
# How soon a watch closes a hole, or a host has gone back, is nothing to judge on a machine that has other things to do.
PUNCTUAL_SCENARIOS = ("coexistence", "faults")
# Most of them wait for packets and containers half of the time.
AT_ONCE = 2
TERMINAL = re.compile(r"\x1b\[[0-9;]*m")


class Check(NamedTuple):
    """One command; its name is its log's. ``alone`` for one that judges how soon something happens, or shares a cache."""

    name: str
    argv: list[str]
    directory: Path = ROOT
    alone: bool = True


def pytest(name: str, folder: str) -> Iterator[Check]:
    if (ROOT / folder).is_dir():
        yield Check(name, ["python3", "-m", "pytest", folder], alone=False)


def unit() -> Iterator[Check]:
    yield from pytest("unit", "tests/unit")


def lint() -> Iterator[Check]:
    scripts = [
        str(path.relative_to(ROOT))
        for folder in ("scripts", "demo", "roles", "tests")
        for path in (ROOT / folder).rglob("*.sh")
    ]
    yield Check("yamllint", ["yamllint", "--strict", "."])
    yield Check("ruff-check", ["ruff", "check", "."])
    yield Check("ruff-format", ["ruff", "format", "--check", "."])
    yield Check("mypy-plugins", ["mypy", "-p", "ansible_collections.fleet.portknock.plugins"])
    # What the role puts on hosts as it is.
    yield Check("mypy-roles", ["mypy", "roles"])
    # One by one: each folder of tests has a conftest and helpers that it imports by their bare names.
    for folder in (ROOT / "scripts", ROOT / "bench", ROOT / "molecule", *sorted((ROOT / "tests").iterdir())):
        if any(folder.rglob("*.py")):
            top = folder.parent if (folder / "__init__.py").exists() else folder
            paths = f"{CACHE}:{top}:{ROOT / 'molecule'}"
            if folder.name == "bench":
                paths += f":{ROOT / 'tests/netns'}"
            yield Check(f"mypy-{folder.name}", ["env", f"MYPYPATH={paths}", "mypy", str(folder)])
    yield Check("shellcheck", ["shellcheck", "-x", "-P", "SCRIPTDIR", *sorted(scripts), ".ci/run"])
    yield Check("ansible-lint", ["ansible-lint", "--offline", "--strict"])


def sanity() -> Iterator[Check]:
    yield Check("sanity", ["scripts/sanity.sh"], alone=False)


def netns() -> Iterator[Check]:
    yield from pytest("netns", "tests/netns")


def access() -> Iterator[Check]:
    yield from pytest("access", "tests/integration_local")


def molecule(scenario: str = "") -> Iterator[Check]:
    # From the end of the alphabet, where the longest are: one that begins last keeps nobody waiting.
    for path in sorted(ROOT.glob("molecule/*/molecule.yml"), reverse=True):
        if scenario in ("", path.parent.name):
            name = path.parent.name
            yield Check(f"molecule-{name}", ["molecule", "test", "-s", name], alone=name in PUNCTUAL_SCENARIOS)


def faults(form: str = "") -> Iterator[Check]:
    program = ["env", f"PYTHONPATH={CACHE}:{ROOT / 'molecule'}", "python3", "tests/faults/run.py"]
    yield Check("faults", [*program, form or "short"])


STEPS = {
    "unit": unit,
    "lint": lint,
    "sanity": sanity,
    "netns": netns,
    "access": access,
    "molecule": molecule,
    "faults": faults,
}
# Steps that take an argument, after a colon.
WITH_ARGUMENT = {"molecule": molecule, "faults": faults}


def environment(check: Check) -> dict[str, str]:
    """The collection is found under .cache, never in the user's home; colours would only blur the logs."""
    return {
        **os.environ,
        "PYTHONPATH": str(CACHE),
        "MYPYPATH": str(CACHE),
        "ANSIBLE_COLLECTIONS_PATH": str(CACHE),
        "ANSIBLE_HOME": str(CACHE / "ansible"),
        "ANSIBLE_NOCOLOR": "1",
        "NO_COLOR": "1",
        # The fleet's own inventory and vault password are there only after create.
        "MOLECULE_ANSIBLE_ARGS_STRICT_MODE": "1",
        "MOLECULE_EPHEMERAL_DIRECTORY": str(CACHE / "molecule" / check.name),
    }


def run(check: Check) -> tuple[str, Counter[str]]:
    """Run one check; what is to be said of it, and the count."""
    log = LOGS / f"{check.name}.log"
    start = time.monotonic()
    with log.open("wb") as output:
        done = subprocess.run(
            check.argv,
            cwd=check.directory,
            env=environment(check),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    seconds = time.monotonic() - start
    lines = TERMINAL.sub("", log.read_text(errors="replace")).splitlines()
    counts: Counter[str] = Counter()
    for closing in filter(None, (CLOSING.match(line.strip()) for line in lines)):
        for number, outcome in COUNTED.findall(closing[1]):
            counts["failed" if outcome == "error" else outcome] += int(number)
    told = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped") if counts[outcome])
    if done.returncode and not counts["failed"]:
        counts["failed"] += 1
    elif not counts:
        counts["passed"] += 1
    verdict = "FAILED" if done.returncode else "ok"
    said = [f"  {verdict:7} {check.name:22} {seconds:6.1f} s  {told}".rstrip()]
    said += [f"    {line}" for line in lines if TABLE.fullmatch(line)]
    if done.returncode:
        said += [f"    | {line}" for line in lines[-TAIL_LINES:]]
        said.append(f"    the whole log: {log}")
    return "\n".join(said), counts


def run_all(checks: list[Check]) -> Iterator[Counter[str]]:
    """Those that need not be alone some at once, then the others one by one; says of each how it went when it has ended."""
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        running = [pool.submit(run, check) for check in checks if not check.alone]
        for ended in as_completed(running):
            said, counts = ended.result()
            print(said, flush=True)
            yield counts
    for check in checks:
        if check.alone:
            said, counts = run(check)
            print(said, flush=True)
            yield counts


def main(names: list[str]) -> int:
    LOGS.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    total: Counter[str] = Counter()
    checks: list[Check] = []
    for name in names:
        step, _, argument = name.partition(":")
        found = list(WITH_ARGUMENT[step](argument) if step in WITH_ARGUMENT else STEPS[step]())
        if not found:
            print(f"  FAILED  {name}: there is nothing to run")
            total["failed"] += 1
        checks += found
    for counts in run_all(checks):
        total += counts
    seconds = time.monotonic() - start
    print(f"It took {seconds:.0f} s; the logs are in {LOGS}.")
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
