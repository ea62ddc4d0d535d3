# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""QR codes, read back by another program's decoder."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import pytest
import zxingcpp
from ansible_collections.fleet.portknock.plugins.plugin_utils import _qr

COMMAND = "knock -d 200 web1.example.com " + " ".join(f"{port}:tcp" for port in range(40001, 40011))
SCALE = 4
# The upper and the lower module of a line's character; light is what a terminal draws.
LIGHT = {" ": (False, False), "▀": (True, False), "▄": (False, True), "█": (True, True)}


def read_back(rows: Sequence[Sequence[bool]]) -> list[str]:
    """:param rows: for each pixel whether it is light."""
    pixels = bytes(255 if light else 0 for row in rows for _ in range(SCALE) for light in row for _ in range(SCALE))
    image = memoryview(pixels).cast("B", (len(rows) * SCALE, len(rows[0]) * SCALE))
    return [found.text for found in zxingcpp.read_barcodes(image)]


def pixels_of(png: bytes) -> list[list[bool]]:
    """The pixels of a picture with one bit for each."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, place = {}, 8
    while place < len(png):
        (length,) = struct.unpack_from("!I", png, place)
        chunks[png[place + 4 : place + 8]] = png[place + 8 : place + 8 + length]
        place += length + 12
    width, height, depth, kind = struct.unpack_from("!IIBB", chunks[b"IHDR"])
    assert (depth, kind) == (1, 0)
    data, stride = zlib.decompress(chunks[b"IDAT"]), (width + 7) // 8 + 1
    rows = [bytes(stride)]
    for number in range(height):
        kind, *row = data[number * stride : (number + 1) * stride]
        # As it stands, or as the difference to the row above.
        assert kind in (0, 2)
        rows.append(bytes((0, *((byte + above * (kind == 2)) % 256 for byte, above in zip(row, rows[-1][1:])))))
    return [[bool(row[1 + x // 8] >> (7 - x % 8) & 1) for x in range(width)] for row in rows[1:]]


def test_the_text_can_be_read() -> None:
    make = _qr.qr_maker()
    assert make is not None
    lines = make(COMMAND).text.splitlines()
    assert all(len(line) <= 80 for line in lines)
    rows = [[LIGHT[character][half] for character in line] for line in lines for half in (0, 1)]
    assert read_back(rows) == [COMMAND]


def test_the_picture_can_be_read() -> None:
    make = _qr.qr_maker()
    assert make is not None
    assert read_back(pixels_of(make(COMMAND).png)) == [COMMAND]
    assert make(COMMAND) == make(COMMAND)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_qr, "HAS_SEGNO", False)
    assert _qr.qr_maker() is None
