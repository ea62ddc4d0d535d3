# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is true of a host, seen from the client container: whether it lets in, and whom."""

from __future__ import annotations

import ipaddress
import json
import re
import subprocess
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from ansible.parsing.vault import VaultLib, VaultSecret
from hosts import TRIAL, WRITINGS, Host
from lab import FAMILIES, Fleet, differences

SSH = 22
# Back to back, then slower, as the tools do that get in.
GAPS = (0.0, 0.02, 0.1)
PROBER = Path(__file__).with_name("prober.py")
# A trial's lock may stay until the next boot.
_HARMLESS = ("/run/fleet-portknock", "/run/fleet-portknock/lock")
# The engine's own rules for its name server: other ports at each start.
_ENGINES = re.compile(r"^table ip nat \{\n.*?^\}\n", re.MULTILINE | re.DOTALL)
_POOL = 190


class Keyring:
    """The controller's secrets, read and written as anybody with the vault password could."""

    def __init__(self, fleet: Fleet) -> None:
        password = (fleet.directory / "vault-password").read_bytes().strip()
        self._vault = VaultLib([("default", VaultSecret(password))])
        self._folder = fleet.directory / "knock_keyring"

    def path(self, host: str) -> Path:
        return self._folder / f"{host}.yml"

    def read(self, host: str) -> dict[str, Any]:
        """The host's entry; empty where there is none."""
        text = self.backup(host)
        if text is None:
            return {}
        entry: dict[str, Any] = yaml.safe_load(self._vault.decrypt(text))
        return entry

    def write(self, host: str, entry: dict[str, Any]) -> None:
        self.restore(host, self._vault.encrypt(yaml.safe_dump(entry, sort_keys=False)))

    def backup(self, host: str) -> bytes | None:
        """The host's file as it is; None where there is none."""
        try:
            return self.path(host).read_bytes()
        except FileNotFoundError:
            return None

    def restore(self, host: str, content: bytes) -> None:
        new = self.path(host).with_suffix(".new")
        new.write_bytes(content)
        new.chmod(0o600)
        new.rename(self.path(host))

    def is_rotating(self, host: str) -> bool:
        """Whether an operator of the host has two sequences."""
        return any("next" in operator for operator in self.read(host)["operators"].values())

    def stage(self, host: str, former: int) -> str:
        """Which of a rotation's writings the host's entry is the outcome of; empty before the first.

        :param former: the entry's generation when the rotation began.
        """
        entry = self.read(host)
        written, noted, retired = WRITINGS
        between = [operator for operator in entry["operators"].values() if "next" in operator]
        if between:
            return noted if all("both_since" in operator for operator in between) else written
        return retired if entry["generation"] > former else ""

    def forget_rotations(self) -> None:
        """Let the next run begin a rotation, whatever was under way."""
        (self._folder / "rotations.json").unlink(missing_ok=True)

    def sequences(self, host: str) -> list[list[str]]:
        """Every sequence that could open: current and next of each operator."""
        return [
            operator[which]["knocks"]
            for operator in self.read(host).get("operators", {}).values()
            for which in ("current", "next")
            if operator.get(which)
        ]


class Hole(NamedTuple):
    """A time for which an un-knocked source got in, in seconds."""

    host: str
    length: float


