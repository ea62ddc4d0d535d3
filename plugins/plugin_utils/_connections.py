# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""For action plugins: the connection that knows a host's destination and its secrets."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible.plugins.loader import connection_loader
from ansible_collections.fleet.portknock.plugins.connection.knock_ssh import Connection


def knock_ssh_of(action: ActionBase, task_vars: dict[str, Any]) -> Connection:
    """The task's own connection where it knocks; else one with the host's options, which nothing has connected yet."""
    if isinstance(action._connection, Connection) and not action._task.delegate_to:
        return action._connection
    connection = connection_loader.get("fleet.portknock.knock_ssh", action._play_context, "/dev/null")
    # As core's executor does it: a task's timeout and retries are not the connection's. The host that is meant is
    # the task's own, wherever the task is delegated to.
    task_keys = {**action._task.dump_attrs(), "timeout": action._play_context.timeout}
    del task_keys["retries"], task_keys["delegate_to"]
    connection.set_options(
        task_keys=task_keys,
        var_options=connection._resolve_option_variables(task_vars, action._templar),
    )
    return connection


__all__ = ("knock_ssh_of",)
