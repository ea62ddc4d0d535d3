# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ansible import constants
from ansible.parsing.vault import VaultLib, VaultSecret
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import HostSecrets
from ansible_collections.fleet.portknock.plugins.module_utils._planning import plan_secrets
from ansible_collections.fleet.portknock.plugins.plugin_utils import _keyring
from ansible_collections.fleet.portknock.plugins.plugin_utils._keyring import (
    CONTINUE_SECONDS,
    Keyring,
    RunVault,
    keyring_directory,
    keyring_options,
    open_keyring,
)

REMEDY = (
    "Give the run a vault secret, such as --vault-id or --vault-password-file on the command line, or "
    "vault_password_file in ansible.cfg"
)
DEV, PROD = VaultSecret(b"the development secret"), VaultSecret(b"the production secret")


def vault(*identities: tuple[str, VaultSecret]) -> RunVault:
    return RunVault(list(identities or [("default", DEV)]))


def keyring(directory: Path, lock_seconds: float = 20, *, plaintext: bool = False) -> Keyring:
    return Keyring(directory, None if plaintext else vault(), plaintext, lock_seconds)


def made(ring: Keyring, host: str = "web1") -> Callable[[HostSecrets | None], HostSecrets]:
    def change(kept: HostSecrets | None) -> HostSecrets:
        return plan_secrets(
            kept, keyring_id=ring.id or "", host=host, operators=["default"], now="2026-01-31T08:15:00Z"
        ).secrets

    return change


