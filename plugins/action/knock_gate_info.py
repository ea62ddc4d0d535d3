# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run the module in one round trip."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.fleet.portknock.plugins.plugin_utils._connections import pipelined


class ActionModule(ActionBase):
    """The module with pipelining, whatever the user has set, since it is the first thing that a play asks of every host."""

    _supports_check_mode = True
    _supports_async = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        is_async = bool(self._task.async_val) and not self._connection.has_native_async
        if not is_async:
            pipelined(self)
        result.update(self._execute_module(task_vars=task_vars, wrap_async=is_async))
        if not is_async:
            self._remove_tmp_path(self._connection._shell.tmpdir)
        return result
