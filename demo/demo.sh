#!/usr/bin/env bash
# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# Three hosts vanish from a scanner, open for one who knocks, vanish again, and let in a plain ssh that has a bundle.

source "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"

FLEET=$CACHE/fleet/demo
HOSTS=(web1 web2 web3)
GUEST=web2
export ANSIBLE_HOME=$CACHE/ansible ANSIBLE_CONFIG=$FLEET/ansible.cfg ANSIBLE_NOCOLOR=1

step_number=0
step() { step_number=$((step_number + 1)); printf '\n%s. %s\n' "$step_number" "$*"; }
show() { printf '   $ %s\n' "$*"; }
tell() { sed 's/^/     /'; }

# address HOST ipv4|ipv6
address() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["hosts"][sys.argv[2]][sys.argv[3]])' "$FLEET/fleet.json" "$@"; }

addresses_of() {
    local host
    for host in "${HOSTS[@]}"; do address "$host" "$1"; done
}

client() { docker exec -i portknock-demo-client "$@"; }

# open_ports LIST: what nmap's greppable output says is open at each of the list's addresses.
open_ports() {
    local list=$1 address found
    for address in "${addresses[@]}"; do
        found=$(grep -F "Host: $address " <<<"$list" | grep -oE '[0-9]+/open/tcp' | sed 's,/open/tcp,,' | paste -sd' ' || true)
        printf '     %s  %-22s %s\n' "${HOSTS[index]}" "$address" "${found:+open: }${found:-nothing open}"
        index=$((index + 1))
    done
}

# scan: what the client sees of all hosts.
scan() {
    local addresses index
    show "nmap -p- ${HOSTS[*]}"
    mapfile -t addresses < <(addresses_of ipv4)
    index=0 && open_ports "$(client nmap -n -Pn -p- -T4 --min-rate 3000 -oG - "${addresses[@]}")"
    show "nmap -6 -p1-1024 ${HOSTS[*]}"
    mapfile -t addresses < <(addresses_of ipv6)
    index=0 && open_ports "$(client nmap -6 -n -Pn -p1-1024 -T4 -oG - "${addresses[@]}")"
}

site() {
    local log=$1 start=$SECONDS
    show "ansible-playbook fleet.portknock.site -i inventory.yml"
    (cd "$FLEET" && quiet "$log" ansible-playbook fleet.portknock.site -i inventory.yml)
    sed -n '/^PLAY RECAP/,$p' "$LOGS/$log.log" | sed -n 's/ \+unreachable.*//; /: ok=/p' | tell
    printf '     %s s\n' $((SECONDS - start))
}

# knocks HOST: the host's sequence, read from the vaulted keyring with Ansible's own tool.
knocks() {
    ansible-vault view "$FLEET/knock_keyring/$1.yml" |
        python3 -c 'import sys, yaml; print(*yaml.safe_load(sys.stdin)["operators"]["default"]["current"]["knocks"])'
}

# port_state: how the guest's port 22 looks from the client.
port_state() { client nmap -n -Pn -p22 -oG - "$(address "$GUEST" ipv4)" | grep -oE '22/[a-z]+' | cut -d/ -f2; }

trap '[ $? -eq 0 ] || { echo; echo "The demo stopped early. make demo-clean removes what it started; logs are in .cache/logs."; } >&2' EXIT

step "Start three hosts (Debian 11, 12 and 13, systemd and sshd) and a client outside"
quiet demo-fleet python3 "$ROOT/scripts/fleet.py" up --vars "$ROOT/demo/vars.yml" demo web1=debian11 web2=debian12 web3=debian13
client sh -ec 'umask 077; mkdir -p /root/.ssh; cat >/root/.ssh/id_ed25519' <"$FLEET/id_ed25519"
client sh -ec 'umask 077; cat >/root/.ssh/known_hosts' <"$FLEET/known_hosts"
docker ps --filter name=^/portknock-demo- --format '{{.Names}}  {{.Status}}' | sort | tell

step "What a scanner on the client sees now"
scan

step "Put them behind port knocking: each host is closed, proved from outside, and only then kept so"
site demo-site-1

step "What the scanner sees afterwards"
scan
[ "$(port_state)" = closed ] || die "port 22 of $GUEST is not closed"

step "Knock at $GUEST from the client, and log in with plain ssh"
read -r -a sequence <<<"$(knocks "$GUEST")"
show "knock $GUEST ****  ****  ****  ****    (${#sequence[@]} secret ports, from the vaulted keyring)"
client knock "$(address "$GUEST" ipv4)" "${sequence[@]/\//:}"
show "ssh root@$GUEST"
# shellcheck disable=SC2016  # for the host's shell to expand
client ssh -o BatchMode=yes -o ConnectTimeout=5 "root@$(address "$GUEST" ipv4)" '. /etc/os-release; echo "I am $(hostname), $PRETTY_NAME"' | tell

step "Wait for the window to end (10 s after the knock)"
waited=$SECONDS
until [ "$(port_state)" = closed ]; do
    [ $((SECONDS - waited)) -lt 40 ] || die "the port is still open after 40 s"
    sleep 0.5
done
show "ssh root@$GUEST"
client ssh -o BatchMode=yes -o ConnectTimeout=5 "root@$(address "$GUEST" ipv4)" true 2>&1 | tell || true

step "Hand the client a bundle: from now on its own ssh knocks"
show "ansible-playbook fleet.portknock.client -i inventory.yml -e portknock_operator=default"
(cd "$FLEET" && quiet demo-bundle ansible-playbook fleet.portknock.client -i inventory.yml -e portknock_operator=default -e knock_client_remote_user=root)
show "tar -xf default.tar && portknock/portknock install"
client tar -xf - -C /root <"$FLEET/portknock_bundles/default.tar"
client /root/portknock/portknock install | tell
for host in "${HOSTS[@]}"; do
    show "ssh $host"
    # shellcheck disable=SC2016  # for the host's shell to expand
    client ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" '. /etc/os-release; echo "I am $(hostname), $PRETTY_NAME"' | tell
done

step "Run it again: Ansible knocks for itself, and finds nothing to do"
site demo-site-2
! sed -n '/^PLAY RECAP/,$p' "$LOGS/demo-site-2.log" | grep -q 'changed=[1-9]' || die "the second run changed something"

step "Where to look next"
cat <<NEXT
   The fleet keeps running; look around from the folder $FLEET:
     the secrets     ansible-vault view knock_keyring/$GUEST.yml
     the gate        docker exec portknock-demo-$GUEST nft list table inet fleet_portknock
     Ansible         ansible all -c fleet.portknock.knock_ssh -m ping
     the bundle      tar -xOf portknock_bundles/default.tar portknock/card.txt
   (with PATH=$ROOT/.venv/bin:\$PATH)
   README.md has the quick start for hosts of your own. make demo-clean removes all of this.
NEXT
