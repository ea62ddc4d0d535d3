# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""For action plugins: connections beside the task's own."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from typing import Any, TypeVar

from ansible import constants
from ansible.plugins.action import ActionBase
from ansible.plugins.become import BecomeBase
from ansible.plugins.connection import ConnectionBase
from ansible.plugins.connection.ssh import Connection as CoreConnection
from ansible.plugins.loader import connection_loader
from ansible.template import Templar
from ansible_collections.fleet.portknock.plugins.connection.knock_ssh import Connection
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError

_Action = TypeVar("_Action", bound=ActionBase)

_KNOCK_SSH = "fleet.portknock.knock_ssh"
# Core loads a task's action plugin before it forks the workers: what is loaded here, each of them need not load for itself.
connection_loader.get(_KNOCK_SSH, class_only=True)

# A connection of its own, whose ssh notices within half a minute that the host is gone: an idle one waits for ever, and
# what a shared master does is not this task's to say.
_WATCHFUL = "-o ControlMaster=no -o ControlPath=none -o ServerAliveInterval=5 -o ServerAliveCountMax=3 "


def is_ssh(connection: Any) -> bool:
    """Whether the connection goes to the host's ssh port: core's plugins, libssh, and whatever else is named for it."""
    return "ssh" in connection.transport or connection.transport in ("paramiko", "smart")


def pipelined(action: ActionBase) -> bool:
    """Let the task's module come by standard input only, in one round trip; returns whether it does."""
    connection: Any = action._connection
    if connection.has_pipelining:
        connection.set_option("pipelining", True)
    return bool(action._is_pipelining_enabled("new"))


def knock_ssh_of(action: ActionBase, task_vars: dict[str, Any]) -> Connection:
    """The task's own connection where it knocks; else one with the host's options, which nothing has connected yet."""
    if isinstance(action._connection, Connection) and not action._task.delegate_to:
        return action._connection
    connection = connection_loader.get(_KNOCK_SSH, action._play_context, "/dev/null")
    # The host that is meant is the task's own, wherever the task is delegated to.
    _set_options(connection, action, task_vars, action._templar)
    return connection


def knock_ssh_as(
    action: ActionBase,
    task_vars: dict[str, Any],
    user: str,
    become: BecomeBase | None,
    arguments: str = "",
    with_password: bool = False,
) -> Connection:
    """A connection to the task's host as any user, which uses nobody's master.

    :param become: how that user becomes root; None where it is root.
    :param arguments: for ssh, before all others.
    :param with_password: use the password of the task's own connection, where it has one.
    """
    context = action._play_context.copy()
    context.remote_user = user
    if not with_password:
        context.password = ""
    connection = connection_loader.get(_KNOCK_SSH, context, "/dev/null")
    _set_options(connection, action, task_vars, action._templar)
    connection.set_option("remote_user", user)
    if not with_password:
        connection.set_option("password", None)
    connection.set_option("ssh_args", f"{arguments} {connection.get_option('ssh_args') or ''}")
    if connection.has_pipelining:
        connection.set_option("pipelining", True)
    connection.set_become_plugin(become)
    connection.fresh = True
    return connection


def action_on(action: _Action, host: str, task_vars: dict[str, Any]) -> tuple[_Action, dict[str, Any]]:
    """The same action on another host of the inventory, without become, and that host's variables.

    Nothing is connected yet. What the action finds out about the host, such as its interpreter, stays with it.

    :raises PortknockError: the host's connection plugin is not there.
    """
    variables = dict(task_vars["hostvars"].raw_get(host))
    variables["hostvars"] = task_vars["hostvars"]
    variables["ansible_facts"] = dict(variables.get("ansible_facts") or {})
    templar = Templar(loader=action._loader, variables=variables)

    def own(name: str) -> Any:
        value = next((variables[key] for key in constants.MAGIC_VARIABLE_MAPPING[name] if key in variables), None)
        return templar.template(value)

    task = action._task.copy()
    task.become, task.delegate_to, task.environment = False, None, []
    context = action._play_context.copy()
    context.become = False
    context.remote_addr = own("remote_addr") or host
    context.port = own("port") or task.port
    context.remote_user = own("remote_user") or task.remote_user
    if own("executable"):
        context.executable = own("executable")
    if any(key in task_vars for key in (*constants.MAGIC_VARIABLE_MAPPING["password"], "ansible_ssh_password")):
        # This is then the other host's; a password from the command line is for all.
        context.password = ""
    context.connection = own("connection") or task.connection
    connection = connection_loader.get(context.connection, context, "/dev/null")
    if connection is None:
        raise PortknockError(
            f"expected {host} to have a connection plugin that is installed; got {context.connection}."
        )
    other = type(action)(task=task, connection=connection, play_context=context, loader=action._loader, templar=templar)
    _set_options(connection, other, variables, templar)
    if isinstance(connection, CoreConnection):
        connection.set_option("ssh_args", _WATCHFUL + (connection.get_option("ssh_args") or ""))
    return other, variables


@contextlib.contextmanager
def quiet(host: str, watched: bool) -> Iterator[None]:
    """Keep this run's forks from opening a host's gate while one of them watches that it is closed.

    :param watched: this one watches, alone; the others, who connect, go on together when it has ended.
    """
    # The folder is the run's own and goes with it.
    name = f"portknock-quiet-{hashlib.sha256(host.encode()).hexdigest()[:20]}"
    with open(os.path.join(constants.DEFAULT_LOCAL_TMP, name), "a", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX if watched else fcntl.LOCK_SH)
        yield


def _set_options(connection: ConnectionBase, action: ActionBase, variables: dict[str, Any], templar: Any) -> None:
    """As core's executor does it: a task's timeout and retries are not the connection's."""
    task_keys = {**action._task.dump_attrs(), "timeout": action._play_context.timeout}
    if action._play_context.password:
        task_keys["password"] = action._play_context.password
    del task_keys["retries"], task_keys["delegate_to"]
    connection.set_options(task_keys=task_keys, var_options=connection._resolve_option_variables(variables, templar))
    shell = connection._shell
    names = constants.config.get_plugin_vars("shell", shell._load_name)
    shell.set_options(
        task_keys=task_keys,
        var_options={name: templar.template(variables[name]) for name in names if name in variables},
    )


__all__ = ("action_on", "is_ssh", "knock_ssh_as", "knock_ssh_of", "pipelined", "quiet")
