# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How knock_gate_info gets to its host: what it reports there has tests of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from playing import Run

HERE = ("-c", "local", "--limit", "web1", "-e", f"ansible_python_interpreter={sys.executable}")
LOOK: dict[str, Any] = {"fleet.portknock.knock_gate_info": {}}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.mark.parametrize(
    ("task", "copied"), [(LOOK, False), ({"ansible.builtin.ping": {}}, True)], ids=["look", "ping"]
)
def test_it_comes_by_standard_input_alone(run: Run, task: dict[str, Any], copied: bool) -> None:
    """Whatever is set for others, such as the module beside it."""
    printed = run.tasks([task], "-vvv", *HERE, ANSIBLE_PIPELINING="false")
    assert "failed=0" in printed, printed
    assert (" PUT " in printed) is copied


def test_it_can_wait_in_the_background(run: Run) -> None:
    printed = run.tasks([{**LOOK, "async": 60, "poll": 1}], *HERE)
    assert "failed=0" in printed, printed
    assert "ASYNC OK" in printed
