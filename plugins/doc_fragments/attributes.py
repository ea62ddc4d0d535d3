# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the attributes of every module mean; each module says which of them it supports."""

from __future__ import annotations


class ModuleDocFragment:
    """``fleet.portknock.attributes``."""

    DOCUMENTATION: str = r"""
options: {}
attributes:
  check_mode:
    description: In check mode the task says what it would change, and changes nothing.
  diff_mode:
    description: In diff mode the task shows what it changes, or would change.
  idempotent:
    description: A second run with the same arguments changes nothing.
  async:
    description: The task may run with C(async).
"""


__all__ = ("ModuleDocFragment",)
