# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One ansible-playbook that can be killed with all that it started."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab import ROOT, RUN_SECONDS, Fleet, Run, recap_of

_MARK = "FAULTS_RUN"
# The rule that opens: without it the gate loads and looks as it should, and lets nobody in.
_OPENING = "    update @open{{ name }} { {{ open }} timeout {{ gate.open_window }}s }\n"
# A cut cable is noticed in seconds; strategy free, so that a host that waits is waited for by nobody.
_ENVIRONMENT = {
    "ANSIBLE_STRATEGY": "free",
    "ANSIBLE_TIMEOUT": "5",
    "ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=60s -o ServerAliveInterval=2 -o ServerAliveCountMax=2",
}


class Play:
    """A run of a playbook for some hosts; those in ``broken`` get a gate that never opens."""

    def __init__(
        self,
        fleet: Fleet,
        kind: str,
        hosts: Sequence[str],
        broken: Sequence[str] = (),
        trials: Mapping[str, tuple[int, ...]] | None = None,
        collections: Path | None = None,
    ) -> None:
        playbook = {"remove": "fleet.portknock.remove", "rotate": "fleet.portknock.rotate"}.get(
            kind, "fleet.portknock.site"
        )
        variables: dict[str, object] = {
            "knock_server_templates": f"{{{{ '{broken_templates(fleet)}' if inventory_hostname in {list(broken)!r}"
            " else role_path ~ '/templates' }}"
        }
        if kind in ("change", "broken"):
            # Larger than what it takes the place of, so that a disk that is full has no room for it.
            variables.update(knock_server_step_timeout=3, knock_server_tripwires=3000)
        if kind == "rotate":
            # One rotation, whichever of the hosts a play is limited to.
            variables.update(portknock_serial="100%", knock_server_rotation_scope="the fault test")
        if trials:
            # A rotation has retired, or not, when it comes to its second change.
            turn = "-1 if _knock_server_finished is defined else 0"
            variables["knock_server_confirm_timeout"] = f"{{{{ {dict(trials)!r}[inventory_hostname][{turn}] }}}}"
        mark = secrets.token_hex(8)
        self._mark = f"{_MARK}={mark}".encode()
        self.log = fleet.directory / f"play-{mark}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    *fleet.command(playbook, "--limit", ",".join(hosts), "--forks", str(len(hosts))),
                    *("--extra-vars", json.dumps(variables)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=fleet.directory,
                env=fleet.environment(
                    **_ENVIRONMENT,
                    **({"ANSIBLE_COLLECTIONS_PATH": str(collections)} if collections else {}),
                    **{_MARK: mark},
                ),
            )
        self._deadline = time.monotonic() + RUN_SECONDS

    @property
    def is_over(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> Run:
        """Until it is over, within bounds."""
        try:
            status = self._process.wait(max(1.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            status = -signal.SIGKILL
        output = self.log.read_text(errors="replace")
        return Run(status, output, recap_of(output))

    def kill(self) -> None:
        """SIGKILL for the playbook, its workers and their ssh: all that carry the run's mark, whatever session they are in."""
        # At once: whoever gives the workers their tasks.
        self._process.kill()
        while marked := [process for process in _processes() if self._mark in _environment(process)]:
            for process in marked:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self._process.poll()
        self._process.wait()


def broken_templates(fleet: Fleet) -> Path:
    """A copy of the role's templates that lacks the rule that opens."""
    folder = fleet.directory / "broken-templates"
    if not folder.exists():
        shutil.copytree(ROOT / "roles/knock_server/templates", folder)
        gate = folder / "nftables/knocks.nft.j2"
        text = gate.read_text()
        assert text.count(_OPENING) == 1, "the templates open otherwise than this test knows"
        gate.write_text(text.replace(_OPENING, ""))
    return folder


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _environment(process: int) -> list[bytes]:
    """A process's environment; nothing of one that is gone or has become a zombie."""
    try:
        return Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
