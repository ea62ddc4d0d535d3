# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the proof is made from, and how what is seen there is told."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleConnectionFailure
from ansible_collections.fleet.portknock.plugins.action import knock_gate
from ansible_collections.fleet.portknock.plugins.action.knock_gate import ActionModule
from ansible_collections.fleet.portknock.plugins.module_utils._backends import Abilities
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._gate import GateSettings, Honoured, settings_from
from ansible_collections.fleet.portknock.plugins.module_utils._jump import JumpError
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.plugin_utils._destination import Destination

OUTCOME = {"source_trusted": True, "ports_in_use": [], "listeners": {}}


class Asking(ActionModule):
    """The action without a run of Ansible around it; ``answers`` are those of the module on the host, in order."""

    def __init__(self, *answers: Any, **arguments: str) -> None:
        self._task = SimpleNamespace(args=arguments)
        self._vars = {"inventory_hostname": "web1", "hostvars": {"web1": {}, "eye": {}}}
        self.answers = list(answers)
        self.asked: list[tuple[str, Any]] = []
        self._place = self._proving_place()

    def _phase(self, phase: str, payload: Any) -> dict[str, Any]:
        self.asked.append((phase, payload))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return {"answer": answer}


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ({}, ""),
        ({"proof": "outside", "prove_from": "eye"}, "eye"),
        ({"proof": "host", "prove_from": ""}, "a network namespace on web1"),
    ],
)
def test_where_it_is_made(arguments: dict[str, str], place: str) -> None:
    assert Asking(**arguments)._place == place


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"proof": "inside"}, "knock_server_proof: expected outside or host; got 'inside'."),
        (
            {"proof": "host", "prove_from": "eye"},
            "knock_server_prove_from: expected none with knock_server_proof=host, since the host itself looks; got 'eye'.",
        ),
    ],
)
def test_where_it_can_not_be_made(arguments: dict[str, str], says: str) -> None:
    with pytest.raises(PortknockError) as caught:
        Asking(**arguments)
    assert str(caught.value) == says


def test_a_proof_by_the_host_says_so() -> None:
    asking = Asking({"closed": [1], "opened": [2], "notes": ["Another."]}, proof="host")
    seen = asking._prove({"addresses": []}, {"knocks": []}, OUTCOME)
    note = "Not proved from outside: seen from a network namespace on the host itself (knock_server_proof=host)."
    assert seen == {"seen_from": "web1", "closed": [1], "opened": [2], "notes": [note, "Another."]}
    ((phase, payload),) = asking.asked
    assert (phase, payload["apart"], payload["place"]) == ("prove", True, "a network namespace on web1")
    # Whether the controller is trusted says nothing of the namespace.
    assert payload["source_trusted"] is False


def test_what_the_host_could_not_see() -> None:
    asking = Asking(
        {"problem": "expected ip."}, {"problem": "Not opened."}, AnsibleConnectionFailure("gone"), proof="host"
    )
    with pytest.raises(PortknockError, match=r"^knock_server_proof: expected ip\.$"):
        asking._ask("scout", {})
    with pytest.raises(
        PortknockError, match=r"^Not opened\. It was seen from a network namespace on web1, whose packets"
    ):
        asking._ask("prove", {})
    with pytest.raises(
        PortknockError, match=r"^knock_server_proof: expected a network namespace on web1 .* it is not: gone"
    ):
        asking._ask("prove", {})


BEHIND = Destination("web1", 22, proxied=True, jump="bastion")
FOUND = {"ssh_source": "192.0.2.9"}


