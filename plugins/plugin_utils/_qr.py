# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""QR codes for the card, where the controller has the library for them."""

from __future__ import annotations

import io
from collections.abc import Callable

from ansible_collections.fleet.portknock.plugins.module_utils._card import QrCode

try:
    import segno
except ImportError:
    HAS_SEGNO = False
else:
    HAS_SEGNO = True

# Pixels a module: large enough for a phone to read it from a screen.
_SCALE = 6


def qr_maker() -> Callable[[str], QrCode] | None:
    """Return what makes a QR code of a text, or None where the Python library segno is missing."""
    return _make if HAS_SEGNO else None


def _make(text: str) -> QrCode:
    code = segno.make(text, micro=False, error="m")
    lines, picture = io.StringIO(), io.BytesIO()
    code.terminal(lines, compact=True)
    code.save(picture, kind="png", scale=_SCALE)
    return QrCode(lines.getvalue(), picture.getvalue())


__all__ = ("qr_maker",)
