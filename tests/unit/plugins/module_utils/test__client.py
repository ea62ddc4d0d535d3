# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Putting a bundle on a person's machine, and taking it away."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils import _client
from ansible_collections.fleet.portknock.plugins.module_utils._client import (
    Bundle,
    Difference,
    Manifest,
    describe,
    folder_name,
    install,
    parse_bundle,
    put,
    read_bundle,
    uninstall,
)
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._helper_secrets import Access, HelperSecrets
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock

SEQUENCE = tuple(Knock(port, "tcp") for port in (41823, 60211, 52999))
ANOTHER = tuple(Knock(port, "udp") for port in (33107, 48211, 39001))
LINE = b"Include ~/.ssh/portknock/config\n"
OWN = b"# mine\r\nHost *\r\n\tUser me\r\n\n\nHost last\n  Port 23"


def made(
    operator: str = "alice",
    sequence: tuple[Knock, ...] = SEQUENCE,
    folder: str = "portknock",
    keyrings: tuple[str, ...] = ("one",),
    card: bytes = b"",
) -> Bundle:
    secrets = HelperSecrets(operator, {"web1": Access("192.0.2.7", 22, (sequence,))})
    files = {"config": b"Host web1\n", "portknock": b"\x00program", "secrets.json": secrets.to_text().encode()}
    files.update({"card.txt": card} if card else {})
    return Bundle(Manifest(folder, operator, keyrings, tuple(sorted(files))), files)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode & 0o777, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


def shown(differences: tuple[Difference, ...]) -> str:
    """What is shown names no port."""
    text = "".join(difference.before + difference.after for difference in differences)
    assert not any(str(knock.port) in text for knock in (*SEQUENCE, *ANOTHER))
    return text


@pytest.mark.parametrize("own", [None, b"", OWN, b"\n", b"Port 22"])
def test_there_and_back(home: Path, own: bytes | None) -> None:
    config = home / ".ssh" / "config"
    if own is not None:
        config.parent.mkdir(mode=0o755)
        config.write_bytes(own)
        config.chmod(0o640)
    before = tree(home)
    outcome = install(made(), str(home), dry_run=True)
    assert tree(home) == before
    assert len(outcome.differences) == 2

    outcome = install(made(), str(home))
    assert [difference.path for difference in outcome.differences] == [str(home / ".ssh/portknock"), str(config)]
    assert "web1: 192.0.2.7 port 22, 1 reusable" in shown(outcome.differences)
    assert tree(home) == {
        ".ssh": (0o700 if own is None else 0o755, b""),
        ".ssh/config": (0o600 if own is None else 0o640, LINE + (own or b"")),
        ".ssh/portknock": (0o700, b""),
        **{
            f".ssh/portknock/{name}": (0o700 if name == "portknock" else 0o600, content)
            for name, content in made().contents().items()
        },
    }
    identity = {path: path.stat().st_ino for path in home.rglob("*")}
    assert install(made(), str(home)).differences == ()
    assert {path: path.stat().st_ino for path in home.rglob("*")} == identity

    outcome = uninstall("portknock", str(home), dry_run=True)
    assert len(outcome.differences) == 2
    assert {path: path.stat().st_ino for path in home.rglob("*")} == identity
    shown(uninstall("portknock", str(home)).differences)
    # To ssh an empty file is as good as none, and so is an empty folder.
    before = {name: content for name, content in before.items() if content[1] != b"" or name == ".ssh"}
    assert tree(home) == (before or {".ssh": (0o700, b"")})
    assert uninstall("portknock", str(home)) == _client.Outcome((), ())


def test_a_newer_bundle_of_hers(home: Path) -> None:
    install(made(card=b"old"), str(home))
    used = home / ".ssh" / "portknock" / "secrets.json.used"
    used.write_text("state")
    newer = made(sequence=ANOTHER, keyrings=("one", "two"))
    (difference,) = install(newer, str(home)).differences
    text = shown((difference,))
    assert "  web1: 192.0.2.7 port 22, 1 reusable, 0 one-time, changed\n" in text
    assert "  card.txt: 3 bytes\n" in text
    assert read_bundle(str(used.parent)) == newer
    assert used.read_text() == "state"
    # No sequence that is out of date is left behind, and no state of what is gone.
    assert sorted(path.name for path in used.parent.iterdir()) == sorted([*newer.contents(), used.name])
    assert uninstall("portknock", str(home)).left == ()
    assert not used.parent.exists()


