# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils import _derivation
from ansible_collections.fleet.portknock.plugins.module_utils._derivation import derive_sequence, excluded_ports
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._nmap_ports import nmap_ports
from ansible_collections.fleet.portknock.plugins.module_utils._sequences import check

SECRET = "0f1e2d3c4b5a69788796a5b4c3d2e1f00112233445566778899aabbccddeeff0"
PASSPHRASE = "a passphrase öf thirty-one bytes"
BOTH = ("tcp", "udp")
FEW = [
    *(2194, 8884, 12042, 14839, 14840, 14841, 17784, 20936, 24011, 27117, 30222, 33371),
    *(36250, 39191, 42106, 44964, 47810, 50884, 53773, 56602, 59428, 62231, 64977),
]
USABLE = sorted(set(range(1024, 65536)) - excluded_ports())


def derive(*arguments: Any, secret: object = SECRET, **options: Any) -> str:
    return " ".join(map(str, derive_sequence(secret, *arguments, **options)))


# Computed, too, by a second program that was written from the documentation of derive_sequence alone. These may never
# change: hosts would be locked, with an upgrade of the collection, to knocks that nobody sends any more. What needs other
# ones is version 2, beside this one.
@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        (("web1",), {}, "61361/tcp 53824/tcp 63111/tcp 46735/tcp"),
        (("web2",), {}, "53017/tcp 8606/tcp 24260/tcp 59729/tcp"),
        (("web1", "alice"), {}, "52051/tcp 21535/tcp 24807/tcp 28118/tcp"),
        (("web1", "default", 2), {}, "62453/tcp 39906/tcp 56595/tcp 50773/tcp"),
        (("web1",), {"length": 3}, "19551/tcp 46501/tcp 8176/tcp"),
        (
            ("web1", "alice", 2),
            {"length": 8},
            "42245/tcp 38821/tcp 25998/tcp 56714/tcp 30393/tcp 35362/tcp 20778/tcp 64745/tcp",
        ),
        (
            ("web1",),
            {"length": 6, "protocols": BOTH},
            "49099/udp 43025/tcp 24559/tcp 43702/tcp 39781/tcp 57648/udp",
        ),
        (
            ("web1",),
            {"length": 16, "protocols": ["udp"]},
            "48745/udp 49027/udp 44676/udp 37806/udp 38604/udp 51605/udp 18990/udp 13740/udp 31634/udp 7974/udp "
            "30543/udp 20305/udp 5148/udp 36717/udp 10459/udp 9033/udp",
        ),
        (
            ("web1",),
            {"length": 16, "protocols": BOTH},
            "35698/tcp 48030/tcp 18837/udp 58495/tcp 39862/udp 26402/udp 5686/tcp 39356/udp 16906/tcp 62260/tcp "
            "6884/udp 20637/udp 33568/udp 41399/tcp 49857/udp 50281/tcp",
        ),
        (("bücher.example",), {}, "39571/tcp 45756/tcp 42047/tcp 9393/tcp"),
        # The same to the eye, but written with a combining mark.
        (("bu\u0308cher.example",), {}, "23488/tcp 39446/tcp 32278/tcp 44562/tcp"),
        (
            ("服务器-1", "bob", 7),
            {"length": 5, "protocols": BOTH},
            "11987/udp 19646/udp 30440/tcp 46046/tcp 30124/udp",
        ),
        (
            ("db-1.example.org", "_ops.2", 2147483647),
            {"protocols": ["udp"], "secret": PASSPHRASE},
            "31213/udp 14738/udp 49366/udp 15874/udp",
        ),
        # Two ports that come up in the first one's drawing are protected.
        (("web1",), {"protected": {53824, 46735}}, "46691/tcp 61361/tcp 63111/tcp 21113/tcp"),
        # Two ports are as near as may be.
        (("web877",), {}, "45919/tcp 55259/tcp 51285/tcp 51287/tcp"),
        # The drawing came upon neighbours, and began again.
        (("web1578",), {}, "5466/tcp 15164/tcp 45705/tcp 29962/tcp"),
        # So few ports are left that they are counted out.
        (
            ("web1",),
            {"length": 5, "protected": set(range(1024, 65536)).difference(FEW)},
            "20936/tcp 33371/tcp 14839/tcp 2194/tcp 53773/tcp",
        ),
    ],
)
def test_sequences_are_frozen_as_version_1(arguments: Any, options: Any, expected: str) -> None:
    assert derive(*arguments, **options) == expected


