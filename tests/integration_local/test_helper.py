# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The helper as ssh's ProxyCommand, against a closed host: every tool that goes by ssh."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import HostSecrets, Operator
from ansible_collections.fleet.portknock.plugins.plugin_utils._bundle import Target, bundle
from ansible_collections.fleet.portknock.plugins.plugin_utils._program import helper_program

from . import conftest as acc
from .conftest import Lab

HOSTS = [acc.SERVER4, acc.SERVER6]
LARGE = 50 * 2**20
ENOUGH = 60.0


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Desk:
    """A person's machine: the helper, a file of secrets, and an ssh_config."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.folder = lab.folder
        self.program = lab.folder / "portknock"
        self.program.write_bytes(helper_program())
        self.program.chmod(0o755)
        self.secrets = lab.folder / "secrets.json"
        self.keep()
        self.config = lab.folder / "ssh_config"
        self.configure()

    def keep(self, entry: Operator | None = None, hostname: str = acc.SERVER4) -> None:
        operators = {"alice": entry or acc.operator(acc.RIGHT)}
        secrets = HostSecrets("0", "web1", 1, b"\x5a" * 32, frozenset(), operators)
        self.secrets.write_text(bundle("alice", [Target(secrets, hostname, acc.PORT)]).to_text())
        self.secrets.chmod(0o600)

    def proxy(self, *options: str, python: str = "") -> str:
        given = " ".join(("--name", "web1", *options))
        return f"{python} {self.program} connect --secrets {self.secrets} {given} %h %p".strip()

    def configure(self, proxy: str = "", *lines: str) -> None:
        text = (
            f"ProxyCommand {proxy or self.proxy()}",
            *("User root", f"IdentityFile {self.lab.key}", "IdentitiesOnly yes", "BatchMode yes", "LogLevel ERROR"),
            *("UserKnownHostsFile /dev/null", "StrictHostKeyChecking no", "ConnectTimeout 20", *lines),
        )
        self.config.write_text("\n".join((*text, "")))

    def run(self, *command: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        # Neither the interpreter that the tests run in nor what it finds is a person's.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment["HOME"] = str(self.folder)
        environment["GIT_SSH_COMMAND"] = f"ssh -F {self.config}"
        environment["GIT_CONFIG_GLOBAL"] = os.devnull
        return subprocess.run(
            command, cwd=self.folder, env=environment, input=given, capture_output=True, timeout=ENOUGH, check=False
        )

    def ssh(self, host: str, *command: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return self.run("ssh", "-F", str(self.config), host, *command, given=given)


@pytest.fixture
def desk(lab: Lab) -> Desk:
    return Desk(lab)


def told(finished: subprocess.CompletedProcess[bytes]) -> str:
    """What the helper said: one line; no secret is in it, nor in what others said."""
    text = finished.stderr.decode()
    assert not acc.SECRETS.search(text)
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("portknock: ")]
    assert len(lines) == 1, text
    return lines[0]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("closed", ["reject with tcp reset", "drop"])
def test_ssh(desk: Desk, host: str, closed: str) -> None:
    desk.lab.gate(closed)
    finished = desk.ssh(host, "echo arrived")
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, b"arrived\n", b"")
    # The connection that saw the port open is the one that ssh gets.
    assert (desk.lab.knocks, desk.lab.count("connections")) == (1, 1)


def test_the_names_of_the_file(desk: Desk) -> None:
    desk.configure(f"~/{desk.program.name} connect %h %p --secrets ~/{desk.secrets.name}")
    for name in ("web1", "WEB1", acc.SERVER4):
        assert desk.ssh(name, "echo arrived").stdout == b"arrived\n"
    assert desk.lab.knocks == 3
    assert told(desk.ssh(acc.SERVER6, "true")).startswith("portknock: HOST: expected a host that the file of secrets")
    assert desk.lab.knocks == 3


def copy_in(*options: str) -> Callable[[Desk, str], tuple[str, ...]]:
    return lambda desk, host: (
        "scp",
        *options,
        "-F",
        str(desk.config),
        "there",
        f"{bracketed(host)}:{desk.folder}/copy",
    )


def copy_out(*options: str) -> Callable[[Desk, str], tuple[str, ...]]:
    return lambda desk, host: (
        "scp",
        *options,
        "-F",
        str(desk.config),
        f"{bracketed(host)}:{desk.folder}/there",
        "copy",
    )


def sftp(desk: Desk, host: str) -> tuple[str, ...]:
    (desk.folder / "batch").write_text(f"put there {desk.folder}/between\nget {desk.folder}/between copy\n")
    return ("sftp", "-F", str(desk.config), "-b", "batch", bracketed(host))


def rsync(desk: Desk, host: str) -> tuple[str, ...]:
    return ("rsync", "-e", f"ssh -F {desk.config}", "there", f"{bracketed(host)}:{desk.folder}/copy")


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    "command",
    [copy_in("-s"), copy_out("-s"), copy_in("-O"), copy_out("-O"), sftp, rsync],
    ids=["scp-in", "scp-out", "scp-O-in", "scp-O-out", "sftp", "rsync"],
)
def test_a_file(desk: Desk, host: str, command: Callable[[Desk, str], tuple[str, ...]]) -> None:
    content = os.urandom(300_000)
    (desk.folder / "there").write_bytes(content)
    finished = desk.run(*command(desk, host))
    assert finished.returncode == 0, finished.stderr
    assert (desk.folder / "copy").read_bytes() == content
    assert (desk.lab.knocks, desk.lab.count("connections")) == (1, 1)


@pytest.mark.parametrize("host", HOSTS)
def test_git(desk: Desk, host: str) -> None:
    def git(*arguments: str) -> None:
        finished = desk.run("git", "-c", "user.name=alice", "-c", "user.email=alice@example.org", *arguments)
        assert finished.returncode == 0, finished.stderr

    git("init", "-q", "--bare", "-b", "main", "shared")
    git("clone", "-q", f"ssh://{bracketed(host)}{desk.folder}/shared", "mine")
    (desk.folder / "mine" / "page").write_text("content\n")
    git("-C", "mine", "checkout", "-q", "-b", "main")
    git("-C", "mine", "add", "page")
    git("-C", "mine", "commit", "-q", "-m", "A page")
    git("-C", "mine", "push", "-q", "origin", "main")
    git("clone", "-q", f"ssh://{bracketed(host)}{desk.folder}/shared", "theirs")
    assert (desk.folder / "theirs" / "page").read_text() == "content\n"
    assert desk.lab.knocks == 3


@pytest.mark.parametrize("host", HOSTS)
def test_much_in_both_directions_at_once(desk: Desk, host: str) -> None:
    content = os.urandom(LARGE)
    finished = desk.ssh(host, "cat", given=content)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == content


@pytest.mark.parametrize("end", ["in", "out"])
def test_much_in_one_direction(desk: Desk, end: str) -> None:
    content = os.urandom(LARGE)
    if end == "out":
        (desk.folder / "large").write_bytes(content)
        assert desk.ssh(acc.SERVER4, f"cat {desk.folder}/large").stdout == content
    else:
        desk.ssh(acc.SERVER4, f"cat > {desk.folder}/large", given=content)
        assert (desk.folder / "large").read_bytes() == content


@pytest.mark.parametrize("current", [acc.RIGHT, acc.STALE])
def test_within_a_rotation(desk: Desk, current: tuple[acc.Knock, ...]) -> None:
    """Whichever of the two the host honours."""
    desk.keep(acc.operator(current, acc.STALE if current == acc.RIGHT else acc.RIGHT))
    assert desk.ssh(acc.SERVER4, "echo arrived").stdout == b"arrived\n"
    assert desk.lab.knocks == 1


@pytest.mark.parametrize(("closed", "state"), [("reject with tcp reset", "reset"), ("drop", "filtered")])
def test_secrets_that_are_out_of_date(desk: Desk, closed: str, state: str) -> None:
    desk.lab.gate(closed)
    desk.keep(acc.operator(acc.STALE))
    desk.configure(desk.proxy("--timeout", "1"))
    finished = desk.ssh(acc.SERVER4, "true")
    assert finished.returncode == 255
    line = told(finished)
    assert line.startswith(f"portknock: The knock did not open port 22 of web1 ({acc.SERVER4}): {state} after ")
    assert "ask for new secrets for the operator alice" in line


def test_it_speaks_before_ssh_gives_up(desk: Desk) -> None:
    """Ansible gives ssh ten seconds, with the exchange of banners."""
    desk.keep(acc.operator(acc.STALE))
    desk.configure(desk.proxy())
    desk.config.write_text(desk.config.read_text().replace("ConnectTimeout 20", "ConnectTimeout 10"))
    assert "The knock did not open port 22" in told(desk.ssh(acc.SERVER4, "true"))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_file_that_others_can_read(desk: Desk, mode: int) -> None:
    desk.secrets.chmod(mode)
    finished = desk.ssh(acc.SERVER4, "true")
    assert finished.returncode == 255
    assert told(finished) == (
        f"portknock: {desk.secrets}: expected a file that only you can read (mode 0600); got mode {mode:04o}. Run: "
        f"chmod 600 {desk.secrets}"
    )
    assert desk.lab.knocks == 0


def test_somebody_elses_file(desk: Desk) -> None:
    os.chown(desk.secrets, 65534, 65534)
    assert f"Run: sudo chown 0 {desk.secrets}" in told(desk.ssh(acc.SERVER4, "true"))
    assert desk.lab.knocks == 0


def test_a_damaged_file(desk: Desk) -> None:
    desk.secrets.write_text(desk.secrets.read_text().replace("48396/tcp", "48396/tpc"))
    line = told(desk.ssh(acc.SERVER4, "true"))
    assert "expected a list of lists of port/protocol, tcp, udp or icmp as sequences of host number 1" in line
    assert desk.lab.knocks == 0


def test_no_file(desk: Desk) -> None:
    desk.secrets.unlink()
    assert f"{desk.secrets}: expected the file of secrets; there is none." in told(desk.ssh(acc.SERVER4, "true"))


def test_a_host_that_is_not_there(desk: Desk) -> None:
    line = told(desk.ssh(acc.ABSENT4, "true"))
    assert f"There is no way to web1 ({acc.ABSENT4}): No route to host." in line


@pytest.mark.parametrize(("option", "host"), [("-6", acc.SERVER4), ("-4", acc.SERVER6)])
def test_the_other_family(desk: Desk, option: str, host: str) -> None:
    desk.configure(desk.proxy(option))
    assert f"host: expected a name or an address that resolves; got '{host}'" in told(desk.ssh(host, "true"))
    desk.configure(desk.proxy("-4" if option == "-6" else "-6"))
    assert desk.ssh(host, "echo arrived").stdout == b"arrived\n"


def running(program: Path) -> list[int]:
    """The processes that were started with the helper among their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(program).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + ENOUGH
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture
def session(desk: Desk) -> subprocess.Popen[bytes]:
    """An ssh that has arrived, and goes on while its input does."""
    opened = subprocess.Popen(
        # What whoever runs the tests ignores, as nohup does with SIGHUP, would be ignored here, too.
        ["env", "--default-signal=HUP,TERM", "ssh", "-vvv", "-F", str(desk.config), acc.SERVER4, "cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(desk.folder / "told").open("wb"),
        bufsize=0,
    )
    assert opened.stdin is not None
    assert opened.stdout is not None
    opened.stdin.write(b"arrived\n")
    assert opened.stdout.read(8) == b"arrived\n"
    return opened


def test_nothing_of_a_sequence_shows(desk: Desk, session: subprocess.Popen[bytes]) -> None:
    with session:
        # ssh executes the helper in place of the shell, which executes Python.
        helpers = running(desk.program)
        assert len(helpers) == 1
        for number in helpers:
            for name in ("cmdline", "environ"):
                shown = (Path("/proc") / str(number) / name).read_bytes().replace(b"\0", b" ").decode(errors="replace")
                assert not acc.SECRETS.search(shown)
        session.communicate(timeout=ENOUGH)
    assert session.returncode == 0
    text = (desk.folder / "told").read_text()
    assert f"Executing proxy command: exec {desk.program} connect" in text
    assert not acc.SECRETS.search(text)
    wait_until(lambda: not running(desk.program))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_it_in_silence(desk: Desk, session: subprocess.Popen[bytes], number: int) -> None:
    with session:
        (helper,) = running(desk.program)
        os.kill(helper, number)
        session.communicate(timeout=ENOUGH)
    assert session.returncode == 255
    assert "Traceback" not in (desk.folder / "told").read_text()
    assert not running(desk.program)


def test_it_ends_with_an_ssh_that_was_killed(desk: Desk, session: subprocess.Popen[bytes]) -> None:
    with session:
        assert running(desk.program)
        session.kill()
    wait_until(lambda: not running(desk.program))
    assert "Traceback" not in (desk.folder / "told").read_text()


def test_a_connection_that_breaks_is_told(desk: Desk, session: subprocess.Popen[bytes]) -> None:
    with session:
        desk.lab.gate(extra=f"tcp sport {acc.PORT} reject with tcp reset")
        rule = f"tcp dport {acc.PORT} reject with tcp reset"
        desk.lab.inside("nft", "insert", "rule", "inet", "gate", "input", *rule.split())
        assert session.stdin is not None
        session.stdin.write(b"more\n")
        session.wait(timeout=ENOUGH)
    assert session.returncode == 255
    text = (desk.folder / "told").read_text()
    assert f"portknock: The connection to {acc.SERVER4} broke: Connection reset by peer." in text


def interpreter(version: str) -> str | None:
    """A Python of that version, on the path or among pyenv's."""
    candidates = [
        shutil.which(f"python{version}"),
        *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")),
    ]
    for candidate in filter(None, candidates):
        check = f"import sys; sys.exit(sys.version_info[:2] != {tuple(int(part) for part in version.split('.'))})"
        if subprocess.run([candidate, "-c", check], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


@pytest.mark.parametrize("version", ["3.9", f"3.{sys.version_info[1]}", "3.13"])
@pytest.mark.parametrize("option", ["", "-I"])
def test_with_nothing_but_python(desk: Desk, version: str, option: str) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    desk.configure(desk.proxy(python=f"{python} -S {option}"))
    content = os.urandom(300_000)
    finished = desk.ssh(acc.SERVER6, "cat", given=content)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, content, b"")
    desk.secrets.chmod(0o644)
    assert "Run: chmod 600" in told(desk.ssh(acc.SERVER6, "cat"))


def test_its_own_modules_come_first(desk: Desk) -> None:
    """Whatever collections this Python finds otherwise."""
    other = desk.folder / "other" / "ansible_collections"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise AssertionError('found')\n")
    desk.configure(f"env PYTHONPATH={other.parent} {desk.proxy()}")
    assert desk.ssh(acc.SERVER4, "echo arrived").stdout == b"arrived\n"


def without_our_connection(desk: Desk) -> Lab:
    """Ansible's own ssh, with one line more."""
    desk.lab.variables["ansible_connection"] = "ssh"
    desk.lab.variables["ansible_ssh_common_args"] = (
        f'-o ProxyCommand="{desk.program} connect --secrets {desk.secrets} --name {{{{ inventory_hostname }}}} %h %p"'
    )
    desk.lab.inventory()
    return desk.lab


def test_ansible_without_our_connection(desk: Desk) -> None:
    lab = without_our_connection(desk)
    outcome = lab.play(
        "- hosts: web1\n  tasks:\n"
        "    - raw: 'true'\n      loop: '{{ range(12) | list }}'\n"
        f"    - copy: {{content: some, dest: {lab.folder}/copied}}\n",
        "-vvv",
    )
    assert outcome.code == 0, outcome.output
    assert (lab.folder / "copied").read_text() == "some"
    assert outcome.ssh_calls > 12
    assert (lab.knocks, lab.count("connections")) == (1, 1)
    assert not acc.SECRETS.search(outcome.output)


def test_beside_our_connection(desk: Desk) -> None:
    """An administrator's own ssh_config has the helper: the connection knocks in its place, and never both."""
    # The helper would not get in.
    desk.program.write_text("#!/bin/sh\nexit 1\n")
    outcome = desk.lab.adhoc("-m", "raw", "-a", "true", ANSIBLE_SSH_ARGS=f"-F {desk.config}")
    assert outcome.code == 0, outcome.output
    # The look, and ssh's own.
    assert (desk.lab.knocks, desk.lab.count("connections")) == (1, 2)
    assert "WARNING" not in outcome.output


def test_beside_our_connection_without_a_keyring(desk: Desk) -> None:
    desk.lab.keep().unlink()
    outcome = desk.lab.adhoc("-m", "raw", "-a", "true", ANSIBLE_SSH_ARGS=f"-F {desk.config}")
    assert outcome.code == 0, outcome.output
    assert (desk.lab.knocks, desk.lab.count("connections")) == (1, 1)


@pytest.mark.parametrize("persist", [True, False])
def test_ansible_with_secrets_that_are_out_of_date(desk: Desk, persist: bool) -> None:
    desk.keep(acc.operator(acc.STALE))
    lab = without_our_connection(desk)
    # ssh hides what a ProxyCommand says while it makes a ControlPersist master, unless it runs with -v.
    control = "ControlMaster=auto -o ControlPersist=30s" if persist else "ControlMaster=no"
    outcome = lab.adhoc(
        *("-m", "raw", "-a", "true", "-e", f"ansible_ssh_verbosity={int(persist)}"),
        ANSIBLE_SSH_ARGS=f"-F none -o UserKnownHostsFile=/dev/null -o {control}",
    )
    assert "web1 | UNREACHABLE!" in outcome.output
    assert f"portknock: The knock did not open port 22 of web1 ({acc.SERVER4}): reset after " in outcome.output
    assert not acc.SECRETS.search(outcome.output)
