# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's host with a gate of iptables, whichever of its variants."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from ansible_collections.fleet.portknock.plugins.module_utils._backend_iptables import Iptables
from ansible_collections.fleet.portknock.plugins.module_utils._system import SEARCH_PATH, Completed
from netlab import Lab

COMMANDS = ("iptables", "ip6tables")
VARIANTS = [variant for variant in ("nft", "legacy") if shutil.which(f"xtables-{variant}-multi", path=SEARCH_PATH)]
# Where the loader looks for rules that somebody has saved.
_SAVED = "/etc/iptables/"


class IptablesLab(Lab):
    """A host that uses iptables.

    :param variant: ``nft`` or ``legacy``: what the name iptables stands for on it.
    :param ipset: whether the program ipset is there.
    """

    TEMPLATES = "iptables/{}.rules.j2"

    def __init__(self, variant: str, ipset: bool = True) -> None:
        super().__init__()
        self.has_ipset = ipset
        # What the host finds on its search path: its own variant before the machine's.
        self.bin = Path(tempfile.mkdtemp(prefix="fpk-bin-"))
        multi = shutil.which(f"xtables-{variant}-multi", path=SEARCH_PATH)
        assert multi
        for name in COMMANDS:
            for end in ("", "-save", "-restore"):
                (self.bin / f"{name}{end}").symlink_to(multi)
        if not ipset:
            (self.bin / "ipset").symlink_to("/bin/false")
        self.backend = Iptables(self.on_host)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.bin)

    def on_host(self, argv: Sequence[str], given: Optional[str] = None) -> Completed:
        """Runs programs as the module's runner does."""
        for former, new in ((f"PATH={SEARCH_PATH}", f"PATH={self.bin}:{SEARCH_PATH}"), (_SAVED, f"{self.bin}/")):
            given = given.replace(former, new) if given else given
        done = subprocess.run(
            ["ip", "netns", "exec", self.host.name, *argv],
            input=given or "",
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": f"{self.bin}:{SEARCH_PATH}", "LC_ALL": "C"},
        )
        return Completed(done.returncode, done.stdout, done.stderr)

    def command(self, *argv: str, given: Optional[str] = None) -> str:
        """Run a command on the host, with its own iptables."""
        done = self.on_host(argv, given)
        assert done.code == 0, (argv, done.stderr)
        return done.stdout

    def both(self, *arguments: str) -> None:
        """The same of both families."""
        for name in COMMANDS:
            self.command(name, *arguments)

    def gate(self, **options: Any) -> dict[str, Any]:
        """Load the gate as the module does; returns the model."""
        probe = {**self.backend.capabilities(), **options.pop("probe", {})}
        if not self.has_ipset:
            options.setdefault("guard", "strict")
        self.text, model = self.render(probe=probe, opener="iptables", **options)
        self.backend.load(self.text, self.backend.listing())
        return model

    def loader(self, what: str) -> int:
        """Run the gate's file as boot, watch and way back do; its exit code."""
        return self.on_host(["/bin/sh", "-s", what], self.backend.boot_text(self.text)).code

    def close_windows(self) -> None:
        for name in ("fpk-open-4", "fpk-open-6", "fpk-open-ll"):
            if self.has_ipset:
                self.command("ipset", "flush", name)
            elif not name.endswith("ll"):
                self.command("sh", "-c", f"echo / >/proc/net/xt_recent/{name}")