class Judge:
    """The eyes outside."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.keyring = Keyring(fleet)
        self._net4 = ipaddress.IPv4Network(fleet.description["ipv4"])
        self._net6 = ipaddress.IPv6Network(fleet.description["ipv6"])
        self._turn = count()
        # The prober's own come last, and nobody ever knocks from there.
        pairs = [(str(self._net4[50 + index]), str(self._net6[((1 + index) << 64) + 16])) for index in range(_POOL + 1)]
        self._sources = {"ipv4": [four for four, _six in pairs], "ipv6": [six for _four, six in pairs]}
        added = [f"ip -4 addr replace {four}/{self._net4.prefixlen} dev eth0" for four, _six in pairs]
        added += [f"ip -6 addr replace {six}/{self._net6.prefixlen} dev eth0 nodad" for _four, six in pairs]
        subprocess.run(
            ["docker", "exec", "-i", fleet.client, "sh", "-e"], input="\n".join(added), text=True, check=True
        )

    def source(self, family: str) -> str:
        """An address that nobody has used for a while; over IPv6 in a /64 of its own."""
        return self._sources[family][next(self._turn) % _POOL]

    def plain(self, host: Host) -> dict[str, str]:
        """What a connection without any knock meets, by family."""
        addresses = self._fleet.hosts[host.name]
        steps: list[list[object]] = [["connect", self.source(family), addresses[family], SSH] for family in FAMILIES]
        return dict(zip(FAMILIES, self._fleet.outside(*steps), strict=True))

    def knocked(self, host: Host, family: str, sequences: Sequence[list[str]] | None = None) -> bool:
        """Whether any sequence, of the keyring unless given, gets a banner within a few tries."""
        address = self._fleet.hosts[host.name][family]
        for gap in GAPS:
            for knocks in self.keyring.sequences(host.name) if sequences is None else sequences:
                source = self.source(family)
                seen = self._fleet.outside(["knock", source, address, knocks, gap], ["connect", source, address, SSH])
                if seen[-1] == "open":
                    return True
        return False

    def reachable(self, host: Host) -> tuple[bool, bool]:
        """Whether the host can be reached over both families by whoever holds the keyring, and is open to anybody."""
        plain = self.plain(host)
        answers = [plain[family] == "open" or self.knocked(host, family) for family in FAMILIES]
        return all(answers), "open" in plain.values()

    def unrotated(self, host: Host, former: Sequence[list[str]]) -> list[str]:
        """What of a rotation that has come to its end is not as it should be.

        :param former: the sequences from before it.
        """
        sequences = self.keyring.sequences(host.name)
        found = []
        if len(sequences) != len(former):
            found.append("a rotation is under way still")
        if any(knocks in sequences for knocks in former):
            found.append("a former sequence is kept")
        for family in FAMILIES:
            if self.knocked(host, family, former):
                found.append(f"a former sequence opens over {family}")
            if not self.knocked(host, family):
                found.append(f"the new sequence does not open over {family}")
        return found

    def leftovers(self, host: Host) -> list[str]:
        """What a trial or a gate that isn't there any more has left behind."""
        found = []
        if host.has(TRIAL):
            found.append("a trial is left")
        units = host.execute("systemctl list-units --all --no-legend --plain '*portknock-rollback*'").split("\n")
        found += [f"unit {line.split()[0]} is left" for line in units if line.strip()]
        if not host.is_gated:
            found += differences(host.virgin, self.state(host))
        return found

    def state(self, host: Host) -> dict[str, str]:
        """Everything that the collection could have left on a host, without what may stay and what the engine does there."""
        state = self._fleet.state(host.name)
        kept = [line for line in state["run"].splitlines() if line not in _HARMLESS]
        return {**state, "ruleset": _ENGINES.sub("", state["ruleset"]), "run": "\n".join(kept)}


class Prober:
    """Connects without pause from sources that never knock, and says when it got in."""

    def __init__(self, fleet: Fleet, judge: Judge, hosts: list[Host]) -> None:
        targets = [
            [f"{host.name} {family}", judge._sources[family][_POOL], fleet.hosts[host.name][family], SSH]
            for host in hosts
            for family in FAMILIES
        ]
        self._process = subprocess.Popen(
            ["docker", "exec", "-i", fleet.client, "python3", "-u", "-c", PROBER.read_text()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(targets) + "\n")
        self._process.stdin.flush()
        self._process.stdout.readline()

    def end(self) -> list[Hole]:
        """Stop, and return what was seen; a hole that lasts to the end counts as one of an hour."""
        output, _none = self._process.communicate("\n", timeout=30)
        since: dict[str, float] = {}
        holes = []
        for line in output.splitlines():
            name, seconds, is_open = json.loads(line)
            if is_open:
                since[name] = seconds
            else:
                holes.append(Hole(name.split()[0], seconds - since.pop(name)))
        return holes + [Hole(name.split()[0], 3600.0) for name in since]