def advanced(kept: HostSecrets | None) -> HostSecrets:
    assert kept is not None
    return replace(kept, generation=kept.generation + 1)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A keyring with one host, web1, of generation 1."""
    ring = keyring(tmp_path / "ring")
    ring.update("web1", made(ring))
    return tmp_path / "ring"


@pytest.fixture(autouse=True)
def _any_umask() -> Iterator[None]:
    former = os.umask(0)
    yield
    os.umask(former)


def test_the_first_use_founds_the_keyring(tmp_path: Path) -> None:
    ring = keyring(tmp_path / "ring")
    assert ring.id is None
    assert ring.load("web1") is None
    secrets, changed = ring.update("web1", made(ring))
    assert changed
    assert ring.founded
    assert ring.id == secrets.keyring_id
    assert keyring(tmp_path / "ring").load("web1") == secrets
    assert sorted(os.listdir(ring.directory)) == [".lock", "keyring.json", "web1.yml"]
    assert mode(ring.directory) == 0o700
    assert [mode(path) for path in ring.directory.iterdir()] == [0o600] * 3
    content = (ring.directory / "web1.yml").read_text()
    assert content.startswith("$ANSIBLE_VAULT;1.1;AES256\n")


def test_a_second_use_writes_nothing(folder: Path) -> None:
    ring = keyring(folder)
    before = (folder / "web1.yml").stat()
    assert ring.update("web1", made(ring))[1] is False
    assert not ring.founded
    assert (folder / "web1.yml").stat().st_ino == before.st_ino


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    ring = keyring(tmp_path / "ring")
    assert ring.update("web1", made(ring), dry_run=True)[1] is True
    assert os.listdir(tmp_path) == []
    assert ring.id is None


def test_what_raises_writes_nothing(tmp_path: Path) -> None:
    ring = keyring(tmp_path / "ring")
    with pytest.raises(ZeroDivisionError):
        ring.update("web1", lambda kept: 1 // 0)  # type: ignore[arg-type, return-value]
    assert os.listdir(tmp_path) == []
    assert ring.id is None


def test_without_a_vault_secret_nothing_is_written(tmp_path: Path) -> None:
    ring = Keyring(tmp_path / "ring", None, False)
    with pytest.raises(PortknockError) as caught:
        ring.update("web1", made(ring))
    assert str(caught.value) == (
        f"The keyring {tmp_path / 'ring'}: expected a vault secret to encrypt it with; got none. {REMEDY}, or set "
        f"knock_keyring_plaintext to keep plain files."
    )
    assert os.listdir(tmp_path) == []


def test_plain_files_when_asked_for(tmp_path: Path) -> None:
    ring = keyring(tmp_path / "ring", plaintext=True)
    secrets, _changed = ring.update("web1", made(ring))
    path = tmp_path / "ring" / "web1.yml"
    assert path.read_text().startswith("format: 1\n")
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    assert ring.load("web1") == secrets
    path.chmod(0o640)
    with pytest.raises(PortknockError) as caught:
        keyring(tmp_path / "ring", plaintext=True).load("web1")
    assert str(caught.value) == (
        f"{path}: expected a plain file that only its owner may read (mode 0600); got mode 0640."
    )


def test_a_plain_file_is_refused_where_it_was_not_asked_for(tmp_path: Path) -> None:
    ring = keyring(tmp_path / "ring", plaintext=True)
    ring.update("web1", made(ring))
    with pytest.raises(PortknockError) as caught:
        keyring(tmp_path / "ring").load("web1")
    assert str(caught.value) == (
        f"{tmp_path / 'ring' / 'web1.yml'}: expected a vault-encrypted file; got a plain or damaged one. Encrypt it with "
        f"ansible-vault encrypt, or set knock_keyring_plaintext to keep plain files."
    )


def test_an_encrypted_file_without_a_secret(folder: Path) -> None:
    with pytest.raises(PortknockError) as caught:
        Keyring(folder, None, False).load("web1")
    assert str(caught.value) == (
        f"{folder / 'web1.yml'}: expected a vault secret to decrypt it with; got none. {REMEDY}."
    )


def test_ansible_vault_views_a_file(folder: Path, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_bytes(DEV.bytes)
    command = Path(sys.executable).with_name("ansible-vault")
    seen = subprocess.run(
        [str(command), "view", "--vault-password-file", str(password), str(folder / "web1.yml")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    secrets = keyring(folder).load("web1")
    assert secrets is not None
    for knock in secrets.operators["default"].current.knocks:
        assert f"- {knock}\n" in seen


def test_the_first_secret_encrypts_and_any_decrypts(tmp_path: Path) -> None:
    ring = Keyring(tmp_path / "ring", vault(("prod", PROD), ("dev", DEV)), False)
    secrets, _changed = ring.update("web1", made(ring))
    content = (tmp_path / "ring" / "web1.yml").read_bytes()
    assert content.startswith(b"$ANSIBLE_VAULT;1.2;AES256;prod\n")
    assert VaultLib([("x", PROD)]).decrypt(content)
    assert Keyring(tmp_path / "ring", vault(("dev", DEV), ("other", PROD)), False).load("web1") == secrets


def test_vault_encrypt_identity_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANSIBLE_VAULT_ENCRYPT_IDENTITY", "dev")
    assert constants.config.get_config_value("DEFAULT_VAULT_ENCRYPT_IDENTITY") == "dev"
    both = vault(("prod", PROD), ("dev", DEV))
    assert both.encrypt(b"x").startswith(b"$ANSIBLE_VAULT;1.2;AES256;dev\n")
    monkeypatch.setenv("ANSIBLE_VAULT_ENCRYPT_IDENTITY", "qa")
    ring = Keyring(tmp_path / "ring", both, False)
    with pytest.raises(PortknockError) as caught:
        ring.update("web1", made(ring))
    assert str(caught.value) == (
        "vault_encrypt_identity: expected one of the vault identities of this run (prod, dev); got qa."
    )
    assert os.listdir(tmp_path) == []


def test_a_file_that_no_secret_decrypts(folder: Path) -> None:
    path = folder / "web1.yml"
    before = path.read_bytes()
    ring = Keyring(folder, vault(("prod", PROD), ("qa", VaultSecret(b"q"))), False)
    with pytest.raises(PortknockError) as caught:
        ring.update("web1", made(ring))
    assert str(caught.value) == (
        f"{path}: expected a file that a vault secret of this run decrypts (prod, qa); none does, so it was encrypted "
        f"with another or is damaged."
    )
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda whole: whole[: len(whole) // 2],
            "expected a file that a vault secret of this run decrypts (default); ",
        ),
        (lambda whole: b"", "expected a vault-encrypted file; got a plain or damaged one."),
        (lambda whole: b"\0\xff" + whole, "expected a vault-encrypted file; got a plain or damaged one."),
        (lambda whole: vault().encrypt(b"{48396: ["), "expected YAML; got something else. The file is damaged; "),
        (lambda whole: vault().encrypt(b"\xff48396"), "expected YAML; got something else. The file is damaged; "),
        (lambda whole: vault().encrypt(b"- 48396/tcp\n"), "expected a mapping of format, keyring, host, generation, "),
        (lambda whole: vault().encrypt(b"!!python/name:os.system"), "expected YAML; got something else."),
    ],
)
def test_a_damaged_file_is_never_overwritten(folder: Path, spoil: Callable[[bytes], bytes], says: str) -> None:
    path = folder / "web1.yml"
    path.write_bytes(spoil(path.read_bytes()))
    before = path.read_bytes()
    ring = keyring(folder)
    with pytest.raises(PortknockError) as caught:
        ring.update("web1", made(ring))
    assert str(caught.value).startswith(f"{path}: {says}")
    assert "48396" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert path.read_bytes() == before


def test_another_hosts_file(folder: Path) -> None:
    (folder / "web2.yml").write_bytes((folder / "web1.yml").read_bytes())
    ring = keyring(folder)
    with pytest.raises(PortknockError) as caught:
        ring.update("web2", made(ring, "web2"))
    assert str(caught.value) == f"{folder / 'web2.yml'}: expected the secrets of web2; got those of web1."


def test_another_keyrings_file(folder: Path, tmp_path: Path) -> None:
    other = keyring(tmp_path / "other")
    secrets, _changed = other.update("web2", made(other, "web2"))
    (folder / "web2.yml").write_bytes((tmp_path / "other" / "web2.yml").read_bytes())
    ring = keyring(folder)
    with pytest.raises(PortknockError) as caught:
        ring.update("web2", made(ring, "web2"))
    assert str(caught.value) == (
        f"{folder / 'web2.yml'}: expected a file of the keyring {ring.id}; got one of the keyring {secrets.keyring_id}."
    )


def test_a_keyring_whose_id_was_lost(folder: Path) -> None:
    (folder / "keyring.json").unlink()
    for host in ("web1", "web2"):
        ring = keyring(folder)
        with pytest.raises(PortknockError) as caught:
            ring.update(host, made(ring, host))
        assert str(caught.value) == (
            f"{folder / 'keyring.json'}: expected the id of the keyring whose files are in this folder; the file is "
            f"missing. Restore it from a backup."
        )


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"format": 2, "keyring": "x"}', b'{"format": 1, "keyring": 5}']
)
def test_a_damaged_id(folder: Path, content: bytes) -> None:
    (folder / "keyring.json").write_bytes(content)
    with pytest.raises(PortknockError) as caught:
        keyring(folder).load("web1")
    assert str(caught.value) == (
        f"{folder / 'keyring.json'}: expected a keyring's id of format 1; got something else. The file is damaged or is "
        f"not a keyring's; restore it from a backup."
    )


def unreachable(directory: Path, action: str, path: Path, reason: str) -> str:
    return (
        f"The keyring {directory}: expected a folder that this user can read and write (knock_keyring_dir); could not "
        f"{action} {path}: {reason}."
    )


def test_a_folder_below_one_that_is_not_there(tmp_path: Path) -> None:
    ring = keyring(tmp_path / "no" / "ring")
    with pytest.raises(PortknockError) as caught:
        ring.update("web1", made(ring))
    assert str(caught.value) == unreachable(
        ring.directory, "make", ring.directory, "the folder above it does not exist"
    )


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "ring").write_text("")
    ring = keyring(tmp_path / "ring")
    with pytest.raises(PortknockError) as caught:
        ring.update("web1", made(ring))
    assert str(caught.value) == unreachable(ring.directory, "read", ring.directory / "keyring.json", "Not a directory")


def test_a_folder_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests may run as root, whom no mode of a folder keeps out.
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PortknockError) as caught:
        keyring(folder).load("web1")
    assert str(caught.value) == unreachable(folder, "read", folder / "web1.yml", "Permission denied")


def test_a_name_that_is_too_long_for_a_file(folder: Path) -> None:
    ring, host = keyring(folder), "w" * 300
    with pytest.raises(PortknockError) as caught:
        ring.load(host)
    assert str(caught.value) == unreachable(folder, "read", folder / f"{host}.yml", "File name too long")


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("web1", "web1.yml"),
        ("web-1.example.org", "web-1.example.org.yml"),
        ("2001:db8::1", "2001%3Adb8%3A%3A1.yml"),
        ("../../etc/passwd", "%2E.%2F..%2Fetc%2Fpasswd.yml"),
        (".lock", "%2Elock.yml"),
        ("a%2Fb", "a%252Fb.yml"),
        ("büro 1", "b%C3%BCro%201.yml"),
    ],
)
def test_the_name_of_a_hosts_file(tmp_path: Path, host: str, name: str) -> None:
    ring = keyring(tmp_path / "ring")
    ring.update(host, made(ring, host))
    assert ring.path(host) == tmp_path / "ring" / name
    kept = keyring(tmp_path / "ring").load(host)
    assert kept is not None
    assert kept.host == host


def fail(*_arguments: object, **_more: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_former_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    before = keyring(folder).load("web1")
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(PortknockError) as caught:
            keyring(folder).update("web1", advanced)
    assert str(caught.value) == unreachable(folder, "write", folder / "web1.yml", "Input/output error")
    assert keyring(folder).load("web1") == before
    assert sorted(os.listdir(folder)) == [".lock", "keyring.json", "web1.yml"]
    assert keyring(folder).update("web1", advanced)[1]


KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from ansible.parsing.vault import VaultSecret
from ansible_collections.fleet.portknock.plugins.plugin_utils._keyring import Keyring, RunVault

folder, moment = sys.argv[1:]
name, _, number = moment.partition(":")
real = getattr(os, name)
calls = 0

def deadly(*arguments):
    global calls
    calls += 1
    if calls == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

setattr(os, name, deadly)
ring = Keyring(Path(folder), RunVault([("default", VaultSecret(b"the development secret"))]), False)
ring.update("web1", lambda kept: replace(kept, generation=kept.generation + 1))
"""


