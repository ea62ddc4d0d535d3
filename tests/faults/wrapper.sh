#!/bin/sh
# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Stands before nft, systemctl and systemd-run on a host of the fault test. Each call takes the next number and notes who
# made it and what it asks for; the call whose number is armed fails, or says that it was reached and waits for a word.

program=${0##*/}
real=$(PATH=/usr/sbin:/usr/bin:/sbin:/bin command -v "$program") || exit 127
faults=/var/cache/faults
[ -e "$faults/on" ] || exec "$real" "$@"

# Who calls: a module's process, by itself or through a shell of its own, or the script that goes back. What others do in
# between, such as the watcher, comes when it likes and is not counted.
caller=$PPID
case $(tr '\0' ' ' <"/proc/$caller/cmdline") in
    "/bin/sh -c "*) caller=$(sed -n 's/^PPid:[^0-9]*//p' "/proc/$caller/status") ;;
esac
case $(tr '\0' ' ' <"/proc/$caller/cmdline") in
    */watch.py* | */load.sh*) exec "$real" "$@" ;;
    */restore-*) kind=restore ;;
    *python*) kind=module ;;
    *) exec "$real" "$@" ;;
esac
exec 8>>"$faults/lock"
flock 8
number=$(($(cat "$faults/count" 2>/dev/null || echo 0) + 1))
echo "$number" >"$faults/count"
echo "$number $caller $kind $program ${1-} ${2-} ${3-}" >>"$faults/calls"
read -r armed action 2>/dev/null <"$faults/armed"
[ "$armed" != "$number" ] || rm -f "$faults/armed"
exec 8>&-
[ "$armed" = "$number" ] || exec "$real" "$@"

echo "$caller $PPID" >"$faults/reached.new"
mv "$faults/reached.new" "$faults/reached"
[ "$action" != fail ] || exit 1
tries=0
until [ -e "$faults/go" ]; do
    tries=$((tries + 1))
    [ "$tries" -lt 1000 ] || break
    sleep 0.05
done
read -r word 2>/dev/null <"$faults/go"
[ "$word" != die ] || exit 137
exec "$real" "$@"
