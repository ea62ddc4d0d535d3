# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host of the fault test: its calls are counted, and one of them can be stopped or made to fail.

What the driver reads and writes while a run is under way, it does through the container's root under ``/proc``, so that
watching costs the host nothing.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lab import Fleet, wait_until

WRAPPER = Path(__file__).with_name("wrapper.sh")
PROGRAMS = ("nft", "systemctl", "systemd-run")
# Fleet.state passes by /var/cache; it outlives a restart.
FAULTS = "var/cache/faults"
TRIAL = "run/fleet-portknock/trial"
CONFIRMED = "etc/fleet-portknock/gate.rules"
BOOT_SECONDS = 60
# Somebody else's rules, which come back at boot by themselves. They decide nothing, but are there to be counted.
NEIGHBOUR = """\
table inet neighbour {
  set known { type ipv4_addr; flags interval; elements = { 192.0.2.0/24, 198.51.100.7 } }
  chain input { type filter hook input priority filter; policy accept; ip saddr @known tcp dport 9 drop; }
}
"""
NEIGHBOUR_UNIT = """\
[Unit]
DefaultDependencies=no
Before=sysinit.target
[Service]
Type=oneshot
ExecStart=/usr/sbin/nft -f /etc/neighbour.nft
[Install]
WantedBy=sysinit.target
"""


class Step(NamedTuple):
    """A place in a run: just before the ``turn``-th call of its kind in a phase, or, with no call, after all of them."""

    phase: str
    call: str = ""
    turn: int = 1

    @property
    def label(self) -> str:
        which = f" ({self.turn})" if self.turn > 1 else ""
        return f"{self.phase}: {self.call}{which}" if self.call else self.phase


# What the controller writes into the keyring during a rotation, in this order; each is a step of its own, which begins when it
# is there to be read.
WRITINGS = ("new sequence written", "both noted", "former retired")


class Call(NamedTuple):
    """One call of a program: its number, the process that made it, and what that is."""

    number: int
    process: int
    caller: str
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        return self.words[0]

    @property
    def label(self) -> str:
        program, *rest = self.words
        if program == "systemd-run":
            return program
        if program == "systemctl":
            return f"systemctl {next((word for word in rest if not word.startswith('-')), '')}".strip()
        return " ".join([program, *(word for word in rest if word not in ("table", "-") and "/" not in word)])


