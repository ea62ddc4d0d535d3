# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._gate import (
    EARLIEST_TIME,
    GateSettings,
    Honoured,
    build_model,
    guard_warnings,
    guess_cost,
    settings_from,
)
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock

SEED = bytes(range(32))
A, B, C, D, E, F = (Knock(port, "tcp") for port in (50001, 41007, 61009, 50011, 41017, 61019))


def model(settings: GateSettings | None = None, sequences: Any = None, avoid: frozenset[int] = frozenset()) -> Any:
    honoured = honour(sequences or {"default": [(A, B, C)]})
    return build_model(settings or GateSettings((22,), ()), honoured, SEED, avoid, {})


def honour(sequences: Mapping[str, Any]) -> dict[str, Honoured]:
    return {name: Honoured(number, several) for number, (name, several) in enumerate(sequences.items(), start=1)}


def test_defaults() -> None:
    assert settings_from({}) == GateSettings(protected_tcp=(22,), protected_udp=())


def test_given_settings() -> None:
    settings = settings_from(
        {
            "protected_ports": ["2222/tcp", "22/tcp", "51820/udp"],
            "guard": "strict",
            "step_timeout": 3,
            "open_window": "5",
            "trusted_sources": ["192.0.2.0/25", "192.0.2.128/25", "192.0.2.7", "2001:db8::/32", "2001:db8:1::/48"],
            "closed_response": "drop",
            "tripwires": 10,
            "max_sources": 1024,
            "max_windows": 16,
        }
    )
    assert settings == GateSettings(
        protected_tcp=(22, 2222),
        protected_udp=(51820,),
        guard="strict",
        step_timeout=3,
        open_window=5,
        trusted4=("192.0.2.0/24",),
        trusted6=("2001:db8::/32",),
        closed_response="drop",
        tripwires=10,
        max_sources=1024,
        max_windows=16,
    )
    assert settings.protected == {22, 2222, 51820}


SECONDS = "expected a whole number of seconds from"
NETWORKS = "expected networks such as 192.0.2.0/24 or 2001:db8::/32, without bits beyond the prefix"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("protected_ports", [], "expected at least one port such as 22/tcp; got an empty list."),
        ("protected_ports", ["22/tcp", "22/tcp"], "expected each port once; got 22/tcp twice."),
        (
            "protected_ports",
            ["65536/tcp"],
            "expected port/protocol, a port from 1 to 65535 and tcp or udp, such as 22/tcp; got '65536/tcp'.",
        ),
        ("protected_ports", "22/tcp", "expected a list such as [22/tcp]; got '22/tcp'."),
        (
            "protected_ports",
            [f"{port}/tcp" for port in range(1, 40)],
            "expected at most 35 ports of each protocol; got more.",
        ),
        ("guard", "lax", "expected one of tripwires, strict, loose; got 'lax'."),
        ("guard", None, "expected one of tripwires, strict, loose; got None."),
        ("closed_response", "reject", "expected one of mimic, drop, reset; got 'reject'."),
        ("step_timeout", 0, f"{SECONDS} 1 to 86400; got 0."),
        ("step_timeout", -5, f"{SECONDS} 1 to 86400; got -5."),
        ("step_timeout", True, f"{SECONDS} 1 to 86400; got True."),
        ("step_timeout", "5s", f"{SECONDS} 1 to 86400; got '5s'."),
        ("open_window", 4, f"{SECONDS} 5 to 86400; got 4."),
        ("open_window", 2.5, f"{SECONDS} 5 to 86400; got 2.5."),
        ("tripwires", 0, "expected a whole number from 1 to 20000; got 0."),
        ("max_sources", -1, "expected a whole number from 1 to 16777216; got -1."),
        ("single_use", "maybe", "expected true or false; got 'maybe'."),
        ("single_use", 1, "expected true or false; got 1."),
        ("single_use", None, "expected true or false; got None."),
        ("max_windows", False, "expected a whole number from 1 to 16777216; got False."),
        ("trusted_sources", "192.0.2.1", "expected a list such as [192.0.2.0/24]; got '192.0.2.1'."),
        ("trusted_sources", ["example.org"], f"{NETWORKS}; got 'example.org'."),
        ("trusted_sources", ["192.0.2.1/24"], f"{NETWORKS}; got '192.0.2.1/24'."),
        ("trusted_sources", ["fe80::1%eth0"], f"{NETWORKS}; got 'fe80::1%eth0'."),
        ("trusted_sources", [16909060], f"{NETWORKS}; got 16909060."),
        ("trusted_sources", ["0.0.0.0/0"], "expected less than every address there is; got 0.0.0.0/0 in sum."),
        ("trusted_sources", ["::/0"], "expected less than every address there is; got ::/0 in sum."),
        (
            "trusted_sources",
            ["0.0.0.0/1", "128.0.0.0/1"],
            "expected less than every address there is; got 0.0.0.0/0 in sum.",
        ),
    ],
)
def test_bad_settings(option: str, value: object, message: str) -> None:
    with pytest.raises(PortknockError, match=f"^{re.escape(f'knock_server_{option}: {message}')}$"):
        settings_from({option: value})


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ({"a": [()]}, "knock_server_sequences: expected each port of a's sequence once, and one at least."),
        ({"a": [(A, B, A)]}, "knock_server_sequences: expected each port of a's sequence once, and one at least."),
        (
            {"a": [(A, Knock(22, "udp"))]},
            "knock_server_sequences: expected no protected port; a's sequence holds one.",
        ),
        (
            {"a": [(A, B)], "b": [(A, C)]},
            "knock_server_sequences: expected sequences that begin differently; one of b and one of a begin with the same "
            "knock.",
        ),
    ],
)
def test_bad_sequences(sequences: Any, message: str) -> None:
    with pytest.raises(PortknockError, match=f"^{re.escape(message)}$") as caught:
        model(sequences=sequences)
    assert not re.search(r"[0-9]{5}", str(caught.value))


