# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Single packet authorization: keys, their text, what the client is told and how, and how a host's secrets come to want it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._backends import mode_of
from ansible_collections.fleet.portknock.plugins.module_utils._card import CardHost, card_files
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._gate import (
    SPA_KEYS,
    build_model,
    guard_warnings,
    settings_from,
)
from ansible_collections.fleet.portknock.plugins.module_utils._jump import _sources
from ansible_collections.fleet.portknock.plugins.module_utils._keyring import HostSecrets, HostState
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import Address, knock_until_open, send
from ansible_collections.fleet.portknock.plugins.module_utils._masking import masked
from ansible_collections.fleet.portknock.plugins.module_utils._planning import plan_secrets
from ansible_collections.fleet.portknock.plugins.module_utils._ports import (
    GNUPG,
    KNOCK_PROTOCOLS,
    SENT_PROTOCOLS,
    SEQUENCE,
    SPA,
    Knock,
    parse_knock,
)
from ansible_collections.fleet.portknock.plugins.module_utils._proof import answer
from ansible_collections.fleet.portknock.plugins.module_utils._rotation import RETIRED, begin, finish
from ansible_collections.fleet.portknock.plugins.module_utils._spa import (
    GnupgPackets,
    asking_for,
    check_source,
    client_stanza,
    gnupg_keys_of,
    keys_of,
    new_gnupg,
    new_spa,
    send_spa,
)

NOW = "2026-03-01T12:00:00Z"
LATER = "2026-03-02T12:00:00Z"
SSH = Knock(22, "tcp")
HERE = Address(socket.AF_INET, ("127.0.0.1", 22))


def planned(existing: HostSecrets | None = None, spa: Knock | None = SSH, **options: object) -> HostSecrets:
    chosen: dict[str, object] = {"operators": ["alice", "bob"], "protected": {22}, "now": NOW, **options}
    return plan_secrets(existing, keyring_id="ring", host="web1", spa=spa, **chosen).secrets  # type: ignore[arg-type]


def opened_by(secrets: HostSecrets, operator: str | None = None) -> list[str]:
    """What a client tries, in short."""
    kinds = {True: GNUPG, False: SPA}
    return [
        kinds[knocks[0].spa.startswith("gnupg:")] if knocks[0].spa else SEQUENCE
        for _operator, knocks in secrets.candidates(operator)
    ]


def test_new_keys_are_of_the_right_size_and_differ() -> None:
    made = [new_spa(SSH) for _number in range(5)]
    assert {tuple(len(base64.b64decode(key)) for key in keys_of(spa)) for spa in made} == {(32, 64)}
    assert len({key for spa in made for key in keys_of(spa)}) == 10


def test_the_text_is_read_again() -> None:
    spa = new_spa(Knock(51820, "udp"))
    for one in (spa, asking_for([spa], "192.0.2.7")[0]):
        assert parse_knock(str(one), "x", protocols=SENT_PROTOCOLS) == one
    assert keys_of(asking_for([spa], "192.0.2.7")[0]) == keys_of(spa)
    assert asking_for([SSH, spa], "192.0.2.7")[0] == SSH
    assert asking_for([spa], "") == (spa,)


@pytest.mark.parametrize("protocols", [("tcp", "udp"), KNOCK_PROTOCOLS])
def test_it_is_no_knock_where_there_are_sequences(protocols: tuple[str, ...]) -> None:
    spa = new_spa(SSH)
    with pytest.raises(PortknockError, match="option: expected port/protocol") as failure:
        parse_knock(str(spa), "option", secret=True, protocols=protocols)
    assert spa.spa not in str(failure.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-1],
        lambda text: text + "A",
        lambda text: text.replace("22/tcp", "22/icmp"),
        lambda text: text.replace("22/tcp", "22/spa"),
        lambda text: text.replace("22/", "0/"),
        lambda text: text + "@example.org",
        lambda text: text + "\n",
        lambda _text: "22/spa",
    ],
)
def test_another_text_is_refused_and_not_shown(change: object) -> None:
    text = str(new_spa(SSH))
    with pytest.raises(PortknockError) as failure:
        parse_knock(change(text), "option", secret=True, protocols=SENT_PROTOCOLS)  # type: ignore[operator]
    assert not any(key[:20] in str(failure.value) for key in text.split(":"))


