# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which hosts and sequences an operator's file of secrets holds."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import tarfile
from pathlib import Path

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._client import mode_of
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._helper_secrets import Access, HelperSecrets
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import HostSecrets, Operator, StoredSequence
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._stock import Stock
from ansible_collections.fleet.portknock.plugins.plugin_utils._bundle import (
    Target,
    bundle,
    given_secrets,
    keep,
    load,
    pack,
    ssh_config,
    unpack,
    whole_bundle,
    why_not,
)
from ansible_collections.fleet.portknock.plugins.plugin_utils._destination import read_configuration


def sequence(first: int) -> StoredSequence:
    knocks = tuple(Knock(first + step, "tcp") for step in (0, 20, 10))
    return StoredSequence(1, knocks, "generated", "2026-01-31T08:15:00Z")


def target(host: str, hostname: str, removed: bool = False, **operators: Operator) -> Target:
    return Target(HostSecrets("id", host, 1, b"\x5a" * 32, frozenset(), operators, removed=removed), hostname, 22)


ALICE, ROTATED, BOB = sequence(41000), sequence(42000), sequence(43000)
PAST, FUTURE = "2026-01-31T08:15:00Z", "2999-01-31T08:15:00Z"


def test_her_hosts_and_her_sequences_only() -> None:
    targets = [
        target("web1", "192.0.2.1", alice=Operator(True, ALICE), bob=Operator(True, BOB)),
        target("web2", "web2.example.org", bob=Operator(True, BOB), alice=Operator(True, ALICE, ROTATED)),
        target("web3", "192.0.2.3", bob=Operator(True, BOB)),
        target("web4", "192.0.2.4", alice=Operator(False, ALICE)),
        target("web5", "192.0.2.5", removed=True, alice=Operator(True, ALICE)),
        target("web6", "192.0.2.6", alice=Operator(False, ALICE, revoked=PAST)),
        target("web7", "192.0.2.7", alice=Operator(True, ALICE, valid_until=PAST)),
    ]
    assert bundle("alice", targets) == HelperSecrets(
        "alice",
        {
            "web1": Access("192.0.2.1", 22, (ALICE.knocks,)),
            "web2": Access("web2.example.org", 22, (ALICE.knocks, ROTATED.knocks)),
        },
    )


@pytest.mark.parametrize("operator", ["carol", "bob"])
def test_nothing_to_open(operator: str) -> None:
    targets = [target("web1", "192.0.2.1", alice=Operator(True, ALICE), bob=Operator(False, BOB))]
    with pytest.raises(PortknockError) as caught:
        bundle(operator, targets)
    assert str(caught.value) == (
        f"portknock_operator: expected an operator whom one of the hosts lets in; got {operator!r}, who has an active "
        "sequence on none."
    )


def test_the_card_has_what_the_bundle_has() -> None:
    stock = {number: tuple(Knock(44000 + 20 * number + step, "tcp") for step in (0, 6, 2)) for number in (1, 2)}
    once = Operator(True, ALICE, one_time=Stock(16, "honoured", stock))
    targets = [
        target("web1", "192.0.2.1", alice=Operator(True, ALICE), bob=Operator(True, BOB))._replace(jump="al@jump:2222"),
        target("web2", "192.0.2.2", alice=once),
        target("web3", "192.0.2.3", bob=Operator(True, BOB)),
    ]
    files = whole_bundle("alice", targets).files
    card = files["card.txt"].decode()
    for place in ("192.0.2.1", "192.0.2.2", "al@jump:2222", "41000", "44020", "44040"):
        assert place in card
    assert "192.0.2.3" not in card
    assert "43000" not in card


def test_the_way_by_a_jump_host() -> None:
    jumps = target("web1", "192.0.2.1", alice=Operator(True, ALICE))._replace(jump="a,b:22")
    assert bundle("alice", [jumps]).hosts["web1"].jump == "a,b:22"
    assert "ProxyJump" not in ssh_config("alice", "portknock", [jumps])
    # Where it is a trusted source, ssh alone gets through.
    assert ssh_config("alice", "portknock", [jumps._replace(jump_alone=True)]).splitlines()[2:] == [
        "Host web1",
        "  HostName 192.0.2.1",
        "  ProxyJump a,b:22",
    ]
    with pytest.raises(PortknockError, match="knock_client_jump of web1: expected a jump host that ssh takes"):
        bundle("alice", [jumps._replace(jump="a b")])


