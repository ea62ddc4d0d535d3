# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""sshd's configuration as text; what sshd itself makes of it is tried in molecule/hardening."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._sshd_config import (
    Directive,
    Match,
    as_text,
    chosen_directives,
    includes,
    overruled,
    packed,
    places,
    read_effective,
    settings_from,
    unpacked,
    wanted_value,
    with_blocks,
    without_blocks,
)

ROLE = Path(__file__).parents[4] / "roles" / "sshd_hardening"
DROP_IN = "/etc/ssh/sshd_config.d/00-ours.conf"
MAIN = "/etc/ssh/sshd_config"
OFFERED = {
    "kexalgorithms": ["sntrup761x25519-sha512@openssh.com", "curve25519-sha256", "diffie-hellman-group1-sha1"],
    "ciphers": ["3des-cbc", "aes128-ctr", "aes256-gcm@openssh.com"],
    "macs": ["hmac-md5", "hmac-sha2-256-etm@openssh.com"],
    "hostkeyalgorithms": ["ssh-dss", "ssh-ed25519"],
    "pubkeyacceptedalgorithms": ["ssh-rsa", "ssh-ed25519"],
}


def options(**more: object) -> dict[str, Any]:
    """The role's defaults by their names less its prefix."""
    prefix = "sshd_hardening_"
    defaults = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text())
    names = {name[len(prefix) :]: value for name, value in defaults.items()}
    return {**names, **more}


def lines(known: set[str] | None = None, offered: dict[str, list[str]] | None = None, **more: object) -> dict[str, str]:
    """The directives for an sshd that knows every keyword, or some."""
    chosen = chosen_directives(
        settings_from(options(**more)), lambda keyword: known is None or keyword in known, offered or OFFERED
    )
    return {directive.keyword: directive.value for directive in chosen}


def test_defaults_take_only_what_is_offered_and_best_first() -> None:
    found = lines()
    assert found["PermitRootLogin"] == "no"
    assert found["KexAlgorithms"] == "sntrup761x25519-sha512@openssh.com"
    assert found["Ciphers"] == "aes256-gcm@openssh.com,aes128-ctr"
    assert found["HostKeyAlgorithms"] == "ssh-ed25519"


def test_an_sshd_without_any_wanted_key_exchange_gets_the_classical_ones() -> None:
    found = lines(offered={**OFFERED, "kexalgorithms": ["curve25519-sha256", "diffie-hellman-group1-sha1"]})
    assert found["KexAlgorithms"] == "curve25519-sha256"


def test_classical_key_exchanges_come_last_where_they_are_allowed() -> None:
    found = lines(classical_key_exchange=True)
    assert found["KexAlgorithms"] == "sntrup761x25519-sha512@openssh.com,curve25519-sha256"


def test_nothing_wanted_on_offer_leaves_the_choice_to_sshd() -> None:
    assert "MACs" not in lines(offered={**OFFERED, "macs": ["hmac-md5"]})
    assert "Ciphers" not in lines(ciphers=[])


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (
            {"kbdinteractiveauthentication", "pubkeyacceptedalgorithms"},
            {"KbdInteractiveAuthentication", "PubkeyAcceptedAlgorithms"},
        ),
        (
            {"kbdinteractiveauthentication", "challengeresponseauthentication", "pubkeyacceptedkeytypes"},
            {"KbdInteractiveAuthentication", "ChallengeResponseAuthentication", "PubkeyAcceptedKeyTypes"},
        ),
    ],
)
def test_an_older_sshd_is_told_by_its_own_words(known: set[str], expected: set[str]) -> None:
    assert set(lines(known)) == expected


def test_given_directives_win_whatever_they_are_called() -> None:
    found = lines(
        settings={"permitrootlogin": "prohibit-password", "ChallengeResponseAuthentication": True, "MaxAuthTries": None}
    )
    assert "PermitRootLogin" not in found
    assert found["permitrootlogin"] == "prohibit-password"
    assert "KbdInteractiveAuthentication" not in found
    assert "MaxAuthTries" not in found


def test_a_variable_that_is_null_is_left_to_the_host() -> None:
    assert "LogLevel" not in lines(log_level=None)


def test_lists_and_booleans_become_what_sshd_takes() -> None:
    more = {"AcceptEnv": ["A", "B"], "AuthenticationMethods": ["publickey", "password"], "Ciphers": ["x", "y"]}
    settings = settings_from(options(settings=more))
    assert settings.given == (
        Directive("AcceptEnv", "A"),
        Directive("AcceptEnv", "B"),
        Directive("AuthenticationMethods", "publickey password"),
        Directive("Ciphers", "x,y"),
    )


