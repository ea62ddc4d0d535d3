# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The file of secrets: its format, who may have it, and that no error quotes it."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._helper_secrets import (
    Access,
    HelperSecrets,
    parse_secrets,
    read_secrets,
)
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock

FIRST = (Knock(11111, "tcp"), Knock(33333, "udp"), Knock(22222, "tcp"))
SECOND = (Knock(44441, "tcp"), Knock(22221, "tcp"), Knock(33331, "udp"))
SECRETS = HelperSecrets(
    "alice",
    {
        "web1": Access("192.0.2.7", 22, (FIRST, SECOND)),
        "Web2": Access("Shop.example.org", 2201, (SECOND,)),
        "web3": Access("shop.example.org", 2202, (FIRST,)),
    },
)
# Every port that the files of these tests hold as part of a sequence.
PORTS = re.compile("11111|22222|33333|44441|22221|33331")


def written(**changes: Any) -> dict[str, Any]:
    """A file of one host with some values changed; None takes one away."""
    host = {"hostname": "192.0.2.7", "port": 22, "sequences": [["11111/tcp", "33333/udp", "22222/tcp"]]}
    top: dict[str, Any] = {"format": 1, "operator": "alice", "hosts": {"web1": host}}
    for name, value in changes.items():
        place = top if name in (*top, "more") else host
        place[name] = value
        if value is None:
            del place[name]
    return top


def test_reads_what_it_writes() -> None:
    assert parse_secrets(SECRETS.to_text(), "FILE") == SECRETS


def test_the_format_is_as_documented() -> None:
    text = HelperSecrets("alice", {"web1": Access("192.0.2.7", 22, (FIRST,))}).to_text()
    assert json.loads(text) == written()
    assert text.endswith("}\n")


