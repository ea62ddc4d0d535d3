# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The back end knockd: the daemon watches for knocks, and its command opens the same table as the back end nftables has."""

from __future__ import annotations

import os
from typing import Mapping, Optional, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._backend_nftables import Nftables
from ansible_collections.fleet.portknock.plugins.module_utils._backends import HostFile, files_of

_DAEMON = "/usr/sbin/knockd"
_OPENER_FILES = ("opener", "opener_settings", "open", "knockd_conf")
_OPENER = "fleet-portknock-opener.service"


class Knockd(Nftables):
    """A gate that the kernel closes and a daemon opens."""

    name = "knockd"
    files: Mapping[str, HostFile] = files_of(*Nftables.files, *_OPENER_FILES, "opener_unit", "knockd_off")
    units: Sequence[str] = (*Nftables.units, _OPENER)
    services: Sequence[str] = (*Nftables.services, _OPENER)
    opener: Optional[str] = _OPENER
    opener_files: Sequence[str] = _OPENER_FILES

    def missing_programs(self) -> list[str]:
        """Programs that have to be installed."""
        return super().missing_programs() + ([] if os.path.exists(_DAEMON) else ["knockd"])

    def capabilities(self) -> dict[str, bool]:
        """As with the back end nftables; what the rules need not do, the program that opens does.

        :raises PortknockError: something that the gate can't do without is refused.
        """
        # The option that leaves IPv6 out came with IPv6.
        ipv6 = "--only-ip-v4" in self._run([_DAEMON, "--help"], None).stdout
        return {**super().capabilities(), "one_time": True, "clock": True, "ipv6": ipv6, "counts": self._counts()}


__all__ = ("Knockd",)
