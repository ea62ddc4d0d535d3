# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an operator takes along, made of the keyring's entries: their file of secrets, and the bundle around it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import stat
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ansible_collections.fleet.portknock.plugins.module_utils._card import CardHost, QrCode, card_files
from ansible_collections.fleet.portknock.plugins.module_utils._client import (
    CONFIG,
    MANIFEST,
    PROGRAM,
    SECRETS,
    Bundle,
    Difference,
    Manifest,
    describe,
    folder_name,
    mode_of,
    parse_bundle,
    put,
    read_bundle,
)
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._helper_secrets import Access, HelperSecrets
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import (
    GIVEN,
    HostSecrets,
    Operator,
    StoredSequence,
    check_operators,
    utc_now,
)
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._spa import client_stanza, uses_gnupg
from ansible_collections.fleet.portknock.plugins.module_utils._system import write_bytes
from ansible_collections.fleet.portknock.plugins.plugin_utils._keyring import keyring_options, open_keyring
from ansible_collections.fleet.portknock.plugins.plugin_utils._program import helper_program

SSH_PORT = 22
DEFAULT_FOLDER = "portknock_bundles"
FWKNOPRC = "fwknoprc"
_TAR = ".tar"
_PRIVATE = 0o600
# What ends a word in ssh_config, means something in a list of patterns, or is refused by ssh itself.
_NOT_IN_CONFIG = re.compile(r"[\s\x00-\x1f\x7f\"'`\\#*?!,=$;&<>|(){}]|^-")
# Late enough for every tar program to take it for a time.
_TIME = 315532800
_OPTIONS = {"inet": "-4 ", "inet6": "-6 "}


class Target(NamedTuple):
    """A host: its secrets, and where an operator's ssh goes.

    ``family`` is any, inet or inet6, ``user`` who logs in, empty where ssh decides, and ``given`` the sequences that the
    inventory gives, which the keyring may not know yet, newest first. ``jump`` is the way there as ssh's ProxyJump takes it,
    empty for none; the knock leaves from there, unless ``jump_alone`` says that nobody who comes from there needs one.
    """

    secrets: HostSecrets
    hostname: str
    port: int
    family: str = "any"
    user: str = ""
    given: Sequence[tuple[Knock, ...]] = ()
    jump: str = ""
    jump_alone: bool = False


def bundle(operator: str, targets: Iterable[Target]) -> HelperSecrets:
    """Return what an operator's helper needs: those hosts only that they may open, by the names of the inventory.

    Within a rotation that is the current sequence and the next one.

    :raises PortknockError: there is no such host.
    """
    now = utc_now()
    hosts = {
        target.secrets.host: _access(target, operator)
        for target in targets
        if why_not(target.secrets, operator, now) is None
    }
    if not hosts:
        raise PortknockError(
            f"portknock_operator: expected an operator whom one of the hosts lets in; got {operator!r}, who has an active "
            "sequence on none."
        )
    return HelperSecrets(operator, hosts)


def why_not(secrets: HostSecrets, operator: str, now: str) -> str | None:
    """Return why an operator does not get in to a host; None where they do.

    :param now: the time, such as 2026-01-31T08:15:00Z.
    """
    entry = secrets.operators.get(operator)
    if secrets.removed:
        return "the gate was taken away"
    if entry is None:
        return "no sequence"
    if entry.revoked is not None:
        return f"revoked since {entry.revoked}"
    if entry.has_expired(now):
        return f"expired since {entry.valid_until}"
    return None if entry.active else "no operator there any more"


def given_secrets(host: str, operator: str, given: Sequence[tuple[Knock, ...]], valid_until: str | None) -> HostSecrets:
    """Return an entry for a host of which the keyring knows nothing, with sequences that the inventory gives.

    :param given: one, or the newest and the former one.
    """
    newest, *former = (StoredSequence(1, knocks, GIVEN, utc_now()) for knocks in given)
    entry = (
        Operator(True, former[0], newest, both=True, valid_until=valid_until)
        if former
        else Operator(True, newest, valid_until=valid_until)
    )
    return HostSecrets("", host, 1, b"", frozenset(), {operator: entry})


