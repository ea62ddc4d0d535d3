# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""An operator's bundle: what it consists of, and how it comes to a person's machine and goes again.

A folder of files, which is ``~/.ssh/portknock`` where it is installed::

    bundle.json     whose it is, and which files there are; no secret
    portknock       the helper, a program
    secrets.json    what the helper knocks with; its format is that of module_utils/_helper_secrets.py
    config          Host blocks for ssh, which one Include line in ~/.ssh/config reads
    card.txt, ...   whatever else the bundle brings

``bundle.json`` is of this shape, without any other key::

    {"format": 1, "folder": "portknock", "operator": "alice", "keyrings": ["5d2c..."], "files": ["config", ...]}

``keyrings`` are the ids of those that the sequences come from, by which two fleets are told apart. No text that this module
returns holds a secret.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from typing import Mapping, NamedTuple, Optional

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._helper_secrets import HelperSecrets, parse_secrets
from ansible_collections.fleet.portknock.plugins.module_utils._system import (
    remove_file,
    sync_folder,
    temporary_path,
    write_bytes,
)

FORMAT = 1
FOLDER = "portknock"
MANIFEST = "bundle.json"
PROGRAM = "portknock"
SECRETS = "secrets.json"
CONFIG = "config"

# What the helper keeps beside its file: which one-time sequences were used.
_USED = f"{SECRETS}.used"
_NEEDED = (CONFIG, PROGRAM, SECRETS)
_KEYS = {"format", "folder", "operator", "keyrings", "files"}
_FLEET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", re.ASCII)
# The prefix keeps it from being the name of another file of ~/.ssh.
_FOLDER = re.compile(rf"{FOLDER}(?:-{_FLEET.pattern})?", re.ASCII)
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_RESERVED = (MANIFEST, _USED)
_BLOCK = re.compile(rb"\s*(?:host|match)\b", re.IGNORECASE)
_INCLUDE = re.compile(rb"\s*include(?:\s*=\s*|\s+)(.*)", re.IGNORECASE | re.DOTALL)


class Manifest(NamedTuple):
    """Whose bundle it is, and the names of its files other than this one."""

    folder: str
    operator: str
    keyrings: tuple[str, ...]
    files: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """Return the file's content; the same manifest gives the same bytes."""
        content = {"format": FORMAT, **self._asdict()}
        return json.dumps(content, indent=2).encode() + b"\n"

    def is_same_persons(self, other: Manifest) -> bool:
        """Whether both are one operator's of one fleet; of a fleet without a keyring nothing is known."""
        is_same_fleet = not self.keyrings or not other.keyrings or bool(set(self.keyrings) & set(other.keyrings))
        return self.operator == other.operator and is_same_fleet


class Bundle(NamedTuple):
    """A whole bundle: its manifest, and the content of each of its files."""

    manifest: Manifest
    files: Mapping[str, bytes]

    @property
    def hosts(self) -> list[str]:
        """The names by which ssh knows its hosts."""
        return list(_secrets_of(self.files, self.manifest.folder).hosts)

    def contents(self) -> dict[str, bytes]:
        """Return the content of every file by its name, in the order in which they are written.

        The manifest comes first, so that what is cut short is known for what it is; the helper comes before what an older
        one might not be able to read.
        """
        first = (PROGRAM, SECRETS)
        others = sorted(name for name in self.files if name not in first)
        return {MANIFEST: self.manifest.to_bytes(), **{name: self.files[name] for name in (*first, *others)}}


class Difference(NamedTuple):
    """What becomes of a path, in words that may be shown."""

    path: str
    before: str
    after: str


class Outcome(NamedTuple):
    """What has changed, or would, and the names of files that were left, since they are not the bundle's."""

    differences: tuple[Difference, ...]
    left: tuple[str, ...] = ()


def folder_name(fleet: str) -> str:
    """Return the name of a bundle's folder: each fleet that has a name has one of its own.

    :param fleet: empty for none.
    :raises PortknockError: it can't be part of a file's name.
    """
    if not fleet:
        return FOLDER
    if _FLEET.fullmatch(fleet) is None:
        raise PortknockError(
            "knock_client_fleet: expected up to 32 letters, digits, dots, hyphens and underscores, beginning with a letter or "
            f"a digit; got {fleet!r}."
        )
    return f"{FOLDER}-{fleet}"