@pytest.mark.parametrize(
    ("text", "added"),
    [
        (b"include ~/.ssh/portknock/config\n", False),
        (b"Port 22\nInclude=portknock/config\n", False),
        (b'Include other "~/.ssh/portknock/config"\n', False),
        (b"#Include ~/.ssh/portknock/config\n", True),
        (b"Include ~/.ssh/portknock-two/config\n", True),
        (b"Host *\n" + LINE, True),
        (b"  match all\n  " + LINE, True),
        (b"HostName x\n" + LINE, False),
    ],
)
def test_an_include_that_is_there_already(home: Path, text: bytes, added: bool) -> None:
    """It counts where it applies to all hosts, however it is written."""
    config = home / ".ssh" / "config"
    config.parent.mkdir()
    config.write_bytes(text)
    install(made(), str(home))
    assert (config.read_bytes() != text) == added
    if added:
        assert config.read_bytes().startswith(LINE)
        assert config.read_bytes().count(LINE.strip()) - text.count(b"#" + LINE.strip()) == 1


def test_a_config_that_is_a_link(home: Path) -> None:
    """To where people keep such files, under version control: it stays a link."""
    (home / "dotfiles").mkdir()
    (home / ".ssh").mkdir()
    real, link = home / "dotfiles" / "ssh_config", home / ".ssh" / "config"
    link.symlink_to("../dotfiles/ssh_config")
    for content in (OWN, b""):
        real.write_bytes(content)
        install(made(), str(home))
        assert link.is_symlink()
        assert real.read_bytes() == LINE + content
        uninstall("portknock", str(home))
        assert link.is_symlink()
        assert real.read_bytes() == content


def test_somebody_elses_bundle(home: Path) -> None:
    install(made(), str(home))
    before = tree(home)
    for other, whose in ((made("bob"), "the operator alice"), (made(keyrings=("two",)), "another fleet")):
        with pytest.raises(PortknockError) as caught:
            install(other, str(home))
        assert str(caught.value).startswith(
            f"{home}/.ssh/portknock: expected no bundle, or an older one of the operator "
        )
        assert f"got one of {whose}. To have both, " in str(caught.value)
        assert tree(home) == before
    # Where nothing is kept in a keyring, nothing tells two fleets apart.
    install(made(keyrings=()), str(home))
    install(made("bob"), str(home), replace=True)
    assert read_bundle(str(home / ".ssh/portknock")) == made("bob")


def test_two_side_by_side(home: Path) -> None:
    config = home / ".ssh" / "config"
    config.parent.mkdir()
    config.write_bytes(OWN)
    install(made(), str(home))
    install(made("al", folder="portknock-work", keyrings=("two",)), str(home))
    assert config.read_bytes() == b"Include ~/.ssh/portknock-work/config\n" + LINE + OWN
    uninstall("portknock", str(home))
    assert config.read_bytes() == b"Include ~/.ssh/portknock-work/config\n" + OWN
    uninstall("portknock-work", str(home))
    assert config.read_bytes() == OWN


def test_what_is_not_the_bundles_stays(home: Path) -> None:
    folder = home / ".ssh" / "portknock"
    install(made(), str(home))
    (folder / "notes").write_text("mine")
    assert install(made(sequence=ANOTHER), str(home)).differences
    assert uninstall("portknock", str(home)).left == ("notes",)
    assert [path.name for path in folder.iterdir()] == ["notes"]
    for act in (lambda: install(made(), str(home)), lambda: uninstall("portknock", str(home))):
        with pytest.raises(PortknockError, match=r"with a file bundle\.json, or none; got one with other files"):
            act()
    assert (folder / "notes").read_text() == "mine"


def test_in_the_way(home: Path) -> None:
    (home / ".ssh").mkdir()
    (home / ".ssh" / "portknock").write_text("a file")
    with pytest.raises(PortknockError, match="expected a folder that portknock has made, or none; got something else"):
        install(made(), str(home))
    (home / ".ssh" / "portknock").unlink()
    (home / ".ssh" / "portknock").symlink_to(home)
    with pytest.raises(PortknockError, match="expected a folder that portknock has made, or none; got something else"):
        install(made(), str(home))
    assert not (home / ".ssh" / "config").exists()
    with pytest.raises(PortknockError, match="expected your home folder; there is none"):
        install(made(), str(home / "none"))