@pytest.mark.parametrize(("value", "expected"), [(True, True), (False, False), ("yes", True), ("False", False)])
def test_single_use(value: object, expected: bool) -> None:
    """As YAML and the command line give it."""
    settings = settings_from({"single_use": value})
    assert model(settings)["single_use"] is expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_policy": "reject"}, "input_policy: expected one of accept, drop; got 'reject'."),
        ({"input_policy": False}, "input_policy: expected one of accept, drop; got False."),
        ({"open_ports": "80/tcp"}, "open_ports: expected a list such as [22/tcp]; got '80/tcp'."),
        (
            {"open_ports": ["80"]},
            "open_ports: expected port/protocol, a port from 1 to 65535 and tcp or udp, such as 22/tcp; got '80'.",
        ),
        (
            {"open_ports": ["80/tcp", "22/tcp"]},
            "open_ports: expected no port of knock_server_protected_ports, which knocks open; got 22/tcp.",
        ),
    ],
)
def test_bad_input_policy(options: dict[str, object], message: str) -> None:
    with pytest.raises(PortknockError, match=f"^{re.escape('knock_server_' + message)}$"):
        settings_from(options)


def test_what_stays_open() -> None:
    """Of one port number the protocol counts; with the default nothing is said of other ports."""
    ports = {"open_ports": ["443/tcp", "22/udp", "80/tcp"]}
    shut = settings_from({"input_policy": "drop", **ports})
    seen = [shut.shuts(Knock(*port)) for port in ((22, "tcp"), (22, "udp"), (80, "udp"), (81, "tcp"), (68, "udp"))]
    assert seen == [False, False, True, True, False]
    assert [model(shut)[name] for name in ("served", "served_tcp", "served_udp")] == [
        ["22/udp", "80/tcp", "443/tcp"],
        [80, 443],
        [22],
    ]
    plain = settings_from(ports)
    assert (plain.shuts(Knock(81, "tcp")), model(plain)["served"]) == (False, [])