class Jumping(Asking):
    """The same, where ssh goes through a jump host; ``told`` are its answers, in order."""

    def __init__(
        self, *told: Any, answers: tuple[Any, ...] = (), protected: int = 22, trusted: str = "", **arguments: str
    ):
        super().__init__(*answers, **arguments)
        self.told = list(told)
        self.asked_there: list[tuple[str, Any]] = []
        settings = SimpleNamespace(protected_tcp=(protected,), trusted4=[trusted] if trusted else [], trusted6=[])
        self._connection = SimpleNamespace(transport="ssh")
        self._choose_jump(settings, BEHIND, FOUND)  # type: ignore[arg-type]

    name = "bastion"

    def jump_host(self) -> Any:
        return self

    def _phase_elsewhere(self, question: str, request: Any) -> dict[str, Any]:
        return self._phase(question, request)

    def get_option(self, name: str) -> int:
        assert name == "timeout"
        return 10

    def ask(self, _function: Any, question: str, request: Any, **_seconds: float) -> dict[str, Any]:
        self.asked_there.append((question, request))
        answer: Any = self.told.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)


@pytest.fixture(autouse=True)
def connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knock_gate, "knock_ssh_of", lambda action, _variables: action)


def test_a_jump_host_looks() -> None:
    asking = Jumping({"sources": ["192.0.2.9"]}, {"closed": [1], "opened": [2], "notes": []})
    view = asking._view(BEHIND, ["2001:db8::1"])
    assert view == {"sources": ["192.0.2.9"]}
    seen = asking._prove(view, {"knocks": []}, OUTCOME)
    assert seen == {"seen_from": "bastion", "closed": [1], "opened": [2], "notes": []}
    (scout, asked), (prove, request) = asking.asked_there
    assert (scout, prove) == ("scout", "prove")
    # The name is the jump host's to resolve; whether the connection's source is trusted says so of what is seen from there.
    assert (asked["addresses"], asked["further"], asked["place"]) == ([], ["2001:db8::1"], "the jump host bastion")
    assert request["source_trusted"] is True
    assert asking.asked == []


def test_what_the_jump_host_saw() -> None:
    asking = Jumping({"problem": "no way."}, {"problem": "Not opened."}, JumpError("It broke off."))
    with pytest.raises(PortknockError, match=r"^ProxyJump: no way\.$"):
        asking._ask("scout", {})
    for says in (r"^Not opened\.$", r"^It broke off\.$"):
        with pytest.raises(PortknockError, match=says):
            asking._ask("prove", {})


@pytest.mark.parametrize("place", ["", "eye"])
def test_a_jump_host_that_can_not_knock_where_it_has_to(place: str) -> None:
    asking = Jumping(JumpError("It can't knock.", is_unable=True), prove_from=place)
    with pytest.raises(PortknockError) as caught:
        asking._view(BEHIND, [])
    assert str(caught.value).startswith(
        "It can't knock. The connection that confirms the gate, and all that follow, would"
    )
    assert "knock_server_trusted_sources" in str(caught.value)
    assert "knock_server_prove_from" in str(caught.value)
    assert asking.asked == []


def test_a_jump_host_that_need_not_knock() -> None:
    """The gate protects something else."""
    asking = Jumping(JumpError("It can't knock.", is_unable=True), protected=443)
    assert asking._view(BEHIND, []) is None
    note = "Not proved from outside: the host is reached through a ProxyJump or ProxyCommand. It can't knock."
    assert asking._prove(None, {"knocks": []}, OUTCOME)["notes"] == [note]


def test_another_host_looks_and_the_jump_host_only_has_to_be_able_to() -> None:
    asking = Jumping({}, answers=({"sources": ["192.0.2.5"]},), prove_from="eye")
    assert asking._view(BEHIND, []) == {"sources": ["192.0.2.5"]}
    assert [question for question, _request in asking.asked_there] == ["scout"]
    assert asking._place == "eye"


def test_a_jump_host_that_is_trusted_is_asked_nothing() -> None:
    asking = Jumping(trusted="192.0.2.0/24")
    assert asking._view(BEHIND, []) is None
    assert asking.asked_there == []


@pytest.mark.parametrize("operator", ["bob", "alice", None])
def test_nobody_shuts_out_whom_the_connection_knocks_as(operator: str | None) -> None:
    asking = Asking()
    asking._task.check_mode = False
    asking._jump = None
    asking._connection = SimpleNamespace(transport="ssh", ansible_name="fleet.portknock.knock_ssh")
    settings: Any = SimpleNamespace(protected_tcp=(22,), trusted4=[], trusted6=[], one_time=0)
    alice = {"alice": Honoured(1, [[Knock(20000, "tcp")]])}
    says = r"^knock_operator: expected .* let in \(alice\), .*; got bob\.$"
    with pytest.raises(PortknockError, match=says) if operator == "bob" else nullcontext():
        asking._check_way_in(settings, Destination("web1", 22, proxied=False), FOUND, None, operator, alice)


