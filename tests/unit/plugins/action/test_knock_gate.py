# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the proof is made from, and how what is seen there is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleConnectionFailure
from ansible_collections.fleet.portknock.plugins.action.knock_gate import ActionModule
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError

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
