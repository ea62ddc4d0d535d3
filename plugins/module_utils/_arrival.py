# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How a call of :mod:`_jump` begins on the jump host: modules become importable that no disk there has ever held.

Sent ahead of all other modules and run before there are any, so it imports none of them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import json
import os
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any, Mapping, Optional, Sequence


class _Sources(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules by name among texts.

    :param texts: sources by module name; that of a package is None.
    """

    def __init__(self, texts: Mapping[str, Optional[str]]) -> None:
        self._texts = texts

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]], target: Optional[types.ModuleType] = None
    ) -> Optional[ModuleSpec]:
        if fullname not in self._texts:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=self._texts[fullname] is None)

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        exec(compile(self._texts[name] or "", f"<{name}>", "exec"), module.__dict__)  # noqa: S102


def start(given: Mapping[str, Any]) -> None:
    """Answer one call, and where that is asked for, carry what follows on standard input and output.

    :param given: ``modules`` (sources by name, None for packages), ``entry`` (module and function), its ``arguments``, and
        ``carry``: the module and function that carry the connection which the entry returns beside its answer, or None.
    """
    # Before all others: a collection that is installed here is another release's.
    sys.meta_path.insert(0, _Sources(given["modules"]))
    answer = _function(given["entry"])(*given["arguments"])
    sock = None
    if given["carry"]:
        answer, sock = answer
    data = memoryview(json.dumps(answer).encode() + b"\n")
    while data:
        data = data[os.write(1, data) :]
    if sock is not None:
        with sock:
            # Whoever is at the other end learns of an end by that of this process alone.
            failure = _function(given["carry"])(sock, hang_up=True)
        if failure is not None:
            raise SystemExit(f"portknock: The connection broke: {failure.strerror}.")


def _function(place: Sequence[str]) -> Any:
    return getattr(importlib.import_module(place[0]), place[1])


__all__ = ("start",)
