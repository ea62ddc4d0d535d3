# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What several of the tests share; being here lets them import what is beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from playing import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)