@pytest.mark.parametrize(
    ("given", "expected"), [(False, "no"), (True, "yes"), ("False", "no"), ("without-password", "prohibit-password")]
)
def test_root_login_as_yaml_may_read_it(given: object, expected: str) -> None:
    assert wanted_value(settings_from(options(permit_root_login=given)), "permitrootlogin") == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"permit_root_login": "maybe"}, "sshd_hardening_permit_root_login: expected one of .*; got 'maybe'"),
        ({"password_authentication": "perhaps"}, "sshd_hardening_password_authentication: expected true or false"),
        ({"max_auth_tries": [3]}, "sshd_hardening_max_auth_tries: expected a text, a whole number or a boolean"),
        ({"ciphers": "aes"}, "sshd_hardening_ciphers: expected a list of algorithms; got 'aes'"),
        ({"settings": ["X"]}, "sshd_hardening_settings: expected a mapping from sshd's keywords to values; got list"),
        ({"settings": {"Two words": 1}}, "sshd_hardening_settings: expected a keyword of sshd_config"),
        ({"settings": {"Include": "/x"}}, "sshd_hardening_settings: expected a directive; got Include"),
        ({"settings": {"Banner": ""}}, "sshd_hardening_settings: Banner: expected a text"),
        ({"settings": {"AllowUsers": []}}, "sshd_hardening_settings: AllowUsers: expected a value; got an empty list"),
        ({"settings": {"Banner": "a\nPermitRootLogin yes"}}, "sshd_hardening_settings: Banner: expected one line"),
        ({"match": {"criteria": "all"}}, "sshd_hardening_match: expected a list"),
        (
            {"match": [{"criteria": "User x"}]},
            r"sshd_hardening_match: expected a mapping with .*; got \['criteria'\]",
        ),
        (
            {"match": [{"criteria": "User x\nMatch all", "settings": {}}]},
            "sshd_hardening_match: criteria: expected one line",
        ),
    ],
)
def test_bad_input_names_the_variable(more: dict[str, object], message: str) -> None:
    with pytest.raises(PortknockError, match=message):
        settings_from(options(**more))


def test_a_missing_variable_is_named() -> None:
    given = options()
    del given["macs"]
    with pytest.raises(PortknockError, match="sshd_hardening_macs: required"):
        settings_from(given)


def test_settings_survive_json() -> None:
    settings = settings_from(
        options(
            settings={"MaxSessions": 3, "LogLevel": None},
            match=[{"criteria": "User x", "settings": {"Banner": "none"}}],
        )
    )
    assert unpacked(json.loads(json.dumps(packed(settings)))) == settings


def test_match_blocks_come_last() -> None:
    text = as_text([Directive("A", "1")], [Match("User x", (Directive("B", "2"),))])
    assert text == "A 1\n\nMatch User x\n    B 2\n"


@pytest.mark.parametrize(
    ("main", "expected"),
    [
        ("Include /etc/ssh/sshd_config.d/*.conf\n", True),
        ("# Include /etc/ssh/sshd_config.d/*.conf\n", False),
        ("include sshd_config.d/*.conf other\n", True),
        ("Include /etc/ssh/other.d/*.conf\n", False),
        ("Match User x\nInclude /etc/ssh/sshd_config.d/*.conf\n", False),
        ("", False),
    ],
)
def test_whether_drop_ins_are_read(main: str, expected: bool) -> None:
    assert includes(main, MAIN, DROP_IN) is expected


@pytest.mark.parametrize("main", ["Port 22\n\nMatch User x\n    Banner none\n", "Port 22", ""])
@pytest.mark.parametrize("matches", [(), (Match("User y", (Directive("Banner", "none"),)),)])
def test_blocks_go_in_and_out(main: str, matches: tuple[Match, ...]) -> None:
    once = with_blocks(main, [Directive("PermitRootLogin", "no")], matches)
    assert once.index("PermitRootLogin no") < once.index("Port 22") if main else True
    assert with_blocks(once, [Directive("PermitRootLogin", "no")], matches) == once
    assert without_blocks(once) == main


def test_overruled_compares_what_sshd_makes_of_both() -> None:
    wanted = read_effective("maxauthtries 4\nacceptenv A\nlogingracetime 30\nkbdinteractiveauthentication no\n")
    effective = read_effective(
        "maxauthtries 6\nacceptenv LANG\nacceptenv A\nlogingracetime 30\nkbdinteractiveauthentication yes\n"
    )
    names = ["MaxAuthTries", "AcceptEnv", "LoginGraceTime", "ChallengeResponseAuthentication", "NotTold"]
    assert overruled(wanted, effective, names) == ["maxauthtries", "challengeresponseauthentication"]


def test_places_in_the_order_in_which_sshd_reads(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    ours = folder / "00-ours.conf"
    ours.write_text("X11Forwarding no\n")
    (folder / "50-theirs.conf").write_text("# X11Forwarding yes\nx11forwarding=yes\nMatch User x\n\tX11Forwarding no\n")
    main = tmp_path / "main"
    block = with_blocks("", [Directive("X11Forwarding", "no")], ())
    main.write_text(f"{block}Include {folder}/*.conf\nX11Forwarding yes\nMatch all\nX11Forwarding yes\n")
    before = block.count("\n")

    def read(path: str) -> str:
        return Path(path).read_text()

    found = [str(place) for place in places("X11Forwarding", str(main), read, [str(ours)])]
    assert found == [
        f"{folder}/50-theirs.conf:2",
        f"{folder}/50-theirs.conf:4 (in a Match block)",
        f"{main}:{before + 2}",
        f"{main}:{before + 4}",
    ]
