# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The keyring on the controller: one file a host, vault-encrypted, replaced atomically under one lock.

A folder of files::

    keyring.json     the keyring's id, no secret; every host's file repeats it
    rotations.json   the rotations that have not come to their end, no secret
    .lock            held by whoever writes
    web1.yml         the secrets of web1, in the shape of module_utils/_keyring.py
    .web1.used       which of its one-time sequences this user has used, no secret; see module_utils/_usage.py

Decrypted data is in no error text, no log and no variable of a task.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import yaml
from ansible import constants
from ansible.errors import AnsibleError
from ansible.parsing.vault import AnsibleVaultError, VaultLib, VaultSecretsContext, match_encrypt_secret
from ansible_collections.fleet.portknock.plugins.doc_fragments.keyring import ModuleDocFragment
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import HostSecrets
from ansible_collections.fleet.portknock.plugins.module_utils._usage import Usage

DEFAULT_FOLDER = "knock_keyring"
_IDENTITY_FILE = "keyring.json"
_IDENTITY_FORMAT = 1
_ROTATIONS_FILE = "rotations.json"
_ROTATIONS_FORMAT = 1
# For how long a run of a rotation goes on where another was stopped, or left hosts out; after that it begins a new one.
# Less than a day, so that a daily run with a host that never answers rotates the others every day.
CONTINUE_SECONDS = 12 * 3600
_LOCK_FILE = ".lock"
# One name will do, since only the holder of the lock writes; what a killed writer left is simply written over.
# The leading dot keeps it out of what Ansible reads where the folder lies inside an inventory.
_TEMPORARY_FILE = ".writing"
_LOCK_SECONDS = 20.0
_POLL_SECONDS = 0.02
_ENCRYPTED = b"$ANSIBLE_VAULT;"
_REMEDY = (
    "Give the run a vault secret, such as --vault-id or --vault-password-file on the command line, or "
    "vault_password_file in ansible.cfg"
)
_ENCRYPT_IDENTITY = "DEFAULT_VAULT_ENCRYPT_IDENTITY"
_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: type = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class Cipher(Protocol):
    """What encrypts and decrypts the files."""

    def encrypt(self, plaintext: bytes) -> bytes:
        """:raises PortknockError: it can't."""

    def decrypt(self, vaulttext: bytes) -> bytes:
        """:raises PortknockError: it can't; the text does not name the file."""


class RunVault:
    """The vault secrets of an Ansible run: encrypts with the one that core would take, decrypts with any."""

    def __init__(self, secrets: list[tuple[str, Any]]) -> None:
        self._secrets = secrets
        self._vault = VaultLib(secrets)

    def encrypt(self, plaintext: bytes) -> bytes:
        try:
            identity, secret = match_encrypt_secret(self._secrets, constants.config.get_config_value(_ENCRYPT_IDENTITY))
        except AnsibleVaultError:
            known = ", ".join(identity for identity, _secret in self._secrets)
            raise PortknockError(
                f"vault_encrypt_identity: expected one of the vault identities of this run ({known}); got "
                f"{constants.config.get_config_value(_ENCRYPT_IDENTITY)}."
            ) from None
        encrypted: bytes = self._vault.encrypt(plaintext, secret, identity)
        return encrypted

    def decrypt(self, vaulttext: bytes) -> bytes:
        try:
            plaintext: bytes = self._vault.decrypt(vaulttext)
        except AnsibleError:
            known = ", ".join(identity for identity, _secret in self._secrets)
            raise PortknockError(
                f"expected a file that a vault secret of this run decrypts ({known}); none does, so it was encrypted "
                f"with another or is damaged."
            ) from None
        return plaintext