def whole_bundle(
    operator: str, targets: Sequence[Target], fleet: str = "", qr: Callable[[str], QrCode] | None = None
) -> Bundle:
    """Return all that an operator gets, the same for the same secrets.

    :param fleet: its name, where a person is to have bundles of several.
    :param qr: makes the card's QR codes; None leaves them out.
    :raises PortknockError: as :func:`bundle`; a name that ssh's configuration can't hold.
    """
    secrets = bundle(operator, targets)
    chosen = [target for target in targets if target.secrets.host in secrets.hosts]
    folder = folder_name(fleet)
    files = {
        CONFIG: ssh_config(operator, folder, chosen).encode(),
        PROGRAM: helper_program(),
        SECRETS: secrets.to_text().encode(),
        **_fwknoprc(secrets),
        **card_files(operator, [_on_card(target, secrets.hosts[target.secrets.host]) for target in chosen], qr),
    }
    keyrings = sorted({target.secrets.keyring_id for target in chosen} - {""})
    return Bundle(Manifest(folder, operator, tuple(keyrings), tuple(sorted(files))), files)


def _fwknoprc(secrets: HelperSecrets) -> dict[str, bytes]:
    """The stanzas by which the program ``fwknop`` itself opens hosts, where there are such: a file that holds secrets."""
    stanzas = [
        client_stanza(name, access.hostname, access.sequences[0][0])
        for name, access in secrets.hosts.items()
        # With keys of GnuPG's it needs a folder of theirs, which the helper makes for each packet.
        if access.sequences and access.sequences[0][0].spa and not uses_gnupg(access.sequences[0][0])
    ]
    return {FWKNOPRC: "\n".join(stanzas).encode()} if stanzas else {}


def ssh_config(operator: str, folder: str, targets: Iterable[Target]) -> str:
    """Return Host blocks for a person's ssh, by the names of the inventory.

    :param folder: the name of the bundle's folder in ``~/.ssh``.
    :raises PortknockError: a name that ssh's configuration can't hold.
    """
    place = f"~/.ssh/{folder}"
    lines = [f"# Made by fleet.portknock for the operator {operator}. The next bundle writes over it."]
    for target in targets:
        name = _word(target.secrets.host, "the inventory", "the name of a host")
        lines += ["", f"Host {name}", f"  HostName {_escaped(_word(target.hostname, name, 'a name or an address'))}"]
        if target.port != SSH_PORT:
            lines.append(f"  Port {target.port}")
        if target.user:
            lines.append(f"  User {_word(target.user, f'knock_client_remote_user of {name}', 'the name of a user')}")
        if target.family != "any":
            lines.append(f"  AddressFamily {target.family}")
        if target.jump and target.jump_alone:
            lines.append(f"  ProxyJump {_jump(target.jump, name)}")
            continue
        lines.append(
            f"  ProxyCommand {place}/{PROGRAM} connect --secrets {place}/{SECRETS} {_OPTIONS.get(target.family, '')}"
            f"--name {_escaped(shlex.quote(name))} %h %p"
        )
    return "\n".join((*lines, ""))


