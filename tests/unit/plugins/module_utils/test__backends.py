# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The back ends by name, and the files that they share."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest
import yaml
from ansible_collections.fleet.portknock.plugins.module_utils._backends import (
    BACK_ENDS,
    FILES,
    SERVICES,
    UNITS,
    Abilities,
    back_end,
    check_seen,
)
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError


@pytest.mark.parametrize("name", BACK_ENDS)
def test_what_a_back_end_has_is_known_to_all(name: str) -> None:
    """So that a change from it to another leaves nothing behind."""
    backend = back_end(name)
    assert backend.name == name
    assert {file.path for file in backend.files.values()} <= {file.path for file in FILES.values()}
    assert set(backend.units) <= set(UNITS)
    assert set(backend.services) <= set(SERVICES) & set(backend.units)
    assert backend.closed in backend.files
    assert list(backend.files)[-1] == "gate"
    assert backend.files["gate"].path == FILES["gate"].path
    assert set(backend.opener_files) <= set(backend.files)


@pytest.mark.parametrize("name", BACK_ENDS)
def test_the_role_and_a_check_agree_on_the_length(name: str) -> None:
    defaults = yaml.safe_load((Path(__file__).parents[4] / "roles/knock_server/defaults/main.yml").read_text())
    template = jinja2.Template(defaults["knock_server_sequence_length"])
    assert int(template.render(knock_server_backend=name)) == BACK_ENDS[name].length


def test_no_two_files_have_one_path() -> None:
    assert len({file.path for file in FILES.values()}) == len(FILES)


@pytest.mark.parametrize("name", ["pf", "", None, ["nftables"]])
def test_unknown_back_end(name: object) -> None:
    with pytest.raises(PortknockError, match=r"^knock_server_backend: expected one of nftables.*; got "):
        back_end(name)  # type: ignore[arg-type]


def test_knocks_that_a_back_end_can_t_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACK_ENDS, "nftables", Abilities("kernel", one_time=True, protocols=("tcp", "udp", "icmp")))
    check_seen("nftables", ["icmp", "tcp"])
    check_seen("knockd", ["tcp", "udp"])
    with pytest.raises(PortknockError) as caught:
        check_seen("knockd", ["tcp", "icmp"])
    assert str(caught.value) == (
        "knock_server_sequence_protocols: expected tcp or udp with knock_server_backend=knockd; got icmp, which nftables and "
        "iptables can see."
    )
