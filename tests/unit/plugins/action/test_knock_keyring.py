# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The task in real runs of ansible-playbook; no host is connected to."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playing import Run, counts


def test_check_then_make_then_nothing(run: Run) -> None:
    printed = run({}, "--check", "--diff")
    assert counts(printed) == {"web1": (1, 0), "web2": (1, 0)}
    assert "+      knocks: 4" in printed
    assert not run.ring.exists()

    printed = run({"length": 5, "protocols": ["tcp", "udp"], "ports_in_use": ["22/tcp", 8080]}, "--diff", "-vvvvv")
    assert counts(printed) == {"web1": (1, 0), "web2": (1, 0)}
    assert printed.count("knock_keyring is new, with the id") == 1
    for host in ("web1", "web2"):
        secrets = run.view(host)
        ports = re.findall(r"- (\d+)/", secrets)
        assert len(ports) == 5
        assert not re.search(rf"\b({'|'.join(ports)})\b", printed)
        assert re.findall(r"seed: '?(\w{64})", secrets)[0] not in printed

    assert counts(run({"length": 5})) == {"web1": (0, 0), "web2": (0, 0)}


def test_without_a_vault_secret(run: Run) -> None:
    printed = run({}, vaulted=False)
    assert counts(printed) == {"web1": (0, 1), "web2": (0, 1)}
    assert f"The keyring {run.ring}: expected a vault secret to encrypt it with; got none." in printed
    assert not run.ring.exists()

    printed = run({}, vaulted=False, KNOCK_KEYRING_PLAINTEXT="true")
    assert counts(printed) == {"web1": (1, 0), "web2": (1, 0)}
    assert (run.ring / "web1.yml").read_text().startswith("format: 1\n")


def test_a_bad_given_sequence_is_not_printed(run: Run) -> None:
    given = {"default": ["48397/tcp", "48399/tcp", "4839x"]}
    printed = run({"sequences": given}, "--limit", "web1", "-vvv")
    assert "knock_server_sequences, operator default: expected port/protocol, a port from 1 to 65535" in printed
    assert "4839" not in printed
    assert not run.ring.exists()


def test_a_newer_list_of_nmaps(run: Run) -> None:
    (run.folder / "services").write_text("alpha\t48397/tcp\t0.1\n")
    given = {"default": ["48397/tcp", "60013/tcp", "48411/tcp"]}
    printed = run({"sequences": given, "nmap_services": "services"}, "--limit", "web1")
    assert "expected no port that nmap's list of services names, since every scan tries those first; knock 1" in printed
    printed = run({"sequences": given, "nmap_services": "nowhere"}, "--limit", "web1")
    says = "knock_server_nmap_services: expected a file on the controller that this user can read; got nowhere: "
    assert f'"msg": "{says}No such file or directory."' in printed


def test_a_gate_of_another_keyring(run: Run) -> None:
    state = {"present": True, "keyring": "other", "generation": 7}
    printed = run({"host_state": state}, "--limit", "web1")
    assert "expected the keyring other, from which the gate of web1 came; got a new one." in printed
    assert not run.ring.exists()
    assert counts(run({"host_state": state, "adopt": True}, "--limit", "web1")) == {"web1": (1, 0)}
    assert "\ngeneration: 8\n" in run.view("web1")


def test_removed_live_again_and_purged(run: Run) -> None:
    states = [{}, {"state": "promoted"}, {"state": "removed"}, {"state": "removed"}]
    assert counts(run(states, "--limit", "web1")) == {"web1": (2, 0)}
    removed = run.view("web1")
    assert "removed: true" in removed
    assert counts(run({}, "--limit", "web1")) == {"web1": (1, 0)}
    assert run.view("web1") == removed.replace("removed: true", "removed: false").replace(
        "\ngeneration: 1\n", "\ngeneration: 2\n"
    )
    assert counts(run({"state": "absent"}, "--limit", "web1", "--check")) == {"web1": (1, 0)}
    assert (run.ring / "web1.yml").exists()
    states = [{"state": "absent"}, {"state": "absent"}, {"state": "promoted"}]
    printed = run(states, "--limit", "web1")
    assert counts(printed) == {"web1": (1, 1)}
    assert not (run.ring / "web1.yml").exists()
    assert f"The keyring {run.ring}: expected an entry for web1; got none." in printed


