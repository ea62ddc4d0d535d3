#!/usr/bin/env bash
# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Puts one of the requirement files into .venv. Usage: venv.sh demo|test

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# ansible-core 2.19 is the newest that runs on 3.11, and older Pythons can't run it.
python=
for candidate in python3.11 python3.12 python3.13 python3; do
    if command -v "$candidate" >/dev/null &&
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || die "no Python from 3.11 to 3.13 on the PATH; Debian 12 has it in the package python3"
if [ ! -x "$ROOT/.venv/bin/pip" ]; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null || install_packages python3-venv
    quiet venv "$python" -m venv "$ROOT/.venv"
fi
say "installing Python packages for: $1 (once)"
quiet "pip-$1" "$ROOT/.venv/bin/pip" install --disable-pip-version-check -r "$ROOT/requirements/$1.txt"
