# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What every scenario's tests see: the fleet of the scenario, and the client that stands outside of it."""

from __future__ import annotations

import os

import pytest
from lab import Fleet


@pytest.fixture(scope="session")
def fleet() -> Fleet:
    return Fleet(os.environ["MOLECULE_SCENARIO_NAME"])
