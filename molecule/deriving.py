# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A secret from which every sequence of the fleet comes, what it opens, and what gives it away."""

from __future__ import annotations

import re
import secrets
import subprocess

from ansible_collections.fleet.portknock.plugins.module_utils._derivation import derive_sequence
from lab import FAMILIES, Fleet

SITE = "fleet.portknock.site"
GENERATIONS = (1, 2, 3, 4)
OPENS = dict.fromkeys(FAMILIES, ("reset", "open"))
STAYS_CLOSED = dict.fromkeys(FAMILIES, ("reset", "reset"))


class Deriving:
    """One secret, and one of the fleet's hosts."""

    def __init__(self, fleet: Fleet, host: str) -> None:
        self.fleet = fleet
        self.host = host
        self.secret = secrets.token_hex(32)
        # What a service of the host waits on is in what is found there, whatever else it is used for.
        self.live = ""

    def encrypted_secret(self) -> str:
        """A file of variables, as the fleet's vault keeps it."""
        done = subprocess.run(
            ["ansible-vault", "encrypt", "--output", "-"],
            input=f"knock_secret: {self.secret}\n",
            env=self.fleet.environment(),
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout

    def sequence(self, generation: int) -> list[str]:
        return [str(knock) for knock in derive_sequence(self.secret, self.host, generation=generation)]

    def check(self, output: str) -> None:
        """Nothing of the secret and of any generation is in what a run showed."""
        numbers = set(re.findall(r"(?<![\w.])\d{4,5}(?![\w.])", output))
        for number in GENERATIONS:
            knocks = [knock for knock in self.sequence(number) if knock != self.live]
            assert not any(knock in output for knock in knocks)
            # One may stand there by chance, as a process id or a size.
            assert len(numbers & {knock.partition("/")[0] for knock in knocks}) < 2
        assert self.secret not in output

    def opens(self, generation: int) -> dict[str, tuple[str, str]]:
        """How the port looks without and with a generation's knock, from a source of its own for each family."""
        seen = {}
        for family in FAMILIES:
            (source,), target = self.fleet.sources.take(family), self.fleet.hosts[self.host][family]
            before, _knocked, after = self.fleet.outside(
                ["connect", source, target, 22],
                ["knock", source, target, self.sequence(generation)],
                ["connect", source, target, 22],
            )
            seen[family] = (before, after)
        return seen
