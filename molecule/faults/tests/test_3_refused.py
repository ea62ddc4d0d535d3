# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rules that nft refuses: nft quotes the line with its ports, and nobody may see it."""

from __future__ import annotations

import shutil

from lab import ROOT, Fleet

HEAD = "table inet fleet_portknock {\n"
# Names every port of the sequence in a line that does not parse.
SPOILED = (
    HEAD
    + "  set spoiled { type inet_service; elements = { {% for s in gate.steps[:6] %}{{ s.port }}x, {% endfor %} } }\n"
)


def test_refused_rules_change_nothing_and_tell_nothing(fleet: Fleet) -> None:
    templates = fleet.directory / "templates"
    shutil.copytree(ROOT / "roles/knock_server/templates", templates, dirs_exist_ok=True)
    gate = templates / "nftables/gate.nft.j2"
    text = gate.read_text()
    assert HEAD in text
    gate.write_text(text.replace(HEAD, SPOILED))
    before = {host: fleet.state(host)["files"] for host in fleet.hosts}
    run = fleet.play("fleet.portknock.site", "--diff", "-vvv", variables={"knock_server_templates": str(templates)})
    assert run.status == 2, run.output
    assert "expected rules that nft accepts; it refuses them (line " in run.output
    assert fleet.leaks(run.output) == []
    assert {host: fleet.state(host)["files"] for host in fleet.hosts} == before
    assert fleet.play("fleet.portknock.site").status == 0