@pytest.mark.parametrize(
    ("moment", "generation", "leftover"),
    [("fsync:1", 1, True), ("replace:1", 1, True), ("fsync:2", 2, False)],
    ids=["before the data is safe", "before it takes the name", "before the name is safe"],
)
def test_a_writer_that_is_killed(folder: Path, moment: str, generation: int, leftover: bool) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    kept = keyring(folder).load("web1")
    assert kept is not None
    assert kept.generation == generation
    assert (".writing" in os.listdir(folder)) == leftover
    # The next writer gets the lock at once and tidies up.
    assert keyring(folder, 0).update("web1", advanced)[0].generation == generation + 1
    assert sorted(os.listdir(folder)) == [".lock", "keyring.json", "web1.yml"]


def test_a_lock_that_is_held(folder: Path) -> None:
    before = (folder / "web1.yml").read_bytes()
    with open(folder / ".lock", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(PortknockError) as caught:
            keyring(folder, 0.1).update("web1", advanced)
        assert str(caught.value) == (
            f"{folder / '.lock'}: expected the keyring's lock within 0.1 s; another process holds it. Run again when the "
            f"other run has ended."
        )
        with pytest.raises(PortknockError):
            keyring(folder, 0.1).purge("web1")
        assert (folder / "web1.yml").read_bytes() == before
        # Reading, and a run that changes nothing, need no lock.
        ring = keyring(folder, 0)
        assert ring.update("web1", made(ring))[1] is False


def test_a_change_is_made_again_where_another_writer_came_between(folder: Path) -> None:
    seen: list[int] = []

    def change(kept: HostSecrets | None) -> HostSecrets:
        assert kept is not None
        seen.append(kept.generation)
        if len(seen) == 1:
            keyring(folder).update("web1", advanced)
        return advanced(kept)

    assert keyring(folder).update("web1", change)[0].generation == 3
    assert seen == [1, 2]


def test_two_founders_end_with_one_keyring(tmp_path: Path) -> None:
    ring, rival = keyring(tmp_path / "ring"), keyring(tmp_path / "ring")

    def change(kept: HostSecrets | None) -> HostSecrets:
        rival.update("web2", made(rival, "web2"))
        return made(ring)(kept)

    secrets, _changed = ring.update("web1", change)
    assert (rival.founded, ring.founded) == (True, False)
    assert secrets.keyring_id == rival.id == ring.id
    assert keyring(tmp_path / "ring").load("web1") == secrets


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from ansible.parsing.vault import VaultSecret
from ansible_collections.fleet.portknock.plugins.module_utils._planning import plan_secrets
from ansible_collections.fleet.portknock.plugins.plugin_utils._keyring import Keyring, RunVault

folder, host, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
vault = RunVault([("default", VaultSecret(b"the development secret"))])

def change(kept):
    if kept is None:
        return plan_secrets(None, keyring_id=ring.id, host=host, operators=["default"], now="2026-01-31T08:15:00Z").secrets
    return replace(kept, generation=kept.generation + 1)

for _ in range(rounds):
    ring = Keyring(folder, vault, False)
    ring.update(host, change)
"""


def run_writers(folder: Path, hosts: list[str], rounds: int) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(folder), host, str(rounds)]) for host in hosts]
    assert [writer.wait(120) for writer in writers] == [0] * len(hosts)


def test_two_writers_of_one_host_lose_nothing(tmp_path: Path) -> None:
    run_writers(tmp_path / "ring", ["web1", "web1"], 10)
    kept = keyring(tmp_path / "ring").load("web1")
    assert kept is not None
    assert kept.generation == 20


def test_writers_of_many_hosts_found_one_keyring(tmp_path: Path) -> None:
    hosts = ["web1", "web2", "web3", "web4"]
    run_writers(tmp_path / "ring", hosts, 2)
    ring = keyring(tmp_path / "ring")
    kept = [ring.load(host) for host in hosts]
    assert [(entry.host, entry.generation, entry.keyring_id) for entry in kept if entry] == [
        (host, 2, ring.id) for host in hosts
    ]


def test_one_decryption_a_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decrypted: list[bytes] = []
    real = RunVault.decrypt

    def counting(self: RunVault, vaulttext: bytes) -> bytes:
        decrypted.append(vaulttext)
        return real(self, vaulttext)

    monkeypatch.setattr(RunVault, "decrypt", counting)
    ring = keyring(folder)
    ring.load("web1")
    ring.update("web1", advanced)
    assert len(decrypted) == 1


def test_promote_mark_and_purge(folder: Path) -> None:
    ring = keyring(folder)
    kept = ring.load("web1")
    assert kept is not None
    assert ring.promote("web1", "2026-03-01T00:00:00Z") == kept
    marked = ring.mark_removed("web1", dry_run=True)
    assert marked == replace(kept, removed=True)
    assert ring.load("web1") == kept
    assert ring.mark_removed("web1") == marked == ring.load("web1")
    noted = replace(marked, packages=("nftables",))
    ring.update("web1", lambda _kept: noted)
    assert ring.mark_removed("web1") == noted
    assert ring.mark_removed("web1", ["nftables"], dry_run=True) == marked
    assert ring.load("web1") == noted
    assert ring.mark_removed("web1", ["nftables"]) == marked == ring.load("web1")
    assert ring.purge("web1", dry_run=True)
    assert ring.path("web1").exists()
    assert ring.purge("web1")
    assert not ring.path("web1").exists()
    assert not ring.purge("web1")
    assert ring.mark_removed("web1") is None
    with pytest.raises(PortknockError) as caught:
        ring.promote("web1", "2026-03-01T00:00:00Z")
    assert str(caught.value) == f"The keyring {folder}: expected an entry for web1; got none."


def test_where_the_keyring_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inventory, here = tmp_path / "inventory", tmp_path / "here"
    inventory.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", "/home/ops")
    assert keyring_directory(None, str(inventory)) == inventory / "knock_keyring"
    assert keyring_directory("", str(inventory)) == inventory / "knock_keyring"
    assert keyring_directory("keys", str(inventory)) == inventory / "keys"
    assert keyring_directory("../keys", str(inventory)) == tmp_path / "keys"
    assert keyring_directory("keys", None) == here / "keys"
    assert keyring_directory("/srv/keys", str(inventory)) == Path("/srv/keys")
    assert keyring_directory("~/keys", str(inventory)) == Path("/home/ops/keys")


@pytest.mark.parametrize("inventory_dir", [None, "", "/no/such/folder", ["/tmp", "/"], b"/tmp", 5])
def test_no_folder_at_all(inventory_dir: object) -> None:
    with pytest.raises(PortknockError) as caught:
        keyring_directory(None, inventory_dir)
    assert str(caught.value) == (
        "knock_keyring_dir: expected a folder, since the host's inventory has none; got nothing. Set the variable "
        "knock_keyring_dir, the environment's KNOCK_KEYRING_DIR, or keyring_dir in the section portknock of ansible.cfg."
    )


class Templar:
    """Stands in for Ansible's."""

    def template(self, value: object) -> object:
        return "/templated/keys" if value == "{{ keys }}" else value


def test_options_of_an_action_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNOCK_KEYRING_DIR", "/from/environment")
    monkeypatch.setenv("KNOCK_KEYRING_PLAINTEXT", "yes")
    get_option = keyring_options({"inventory_dir": "/tmp"}, Templar())
    assert (get_option("knock_keyring_dir"), get_option("knock_inventory_dir")) == ("/from/environment", "/tmp")
    assert get_option("knock_keyring_plaintext") is True
    variables = {"inventory_dir": None, "knock_keyring_dir": "{{ keys }}", "knock_keyring_plaintext": "false"}
    get_option = keyring_options(variables, Templar())
    assert (get_option("knock_keyring_dir"), get_option("knock_inventory_dir")) == ("/templated/keys", None)
    assert get_option("knock_keyring_plaintext") is False
    ring = open_keyring(get_option)
    assert ring.directory == Path("/templated/keys")


def test_without_a_run_there_is_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_keyring.VaultSecretsContext, "_current", None)
    ring = open_keyring({"knock_keyring_dir": str(tmp_path / "r"), "knock_inventory_dir": None}.get)
    with pytest.raises(PortknockError, match="expected a vault secret to encrypt it with; got none"):
        ring.update("web1", made(ring))


