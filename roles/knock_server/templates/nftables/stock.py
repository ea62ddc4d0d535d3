# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Says which one-time sequences of the loaded gate may open now, so that none that has opened does so again.

Runs on the host, with Python's standard library alone: ``arm`` after each load of the gate and each opening, ``renew`` where
another program may have brought back what was armed once, ``report`` for whoever asks. It knows ids only, no port.

The kernel opens with an armed sequence once, and forgets at the end of a boot. So each is written down as spent, and that
is on the disk, before it is armed: whatever ends the boot, it is never armed again, whether or not it was used. Only a few
are armed at a time, since a boot costs these.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from typing import Any, Iterator, NamedTuple

TABLE = "fleet_portknock"
FOLDER = "/etc/fleet-portknock"
SPENT = f"{FOLDER}/spent.json"
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROGRAM_SECONDS = 30
FORMAT = 1
# How many of an operator's sequences are armed at a time, and the least share of those left that may be: where hardly any
# are left, hosts that boot again and again shall not use them up.
ARMED = 4
LEFT_FOR_EACH_ARMED = 4


class Operator(NamedTuple):
    """An operator's sequences in the kernel, by id: all that the gate knows, and those of them that can open."""

    known: list[int]
    usable: list[int]


class Kernel(NamedTuple):
    """What the kernel has: operators by number, and armed ids that are no longer to open."""

    operators: dict[int, Operator]
    stale: list[int]


class StockError(Exception):
    """What a person has to know."""


def read_kernel() -> Kernel:
    """Ask the kernel. A gate without one-time sequences is one without operators that have any."""
    owner = {_minor(pair[0]): _minor(pair[1]) for pair in _elements("map", "owner")}
    armed = {_minor(element) for element in _elements("set", "armed")}
    # With a quota where a rule has written it, bare where a daemon's command has.
    burnt = {
        _minor(element["elem"]["val"] if isinstance(element, dict) else element)
        for element in _elements("set", "burnt")
    }
    known: dict[int, list[int]] = {}
    for identity in sorted(owner):
        known.setdefault(owner[identity], []).append(identity)
    operators = {}
    for number, ids in known.items():
        # What was used makes all before it worthless: they may have been seen on the way here, and not have arrived.
        latest = max(burnt.intersection(ids), default=0)
        operators[number] = Operator(ids, [identity for identity in ids if identity in armed and identity > latest])
    usable = {identity for operator in operators.values() for identity in operator.usable}
    return Kernel(operators, sorted(armed - usable))