def closing(*open_ports: str, **options: Any) -> GateSettings:
    return settings_from({"input_policy": "drop", "open_ports": list(open_ports), **options})


@pytest.mark.parametrize(
    ("settings", "ssh_port", "missing"),
    [
        (closing(), 22, None),
        (closing(), None, None),
        (closing(), 2222, "2222/tcp"),
        (closing("2222/tcp"), 2222, None),
        (closing("2222/udp"), 2222, "2222/tcp"),
        (closing(protected_ports=["443/tcp"]), None, "22/tcp"),
        (closing("22/tcp", protected_ports=["443/tcp"]), None, None),
        # A trusted source needs no knock, and comes by the same ports as everybody.
        (closing(trusted_sources=["192.0.2.0/24"], protected_ports=["443/tcp"]), 22, "22/tcp"),
        (settings_from({"protected_ports": ["443/tcp"], "open_ports": ["80/tcp"]}), 22, None),
    ],
)
def test_nobody_closes_the_port_that_ssh_comes_by(
    settings: GateSettings, ssh_port: int | None, missing: str | None
) -> None:
    """By the host's own number, where that is known: a router's may be another."""
    found = {**FOUND, "ssh_port": ssh_port}
    says = rf"^knock_server_open_ports: expected {missing} among them, or among knock_server_protected_ports, since ssh comes in"
    with pytest.raises(PortknockError, match=says) if missing else nullcontext():
        Asking._check_open_ports(settings, Destination("web1", 22, proxied=False), found)


@pytest.mark.parametrize(
    ("settings", "before", "told"),
    [
        (closing("80/tcp"), None, "53/udp, 443/tcp"),
        (closing("80/tcp"), [], "53/udp, 443/tcp"),
        (closing("80/tcp"), ["80/tcp"], ""),
        (closing("80/tcp", "443/tcp", "53/udp"), None, ""),
        (settings_from({}), None, ""),
    ],
)
def test_services_that_are_shut_are_told_of_once(
    settings: GateSettings, before: list[str] | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(knock_gate, "display", SimpleNamespace(warning=said.append))
    found = {"gate": {"open_ports": before}, "reachable_ports": ["22/tcp", "53/udp", "68/udp", "80/tcp", "443/tcp"]}
    Asking()._warn_of_shut(settings, found)
    assert [bool(told)] == [len(said) == 1 and f"wait: {told}. Those that" in said[0]]
    assert len(said) == bool(told)


@pytest.mark.parametrize(("option", "value"), [("one_time", 20), ("close_sequence", True), ("input_policy", "drop")])
def test_what_a_back_end_can_not_do(option: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    able = Abilities("kernel", one_time=True, protocols=("tcp",), close_sequence=True, input_policy=True)
    unable = {"nftables": able, "crutch": Abilities("kernel", one_time=False, protocols=("tcp",))}
    monkeypatch.setattr(knock_gate, "BACK_ENDS", unable)
    settings = settings_from({option: value})
    Asking(backend="nftables")._check_abilities(settings)
    Asking(backend="crutch")._check_abilities(settings_from({}))
    with pytest.raises(
        PortknockError, match=rf"^knock_server_{option}: expected a back end that .* \(nftables\); got crutch\.$"
    ):
        Asking(backend="crutch")._check_abilities(settings)


def test_an_open_port_is_no_closed_one_to_compare_with() -> None:
    asking = Asking({"closed": [], "opened": [], "notes": []}, proof="host")
    asking._prove({"addresses": []}, {"knocks": [], "served": ["40000/tcp"]}, OUTCOME)
    assert asking.asked[0][1]["ports_in_use"] == ["40000/tcp"]
