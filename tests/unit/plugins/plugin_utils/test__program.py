# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The helper as one file."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from ansible_collections.fleet.portknock.plugins.module_utils import _knocking
from ansible_collections.fleet.portknock.plugins.plugin_utils import _program
from ansible_collections.fleet.portknock.plugins.plugin_utils._program import helper_program

PACKAGE = "ansible_collections.fleet.portknock.plugins.module_utils"
SOURCES = Path(_knocking.__file__).parent


def modules() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(helper_program())) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_sources_are_the_collections_own_and_can_be_read() -> None:
    shown = {PurePosixPath(name).name: text for name, text in modules().items() if text}
    del shown["__main__.py"]
    assert {name: (SOURCES / name).read_bytes() for name in shown} == shown
    program = helper_program()
    assert program.startswith(b"#!/usr/bin/env python3\n")
    for text in shown.values():
        assert text in program


def test_it_needs_the_standard_library_only() -> None:
    here = {name[: -len(".py")].replace("/", ".") for name in modules()}
    for text in modules().values():
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name in here or name.split(".")[0] in sys.stdlib_module_names
    used = {
        node.module
        for text in modules().values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom)
    }
    carried = {name for name in here if name.rpartition(".")[2].startswith("_") and name.startswith(f"{PACKAGE}._")}
    assert carried - used == {f"{PACKAGE}.__init__"}


def test_the_same_modules_make_the_same_file(tmp_path: Path) -> None:
    """Wherever, whenever and by whichever user it is made."""
    made = subprocess.run(
        [sys.executable, "-I", "-S", _program.__file__], cwd=tmp_path, umask=0o077, capture_output=True, check=True
    )
    assert made.stdout == helper_program()
    with zipfile.ZipFile(io.BytesIO(made.stdout)) as archive:
        # What a zip file takes from the machine and the moment unless told otherwise.
        assert {(entry.date_time, entry.external_attr >> 16, entry.create_system) for entry in archive.infolist()} == {
            ((1980, 1, 1, 0, 0, 0), 0o100644, 3)
        }


def test_it_runs_by_itself(tmp_path: Path) -> None:
    program = tmp_path / "portknock"
    program.write_bytes(helper_program())
    program.chmod(0o755)
    environment = {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.defpath))}
    finished = subprocess.run(
        [program, "connect", "web1", "22", "--secrets", tmp_path / "none"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr == (
        f"portknock: {tmp_path}/none: expected the file of secrets; there is none. Ask whoever runs the hosts for yours, or "
        "correct --secrets.\n"
    )
