# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A closed host behind a jump host, which the gate knows by its own address: the connection and the helper."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import conftest as acc
from .conftest import Lab
from .test_helper import Desk, told

# Between here and the jump host, and between that and the closed host, where nothing leads from here.
OUTER4, JUMP4 = "198.18.78.1", "198.18.78.2"
INNER4, SERVER4 = "198.18.79.1", "198.18.79.2"
INNER6, SERVER6 = "fd5a:79::1", "fd5a:79::2"
BEHIND = [SERVER4, SERVER6]
FORWARD_ONLY, NO_SESSION, SECOND = 2201, 2202, 2203
NO_PERSIST = "-o ControlMaster=no -o ControlPath=none"
CHATTY = "Welcome to the jump host of nobody.\n"


class Jump:
    """The jump host: a namespace with an sshd that logs all that it can."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.namespace = f"{lab.namespace}j"
        self.folder = folder
        self.log = folder / "log"
        self.config = folder / "ssh_config"

    def inside(self, *command: str) -> str:
        return acc.run("ip", "netns", "exec", self.namespace, *command)

    @property
    def let_in(self) -> set[str]:
        """The sources whose window is open at the gate."""
        found = set()
        for name in ("open4", "open6"):
            listing = self.lab.inside("nft", "-j", "list", "set", "inet", "gate", name)
            (kept,) = (entry["set"] for entry in json.loads(listing)["nftables"] if "set" in entry)
            found |= {entry["elem"]["val"] for entry in kept.get("elem", [])}
        return found


def sshd_config(lab: Lab, folder: Path) -> str:
    lines = [
        *(f"Port {port}" for port in (acc.PORT, FORWARD_ONLY, NO_SESSION, SECOND)),
        *(f"HostKey {lab.key.parent}/host_key", f"AuthorizedKeysFile {lab.key}.pub", "StrictModes no", "UsePAM no"),
        *("PermitRootLogin yes", "PidFile none", "LogLevel DEBUG3", f"SetEnv HOME={folder}", "MaxStartups 200"),
        f"Match LocalPort {FORWARD_ONLY}",
        "ForceCommand echo This account is for forwarding only.; exit 1",
        f"Match LocalPort {NO_SESSION}",
        "MaxSessions 0",
    ]
    return "\n".join((*lines, ""))


def ssh_config(lab: Lab, *lines: str) -> str:
    """What reaches the jump host, by several names."""
    shared = [
        *("User root", f"IdentityFile {lab.key}", "IdentitiesOnly yes", "BatchMode yes", "LogLevel ERROR"),
        *("UserKnownHostsFile /dev/null", "StrictHostKeyChecking no", "ConnectTimeout 20", *lines),
    ]
    named = {
        "jump": acc.PORT,
        "forward-only": FORWARD_ONLY,
        "no-session": NO_SESSION,
        "second": SECOND,
        "nothing": 2299,
    }
    # By default ssh says why it ends; "LogLevel ERROR" leaves that out.
    hosts = [
        "Host no-session\n  LogLevel INFO",
        *(f"Host {name}\n  HostName {JUMP4}\n  Port {port}" for name, port in named.items()),
    ]
    return "\n".join((*hosts, "Host *", *(f"  {line}" for line in shared), ""))


@pytest.fixture(scope="module")
def running(machine: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jump]:
    jump = Jump(machine, tmp_path_factory.mktemp("jump"))
    # What a login's files say comes before all else; a shell that sshd starts reads this one.
    (jump.folder / ".bashrc").write_text(f"printf '{CHATTY}'\n".replace("\n'", "\\n'"))
    (jump.folder / "sshd_config").write_text(sshd_config(machine, jump.folder))
    links = [f"{machine.namespace[4:]}{end}" for end in ("ja", "jb", "jc", "jd")]
    outer, near, far, inner = (f"acc{name}" for name in links)
    with contextlib.ExitStack() as cleaning:
        acc.run("ip", "netns", "add", jump.namespace)
        cleaning.callback(acc.run, "ip", "netns", "delete", jump.namespace)
        acc.run("ip", "link", "add", outer, "type", "veth", "peer", "name", near, "netns", jump.namespace)
        acc.run("ip", "link", "add", far, "netns", jump.namespace, "type", "veth", "peer", "name", inner)
        acc.run("ip", "link", "set", inner, "netns", machine.namespace)
        acc.run("ip", "address", "add", f"{OUTER4}/29", "dev", outer)
        acc.run("ip", "link", "set", outer, "up")
        # Whatever is sent there from here is lost, and leaves this machine by no other way.
        acc.run("ip", "route", "add", "unreachable", f"{SERVER4.rpartition('.')[0]}.0/29")
        cleaning.callback(acc.run, "ip", "route", "delete", "unreachable", f"{SERVER4.rpartition('.')[0]}.0/29")
        acc.run("ip", "route", "add", "unreachable", f"{SERVER6[:-1]}/64")
        cleaning.callback(acc.run, "ip", "route", "delete", "unreachable", f"{SERVER6[:-1]}/64")
        for inside, device, addresses in (
            (jump.inside, near, [f"{JUMP4}/29"]),
            (jump.inside, far, [f"{INNER4}/29", f"{INNER6}/64"]),
            (machine.inside, inner, [f"{SERVER4}/29", f"{SERVER6}/64"]),
        ):
            for address in addresses:
                inside("ip", "address", "add", address, "dev", device, *(["nodad"] if ":" in address else []))
            inside("ip", "link", "set", device, "up")
        jump.inside("ip", "link", "set", "lo", "up")
        configuration = jump.folder / "sshd_config"
        cleaning.enter_context(acc.serving(jump.namespace, configuration, SECOND, "-E", str(jump.log)))
        yield jump


@pytest.fixture
def jump(lab: Lab, running: Jump) -> Jump:
    """The jump host; the lab's host is known by the address that only it reaches."""
    running.config.write_text(ssh_config(lab))
    running.log.write_text("")
    through(lab, "jump")
    return running


