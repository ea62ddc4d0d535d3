# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The gate as the kernel's own packet filter, opened by fwknopd: single packet authorization."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import Mapping, Optional, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._backend_nftables import Nftables
from ansible_collections.fleet.portknock.plugins.module_utils._backends import HostFile, files_of
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._system import write_text

_DAEMON = "/usr/sbin/fwknopd"
_OPENER_FILES = ("opener", "opener_settings", "open", "fwknopd_conf", "fwknop_access")
_OPENER = "fleet-portknock-opener.service"
_NOT_INSTALLED = 127
_MEMORY = "/run"
_GNUPG = ("gpg", "gpgconf", "gpg-agent")


class Fwknop(Nftables):
    """The gate of the kernel's own packet filter, for which a daemon writes down who may enter."""

    name = "fwknop"
    files: Mapping[str, HostFile] = files_of(*Nftables.files, *_OPENER_FILES, "opener_unit", "fwknop_off")
    units: Sequence[str] = (*Nftables.units, _OPENER)
    services: Sequence[str] = (*Nftables.services, _OPENER)
    opener: Optional[str] = _OPENER
    opener_files: Sequence[str] = _OPENER_FILES

    def missing_programs(self) -> list[str]:
        """Programs that have to be installed."""
        return super().missing_programs() + ([] if os.path.exists(_DAEMON) else ["fwknopd"])

    def capabilities(self) -> dict[str, bool]:
        """As with the back end nftables; what the rules need not do, the program that opens does.

        :raises PortknockError: something that the gate can't do without is refused.
        """
        return {**super().capabilities(), "clock": True, "ipv6": False, "counts": self._counts(), "gnupg": _has_gnupg()}

    def check(self, texts: Mapping[str, str]) -> None:
        """Let nft and the kernel check the rules, and fwknopd its settings.

        :raises PortknockError: some are refused; says which, never what, since the settings hold keys.
        """
        super().check(texts)
        # In memory, as far as that is root's.
        with tempfile.TemporaryDirectory(
            prefix="fleet-portknock-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None
        ) as folder:
            # Where it decrypts by GnuPG, it looks whether the folder is there.
            os.mkdir(os.path.join(folder, "gnupg"), 0o700)
            for name in ("fwknopd_conf", "fwknop_access"):
                text = texts[name].replace("{run}", folder).replace("{folder}", folder)
                write_text(os.path.join(folder, name), text, 0o600)
            done = self._run(
                [
                    *(_DAEMON, "-f", "--exit-parse-config"),
                    *("-c", os.path.join(folder, "fwknopd_conf"), "-a", os.path.join(folder, "fwknop_access")),
                ],
                None,
            )
        # A check of what is not installed yet is nft's alone.
        if done.code not in (0, _NOT_INSTALLED):
            raise PortknockError(
                "fwknopd.conf.j2, access.conf.j2: expected settings that fwknopd accepts; it refuses them (exit code "
                f"{done.code})."
            )


def _has_gnupg() -> bool:
    return all(shutil.which(program, path="/usr/bin:/bin") for program in _GNUPG)


__all__ = ("Fwknop",)
