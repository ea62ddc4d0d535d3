# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A gate that a daemon opens, in the namespaces of netlab: the role's own supervisor with the distribution's daemon."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional

from ansible_collections.fleet.portknock.plugins.module_utils._backends import CONFIG_FOLDER, FILES, back_end
from netlab import TABLE, Lab, wait_for

# How long a test waits for a daemon that has to start first; a knock is repeated until then.
SECONDS = 20.0


class Opener:
    """The supervisor at work in the host's namespace, with a folder of its own."""

    def __init__(self, lab: Lab, folder: Path, backend: str = "knockd") -> None:
        self.lab = lab
        self.folder = folder
        self.log = folder / "log"
        # What a daemon keeps between its lives.
        self.state = folder / "state"
        self._backend = back_end(backend)
        self._process: Optional[subprocess.Popen[bytes]] = None

    def gate(self, **options: Any) -> dict[str, Any]:
        """Load the gate, and write the supervisor's files."""
        model = self.lab.gate(opener=self._backend.name, **options)
        for name in self._backend.opener_files:
            file = FILES[name]
            self.write(os.path.basename(file.path), self.lab.rendered(file.template, model))
        return model

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text.replace(CONFIG_FOLDER, str(self.state)))
        (self.folder / name).chmod(0o600)

    def start(self) -> None:
        with self.lab.host.inside(), self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(self.folder / "opener.py"), str(self.folder)], stderr=log
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def daemons(self) -> dict[str, int]:
        """The daemons that run, by the interface that their command names."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                argv = (entry / "cmdline").read_bytes().split(b"\0")
                if parent == self.pid and b"-i" in argv:
                    found[argv[argv.index(b"-i") + 1].decode()] = int(entry.name)
        return found

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def stop(self, how: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """End every window."""
        for name in ("open4", "open6", "open_ll6"):
            self.lab.host.nft(f"flush set inet {TABLE} {name}\n")


def is_open_soon(lab: Lab, source: str, host: Optional[str] = None, seconds: float = 0.5) -> bool:
    """Whether the port opens within the time that a daemon and its command may take."""
    with contextlib.suppress(AssertionError):
        wait_for(lambda: lab.look(source, host=host) == "open", seconds, "an open port")
        return True
    return False


def knocks_open(lab: Lab, source: str, host: Optional[str] = None) -> bool:
    """Whether one knock opens."""
    lab.knock(source, host)
    return is_open_soon(lab, source, host)


def wait_until_open(lab: Lab, source: str, host: Optional[str] = None) -> None:
    """Knock until it opens."""
    wait_for(lambda: knocks_open(lab, source, host), SECONDS, f"the knock opens for {source}")
