# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every way in which hardening could lock somebody out ends with a host that is as before, and reachable.

Comes before test_2_hardened.py and leaves the hosts as it found them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
from lab import Fleet, Run, differences, wait_until
from ways_in import (
    DROP_IN,
    PASSWORD,
    PLAY,
    effective,
    enter,
    enter_by_password,
    harden,
    inventory,
    is_covered,
    soften,
)

HOST = "web-1"
SECONDS = 10
# With it whoever is to confirm gets in and waits, so that there is time to break something.
SLOW = {"sshd_hardening_settings": {"ForceCommand": "sleep 60"}, "ansible_user": "admin", "ansible_port": 2222}


def by_itself(state: dict[str, str]) -> dict[str, str]:
    """Without the lock, which is in /run, and the engine's own rules, which a restart makes anew."""
    return {**state, "run": "", "ruleset": ""}


@pytest.fixture(autouse=True)
def as_before(fleet: Fleet) -> Iterator[None]:
    """Nothing has changed, byte for byte, and root gets in by key and by password as before."""
    texts = "cd /etc/ssh && sha256sum sshd_config sshd_config.d/*"
    before, content = by_itself(fleet.state(HOST)), fleet.execute(HOST, texts)
    yield
    assert differences(before, by_itself(fleet.state(HOST))) == []
    assert fleet.execute(HOST, texts) == content
    assert not is_covered(fleet, HOST)
    assert enter(fleet, HOST, "root").stdout == "root\n"
    assert enter_by_password(fleet, HOST, "admin").stdout == "admin\n"


def refused(run: Run) -> str:
    assert run.status == 2, run.output
    assert run.recap[HOST] | {"failed": 1, "unreachable": 0, "changed": 0} == run.recap[HOST], run.output
    return " ".join(run.output.split())


def test_root_alone_stops_with_a_sentence(fleet: Fleet) -> None:
    output = refused(harden(fleet, user="root", hosts=HOST))
    assert "expected another account than root to get in afterwards" in output


def test_root_alone_is_left_alone_where_that_is_wished(fleet: Fleet) -> None:
    run = harden(fleet, user="root", hosts=HOST, variables={"sshd_hardening_without_proof": "skip"})
    assert run.status == 0, run.output
    assert "sshd is left as it is" in run.output
    assert run.recap[HOST]["changed"] == 0


@pytest.mark.parametrize(
    ("account", "problem"),
    [("keyless", "Permission denied"), ("guest", "sudo"), ("nobody-at-all", "Permission denied")],
)
def test_an_account_that_could_not_get_in_or_become_root(fleet: Fleet, account: str, problem: str) -> None:
    output = refused(harden(fleet, user="root", hosts=HOST, variables={"sshd_hardening_admin_user": account}))
    assert f"expected {account} to get in over a fresh connection" in output
    assert problem in output
    assert "Nothing was changed" in output


def test_who_has_a_password_alone_keeps_it_or_stops_the_change(fleet: Fleet) -> None:
    variables = {"ansible_password": PASSWORD, "ansible_ssh_private_key_file": "/dev/null"}
    assert "expected admin to get in over a fresh connection" in refused(harden(fleet, hosts=HOST, variables=variables))
    allowed = {**variables, "sshd_hardening_password_authentication": True}
    run = harden(fleet, hosts=HOST, variables=allowed)
    assert (run.status, run.recap[HOST]["changed"]) == (0, 1), run.output
    assert PASSWORD not in run.output
    assert soften(fleet, hosts=HOST).status == 0


def test_settings_that_shut_out_the_account_are_taken_back(fleet: Fleet) -> None:
    variables = {"sshd_hardening_settings": {"AllowUsers": ["guest", "root"]}}
    output = refused(harden(fleet, hosts=HOST, variables=variables))
    assert "Not confirmed: no fresh connection could be made" in output
    assert "The host has gone back to what it had" in output


def test_settings_that_sshd_refuses_change_nothing(fleet: Fleet) -> None:
    output = refused(harden(fleet, hosts=HOST, variables={"sshd_hardening_settings": {"NoSuchKeyword": 1}}))
    assert "sshd refuses them" in output
    assert "Bad configuration option: NoSuchKeyword" in output


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sshd_hardening_permit_root_login": "perhaps"}, "sshd_hardening_permit_root_login"),
        (
            {"sshd_hardening_settings": {"Match": "User root"}},
            "sshd_hardening_settings: expected a directive; got Match",
        ),
        ({"sshd_hardening_settings": {"Banner": "a\nb"}}, "sshd_hardening_settings: Banner: expected one line"),
        ({"sshd_hardening_confirm_timeout": 1}, "sshd_hardening_confirm_timeout: expected 10 to 3600 seconds; got 1"),
    ],
)
def test_bad_input_names_the_variable(fleet: Fleet, settings: dict[str, object], expected: str) -> None:
    assert expected in refused(harden(fleet, hosts=HOST, variables=settings))


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("00-aaa.conf", "# first\nMaxAuthTries 9\n", "00-aaa.conf:2 wins"),
        ("70-site.conf", "Match User root\n  PermitRootLogin yes\n", "70-site.conf:2 (in a Match block) wins"),
    ],
)
def test_a_line_that_wins_is_named(fleet: Fleet, name: str, text: str, place: str) -> None:
    path = f"/etc/ssh/sshd_config.d/{name}"
    fleet.execute(HOST, f"printf '{text}' > {path}")
    try:
        assert place in refused(harden(fleet, hosts=HOST))
    finally:
        fleet.execute(HOST, f"rm {path}")


def test_a_controller_that_dies_is_waited_for_and_then_forgotten(fleet: Fleet) -> None:
    inventory(fleet)
    playbook = fleet.write("harden.yml", PLAY)
    variables = {**SLOW, "sshd_hardening_confirm_timeout": SECONDS}
    fleet.kill_play_when(playbook, partial(is_covered, fleet, HOST), variables)
    wait_until(lambda: not is_covered(fleet, HOST), SECONDS + 15, "the trial has ended")
    wait_until(
        lambda: not fleet.succeeds(HOST, "systemctl list-units --all --no-legend '*portknock*' | grep -q ."),
        15,
        "the timer has gone",
    )


def test_a_restart_while_on_trial_brings_back_what_was_there(fleet: Fleet) -> None:
    playbook = fleet.write("harden.yml", PLAY)
    variables = {**SLOW, "sshd_hardening_confirm_timeout": 300}
    fleet.kill_play_when(playbook, partial(is_covered, fleet, HOST), variables)
    fleet.restart(HOST)
    fleet.wait_for_boot()


def test_a_confirmation_that_died_half_way_is_finished(fleet: Fleet) -> None:
    """Its file is written, so that is what a reboot brings: the timer goes the same way."""
    playbook = fleet.write("harden.yml", PLAY)
    variables = {**SLOW, "sshd_hardening_confirm_timeout": SECONDS}
    fleet.kill_play_when(playbook, partial(is_covered, fleet, HOST), variables)
    try:
        fleet.execute(HOST, f"cp /run/fleet-portknock/trial/wanted {DROP_IN}")
        wait_until(lambda: not is_covered(fleet, HOST), SECONDS + 15, "the trial has ended")
        assert effective(fleet, HOST, "forcecommand") == "sleep 60"
        assert enter(fleet, HOST, "root").returncode == 255
        assert not fleet.succeeds(HOST, "test -e /run/fleet-portknock/trial")
    finally:
        fleet.execute(HOST, f"rm -f {DROP_IN}; systemctl reload ssh")
        wait_until(lambda: enter(fleet, HOST, "root").returncode == 0, 10, "root gets in again")
