# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Single packet authorization: keys, and sending a packet with the program ``fwknop``.

The program gets everything, keys and all, by a file that only this process and it can see: no argument, environment or disk
holds a secret. What it says is not passed on.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import os
import secrets
import shutil
import tempfile
from typing import Iterator, NamedTuple, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._gnupg import (
    check_programs,
    home_with,
    new_pairs,
)
from ansible_collections.fleet.portknock.plugins.module_utils._ports import GNUPG, Knock

PROGRAM = "fwknop"
# Where a gate waits for packets: fwknop's own default.
PORT = 62201
# Rijndael takes 32 bytes at the most; HMAC-SHA-256 works in blocks of 64.
_KEY_BYTES = 32
_HMAC_KEY_BYTES = 64
_STANZA = "portknock"
# It makes and sends one packet: a few milliseconds.
_SECONDS = 10.0


def new_spa(asked: Knock) -> Knock:
    """Return a packet with new keys that asks for this port."""
    keys = (base64.b64encode(secrets.token_bytes(size)).decode() for size in (_KEY_BYTES, _HMAC_KEY_BYTES))
    return Knock(asked.port, asked.proto, ":".join(keys))


class GnupgKeys(NamedTuple):
    """What one side has where packets are signed and encrypted by GnuPG: its own key and the other side's public one, each in
    base64 behind its fingerprint."""

    hmac_key: str
    own_fingerprint: str
    own: str
    peer_fingerprint: str
    peer: str


class GnupgPackets(NamedTuple):
    """The same packet as its two sides have it: neither has the other's private key."""

    operator: Knock
    host: Knock


def new_gnupg(asked: Knock) -> GnupgPackets:
    """Return a packet with new keys of GnuPG that asks for this port.

    :raises PortknockError: there is no GnuPG on this machine, or it makes none.
    """
    host, operator = new_pairs()
    hmac_key = base64.b64encode(secrets.token_bytes(_HMAC_KEY_BYTES)).decode()

    def with_keys(own: Sequence[str], peer: Sequence[str]) -> Knock:
        return Knock(asked.port, asked.proto, ":".join((GNUPG, hmac_key, *own, *peer)))

    return GnupgPackets(
        with_keys((operator.fingerprint, operator.private), (host.fingerprint, host.public)),
        with_keys((host.fingerprint, host.private), (operator.fingerprint, operator.public)),
    )


def uses_gnupg(knock: Knock) -> bool:
    """Whether it is a packet that GnuPG signs and encrypts."""
    return knock.spa.startswith(f"{GNUPG}:")


def gnupg_keys_of(knock: Knock) -> GnupgKeys:
    """Return what one side has of such a packet."""
    return GnupgKeys(*knock.spa.partition("@")[0].split(":")[1:])


def keys_of(knock: Knock) -> tuple[str, str]:
    """Return the key and the HMAC's key, in base64."""
    key, _colon, hmac_key = knock.spa.partition("@")[0].partition(":")
    return key, hmac_key


def asking_for(knocks: Sequence[Knock], source: str) -> tuple[Knock, ...]:
    """Return what asks for another address than the one that it leaves from; what is no such packet stays as it is.

    :param source: empty for the one that it leaves from.
    """
    if not source:
        return tuple(knocks)
    return tuple(
        knock._replace(spa=f"{knock.spa.partition('@')[0]}@{source}") if knock.spa else knock for knock in knocks
    )


def check_source(value: object, option: str) -> str:
    """Return the address to ask for; empty where none is given.

    :raises PortknockError: not an IPv4 address.
    """
    if value in (None, ""):
        return ""
    try:
        return str(ipaddress.IPv4Address(value if isinstance(value, str) else ""))
    except ValueError:
        raise PortknockError(f"{option}: expected an IPv4 address such as 192.0.2.7; got {value!r}.") from None


def check_client(place: str = "", gnupg: bool = False) -> None:
    """Refuse a machine that can't send such packets.

    :param place: how it is called in the error; empty for this one.
    :param gnupg: those that GnuPG signs and encrypts.
    :raises PortknockError: a program isn't there.
    """
    if shutil.which(PROGRAM) is None:
        raise PortknockError(
            f"expected the program `{PROGRAM}` on {place or 'this machine'}, which sends what opens the gate (Debian's package "
            "fwknop-client); it is not installed there."
        )
    if gnupg:
        check_programs(place)


