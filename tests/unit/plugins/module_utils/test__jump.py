# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Calls to a jump host, which a process of this machine stands for: no ssh and no network."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils import _jump
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._jump import (
    COMMAND,
    FromHere,
    FromJump,
    JumpError,
    JumpHost,
    jump_host,
)
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import Address
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.module_utils._proof import answer

SEQUENCE = (Knock(41873, "udp"), Knock(60291, "udp"), Knock(33877, "udp"))
OTHER = (Knock(44119, "udp"), Knock(28461, "udp"))
PORTS = re.compile("41873|60291|33877|44119|28461")
HERE = "127.0.0.1"
ENOUGH = 30.0
BEFORE = f"ssh {' '.join(_jump._OPTIONS)}"


def standing_for(*command: str) -> JumpHost:
    return JumpHost("bastion", command)


# What sshd does with the command.
JUMP = standing_for("sh", "-c", COMMAND)


def said(first: str, then: str = "") -> JumpHost:
    """A jump host whose account does something else than what it is asked for."""
    return standing_for("sh", "-c", f"{first}\n{then}")


def way(jump: JumpHost, port: int, patience: float = ENOUGH) -> FromJump:
    return FromJump(jump, HERE, port, "any", patience)


@pytest.fixture
def service() -> Iterator[int]:
    """A port that greets, and answers once."""
    with socket.create_server((HERE, 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    caller = listener.accept()[0]
                except OSError:
                    return
                with caller, contextlib.suppress(OSError):
                    caller.sendall(b"hello\n")
                    caller.sendall(caller.recv(100).upper())

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("text", "config", "name", "arguments"),
    [
        ("bastion", None, "bastion", "-- bastion"),
        ("bastion.example.org:2222", None, "bastion.example.org", "-p 2222 -- bastion.example.org"),
        ("alice@192.0.2.7", "/etc/other", "192.0.2.7", "-l alice -F /etc/other -- 192.0.2.7"),
        ("alice@example.org@[2001:db8::7]:22", None, "2001:db8::7", "-l alice@example.org -p 22 -- 2001:db8::7"),
        ("[fe80::1%eth0]", None, "fe80::1%eth0", "-- fe80::1%eth0"),
        ("a@one:1,b@two,three", None, "three", "-J a@one:1,b@two -- three"),
        ("ssh://carol@bastion:2222/", None, "bastion", "-l carol -p 2222 -- bastion"),
    ],
)
def test_reached_as_ssh_reaches_it(text: str, config: str | None, name: str, arguments: str) -> None:
    jump = jump_host(text, "--jump", config=config)
    assert (jump.name, " ".join(jump.command)) == (name, f"{BEFORE} {arguments} {COMMAND}")


@pytest.mark.parametrize(
    "text",
    [
        *("", ",", "a,", ",a", "a b", "a:0", "a:65536", "a:ssh", "@a", "-oProxyCommand=true", "a,-b", "2001:db8::7"),
        *("a;true", "$(true)", "`true`@a", "a|b", "'a", 'b@"a', "a\nb", "a\\b", "[a", "none;none", "a,b;true,c"),
    ],
)
def test_no_jump_host(text: str) -> None:
    with pytest.raises(PortknockError) as caught:
        jump_host(text, "--jump")
    assert str(caught.value).startswith(
        "--jump: expected a jump host as [user@]host[:port], as ssh's ProxyJump takes it"
    )
    assert str(caught.value).endswith(f"got {text!r}.")


def test_every_shell_reads_the_command_alike() -> None:
    program, quoted = COMMAND.split(" ", 1)
    assert program == "python3"
    assert shlex.split(COMMAND)[1] == "-IBSc"
    assert not set("!$`\\\n") & set(quoted)
    assert quoted.count("'") == 2
    # Nothing that comes back from a program which shows what it was asked for looks like the answer.
    assert not _jump._READY.search(COMMAND.encode() + b"\n")


def test_knocks_as_from_here(service: int) -> None:
    from_here = FromHere([Address(socket.AF_INET, (HERE, service))], service)
    for place in (from_here, way(JUMP, service)):
        result = place.knock([OTHER, SEQUENCE], 5.0, banner=1.0, once=[SEQUENCE])
        assert result.address == Address(socket.AF_INET, (HERE, service))
        assert result._replace(address=None, elapsed=0.0) == ("open", None, 0.0, 1, 0.0, 0, "", "hello", 0)


def test_the_knocks_arrive() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as target:
        target.bind((HERE, 0))
        target.settimeout(ENOUGH)
        knocks = (Knock(target.getsockname()[1], "udp"),)
        with socket.socket() as closed:
            closed.bind((HERE, 0))
            port = closed.getsockname()[1]
            assert way(JUMP, port).send(HERE, knocks, 0.0)
            assert target.recv(1) == b""
            assert not way(JUMP, port).send("127.0.0.2", knocks, 0.0)
            result = way(JUMP, port).knock([], 0.2, once=[knocks])
    assert (result.state, result.error, result.sequence, result.sent_once) == ("reset", "ECONNREFUSED", -1, 1)


def test_a_proof_is_made_there() -> None:
    request = {"host": "127.0.0.2", "port": 22, "family": "any", "addresses": [], "further": [], "place": "bastion"}
    seen = JUMP.ask(answer, "scout", request, patience=ENOUGH, timeout=1.0)
    assert seen == {"addresses": [["inet", "127.0.0.2", 22]], "others": [], "sources": [HERE]}


def test_close_from_there(service: int) -> None:
    """What is never closed says so; what is, is seen from there, too."""
    result = way(JUMP, service).close([SEQUENCE, SEQUENCE], 0.1)
    assert (result.state, result.address) == ("open", Address(socket.AF_INET, (HERE, service)))
    assert result.attempts % 2 == 0
    with socket.socket() as closed:
        closed.bind((HERE, 0))
        assert way(JUMP, closed.getsockname()[1]).close([SEQUENCE], 5.0).state == "reset"


def test_a_name_that_is_not_known_there(service: int) -> None:
    elsewhere = way(JUMP, service)._replace(host="no..name")
    for ask in (
        lambda: elsewhere.knock([SEQUENCE], 1.0),
        lambda: elsewhere.send(HERE, SEQUENCE, 0.0),
        lambda: elsewhere.close([SEQUENCE], 1.0),
    ):
        with pytest.raises(
            JumpError, match=r"\ASeen from the jump host bastion: host: expected a name or an"
        ) as caught:
            ask()
        assert not caught.value.is_unable


def interpreter(version: str) -> str:
    """A Python of that version, on the path or among pyenv's."""
    candidates = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for candidate in filter(None, candidates):
        # What is found may stand for one that is not installed.
        if subprocess.run([str(candidate), "-c", ""], capture_output=True, check=False).returncode == 0:
            return str(candidate)
    pytest.skip(f"no Python {version} here")


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.13"])
def test_with_nothing_but_python(service: int, version: str, tmp_path: Path) -> None:
    """Nothing is written, and whatever else this Python would find is left alone."""
    (tmp_path / "json.py").write_text("raise AssertionError('found')\n")
    command = COMMAND.replace("python3", shlex.quote(interpreter(version)), 1)
    jump = said(f"cd {tmp_path}; export HOME={tmp_path} PYTHONPATH={tmp_path}", f"exec {command}")
    assert way(jump, service).knock([SEQUENCE], 5.0).state == "open"
    request = {"host": HERE, "port": 22, "family": "any", "addresses": [], "further": [], "place": "bastion"}
    assert "an address of its own" in jump.ask(answer, "scout", request, patience=ENOUGH, timeout=1.0)["problem"]
    assert [path.name for path in tmp_path.iterdir()] == ["json.py"]


def children() -> set[int]:
    """The living processes that the tests have started, by whomever."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(entry.name)] = int(parent)
    return {child for child in parents if child != os.getpid() and _descends(child, parents)}


def _descends(child: int, parents: dict[int, int]) -> bool:
    while child in parents:
        child = parents[child]
        if child == os.getpid():
            return True
    return False


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ENOUGH
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_carries_and_shows_nothing(service: int) -> None:
    others = children()
    result, sock = way(JUMP, service).connect([OTHER, SEQUENCE], [], time.monotonic() + ENOUGH)
    assert result.state == "open"
    assert sock is not None
    with sock:
        assert sock.recv(6, socket.MSG_WAITALL) == b"hello\n"
        there = children() - others
        assert there
        for number in there:
            for name in ("cmdline", "environ"):
                assert not PORTS.search((Path("/proc") / str(number) / name).read_bytes().decode(errors="replace"))
        sock.sendall(b"question\n")
        answered = b""
        while data := sock.recv(100):
            answered += data
        assert answered == b"QUESTION\n"
    until(lambda: not children() - others)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_it_ends_with_whoever_asked(service: int) -> None:
    others = children()
    _result, sock = way(JUMP, service).connect([SEQUENCE], [], time.monotonic() + ENOUGH)
    assert sock is not None
    assert children() - others
    sock.close()
    until(lambda: not children() - others)


def test_a_port_that_stays_closed_carries_nothing() -> None:
    with socket.socket() as closed:
        closed.bind((HERE, 0))
        result, sock = way(JUMP, closed.getsockname()[1]).connect([SEQUENCE], [], time.monotonic() + 1.0)
    assert (result.state, sock) == ("reset", None)


def test_what_a_login_says_first_is_passed_over(service: int) -> None:
    jump = said("echo Welcome; echo portknock jump 3.11 or so", COMMAND)
    assert way(jump, service).knock([SEQUENCE], 5.0).state == "open"


UNABLE = "The jump host bastion can't knock: expected a shell there that runs `python3` of version 3.8 or newer; got "


@pytest.mark.parametrize(
    ("jump", "text", "is_unable"),
    [
        (said("echo This account is not available.; exit 1"), f"{UNABLE}exit code 1.", True),
        (said("echo python3: not found >&2; exit 127"), f"{UNABLE}python3: not found.", True),
        (said("echo channel 0: open failed: connect >&2; exit 255"), f"{UNABLE}channel 0: open failed: connect.", True),
        (said("yes | head -c 200000"), f"{UNABLE}another answer.", True),
        (said("yes | tr -d '\\n'"), f"{UNABLE}another answer.", True),
        (said("echo portknock jump 3.7; cat"), f"{UNABLE}Python 3.7.", True),
        (
            said("printf 'first\\nssh: connect to host bastion: no route\\r\\n' >&2; exit 255"),
            "The jump host bastion can't be reached: ssh: connect to host bastion: no route.",
            False,
        ),
        (said("exit 255"), "The jump host bastion can't be reached: ssh has ended with code 255.", False),
        (said("sleep 60"), "The jump host bastion did not answer within 0.5 s.", False),
        (
            said("echo portknock jump 3.11; read -r line; echo Killed >&2; exit 137"),
            "The jump host bastion broke off: Killed.",
            False,
        ),
        (said("echo portknock jump 3.11; exec head -c 100 >&2"), "The jump host bastion broke off: ", False),
        (standing_for("/nonexistent/ssh"), "expected '/nonexistent/ssh' to run; got ", False),
    ],
)
def test_says_what_is_wrong(jump: JumpHost, text: str, is_unable: bool) -> None:
    with pytest.raises(JumpError) as caught:
        way(jump, 22, patience=0.5 if "sleep" in jump.command[-1] else ENOUGH).knock([SEQUENCE], 1.0)
    assert str(caught.value).startswith(text)
    assert caught.value.is_unable == is_unable
    assert not PORTS.search(str(caught.value))


@pytest.mark.parametrize("first", ["echo Choose a host:", "echo portknock jump 3.7"])
def test_nothing_is_told_to_what_is_no_python(first: str, tmp_path: Path) -> None:
    jump = said(f": >{tmp_path}/heard; {first}", f"cat >>{tmp_path}/heard")
    with pytest.raises(JumpError):
        way(jump, 22, patience=1.0).knock([SEQUENCE], 1.0)
    assert (tmp_path / "heard").read_bytes() == b""
