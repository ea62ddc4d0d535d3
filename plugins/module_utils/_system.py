# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the host-side code needs of the system: running programs and writing files so that a crash can't halve them."""

from __future__ import annotations

import os
import subprocess
import tempfile
from typing import Callable, NamedTuple, Optional, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError

# Daemons and sbin tools are not on every user's PATH, and PATH is not always inherited.
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROGRAM_TIMEOUT = 60


class Completed(NamedTuple):
    """A finished program. ``stderr`` may quote secrets (nft repeats the line it refuses): never pass it on."""

    code: int
    stdout: str
    stderr: str


Runner = Callable[[Sequence[str], Optional[str]], Completed]


def run(argv: Sequence[str], stdin: Optional[str] = None) -> Completed:
    """Run a program; texts go in by standard input, never as arguments.

    A program that is missing counts as exit code 127, one that hangs for a minute as 124.
    """
    try:
        done = subprocess.run(
            list(argv),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            check=False,
            text=True,
            timeout=PROGRAM_TIMEOUT,
            env=dict(os.environ, LC_ALL="C", PATH=SEARCH_PATH),
        )
    except FileNotFoundError:
        return Completed(127, "", "")
    except subprocess.TimeoutExpired:
        return Completed(124, "", "")
    return Completed(done.returncode, done.stdout, done.stderr)


def read_text(path: str) -> Optional[str]:
    """The file's text, or None where there is no such file."""
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as exc:
        raise PortknockError(f"{path}: expected a readable text file; got {type(exc).__name__}.") from None


def write_text(path: str, text: str, mode: int) -> None:
    """Put a whole file in place at once: after a crash there is the old one or the new one."""
    folder = os.path.dirname(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".fleet-portknock-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                os.fchmod(stream.fileno(), mode)
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        sync_folder(folder)
    except OSError as exc:
        raise PortknockError(f"{path}: expected to be able to write it; got {exc.strerror}.") from None


def remove_file(path: str) -> None:
    """Remove a file for good; one that isn't there is all right."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    sync_folder(os.path.dirname(path))


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
    "read_text",
    "remove_file",
    "run",
    "sync_folder",
    "write_text",
)
