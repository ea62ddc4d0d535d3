# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The helper's command line, and what it says where it can't connect."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils import _helper
from ansible_collections.fleet.portknock.plugins.module_utils._helper import main
from ansible_collections.fleet.portknock.plugins.module_utils._helper_secrets import Access, HelperSecrets
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock

SEQUENCE = (Knock(41873, "udp"), Knock(60291, "udp"), Knock(33877, "udp"))
PORTS = re.compile("41873|60291|33877")


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "secrets.json"
    path.write_text(HelperSecrets("alice", {"web1": Access("127.0.0.1", 22, (SEQUENCE,))}).to_text())
    path.chmod(0o600)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("connect web1 22", "the following arguments are required: --secrets"),
        ("connect web1 --secrets FILE", "the following arguments are required: PORT"),
        ("connect web1 22 --sec FILE", "the following arguments are required: --secrets"),
        ("connect web1 0 --secrets FILE", "argument PORT: expected a port from 1 to 65535; got '0'"),
        ("connect web1 65536 --secrets FILE", "argument PORT: expected a port from 1 to 65535; got '65536'"),
        ("connect web1 ssh --secrets FILE", "argument PORT: expected a port from 1 to 65535; got 'ssh'"),
        ("connect web1 22 --secrets FILE -4 -6", "argument -6: not allowed with argument -4"),
        ("connect web1 22 --secrets FILE --timeout 0", "argument --timeout: expected a number of seconds above 0 and"),
        ("connect web1 22 --secrets FILE --timeout nan", "argument --timeout: expected a number of seconds above 0"),
        ("connect web1 22 --secrets FILE --timeout inf", "argument --timeout: expected a number of seconds above 0"),
        ("connect web1 22 --secrets FILE --timeout soon", "up to 3600; got 'soon'"),
        ("open web1", "invalid choice: 'open'"),
        ("install here", "unrecognized arguments: here"),
    ],
)
def test_bad_arguments(arguments: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    out, err = capfd.readouterr()
    assert message in err
    assert out == ""
    assert err.startswith("portknock: ")
    assert err.endswith(f". Run: portknock{' connect' if arguments.startswith('connect') else ''} --help\n")
    assert err.count("\n") == 1


def said(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """What it says where it fails: one line, nothing of a sequence, and nothing to ssh."""
    assert main(arguments) == 1
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert not PORTS.search(err)
    assert err.startswith("portknock: ")
    return err.rstrip("\n")[len("portknock: ") :]


def test_a_knock_that_does_not_open(file: str, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = str(closed.getsockname()[1])
        text = said(["connect", "web1", port, "--secrets", file, "--timeout", "0.2"], capfd)
    assert re.fullmatch(
        rf"The knock did not open port {port} of web1 \(127\.0\.0\.1\): reset after \d\.\d s and \d+ tries\. If others get "
        r"in, ask for new secrets for the operator alice and .+\.",
        text,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("192.0.2.1", "22"), "HOST: expected a host that the file of secrets knows; got '192.0.2.1'."),
        (("web1", "22", "-6"), "host: expected a name or an address that resolves; got '127.0.0.1': "),
        (("no..name", "22", "--name", "web1"), "host: expected a name or an address that resolves; got 'no..name': "),
        (
            ("web1", "22", "--jump", "a b"),
            "--jump: expected a jump host as [user@]host[:port], as ssh's ProxyJump takes it",
        ),
        (("web1", "22", "--name", "web2"), "--name: expected the name of a host in the file of secrets; got 'web2'."),
    ],
)
def test_says_what_is_wrong(
    file: str, arguments: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert said(["connect", "--secrets", file, *arguments], capfd).startswith(message)


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is run for ssh: it notes its arguments, and then does what its file says."""
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/arguments\n. {tmp_path}/then\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return tmp_path / "then"


@pytest.mark.parametrize(
    ("kept", "options", "reached"),
    [
        ("alice@one:2222", (), "-l alice -p 2222 -- one"),
        ("one", ("--jump", "a,b", "-F", "other"), "-J a -F other -- b"),
        ("", ("--jump", "two"), "-- two"),
    ],
)
def test_from_a_jump_host(
    tmp_path: Path, ssh: Path, capfd: pytest.CaptureFixture[str], kept: str, options: tuple[str, ...], reached: str
) -> None:
    ssh.write_text("exit 1\n")
    path = tmp_path / "kept.json"
    path.write_text(HelperSecrets("alice", {"web1": Access("192.0.2.1", 22, (SEQUENCE,), jump=kept)}).to_text())
    path.chmod(0o600)
    text = said(["connect", "web1", "22", "--secrets", str(path), *options], capfd)
    assert "can't knock: expected a shell there that runs `python3`" in text
    assert "where the jump host is one of the gate's trusted sources" in text
    assert f" {reached} python3 -IBSc" in (tmp_path / "arguments").read_text()


def test_what_the_jump_host_sees(ssh: Path, file: str, capfd: pytest.CaptureFixture[str]) -> None:
    ssh.write_text('for last; do :; done; exec sh -c "$last"\n')
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = str(closed.getsockname()[1])
        text = said(["connect", "web1", port, "--secrets", file, "--jump", "one", "--timeout", "3"], capfd)
    assert text.startswith(f"The knock did not open port {port} of web1 (127.0.0.1): reset after ")
    text = said(["connect", "no..name", "22", "--name", "web1", "--secrets", file, "--jump", "one"], capfd)
    assert text.startswith(
        "Seen from the jump host one: host: expected a name or an address that resolves; got 'no..name'"
    )


def test_the_connection_is_set_up_as_ssh_does(
    file: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    relayed = []

    def relay(sock: socket.socket) -> None:
        options = ((socket.IPPROTO_TCP, socket.TCP_NODELAY), (socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        relayed.append((sock.getpeername(), *(bool(sock.getsockopt(*option)) for option in options)))

    monkeypatch.setattr(_helper, "relay", relay)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = listener.getsockname()
        assert main(["connect", "web1", str(where[1]), "--secrets", file]) == 0
    assert relayed == [(where, True, True)]
    assert capfd.readouterr() == ("", "")


def test_help_names_what_ssh_gives(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["connect", "--help"])
    assert "portknock connect --secrets FILE %h %p" in " ".join(capfd.readouterr().out.split())


def test_close_without_a_close_sequence(
    file: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "HOST: expected a host with a close sequence in the file of secrets; web1 has none."
    assert said(["close", "web1", "--secrets", file], capfd).startswith(message)
    # As it is in a bundle.
    monkeypatch.setattr("sys.argv", [str(Path(file).with_name("portknock"))])
    assert said(["close", "web1"], capfd).startswith(message)
    monkeypatch.setattr("sys.argv", ["/nowhere/portknock"])
    assert said(["close", "web1"], capfd).startswith(
        "/nowhere/secrets.json: expected the file of secrets; there is none."
    )


def test_close_where_it_stays_open(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "secrets.json"
    path.write_text(HelperSecrets("alice", {"web1": Access("127.0.0.1", 22, (SEQUENCE,), close=(SEQUENCE,))}).to_text())
    path.chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as service:
        port = str(service.getsockname()[1])
        text = said(["close", "web1", port, "--secrets", str(path)], capfd)
    assert text.startswith(f"Port {port} of web1 (127.0.0.1) is still open after ")
    assert main(["close", "web1", port, "--secrets", str(path)]) == 0
    assert capfd.readouterr() == (f"Port {port} of web1 is closed to this address.\n", "")
