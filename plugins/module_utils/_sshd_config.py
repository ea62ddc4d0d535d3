# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""sshd's configuration as text: what is wanted, where it has to stand, and which line of which file wins over it.

What a value means is sshd's own to say (``sshd -T``): nothing here knows that ``2m`` is 120 or that a list of algorithms
may begin with a minus.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import shlex
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Optional, Sequence

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError

HEADER = "# Written by fleet.portknock. Changes made by hand are found and undone by its next run.\n"
_BEGIN, _END = "# fleet.portknock: begin", "# fleet.portknock: end"
# Says that the line break before it is ours, too.
_BEGIN_AFTER_BREAK = f"{_BEGIN} (after a line break)"
_BLOCK = re.compile(rf"(?:\n{re.escape(_BEGIN_AFTER_BREAK)}|^{_BEGIN})$.*?^{_END}$\n?", re.MULTILINE | re.DOTALL)
_KEYWORD = re.compile(r"[A-Za-z][A-Za-z0-9]*")
_LINE = re.compile(r"^\s*(?P<keyword>[A-Za-z][A-Za-z0-9]*)(?:\s*=\s*|\s+)(?P<value>\S.*?)\s*$")
# How sshd takes several values: one line each, or after commas; after blanks otherwise (sshd_config(5)).
_REPEATED = frozenset(
    (
        *("acceptenv", "allowgroups", "allowusers", "denygroups", "denyusers"),
        *("hostcertificate", "hostkey", "listenaddress", "port", "subsystem"),
    )
)
_COMMAS = frozenset(
    (
        *("casignaturealgorithms", "ciphers", "gssapikexalgorithms", "hostbasedacceptedalgorithms"),
        *("hostbasedacceptedkeytypes", "hostkeyalgorithms", "kexalgorithms", "macs"),
        *("pubkeyacceptedalgorithms", "pubkeyacceptedkeytypes"),
    )
)
# Keywords that sshd reads as another one: since OpenSSH 8.5 and 8.7.
_ALIASES = {
    "challengeresponseauthentication": "kbdinteractiveauthentication",
    "pubkeyacceptedkeytypes": "pubkeyacceptedalgorithms",
    "hostbasedacceptedkeytypes": "hostbasedacceptedalgorithms",
}
# Where one keyword stands for two in an older sshd, or has another name there.
_OLDER = {
    "kbdinteractiveauthentication": ("KbdInteractiveAuthentication", "ChallengeResponseAuthentication"),
    "pubkeyacceptedalgorithms": ("PubkeyAcceptedAlgorithms", "PubkeyAcceptedKeyTypes"),
}


class Directive(NamedTuple):
    """One line: sshd's keyword and its value as sshd reads it."""

    keyword: str
    value: str


class Match(NamedTuple):
    """An exception: the criteria after ``Match``, and the directives that hold there."""

    criteria: str
    directives: tuple[Directive, ...]


class Algorithms(NamedTuple):
    """Which algorithms a keyword is to have: the wanted ones, best first, and those for an sshd that offers none of them."""

    keyword: str
    wanted: tuple[str, ...]
    fallback: tuple[str, ...] = ()


class SshdSettings(NamedTuple):
    """What sshd is to be told.

    ``ours`` are left out where the installed sshd doesn't know them; ``given`` come from the user as they are, and win.
    """

    ours: tuple[Directive, ...]
    algorithms: tuple[Algorithms, ...]
    given: tuple[Directive, ...]
    without: frozenset[str]
    matches: tuple[Match, ...]


class Place(NamedTuple):
    """Where a keyword stands."""

    path: str
    line: int
    in_match: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line}{' (in a Match block)' if self.in_match else ''}"


Effective = Mapping[str, Sequence[str]]