class Host:
    """One container."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.fleet = fleet
        self.name = name
        self.image: str = fleet.hosts[name]["image"]
        self.container: str = fleet.hosts[name]["container"]
        # By how many seconds its clock can be stepped; 0 where it can't be.
        self.clock_step = 0
        # Numbers of the steps in an undisturbed run, by the kind of play.
        self.steps: dict[str, dict[Step, int]] = {}
        self.virgin: dict[str, str] = {}
        self.find()

    # The container.

    def find(self) -> None:
        """Look up where the container's files are now: each start has another first process."""
        pid = _docker("inspect", "-f", "{{.State.Pid}}", self.container).strip()
        self.root = Path(f"/proc/{pid}/root")
        self.namespaces = pid

    def execute(self, script: str, check: bool = True) -> str:
        return self.fleet.execute(self.name, f"PATH=/usr/sbin:/usr/bin:/sbin:/bin\n{script}", check)

    def power_loss(self) -> None:
        self.disarm()
        # Their processes' numbers will be others'.
        (self.root / FAULTS / "calls").unlink(missing_ok=True)
        _docker("kill", "-s", "KILL", self.container)
        _docker("start", self.container)
        self.find()

    def wait_for_boot(self) -> None:
        wait_until(
            lambda: self.execute("systemctl is-system-running", check=False).strip() in ("running", "degraded"),
            BOOT_SECONDS,
            f"{self.name} has booted",
        )

    def kill(self, *processes: int) -> None:
        self.execute(f"kill -KILL {' '.join(map(str, processes))}", check=False)

    def set_link(self, state: str) -> None:
        """Plug the host's cable in or out, on this machine's side."""
        index = (self.root / "sys/class/net/eth0/iflink").read_text().strip()
        links = [Path(entry) for entry in Path("/sys/class/net").iterdir()]
        device = next(link.name for link in links if (link / "ifindex").read_text().strip() == index)
        subprocess.run(["ip", "link", "set", "dev", device, state], check=True)

    # What is there.

    def has(self, path: str) -> bool:
        return os.path.exists(self.root / path)

    @property
    def is_gated(self) -> bool:
        return self.has(CONFIRMED)

    def has_table(self) -> bool:
        return "table inet fleet_portknock" in self.execute("nft list tables").splitlines()

    def neighbour(self) -> str:
        return self.execute("nft -s list table inet neighbour", check=False)

    # Steps.

    def prepare(self) -> None:
        """Put the wrappers and the neighbour's rules in place."""
        folder = self.root / FAULTS
        folder.mkdir(mode=0o700, exist_ok=True)
        for program in PROGRAMS:
            target = self.root / "usr/local/sbin" / program
            target.write_bytes(WRAPPER.read_bytes())
            target.chmod(0o755)
        (self.root / "etc/neighbour.nft").write_text(NEIGHBOUR)
        (self.root / "etc/systemd/system/neighbour.service").write_text(NEIGHBOUR_UNIT)
        self.execute("systemctl --quiet enable neighbour.service; systemctl start neighbour.service")

    def arm(self, number: int = 0, action: str = "hold") -> None:
        """Count calls from now on, and stop the one with this number (0: none) or let it fail."""
        folder = self.root / FAULTS
        for name in ("on", "count", "calls", "armed", "reached", "go"):
            (folder / name).unlink(missing_ok=True)
        if number:
            (folder / "armed").write_text(f"{number} {action}\n")
        (folder / "on").touch()

    def disarm(self) -> None:
        with contextlib.suppress(OSError):
            (self.root / FAULTS / "on").unlink(missing_ok=True)

    def reached(self) -> list[int]:
        """The processes that made the call that was stopped, none where none was."""
        with contextlib.suppress(OSError, ValueError):
            return [int(word) for word in (self.root / FAULTS / "reached").read_text().split()]
        return []

    def go_on(self, word: str = "run") -> None:
        """Let the stopped call go on, or (``die``) end without doing anything."""
        with contextlib.suppress(OSError):
            new = self.root / FAULTS / "go.new"
            new.write_text(f"{word}\n")
            new.rename(self.root / FAULTS / "go")

    def calls(self) -> list[Call]:
        try:
            lines = (self.root / FAULTS / "calls").read_text().splitlines()
        except OSError:
            return []
        return [
            Call(int(number), int(process), caller, tuple(words))
            for number, process, caller, *words in (line.split() for line in lines)
        ]

    def is_running(self, process: int) -> bool:
        return self.has(f"proc/{process}")


def steps_of(calls: Sequence[Call], phases: Sequence[str]) -> dict[Step, int]:
    """The steps of a run that was not disturbed, with the numbers of their calls.

    After each of the module's calls there is a step in which the controller is at work, or has done; its number is that of
    the last call before it.

    :param phases: names of the module's calls, in their order; the script that goes back is called ``way back``.
    """
    order = list(dict.fromkeys(call.process for call in calls if call.caller == "module"))
    seen: dict[tuple[str, str], int] = {}
    steps = {}
    for call in calls:
        phase = "way back"
        if call.caller == "module":
            phase = phases[min(order.index(call.process), len(phases) - 1)]
        key = (phase, call.label)
        seen[key] = seen.get(key, 0) + 1
        steps[Step(phase, call.label, seen[key])] = call.number
    last = {step.phase: number for step, number in steps.items() if step.phase in phases}
    return {**steps, **{Step(f"after {phase}"): number for phase, number in last.items()}}


def _docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True).stdout
