# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ending what operators opened who are to be shut out: open windows, and on request sessions."""

from __future__ import annotations

from typing import AbstractSet, Any, Iterable, Mapping, NamedTuple

from ansible_collections.fleet.portknock.plugins.module_utils._backends import BackEnd
from ansible_collections.fleet.portknock.plugins.module_utils._nft import Source
from ansible_collections.fleet.portknock.plugins.module_utils._procnet import Peer, Session, tcp_sessions
from ansible_collections.fleet.portknock.plugins.module_utils._system import Runner
from ansible_collections.fleet.portknock.plugins.module_utils._system import run as run_program

# A session whose handshake was under way may turn up once the others have ended.
_ROUNDS = 3


class Targets(NamedTuple):
    """What is to end: open windows, and sessions with the source that each came from."""

    windows: tuple[Source, ...]
    sessions: tuple[tuple[Session, Source], ...]
    notes: tuple[str, ...]


def find(
    enforcer: BackEnd,
    numbers: AbstractSet[int],
    ports: AbstractSet[int],
    spare: Iterable[Session],
    run: Runner = run_program,
    proc: str = "/proc",
) -> Targets:
    """What these operators opened, by the gate's records, as far as it is still there.

    A window is theirs where nobody else has knocked from there since; one that no record tells of counts as theirs, too:
    closing it costs somebody a knock.

    :param numbers: the operators', on this host.
    :param ports: the protected tcp ports.
    :param spare: sessions that are left out: those that this run came through.
    """
    listing = enforcer.listing() or {}
    records = enforcer.openings(listing)
    theirs = {record.source for record in records if int(record.number, 16) in numbers}
    spared = frozenset(spare)
    sessions, notes = [], []
    by_address: dict[str, list[Source]] = {}
    for source in sorted(theirs, key=str):
        by_address.setdefault(source.address, []).append(source)
    for session in tcp_sessions(ports, proc):
        for source in by_address.get(session.address, ()):
            if source.interface and not _is_on(session, source, run):
                continue
            if session in spared:
                notes.append(f"This run's own session from {source}, which they had opened the gate from, goes on.")
            else:
                sessions.append((session, source))
            break
    # Whoever opened last, it is their window: this run's own knock, for one, comes from where proofs have come from.
    last: dict[Source, tuple[int, bool]] = {}
    for record in records:
        opened = (record.ago, int(record.number, 16) not in numbers)
        last[record.source] = min(opened, last.get(record.source, opened))
    windows = sorted(
        (source for source in enforcer.windows(listing) if source not in last or not last[source][1]), key=str
    )
    return Targets(tuple(windows), tuple(sessions), tuple(dict.fromkeys(notes)))


def shut(
    enforcer: BackEnd,
    numbers: AbstractSet[int],
    ports: AbstractSet[int],
    end_sessions: bool,
    spare: Iterable[Session],
    run: Runner = run_program,
    proc: str = "/proc",
) -> dict[str, Any]:
    """Close the open windows of what these operators opened, and end their sessions; arguments as for :func:`find`.

    :returns: ``windows_closed``, ``sessions_ended``, ``sessions_left`` (theirs that go on), ``warnings``.
    """
    spared = frozenset(spare)
    found = find(enforcer, numbers, ports, spared, run, proc)
    for source in found.windows:
        enforcer.close_window(Peer(source.address, source.interface))
    closed = set(found.windows) - enforcer.windows(enforcer.listing() or {})
    warnings = [f"shut: the window of {source} can't be closed." for source in found.windows if source not in closed]
    seen = set(found.sessions)
    left = set(found.sessions)
    reason = ""
    for _round in range(_ROUNDS if end_sessions else 0):
        for session, source in sorted(left, key=str):
            reason = _end(session, source, run) or reason
        left = set(find(enforcer, numbers, ports, spared, run, proc).sessions)
        seen |= left
        if not left or reason:
            break
    if end_sessions and left:
        warnings.append(
            f"end_sessions: {len(left)} sessions of operators who are shut out go on: "
            f"{reason or 'the kernel did not end them (it may be built without INET_DIAG_DESTROY)'}."
        )
    return {
        "windows_closed": len(closed),
        "sessions_ended": len(seen - left),
        "sessions_left": len(left),
        "warnings": [*warnings, *(found.notes if end_sessions else ())],
    }


def preview(found: Targets, end_sessions: bool) -> dict[str, Any]:
    """What :func:`shut` would say of what :func:`find` found."""
    count = len(found.sessions)
    return {
        "windows_closed": len(found.windows),
        "sessions_ended": count if end_sessions else 0,
        "sessions_left": 0 if end_sessions else count,
    }


def _end(session: Session, source: Source, run: Runner) -> str:
    """End one session; what kept it from being tried, or nothing."""
    done = run(["ss", "--kill", *_selection(session, source)], None)
    if done.code == 0:
        return ""
    return "ss is not installed (iproute2)" if done.code == 127 else f"ss --kill failed with exit code {done.code}"


def _is_on(session: Session, source: Source, run: Runner) -> bool:
    """Whether a link-local source's session is on its interface: another machine may have the address on another one."""
    done = run(["ss", *_selection(session, source)], None)
    # Where it can't be told it is theirs, and then it can't be ended either.
    return done.code != 0 or bool(done.stdout.strip())


def _selection(session: Session, source: Source) -> list[str]:
    """The arguments of ss that name one session."""
    address = f"[{source.address}]" if ":" in source.address else source.address
    return [
        *("--no-header", "--numeric", "--tcp", "state", "connected"),
        *("dst", f"{address}:{session.peer_port}", "sport", "=", f":{session.port}"),
        *(("dev", "=", source.interface) if source.interface else ()),
    ]


def numbers_of(payload: Mapping[str, Any]) -> frozenset[int]:
    """The operators whom a run is to shut out, by their numbers on the host."""
    return frozenset(int(number) for number in payload.get("shut", ()))


__all__ = ("Targets", "find", "numbers_of", "preview", "shut")
