# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What can enforce a gate on the host: the back ends by name, what each is able to do, and every file that one may have.

A back end is a folder of the role's templates and a class in a module of its own. The class says how the texts are checked,
loaded, compared with what the kernel has, and taken away again; keeping them, trying them out, going back and changing from
one back end to another is the same for all.
"""

from __future__ import annotations

from typing import Any, Iterable, Mapping, NamedTuple, Optional, Protocol, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._nft import Opening, Source
from ansible_collections.fleet.portknock.plugins.module_utils._ports import (
    GNUPG,
    KNOCK_PROTOCOLS,
    PROTOCOLS,
    SEQUENCE,
    SPA,
)
from ansible_collections.fleet.portknock.plugins.module_utils._procnet import Peer
from ansible_collections.fleet.portknock.plugins.module_utils._system import Runner
from ansible_collections.fleet.portknock.plugins.module_utils._system import run as run_program

CONFIG_FOLDER = "/etc/fleet-portknock"
UNIT_FOLDER = "/etc/systemd/system"


class HostFile(NamedTuple):
    """A file that a gate consists of: the template that makes it, where it lies on the host, and its mode.

    The template is named from the role's folder of templates on. A mode without rights for others than root means that the
    file may hold secrets. ``beside`` is what the program that reads it writes, which goes with it.
    """

    template: str
    path: str
    mode: int
    beside: str = ""


class Abilities(NamedTuple):
    """What the controller has to know of a back end before it knows the host.

    ``opener`` is what watches for knocks: ``kernel`` where the gate's own rules do. ``one_time`` says whether it can use a
    sequence up, ``protocols`` what knocks it sees, ``close_sequence`` whether another sequence can shut a window,
    ``input_policy`` whether it can close all other ports, ``mode`` what opens it: a sequence, or one packet, ``single_use``
    whether a window can let one connection through, ``length`` how many knocks a sequence has unless it is told.
    """

    opener: str
    one_time: bool
    protocols: Sequence[str]
    close_sequence: bool = False
    input_policy: bool = False
    mode: str = SEQUENCE
    single_use: bool = True
    length: int = 4


BACK_ENDS: Mapping[str, Abilities] = {
    "nftables": Abilities("kernel", one_time=True, protocols=KNOCK_PROTOCOLS, close_sequence=True, input_policy=True),
    "iptables": Abilities(
        "iptables", one_time=False, protocols=KNOCK_PROTOCOLS, close_sequence=True, input_policy=True, single_use=False
    ),
    # Easier to guess: the role's default says the same.
    "knockd": Abilities("knockd", one_time=True, protocols=PROTOCOLS, close_sequence=True, input_policy=True, length=6),
    "fwknop": Abilities("fwknop", one_time=False, protocols=PROTOCOLS, input_policy=True, mode=SPA),
}
# In the order in which they are written. The gate comes last: it alone is what a reboot brings back, and it has the same path
# whatever enforces it, so that a change of the back end has one moment, too. A key means the same file to all who have it.
FILES: Mapping[str, HostFile] = {
    "closed": HostFile("nftables/closed.nft.j2", f"{CONFIG_FOLDER}/closed.nft", 0o600),
    "closed_rules": HostFile("iptables/closed.rules.j2", f"{CONFIG_FOLDER}/closed.rules", 0o600),
    "load": HostFile("common/load.sh", f"{CONFIG_FOLDER}/load.sh", 0o700),
    # Lists of xt_recent hold as many sources as the kernel's module is told when it is loaded.
    "recent_limit": HostFile("iptables/modprobe.conf.j2", "/etc/modprobe.d/fleet-portknock.conf", 0o644),
    "watch": HostFile("nftables/watch.py", f"{CONFIG_FOLDER}/watch.py", 0o700),
    "stock": HostFile("nftables/stock.py", f"{CONFIG_FOLDER}/stock.py", 0o700),
    "unit": HostFile("common/fleet-portknock.service.j2", f"{UNIT_FOLDER}/fleet-portknock.service", 0o644),
    "sets_unit": HostFile(
        "iptables/fleet-portknock-sets.service.j2", f"{UNIT_FOLDER}/fleet-portknock-sets.service", 0o644
    ),
    "watch_unit": HostFile(
        "common/fleet-portknock-watch.service.j2", f"{UNIT_FOLDER}/fleet-portknock-watch.service", 0o644
    ),
    "opener": HostFile("opener/opener.py", f"{CONFIG_FOLDER}/opener.py", 0o700),
    "opener_settings": HostFile("opener/opener.json.j2", f"{CONFIG_FOLDER}/opener.json", 0o600),
    "open": HostFile("opener/open.sh.j2", f"{CONFIG_FOLDER}/open.sh", 0o700),
    "opener_unit": HostFile(
        "opener/fleet-portknock-opener.service.j2", f"{UNIT_FOLDER}/fleet-portknock-opener.service", 0o644
    ),
    "knockd_conf": HostFile("knockd/knockd.conf.j2", f"{CONFIG_FOLDER}/knockd.conf", 0o600),
    # Debian's own unit is not to run beside: it begins with the sequences that everybody knows.
    "knockd_off": HostFile("opener/off.conf.j2", f"{UNIT_FOLDER}/knockd.service.d/fleet-portknock.conf", 0o644),
    "fwknopd_conf": HostFile("fwknop/fwknopd.conf.j2", f"{CONFIG_FOLDER}/fwknopd.conf", 0o600),
    "fwknop_access": HostFile(
        "fwknop/access.conf.j2", f"{CONFIG_FOLDER}/access.conf", 0o600, f"{CONFIG_FOLDER}/fwknop.replays"
    ),
    "fwknop_off": HostFile("opener/off.conf.j2", f"{UNIT_FOLDER}/fwknop-server.service.d/fleet-portknock.conf", 0o644),
    "gate": HostFile("nftables/gate.nft.j2", f"{CONFIG_FOLDER}/gate.rules", 0o600),
}
# The units that boot starts, and those of them that go on running.
SERVICES = ("fleet-portknock-watch.service", "fleet-portknock-opener.service")
UNITS = ("fleet-portknock.service", "fleet-portknock-sets.service", *SERVICES)
# The unit that the opener of a gate on trial runs as: nothing of it is on disk.
OPENER_ON_TRIAL = "fleet-portknock-opener-trial.service"


def mode_of(name: str, spa_keys: str) -> str:
    """What a gate of this back end is opened with.

    :param spa_keys: the kind of keys that packets have.
    :raises PortknockError: keys of GnuPG's for a back end without packets.
    """
    mode = BACK_ENDS[name].mode
    if spa_keys != GNUPG:
        return mode
    if mode != SPA:
        able = ", ".join(other for other, abilities in BACK_ENDS.items() if abilities.mode == SPA)
        raise PortknockError(
            f"knock_server_spa_keys: expected symmetric unless the back end is opened by one packet ({able}); got gnupg with "
            f"{name}."
        )
    return GNUPG


class BackEnd(Protocol):
    """What :class:`GateHost` asks of a back end.

    ``kernel`` names the part of the kernel that its rules live in: where two have the same one, what the one has loaded is the
    other's to replace, open windows and all.
    """

    name: str
    kernel: str
    program: str
    # By their keys in FILES.
    files: Mapping[str, HostFile]
    # The key of what is loaded where the gate itself does not load.
    closed: str
    # The units that boot starts, and those of them that go on running.
    units: Sequence[str]
    services: Sequence[str]
    # The service that opens the gate where the kernel's rules don't, and the keys of the files that it runs with. The first is
    # its program, whose argument is the folder that they are all in.
    opener: Optional[str]
    opener_files: Sequence[str]

    def version(self) -> Optional[str]:
        """Version of its program; None where it isn't installed."""

    def missing_programs(self) -> list[str]:
        """Programs that have to be installed."""

    def capabilities(self) -> dict[str, bool]:
        """Which of the optional ways this host can go.

        :raises PortknockError: something that the gate can't do without is refused.
        """

    def notes(self, capabilities: Mapping[str, bool]) -> list[str]:
        """What the user has to know of what this host can't do, in sentences."""

    def left_behind(self) -> list[str]:
        """What others have kept of its rules that harms once these are gone, in sentences."""

    def check(self, texts: Mapping[str, str]) -> None:
        """Let the host's own checker read the texts, without loading them.

        :raises PortknockError: some are refused; says where, never what.
        """

    def boot_text(self, text: str) -> str:
        """What is kept on disk of the gate's text."""

    def body(self, boot_text: str) -> Optional[str]:
        """The text inside :meth:`boot_text`, or None where it isn't one."""

    def listing(self) -> Optional[dict[str, Any]]:
        """What the kernel has of the gate; None where it has nothing.

        :raises PortknockError: that can't be told.
        """

    def kernel_text(self) -> Optional[str]:
        """What the kernel has as a text that can be loaded again; None where there is none."""

    def accepts(self, text: str) -> bool:
        """Whether the host would load what is kept on disk (see :meth:`boot_text`)."""

    def digests(self, listing: dict[str, Any]) -> dict[str, str]:
        """What the kernel has, apart from what comes and goes in it: a digest of each part."""

    def load(self, text: str, listing: Optional[dict[str, Any]]) -> None:
        """Put the text in place of what is loaded, open at no instant; open windows and records of openings stay.

        :raises PortknockError: it is refused; then nothing has changed.
        """

    def unload(self) -> None:
        """Take the gate out of the kernel.

        :raises PortknockError: the kernel refuses it.
        """

    def arm(self, texts: Mapping[str, str]) -> None:
        """Let one-time sequences open, where the loaded gate has any.

        :raises PortknockError: they can't.
        """

    def arm_command(self, root: str = "") -> str:
        """Shell command that does so after the former gate was loaded again; it succeeds whether or not they can be."""

    def restore_command(self, path: str) -> str:
        """Shell command that loads a kept text (see :meth:`boot_text`)."""

    def unload_text(self) -> str:
        """What :meth:`restore_command` loads to leave nothing."""

    def unload_command(self) -> str:
        """Shell command that leaves nothing."""

    def forgetting(self, text: str) -> str:
        """The text as :meth:`load` takes it, for a load that leaves no record of openings."""

    def close_window(self, peer: Peer) -> None:
        """End the open window of one source, where it has one."""

    def windows(self, listing: Mapping[str, Any]) -> set[Source]:
        """The sources that have an open window."""

    def openings(self, listing: Mapping[str, Any]) -> list[Opening]:
        """Who opened the gate from where."""

    def stock(self, text: str, root: str = "") -> dict[str, Any]:
        """How many one-time sequences of the gate's text are left, as ``stock.py`` reports it; empty where there are none."""

    def one_time_operators(self, text: str) -> dict[str, str]:
        """The operators with one-time sequences in a gate's text: names by numbers."""


