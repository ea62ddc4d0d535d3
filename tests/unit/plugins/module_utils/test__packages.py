# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which packages go, which stay, and what is said of them, with package managers that only pretend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Optional

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._packages import uninstall
from ansible_collections.fleet.portknock.plugins.module_utils._system import Completed

CONFFILES = "\n /etc/nftables.conf 11112222333344445555666677778888\n"
DPKG: Mapping[str, Completed] = {
    "dpkg-query --version": Completed(0, "", ""),
    "dpkg-query --show --showformat=${db:Status-Status}": Completed(0, "installed", ""),
    "dpkg-query --show --showformat=${Conffiles}": Completed(0, CONFFILES, ""),
    "md5sum --check": Completed(0, "", ""),
    "dpkg --no-act": Completed(0, "", ""),
    "env DEBIAN_FRONTEND=noninteractive dpkg": Completed(0, "", ""),
}
RPM: Mapping[str, Completed] = {
    "rpm --version": Completed(0, "", ""),
    "rpm --query": Completed(0, "", ""),
    "rpm --erase --test": Completed(0, "", ""),
    "rpm --erase --": Completed(0, "", ""),
}
IDLE: Mapping[str, Completed] = {
    "nft list tables": Completed(0, "", ""),
    "systemctl is-active": Completed(3, "inactive\n", ""),
    "systemctl is-enabled": Completed(1, "disabled\n", ""),
}


class Host:
    """Answers by the first words of a command line; what it does not know is not installed."""

    def __init__(self, answers: Mapping[str, Completed]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.read: list[Optional[str]] = []

    def __call__(self, argv: Sequence[str], stdin: Optional[str] = None) -> Completed:
        line = " ".join(argv)
        self.asked.append(line)
        self.read.append(stdin)
        fitting = [words for words in self.answers if line.startswith(words)]
        return self.answers[max(fitting, key=len)] if fitting else Completed(127, "", "")

    @property
    def removals(self) -> list[str]:
        return [line for line in self.asked if line.startswith(("env", "rpm --erase --")) and "--test" not in line]


def test_goes_with_its_configuration() -> None:
    host = Host({**DPKG, **IDLE})
    assert uninstall(["nftables"], False, host) == (("nftables",), ("nftables",), ())
    assert host.removals == ["env DEBIAN_FRONTEND=noninteractive dpkg --purge -- nftables"]
    assert "11112222333344445555666677778888  /etc/nftables.conf\n" in host.read


def test_changed_configuration_stays() -> None:
    host = Host({**DPKG, **IDLE, "md5sum --check": Completed(1, "", "")})
    assert uninstall(["nftables"], False, host).removed == ("nftables",)
    assert host.removals == ["env DEBIAN_FRONTEND=noninteractive dpkg --remove -- nftables"]


def test_a_check_removes_nothing() -> None:
    own = Completed(0, "table inet fleet_portknock\n", "")
    host = Host({**DPKG, **IDLE, "nft list tables": own})
    assert uninstall(["nftables"], True, host).removed == ("nftables",)
    assert host.removals == []
    # Outside of a check the gate would still be needed.
    assert uninstall(["nftables"], False, host).removed == ()


@pytest.mark.parametrize("status", ["config-files", "not-installed", ""])
def test_gone_already(status: str) -> None:
    known = "dpkg-query --show --showformat=${db:Status-Status}"
    host = Host({**DPKG, known: Completed(0 if status else 1, status, "")})
    assert uninstall(["nftables"], False, host) == (("nftables",), (), ())


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (
            {"nft list tables": Completed(0, "table ip nat\ntable inet f2b\n", "")},
            "the kernel has other tables, which may need it (table ip nat, table inet f2b)",
        ),
        ({"nft list tables": Completed(1, "", "no")}, "nft does not say whether other tables are loaded (exit code 1)"),
        ({"systemctl is-active": Completed(0, "active\n", "")}, "nftables.service is active"),
        ({"systemctl is-active": Completed(3, "activating\n", "")}, "nftables.service is activating"),
        (
            {"systemctl is-active": Completed(1, "", "no bus")},
            "nftables.service is in a state that systemctl does not tell",
        ),
        ({"systemctl is-enabled": Completed(0, "enabled\n", "")}, "nftables.service is enabled"),
        (
            {
                "dpkg --no-act": Completed(
                    1,
                    "",
                    "dpkg: dependency problems prevent removal of nftables:\n"
                    " firewalld depends on nftables.\n"
                    " sshguard depends on nftables (>= 0.9) | iptables.\n",
                )
            },
            "firewalld, sshguard would not work without it",
        ),
        ({"dpkg --no-act": Completed(2, "", "locked")}, "dpkg does not remove it (exit code 2)"),
        (
            {"env DEBIAN_FRONTEND=noninteractive dpkg": Completed(2, "", "locked")},
            "dpkg does not remove it (exit code 2)",
        ),
    ],
)
def test_stays(answers: Mapping[str, Completed], reason: str) -> None:
    host = Host({**DPKG, **IDLE, **answers})
    outcome = uninstall(["nftables"], False, host)
    assert outcome == ((), (), (f"The package nftables stays: {reason}.",))
    assert host.removals == [] or "env DEBIAN_FRONTEND=noninteractive dpkg" in answers


def test_what_keeps_nftables_keeps_no_other_package() -> None:
    active = {"systemctl is-active nftables": Completed(0, "active\n", "")}
    outcome = uninstall(["nftables", "knockd"], False, Host({**DPKG, **IDLE, **active}))
    assert outcome.removed == ("knockd",)
    assert outcome.kept == ("The package nftables stays: nftables.service is active.",)


def test_nft_that_is_gone_needs_no_package() -> None:
    host = Host({**DPKG, **IDLE, "nft list tables": Completed(127, "", "")})
    assert uninstall(["nftables"], False, host).removed == ("nftables",)


def test_rpm() -> None:
    host = Host({**RPM, **IDLE})
    assert uninstall(["nftables"], False, host).removed == ("nftables",)
    assert host.removals == ["rpm --erase -- nftables"]
    needed = Completed(
        1, "", "error: Failed dependencies:\n\tnftables is needed by (installed) firewalld-2.0-1.noarch\n"
    )
    host = Host({**RPM, **IDLE, "rpm --erase --test": needed})
    assert uninstall(["nftables"], False, host).kept == (
        "The package nftables stays: firewalld-2.0-1.noarch would not work without it.",
    )
    assert host.removals == []


def test_no_package_manager() -> None:
    with pytest.raises(PortknockError, match=r"\Aknock_server_remove_packages: expected dpkg or rpm on the host; "):
        uninstall(["nftables"], False, Host(IDLE))