def mode_of(name: str) -> int:
    """Return the mode of one of a bundle's files."""
    return 0o700 if name == PROGRAM else 0o600


def parse_bundle(contents: Mapping[str, bytes], place: str) -> Bundle:
    """Return a bundle made of these files.

    :param place: where they are, for the error.
    :raises PortknockError: something is missing or damaged.
    """
    if MANIFEST not in contents:
        raise PortknockError(f"{place}: expected a bundle, with a file {MANIFEST}; got none.")
    manifest = _parse_manifest(contents[MANIFEST], os.path.join(place, MANIFEST))
    missing = [name for name in manifest.files if name not in contents]
    if missing:
        raise PortknockError(
            f"{place}: expected all files of the bundle; {', '.join(missing)} is not there. Unpack it again."
        )
    _secrets_of(contents, place)
    return Bundle(manifest, {name: contents[name] for name in manifest.files})


def read_bundle(folder: str) -> Bundle:
    """Return the bundle that a folder holds.

    :raises PortknockError: it holds none, or a part of one, or can't be read.
    """
    manifest = _read(os.path.join(folder, MANIFEST))
    if manifest is None:
        raise PortknockError(f"{folder}: expected a bundle, with a file {MANIFEST}; got none.")
    names = _parse_manifest(manifest, os.path.join(folder, MANIFEST)).files
    return parse_bundle({MANIFEST: manifest, **_files(folder, names)}, folder)


def describe(contents: Mapping[str, bytes], former: Optional[Mapping[str, bytes]] = None) -> str:
    """Return what may be shown of a bundle's files: nothing by which a gate could be opened.

    :param former: those that they take the place of, by which what differs is marked as changed.
    """
    if not contents:
        return ""

    def mark(name: str) -> str:
        return ", changed" if former and name in former and former[name] != contents.get(name) else ""

    lines = []
    secrets, before = _known(contents), _known(former or {})
    if secrets is not None:
        lines += [f"operator: {secrets.operator}", "hosts:"]
        for name, access in secrets.hosts.items():
            number = f"{len(access.sequences)} reusable, {len(access.one_time)} one-time"
            number += f", {len(access.close)} to close" if access.close else ""
            changed = before is not None and name in before.hosts and before.hosts[name] != access
            way = f" from {access.jump}" if access.jump else ""
            lines.append(
                f"  {name}: {access.hostname} port {access.port}{way}, {number}{', changed' if changed else ''}"
            )
    lines.append("files:")
    lines += [f"  {name}: {len(contents[name])} bytes{mark(name)}" for name in sorted(contents)]
    if CONFIG in contents:
        lines += ["", contents[CONFIG].decode(errors="replace")]
    return "\n".join((*lines, ""))


def put(bundle: Bundle, folder: str, dry_run: bool = False) -> Optional[Difference]:
    """Make a folder hold a bundle and nothing of a former one; what is no bundle's stays.

    Each file is replaced at once, and whatever the helper has noted stays.

    :return: what has changed; None where nothing has.
    :raises PortknockError: the folder is something else, or can't be written.
    """
    contents = bundle.contents()
    former = _installed(folder)
    stale = [name for name in former.files if name not in contents] if former else []
    before = _files(folder, (MANIFEST, *former.files)) if former else {}
    wrong_mode = [
        path
        for path, mode in ((folder, 0o700), *((os.path.join(folder, name), mode_of(name)) for name in contents))
        if _mode(path) not in (None, mode)
    ]
    if before == contents and not wrong_mode:
        return None
    if not dry_run:
        _make_folder(folder)
        os.chmod(folder, 0o700)
        for name in stale:
            remove_file(os.path.join(folder, name))
        for name, content in contents.items():
            path = os.path.join(folder, name)
            if before.get(name) != content or path in wrong_mode:
                write_bytes(path, content, mode_of(name))
    return Difference(folder, describe(before), describe(contents, before))