def pack(whole: Bundle) -> bytes:
    """Return a bundle as a tar file; the same bundle gives the same bytes."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in (("", b""), *sorted(whole.contents().items())):
            entry = tarfile.TarInfo(f"{whole.manifest.folder}/{name}".rstrip("/"))
            entry.mtime = _TIME
            entry.type = tarfile.REGTYPE if name else tarfile.DIRTYPE
            entry.mode = mode_of(name) if name else 0o700
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return content.getvalue()


def unpack(content: bytes, path: str) -> Bundle:
    """Read what :func:`pack` made.

    :param path: the file, for the error.
    :raises PortknockError: anything else.
    """
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for entry in archive:
                file = archive.extractfile(entry) if entry.isfile() else None
                if file is not None:
                    found[entry.name] = file.read()
    except (tarfile.TarError, EOFError):
        found = {}
    folder = next((name.rpartition("/")[0] for name in found if name.rpartition("/")[2] == MANIFEST), None)
    if folder is None:
        raise PortknockError(f"{path}: expected a bundle that client.yml has made; got another file.")
    return parse_bundle(
        {name.rpartition("/")[2]: data for name, data in found.items() if name.rpartition("/")[0] == folder}, path
    )


def bundle_path(given: str, operator: str, task_vars: Mapping[str, Any], templar: Any) -> tuple[Path, bool]:
    """Return where a bundle is, and whether that is the default, which is in a folder beside the keyring's.

    :param given: the option; a relative path begins at the inventory's folder if there is one, otherwise at the current one.
    :raises PortknockError: nothing says where.
    """
    if given:
        folder = task_vars.get("inventory_dir")
        base = Path(folder) if isinstance(folder, str) and os.path.isdir(folder) else Path.cwd()
        return Path(os.path.abspath(base / Path(given).expanduser())), False
    if not operator:
        raise PortknockError(
            "knock_client_operator: expected the name of an operator, or knock_client_bundle; got nothing."
        )
    keyring = open_keyring(keyring_options(task_vars, templar)).directory
    return keyring.parent / DEFAULT_FOLDER / f"{check_operators([operator])[0]}{_TAR}", True


def keep(whole: Bundle, path: str, in_default_folder: bool = False, dry_run: bool = False) -> Difference | None:
    """Write a bundle, as one file where the path ends with .tar, otherwise as a folder; nothing where it is there already.

    :param in_default_folder: see to the folder around it, and that git passes it by.
    :return: what has changed; None where nothing has.
    :raises PortknockError: something else is there, or it can't be written.
    """
    parent = os.path.dirname(path)
    if in_default_folder and not dry_run:
        _make_default_folder(parent)
    if not in_default_folder and not os.path.isdir(parent):
        raise PortknockError(f"knock_client_bundle: expected a path in a folder that is there; got {path}.")
    if not path.endswith(_TAR):
        return put(whole, path, dry_run)
    content, former = pack(whole), b""
    if os.path.lexists(path):
        former = _read(path)
    if former == content and stat.S_IMODE(os.stat(path).st_mode) == _PRIVATE:
        return None
    # Also so that no file of another kind is written over.
    before = unpack(former, path).contents() if former else {}
    if not dry_run:
        write_bytes(path, content, _PRIVATE)
    after = whole.contents()
    return Difference(path, describe(before), describe(after, before))


def load(path: str) -> Bundle:
    """Return the bundle in a tar file or in a folder.

    :raises PortknockError: there is none, or it can't be read.
    """
    if os.path.isdir(path):
        return read_bundle(path)
    return unpack(_read(path), path)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as exc:
        raise PortknockError(
            f"knock_client_bundle: expected a bundle, as client.yml makes it, at {path}; got: {exc.strerror}."
        ) from None


def _make_default_folder(folder: str) -> None:
    ignored = os.path.join(folder, ".gitignore")
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        if not os.path.lexists(ignored):
            # A bundle is not encrypted, other than what is beside it.
            write_bytes(ignored, b"*\n", _PRIVATE)
    except OSError as exc:
        raise PortknockError(
            f"knock_client_bundle: expected to be able to make the folder {folder}; got: {exc.strerror}."
        ) from None


def _access(target: Target, operator: str) -> Access:
    reusable = [knocks for _name, knocks in target.secrets.candidates(operator)]
    reusable += [knocks for knocks in target.given if knocks not in reusable]
    once = {
        identity: knocks for _name, group in target.secrets.one_time(operator) for identity, knocks in group.items()
    }
    stamp = target.secrets.stamp if once else ""
    jump = _jump(target.jump, target.secrets.host)
    close = tuple(target.secrets.close_sequences(operator))
    return Access(target.hostname, target.port, tuple(reusable), once, stamp, jump, close)


def _on_card(target: Target, access: Access) -> CardHost:
    once = [access.one_time[identity] for identity in sorted(access.one_time)]
    sequences = access.sequences or once
    return CardHost(
        target.secrets.host,
        target.hostname,
        target.port,
        sequences,
        access.jump,
        target.user,
        one_time=not access.sequences,
        close=access.close[0] if access.close else (),
    )


def _jump(text: str, name: str) -> str:
    """A way there, each host of it as ssh takes it."""
    for host in text.split(",") if text else ():
        _word(host, f"knock_client_jump of {name}", "a jump host")
    return text


def _word(text: str, place: str, kind: str) -> str:
    if not text or _NOT_IN_CONFIG.search(text):
        raise PortknockError(
            f"{place}: expected {kind} that ssh takes, without blanks, quotes, commas, backslashes, a hyphen in front and any of "
            f"# * ? ! = $ ; & < > | and brackets; got {text!r}."
        )
    return text


def _escaped(text: str) -> str:
    """As ssh's configuration wants it where it replaces what follows a percent sign."""
    return text.replace("%", "%%")


__all__ = (
    "Target",
    "bundle",
    "bundle_path",
    "given_secrets",
    "keep",
    "load",
    "pack",
    "ssh_config",
    "unpack",
    "whole_bundle",
    "why_not",
)