@pytest.mark.parametrize("value", ["2001:db8::1", "example.org", "192.0.2.300", 7])
def test_a_source_that_is_none(value: object) -> None:
    with pytest.raises(PortknockError, match=r"knock_spa_source: expected an IPv4 address such as 192\.0\.2\.7; got"):
        check_source(value, "knock_spa_source")


def test_what_the_client_is_told() -> None:
    spa = new_spa(SSH)
    lines = dict(line.split(" ", 1) for line in client_stanza("web1", "192.0.2.1", spa, "192.0.2.9").splitlines()[1:])
    assert lines["ACCESS"] == "tcp/22"
    assert lines["ALLOW_IP"] == "192.0.2.9"
    assert (lines["KEY_BASE64"], lines["HMAC_KEY_BASE64"], lines["USE_HMAC"]) == (*keys_of(spa), "Y")
    assert "ALLOW_IP 192.0.2.7" in client_stanza("web1", "192.0.2.1", asking_for([spa], "192.0.2.7")[0], "192.0.2.9")
    assert "ALLOW_IP" not in client_stanza("web1", "192.0.2.1", spa)


def fake_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str = "exit 0") -> Path:
    """A program that writes down what it is given."""
    programs, seen = tmp_path / "bin", tmp_path / "seen"
    programs.mkdir()
    (programs / "fwknop").write_text(
        f'#!/bin/sh\nstat -L -c %a "$2" >{seen}.mode\ncat "$2" >{seen}.rc\n'
        f'printf "%s\\n" "$@" >{seen}.args\nenv >{seen}.env\n{last}\n'
    )
    (programs / "fwknop").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return seen


@pytest.mark.parametrize("in_memory", [True, False])
def test_keys_go_by_a_private_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool) -> None:
    seen = fake_client(tmp_path, monkeypatch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if not in_memory:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    spa = new_spa(SSH)
    send(HERE, [spa], source="192.0.2.9")
    assert seen.with_suffix(".rc").read_text() == client_stanza("portknock", "127.0.0.1", spa, "192.0.2.9")
    assert seen.with_suffix(".mode").read_text() == "600\n"
    shown = seen.with_suffix(".args").read_text() + seen.with_suffix(".env").read_text()
    assert "--no-save-args" in shown
    assert not any(key in shown for key in keys_of(spa))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "seen.args", "seen.env", "seen.mode", "seen.rc"]


def test_the_local_address_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_client(tmp_path, monkeypatch)
    send(HERE, [new_spa(SSH)])
    assert "ALLOW_IP 127.0.0.1\n" in seen.with_suffix(".rc").read_text()


def test_a_client_that_fails_is_named_and_not_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_client(tmp_path, monkeypatch, last='cat "$2" >&2; exit 3')
    spa = new_spa(SSH)
    with pytest.raises(
        PortknockError, match=r"`fwknop` to send a packet to 192\.0\.2\.1; it has ended with code 3"
    ) as failure:
        send_spa("192.0.2.1", spa, "192.0.2.9")
    assert not any(key in str(failure.value) for key in keys_of(spa))


def test_no_client_is_an_error_that_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PortknockError, match="fwknop-client"):
        send(HERE, [new_spa(SSH)])
    request = {"place": "bastion", "host": "192.0.2.1", "port": 22, "family": "any", "addresses": [], "further": []}
    assert "`fwknop` on bastion" in answer("scout", {**request, "mode": SPA})["problem"]
    assert "fwknop" not in json.dumps(answer("scout", {**request, "mode": SEQUENCE}))


def test_ipv6_is_no_way() -> None:
    result = knock_until_open([Address(socket.AF_INET6, ("::1", 22, 0, 0))], [new_spa(SSH)], 22, 1.0)
    assert (result.state, result.error) == ("unreachable", "EAFNOSUPPORT")


# What the keyring holds.


