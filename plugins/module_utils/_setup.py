# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What ``portknock install`` and ``portknock uninstall`` do: the helper's words for ``_client.py``.

Both are about the bundle in whose folder the program is, unpacked somewhere or installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import sys

from ansible_collections.fleet.portknock.plugins.module_utils._client import install, read_bundle, uninstall

_SHOWN = 5


def run_setup(options: argparse.Namespace) -> int:
    """Run one of the two; return its exit status.

    :raises PortknockError: it could not be done.
    """
    home = os.path.expanduser("~")
    place = os.path.dirname(os.path.realpath(sys.argv[0]))
    bundle = read_bundle(place)
    folder = bundle.manifest.folder
    where = f"~/.ssh/{folder}"
    if options.command == "uninstall":
        outcome = uninstall(folder, home)
        _say(f"Removed: {where}." if outcome.differences else f"Nothing to remove: there is no {where}.")
        if outcome.left:
            _say(f"Left in {where}, since they are not the bundle's: {', '.join(outcome.left)}.")
        return 0
    outcome = install(bundle, home, replace=options.replace)
    said = "Installed" if outcome.differences else "Nothing to change"
    names = bundle.hosts
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    _say(f"{said}: {where}, for the operator {bundle.manifest.operator} on {', '.join(names[:_SHOWN])}{more}.")
    _say(f"Now ssh gets in: ssh {names[0]}")
    if not os.path.samefile(place, os.path.join(home, ".ssh", folder)):
        _say(f"Delete {place} and the file that it came in: they hold the same secrets.")
    with contextlib.suppress(KeyError):
        # ssh does not ask the environment.
        known = pwd.getpwuid(os.geteuid()).pw_dir
        if os.path.realpath(known) != os.path.realpath(home):
            sys.stderr.write(
                f"portknock: ssh reads {known}/.ssh, and HOME is {home}: use ssh -F {home}/.ssh/{folder}/config.\n"
            )
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


__all__ = ("run_setup",)