def test_packages_are_noted_told_and_forgotten(run: Run) -> None:
    noted = {"packages": ["nftables"]}
    gone = {"state": "removed", **noted}
    assert counts(run([noted, noted, {}], "--limit", "web1")) == {"web1": (1, 0)}
    assert "\ngeneration: 1\n" in run.view("web1")
    printed = run({"state": "removed"}, "--limit", "web1", "-v", "--diff")
    assert '"packages": ["nftables"]' in printed
    assert "packages:\n- nftables" in run.view("web1")
    assert '"packages": []' in run(gone, "--limit", "web1", "-v", "--check")
    assert counts(run([gone, gone], "--limit", "web1")) == {"web1": (1, 0)}
    assert "packages" not in run.view("web1")
    assert counts(run([noted, {"state": "absent"}], "--limit", "web1")) == {"web1": (2, 0)}
    assert "packages: expected names of packages; got '-x'." in run({"packages": ["-x"]}, "--limit", "web1")


def test_an_operator_who_expires(run: Run) -> None:
    """Nothing is written before everything is checked."""
    two, future = ["alice", "bob"], "2999-12-31T23:59:59Z"
    for valid_until, complaint in (
        ({"carol": future}, "knock_server_valid_until: expected operators that knock_server_operators names"),
        ({"bob": "soon"}, "knock_server_valid_until, operator bob: expected a UTC time"),
        (dict.fromkeys(two, future), "knock_server_valid_until: expected an operator of web1 without an expiry"),
    ):
        assert complaint in run({"operators": two, "valid_until": valid_until}, "--limit", "web1")
        assert not run.ring.exists()
    everyone = {"operators": two, "valid_until": dict.fromkeys(two, future), "trusted_sources": ["192.0.2.1/32"]}
    one = {"operators": two, "valid_until": {"bob": future}}
    assert counts(run(one, "--limit", "web1")) == {"web1": (1, 0)}
    assert run.view("web1").count(f"valid_until: '{future}'") == 1
    # Where nobody says anything of times, they stay.
    assert counts(run([one, {"operators": two}], "--limit", "web1")) == {"web1": (0, 0)}
    assert counts(run(everyone, "--limit", "web1")) == {"web1": (1, 0)}
    printed = run({"operators": two, "valid_until": {"bob": "2026-01-02T00:00:00Z"}}, "--limit", "web1")
    assert "the time of bob on web1 is over since 2026-01-02T00:00:00Z: they are shut out." in printed
    assert counts(run({"operators": two, "valid_until": {}}, "--limit", "web1")) == {"web1": (1, 0)}
    assert "valid_until" not in run.view("web1")


def test_a_keyring_inside_an_inventory_folder(run: Run) -> None:
    (run.folder / "sources").mkdir()
    (run.folder / "sources" / "hosts").write_text("web1\n")
    run.ring = run.folder / "sources" / "knock_keyring"
    printed = run({}, inventory="sources")
    assert f"The keyring {run.ring} lies inside the inventory source" in printed
    assert run.ring.exists()


def test_without_an_inventory_folder(run: Run) -> None:
    printed = run({}, inventory="web1,")
    assert "knock_keyring_dir: expected a folder, since the host's inventory has none; got nothing." in printed


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"capabilities": {"echo": False}},
            "expected no icmp knocks on a host whose nft",
        ),
        (
            {"backend": "knockd"},
            "expected tcp or udp with knock_server_backend=knockd; got icmp",
        ),
    ],
    ids=["old nft", "knockd"],
)
def test_knocks_that_the_gate_can_not_tell_are_not_made(run: Run, given: dict[str, Any], says: str) -> None:
    by_hand = {"default": ["717/icmp", "231/icmp", "1003/icmp"]}
    every: list[dict[str, Any]] = [{"protocols": ["tcp", "icmp"]}, {"sequences": by_hand}]
    for arguments in every:
        printed = run({**arguments, **given})
        assert f"knock_server_sequence_protocols: {says}" in printed
    assert not (run.ring / "web1.yml").exists()