def test_each_operator_has_keys_beside_the_sequence() -> None:
    secrets = planned()
    assert opened_by(secrets) == [SPA, SPA]
    honoured = secrets.honoured(["alice", "bob"])
    assert all(len(one.sequences) == 1 and one.sequences[0][0].spa for one in honoured.values())
    assert secrets.to_prove(["alice", "bob"])[0].spa
    assert planned(secrets, now=LATER) == secrets


def test_they_are_kept_and_nothing_of_them_is_shown() -> None:
    secrets = planned()
    assert HostSecrets.from_mapping(json.loads(json.dumps(secrets.to_mapping())), "web1.yml") == secrets
    shown = json.dumps(secrets.describe())
    keys = [key for entry in secrets.operators.values() if entry.current.spa for key in keys_of(entry.current.spa)]
    assert len(keys) == 4
    assert not any(key in shown for key in keys)
    broken = secrets.to_mapping()
    broken["operators"]["alice"]["current"]["spa"] = f"22/tcp/spa:{keys[0]}:wrong"  # type: ignore[index]
    with pytest.raises(PortknockError, match=r"web1\.yml: expected port/protocol/spa:key:key as spa") as failure:
        HostSecrets.from_mapping(broken, "web1.yml")
    assert keys[0] not in str(failure.value)


def test_a_change_of_the_back_end_keeps_every_way_in_until_it_is_proved() -> None:
    former = planned(spa=None).promoted(NOW)
    moving = planned(former)
    # The sequence may still be what opens: a client tries both.
    assert opened_by(moving, "alice") == [SPA, SEQUENCE]
    assert moving.generation == former.generation + 1
    assert moving.operators["alice"].current.knocks == former.operators["alice"].current.knocks
    moved = moving.promoted(LATER)
    assert opened_by(moved, "alice") == [SPA]
    assert moved.fingerprint == moving.fingerprint != former.fingerprint
    back = planned(moved, spa=None)
    assert opened_by(back, "alice") == [SEQUENCE, SPA]
    assert back.generation == moved.generation + 1
    assert HostState("ring", moved.generation, moved.fingerprint).contradicts(moved) is False
    # Once more: what was there is taken up again.
    again = planned(back.promoted(LATER))
    assert again.operators["alice"].current.spa == moved.operators["alice"].current.spa


def test_a_gate_of_another_mode_is_refused() -> None:
    secrets = planned()
    secrets.check_mode(SPA)
    with pytest.raises(
        PortknockError, match="knock_server_backend: expected one that is opened by what the keyring holds"
    ):
        secrets.check_mode(SEQUENCE)
    with pytest.raises(PortknockError, match="knock_server_backend"):
        begin(secrets, ["alice"], rotation="1", now=NOW)


def test_keys_rotate_like_sequences() -> None:
    secrets = planned().promoted(NOW)
    begun = begin(secrets, ["alice"], rotation="1", now=NOW, spa=SSH, protected={22}).secrets
    alice = begun.operators["alice"]
    assert alice.next is not None
    assert alice.next.spa is not None
    assert alice.next.spa != alice.current.spa
    both = begun.honoured(["alice", "bob"])["alice"].sequences
    assert both == [(alice.next.spa,), (alice.current.spa,)]
    assert begun.operators["bob"] == secrets.operators["bob"]
    done = finish(begun.promoted(NOW), ["alice"], grace=0, now=LATER)
    assert done.done == {"alice": RETIRED}
    assert done.secrets.honoured(["alice"])["alice"].sequences == [(alice.next.spa,)]


def test_a_given_sequence_does_not_hold_up_a_rotation_of_keys() -> None:
    given = {"alice": [(Knock(40001, "tcp"), Knock(30003, "tcp"), Knock(50005, "tcp"))]}
    secrets = planned(planned(spa=None, given=given, operators=["alice"]).promoted(NOW), operators=["alice"])
    begun = begin(secrets.promoted(NOW), ["alice"], rotation="1", now=NOW, spa=SSH).secrets.promoted(NOW)
    assert finish(begun, ["alice"], grace=0, now=LATER).done == {"alice": RETIRED}


def test_sequences_can_t_be_given() -> None:
    given = {"alice": [(Knock(40001, "tcp"), Knock(30003, "tcp"), Knock(50005, "tcp"))]}
    with pytest.raises(PortknockError, match=r"knock_server_sequences: expected none where .*fwknop.*alice"):
        planned(given=given)


