# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# shellcheck shell=sh
# Runs inside a new image with other people's tools, after image-setup.sh: none of them is at work before a test starts it.

for unit in ufw.service firewalld.service fail2ban.service netfilter-persistent.service docker.socket docker.service \
    containerd.service; do
    [ ! -e "/lib/systemd/system/$unit" ] || systemctl disable "$unit"
done
# Installing netfilter-persistent saves what the kernel has: the rules of the machine that builds the image.
rm -f /etc/iptables/rules.*