def files_of(*keys: str, **others: HostFile) -> dict[str, HostFile]:
    """A back end's files, in the order in which they are written: those of FILES, or others in the place of some of them."""
    return {key: others.get(key, file) for key, file in FILES.items() if key in keys or key in others}


def check_name(name: object) -> str:
    """Return the name of a back end.

    :raises PortknockError: there is none of that name.
    """
    if not isinstance(name, str) or name not in BACK_ENDS:
        raise PortknockError(f"knock_server_backend: expected one of {', '.join(BACK_ENDS)}; got {name!r}.")
    return name


def check_seen(name: str, protocols: Iterable[str], option: str = "knock_server_sequence_protocols") -> None:
    """Check that a back end sees knocks of these protocols.

    :param option: what gave them.
    :raises PortknockError: it does not; says which ones do.
    """
    seen = BACK_ENDS[check_name(name)].protocols
    unseen = sorted({*protocols} - {*seen})
    if unseen:
        able = [other for other, abilities in BACK_ENDS.items() if {*unseen} <= {*abilities.protocols}]
        raise PortknockError(
            f"{option}: expected {' or '.join(seen)} with knock_server_backend={name}; got {', '.join(unseen)}, which "
            f"{' and '.join(able) or 'no back end'} can see."
        )


def back_end(name: str, run: Runner = run_program) -> BackEnd:
    """The back end of that name.

    :raises PortknockError: there is none.
    """
    check_name(name)
    if name == "fwknop":
        from ansible_collections.fleet.portknock.plugins.module_utils._backend_fwknop import Fwknop

        return Fwknop(run)
    # Not before: what a host does not use need not be compiled there.
    if name == "knockd":
        from ansible_collections.fleet.portknock.plugins.module_utils._backend_knockd import Knockd

        return Knockd(run)
    if name == "iptables":
        from ansible_collections.fleet.portknock.plugins.module_utils._backend_iptables import Iptables

        return Iptables(run)
    from ansible_collections.fleet.portknock.plugins.module_utils._backend_nftables import Nftables

    return Nftables(run)


__all__ = (
    "BACK_ENDS",
    "CONFIG_FOLDER",
    "FILES",
    "OPENER_ON_TRIAL",
    "SERVICES",
    "UNITS",
    "UNIT_FOLDER",
    "Abilities",
    "BackEnd",
    "HostFile",
    "back_end",
    "check_name",
    "check_seen",
    "files_of",
    "mode_of",
)