def install(bundle: Bundle, home: str, replace: bool = False, dry_run: bool = False) -> Outcome:
    """Put a bundle into ``~/.ssh``, and see to the Include line at the top of ``~/.ssh/config``.

    Everything is looked at before anything is changed.

    :param home: the person's home folder.
    :param replace: take the place of another operator's or fleet's bundle.
    :raises PortknockError: something stands in the way.
    """
    ssh = _ssh_folder(home)
    folder = os.path.join(ssh, bundle.manifest.folder)
    former = _installed(folder)
    if former is not None and not replace and not former.is_same_persons(bundle.manifest):
        whose = f"the operator {former.operator}" if former.operator != bundle.manifest.operator else "another fleet"
        raise PortknockError(
            f"{folder}: expected no bundle, or an older one of the operator {bundle.manifest.operator} and the same fleet; got "
            f"one of {whose}. To have both, ask for one that was made with a knock_client_fleet of its own; to put this one in "
            "its place, add --replace (knock_client_replace)."
        )
    config, text = _user_config(ssh)
    wanted = _with_include(text or b"", bundle.manifest.folder)
    if not dry_run:
        _make_folder(ssh)
    differences = [put(bundle, folder, dry_run)]
    if wanted != text:
        if not dry_run:
            write_bytes(config, wanted, 0o600 if text is None else _mode(config) or 0o600)
        differences.append(Difference(config, "", include_line(bundle.manifest.folder) + "\n"))
    return Outcome(tuple(difference for difference in differences if difference is not None))


def uninstall(folder: str, home: str, dry_run: bool = False) -> Outcome:
    """Take away what :func:`install` has put there, the Include line first.

    :param folder: the name of the bundle's folder.
    :raises PortknockError: the folder holds something else, or a file can't be removed.
    """
    ssh = _ssh_folder(home)
    path = os.path.join(ssh, folder)
    manifest = _installed(path)
    config, text = _user_config(ssh)
    wanted = _without_include(text or b"", folder)
    differences: list[Difference] = []
    if text is not None and wanted != text:
        if not dry_run and not wanted and config == os.path.join(ssh, "config"):
            # To ssh an empty file is as good as none.
            remove_file(config)
        elif not dry_run:
            write_bytes(config, wanted, _mode(config) or 0o600)
        differences.append(Difference(config, include_line(folder) + "\n", ""))
    left: list[str] = []
    if manifest is not None or os.path.isdir(path):
        files = () if manifest is None else manifest.files
        differences.append(Difference(path, describe(_files(path, (MANIFEST, *files))) or "(empty)\n", ""))
        if not dry_run:
            left = _remove(path, files)
    return Outcome(tuple(differences), tuple(left))


def include_line(folder: str) -> str:
    """Return the one line that ``~/.ssh/config`` gets."""
    return f"Include ~/.ssh/{folder}/{CONFIG}"


def _parse_manifest(content: bytes, path: str) -> Manifest:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        raise _damaged(path) from None
    if not isinstance(data, dict) or set(data) != _KEYS:
        if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] > FORMAT:
            raise PortknockError(
                f"{path}: expected a bundle of format {FORMAT}; got one of a newer format. Use the helper that came with it."
            )
        raise _damaged(path)
    folder, operator, keyrings, files = data["folder"], data["operator"], data["keyrings"], data["files"]
    if (
        data["format"] != FORMAT
        or not isinstance(folder, str)
        or _FOLDER.fullmatch(folder) is None
        or not isinstance(operator, str)
        or not isinstance(keyrings, list)
        or not all(isinstance(name, str) for name in keyrings)
        or not isinstance(files, list)
        or not all(isinstance(name, str) and _FILE.fullmatch(name) and name not in _RESERVED for name in files)
        or not set(_NEEDED) <= set(files)
    ):
        raise _damaged(path)
    return Manifest(folder, operator, tuple(keyrings), tuple(files))


def _damaged(path: str) -> PortknockError:
    return PortknockError(
        f"{path}: expected what a bundle says of itself, of format {FORMAT}; got something else. Unpack the bundle again, or "
        "ask for another."
    )


def _secrets_of(contents: Mapping[str, bytes], place: str) -> HelperSecrets:
    path = os.path.join(place, SECRETS)
    # What can't be decoded is no JSON either.
    return parse_secrets(contents[SECRETS].decode(errors="replace"), path)


def _known(contents: Mapping[str, bytes]) -> Optional[HelperSecrets]:
    try:
        return _secrets_of(contents, "") if SECRETS in contents else None
    except PortknockError:
        return None


