# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the roles say of their variables is what they do: each is documented, with the default that it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROLES = Path(__file__).parents[3] / "roles"


def read(role: str, path: str) -> Any:
    return yaml.safe_load((ROLES / role / path).read_text())


@pytest.mark.parametrize("role", sorted(path.name for path in ROLES.iterdir()))
def test_the_specification_equals_the_defaults(role: str) -> None:
    entries = read(role, "meta/argument_specs.yml")["argument_specs"].values()
    specified = {name: option for entry in entries for name, option in entry["options"].items()}
    assert {name: option["default"] for name, option in specified.items()} == read(role, "defaults/main.yml")
    assert [name for name in specified if not name.startswith(f"{role}_")] == []


def test_the_module_gets_every_setting_of_sshd_hardening() -> None:
    """Under its own name: settings_from reads them by that."""
    prefix = "sshd_hardening_"
    passed = read("sshd_hardening", "vars/main.yml")["_sshd_hardening_settings"]
    assert passed == {name: f"{{{{ {prefix}{name} }}}}" for name in passed}
    others = {"enabled", "admin_user", "admin_create", "admin_keys", "without_proof", "confirm_timeout"}
    assert {prefix + name for name in (*passed, *others)} == set(read("sshd_hardening", "defaults/main.yml"))