_ROOT_LOGINS = ("yes", "prohibit-password", "forced-commands-only", "no")
# The directives that have a variable of their own, by its name less the role's prefix.
_SWITCHES = {
    "password_authentication": "PasswordAuthentication",
    "kbd_interactive_authentication": "KbdInteractiveAuthentication",
    "permit_empty_passwords": "PermitEmptyPasswords",
    "x11_forwarding": "X11Forwarding",
    "agent_forwarding": "AllowAgentForwarding",
}
_VALUES = {
    "max_auth_tries": "MaxAuthTries",
    "login_grace_time": "LoginGraceTime",
    "max_startups": "MaxStartups",
    "client_alive_interval": "ClientAliveInterval",
    "client_alive_count_max": "ClientAliveCountMax",
    "log_level": "LogLevel",
}
_ALGORITHMS = {
    "key_exchange_algorithms": "KexAlgorithms",
    "ciphers": "Ciphers",
    "macs": "MACs",
    "host_key_algorithms": "HostKeyAlgorithms",
    "public_key_algorithms": "PubkeyAcceptedAlgorithms",
}
# Nobody who has a key in place wants these otherwise, and some distributions' files say so already.
_ALWAYS = (
    Directive("PubkeyAuthentication", "yes"),
    Directive("HostbasedAuthentication", "no"),
    Directive("IgnoreRhosts", "yes"),
    Directive("StrictModes", "yes"),
    Directive("PermitUserEnvironment", "no"),
    Directive("PermitTunnel", "no"),
    Directive("GatewayPorts", "no"),
)
OPTION_PREFIX = "sshd_hardening_"


def settings_from(options: Mapping[str, object]) -> SshdSettings:
    """Check the role's variables.

    :param options: the variables by their names less the role's prefix.
    :raises PortknockError: names the variable, what was expected and what came.
    """

    def of(name: str) -> object:
        if name not in options:
            raise PortknockError(f"{OPTION_PREFIX}{name}: required; got nothing.")
        return options[name]

    root = of("permit_root_login")
    # YAML reads a bare no as false.
    root = {False: "no", True: "yes"}[root] if isinstance(root, bool) else str(root).lower()
    root = {"false": "no", "true": "yes", "without-password": "prohibit-password"}.get(root, root)
    if root not in _ROOT_LOGINS:
        raise PortknockError(
            f"{OPTION_PREFIX}permit_root_login: expected one of {', '.join(_ROOT_LOGINS)}; got {of('permit_root_login')!r}."
        )
    ours = [Directive("PermitRootLogin", root)]
    ours += [Directive(keyword, _switch(of(name), name)) for name, keyword in _SWITCHES.items()]
    ours += _ALWAYS
    for name, keyword in _VALUES.items():
        if of(name) is not None:
            ours.append(Directive(keyword, _value(of(name), OPTION_PREFIX + name)))
    classical = _names(of("classical_key_exchange_algorithms"), "classical_key_exchange_algorithms")
    allowed = _switch(of("classical_key_exchange"), "classical_key_exchange") == "yes"
    algorithms = []
    for name, keyword in _ALGORITHMS.items():
        wanted = _names(of(name), name)
        if name == "key_exchange_algorithms" and wanted:
            algorithms.append(Algorithms(keyword, (*wanted, *(classical if allowed else ())), classical))
        elif wanted:
            algorithms.append(Algorithms(keyword, wanted))
    given, without = directives_from(of("settings"), f"{OPTION_PREFIX}settings")
    return SshdSettings(
        ours=tuple(ours),
        algorithms=tuple(algorithms),
        given=given,
        without=without,
        matches=matches_from(of("match"), f"{OPTION_PREFIX}match"),
    )


def packed(settings: SshdSettings) -> dict[str, Any]:
    """The settings in a form that survives JSON."""
    return {**settings._asdict(), "without": sorted(settings.without)}


def unpacked(data: Mapping[str, Any]) -> SshdSettings:
    """What :func:`packed` made."""

    def directives(items: Sequence[Sequence[str]]) -> tuple[Directive, ...]:
        return tuple(Directive(*item) for item in items)

    return SshdSettings(
        ours=directives(data["ours"]),
        algorithms=tuple(Algorithms(name, tuple(wanted), tuple(rest)) for name, wanted, rest in data["algorithms"]),
        given=directives(data["given"]),
        without=frozenset(data["without"]),
        matches=tuple(Match(criteria, directives(items)) for criteria, items in data["matches"]),
    )


def wanted_value(settings: SshdSettings, keyword: str) -> Optional[str]:
    """What the settings want of a keyword outside of Match blocks; None where they leave it to sshd."""
    name = _canonical(keyword)
    if name in settings.without:
        return None
    for directive in (*settings.given, *settings.ours):
        if _canonical(directive.keyword) == name:
            return directive.value
    return None


def _switch(value: object, name: str) -> str:
    text = _value(value, OPTION_PREFIX + name).lower()
    if text not in ("yes", "no", "true", "false"):
        raise PortknockError(f"{OPTION_PREFIX}{name}: expected true or false; got {value!r}.")
    return "yes" if text in ("yes", "true") else "no"