def test_a_host_behind_a_jump_host() -> None:
    jump = "alice@bastion.example.org:2222"
    secrets = HelperSecrets("alice", {"web1": Access("192.0.2.7", 22, (FIRST,), jump=jump)})
    assert json.loads(secrets.to_text()) == written(format=2, jump=jump)
    assert parse_secrets(secrets.to_text(), "FILE") == secrets


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("", "JSON as the content"),
        ('{"hosts": 11111/tcp}', "JSON as the content"),
        ("[" * 100_000, "JSON as the content"),
        ("[]", "a mapping of format, hosts, operator as the content"),
        (written(operator=None), "a mapping of format, hosts, operator as the content"),
        (written(more="11111/tcp"), "a mapping of format, hosts, operator as the content"),
        (written(format=0), "1 or 2 as format"),
        (written(format=True), "1 or 2 as format"),
        (written(format="11111"), "1 or 2 as format"),
        (written(operator=11111), "a name as operator"),
        (written(operator="alice\n"), "a name as operator"),
        (written(hosts=["11111/tcp"]), "a mapping from the names of hosts as hosts"),
        (written(hosts={"": {}}), "a mapping from the names of hosts as hosts"),
        (written(hosts={"11111/tcp": {}}), "a mapping of hostname, port, sequences as host number 1"),
        (written(hosts={"11111/tcp": None}), "a mapping of hostname, port, sequences as host number 1"),
        (written(hostname=""), "a name or an address as hostname of host number 1"),
        (written(hostname=["11111/tcp"]), "a name or an address as hostname of host number 1"),
        (written(port=0), "a port from 1 to 65535 as port of host number 1"),
        (written(port=65536), "a port from 1 to 65535 as port of host number 1"),
        (written(port=True), "a port from 1 to 65535 as port of host number 1"),
        (written(port="11111"), "a port from 1 to 65535 as port of host number 1"),
        (written(jump=""), "a jump host as [user@]host[:port] as jump of host number 1"),
        (written(jump=["11111/tcp"]), "a jump host as [user@]host[:port] as jump of host number 1"),
        (written(jump="11111/tcp\n"), "a jump host as [user@]host[:port] as jump of host number 1"),
        (written(sequences=None), "a mapping of hostname, port, sequences as host number 1"),
        (written(sequences=[]), "a list of lists of port/protocol as sequences of host number 1"),
        (written(sequences=[[]]), "a list of lists of port/protocol as sequences of host number 1"),
        (written(sequences={"11111/tcp": 1}), "a list of lists of port/protocol as sequences of host number 1"),
        (
            written(sequences=["11111/tcp"]),
            "a list of lists of port/protocol, tcp, udp or icmp as sequences of host number 1",
        ),
        (
            written(sequences=[["11111/tpc"]]),
            "a list of lists of port/protocol, tcp, udp or icmp as sequences of host number 1",
        ),
        (
            written(sequences=[[11111]]),
            "a list of lists of port/protocol, tcp, udp or icmp as sequences of host number 1",
        ),
        (
            written(sequences=[["11111/tcp"] * 2]),
            "a list of lists of port/protocol, tcp, udp or icmp as sequences of host",
        ),
    ],
)
def test_damaged(content: object, place: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    with pytest.raises(PortknockError) as caught:
        parse_secrets(text, "FILE")
    assert str(caught.value).startswith(f"FILE: expected {place}")
    assert not PORTS.search(str(caught.value))
    assert "\n" not in str(caught.value)
    # Nor does what a traceback would show below it.
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_newer_format() -> None:
    with pytest.raises(
        PortknockError, match=r"expected a file of format 2 or before; got one of a newer format\. Use the helper"
    ):
        parse_secrets('{"format": 3, "hosts": "unknown"}', "FILE")


@pytest.mark.parametrize(
    ("host", "port", "name", "found"),
    [
        ("web1", 22, None, "web1"),
        ("WEB2", 22, None, "Web2"),
        ("192.0.2.7", 22, None, "web1"),
        ("192.0.2.7", 8022, None, "web1"),
        ("shop.example.org", 2201, None, "Web2"),
        ("shop.example.org", 2202, None, "web3"),
        ("198.51.100.1", 22, "Web2", "Web2"),
        ("web1", 22, "web3", "web3"),
    ],
)
def test_find(host: str, port: int, name: str | None, found: str) -> None:
    assert SECRETS.find(host, port, name) == (found, SECRETS.hosts[found])


@pytest.mark.parametrize(
    ("host", "name", "message"),
    [
        ("web9", None, "HOST: expected a host that the file of secrets knows; got 'web9'."),
        ("web1", "web9", "--name: expected the name of a host in the file of secrets; got 'web9'."),
        ("shop.example.org", None, "--name: expected one of Web2, web3, which share 'shop.example.org'; got none."),
    ],
)
def test_find_says_what_is_wrong(host: str, name: str | None, message: str) -> None:
    with pytest.raises(PortknockError) as caught:
        SECRETS.find(host, 22, name)
    assert str(caught.value).startswith(message)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my secrets.json"
    path.write_text(SECRETS.to_text())
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_reads_a_private_file(file: Path, mode: int) -> None:
    file.chmod(mode)
    assert read_secrets(str(file)) == SECRETS


def test_reads_through_a_link(file: Path) -> None:
    link = file.with_name("link")
    link.symlink_to(file)
    assert read_secrets(str(link)) == SECRETS
    file.chmod(0o640)
    with pytest.raises(PortknockError, match="got mode 0640"):
        read_secrets(str(link))


@pytest.mark.parametrize("bit", [0o001, 0o002, 0o004, 0o010, 0o020, 0o040])
def test_refuses_a_file_that_is_not_private(file: Path, bit: int) -> None:
    file.chmod(0o600 | bit)
    with pytest.raises(PortknockError) as caught:
        read_secrets(str(file))
    assert str(caught.value) == (
        f"{file}: expected a file that only you can read (mode 0600); got mode {0o600 | bit:04o}. Run: chmod 600 "
        f"{shlex.quote(str(file))}"
    )


def test_refuses_a_file_of_another_user(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = file.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(
        PortknockError, match=rf"of your own \(user id {owner + 1}\); got one of user id {owner}\. Run: sudo"
    ):
        read_secrets(str(file))


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    with pytest.raises(PortknockError, match="expected a regular file; got something else"):
        read_secrets(str(pipe))
    with pytest.raises(PortknockError, match="expected a file that you can read; got: Is a directory"):
        read_secrets(str(tmp_path))
    with pytest.raises(
        PortknockError, match=r"expected the file of secrets; there is none\. Ask whoever runs the hosts"
    ):
        read_secrets(str(tmp_path / "none"))


def test_refuses_what_is_no_text(file: Path) -> None:
    file.write_bytes(b"\xff11111/tcp")
    with pytest.raises(PortknockError, match=r": expected UTF-8 as the content; got something else\.") as caught:
        read_secrets(str(file))
    assert not PORTS.search(str(caught.value))


def test_a_host_with_a_close_sequence() -> None:
    access = Access("192.0.2.7", 22, (FIRST,), close=(SECOND, FIRST))
    text = HelperSecrets("alice", {"web1": access}).to_text()
    assert parse_secrets(text, "FILE").hosts["web1"] == access
    data = json.loads(text)
    assert (data["format"], len(data["hosts"]["web1"]["close"])) == (2, 2)
    every: list[Any] = ["44441/tcp", ["44441/tcp"], [[]], [["44441"]]]
    for damaged in every:
        data["hosts"]["web1"]["close"] = damaged
        with pytest.raises(PortknockError, match="as close of host number 1; got something else") as caught:
            parse_secrets(json.dumps(data), "FILE")
        assert not PORTS.search(str(caught.value))