def test_one_who_was_revoked_and_let_in_again_has_new_keys() -> None:
    secrets = planned()
    alice = replace(secrets.operators["alice"], active=False, revoked=NOW)
    revoked = replace(secrets, operators={**secrets.operators, "alice": alice})
    assert list(revoked.honoured(["alice", "bob"])) == ["bob"]
    again = planned(revoked, readmit=["alice"]).operators["alice"]
    assert again.current.spa is not None
    assert again.current.spa != alice.current.spa


# What the gate is made of.


def test_the_model() -> None:
    secrets = planned(valid_until={"bob": "2027-01-01T00:00:00Z"})
    settings = settings_from({"protected_ports": ["22/tcp", "51820/udp"]})
    model = build_model(settings, secrets.honoured(["alice", "bob"]), bytes(32), frozenset(), {}, "fwknop")
    spa = model["spa"]
    assert isinstance(spa, dict)
    assert [one["name"] for one in spa["asked"]] == ["tcp/22", "udp/51820"]
    assert [one["number"] for one in spa["asked"]] == ["6/22", "17/51820"]
    assert [(one["operator"], one["number"], one["valid_until"]) for one in spa["stanzas"]] == [
        ("alice", "1", None),
        ("bob", "2", 1798761600),
    ]
    assert {(one["key"], one["hmac_key"]) for one in spa["stanzas"]} == {
        keys_of(entry.current.spa) for entry in secrets.operators.values() if entry.current.spa
    }
    assert (model["steps"], model["tripwires"]) == ([], [])


def test_what_the_user_is_told() -> None:
    assert guard_warnings(settings_from({}), 1, "fwknop") == []
    (warning,) = guard_warnings(settings_from({"guard": "loose"}), 1, "fwknop")
    assert "knock_server_guard: loose means nothing to fwknop" in warning


def test_a_diff_shows_no_key_and_that_one_has_changed() -> None:
    old, new = new_spa(SSH), new_spa(SSH)
    before, after = (
        f"SOURCE ANY\nKEY_BASE64   {keys_of(spa)[0]}\nHMAC_KEY_BASE64 {keys_of(spa)[1]}\n" for spa in (old, new)
    )
    assert masked(before, before)[1] == "SOURCE ANY\nKEY_BASE64   (secret)\nHMAC_KEY_BASE64 (secret)\n"
    shown = masked(before, after)
    assert shown[1] == "SOURCE ANY\nKEY_BASE64   (another secret)\nHMAC_KEY_BASE64 (another secret)\n"
    assert not any(key in "".join(shown) for spa in (old, new) for key in keys_of(spa))


def test_a_card_has_no_key() -> None:
    spa = new_spa(SSH)
    card = card_files("alice", [CardHost("web1", "192.0.2.1", 22, [(spa,)])])
    assert b"fwknop --no-save-args --rc-file fwknoprc -n web1 -a 192.0.2.7" in card["card.txt"]
    assert not any(key.encode() in text for key in keys_of(spa) for text in card.values())


# The same with keys of GnuPG's.