def test_a_rotation_goes_on_until_it_has_ended(folder: Path) -> None:
    ring = keyring(folder)
    assert ring.rotation("all", 1000.0, dry_run=True) != ring.rotation("all", 1000.0, dry_run=True)
    first = ring.rotation("all", 1000.0)
    assert ring.rotation("all", 1000.0 + CONTINUE_SECONDS - 1) == first
    assert keyring(folder).rotation("all", 2000.0, dry_run=True) == first
    other = ring.rotation("bob", 2000.0)
    assert other != first
    assert ring.end_rotation("bob", dry_run=True)
    assert ring.rotation("bob", 2000.0) == other
    assert ring.end_rotation("bob")
    assert not ring.end_rotation("bob")
    assert ring.rotation("bob", 2000.0) != other
    assert ring.rotation("all", 1000.0 + CONTINUE_SECONDS) != first
    # A clock that was wrong binds nobody.
    assert ring.rotation("all", 500.0) != ring.rotation("all", 1000.0 + CONTINUE_SECONDS)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": 2, "rotations": {}}', '{"format": 1, "rotations": {"a": 1}}']
)
def test_damaged_rotations(folder: Path, content: str) -> None:
    ring = keyring(folder)
    path = folder / "rotations.json"
    path.write_text(content)
    with pytest.raises(PortknockError) as caught:
        ring.rotation("all", 1000.0)
    assert str(caught.value) == (
        f"{path}: expected the rotations under way, of format 1; got something else. The file is damaged; remove it, and the "
        "next run begins a new rotation."
    )