def test_the_model_is_plain_and_repeats_itself() -> None:
    settings = settings_from({"protected_ports": ["22/tcp", "2222/tcp", "51820/udp"]})
    one, two = model(settings), model(settings)
    assert one == two
    assert json.loads(json.dumps(one)) == one
    assert len(one["tripwires"]) == 2000
    assert set(one) == {
        *(
            "audit_days",
            "close",
            "closed_response",
            "counts",
            "doors",
            "echo",
            "guard",
            "input_policy",
            "served",
            "served_tcp",
            "served_udp",
            "look_tcp",
            "look_udp",
            "max_sources",
            "max_windows",
            "one_time",
            "open_window",
            "opener",
        ),
        *(
            "begin_timeout",
            "operators",
            "protected_tcp",
            "protected_udp",
            "single_use",
            "socket_wildcard",
            "step_timeout",
            "steps",
            "tripwires",
            "trusted4",
            "trusted6",
        ),
    }


@pytest.mark.parametrize(
    ("probe", "expected"), [({}, False), ({"socket_wildcard": 1}, False), ({"socket_wildcard": True}, True)]
)
def test_the_probe(probe: dict[str, object], expected: bool) -> None:
    built = build_model(GateSettings((22,), ()), honour({"a": [(A, B, C)]}), SEED, frozenset(), probe)
    assert built["socket_wildcard"] is expected


def test_stand_ins() -> None:
    settings = settings_from({"protected_ports": ["22/tcp", "2222/tcp", "51820/udp"]})
    first = model(settings)
    ports = [pair["stand_in"] for pair in first["look_tcp"]]
    assert [pair["port"] for pair in first["look_tcp"]] == [22, 2222]
    assert len(set(ports)) == 2
    assert all(225 <= port < 600 for port in ports)
    moved = model(settings, avoid=frozenset(ports[:1]))
    assert next(pair["stand_in"] for pair in moved["look_tcp"]) == ports[1]
    assert model(settings, avoid=frozenset({80, 443}))["look_tcp"] == first["look_tcp"]
    assert model(settings_from({"closed_response": "drop"}))["look_tcp"] == []


def test_no_stand_in_left() -> None:
    message = (
        "knock_server_closed_response: mimic needs an unused low port for each protected port of a protocol, 1; this host "
        "leaves 0."
    )
    with pytest.raises(PortknockError, match=f"^{re.escape(message)}$"):
        model(avoid=frozenset(range(1024)))


def test_tripwires_stay_clear_of_everything_else() -> None:
    built = model(settings_from({"tripwires": 20000}), avoid=frozenset(range(2000, 9000)))
    assert not set(built["tripwires"]) & {*range(2000, 9000), *range(33434, 33535), 22, A.port, B.port, C.port}


@pytest.mark.parametrize("guard", ["strict", "loose"])
def test_other_guards_have_no_tripwires(guard: str) -> None:
    assert model(settings_from({"guard": guard}))["tripwires"] == []


def run(steps: list[dict[str, Any]], knocks: list[Knock], strict: bool) -> bool:
    """What the rules do with these packets, in words of Python."""
    table = {(step["state"], step["proto"], step["port"]): step["next"] for step in steps}
    progress = "0:0"
    for port, proto, _spa in knocks:
        after = table.get((progress, proto, port)) or table.get(("0:0", proto, port)) or ("4:0" if strict else "3:0")
        if after.startswith("2:"):
            return True
        if after == "4:0":
            progress = "0:0"
        elif after != "3:0":
            progress = after
    return False


@pytest.mark.parametrize("strict", [True, False])
def test_the_automaton_against_every_short_walk(strict: bool) -> None:
    """Every walk of up to six packets over two sequences and a foreign port, against what the words of the design say."""
    sequences = [(A, B, C), (D, B, E)]
    steps = model(sequences={"x": sequences[:1], "y": sequences[1:]})["steps"]
    for walk in itertools.product((A, B, C, D, E, F), repeat=6):
        assert run(steps, list(walk), strict) == _opens(sequences, walk, strict), walk


def _opens(sequences: Sequence[tuple[Knock, ...]], walk: tuple[Knock, ...], strict: bool) -> bool:
    current: tuple[Knock, ...] = ()
    done = 0
    for knock in walk:
        if current and knock == current[done]:
            done += 1
        elif current and knock == current[done - 1]:
            pass
        elif any(knock == sequence[0] for sequence in sequences):
            current, done = next(sequence for sequence in sequences if sequence[0] == knock), 1
        elif strict:
            current, done = (), 0
        if current and done == len(current):
            return True
    return False


