# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The helper as one file that needs nothing but Python, made of the collection's own modules as they are.

To make it by hand, with any Python and without Ansible::

    python3 plugins/plugin_utils/_program.py >portknock && chmod 755 portknock
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path, PurePosixPath

_MODULES = (
    "_arrival",
    "_client",
    "_errors",
    "_gnupg",
    "_helper",
    "_helper_secrets",
    "_jump",
    "_jumped",
    "_knocking",
    "_ports",
    "_relay",
    "_setup",
    "_spa",
    "_system",
    "_usage",
)
_PACKAGE = "ansible_collections.fleet.portknock.plugins.module_utils"
_SHEBANG = b"#!/usr/bin/env python3\n"
_MAIN = f"""\
# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later

import signal
import sys

# An interrupted ssh leaves no traceback of Python's behind.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from {_PACKAGE}._helper import main

sys.exit(main())
"""
# The earliest time that a zip file can hold: the same modules make the same file.
_TIME = (1980, 1, 1, 0, 0, 0)
_UNIX = 3
_REGULAR_FILE = 0o100644


def helper_program() -> bytes:
    """Return the helper: a zip file with a first line that makes it a program.

    The sources in it are not compressed, so that any pager shows them. The same release gives the same bytes.
    """
    folder = Path(__file__).resolve().parents[1] / "module_utils"
    package = PurePosixPath(*_PACKAGE.split("."))
    files = {"__main__.py": _MAIN.encode()}
    # As proper packages: those of a namespace would give way to a collection that Python finds elsewhere.
    files.update((str(part / "__init__.py"), b"") for part in (package, *package.parents) if part.name)
    files.update((str(package / f"{name}.py"), (folder / f"{name}.py").read_bytes()) for name in _MODULES)
    content = io.BytesIO()
    content.write(_SHEBANG)
    with zipfile.ZipFile(content, "a", zipfile.ZIP_STORED) as archive:
        for path, text in files.items():
            entry = zipfile.ZipInfo(path, _TIME)
            entry.create_system = _UNIX
            entry.external_attr = _REGULAR_FILE << 16
            archive.writestr(entry, text)
    return content.getvalue()


if __name__ == "__main__":
    sys.stdout.buffer.write(helper_program())


__all__ = ("helper_program",)