class Keyring:
    """The folder of secrets.

    :param directory: the folder; it need not be there yet.
    :param vault: None where the run was given no vault secret.
    :param plaintext: write plain files. Without this and without a vault nothing is written.
    :param lock_seconds: how long a writer waits for another one.
    """

    def __init__(
        self, directory: Path, vault: Cipher | None, plaintext: bool, lock_seconds: float = _LOCK_SECONDS
    ) -> None:
        self.directory = directory
        self._vault = vault
        self._plaintext = plaintext
        self._lock_seconds = lock_seconds
        self._id: str | None = None
        # What was decrypted last: deriving the vault's key takes milliseconds.
        self._latest: tuple[str, bytes, HostSecrets] | None = None
        # Did this object make the keyring, at its first use?
        self.founded = False

    @property
    def id(self) -> str | None:
        """The keyring's id; None until its first use. Inside a change it is always set.

        :raises PortknockError: the folder or its id can't be read.
        """
        if self._id is None:
            self._id = self._read_id()
        return self._id

    def path(self, host: str) -> Path:
        """The file of a host: its name in the inventory, percent-encoded where it would not do as a file's name."""
        name = quote(host, safe="")
        # No leading dot: the folder's own files have one.
        return self.directory / f"{'%2E' + name[1:] if name.startswith('.') else name}.yml"

    def usage(self, entry: HostSecrets) -> Usage:
        """Which of a host's one-time sequences are known to be used: beside its file, in one that Ansible passes by."""
        return Usage(str(self._usage_path(entry.host)), entry.stamp)

    def _usage_path(self, host: str) -> Path:
        path = self.path(host)
        return path.with_name(f".{path.stem}.used")

    def load(self, host: str) -> HostSecrets | None:
        """Return what is kept of a host; None where there is nothing.

        :raises PortknockError: the file can't be read or decrypted, is damaged, or is another keyring's or host's.
        """
        return self._parse(host, self._read(self.path(host)), self.id)

    def update(
        self, host: str, change: Callable[[HostSecrets | None], HostSecrets], dry_run: bool = False
    ) -> tuple[HostSecrets, bool]:
        """Change what is kept of a host; return it, and whether that is a change.

        Everything is checked before anything is written, so whatever is raised, the former file is there.

        :param change: called with what is kept and, where another writer came between, once more. It may raise.
        :param dry_run: write nothing.
        :raises PortknockError: as :meth:`load`; no vault secret to encrypt with; the lock is held for too long.
        """
        if self._vault is None and not self._plaintext:
            raise self._no_secret()
        founding = self.id is None
        if founding:
            self._check_empty()
            self._id = str(uuid.uuid4())
        try:
            return self._update(host, change, founding, dry_run)
        finally:
            if founding and not self.founded:
                self._id = None

    def _update(
        self, host: str, change: Callable[[HostSecrets | None], HostSecrets], founding: bool, dry_run: bool
    ) -> tuple[HostSecrets, bool]:
        path = self.path(host)
        before = self._read(path)
        existing = self._parse(host, before, self._id)
        wanted = change(existing)
        # Without the lock, so that runs that change nothing neither wait nor write.
        if wanted == existing or dry_run:
            return wanted, wanted != existing
        # Before anything is written, and before others are kept waiting.
        content = self._render(wanted)
        if founding:
            self._make_directory()
        with self._locked():
            kept_id, now = self._read_id(), self._read(path)
            if kept_id is None:
                if not founding:
                    raise self._no_id()
                identity = {"format": _IDENTITY_FORMAT, "keyring": self._id}
                self._write(self.directory / _IDENTITY_FILE, json.dumps(identity).encode() + b"\n")
                self.founded = True
            elif kept_id != self._id or now != before:
                # Another writer came first.
                self._id = kept_id
                existing = self._parse(host, now, kept_id)
                wanted = change(existing)
                if wanted == existing:
                    return wanted, False
                content = self._render(wanted)
            self._write(path, content)
        return wanted, True

    def promote(self, host: str, now: str, dry_run: bool = False, single_use: bool | None = None) -> HostSecrets:
        """Note that a host's gate was proved and confirmed with what it is to honour; return what is kept now.

        :param now: the time, such as 2026-01-31T08:15:00Z.
        :param single_use: whether it is a single-use gate; None where that isn't said.
        :raises PortknockError: as :meth:`update`, or nothing is kept of the host.
        """

        def change(kept: HostSecrets | None) -> HostSecrets:
            if kept is None:
                raise PortknockError(f"The keyring {self.directory}: expected an entry for {host}; got none.")
            return kept.promoted(now, single_use)

        return self.update(host, change, dry_run)[0]

    def rotation(self, scope: str, now: float, dry_run: bool = False) -> str:
        """Return the id of the rotation that is under way; begin one where there is none.

        :param scope: what it is about: hosts and operators, as the run was asked.
        :param now: seconds since 1970.
        :param dry_run: write nothing.
        :raises PortknockError: the file can't be read, or is damaged; the lock is held for too long.
        """
        known = self._rotation_in(self._rotations(), scope, now)
        if known is not None or dry_run:
            return known or secrets.token_hex(8)
        with self._locked():
            rotations = self._rotations()
            known = self._rotation_in(rotations, scope, now)
            if known is None:
                known = secrets.token_hex(8)
                kept = {name: entry for name, entry in rotations.items() if self._rotation_in(rotations, name, now)}
                self._write_rotations({**kept, scope: {"id": known, "began": now}})
        return known

    def end_rotation(self, scope: str, dry_run: bool = False) -> bool:
        """Note that a rotation has come to its end: the next run begins another. Returns whether there was one.

        :raises PortknockError: as :meth:`rotation`.
        """
        if scope not in self._rotations():
            return False
        if not dry_run:
            with self._locked():
                rotations = self._rotations()
                rotations.pop(scope, None)
                self._write_rotations(rotations)
        return True

    @staticmethod
    def _rotation_in(rotations: Mapping[str, Mapping[str, Any]], scope: str, now: float) -> str | None:
        entry = rotations.get(scope)
        if entry is None or not 0 <= now - float(entry["began"]) < CONTINUE_SECONDS:
            return None
        return str(entry["id"])

    def _rotations(self) -> dict[str, dict[str, Any]]:
        path = self.directory / _ROTATIONS_FILE
        content = self._read(path)
        if content is None:
            return {}
        try:
            data = json.loads(content)
            if data["format"] != _ROTATIONS_FORMAT:
                raise ValueError
            return {
                str(scope): {"id": str(entry["id"]), "began": float(entry["began"])}
                for scope, entry in data["rotations"].items()
            }
        except (ValueError, TypeError, LookupError, AttributeError):
            raise PortknockError(
                f"{path}: expected the rotations under way, of format {_ROTATIONS_FORMAT}; got something else. The file is "
                "damaged; remove it, and the next run begins a new rotation."
            ) from None

    def _write_rotations(self, rotations: Mapping[str, Mapping[str, Any]]) -> None:
        data = {"format": _ROTATIONS_FORMAT, "rotations": rotations}
        self._write(self.directory / _ROTATIONS_FILE, json.dumps(data).encode() + b"\n")

    def mark_removed(self, host: str, packages_gone: Sequence[str] = (), dry_run: bool = False) -> HostSecrets | None:
        """Mark a host's entry, if there is one, as that of a host whose gate was taken away; return what is kept now.

        :param packages_gone: packages that have been removed with it.
        :raises PortknockError: as :meth:`update`.
        """
        entry = self.load(host)
        if entry is None:
            return None
        return self.update(host, lambda kept: (kept or entry).marked_removed(packages_gone), dry_run)[0]

    def purge(self, host: str, dry_run: bool = False) -> bool:
        """Delete a host's file, if it is there and is this keyring's; return whether it was.

        :raises PortknockError: as :meth:`load`; the lock is held for too long.
        """
        if self.load(host) is None:
            return False
        if not dry_run:
            with self._locked(), self._reported("delete", self.path(host)):
                self._usage_path(host).unlink(missing_ok=True)
                self.path(host).unlink(missing_ok=True)
                _sync_directory(self.directory)
        return True

    def _parse(self, host: str, content: bytes | None, keyring_id: str | None) -> HostSecrets | None:
        if content is None:
            return None
        path = self.path(host)
        if keyring_id is None:
            raise self._no_id()
        if self._latest is not None and self._latest[:2] == (host, content):
            return self._latest[2]
        data = self._load_yaml(path, self._decrypted(path, content))
        kept = HostSecrets.from_mapping(data, str(path))
        if kept.keyring_id != keyring_id:
            raise PortknockError(
                f"{path}: expected a file of the keyring {keyring_id}; got one of the keyring {kept.keyring_id}."
            )
        if kept.host != host:
            raise PortknockError(f"{path}: expected the secrets of {host}; got those of {kept.host}.")
        self._latest = (host, content, kept)
        return kept

    def _decrypted(self, path: Path, content: bytes) -> bytes:
        if not content.startswith(_ENCRYPTED):
            if not self._plaintext:
                raise PortknockError(
                    f"{path}: expected a vault-encrypted file; got a plain or damaged one. Encrypt it with "
                    f"ansible-vault encrypt, or set knock_keyring_plaintext to keep plain files."
                )
            if path.stat().st_mode & 0o077:
                raise PortknockError(
                    f"{path}: expected a plain file that only its owner may read (mode 0600); got mode "
                    f"{path.stat().st_mode & 0o777:04o}."
                )
            return content
        if self._vault is None:
            raise PortknockError(f"{path}: expected a vault secret to decrypt it with; got none. {_REMEDY}.")
        try:
            return self._vault.decrypt(content)
        except PortknockError as exc:
            raise PortknockError(f"{path}: {exc}") from None

    @staticmethod
    def _load_yaml(path: Path, text: bytes) -> object:
        try:
            return yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader, in C where it is there
        except (yaml.YAMLError, ValueError):
            # What the parser says quotes the text.
            raise PortknockError(
                f"{path}: expected YAML; got something else. The file is damaged; restore it from a backup."
            ) from None

    def _render(self, wanted: HostSecrets) -> bytes:
        text = yaml.dump(wanted.to_mapping(), Dumper=_Dumper, sort_keys=False).encode()
        if self._plaintext:
            return text
        if self._vault is None:
            raise self._no_secret()
        return self._vault.encrypt(text)

    def _no_secret(self) -> PortknockError:
        return PortknockError(
            f"The keyring {self.directory}: expected a vault secret to encrypt it with; got none. "
            f"{_REMEDY}, or set knock_keyring_plaintext to keep plain files."
        )

    def _no_id(self) -> PortknockError:
        return PortknockError(
            f"{self.directory / _IDENTITY_FILE}: expected the id of the keyring whose files are in this folder; the "
            f"file is missing. Restore it from a backup."
        )

    def _read_id(self) -> str | None:
        path = self.directory / _IDENTITY_FILE
        content = self._read(path)
        if content is None:
            return None
        try:
            data = json.loads(content)
            keyring_id = data["keyring"] if data["format"] == _IDENTITY_FORMAT else None
        except (ValueError, TypeError, LookupError):
            keyring_id = None
        if not isinstance(keyring_id, str) or not keyring_id:
            raise PortknockError(
                f"{path}: expected a keyring's id of format {_IDENTITY_FORMAT}; got something else. The file is "
                f"damaged or is not a keyring's; restore it from a backup."
            )
        return keyring_id

    def _read(self, path: Path) -> bytes | None:
        """A file's content; None where there is no such file."""
        with self._reported("read", path):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return None

    def _check_empty(self) -> None:
        """Refuse to begin a keyring among files of one whose id was lost."""
        with self._reported("read", self.directory):
            try:
                names = os.listdir(self.directory)
            except FileNotFoundError:
                return
        if any(name.endswith(".yml") for name in names):
            raise self._no_id()

    def _make_directory(self) -> None:
        with self._reported("make", self.directory):
            try:
                self.directory.mkdir(mode=0o700)
            except FileExistsError:
                return
            _sync_directory(self.directory.parent)

    def _write(self, path: Path, content: bytes) -> None:
        """Replace a file so that a crash at any moment leaves the former or the new one. Needs the lock."""
        temporary = self.directory / _TEMPORARY_FILE
        with self._reported("write", path):
            temporary.unlink(missing_ok=True)
            try:
                with open(
                    os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb"
                ) as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _sync_directory(self.directory)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.directory / _LOCK_FILE
        deadline = time.monotonic() + self._lock_seconds
        with self._reported("lock", path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        # Closing the file gives the lock back, and so does the end of the process, whatever ends it.
        with open(descriptor, "wb"):
            while not _try_lock(descriptor):
                if time.monotonic() >= deadline:
                    raise PortknockError(
                        f"{path}: expected the keyring's lock within {self._lock_seconds:g} s; another process holds "
                        f"it. Run again when the other run has ended."
                    )
                time.sleep(_POLL_SECONDS)
            yield

    @contextlib.contextmanager
    def _reported(self, action: str, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            if exc.errno == errno.ENOENT and action == "make":
                reason = "the folder above it does not exist"
            else:
                reason = os.strerror(exc.errno) if exc.errno else "an error without a number"
            raise PortknockError(
                f"The keyring {self.directory}: expected a folder that this user can read and write "
                f"(knock_keyring_dir); could not {action} {path}: {reason}."
            ) from exc


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keyring_directory(configured: str | None, inventory_dir: object) -> Path:
    """Return the keyring's folder: the one place where that is decided.

    :param configured: the option knock_keyring_dir. A relative path begins at the inventory's folder if there is one,
        otherwise at the current folder.
    :param inventory_dir: Ansible's variable of that name; what isn't the path of a folder counts as none.
    :raises PortknockError: neither is given.
    """
    base = Path(inventory_dir) if isinstance(inventory_dir, str) and os.path.isdir(inventory_dir) else None
    if configured:
        return Path(os.path.abspath((base or Path.cwd()) / Path(configured).expanduser()))
    if base is None:
        raise PortknockError(
            "knock_keyring_dir: expected a folder, since the host's inventory has none; got nothing. Set the variable "
            "knock_keyring_dir, the environment's KNOCK_KEYRING_DIR, or keyring_dir in the section portknock of "
            "ansible.cfg."
        )
    return Path(os.path.abspath(base / DEFAULT_FOLDER))


def read_as_inventory(folder: Path, what: str, option: str, task_vars: Mapping[str, Any]) -> str | None:
    """Return a warning where Ansible reads what is in a folder as inventory; None where it doesn't.

    :param what: what is kept there.
    :param option: the one that names another place.
    """
    for source in task_vars.get("ansible_inventory_sources") or []:
        if os.path.isdir(source) and folder.is_relative_to(os.path.abspath(source)):
            return (
                f"{what} {folder} lies inside the inventory source {source}, so Ansible reads its files as inventory. Set "
                f"{option} to a folder elsewhere, or add ^{folder.name}$ to ignore_patterns in the section inventory of "
                "ansible.cfg."
            )
    return None


@functools.lru_cache(maxsize=None)
def _option_definitions() -> Mapping[str, Any]:
    definitions: Mapping[str, Any] = yaml.safe_load(ModuleDocFragment.DOCUMENTATION)["options"]
    return definitions


def keyring_options(task_vars: Mapping[str, Any], templar: Any) -> Callable[[str], Any]:
    """Return a lookup of the keyring's options for an action plugin, as a connection plugin's ``get_option``.

    Variables come first, then the environment, then ``ansible.cfg``: core's own order, by core's own code.
    """
    definitions = _option_definitions()
    constants.config.initialize_plugin_configuration_definitions("fleet.portknock", "keyring", definitions)
    names = [entry["name"] for definition in definitions.values() for entry in definition["vars"]]
    variables = {name: templar.template(task_vars[name]) for name in names if name in task_vars}

    def lookup(option: str) -> Any:
        return constants.config.get_config_value(
            option, plugin_type="fleet.portknock", plugin_name="keyring", variables=variables
        )

    return lookup


def open_keyring(get_option: Callable[[str], Any]) -> Keyring:
    """Return the keyring that the options name, with the vault secrets of this run. Nothing is read yet.

    :param get_option: a connection plugin's ``get_option``, or what :func:`keyring_options` returns.
    :raises PortknockError: no folder is named.
    """
    context = VaultSecretsContext.current(optional=True)
    run_secrets = context.secrets if context else None
    return Keyring(
        keyring_directory(get_option("knock_keyring_dir"), get_option("knock_inventory_dir")),
        RunVault(run_secrets) if run_secrets else None,
        bool(get_option("knock_keyring_plaintext")),
    )


__all__ = (
    "CONTINUE_SECONDS",
    "DEFAULT_FOLDER",
    "Cipher",
    "Keyring",
    "RunVault",
    "keyring_directory",
    "keyring_options",
    "open_keyring",
    "read_as_inventory",
)
