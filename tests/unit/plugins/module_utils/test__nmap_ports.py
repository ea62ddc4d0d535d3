# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils import _nmap_ports
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._nmap_ports import (
    NMAP_VERSION,
    nmap_ports,
    read_nmap_services,
)

ROOT = Path(__file__).resolve().parents[4]
SERVICES = Path("/usr/share/nmap/nmap-services")
needs_nmap = pytest.mark.skipif(not SERVICES.exists(), reason="nmap is not installed (apt-get install nmap)")


@needs_nmap
def test_the_shipped_ports_are_those_of_the_installed_package() -> None:
    installed = subprocess.run(["nmap", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"Nmap version (\S+)", installed)
    assert version is not None
    if version.group(1) != NMAP_VERSION:
        pytest.skip(f"nmap {version.group(1)} is installed; the shipped ports are those of {NMAP_VERSION}")
    expected = set()
    for line in SERVICES.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        port, _slash, proto = line.split("\t")[1].partition("/")
        if proto in ("tcp", "udp") and int(port) >= 1024:
            expected.add(int(port))
    assert nmap_ports() == expected


@needs_nmap
@pytest.mark.skipif(shutil.which("nmap") is None, reason="nmap's program is not installed")
def test_the_command_that_regenerates_the_ports_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "plugins" / "module_utils" / "_nmap_ports.py"
    target.parent.mkdir(parents=True)
    shipped = Path(_nmap_ports.__file__).read_text(encoding="utf-8")
    # Emptied first, so that a command that writes nothing is noticed.
    begin, end = shipped.index('"""\n1024'), shipped.index("# Written by scripts/nmap_ports.py: end")
    target.write_text(shipped[:begin] + shipped[end:], encoding="utf-8")
    script = tmp_path / "scripts" / "nmap_ports.py"
    script.parent.mkdir()
    shutil.copy(ROOT / "scripts" / "nmap_ports.py", script)
    subprocess.run([sys.executable, str(script), str(SERVICES), NMAP_VERSION], check=True)
    if nmap_ports() == read_nmap_services(SERVICES.read_text(encoding="utf-8")):
        assert target.read_text(encoding="utf-8") == shipped


def test_the_shipped_file_holds_numbers_only() -> None:
    text = Path(_nmap_ports.__file__).read_text(encoding="utf-8")
    data = text.partition('_RANGES = """\n')[2].partition('"""')[0]
    assert re.fullmatch(r"(?:[0-9]+(?:-[0-9]+)?[ \n])+", data)
    assert 20000 < len(nmap_ports()) < 30000
    assert all(1024 <= port <= 65535 for port in nmap_ports())


def test_reading_a_newer_file() -> None:
    text = (
        "# comment\n\nssh\t22/tcp\t0.182286\t# Secure Shell\nalpha\t50001/tcp\t0.000001\nbeta 50002/udp 0.000001\n"
        "gamma\t50003/sctp\t0.000000\nunknown\t50001/udp\t0.000654\n"
    )
    assert read_nmap_services(text) == {50001, 50002}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "got none."),
        ("# nothing\n", "got none."),
        ("ssh\t22/tcp\t0.1\nhello world\n", "line 2 is not one."),
        ("ssh\t99999/tcp\t0.1\n", "line 1 is not one."),
    ],
)
def test_not_such_a_file(text: str, says: str) -> None:
    with pytest.raises(PortknockError) as caught:
        read_nmap_services(text)
    assert str(caught.value) == (
        f"knock_server_nmap_services: expected lines of name, port/protocol and frequency, as in the nmap-services "
        f"file; {says}"
    )