def _names(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item for item in value):
        raise PortknockError(f"{OPTION_PREFIX}{name}: expected a list of algorithms; got {value!r}.")
    return tuple(value)


def directives_from(value: object, option: str) -> tuple[tuple[Directive, ...], frozenset[str]]:
    """Directives from a user's mapping of keywords, and the keywords (canonical, lower case) whose value is None.

    Lists become what sshd takes for several values, booleans ``yes`` and ``no``.

    :raises PortknockError: not a mapping, no keyword, or a value that a line of sshd's configuration can't hold.
    """
    if not isinstance(value, Mapping):
        raise PortknockError(
            f"{option}: expected a mapping from sshd's keywords to values; got {type(value).__name__}."
        )
    found: list[Directive] = []
    without = set()
    for keyword, item in value.items():
        name = str(keyword)
        if not _KEYWORD.fullmatch(name):
            raise PortknockError(f"{option}: expected a keyword of sshd_config(5); got {name!r}.")
        if name.lower() in ("match", "include"):
            raise PortknockError(
                f"{option}: expected a directive; got {name}, for which sshd_hardening_match is there, or a file of your own."
            )
        if item is None:
            without.add(_canonical(name))
            continue
        values = [_value(part, f"{option}: {name}") for part in (item if isinstance(item, (list, tuple)) else [item])]
        if not values:
            raise PortknockError(f"{option}: {name}: expected a value; got an empty list.")
        if name.lower() in _REPEATED:
            found += [Directive(name, text) for text in values]
        else:
            found.append(Directive(name, ("," if name.lower() in _COMMAS else " ").join(values)))
    return tuple(found), frozenset(without)


