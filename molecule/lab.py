# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A running test fleet as the tests see it: from the client outside, from inside the hosts, and by ansible-playbook."""

from __future__ import annotations

import contextlib
import difflib
import ipaddress
import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import testinfra  # type: ignore[import-untyped]
import yaml

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("ipv4", "ipv6")
SSH = 22
RUN_SECONDS = 300
GATE_TABLE = "fleet_portknock"
# Where a host, its package manager and Ansible itself come and go as they like.
PASSING = (
    *("/proc", "/sys", "/tmp", "/var/log", "/var/cache", "/var/lib/apt", "/var/lib/dpkg", "/var/lib/systemd"),
    *("*/.ansible", "*/__pycache__", "*/.sudo_as_admin_successful"),
)
# What packets have put into sets goes by itself: windows have a timeout of their own, records of openings a counter.
_WINDOWS = re.compile(r"^\s*elements = \{[^}]*\b(?:timeout|counter)\b[^}]*\}\n", re.MULTILINE)
_RECAP = re.compile(r"^(\S+)\s+: (.*)$", re.MULTILINE)


class Run(NamedTuple):
    """One ansible-playbook: its exit status, all of its output, and the recap's numbers for each host."""

    status: int
    output: str
    recap: dict[str, dict[str, int]]


class Stretch(NamedTuple):
    """When a port began to be open, in seconds since the epoch, and for how many seconds it was."""

    began: float
    seconds: float


class Watch(NamedTuple):
    """How often a port was tried, and when it was open, by host and family; filled in when the watch ends."""

    tries: dict[tuple[str, str], int]
    open: dict[tuple[str, str], list[Stretch]]