def test_each_operator_s_last_knock_says_whose_it_is() -> None:
    built: Any = build_model(
        GateSettings((22,), ()),
        {"bob": Honoured(12, [(A, B), (C, D)], 1772308800, 1772300000), "alice": Honoured(3, [(E, F)])},
        SEED,
        frozenset(),
        {},
    )
    assert built["operators"] == [
        {"name": "alice", "number": "3", "valid_until": None, "valid_from": EARLIEST_TIME},
        {"name": "bob", "number": "c", "valid_until": 1772308800, "valid_from": 1772300000},
    ]
    ends = {(step["port"], step["next"]) for step in built["steps"] if step["next"].startswith("2:")}
    assert ends == {(F.port, "2:3"), (B.port, "2:c"), (D.port, "2:c")}


@pytest.mark.parametrize(("probe", "refused"), [({}, False), ({"clock": True}, False), ({"clock": False}, True)])
def test_nobody_expires_where_rules_can_t_tell_the_time(probe: dict[str, object], refused: bool) -> None:
    """Where nothing is known of the host, it has no nft yet, and a check goes on."""
    settings, lasting = GateSettings((22,), ()), Honoured(1, [(A, B)])
    expiring = {"alice": lasting, "bob": Honoured(2, [(C, D)], 1772308800)}
    build_model(settings, {"alice": lasting}, SEED, frozenset(), probe)
    if not refused:
        build_model(settings, expiring, SEED, frozenset(), probe)
        return
    with pytest.raises(PortknockError, match=r"^knock_server_valid_until: .*meta time.* bob\.$"):
        build_model(settings, expiring, SEED, frozenset(), probe)


def test_steps_grow_with_the_knocks_alone() -> None:
    one = len(model(sequences={"a": [(A, B, C)]})["steps"])
    two = len(model(sequences={"a": [(A, B, C)], "b": [(D, E, F)]})["steps"])
    assert two == 2 * one == 10


@pytest.mark.parametrize(
    ("settings", "length", "expected"),
    [
        (GateSettings((22,), (), guard="loose"), 3, 1 / 6),
        (GateSettings((22,), (), guard="loose"), 4, 1 / 24),
        (GateSettings((22,), (), guard="tripwires", tripwires=200), 3, 1 / (202 * 203)),
        (GateSettings((22,), (), guard="strict"), 3, 1 / (65535 * 65534)),
    ],
)
def test_guess_cost(settings: GateSettings, length: int, expected: float) -> None:
    assert guess_cost(settings, length) == pytest.approx(expected)


@pytest.mark.parametrize("guard", ["tripwires", "strict", "loose"])
def test_knockd_has_one_guess_cost(guard: str) -> None:
    assert guess_cost(GateSettings((22,), (), guard=guard), 6, "knockd") == pytest.approx(1 / 720)


def test_guard_warnings() -> None:
    assert guard_warnings(GateSettings((22,), ()), 4) == []
    assert guard_warnings(GateSettings((22,), (), guard="loose"), 4) == [
        "knock_server_guard: loose ignores wrong ports, so one sweep over all ports in random order opens a sequence of 4 "
        "knocks in about 1 of 24 cases, and 4 sweeps open any; tripwires or strict make that practically impossible."
    ]


def test_what_is_told_of_knockd_s_guard() -> None:
    (warning,) = guard_warnings(GateSettings((22,), ()), 6, "knockd")
    assert warning.startswith("knock_server_backend: knockd ignores ports that are in none of its sequences")
    assert "a sequence of 6 knocks in about 1 of 720 cases" in warning
    _cost, guard, tripwires = guard_warnings(GateSettings((22,), (), guard="strict", tripwires=9), 6, "knockd")
    assert guard == "knock_server_guard: strict means nothing to knockd, which has a guard of its own."
    assert tripwires == "knock_server_tripwires: 9 means nothing to knockd, which has a guard of its own."


