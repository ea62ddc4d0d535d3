# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is done on a jump host for :mod:`_jump`: knock from there, and connect from there.

Requests and answers are plain mappings that survive JSON; ``problem`` in an answer is what a person has to know instead. A
request has ``host``, ``port`` and ``family`` as ssh would use them, and of the others those that its function names.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any, Mapping, Optional

from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._knocking import (
    knock_and_connect,
    knock_until_closed,
    knock_with_any,
    resolve,
    send,
)
from ansible_collections.fleet.portknock.plugins.module_utils._ports import SENT_PROTOCOLS, Knock, parse_knocks

# Whoever asked may be gone without a word, and so may the host: noticed after two minutes, where the system can be told so.
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


def knock(request: Mapping[str, Any]) -> dict[str, Any]:
    """Knock until the port opens.

    :param request: ``sequences`` and ``once`` (lists of lists of port/protocol, secret), ``timeout`` and ``banner`` (seconds),
        ``single_use``; see :func:`knock_with_any`.
    :returns: a ``KnockResult`` as a mapping.
    """
    try:
        result = knock_with_any(
            resolve(request["host"], request["port"], request["family"]),
            _parsed(request["sequences"]),
            request["port"],
            request["timeout"],
            banner=request["banner"],
            single_use=request["single_use"],
            once=_parsed(request["once"]),
        )
    except (PortknockError, OSError) as exc:
        return {"problem": str(exc)}
    return result.to_mapping()


def connect(request: Mapping[str, Any]) -> tuple[dict[str, Any], Optional[socket.socket]]:
    """Knock until the port opens, and keep the connection.

    :param request: ``sequences``, ``once`` and ``timeout`` as for :func:`knock`.
    :returns: a ``KnockResult`` as a mapping, and the connection.
    """
    try:
        result, sock = knock_and_connect(
            resolve(request["host"], request["port"], request["family"]),
            _parsed(request["sequences"]),
            request["port"],
            request["timeout"],
            once=_parsed(request["once"]),
        )
    except (PortknockError, OSError) as exc:
        return {"problem": str(exc)}, None
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return result.to_mapping(), sock


def close(request: Mapping[str, Any]) -> dict[str, Any]:
    """Shut the window of this machine.

    :param request: ``sequences`` and ``timeout``; see :func:`knock_until_closed`.
    :returns: a ``KnockResult`` as a mapping.
    """
    try:
        result = knock_until_closed(
            resolve(request["host"], request["port"], request["family"]),
            _parsed(request["sequences"]),
            request["port"],
            request["timeout"],
        )
    except (PortknockError, OSError) as exc:
        return {"problem": str(exc)}
    return result.to_mapping()


def send_once(request: Mapping[str, Any]) -> dict[str, Any]:
    """Send one sequence without looking.

    :param request: ``address`` (the one of the host's that is meant), ``knocks`` (secret) and ``gap`` in seconds.
    :returns: ``sent``: whether it was; not where the host no longer has that address.
    """
    try:
        addresses = resolve(request["host"], request["port"], request["family"])
        address = next((entry for entry in addresses if entry.host == request["address"]), None)
        if address is not None:
            send(address, _parsed([request["knocks"]])[0], request["gap"])
    except (PortknockError, OSError) as exc:
        return {"problem": str(exc)}
    return {"sent": address is not None}


def _parsed(sequences: Any) -> list[tuple[Knock, ...]]:
    return [parse_knocks(knocks, "sequences", secret=True, protocols=SENT_PROTOCOLS) for knocks in sequences]


__all__ = ("close", "connect", "knock", "send_once")