def matches_from(value: object, option: str) -> tuple[Match, ...]:
    """Match blocks from a user's list of mappings with ``criteria`` and ``settings``.

    :raises PortknockError: anything else.
    """
    if not isinstance(value, (list, tuple)):
        raise PortknockError(
            f"{option}: expected a list of mappings with criteria and settings; got {type(value).__name__}."
        )
    found = []
    for item in value:
        if not isinstance(item, Mapping) or set(item) != {"criteria", "settings"}:
            got = sorted(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
            raise PortknockError(f"{option}: expected a mapping with criteria and settings; got {got}.")
        criteria = _value(item["criteria"], f"{option}: criteria")
        directives, _without = directives_from(item["settings"], f"{option}: {criteria}")
        found.append(Match(criteria, directives))
    return tuple(found)


def _value(value: object, option: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (str, int)) or not str(value).strip():
        raise PortknockError(f"{option}: expected a text, a whole number or a boolean; got {value!r}.")
    if any(ord(character) < 32 for character in str(value)):
        raise PortknockError(f"{option}: expected one line; got {value!r}.")
    return str(value).strip()


def chosen_directives(
    settings: SshdSettings, known: Callable[[str], bool], offered: Mapping[str, Sequence[str]]
) -> tuple[Directive, ...]:
    """The directives for the sshd that is installed.

    :param known: whether sshd knows a keyword (in lower case).
    :param offered: for each keyword of the algorithms (in lower case) those that sshd offers.
    """
    chosen: list[Directive] = []
    given = {_canonical(directive.keyword) for directive in settings.given} | settings.without
    for directive in settings.ours:
        if _canonical(directive.keyword) not in given:
            names = _OLDER.get(directive.keyword.lower(), (directive.keyword,))
            chosen += [Directive(name, directive.value) for name in names if known(name.lower())]
    for choice in settings.algorithms:
        if _canonical(choice.keyword) in given:
            continue
        on_offer = offered[choice.keyword.lower()]
        names = _OLDER.get(choice.keyword.lower(), (choice.keyword,))
        name = next((name for name in names if known(name.lower())), None)
        algorithms = [item for item in choice.wanted if item in on_offer]
        algorithms = algorithms or [item for item in choice.fallback if item in on_offer]
        if name is not None and algorithms:
            chosen.append(Directive(name, ",".join(algorithms)))
    return (*chosen, *settings.given)


def as_text(directives: Sequence[Directive], matches: Sequence[Match] = ()) -> str:
    """The lines of a file or block."""
    lines = [f"{directive.keyword} {directive.value}" for directive in directives]
    for match in matches:
        lines += ["", f"Match {match.criteria}"]
        lines += [f"    {directive.keyword} {directive.value}" for directive in match.directives]
    return "\n".join([*lines, ""])


def includes(main: str, main_path: str, path: str) -> bool:
    """Whether the main configuration's text includes a file of that path for everybody, were it there."""
    for _number, keyword, value in _lines(main):
        if keyword == "match":
            return False
        if keyword == "include" and any(fnmatch.fnmatchcase(path, one) for one in _patterns(value, main_path)):
            return True
    return False


def with_blocks(main: str, directives: Sequence[Directive], matches: Sequence[Match]) -> str:
    """The main configuration with our settings first, where they win, and our exceptions last.

    A Match block ends at the next one or at the end of the file, so exceptions can't stand before other people's settings.
    """
    rest = without_blocks(main)
    first = f"{_BEGIN}\n{HEADER}{as_text(directives)}{_END}\n"
    if not matches:
        return first + rest
    begin = f"\n{_BEGIN_AFTER_BREAK}" if rest and not rest.endswith("\n") else _BEGIN
    return f"{first}{rest}{begin}\n{as_text((), matches).lstrip()}{_END}\n"


def without_blocks(main: str) -> str:
    """The main configuration without what :func:`with_blocks` added."""
    return _BLOCK.sub("", main)


def read_effective(text: str) -> dict[str, list[str]]:
    """The output of ``sshd -T``: the values of each keyword, in lower case."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        keyword, _blank, value = line.partition(" ")
        found.setdefault(keyword.lower(), []).append(value)
    return found


def overruled(wanted: Effective, effective: Effective, keywords: Sequence[str]) -> list[str]:
    """The keywords, in lower case, whose wanted values are not in effect.

    :param wanted: what sshd makes of our settings alone.
    :param effective: what it makes of the whole configuration.
    :param keywords: those that our settings name.
    """
    missing = []
    for keyword in dict.fromkeys(name.lower() for name in keywords):
        name = keyword if keyword in wanted else _canonical(keyword)
        if name not in wanted:
            continue  # sshd does not tell it
        ours, all_of_it = wanted[name], effective.get(name, ())
        if not set(ours) <= set(all_of_it) if name in _REPEATED else list(ours) != list(all_of_it):
            missing.append(keyword)
    return missing


def places(keyword: str, main_path: str, read: Callable[[str], Optional[str]], own: Sequence[str]) -> list[Place]:
    """Where a keyword stands in a configuration, in the order in which sshd reads it, but for our own lines.

    :param read: the text of a file.
    :param own: paths of our own files.
    """
    wanted = _canonical(keyword)
    return [
        Place(path, number, in_match)
        for path, number, name, in_match in _walk(main_path, read, set(own), False, 0)
        if _canonical(name) == wanted
    ]


def _walk(
    path: str, read: Callable[[str], Optional[str]], left_out: set[str], in_match: bool, depth: int
) -> Iterator[tuple[str, int, str, bool]]:
    # sshd itself goes 16 deep.
    if path in left_out or depth > 16:
        return
    # Blank lines in place of ours, so that numbers stay right.
    text = _BLOCK.sub(lambda block: "\n" * block.group().count("\n"), read(path) or "")
    for number, keyword, value in _lines(text):
        if keyword == "match":
            in_match = value.lower() != "all"
        elif keyword == "include":
            for pattern in _patterns(value, "/etc/ssh/sshd_config"):
                for name in sorted(glob.glob(pattern)):
                    yield from _walk(name, read, left_out, in_match, depth + 1)
        else:
            yield path, number, keyword, in_match


def _lines(text: str) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        found = _LINE.match(line)
        if found:
            yield number, found["keyword"].lower(), found["value"]


def _patterns(value: str, main_path: str) -> list[str]:
    try:
        words = shlex.split(value, comments=True)
    except ValueError:
        words = value.split()
    return [os.path.join(os.path.dirname(main_path), word) for word in words]


def _canonical(keyword: str) -> str:
    return _ALIASES.get(keyword.lower(), keyword.lower())


__all__ = (
    "HEADER",
    "OPTION_PREFIX",
    "Algorithms",
    "Directive",
    "Effective",
    "Match",
    "Place",
    "SshdSettings",
    "as_text",
    "chosen_directives",
    "directives_from",
    "includes",
    "matches_from",
    "overruled",
    "packed",
    "places",
    "read_effective",
    "settings_from",
    "unpacked",
    "wanted_value",
    "with_blocks",
    "without_blocks",
)