def client_stanza(name: str, host: str, knock: Knock, source: str = "", home: str = "") -> str:
    """Return a stanza for ``.fwknoprc``, which holds secrets.

    :param home: GnuPG's folder with the keys, for a packet that it signs and encrypts.
    :param source: the address to ask for; empty where the packet's own or the program's ``-a`` says it.
    """
    allowed = knock.spa.partition("@")[2] or source
    lines = [
        f"[{name}]",
        f"SPA_SERVER {host}",
        f"SPA_SERVER_PORT {PORT}",
        "SPA_SERVER_PROTO udp",
        f"ACCESS {knock.proto}/{knock.port}",
        *([f"ALLOW_IP {allowed}"] if allowed else []),
        # Whoever sends it is nobody's business; without it, it looks for a name that a container may not have.
        "SPOOF_USER portknock",
        *_stanza_keys(knock, home),
        "USE_HMAC Y",
        "HMAC_DIGEST_TYPE sha256",
    ]
    return "\n".join((*lines, ""))


def _stanza_keys(knock: Knock, home: str) -> list[str]:
    if not uses_gnupg(knock):
        key, hmac_key = keys_of(knock)
        return [f"KEY_BASE64 {key}", f"HMAC_KEY_BASE64 {hmac_key}"]
    keys = gnupg_keys_of(knock)
    return [
        "USE_GPG Y",
        f"GPG_HOMEDIR {home}",
        f"GPG_EXE {shutil.which('gpg') or '/usr/bin/gpg'}",
        f"GPG_SIGNER {keys.own_fingerprint}",
        f"GPG_RECIPIENT {keys.peer_fingerprint}",
        "GPG_NO_SIGNING_PW Y",
        f"HMAC_KEY_BASE64 {keys.hmac_key}",
    ]


def send_spa(host: str, knock: Knock, source: str) -> None:
    """Send one packet.

    :param host: the gate's IPv4 address.
    :param source: the address to ask for, unless the packet itself says which.
    :raises PortknockError: the program isn't there, or does not send it; no secret is in the text.
    """
    if not uses_gnupg(knock):
        _send(host, client_stanza(_STANZA, host, knock, source))
        return
    check_client(gnupg=True)
    keys = gnupg_keys_of(knock)
    with home_with(keys.own, keys.peer) as home:
        _send(host, client_stanza(_STANZA, host, knock, source, home))


def _send(host: str, stanza: str) -> None:
    # Only where it is needed: people's ssh waits for each module.
    import subprocess

    with _private_file(stanza) as (path, passed):
        # Nothing of the user's own: no other stanza, and no note of these arguments.
        command = [PROGRAM, "--rc-file", path, "--named-config", _STANZA, "--no-save-args"]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=passed,
                timeout=_SECONDS,
                check=False,
            )
        except FileNotFoundError:
            check_client()
            raise PortknockError(f"expected `{PROGRAM}` to run; it does not.") from None
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise PortknockError(f"expected `{PROGRAM}` to run; got {type(exc).__name__}.") from None
    if done.returncode != 0:
        raise PortknockError(
            f"expected `{PROGRAM}` to send a packet to {host}; it has ended with code {done.returncode}."
        )


@contextlib.contextmanager
def _private_file(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A file with this text that only this user can read: its path, and the descriptors that whoever reads it has to inherit."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("portknock", os.MFD_CLOEXEC)
        with open(handle, "wb", buffering=0) as file:
            os.fchmod(handle, 0o600)
            file.write(text.encode())
            yield f"/proc/self/fd/{handle}", (handle,)
        return
    # A system without files that lie in memory alone.
    with tempfile.TemporaryDirectory(prefix="portknock-") as folder:
        path = os.path.join(folder, "rc")
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(text.encode())
        yield path, ()


__all__ = (
    "PORT",
    "PROGRAM",
    "GnupgKeys",
    "GnupgPackets",
    "asking_for",
    "check_client",
    "check_source",
    "client_stanza",
    "gnupg_keys_of",
    "keys_of",
    "new_gnupg",
    "new_spa",
    "send_spa",
    "uses_gnupg",
)
