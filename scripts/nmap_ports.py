# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write the port numbers of an installed nmap into plugins/module_utils/_nmap_ports.py.

Usage: python3 scripts/nmap_ports.py [NMAP_SERVICES [NMAP_VERSION]]

Without arguments: /usr/share/nmap/nmap-services and what ``nmap --version`` says.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "plugins" / "module_utils" / "_nmap_ports.py"
SERVICES = Path("/usr/share/nmap/nmap-services")
BEGIN = "# Written by scripts/nmap_ports.py: begin\n"
END = "# Written by scripts/nmap_ports.py: end\n"
ENTRY = re.compile(r"^[^#\s]\S*\s+([0-9]{1,5})/(?:tcp|udp)(?:\s|$)", re.ASCII | re.MULTILINE)


def numbers(text: str) -> str:
    """The ports from 1024 up that a file of nmap's names for tcp or udp, as numbers and ranges."""
    spans: list[list[int]] = []
    for port in sorted({int(found) for found in ENTRY.findall(text)}):
        if port < 1024:
            continue
        if spans and spans[-1][1] == port - 1:
            spans[-1][1] = port
        else:
            spans.append([port, port])
    if not spans:
        raise SystemExit("The file names no port from 1024 up: expected the format of nmap-services.")
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def installed_version() -> str:
    said = subprocess.run(["nmap", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"Nmap version (\S+)", said)
    if found is None:
        raise SystemExit("nmap --version: expected a line that says 'Nmap version'.")
    return found.group(1)


def main(arguments: list[str]) -> None:
    services = Path(arguments[0]) if arguments else SERVICES
    version = arguments[1] if len(arguments) > 1 else installed_version()
    lines = textwrap.wrap(numbers(services.read_text(encoding="utf-8")), 118, break_on_hyphens=False)
    data = "".join([f'NMAP_VERSION = "{version}"\n', '_RANGES = """\n', *(f"{line}\n" for line in lines), '"""\n'])
    before, _begin, rest = TARGET.read_text(encoding="utf-8").partition(BEGIN)
    _old, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{TARGET}: expected the lines that mark where the numbers begin and end.")
    TARGET.write_text(before + BEGIN + data + END + after, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
