#!/usr/bin/env bash
# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# ansible-test sanity on a copy of the tree, with nothing but the package index.
# Usage: sanity.sh [ansible-test's own arguments]

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

WORK=$CACHE/sanity
COPY=$WORK/ansible_collections/fleet/portknock
PIP_VERSION=24.2 # the one that ansible-test of ansible-core 2.19 asks for

# ansible-test wants a real folder of this name, and asks git for its files: a copy that is a repository of its own,
# because git says of the one around it that all of .cache is ignored.
rm -rf "$COPY"
mkdir -p "$COPY"
# Only what is shipped: tests and scripts have ruff and mypy, and pylint here bars names that pytest's habits need.
(
    cd "$ROOT" && git ls-files -z --cached --others --exclude-standard -- . \
        ':!bench' ':!demo' ':!molecule' ':!scripts' ':!tests/*' ':tests/sanity' |
        tar -c --null --ignore-failed-read -T - 2>/dev/null
) | tar -x -C "$COPY"
git -C "$COPY" init --quiet
echo tests/output >>"$COPY/.git/info/exclude"
git -C "$COPY" add --all

# It would fetch get-pip.py from a site of its own; this one does the same with a pip from the index.
HOME=$WORK/home
export HOME
mkdir -p "$HOME/.ansible/test/cache"
wheel=$WORK/pip-$PIP_VERSION-py3-none-any.whl
[ -f "$wheel" ] || "$ROOT/.venv/bin/pip" download --quiet --no-deps -d "$WORK" "pip==$PIP_VERSION"
cat >"$HOME/.ansible/test/cache/get_pip_${PIP_VERSION//./_}.py" <<PYTHON
import runpy, sys
sys.path.insert(0, "$wheel")
options = [word for word in sys.argv[1:] if word not in ("--no-setuptools", "--no-wheel")]
sys.argv = ["pip", "install", *options]
runpy.run_module("pip", run_name="__main__")
PYTHON

cd "$COPY" || exit
unset PYTHONPATH ANSIBLE_COLLECTIONS_PATH ANSIBLE_HOME
exec ansible-test sanity --requirements --python 3.11 --color no "$@"
