#!/bin/sh
# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Loads the gate at boot, and again when another program has taken its table away. Where it does not load, the protected
# ports stay closed to all but the trusted sources. <N> is the priority that the journal gives a line. With the argument `keep`
# open windows stay, where they can.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
folder=/etc/fleet-portknock
units=/etc/systemd/system

# The gate's file is all that decides. Without it a boot has cut short the first change, or the removal, of a gate: what that
# has left goes, as it would have gone by the timer.
if [ ! -e "$folder/gate.rules" ] && [ ! -e /run/fleet-portknock/trial ]; then
    echo "<4>There is no confirmed gate: removing what a change that was cut short has left." >&2
    for unit in "$units"/fleet-portknock*.service; do
        name=${unit##*/}
        # This one is what runs here.
        [ "$name" = fleet-portknock.service ] || systemctl --no-block stop "$name"
        systemctl --quiet disable "$name"
        rm -f "$unit"
    done
    for off in "$units"/*.service.d/fleet-portknock.conf; do
        rm -f "$off"
        rmdir "${off%/*}" 2>/dev/null
    done
    rm -rf "$folder"
    systemctl --no-block daemon-reload
    exit 0
fi

# A tool repeats the line that it refuses, with its ports: its own words must not reach the journal.
if grep -q '^# fleet.portknock rules: iptables$' "$folder/gate.rules"; then
    # Once: the gate takes these rules away again.
    shut() {
        "$1" -t mangle -C INPUT -j FPK-SHUT 2>/dev/null && return
        sed -n "$2" "$folder/closed.rules" | grep -v '^#' | "$1-restore" -w 10 --noflush
    }
    load_closed() {
        shut iptables '/^#4$/,/^#6$/p' && { [ ! -e /proc/net/if_inet6 ] || shut ip6tables "/^#6\$/,\$p"; }
    }
    how=fresh
    [ "${1-}" != keep ] || how=load
    # Again where another program changed what was just read.
    load_gate() { /bin/sh "$folder/gate.rules" "$how" || /bin/sh "$folder/gate.rules" "$how"; }
else
    load_closed() { nft -f "$folder/closed.nft"; }
    load_gate() { nft -f "$folder/gate.rules"; }
fi

# A fresh table lets no one-time sequence open. Where that fails, the watch tries again.
arm() {
    grep -q '^  set armed {$' "$folder/gate.rules" || return 0
    "$(command -v python3 || echo /usr/libexec/platform-python)" -I -S "$folder/stock.py" arm
}

# The closed table first: a few rules are there at once, where a gate's thousands of elements take a tenth of a second.
closed=yes
load_closed >/dev/null 2>&1 || closed=no
load_gate >/dev/null 2>&1 && { arm || true; } && exit 0
echo "<2>The gate does not load: the protected ports are closed to all but the trusted sources." >&2
[ "$closed" = yes ] || echo "<0>The closed table does not load either: the protected ports are open." >&2
exit 1