@pytest.mark.parametrize("place", ["", ".ssh", ".ssh/config", ".ssh/portknock"])
def test_as_somebody_else(home: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's files in a person's folder would keep ssh from reading them."""
    install(made(), str(home))
    if not place:
        uninstall("portknock", str(home))
        (home / ".ssh").rmdir()
    before, other = tree(home), os.geteuid() + 1
    real = os.stat

    def owned(path: str, *, follow: bool = True) -> os.stat_result:
        status = real(path, follow_symlinks=follow)
        values = list(status)
        values[4] = os.geteuid() if str(path) != str(home / place) else other
        return os.stat_result(values)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", owned)
        patched.setattr(os, "lstat", lambda path: owned(path, follow=False))
        with pytest.raises(PortknockError) as caught:
            install(made(sequence=ANOTHER), str(home))
    assert str(caught.value).startswith(
        f"{home / place}: expected it to belong to you (user id {os.geteuid()}); got user"
    )
    assert "without sudo" in str(caught.value)
    assert tree(home) == before


@pytest.mark.parametrize("written", range(1, 6))
def test_cut_short_and_done_again(home: Path, written: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it stops, the next run goes on."""
    real, calls = _client.write_bytes, []

    def failing(path: str, content: bytes, mode: int) -> None:
        calls.append(path)
        if len(calls) == written:
            raise KeyboardInterrupt
        real(path, content, mode)

    for bundle in (made(card=b"old"), made(sequence=ANOTHER)):
        calls.clear()
        monkeypatch.setattr(_client, "write_bytes", failing)
        try:
            install(bundle, str(home))
        except KeyboardInterrupt:
            monkeypatch.setattr(_client, "write_bytes", real)
            install(bundle, str(home))
        assert read_bundle(str(home / ".ssh/portknock")) == bundle
        assert (home / ".ssh" / "config").read_bytes() == LINE
    assert not (home / ".ssh" / "portknock" / "card.txt").exists()


def test_modes_are_put_right(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    put(made(), str(folder))
    folder.chmod(0o755)
    (folder / "secrets.json").chmod(0o644)
    (folder / "portknock").chmod(0o600)
    assert put(made(), str(folder)) is not None
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())}
    assert {name: mode for name, mode in modes.items() if mode != 0o600} == {"bundle": 0o700, "portknock": 0o700}
    assert put(made(), str(folder)) is None


def test_a_damaged_bundle() -> None:
    good = made().contents()
    manifest = json.loads(good["bundle.json"])
    assert parse_bundle(good, "x") == made()
    for change, complaint in (
        (
            {"bundle.json": b"{"},
            "x/bundle.json: expected what a bundle says of itself, of format 1; got something else",
        ),
        (
            {"secrets.json": b'{"41823": 1}'},
            "x/secrets.json: expected a mapping of format, hosts, operator as the content",
        ),
    ):
        with pytest.raises(PortknockError) as caught:
            parse_bundle({**good, **change}, "x")
        assert str(caught.value).startswith(complaint)
    for key, value in (
        ("format", 0),
        ("folder", "../x"),
        ("folder", "config"),
        ("operator", 1),
        ("keyrings", "one"),
        ("files", ["config", "portknock", "secrets.json", "../../.bashrc"]),
        ("files", ["config", "portknock", "secrets.json", "secrets.json.used"]),
        ("files", ["config"]),
        ("more", 1),
    ):
        with pytest.raises(PortknockError, match="expected what a bundle says of itself"):
            parse_bundle({**good, "bundle.json": json.dumps({**manifest, key: value}).encode()}, "x")
    with pytest.raises(PortknockError, match="got one of a newer format"):
        parse_bundle({**good, "bundle.json": json.dumps({"format": 2}).encode()}, "x")
    with pytest.raises(PortknockError, match=r"expected all files of the bundle; config is not there"):
        parse_bundle({name: content for name, content in good.items() if name != "config"}, "x")
    with pytest.raises(PortknockError, match=r"expected a bundle, with a file bundle\.json; got none"):
        parse_bundle({}, "x")


def test_names_of_fleets() -> None:
    assert [folder_name(fleet) for fleet in ("", "work", "eu-1.test")] == [
        "portknock",
        "portknock-work",
        "portknock-eu-1.test",
    ]
    for fleet in ("..", "a/b", "-x", "x" * 33, "ä"):
        with pytest.raises(PortknockError, match="knock_client_fleet: expected up to 32 letters"):
            folder_name(fleet)


def test_nothing_secret_is_described() -> None:
    once = HelperSecrets("alice", {"web1": Access("192.0.2.7", 22, (), {3: SEQUENCE, 4: ANOTHER}, "stamp")})
    contents = {**made().contents(), "secrets.json": once.to_text().encode(), "card.txt": b"41823"}
    text = describe(contents, made().contents())
    assert "web1: 192.0.2.7 port 22, 0 reusable, 2 one-time, changed" in text
    assert not any(str(knock.port) in text for knock in (*SEQUENCE, *ANOTHER))
    assert describe({}) == ""
    # What can't be read is no reason to fail.
    assert "operator" not in describe({"secrets.json": b"\xff"})
