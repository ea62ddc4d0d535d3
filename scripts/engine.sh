#!/usr/bin/env bash
# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Sees to it that a container engine answers: a running one, else Debian's, started by systemd or by hand.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

WAIT_SECONDS=60

answers() { timeout 10 docker info >/dev/null 2>&1; }

wait_for_engine() {
    local deadline=$((SECONDS + WAIT_SECONDS))
    until answers; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.5
    done
}

start_by_hand() {
    # Without systemd nobody mounts the cgroup tree for the engine.
    if ! mountpoint -q /sys/fs/cgroup; then
        mount -t cgroup2 none /sys/fs/cgroup
    fi
    # Detached with setsid: the engine outlives make, and ^C on a demo does not take it down.
    PATH=$PATH:/usr/sbin:/sbin setsid dockerd --pidfile "$CACHE/dockerd.pid" >"$LOGS/dockerd.log" 2>&1 </dev/null &
}

if command -v docker >/dev/null && answers; then
    exit 0
fi
[ "$(id -u)" -eq 0 ] || die "no container engine answers, and starting one needs root"
need dockerd docker.io docker docker.io iptables iptables
answers && exit 0
say "starting the container engine"
if [ -d /run/systemd/system ]; then
    quiet dockerd-start systemctl start docker || true
else
    start_by_hand
fi
if ! wait_for_engine; then
    [ ! -f "$LOGS/dockerd.log" ] || tail -n 20 "$LOGS/dockerd.log" | sed 's/^/    | /' >&2
    die "the container engine did not answer within $WAIT_SECONDS s"
fi
