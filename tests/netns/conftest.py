# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from netlab import WIREGUARD, Lab


@pytest.fixture(scope="session", autouse=True)
def _privileged() -> None:
    if os.geteuid() != 0 or not shutil.which("nft") or not shutil.which("ip"):
        pytest.skip("needs root, nft and ip")


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A host with an ssh and a UDP service, and no gate yet."""
    made = Lab()
    try:
        made.serve()
        made.serve(WIREGUARD, "udp")
        yield made
    finally:
        made.close()