class Fleet:
    """The containers of one scenario, and everything that the run may know about them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.directory = ROOT / ".cache" / "fleet" / name
        self.description: dict[str, Any] = json.loads((self.directory / "fleet.json").read_text())
        self.hosts: dict[str, dict[str, str]] = self.description["hosts"]
        self.client: str = self.description["client"]["container"]
        self.inventory = self.directory / "inventory.yml"

    # Outside.

    @cached_property
    def sources(self) -> _Sources:
        return _Sources(self)

    def outside(self, *steps: list[object]) -> list[Any]:
        """Let the client do the steps of resources/outside.py, all in one go."""
        done = subprocess.run(
            ["docker", "exec", "-i", self.client, "python3", "-c", OUTSIDE],
            input=json.dumps(steps),
            capture_output=True,
            text=True,
            check=True,
        )
        results: list[Any] = json.loads(done.stdout)
        return results

    def judge(self, host: str, *addresses: str, ports: Sequence[int] = (22,), seconds: float = 5) -> list[str]:
        """What is wrong with a gate: a port that is not closed without the knock, or not open with it.

        :param addresses: where to look; the host's own address of each family unless given.
        :param seconds: how long an opening may take: sshd itself may just be starting.
        """
        problems = []
        for target in addresses or [self.hosts[host][family] for family in FAMILIES]:
            (source,) = self.sources.take("ipv6" if ":" in target else "ipv4")
            # A web server says nothing until it is asked.
            wanted = ["open" if port == SSH else "mute" for port in ports]
            seen = self.outside(
                *(["connect", source, target, port] for port in ports),
                ["knock", source, target, self.knocks(host)],
                *(["until", state, seconds, source, target, port] for state, port in zip(wanted, ports)),
            )
            for number, (port, state) in enumerate(zip(ports, wanted)):
                before, after = seen[number], seen[len(ports) + 1 + number]
                if before in ("open", "mute"):
                    problems.append(f"port {port} of {target} is {before} without the knock")
                if after != state:
                    problems.append(f"port {port} of {target} is {after} after the knock")
        return problems

    @contextlib.contextmanager
    def watched(self, *hosts: str, port: int = 22) -> Iterator[Watch]:
        """Look at a port of hosts from outside all the while, and know afterwards when it was open without a knock."""
        watch = Watch({}, {})
        stop = f"/tmp/stop-{random.getrandbits(64):x}"
        calls = {}
        for host in hosts:
            for family in FAMILIES:
                step = ["watch", stop, RUN_SECONDS, *self.sources.take(family), self.hosts[host][family], port]
                calls[host, family] = subprocess.Popen(
                    ["docker", "exec", "-i", self.client, "python3", "-c", OUTSIDE],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                print(json.dumps([step]), file=calls[host, family].stdin)
                cast(IO[str], calls[host, family].stdin).close()
        try:
            for call in calls.values():
                cast(IO[str], call.stdout).readline()
            yield watch
        finally:
            subprocess.run(["docker", "exec", self.client, "touch", stop], check=True)
            for place, call in calls.items():
                result = json.loads(cast(IO[str], call.stdout).read())[0]
                watch.tries[place] = result["tries"]
                watch.open[place] = [Stretch(*pair) for pair in result["open"]]
                call.wait()

    def scan(self, family: str, ports: str = "-") -> dict[str, dict[str, str]]:
        """nmap's view of tcp ports: for each host the ports that don't look like most others, and how most look."""
        by_address = {host[family]: name for name, host in self.hosts.items()}
        # Faster than this, nmap itself misses answers where the machine has few cores.
        argv = ["docker", "exec", self.client, "nmap", "-n", "-Pn", f"-p{ports}", "-T4", "--min-rate", "3000"]
        argv += ["-oG", "-", *(["-6"] if family == "ipv6" else []), *by_address]
        text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        seen: dict[str, dict[str, str]] = {}
        for address, listed, others in re.findall(
            r"^Host: (\S+) \(\)\tPorts: ([^\t\n]*)(?:\tIgnored State: (\w+) )?", text, re.MULTILINE
        ):
            seen[by_address[address]] = {**dict(re.findall(r"(\d+)/([a-z|]+)/tcp", listed)), "others": others}
        return seen

    # Inside: past the gate, so never a proof of what the gate does.

    def inside(self, host: str) -> Any:
        return testinfra.get_host(f"docker://{self.hosts[host]['container']}")

    def execute(self, host: str, script: str, check: bool = True) -> str:
        done = subprocess.run(
            ["docker", "exec", "-i", self.hosts[host]["container"], "sh", "-eu"],
            input=script,
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"on {host}: {done.stderr}")
        return done.stdout

    def succeeds(self, host: str, script: str) -> bool:
        argv = ["docker", "exec", self.hosts[host]["container"], "sh", "-euc", script]
        return subprocess.run(argv, capture_output=True, check=False).returncode == 0

    def state(self, host: str) -> dict[str, str]:
        """Everything that the collection could have left behind."""
        return {
            "ruleset": _WINDOWS.sub("", self.execute(host, "! command -v nft >/dev/null || nft -s list ruleset")),
            "files": self.execute(
                host,
                f"find / -xdev \\( {' -o '.join(f'-path {path!r}' for path in PASSING)} \\) -prune"
                " -o \\( -type f -o -type l -o -type d \\) -printf '%p %m %y\\n' | sort",
            ),
            "run": self.execute(host, "find /run -name '*portknock*' | sort"),
            "units": self.execute(host, "systemctl list-unit-files --no-legend --no-pager | sort"),
            "transient": self.execute(host, "systemctl list-units --all --no-legend '*portknock*'"),
        }

    def listening(self, host: str) -> set[str]:
        """Ports that something waits on, the engine's own name server among them."""
        lines = [line.split() for line in self.execute(host, "ss -Hlntu").splitlines()]
        return {f"{words[4].rpartition(':')[2]}/{words[0]}" for words in lines}

    def has_gate(self, host: str) -> bool:
        return GATE_TABLE in self.execute(host, "nft list tables")

    def restart(self, *hosts: str) -> None:
        """All hosts, or some."""
        containers = [self.hosts[host]["container"] for host in hosts or self.hosts]
        subprocess.run(["docker", "restart", "-t", "5", *containers], check=True, capture_output=True)

    def has_booted(self, host: str) -> bool:
        return self.execute(host, "systemctl is-system-running", check=False).strip() in ("running", "degraded")

    def wait_for_boot(self) -> None:
        for host in self.hosts:
            wait_until(partial(self.has_booted, host), 60, f"{host} has booted")

    # Ansible.

    def environment(self, **more: str) -> dict[str, str]:
        return {
            **os.environ,
            "ANSIBLE_CONFIG": str(self.directory / "ansible.cfg"),
            "ANSIBLE_HOME": str(ROOT / ".cache" / "ansible"),
            "ANSIBLE_NOCOLOR": "1",
            "PYTHONUNBUFFERED": "1",
            **more,
        }

    def command(self, playbook: str | Path, *arguments: str, inventory: Path | None = None) -> list[str]:
        return ["ansible-playbook", str(playbook), "-i", str(inventory or self.inventory), *arguments]

    def play(
        self,
        playbook: str | Path,
        *arguments: str,
        inventory: Path | None = None,
        variables: Mapping[str, object] | None = None,
        **environment: str,
    ) -> Run:
        argv = self.command(playbook, *arguments, inventory=inventory)
        if variables:
            argv += ["--extra-vars", json.dumps(variables)]
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.directory,
            env=self.environment(**environment),
            timeout=RUN_SECONDS,
            check=False,
        )
        return Run(done.returncode, done.stdout, recap_of(done.stdout))

    def kill_play_when(
        self,
        playbook: str | Path,
        happened: Callable[[], bool],
        variables: Mapping[str, object] | None = None,
        ending: signal.Signals = signal.SIGKILL,
    ) -> None:
        """Start ansible-playbook, and end the whole process group, as a terminal would, once something has happened."""
        argv = self.command(playbook, "--extra-vars", json.dumps(variables or {}))
        with (self.directory / "killed.log").open("w") as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env=self.environment(),
                start_new_session=True,
            )
            try:
                wait_until(happened, 60, "the play got so far", lambda: process.poll() is None)
            finally:
                os.killpg(process.pid, ending)
                process.wait(60)

    def write(self, name: str, content: object) -> Path:
        """A playbook or an inventory of the test's own, beside the fleet's."""
        path = self.directory / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return path

    # Secrets.

    def secrets(self, host: str) -> dict[str, Any]:
        """The host's keyring file, by the tool that anybody has."""
        path = self.directory / "knock_keyring" / f"{host}.yml"
        return _view(path, path.stat().st_mtime_ns, self.directory / "ansible.cfg")

    def knocks(self, host: str, operator: str = "default") -> list[str]:
        knocks: list[str] = self.secrets(host)["operators"][operator]["current"]["knocks"]
        return knocks

    def one_time(self, host: str, operator: str) -> dict[int, list[str]]:
        """An operator's one-time sequences, by id."""
        stock = self.secrets(host)["operators"][operator].get("one_time", {"sequences": {}})
        return {identity: knocks.split() for identity, knocks in stock["sequences"].items()}

    def keys(self, host: str, operator: str = "default") -> list[str]:
        """An operator's keys for single packet authorization: the cipher's and the HMAC's, in base64."""
        spa: str = self.secrets(host)["operators"][operator]["current"]["spa"]
        return spa.split(":")[1:]

    def leaks(self, text: str, *hosts: str) -> list[str]:
        """Which hosts' secrets a text gives away; of all hosts, or of some.

        One number may stand there by chance, as a process id or a size; a knock in full, two numbers of one sequence,
        or the seed may not.
        """
        numbers = set(re.findall(r"(?<![\w.])\d{4,5}(?![\w.])", text))
        found = []
        for host in hosts or self.hosts:
            secrets = self.secrets(host)
            for name, operator in secrets["operators"].items():
                close = [closing["knocks"] for closing in operator.get("close", ())]
                for knocks in (operator["current"]["knocks"], *close, *self.one_time(host, name).values()):
                    in_full = any(knock in text for knock in knocks)
                    if in_full or len(numbers & {knock.split("/")[0] for knock in knocks}) > 1:
                        found.append(host)
                if "spa" in operator["current"] and any(key in text for key in self.keys(host, name)):
                    found.append(host)
            if secrets["tripwires"]["seed"] in text:
                found.append(host)
        return found


