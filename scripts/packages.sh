#!/usr/bin/env bash
# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# The Debian packages that are needed on the controller; the engine's come with engine.sh. Usage: packages.sh demo|test

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# need_asleep COMMAND PACKAGE UNIT...: a daemon that tests run by themselves in a namespace, and that this machine is not to run.
need_asleep() {
    local command=$1 package=$2
    shift 2
    PATH=$PATH:/usr/sbin:/sbin command -v "$command" >/dev/null && return
    local policy=/usr/sbin/policy-rc.d made=no
    if [ "$(id -u)" -eq 0 ] && [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        made=yes
    fi
    install_packages "$package" || true
    [ "$made" = no ] || rm -f "$policy"
    if [ -d /run/systemd/system ]; then
        systemctl disable --quiet "$@" 2>/dev/null || true
    fi
}

need python3 python3 ip iproute2 ssh openssh-client setsid util-linux ps procps
if [ "${1:-demo}" = test ]; then
    need git git rsync rsync nft nftables nmap nmap ncat ncat tcpdump tcpdump conntrack conntrack shellcheck shellcheck iptables iptables \
        ipset ipset
    need_asleep sshd openssh-server ssh.service ssh.socket
    need_asleep knockd knockd knockd.service
    need fwknop fwknop-client gpg gpg gpg-agent gpg-agent
    need_asleep fwknopd fwknop-server fwknop-server.service
fi