def _installed(folder: str) -> Optional[Manifest]:
    """The manifest of the bundle in a folder; None where there is no folder, or an empty one."""
    try:
        status = os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISDIR(status.st_mode):
        raise PortknockError(f"{folder}: expected a folder that portknock has made, or none; got something else.")
    _check_own(folder, status)
    manifest = _read(os.path.join(folder, MANIFEST))
    if manifest is not None:
        return _parse_manifest(manifest, os.path.join(folder, MANIFEST))
    if set(os.listdir(folder)) - {os.path.basename(temporary_path(MANIFEST))}:
        raise PortknockError(
            f"{folder}: expected a folder that portknock has made, with a file {MANIFEST}, or none; got one with other files. "
            "Move it away."
        )
    return None


def _ssh_folder(home: str) -> str:
    """The folder of a person's ssh, which need not be there; a link to it is followed."""
    ssh = os.path.join(home, ".ssh")
    try:
        status = os.stat(ssh)
    except FileNotFoundError:
        if not os.path.isdir(home):
            raise PortknockError(f"{home}: expected your home folder; there is none.") from None
        _check_own(home, os.stat(home))
        return ssh
    if not stat.S_ISDIR(status.st_mode):
        raise PortknockError(f"{ssh}: expected a folder, or nothing; got something else.")
    _check_own(ssh, status)
    return ssh


def _user_config(ssh: str) -> tuple[str, Optional[bytes]]:
    """Where a person's ssh_config really is, since it may be a link, and what is in it; None where there is none."""
    path = os.path.realpath(os.path.join(ssh, "config"))
    text = _read(path)
    if text is not None:
        _check_own(path, os.stat(path))
    return path, text


def _check_own(path: str, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise PortknockError(
            f"{path}: expected it to belong to you (user id {os.geteuid()}); got user id {status.st_uid}. Do this as the person "
            "who is going to use ssh, without sudo."
        )


def _with_include(text: bytes, folder: str) -> bytes:
    """The text with the Include line where it applies to all hosts."""
    names = {path.encode() for path in (f"~/.ssh/{folder}/{CONFIG}", f"{folder}/{CONFIG}")}
    for line in text.splitlines():
        if _BLOCK.match(line):
            break
        found = _INCLUDE.fullmatch(line)
        if found is not None and names & {word.strip(b'"') for word in found[1].split()}:
            return text
    return include_line(folder).encode() + b"\n" + _without_include(text, folder)


def _without_include(text: bytes, folder: str) -> bytes:
    line = include_line(folder).encode()
    return b"".join(kept for kept in text.splitlines(keepends=True) if kept.strip() != line)


def _remove(folder: str, files: tuple[str, ...]) -> list[str]:
    """Remove a bundle's files, the manifest last, and their folder; return the names of what is left in it."""
    ours = [name for name in files if name != SECRETS]
    for name in (SECRETS, _USED, *ours, MANIFEST):
        remove_file(temporary_path(os.path.join(folder, name)))
        remove_file(os.path.join(folder, name))
    try:
        os.rmdir(folder)
    except OSError as exc:
        if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise PortknockError(f"{folder}: expected to be able to remove it; got {exc.strerror}.") from None
        return sorted(os.listdir(folder))
    sync_folder(os.path.dirname(folder))
    return []


def _make_folder(path: str) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except OSError as exc:
        raise PortknockError(f"{path}: expected to be able to make this folder; got {exc.strerror}.") from None


def _files(folder: str, names: tuple[str, ...]) -> dict[str, bytes]:
    """The content of those files that are there."""
    found = {name: _read(os.path.join(folder, name)) for name in names}
    return {name: content for name, content in found.items() if content is not None}


def _read(path: str) -> Optional[bytes]:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise PortknockError(f"{path}: expected to be able to read it; got {exc.strerror}.") from None


def _mode(path: str) -> Optional[int]:
    try:
        return stat.S_IMODE(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None


__all__ = (
    "CONFIG",
    "FOLDER",
    "MANIFEST",
    "PROGRAM",
    "SECRETS",
    "Bundle",
    "Difference",
    "Manifest",
    "Outcome",
    "describe",
    "folder_name",
    "include_line",
    "install",
    "mode_of",
    "parse_bundle",
    "put",
    "read_bundle",
    "uninstall",
)
