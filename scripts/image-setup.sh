# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# shellcheck shell=sh
# Runs inside a new image, after the packages: what makes it a host of the test fleet.

rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb

# The client has no init; nothing to prepare.
[ -x /sbin/init ] || exit 0

# Every container makes host keys of its own; an image's keys would be everybody's.
rm -f /etc/ssh/ssh_host_*
cat >/etc/systemd/system/fleet-hostkeys.service <<'UNIT'
[Unit]
Description=ssh host keys of this container
Before=ssh.service
[Service]
Type=oneshot
ExecStart=/usr/bin/ssh-keygen -A
[Install]
WantedBy=multi-user.target
UNIT
systemctl enable fleet-hostkeys.service ssh.service
# What a container has no use for, and would only slow its start or fail.
systemctl mask getty@.service console-getty.service systemd-resolved.service systemd-networkd.service \
    systemd-udevd.service apt-daily.timer apt-daily-upgrade.timer systemd-logind.service

: >/etc/machine-id
install -d -m 700 /root/.ssh
useradd -m -s /bin/bash admin
install -d -m 700 -o admin -g admin /home/admin/.ssh
echo 'admin ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/admin
chmod 440 /etc/sudoers.d/admin