def test_why_a_host_is_left_out() -> None:
    for entry, reason in (
        (target("x", "x", True, alice=Operator(True, ALICE)), "the gate was taken away"),
        (target("x", "x", bob=Operator(True, ALICE)), "no sequence"),
        (target("x", "x", alice=Operator(False, ALICE, revoked=PAST)), f"revoked since {PAST}"),
        (target("x", "x", alice=Operator(True, ALICE, valid_until=PAST)), f"expired since {PAST}"),
        (target("x", "x", alice=Operator(False, ALICE)), "no operator there any more"),
        (target("x", "x", alice=Operator(True, ALICE, valid_until=FUTURE)), None),
    ):
        assert why_not(entry.secrets, "alice", "2026-11-22T00:00:00Z") == reason


def test_sequences_that_the_inventory_gives() -> None:
    given = [ROTATED.knocks, ALICE.knocks]
    known = target("web1", "192.0.2.1", alice=Operator(True, ALICE))._replace(given=given)
    unknown = Target(given_secrets("web2", "alice", given, None), "192.0.2.2", 22, given=given)
    late = Target(given_secrets("web3", "alice", given, PAST), "192.0.2.3", 22, given=given)
    hosts = bundle("alice", [known, unknown, late]).hosts
    assert {name: access.sequences for name, access in hosts.items()} == dict.fromkeys(
        ("web1", "web2"), (ALICE.knocks, ROTATED.knocks)
    )
    assert bundle("alice", [Target(given_secrets("web2", "alice", given[:1], None), "x", 22)]).hosts[
        "web2"
    ].sequences == (ROTATED.knocks,)


def test_what_ssh_makes_of_it(tmp_path: Path) -> None:
    """Every host has what is its own, and nothing is left over for others."""
    targets = [
        target("web1", "192.0.2.1", alice=Operator(True, ALICE)),
        target("web2", "fe80::7%eth0", alice=Operator(True, ALICE))._replace(port=2222, family="inet6", user="al"),
        target("~id", "web3.example.org", alice=Operator(True, ALICE))._replace(family="inet"),
        target("50%", "web4.example.org", alice=Operator(True, ALICE)),
    ]
    config = tmp_path / "config"
    config.write_text(ssh_config("alice", "portknock-work", targets))

    def asked(name: str) -> str:
        argv = ["ssh", "-G", "-F", str(config), name]
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout

    def proxy(text: str) -> str | None:
        return next((line.partition(" ")[2] for line in text.splitlines() if line.startswith("proxycommand ")), None)

    for name, one in zip(("web1", "web2", "~id", "50%"), targets):
        text = asked(name)
        found, _command = read_configuration(text)
        assert (found.host, found.port, found.family) == (one.hostname, one.port, one.family)
        assert ("\nuser al\n" in text) == (name == "web2")
        place = "~/.ssh/portknock-work"
        family = {"inet": ["-4"], "inet6": ["-6"]}.get(one.family, [])
        # Through ssh, which doubles no percent sign here, and the shell.
        words = [word.replace("%%", "%") for word in shlex.split(proxy(text) or "")]
        assert words == [
            f"{place}/portknock",
            *("connect", "--secrets", f"{place}/secrets.json", *family, "--name", name, "%h", "%p"),
        ]
    assert proxy(asked("web5")) is None


@pytest.mark.parametrize(
    "name", ["we b", "web*", "!web", "a,b", "-oProxy", 'a"b', "a\nHost *", "", "#x", "a\\b", "$(id)"]
)
def test_names_that_ssh_could_not_take(name: str) -> None:
    for wrong in (
        target(name, "192.0.2.1", alice=Operator(True, ALICE)),
        target("web1", name, alice=Operator(True, ALICE)),
        *([target("web1", "x", alice=Operator(True, ALICE))._replace(user=name)] if name else []),
    ):
        with pytest.raises(PortknockError) as caught:
            ssh_config("alice", "portknock", [wrong])
        assert str(caught.value).endswith(f"and brackets; got {name!r}.")


