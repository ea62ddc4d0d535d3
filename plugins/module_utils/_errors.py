# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one exception of the collection's pure core."""

from __future__ import annotations


class PortknockError(Exception):
    """Something a person has to put right.

    The message is one or more whole sentences that name the option, what was expected and what came.
    It never holds a secret: whoever raises it leaves knock ports, seeds and keys out.
    """


__all__ = ("PortknockError",)