def through(lab: Lab, way: str, *options: str, host: str = SERVER4) -> None:
    """The inventory's one host is behind this way."""
    config = lab.folder / "ssh_config"
    config.write_text(ssh_config(lab))
    lab.variables |= {"ansible_host": host, "ansible_ssh_common_args": " ".join(("-J", way, *options))}
    text = (lab.folder / "ansible.cfg").read_text()
    (lab.folder / "ansible.cfg").write_text(text.replace("-F none", f"-F {config}"))
    lab.inventory()
    # An inventory's own line would win.
    (lab.folder / "hosts").write_text("web1\n")


@contextlib.contextmanager
def sampled(jump: Jump) -> Iterator[list[str]]:
    """The arguments and environments meanwhile of the jump host's processes, and of those started in the test's folder."""
    seen: set[str] = set()
    found: list[str] = []
    over = threading.Event()
    network = os.stat(f"/run/netns/{jump.namespace}").st_ino

    def look() -> None:
        while not over.is_set():
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit():
                    # It may end at any moment.
                    with contextlib.suppress(OSError):
                        if (
                            os.stat(entry / "ns" / "net").st_ino == network
                            or Path(os.readlink(entry / "cwd")) == jump.lab.folder
                        ):
                            for name in ("cmdline", "environ"):
                                seen.add((entry / name).read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            over.wait(0.005)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found += seen


@pytest.mark.parametrize("host", BEHIND)
def test_the_connection_knocks_from_there(lab: Lab, jump: Jump, host: str) -> None:
    through(lab, "jump", host=host)
    outcome = lab.play(
        "- hosts: web1\n  gather_facts: false\n  tasks:\n"
        "    - raw: echo $SSH_CONNECTION\n      register: seen\n"
        "    - debug: {var: seen.stdout}\n"
        "    - raw: 'true'\n      loop: '{{ range(5) | list }}'\n",
        "-vvv",
    )
    assert outcome.code == 0, outcome.output
    source = INNER6 if ":" in host else INNER4
    assert re.search(rf'"seen.stdout": "{source} ', outcome.output)
    # One for all, over a master; the look, and ssh's own.
    assert (lab.knocks, lab.count("connections"), jump.let_in) == (1, 2, {source})
    assert not acc.SECRETS.search(outcome.output)


def test_each_connection_without_a_master(lab: Lab, jump: Jump) -> None:
    outcome = lab.play(
        "- hosts: web1\n  gather_facts: false\n  tasks:\n    - raw: 'true'\n      loop: '{{ range(3) | list }}'\n",
        "-vvv",
        ANSIBLE_SSH_ARGS=f"-F {jump.config} {NO_PERSIST}",
    )
    assert outcome.code == 0, outcome.output
    # Only the first one is preceded by a look.
    assert (outcome.ssh_calls, lab.knocks, lab.count("connections")) == (3, 3, 4)


@pytest.mark.parametrize("persist", [True, False])
def test_a_knock_that_got_lost_is_made_good(lab: Lab, jump: Jump, persist: bool) -> None:
    """The second knock is lost on the way, so that what worked for the first connection fails for the next."""
    lab.gate(extra=f"tcp dport {acc.RIGHT[0].port} numgen inc mod 2 1 drop")
    forget = "; ".join(f"flush set inet gate {name}" for name in ("one4", "two4", "open4"))
    close = f"ip netns exec {lab.namespace} nft '{forget}'"
    # Once without a master at all, once with one that ends with what it was made for.
    outcome = lab.play(
        "- hosts: web1\n  gather_facts: false\n  tasks:\n"
        "    - raw: 'true'\n    - meta: reset_connection\n"
        f"    - command: {close}\n      delegate_to: localhost\n      connection: local\n"
        f"    - raw: echo ran >> {lab.folder}/log\n",
        "-vvv",
        **({} if persist else {"ANSIBLE_SSH_ARGS": f"-F {jump.config} {NO_PERSIST}"}),
    )
    assert outcome.code == 0, outcome.output
    assert (lab.folder / "log").read_text() == "ran\n"
    assert not acc.SECRETS.search(outcome.output)


def test_a_command_that_talks_like_ssh_runs_once(lab: Lab, jump: Jump) -> None:
    words = "stdio forwarding failed; kex_exchange_identification: Connection closed by remote host"
    outcome = lab.adhoc(
        *("-m", "raw", "-a", f"echo ran >> {lab.folder}/log; echo '{words}' >&2; exit 255"), ANSIBLE_SSH_USETTY="false"
    )
    assert (lab.folder / "log").read_text() == "ran\n", outcome.output


def test_a_single_use_gate(lab: Lab, jump: Jump) -> None:
    lab.keep(single_use=True)
    new = f"tcp dport {acc.PORT} tcp flags & (syn | ack) == syn"
    lab.gate(extra=f"{new} ip saddr @open4 delete @open4 {{ ip saddr }} counter name connections accept")
    outcome = lab.adhoc("-m", "raw", "-a", "echo arrived")
    assert "arrived" in outcome.output, outcome.output
    # The look uses up the first.
    assert (lab.knocks, lab.count("connections")) == (2, 2)


def test_a_chain(lab: Lab, jump: Jump) -> None:
    """The knock leaves from the last one."""
    through(lab, f"root@{JUMP4}:{acc.PORT},second")
    outcome = lab.adhoc("-m", "raw", "-a", "echo arrived")
    assert "arrived" in outcome.output, outcome.output
    assert (lab.knocks, jump.let_in) == (1, {INNER4})


def test_nothing_of_a_sequence_shows_there(lab: Lab, jump: Jump) -> None:
    with sampled(jump) as processes:
        outcome = lab.adhoc("-m", "raw", "-a", "true")
        assert outcome.code == 0, outcome.output
    # Of the jump host, and ssh's, which has the command as an argument of its own.
    assert {text.split()[0] for text in processes if "python3 -IBSc" in text} >= {"python3", "ssh"}
    assert [text for text in processes if acc.SECRETS.search(text)] == []
    log = jump.log.read_text()
    # It has logged what would tell, of the one connection that it made itself.
    assert f"{SERVER4} port {acc.PORT}" in log
    assert not acc.SECRETS.search(log)


@pytest.mark.parametrize("way", ["forward-only", "no-session"])
def test_a_jump_host_that_only_forwards(lab: Lab, jump: Jump, way: str) -> None:
    """As before there was any knocking from jump hosts: it gets in where the gate trusts the jump host."""
    through(lab, way)
    closed = lab.adhoc("-m", "raw", "-a", "true")
    assert "UNREACHABLE" in closed.output
    lab.gate(extra=f"ip saddr {INNER4} accept")
    outcome = lab.play(
        "- hosts: web1\n  gather_facts: false\n  tasks:\n    - raw: 'true'\n    - raw: 'true'\n",
        "-vvv",
        ANSIBLE_SSH_ARGS=f"-F {jump.config} {NO_PERSIST}",
    )
    assert outcome.code == 0, outcome.output
    text = " ".join(outcome.output.split())
    assert text.count("expected a shell there that runs `python3` of version 3.8 or newer; got ") == 1
    assert lab.knocks == 0
    # Asked once a run.
    assert jump.log.read_text().count("Accepted publickey") == 2 * 1 + 1 + 2


def test_turned_off(lab: Lab, jump: Jump) -> None:
    lab.gate(extra=f"ip saddr {INNER4} accept")
    outcome = lab.adhoc("-m", "raw", "-a", "true", "-e", "knock_from_jump=false")
    assert (outcome.code, lab.knocks) == (0, 0), outcome.output
    assert "WARNING" not in outcome.output


def test_a_jump_host_that_is_not_there(lab: Lab, jump: Jump) -> None:
    through(lab, "nothing")
    outcome = lab.adhoc("-m", "raw", "-a", "true", "-v")
    assert "UNREACHABLE" in outcome.output
    assert "No knock: The jump host nothing can't be reached: ssh: connect to host" in outcome.output


class JumpDesk(Desk):
    """A person's machine; the helper jumps."""

    def __init__(self, lab: Lab, jump: Jump) -> None:
        self.jump = jump
        super().__init__(lab)

    def behind(self, way: str, *options: str) -> None:
        # ssh's configuration knows the jump host, too, which is not to go by the helper.
        proxy = self.proxy("--jump", way, "-F", str(self.jump.config), *options)
        self.configure(proxy)


@pytest.fixture
def desk(lab: Lab, jump: Jump) -> JumpDesk:
    return JumpDesk(lab, jump)


@pytest.mark.parametrize("host", BEHIND)
@pytest.mark.parametrize("way", ["jump", f"root@{JUMP4}:{acc.PORT},second"])
def test_the_helper(desk: JumpDesk, host: str, way: str) -> None:
    desk.behind(way)
    finished = desk.ssh(host, "echo $SSH_CONNECTION")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.decode().split()[0] == (INNER6 if ":" in host else INNER4)
    assert finished.stderr == b""
    # The connection that saw the port open is the one that ssh gets.
    assert (desk.lab.knocks, desk.lab.count("connections")) == (1, 1)


def test_the_helper_finds_the_way_in_its_file(desk: JumpDesk) -> None:
    content = json.loads(desk.secrets.read_text())
    content["format"] = 2
    content["hosts"]["web1"] |= {"jump": "jump", "hostname": SERVER4}
    desk.secrets.write_text(json.dumps(content))
    desk.configure(desk.proxy("-F", str(desk.jump.config)))
    assert desk.ssh("web1", "echo arrived").stdout == b"arrived\n"
    assert desk.jump.let_in == {INNER4}
    # From here there is a way to the other address only.
    desk.configure(desk.proxy("--jump", "none"))
    assert desk.ssh(acc.SERVER4, "echo arrived").stdout == b"arrived\n"
    assert desk.jump.let_in == {INNER4, acc.CLIENT4}


def test_much_through_the_helper(desk: JumpDesk) -> None:
    desk.behind("jump")
    content = bytes(range(256)) * 40_000
    finished = desk.ssh(SERVER4, "cat", given=content)
    assert (finished.returncode, finished.stdout == content) == (0, True), finished.stderr


def test_nothing_of_the_helpers_sequence_shows(desk: JumpDesk) -> None:
    desk.behind("jump")
    with sampled(desk.jump) as processes:
        assert desk.ssh(SERVER4, "echo arrived").stdout == b"arrived\n"
    assert any(f"{desk.program} connect" in text for text in processes)
    assert [text for text in processes if acc.SECRETS.search(text)] == []
    assert not acc.SECRETS.search(desk.jump.log.read_text())


@pytest.mark.parametrize("way", ["forward-only", "no-session"])
def test_the_helper_says_what_the_jump_host_can_not(desk: JumpDesk, way: str) -> None:
    desk.behind(way)
    finished = desk.ssh(SERVER4, "true")
    assert finished.returncode == 255
    assert f"portknock: The jump host {way} " in told(finished)
    assert desk.lab.knocks == 0


def test_the_helper_with_secrets_that_are_out_of_date(desk: JumpDesk) -> None:
    desk.keep(acc.operator(acc.STALE))
    desk.behind("jump", "--timeout", "3")
    line = told(desk.ssh(SERVER4, "true"))
    assert line.startswith(f"portknock: The knock did not open port 22 of web1 ({SERVER4}): reset after ")


def test_a_session_ends_at_both_ends(desk: JumpDesk) -> None:
    """What was started on the jump host goes when ssh does, and ssh when the host does."""
    desk.behind("jump")
    for ending in ("ssh", "host"):
        session = subprocess.Popen(
            ["ssh", "-F", str(desk.config), SERVER4, "echo $PPID; cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with session:
            assert session.stdout is not None
            served_by = session.stdout.readline().decode().strip()
            assert waiting()
            if ending == "ssh":
                session.kill()
            else:
                acc.run("kill", "-KILL", served_by)
            session.wait(timeout=60)
        until = time.monotonic() + 60
        while waiting():
            assert time.monotonic() < until, ending
            time.sleep(0.02)


def waiting() -> list[str]:
    """The processes that the helper has started on the jump host."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(b"python3\0-IBSc"):
                found.append(entry.name)
    return found