def test_the_same_bundle_makes_the_same_bytes(tmp_path: Path) -> None:
    targets = [target("web1", "192.0.2.1", alice=Operator(True, ALICE))]
    whole = whole_bundle("alice", targets, "work")
    assert whole.manifest == (
        "portknock-work",
        "alice",
        ("id",),
        ("card.html", "card.txt", "config", "portknock", "secrets.json"),
    )
    content = pack(whole)
    assert content == pack(whole_bundle("alice", targets, "work"))
    assert unpack(content, "x") == whole
    # As tar programs unpack it, whoever makes it and whatever their umask.
    (tmp_path / "alice.tar").write_bytes(content)
    subprocess.run(["tar", "-xf", "alice.tar"], cwd=tmp_path, check=True, umask=0o022)
    folder = tmp_path / "portknock-work"
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())}
    assert modes == {"portknock-work": 0o700, **{name: mode_of(name) for name in whole.contents()}}
    assert load(str(folder)) == load(str(tmp_path / "alice.tar")) == whole
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert {(entry.mtime, entry.uid, entry.uname) for entry in archive} == {(315532800, 0, "")}


def test_written_once(tmp_path: Path) -> None:
    whole = whole_bundle("alice", [target("web1", "192.0.2.1", alice=Operator(True, ALICE))])
    for name in ("alice.tar", "folder"):
        path = tmp_path / "bundles" / name
        made = keep(whole, str(path), in_default_folder=True, dry_run=True)
        assert made is not None
        assert not path.exists()
        assert keep(whole, str(path), in_default_folder=True) == made
        assert "41000" not in made.after
        inode = path.stat().st_ino
        assert keep(whole, str(path), in_default_folder=True) is None
        assert path.stat().st_ino == inode
        assert path.stat().st_mode & 0o777 == (0o600 if name == "alice.tar" else 0o700)
        path.chmod(0o755)
        assert keep(whole, str(path)) is not None
        assert path.stat().st_mode & 0o777 == (0o600 if name == "alice.tar" else 0o700)
    assert (tmp_path / "bundles" / ".gitignore").read_text() == "*\n"
    assert (tmp_path / "bundles").stat().st_mode & 0o777 == 0o700


def test_nothing_else_is_written_over(tmp_path: Path) -> None:
    whole = whole_bundle("alice", [target("web1", "192.0.2.1", alice=Operator(True, ALICE))])
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("page"))
    (tmp_path / "text.tar").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "page").write_text("")
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    for name, complaint in (
        ("other.tar", "other.tar: expected a bundle that client.yml has made; got another file."),
        ("text.tar", "text.tar: expected a bundle that client.yml has made; got another file."),
        ("folder", "or none; got one with other files. Move it away."),
        ("none/alice.tar", "knock_client_bundle: expected a path in a folder that is there; got "),
    ):
        with pytest.raises(PortknockError) as caught:
            keep(whole, os.path.join(tmp_path, name))
        assert complaint in str(caught.value)
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before
    with pytest.raises(
        PortknockError, match=r"expected a bundle, as client\.yml makes it, at .*/none; got: No such file"
    ):
        load(str(tmp_path / "none"))


def test_close_sequences_are_their_operators() -> None:
    """Of her own the newest first; the card has that one, in the host's part alone."""
    alice = Operator(True, ALICE, close=(ROTATED, sequence(44000)))
    targets = [
        target("web1", "192.0.2.1", alice=alice, bob=Operator(True, BOB, close=(sequence(45000),))),
        target("web2", "192.0.2.2", alice=Operator(True, sequence(46000))),
    ]
    whole = whole_bundle("alice", targets)
    hosts = bundle("alice", targets).hosts
    assert hosts["web1"].close == (ROTATED.knocks, sequence(44000).knocks)
    assert hosts["web2"].close == ()
    assert not [name for name, content in whole.files.items() if b"45020" in content]
    card = whole.files["card.txt"].decode()
    assert card.count("To shut the port again before its time") == 1
    assert "knock -d 200 192.0.2.1 42000:tcp 42020:tcp 42010:tcp" in card
    assert "44020" not in card
