#!/usr/bin/env bash
# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# The Debian packages that the tests and the demo need on the controller; the engine's come with engine.sh.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

need python3 python3 ip iproute2 ssh openssh-client nft nftables nmap nmap ncat ncat \
    tcpdump tcpdump conntrack conntrack git git setsid util-linux ps procps shellcheck shellcheck