def test_the_ports_that_version_1_leaves_out_are_frozen() -> None:
    listed = " ".join(map(str, sorted(excluded_ports())))
    assert (
        hashlib.sha256(listed.encode()).hexdigest()
        == "fc8ad7abbf35c5b4af21bc154ca6c3c2d38f6f4edae5b5725a5270b45710d15d"
    ), (
        "The list of nmap's ports changed, and with it the ports of derived sequences of version 1: "
        "give _derivation a copy of the former list."
    )


def test_the_role_refuses_no_port_that_version_1_may_hold() -> None:
    """Given sequences are held to nmap's list at every run of the role, derived ones among them."""
    assert nmap_ports() <= excluded_ports()


def test_every_input_counts() -> None:
    variants = [
        derive("web1", "alice", 1),
        derive("web2", "alice", 1),
        derive("web1", "bob", 1),
        derive("web1", "alice", 2),
        derive("web1", "alice", 1, length=5),
        derive("web1", "alice", 1, protocols=["udp"]),
        derive("web1", "alice", 1, protocols=BOTH),
        derive("web1", "alice", 1, secret=PASSPHRASE),
    ]
    ports = [{knock.split("/")[0] for knock in variant.split()} for variant in variants]
    # None is the beginning, the end or another writing of another one.
    assert all(not one & other for one, other in itertools.combinations(ports, 2))


def test_where_one_field_ends_and_the_next_begins_counts() -> None:
    joined = {
        _derivation._joined(fields) for fields in ([b"web1", b"1"], [b"web", b"11"], [b"web11", b""], [b"", b"web11"])
    }
    assert len(joined) == 4
    assert len({derive("web1", "1", 11), derive("web11", "1", 1), derive("web", "11", 11)}) == 3


@pytest.mark.parametrize(
    ("same", "options"),
    [
        ("protocols", {"length": 6, "protocols": ["udp", "tcp"]}),
        ("text from the command line", {"length": "6", "protocols": BOTH, "generation": "1"}),
        ("a line's end", {"length": 6, "protocols": BOTH, "secret": SECRET + "\n"}),
        ("blanks", {"length": 6, "protocols": BOTH, "secret": f" \t{SECRET}\r\n"}),
        ("ports that never come up", {"length": 6, "protocols": BOTH, "protected": {22, 443, 5432, 8080}}),
        ("another protected port", {"length": 6, "protocols": BOTH, "protected": {51820}}),
    ],
)
def test_what_means_the_same_gives_the_same(same: str, options: Any) -> None:
    assert derive("web1", **options) == derive("web1", length=6, protocols=BOTH), same


def test_protecting_a_port_changes_only_the_sequences_in_whose_drawing_it_came_up() -> None:
    hosts = [f"web{number}" for number in range(2000)]
    before = {host: derive(host) for host in hosts}
    chosen = [int(knock.split("/")[0]) for knock in (before["web7"].split()[2], before["web1500"].split()[0])]
    after = {host: derive(host, protected=set(chosen)) for host in hosts}
    changed = {host for host in hosts if before[host] != after[host]}
    holding = {host for host in hosts if any(f"{port}/" in before[host] for port in chosen)}
    assert {"web7", "web1500"} <= changed
    assert changed == holding
    assert not any(f"{port}/" in sequence for port in chosen for sequence in after.values())


@pytest.mark.parametrize("length", range(3, 17))
def test_the_rules_hold_for_every_length(length: int) -> None:
    for number in range(50):
        knocks = derive_sequence(SECRET, f"web{number}", length=length, protocols=BOTH, protected={40000})
        assert len(knocks) == length
        assert {knock.proto for knock in knocks} == {"tcp", "udp"}
        assert check(knocks, "", protected={40000}, nmap_ports=excluded_ports(), in_use=set()) == []


