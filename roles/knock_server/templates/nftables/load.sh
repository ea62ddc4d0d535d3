#!/bin/sh
# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Loads the gate at boot, and again when another program has taken its table away. Where it does not load, the protected
# ports stay closed to all but the trusted sources. <N> is the priority that the journal gives a line.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# nft repeats the line that it refuses, with its ports: its own words must not reach the journal.
load() { nft -f "/etc/fleet-portknock/$1" >/dev/null 2>&1; }

# The closed table first: a few rules are there at once, where a gate's thousands of elements take a tenth of a second.
closed=yes
load closed.nft || closed=no
load gate.nft && exit 0
echo "<2>The gate does not load: the protected ports are closed to all but the trusted sources." >&2
[ "$closed" = yes ] || echo "<0>The closed table does not load either: the protected ports are open." >&2
exit 1