def arm(renew: bool = False) -> None:
    """Let as many sequences of each operator open as are to be.

    :param renew: none of those that are armed: the kernel no longer knows which of them have opened.
    :raises StockError: nothing more is armed than is on the disk.
    """
    kernel = read_kernel()
    if renew:
        stale = sorted([*kernel.stale, *(identity for one in kernel.operators.values() for identity in one.usable)])
        kernel = Kernel({number: Operator(one.known, []) for number, one in kernel.operators.items()}, stale)
    spent = read_spent()
    fresh: list[int] = []
    for number, operator in kernel.operators.items():
        unused = _unused(operator, spent.get(number, 0))
        left = len(operator.usable) + len(unused)
        wanted = min(ARMED, max(1, left // LEFT_FOR_EACH_ARMED))
        chosen = unused[: max(0, wanted - len(operator.usable))]
        if chosen:
            spent[number] = chosen[-1]
            fresh.extend(chosen)
    if fresh:
        write_spent(spent)
    commands = [f"delete element inet {TABLE} armed {_listed(kernel.stale)}\n"] if kernel.stale else []
    commands += [f"add element inet {TABLE} armed {_listed(fresh)}\n"] if fresh else []
    if commands:
        _nft("-f", "-", given="".join(commands))


def report() -> dict[str, Any]:
    """What is left: for each operator by number, and the highest id that was ever known here.

    ``first`` is the id of the first that was neither used nor lost, or the one after all that the gate knows.
    """
    kernel, spent = read_kernel(), read_spent()
    operators = {}
    for number, operator in kernel.operators.items():
        left = [*operator.usable, *_unused(operator, spent.get(number, 0))]
        operators[str(number)] = {
            "left": len(left),
            "armed": len(operator.usable),
            "known": len(operator.known),
            "first": left[0] if left else operator.known[-1] + 1,
        }
    ids = [*spent.values(), *(identity for operator in kernel.operators.values() for identity in operator.known)]
    return {"operators": operators, "last": max(ids, default=0)}


def _unused(operator: Operator, spent: int) -> list[int]:
    """Ids that have never been armed."""
    highest = max(spent, *operator.usable) if operator.usable else spent
    return [identity for identity in operator.known if identity > highest]


def read_spent() -> dict[int, int]:
    """For each operator by number the highest id that was armed: it and those before it never are again.

    :raises StockError: the file can't be read. To take that for an empty one would bring back what has opened.
    """
    try:
        with open(SPENT, encoding="ascii") as stream:
            kept = json.load(stream)
        if kept["format"] != FORMAT:
            raise ValueError
        return {int(number): int(identity) for number, identity in kept["spent"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise StockError(
            f"{SPENT}: expected a file that says which one-time sequences were armed; got one that can't be read. No more "
            "are armed until the gate was removed and set up anew."
        ) from None


def write_spent(spent: dict[int, int]) -> None:
    """Put it on the disk, whole, before this returns.

    :raises StockError: it can't be.
    """
    text = json.dumps({"format": FORMAT, "spent": {str(number): spent[number] for number in sorted(spent)}})
    temporary = f"{SPENT}.new"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(temporary, flags, 0o600), "w", encoding="ascii") as stream:
            stream.write(f"{text}\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, SPENT)
        handle = os.open(os.path.dirname(SPENT), os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as exc:
        raise StockError(
            f"{SPENT}: expected to be able to write it; got {exc.strerror}. No one-time sequence is armed."
        ) from None


def _elements(kind: str, name: str) -> list[Any]:
    """The elements of a set or map as nft's JSON has them; none where it is not there."""
    done = _program("-j", "list", kind, "inet", TABLE, name)
    if done.returncode != 0 and "No such file or directory" in done.stderr:
        return []
    # nft 0.9.8 prints its warnings in front, on standard output.
    start = done.stdout.find('{"nftables"')
    if done.returncode != 0 or start < 0:
        raise StockError(f"nft can't list {name} of the gate: exit code {done.returncode}.")
    for entry in json.loads(done.stdout[start:])["nftables"]:
        if kind in entry:
            elements: list[Any] = entry[kind].get("elem", [])
            return elements
    return []


def _minor(classid: str) -> int:
    return int(classid.rpartition(":")[2], 16)


def _listed(ids: list[int]) -> str:
    # No two braces side by side: this file is a template, too.
    return "{" + ", ".join(f"7:{identity:x}" for identity in ids) + "}"


def _nft(*arguments: str, given: str) -> None:
    done = _program(*arguments, given=given)
    if done.returncode != 0:
        raise StockError(f"nft can't arm one-time sequences: exit code {done.returncode}.")


def _program(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["nft", *arguments],
            input=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=PROGRAM_SECONDS,
            env={"PATH": SEARCH_PATH, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise StockError(f"nft can't be run: {type(exc).__name__}.") from None


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keep others of these away."""
    try:
        os.makedirs(FOLDER, mode=0o700, exist_ok=True)
        handle = os.open(FOLDER, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise StockError(f"{FOLDER}: expected to be able to read it; got {exc.strerror}.") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def main(arguments: list[str]) -> int:
    """Do what the one argument says; errors go to the journal, which takes the number in front as their priority."""
    try:
        if arguments == ["report"]:
            print(json.dumps(report()))
            return 0
        if arguments not in (["arm"], ["renew"]):
            raise StockError("expected one of arm, renew, report.")
        with _alone():
            arm(renew=arguments == ["renew"])
    except StockError as exc:
        print(f"<2>{exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
