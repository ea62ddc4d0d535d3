# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""GnuPG's side of single packet authorization: keys for a host and an operator, and a keyring folder for as long as one packet
takes.

Keys travel over standard input and output: no argument or environment holds one. They have no passphrase, since what keeps them
(the keyring's vault, the file of a bundle) is what keeps the symmetric ones.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import tempfile
from typing import Iterator, NamedTuple, Optional, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError

PROGRAMS = ("gpg", "gpgconf", "gpg-agent")
# Older than any host's clock may say: a key that is of the future to a host would open nothing there.
_CREATED = "20260101T000000"
# Larger ones make packets that do not go through a tunnel in one piece.
_BITS = 2048
_SECONDS = 60.0
# The path of a socket holds some hundred bytes, and ours and the agent's names need half of them.
_LONGEST_PATH = 50
_KEY = """\
%no-protection
Key-Type: RSA
Key-Length: {bits}
Key-Usage: {usage}
Name-Real: portknock
Creation-Date: {created}
Expire-Date: 0
%commit
"""
_SECRET_KEY = re.compile(
    r"^sec:(?:[^:]*:){10}([^:]*):.*\n(?:(?!fpr:).*\n)*?fpr:(?:[^:]*:){8}([0-9A-F]{40}):", re.MULTILINE
)


class KeyPair(NamedTuple):
    """A key, in base64 of OpenPGP's binary form, and its fingerprint of 40 hexadecimal digits."""

    fingerprint: str
    private: str
    public: str


def check_programs(place: str = "") -> None:
    """Refuse a machine without GnuPG.

    :param place: how it is called in the error; empty for this one.
    :raises PortknockError: a program isn't there.
    """
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise PortknockError(
            f"knock_server_spa_keys: expected GnuPG on {place or 'this machine'} for keys of the kind gnupg (Debian's packages "
            f"gpg and gpg-agent); got no {', '.join(missing)}."
        )


def new_pairs() -> tuple[KeyPair, KeyPair]:
    """Return a new key that a host decrypts with, and one that an operator signs with.

    :raises PortknockError: GnuPG isn't there, or makes none.
    """
    check_programs()
    with temporary_home() as home:
        wishes = (_KEY.format(bits=_BITS, usage=usage, created=_CREATED) for usage in ("encrypt", "sign"))
        _gpg(home, "--gen-key", given="".join(wishes).encode())
        listing = _gpg(home, "--with-colons", "--fixed-list-mode", "--list-secret-keys").decode(errors="replace")
        # Of the letters, the small ones are the key's own: e is one that encrypts, s one that signs.
        found = {
            letter: key for abilities, key in _SECRET_KEY.findall(listing) for letter in abilities if letter in "es"
        }
        if set(found) != {"e", "s"}:
            raise PortknockError("expected gpg to make two keys; it did not.")
        host, operator = (_exported(home, found[letter]) for letter in "es")
        return host, operator


def _exported(home: str, key: str) -> KeyPair:
    private, public = (
        base64.b64encode(_gpg(home, "--export-options", "export-minimal", command, key)).decode()
        for command in ("--export-secret-keys", "--export")
    )
    return KeyPair(key, private, public)


@contextlib.contextmanager
def home_with(*keys: str) -> Iterator[str]:
    """A keyring folder with these keys, in base64, that only this user can read, and that is gone afterwards.

    :raises PortknockError: GnuPG isn't there, or does not take them.
    """
    check_programs()
    with temporary_home() as home:
        _gpg(home, "--import", given=b"".join(map(base64.b64decode, keys)))
        yield home


@contextlib.contextmanager
def temporary_home() -> Iterator[str]:
    """An empty keyring folder; neither it nor the agent that works for it outlives this."""
    with tempfile.TemporaryDirectory(prefix="portknock-", dir=_in_memory()) as folder:
        # A folder of its own, so that what the agent takes away while it ends is nobody's error.
        home = os.path.join(folder, "gnupg")
        os.mkdir(home, 0o700)
        with open(os.path.join(home, "gpg.conf"), "w", encoding="ascii") as stream:
            # Nothing is to be looked up anywhere.
            stream.write("disable-dirmngr\n")
        try:
            yield home
        finally:
            # Sockets may be in a folder of the user's session.
            for command in (["--kill", "all"], ["--remove-socketdir"]):
                with contextlib.suppress(PortknockError):
                    _run(["gpgconf", "--homedir", home, *command])
            shutil.rmtree(home, ignore_errors=True)


def _in_memory() -> Optional[str]:
    """A folder that is no disk, where there is one that this user may write to; the system's own place otherwise."""
    for folder in (os.environ.get("XDG_RUNTIME_DIR", ""), "/dev/shm"):  # noqa: S108
        if 0 < len(folder) <= _LONGEST_PATH and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    return None


def _gpg(home: str, *arguments: str, given: bytes = b"") -> bytes:
    return _run(["gpg", "--homedir", home, "--batch", "--no-tty", "--quiet", *arguments], given)


def _run(command: Sequence[str], given: bytes = b"") -> bytes:
    """Run one of the programs; what it says of errors may name what it was given, and is not passed on.

    :raises PortknockError: it does not run, or not well.
    """
    # Only where it is needed: people's ssh waits for each module.
    import subprocess

    try:
        done = subprocess.run(
            command,
            input=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as exc:
        raise PortknockError(f"expected `{command[0]}` to run; got {type(exc).__name__}.") from None
    if done.returncode != 0:
        raise PortknockError(f"expected `{command[0]}` to do its work; it has ended with code {done.returncode}.")
    return done.stdout


__all__ = ("PROGRAMS", "KeyPair", "check_programs", "home_with", "new_pairs", "temporary_home")