def doors(operators: dict[str, Honoured], **settings: Any) -> Any:
    return build_model(GateSettings((22,), (), **settings), operators, SEED, frozenset(), {"one_time": True}, "knockd")


def test_doors() -> None:
    """One for each sequence, those that open once last; knockd's time is that of a whole sequence."""
    operators = {
        "alice": Honoured(1, [(A, B, C), (B, Knock(4000, "udp"))]),
        "bob": Honoured(10, [], one_time={255: (D, E, F)}),
    }
    first, second, once = doors(operators, step_timeout=5)["doors"]
    assert first == {
        "number": "1",
        "id": "",
        "shuts": False,
        "knocks": ["50001:tcp", "41007:tcp", "61009:tcp"],
        "timeout": 11,
    }
    assert (second["knocks"], second["timeout"]) == (["41007:tcp", "4000:udp"], 6)
    assert (once["number"], once["id"], once["timeout"]) == ("a", "ff", 11)
    assert model()["doors"] == []


def test_doors_that_shut() -> None:
    opens, shuts = doors({"alice": Honoured(1, [(A, B, C)], close=[(D, E, F)])})["doors"]
    assert (opens["number"], opens["shuts"]) == (shuts["number"], False) == ("1", False)
    assert (shuts["shuts"], shuts["knocks"][0]) == (True, "50011:tcp")


def test_more_than_knockd_can_wait_for() -> None:
    ports = iter(range(2000, 60000, 2))

    def sequence(length: int) -> list[Knock]:
        return [Knock(next(ports), "tcp") for _ in range(length)]

    assert len(doors({"alice": Honoured(1, [sequence(32)])})["doors"]) == 1
    with pytest.raises(
        PortknockError, match=r"^knock_server_sequences: expected at most 32 knocks with .*knockd; got 33\.$"
    ):
        doors({"alice": Honoured(1, [sequence(33)])})
    crowd = {f"o{number}": Honoured(number, [sequence(6)]) for number in range(1, 101)}
    assert len(doors(crowd)["doors"]) == 100
    with pytest.raises(
        PortknockError, match=r"^knock_server_operators: expected at most 600 knocks in all .*; got 606\."
    ):
        doors({**crowd, "one": Honoured(101, [sequence(6)])})
    # Of a stock it waits for the next few.
    stock = {identity: sequence(6) for identity in range(1, 201)}
    assert len(doors({"alice": Honoured(1, [], one_time=stock)})["doors"]) == 200


def test_one_time_sequences_end_in_states_of_their_own() -> None:
    operators = {
        "bob": Honoured(3, [], one_time={17: (D, E, F)}),
        "alice": Honoured(1, [], one_time={255: (A, B, C)}),
    }
    made: Any = build_model(GateSettings((22,), ()), operators, SEED, frozenset(), {"one_time": True})
    assert made["one_time"] == [{"id": "ff", "number": "1"}, {"id": "11", "number": "3"}]
    lasts = {step["port"]: step["next"] for step in made["steps"] if step["next"].startswith("7:")}
    assert lasts == {C.port: "7:ff", F.port: "7:11"}
    assert not any(step["next"].startswith("2:") for step in made["steps"])
    assert not {A.port, B.port, C.port, D.port, E.port, F.port} & set(made["tripwires"])


def test_a_host_that_can_t_use_a_sequence_up() -> None:
    operators = {"alice": Honoured(1, [], one_time={1: (A, B, C)})}
    with pytest.raises(PortknockError, match=r"^knock_server_one_time: expected a host whose nft and kernel can count"):
        build_model(GateSettings((22,), ()), operators, SEED, frozenset(), {"one_time": False})


def test_more_states_than_the_kernel_s_register_holds() -> None:
    many = {
        number: tuple(Knock(1024 + number + step, "tcp") for step in (0, 30000, 31000)) for number in range(1, 32769)
    }
    with pytest.raises(PortknockError, match=r"knock_server_one_time: expected at most 65535 knocks in all") as caught:
        build_model(
            GateSettings((22,), (), guard="loose"),
            {"a": Honoured(1, [], one_time=many)},
            SEED,
            frozenset(),
            {"one_time": True},
        )
    assert "got 65536." in str(caught.value)