def spread(draw: Callable[[int], int], draws: int) -> float:
    """How unevenly draws fall on 61 parts of the usable ports: about 60, and above 127 once in a million times."""
    counts = Counter(bisect_left(USABLE, draw(number)) * 61 // len(USABLE) for number in range(draws))
    sizes = Counter(index * 61 // len(USABLE) for index in range(len(USABLE)))
    expected = {part: draws * size / len(USABLE) for part, size in sizes.items()}
    return sum((counts[part] - mean) ** 2 / mean for part, mean in expected.items())


@pytest.mark.parametrize("position", [0, 3])
def test_ports_are_even_over_secrets_hosts_and_generations(position: int) -> None:
    secrets = [hashlib.sha256(bytes([number])).hexdigest() for number in range(10)]

    def draw(number: int) -> int:
        host, generation = divmod(number // 10, 30)
        return derive_sequence(secrets[number % 10], f"web{host}", generation=generation + 1)[position].port

    assert spread(draw, 6000) < 127


def test_the_evenness_test_sees_a_remainder() -> None:
    """What a stream would give that takes a remainder instead of throwing large numbers away."""
    stream = _derivation._Stream(b"key", b"context")
    assert spread(lambda _number: USABLE[stream.randrange(65536) % len(USABLE)], 6000) > 127
    assert spread(lambda _number: USABLE[stream.randrange(len(USABLE))], 6000) < 127


def test_a_stream_gives_every_number_and_no_other() -> None:
    stream = _derivation._Stream(b"key", b"context")
    for stop in (1, 2, 3, 6, 255, 256, 257, 14):
        drawn = {stream.randrange(stop) for _ in range(12 * stop)}
        assert drawn == set(range(stop))


RANDOM_TEXT = "secret: expected a random text of at least 16 bytes, such as openssl rand -hex 32 prints; got "


@pytest.mark.parametrize(
    ("secret", "came"),
    [
        ("", "0 bytes."),
        ("fifteen bytes!?", "15 bytes."),
        (" \n   fifteen bytes!?   \n", "15 bytes."),
        ("xyxyzzxyxyzzyyxxzz", "one of fewer than 6 different characters."),
        ("changemechangemechangeme", "one that repeats itself."),
        ("0123456789abcdef0123456789abcdef", "one that repeats itself."),
        ("\ud83d and more than 16 bytes", None),
        (None, "nothing."),
        (1234567890123456789012, "a number."),
        (True, "a boolean."),
        (b"0f1e2d3c4b5a69788796a5b4c3d2e1f0", "bytes."),
        ([SECRET], "a list."),
        ({"secret": SECRET}, "a mapping."),
        (object(), "a value of another type."),
        (
            "$ANSIBLE_VAULT;1.1;AES256\n3061626364656667\n",
            "text that Ansible's vault has encrypted and nothing decrypted.",
        ),
        (
            "\n  $ANSIBLE_VAULT;1.2;AES256;prod\n3061626364656667\n",
            "text that Ansible's vault has encrypted and nothing decrypted.",
        ),
    ],
)
def test_a_bad_secret_is_refused_and_not_repeated(secret: object, came: str | None) -> None:
    with pytest.raises(PortknockError) as caught:
        derive("web1", secret=secret)
    expected = "secret: expected text that UTF-8 can express; got half a character."
    assert str(caught.value) == (expected if came is None else RANDOM_TEXT + came)
    # What core prints of a cause could quote it.
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("secret", ["0123456789abcdef", "correct horse battery staple", "üüüüüöäßéè"])
def test_what_is_long_enough_is_taken(secret: str) -> None:
    assert derive("web1", secret=secret)


OPERATOR = (
    "operator: expected a name as knock_server_operators takes it, 1 to 64 letters, digits, dots, hyphens and "
    "underscores; got "
)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"host": ""}, "host: expected the host's name in the inventory; got an empty text."),
        ({"host": None}, "host: expected the host's name in the inventory; got nothing."),
        ({"host": ["web1"]}, "host: expected the host's name in the inventory; got a list."),
        ({"host": "web1\n"}, "host: expected the host's name in the inventory; got one with a control character."),
        ({"host": "\udc80"}, "host: expected text that UTF-8 can express; got half a character."),
        ({"operator": ""}, OPERATOR + "an empty text."),
        ({"operator": "alice bob"}, OPERATOR + "another text."),
        ({"operator": "hosts"}, OPERATOR + "another text."),
        ({"operator": 5}, OPERATOR + "a number."),
        ({"generation": 0}, "generation: expected a whole number from 1 to 2147483647; got 0."),
        ({"generation": 2**31}, "generation: expected a whole number from 1 to 2147483647; got 2147483648."),
        ({"generation": True}, "generation: expected a whole number from 1 to 2147483647; got True."),
        ({"generation": "²"}, "generation: expected a whole number from 1 to 2147483647; got '²'."),
        ({"generation": 1.0}, "generation: expected a whole number from 1 to 2147483647; got 1.0."),
        ({"length": 2}, "length: expected a whole number from 3 to 16; got 2."),
        ({"length": "17"}, "length: expected a whole number from 3 to 16; got 17."),
        ({"length": None}, "length: expected a whole number from 3 to 16; got None."),
        ({"protocols": []}, "protocols: expected a list of tcp, udp or both, each once; got []."),
        ({"protocols": ["icmp"]}, "protocols: expected a list of tcp, udp or both, each once; got ['icmp']."),
        ({"protocols": "tcp"}, "protocols: expected a list of tcp, udp or both, each once; got 'tcp'."),
    ],
)
def test_other_bad_input(options: dict[str, Any], says: str) -> None:
    with pytest.raises(PortknockError) as caught:
        derive_sequence(SECRET, **{"host": "web1", **options})
    assert str(caught.value) == says