def made_up(asked: Knock) -> GnupgPackets:
    """What GnuPG would make, as far as it matters here."""

    def key(length: int) -> tuple[str, str]:
        return os.urandom(20).hex().upper(), base64.b64encode(os.urandom(length)).decode()

    hmac_key = base64.b64encode(os.urandom(64)).decode()
    (host, host_key), (operator, operator_key) = key(1271), key(1271)
    public = {host: key(620)[1], operator: key(620)[1]}
    return GnupgPackets(
        *(
            asked._replace(spa=":".join(("gnupg", hmac_key, own, own_key, peer, public[peer])))
            for own, own_key, peer in ((operator, operator_key, host), (host, host_key, operator))
        )
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that take no time to make."""
    monkeypatch.setattr("ansible_collections.fleet.portknock.plugins.module_utils._keyring.new_gnupg", made_up)


def secret_parts(packets: GnupgPackets) -> list[str]:
    return [part for side in packets for part in (gnupg_keys_of(side).hmac_key, gnupg_keys_of(side).own)]


@pytest.mark.skipif(not shutil.which("gpg-agent"), reason="needs GnuPG")
def test_each_side_has_its_own_private_key_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    packets = new_gnupg(SSH)
    operator, host = map(gnupg_keys_of, packets)
    assert operator.hmac_key == host.hmac_key
    assert (operator.own_fingerprint, host.own_fingerprint) == (host.peer_fingerprint, operator.peer_fingerprint)
    # OpenPGP: the first byte of a transferable private key (tag 5) and of a public one (tag 6), old format.
    kinds = [[base64.b64decode(key)[0] >> 2 & 15 for key in (side.own, side.peer)] for side in (operator, host)]
    assert kinds == [[5, 6], [5, 6]]
    assert len({operator.own, operator.peer, host.own, host.peer}) == 4
    for packet in packets:
        assert parse_knock(str(packet), "x", protocols=SENT_PROTOCOLS) == packet
        assert parse_knock(str(asking_for([packet], "192.0.2.7")[0]), "x", protocols=SENT_PROTOCOLS)
        assert gnupg_keys_of(asking_for([packet], "192.0.2.7")[0]) == gnupg_keys_of(packet)


@pytest.mark.usefixtures("quick")
def test_keys_of_gnupg_are_kept_and_nothing_of_them_is_shown() -> None:
    secrets = planned(gnupg=True)
    assert HostSecrets.from_mapping(json.loads(json.dumps(secrets.to_mapping())), "web1.yml") == secrets
    every = [entry.current.gnupg for entry in secrets.operators.values() if entry.current.gnupg]
    assert len(every) == 2
    assert not any(part in json.dumps(secrets.describe()) for one in every for part in secret_parts(one))
    assert planned(secrets, gnupg=True, now=LATER) == secrets
    for broken in ({"operator": str(every[0].operator)}, {"operator": str(new_spa(SSH)), "host": str(every[0].host)}):
        mapping = secrets.to_mapping()
        mapping["operators"]["alice"]["current"]["gnupg"] = broken  # type: ignore[index]
        with pytest.raises(PortknockError, match=r"web1\.yml: expected .* as gnupg; got something else") as failure:
            HostSecrets.from_mapping(mapping, "web1.yml")
        assert not any(part in str(failure.value) for part in secret_parts(every[0]))
    mapping = secrets.to_mapping()
    mapping["operators"]["alice"]["current"]["spa"] = str(every[0].operator)  # type: ignore[index]
    with pytest.raises(PortknockError, match=r"expected port/protocol/spa:key:key as spa"):
        HostSecrets.from_mapping(mapping, "web1.yml")


@pytest.mark.usefixtures("quick")
def test_the_host_and_the_operators_have_each_their_side() -> None:
    secrets = planned(gnupg=True)
    packets = secrets.operators["alice"].current.gnupg
    assert packets is not None
    assert secrets.candidates("alice") == [("alice", (packets.operator,))]
    assert secrets.to_prove(["alice"]) == (packets.operator,)
    assert secrets.honoured(["alice"])["alice"].sequences == [(packets.host,)]
    model = build_model(settings_from({}), secrets.honoured(["alice", "bob"]), bytes(32), frozenset(), {}, "fwknop")
    operator, host = map(gnupg_keys_of, packets)
    assert isinstance(model["spa"], dict)
    stanza = model["spa"]["stanzas"][0]
    assert (stanza["key"], stanza["hmac_key"]) == ("", operator.hmac_key)
    assert (stanza["recipient"], stanza["signer"]) == (host.own_fingerprint, operator.own_fingerprint)
    assert model["spa"]["gnupg"]["keys"][:2] == [host.own, host.peer]
    assert model["spa"]["gnupg"]["trusted"][0] == operator.own_fingerprint
    assert operator.own not in json.dumps(model)
    with pytest.raises(PortknockError, match="knock_server_spa_keys: expected symmetric on a host without GnuPG"):
        build_model(settings_from({}), secrets.honoured(["alice"]), bytes(32), frozenset(), {"gnupg": False}, "fwknop")


@pytest.mark.usefixtures("quick")
def test_a_change_of_the_keys_kind_keeps_every_way_in_until_it_is_proved() -> None:
    former = planned().promoted(NOW)
    moving = planned(former, gnupg=True)
    assert opened_by(moving, "alice") == [GNUPG, SPA]
    assert (moving.mode, moving.generation) == (GNUPG, former.generation + 1)
    moved = moving.promoted(LATER)
    assert opened_by(moved, "alice") == [GNUPG]
    assert moved.fingerprint == moving.fingerprint != former.fingerprint
    back = planned(moved)
    assert opened_by(back, "alice") == [SPA, GNUPG]
    assert back.promoted(LATER).operators["alice"].current.spa == former.operators["alice"].current.spa
    with pytest.raises(PortknockError, match="knock_server_backend"):
        begin(moved, ["alice"], rotation="1", now=NOW, spa=SSH)


@pytest.mark.usefixtures("quick")
def test_keys_of_gnupg_rotate_like_sequences() -> None:
    secrets = planned(gnupg=True).promoted(NOW)
    begun = begin(secrets, ["alice"], rotation="1", now=NOW, spa=SSH, gnupg=True).secrets
    alice = begun.operators["alice"]
    assert alice.next is not None
    assert alice.next.gnupg is not None
    assert alice.current.gnupg is not None
    both = [(alice.next.gnupg.host,), (alice.current.gnupg.host,)]
    assert begun.honoured(["alice"])["alice"].sequences == both
    done = finish(begun.promoted(NOW), ["alice"], grace=0, now=LATER).secrets
    assert done.honoured(["alice"])["alice"].sequences == both[:1]


def test_keys_of_gnupg_are_for_one_packet_only() -> None:
    assert [mode_of("fwknop", kind) for kind in SPA_KEYS] == [SPA, GNUPG]
    assert mode_of("nftables", "symmetric") == SEQUENCE
    with pytest.raises(PortknockError, match=r"knock_server_spa_keys: .*\(fwknop\); got gnupg with knockd"):
        mode_of("knockd", "gnupg")
    with pytest.raises(PortknockError, match="knock_server_spa_keys: expected one of symmetric, gnupg; got 'pgp'"):
        settings_from({"spa_keys": "pgp"})


def test_a_machine_without_gnupg_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_client(tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    packets = made_up(SSH)
    with pytest.raises(PortknockError, match=r"knock_server_spa_keys: expected GnuPG on this machine .*gpg-agent"):
        send(HERE, [packets.operator])
    with pytest.raises(PortknockError, match="knock_server_spa_keys: expected GnuPG on this machine"):
        new_gnupg(SSH)
    request = {"place": "bastion", "host": "192.0.2.1", "port": 22, "family": "any", "addresses": [], "further": []}
    assert "GnuPG on bastion" in answer("scout", {**request, "mode": GNUPG})["problem"]
    assert "GnuPG" not in json.dumps(answer("scout", {**request, "mode": SPA}))


def test_a_jump_host_is_given_all_that_it_needs() -> None:
    name = send.__module__
    assert name.replace("_knocking", "_gnupg") in _sources(name)


def test_a_diff_shows_no_key_of_gnupg() -> None:
    old, new = (gnupg_keys_of(made_up(SSH).host) for _number in range(2))
    before, after = (f'{{"keys": [\n "{keys.own}",\n "{keys.peer}"]}}\n' for keys in (old, new))
    assert masked(before, before)[1] == '{"keys": [\n "(secret)",\n "(secret)"]}\n'
    shown = masked(before, after)
    assert shown[1] == '{"keys": [\n "(another secret)",\n "(another secret)"]}\n'
    assert not any(key[:40] in "".join(shown) for keys in (old, new) for key in (keys.own, keys.peer))


def test_a_card_sends_people_with_gnupg_to_the_helper() -> None:
    packet = made_up(SSH).operator
    card = card_files("alice", [CardHost("web1", "192.0.2.1", 22, [(packet,)])])
    assert b"GnuPG" in card["card.txt"]
    assert b"fwknoprc" not in card["card.txt"]
    assert not any(part[:40].encode() in text for part in packet.spa.split(":")[1:] for text in card.values())
