# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# shellcheck shell=bash
# Sourced by the scripts beside it: one way to talk, to log and to install.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=$ROOT/.cache
LOGS=$CACHE/logs
mkdir -p "$LOGS"

say() { printf '%s\n' "$*"; }

die() {
    printf '%s\n' "$*" >&2
    exit 1
}

# quiet LOG COMMAND...: all output goes to .cache/logs/LOG.log; a failure shows the end of it.
quiet() {
    local log=$LOGS/$1.log status=0
    shift
    "$@" >"$log" 2>&1 </dev/null || status=$?
    if [ "$status" -ne 0 ]; then
        printf 'failed (%s): %s\n' "$status" "$*" >&2
        tail -n 20 "$log" | sed 's/^/    | /' >&2
        printf '    the whole log: %s\n' "$log" >&2
    fi
    return "$status"
}

# need COMMAND PACKAGE [COMMAND PACKAGE]...: install the packages whose command is missing, and only those.
need() {
    local missing=()
    while [ $# -gt 0 ]; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null || missing+=("$2")
        shift 2
    done
    [ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"
}

install_packages() {
    say "installing Debian packages: $*"
    [ "$(id -u)" -eq 0 ] || die "installing Debian packages needs root: run this as root, or install these first: $*"
    # A third-party source that does not answer must not stop what comes from Debian.
    quiet apt-update apt-get update || say "apt-get update reported a problem; going on with what is known"
    quiet apt-install env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}
