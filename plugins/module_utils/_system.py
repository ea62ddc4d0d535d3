# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the host-side code needs of the system: running programs and writing files so that a crash can't halve them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import IO, Callable, Generator, Iterator, NamedTuple, Optional, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError

# Daemons and sbin tools are not on every user's PATH, and PATH is not always inherited.
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROGRAM_TIMEOUT = 60
# What a line can take of the memory; a longer one comes in pieces.
_LINE_BYTES = 65536


class Completed(NamedTuple):
    """A finished program. ``stderr`` may quote secrets (nft repeats the line it refuses): never pass it on."""

    code: int
    stdout: str
    stderr: str


Runner = Callable[[Sequence[str], Optional[str]], Completed]
Streamer = Callable[[Sequence[str]], Generator[bytes, None, None]]


def run(argv: Sequence[str], stdin: Optional[str] = None, timeout: float = PROGRAM_TIMEOUT) -> Completed:
    """Run a program; texts go in by standard input, never as arguments.

    A program that is missing counts as exit code 127, one that takes longer than ``timeout`` seconds as 124.
    """
    try:
        done = subprocess.run(
            list(argv),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            check=False,
            text=True,
            timeout=timeout,
            # nft lists times as local ones, which are to be the same for every caller.
            env=dict(os.environ, LC_ALL="C", PATH=SEARCH_PATH, TZ="UTC"),
        )
    except FileNotFoundError:
        return Completed(127, "", "")
    except subprocess.TimeoutExpired:
        return Completed(124, "", "")
    return Completed(done.returncode, done.stdout, done.stderr)


def stream(argv: Sequence[str]) -> Generator[bytes, None, None]:
    """Run a program and give its output line by line, as it comes; whoever stops early ends the program.

    :raises PortknockError: it is missing, or its exit code isn't 0.
    """
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(os.environ, LC_ALL="C", PATH=SEARCH_PATH),
        )
    except FileNotFoundError:
        raise PortknockError(f"{argv[0]}: expected this program to be installed.") from None
    with process:
        try:
            if process.stdout is not None:
                yield from lines(process.stdout)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise PortknockError(f"{argv[0]}: expected it to succeed; got exit code {process.returncode}.")


def lines(source: IO[bytes]) -> Iterator[bytes]:
    """The lines of a stream, with their line ends; those of more than 64 KiB in pieces."""
    return iter(lambda: source.readline(_LINE_BYTES), b"")


def read_text(path: str) -> Optional[str]:
    """The file's text, or None where there is no such file.

    What isn't text is read as something else than what was written, so that it counts as changed.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise PortknockError(f"{path}: expected to be able to read it; got {exc.strerror}.") from None


def temporary_path(path: str) -> str:
    """Where a file is written before it takes its place: one name, so that what a killed run left is written over."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.fleet-portknock")


def write_text(path: str, text: str, mode: int) -> None:
    """Put a whole text in place: as :func:`write_bytes`."""
    write_bytes(path, text.encode(), mode)


def write_bytes(path: str, content: bytes, mode: int) -> None:
    """Put a whole file in place at once: after a crash there is the old one or the new one.

    :raises PortknockError: it can't be written; then the old one is there.
    """
    temporary = temporary_path(path)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(temporary, flags, mode), "wb") as stream:
                os.fchmod(stream.fileno(), mode)
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(os.path.dirname(path))
    except OSError as exc:
        raise PortknockError(f"{path}: expected to be able to write it; got {exc.strerror}.") from None


def remove_file(path: str) -> None:
    """Remove a file for good; one that isn't there is all right.

    :raises PortknockError: it can't be removed.
    """
    try:
        os.unlink(path)
        sync_folder(os.path.dirname(path))
    except FileNotFoundError:
        return
    except OSError as exc:
        raise PortknockError(f"{path}: expected to be able to remove it; got {exc.strerror}.") from None


def sync_folder(folder: str) -> None:
    """Make a rename or removal in the folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = (
    "PROGRAM_TIMEOUT",
    "SEARCH_PATH",
    "Completed",
    "Runner",
    "Streamer",
    "lines",
    "read_text",
    "remove_file",
    "run",
    "stream",
    "sync_folder",
    "temporary_path",
    "write_bytes",
    "write_text",
)
