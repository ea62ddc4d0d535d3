# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where ssh would really go.

Only ssh itself knows: aliases, Match blocks and canonical names live in its configuration. ``ssh -G`` prints the
outcome without connecting.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._helper import jump_of
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import FAMILIES

# What ssh replaces in a ProxyJump; -G prints it as it is written.
_TOKEN = re.compile("%.")
# The helper, where something else, such as an interpreter, may begin it.
_HELPER = re.compile(r"(?:^|/)portknock$")


@dataclass(frozen=True)
class Destination:
    """What ssh would connect to.

    ``host`` is the name or address after ssh's configuration, ``family`` any, inet or inet6. ``proxied`` is True where
    a ProxyJump or ProxyCommand stands between, so that this machine's packets would come from the wrong address; ``jump`` is
    that ProxyJump, or empty. ``instead`` is an option that ssh has to be given first for all this to be so, where its
    configuration runs our helper, which would knock again; or empty. ``source`` is ssh's BindAddress and ``control_path`` its
    ControlPath, or None. ``user`` logs in.
    """

    host: str
    port: int
    family: str = "any"
    proxied: bool = False
    source: str | None = None
    control_path: str | None = None
    user: str = ""
    jump: str = ""
    instead: str = ""


def ssh_arguments(option: Callable[[str], Any]) -> list[str]:
    """The arguments that decide where core's ssh connection goes, in its order.

    :param option: reads an option of the connection plugin, such as its ``get_option``.
    """
    arguments = shlex.split(option("ssh_args") or "")
    if option("port") is not None:
        arguments += ["-o", f"Port={option('port')}"]
    if option("remote_user"):
        arguments += ["-o", f'User="{option("remote_user")}"']
    for name in ("ssh_common_args", "ssh_extra_args"):
        arguments += shlex.split(option(name) or "")
    return arguments


def configuration_file(arguments: Sequence[str]) -> str | None:
    """The configuration file that ssh's arguments name, which is all of them that ssh tells to a jump host's ssh, too."""
    chosen = None
    for index, argument in enumerate(arguments):
        if argument.startswith("-F"):
            chosen = argument[2:] or next(iter(arguments[index + 1 :]), None)
    return chosen


def locate(executable: str, arguments: Sequence[str], host: str, timeout: float) -> Destination:
    """Ask ssh where it would go.

    :param timeout: seconds; ssh's configuration may run commands (``Match exec``).
    :raises PortknockError: ssh could not be run, refused the arguments, or said something unexpected.
    """
    try:
        finished = subprocess.run(
            [executable, "-G", *arguments, "--", host],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as exc:
        raise PortknockError(f"ssh_executable: expected {executable!r} to answer -G; got {exc}.") from exc
    if finished.returncode != 0:
        lines = finished.stderr.strip().splitlines() or [f"return code {finished.returncode}"]
        raise PortknockError(f"ssh_executable: expected {executable!r} to answer -G; got {lines[-1]!r}.")
    found, command = read_configuration(finished.stdout)
    tokens = {"%%": "%", "%h": found.host, "%n": host, "%p": str(found.port), "%r": found.user}

    def expanded(text: str) -> str:
        return _TOKEN.sub(lambda token: tokens.get(token[0], token[0]), text)

    return _past_helper(replace(found, jump=expanded(found.jump)), expanded(command))


def _past_helper(found: Destination, command: str) -> Destination:
    """The same way without our own helper, where that is all that a ProxyCommand runs."""
    try:
        words = shlex.split(command)
        place = next((index for index, word in enumerate(words[:-1]) if _HELPER.search(word)), None)
        if place is None or words[place + 1] != "connect":
            return found
        jump = jump_of(words[place + 1 :])
    except (ValueError, PortknockError):
        # What the helper itself will have to say of that is for ssh's error.
        return found
    instead = f"ProxyJump={jump}" if jump else "ProxyCommand=none"
    return replace(found, proxied=bool(jump), jump=jump, instead=instead)


def read_configuration(text: str) -> tuple[Destination, str]:
    """Read the output of ``ssh -G``: where it goes, and its ProxyCommand, empty for none.

    :raises PortknockError: no host name or no port in it.
    """
    settings: dict[str, str] = {}
    for line in text.splitlines():
        keyword, _unused_blank, value = line.partition(" ")
        settings.setdefault(keyword.lower(), value.strip())

    def given(keyword: str) -> str | None:
        value = settings.get(keyword, "")
        return value if value and value.lower() != "none" else None

    host, port, family = given("hostname"), settings.get("port", ""), settings.get("addressfamily", "any")
    if host is None or not port.isdigit() or family not in FAMILIES:
        raise PortknockError("ssh_executable: expected hostname, port and addressfamily from -G; got something else.")
    destination = Destination(
        host=host,
        port=int(port),
        family=family,
        proxied=given("proxyjump") is not None or given("proxycommand") is not None,
        source=given("bindaddress"),
        control_path=given("controlpath"),
        user=settings.get("user", ""),
        jump=given("proxyjump") or "",
    )
    return destination, given("proxycommand") or ""


__all__ = ("Destination", "configuration_file", "locate", "read_configuration", "ssh_arguments")