class _Sources:
    """Addresses of the client's own: a fresh one for each attempt, so that no test sees what another left behind.

    Progress over IPv6 is keyed on the /64, so each attempt gets a /64.
    """

    def __init__(self, fleet: Fleet) -> None:
        # Where the last test run stopped is not known, so begin anywhere.
        self._next = random.randrange(200)
        self._turn = threading.Lock()
        self._client = fleet.client
        self._net4 = ipaddress.IPv4Network(fleet.description["ipv4"])
        self._net6 = ipaddress.IPv6Network(fleet.description["ipv6"])

    def take(self, family: str, count: int = 1) -> list[str]:
        """Addresses; with IPv6 all of them in one fresh /64."""
        with self._turn:
            first = self._next
            self._next += count
        if family == "ipv6":
            block = 1 + first % 255
            chosen = [f"{self._net6[(block << 64) + 16 + index]}" for index in range(count)]
            added = [f"ip -6 addr replace {address}/{self._net6.prefixlen} dev eth0 nodad" for address in chosen]
        else:
            chosen = [f"{self._net4[50 + (first + index) % 200]}" for index in range(count)]
            added = [f"ip -4 addr replace {address}/{self._net4.prefixlen} dev eth0" for address in chosen]
        subprocess.run(["docker", "exec", self._client, "sh", "-ec", "; ".join(added)], check=True, capture_output=True)
        return chosen


OUTSIDE = (ROOT / "molecule" / "resources" / "outside.py").read_text()


@lru_cache
def _view(path: Path, _changed: int, configuration: Path) -> dict[str, Any]:
    done = subprocess.run(
        ["ansible-vault", "view", str(path)],
        env={**os.environ, "ANSIBLE_CONFIG": str(configuration)},
        capture_output=True,
        text=True,
        check=True,
    )
    content: dict[str, Any] = yaml.safe_load(done.stdout)
    return content


def recap_of(output: str) -> dict[str, dict[str, int]]:
    """The numbers of a run's recap, for each host."""
    return {
        host: {key: int(number) for key, number in re.findall(r"(\w+)=(\d+)", rest)}
        for host, rest in _RECAP.findall(output)
    }


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """The lines in which two states of a host differ."""
    found = []
    for part, text in before.items():
        lines = difflib.unified_diff(text.splitlines(), after[part].splitlines(), lineterm="", n=0)
        found += [f"{part}: {line}" for line in lines if not line.startswith(("---", "+++", "@@"))]
    return found


def wait_until(
    happened: Callable[[], bool], seconds: float, what: str, still_worth_it: Callable[[], bool] = lambda: True
) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline or not still_worth_it():
            raise AssertionError(f"waited {seconds} s in vain until {what}")
        time.sleep(0.05)
