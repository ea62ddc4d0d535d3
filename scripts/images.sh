#!/usr/bin/env bash
# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Builds the test fleet's images, once: from the registry's debian:NN where one answers, else from Debian's archive.
# Usage: images.sh [clean]; it calls itself as `images.sh build NAME`, two at a time where there are two cores.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

REPOSITORY=portknock-test
NAMES=(debian11 debian12 debian13 client debian12-tools debian13-tools)
HOST_PACKAGES=(systemd systemd-sysv dbus openssh-server python3 sudo iproute2 procps nftables iputils-ping)
CLIENT_PACKAGES=(python3 openssh-client iproute2 procps iputils-ping nmap ncat tcpdump hping3)
# What the card that an operator gets has commands for.
CLIENT_PACKAGES+=(knockd fwknop-client curl netcat-openbsd w3m)
# Other people's tools; ufw and netfilter-persistent exclude each other. A host that runs Ansible on itself has the last two.
TOOLS12=(ufw firewalld fail2ban python3-systemd docker.io iptables conntrack)
TOOLS13=(iptables iptables-persistent ansible-core git)
PULL_SECONDS=120

suite_of() {
    case $1 in
        debian11) echo bullseye ;;
        debian13*) echo trixie ;;
        *) echo bookworm ;;
    esac
}

official_of() {
    case $1 in
        debian11) echo debian:11 ;;
        debian13*) echo debian:13 ;;
        *) echo debian:12 ;;
    esac
}

packages_of() {
    case $1 in
        client) echo "${CLIENT_PACKAGES[@]}" ;;
        debian12-tools) echo "${HOST_PACKAGES[@]}" "${TOOLS12[@]}" ;;
        debian13-tools) echo "${HOST_PACKAGES[@]}" "${TOOLS13[@]}" ;;
        *) echo "${HOST_PACKAGES[@]}" ;;
    esac
}

# What runs inside a new image, after the packages.
setup_of() {
    cat "$ROOT/scripts/image-setup.sh"
    case $1 in *-tools) cat "$ROOT/scripts/image-tools.sh" ;; esac
}

init_of() { if [ "$1" = client ]; then echo '["sleep", "infinity"]'; else echo '["/sbin/init"]'; fi; }

# What an image was made from; another recipe makes another image.
recipe_of() { { packages_of "$1"; setup_of "$1"; } | sha256sum | cut -c1-16; }

is_current() {
    [ "$(docker image inspect -f '{{ index .Config.Labels "fleet.portknock.recipe" }}' "$REPOSITORY:$1" 2>/dev/null)" = "$(recipe_of "$1")" ]
}

changes_of() {
    printf '%s\n' "LABEL fleet.portknock.recipe=$(recipe_of "$1")" "CMD $(init_of "$1")"
}

# The archive that this machine itself uses for its own release.
mirror() {
    local codename
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    # shellcheck disable=SC2016  # the placeholders are apt's
    apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
        awk -v codename="$codename" '$1 == codename || $1 == "stable" { print $2; exit }'
}

changes_as_arguments() {
    changes=()
    local change
    while read -r change; do changes+=(--change "$change"); done < <(changes_of "$1")
}

from_registry() {
    local name=$1 container=portknock-build-$1 changes
    changes_as_arguments "$name"
    docker rm -f "$container" >/dev/null 2>&1 || true
    # shellcheck disable=SC2046  # a list of package names is meant to split
    docker run -i --name "$container" --network host "$(official_of "$name")" sh -euc \
        'export DEBIAN_FRONTEND=noninteractive; apt-get update; apt-get install -y --no-install-recommends "$@" </dev/null; sh -eu' \
        sh $(packages_of "$name") < <(setup_of "$name") &&
        docker commit "${changes[@]}" "$container" "$REPOSITORY:$name"
    local status=$?
    docker rm -f "$container" >/dev/null 2>&1 || true
    return "$status"
}

from_archive() {
    local name=$1 tar=$CACHE/image-$1.tar setup=$CACHE/image-$1.sh changes
    changes_as_arguments "$name"
    # The hook reads the script by name: mmdebstrap's own standard input is no use to it.
    setup_of "$name" >"$setup"
    mmdebstrap --variant=minbase --include="$(packages_of "$name" | tr ' ' ,)" \
        --customize-hook="chroot \"\$1\" sh -eu < '$setup'" \
        "$(suite_of "$name")" "$tar" "$(mirror)" &&
        docker import "${changes[@]}" "$tar" "$REPOSITORY:$name"
    local status=$?
    rm -f "$tar" "$setup"
    return "$status"
}

build() {
    local name=$1
    if [ "$REGISTRY" = yes ] && quiet "image-$name-registry" from_registry "$name"; then
        return
    fi
    quiet "image-$name" from_archive "$name"
}

clean() {
    local name
    for name in "${NAMES[@]}"; do
        docker image rm -f "$REPOSITORY:$name" >/dev/null 2>&1 || true
    done
}

case ${1:-} in
    clean)
        clean
        exit 0
        ;;
    build)
        build "$2"
        exit 0
        ;;
esac

wanted=()
for name in "${NAMES[@]}"; do
    is_current "$name" || wanted+=("$name")
done
[ ${#wanted[@]} -gt 0 ] || exit 0

say "building ${#wanted[@]} images: ${wanted[*]} (once; a few minutes)"
# One bounded try tells whether there is a registry; a machine without one must not wait three times.
REGISTRY=no
if docker image inspect debian:12 >/dev/null 2>&1 || timeout "$PULL_SECONDS" docker pull debian:12 >"$LOGS/pull.log" 2>&1; then
    REGISTRY=yes
else
    need mmdebstrap mmdebstrap
fi
export REGISTRY
printf '%s\n' "${wanted[@]}" | xargs -P "$(nproc)" -n 1 "${BASH_SOURCE[0]}" build || die "not every image could be built"
