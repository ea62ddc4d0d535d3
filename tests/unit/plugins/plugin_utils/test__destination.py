# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Asking ssh where it would go: the real ssh, with configuration files of the test's own."""

from __future__ import annotations

import getpass
import shutil
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._helper_secrets import Access, HelperSecrets
from ansible_collections.fleet.portknock.plugins.module_utils._ports import Knock
from ansible_collections.fleet.portknock.plugins.plugin_utils._destination import (
    Destination,
    configuration_file,
    locate,
    read_configuration,
    ssh_arguments,
)

needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh here")

CONFIG = """
Host shop
  HostName 192.0.2.10
  Port 2222
  AddressFamily inet
  BindAddress 192.0.2.99
  ControlPath /tmp/%h-%p
Host far
  ProxyJump bastion
Host near
  HostName %h.example.org
  User carol
  Port 2200
  ProxyJump first@bastion:2201,%r@%h-%n-%p-%%
Host piped
  ProxyCommand nc %h %p
Host direct
  ProxyCommand none
  ProxyJump none
  ControlPath none
"""


def where(tmp_path: Path, *arguments: str) -> Destination:
    (tmp_path / "config").write_text(CONFIG)
    *options, host = arguments
    return locate("ssh", ["-F", str(tmp_path / "config"), *options], host, 20)


@needs_ssh
def test_an_alias(tmp_path: Path) -> None:
    assert where(tmp_path, "shop") == Destination(
        "192.0.2.10", 2222, "inet", False, "192.0.2.99", "/tmp/192.0.2.10-2222", getpass.getuser()
    )


@needs_ssh
@pytest.mark.parametrize(
    ("arguments", "proxied"),
    [
        (("far",), True),
        (("piped",), True),
        (("direct",), False),
        (("192.0.2.1",), False),
        (("-J", "bastion", "192.0.2.1"), True),
        (("-o", "ProxyCommand=nc %h %p", "192.0.2.1"), True),
    ],
)
def test_proxies(tmp_path: Path, arguments: tuple[str, ...], proxied: bool) -> None:
    assert where(tmp_path, *arguments).proxied is proxied


@needs_ssh
@pytest.mark.parametrize(
    ("arguments", "jump"),
    [
        (("far",), "bastion"),
        (("near",), "first@bastion:2201,carol@near.example.org-near-2200-%"),
        (("piped",), ""),
        (("direct",), ""),
        (("-J", "alice@[2001:db8::7]:22,bastion", "192.0.2.1"), "alice@[2001:db8::7]:22,bastion"),
        (("-o", "ProxyJump=other", "far"), "other"),
        (("-o", "ProxyCommand=none", "far"), ""),
    ],
)
def test_jump_hosts(tmp_path: Path, arguments: tuple[str, ...], jump: str) -> None:
    assert where(tmp_path, *arguments).jump == jump


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    knocks = ((Knock(41873, "tcp"), Knock(60291, "tcp")),)
    hosts = {"web1": Access("192.0.2.1", 22, knocks), "web2": Access("192.0.2.2", 22, knocks, jump="bastion")}
    path = tmp_path / "secrets.json"
    path.write_text(HelperSecrets("alice", hosts).to_text())
    path.chmod(0o600)
    return path


@needs_ssh
@pytest.mark.parametrize(
    ("command", "host", "instead"),
    [
        ("~/.local/bin/portknock connect --secrets FILE %h %p", "192.0.2.1", "ProxyCommand=none"),
        ("portknock connect --secrets FILE %h %p --name web1", "198.51.100.1", "ProxyCommand=none"),
        ("exec python3 -S /opt/portknock connect --secrets FILE %h %p", "192.0.2.2", "ProxyJump=bastion"),
        ("portknock connect --secrets FILE --jump a,b %h %p", "192.0.2.2", "ProxyJump=a,b"),
        ("portknock connect --secrets FILE --jump none %h %p", "192.0.2.2", "ProxyCommand=none"),
        # What is not known to lead to the same place stays as it is.
        ("portknock connect --secrets FILE %h %p", "198.51.100.1", ""),
        ("portknock connect --secrets /nonexistent %h %p", "192.0.2.1", ""),
        ("portknock connect --secrets FILE %h %p | tee log", "192.0.2.1", ""),
        ("other-portknock connect --secrets FILE %h %p", "192.0.2.1", ""),
        ("nc portknock", "192.0.2.1", ""),
    ],
)
def test_our_own_helper(tmp_path: Path, secrets: Path, command: str, host: str, instead: str) -> None:
    seen = where(tmp_path, "-o", f"ProxyCommand={command.replace('FILE', str(secrets))}", host)
    assert seen.instead == instead
    assert seen.jump == instead.partition("ProxyJump=")[2]
    assert seen.proxied is (instead != "ProxyCommand=none")


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        ([], None),
        (["-o", "User=F", "-4"], None),
        (["-F", "one", "-v"], "one"),
        (["-Fone", "-F", "two"], "two"),
        (["-F"], None),
    ],
)
def test_the_configuration_file(arguments: list[str], file: str | None) -> None:
    assert configuration_file(arguments) == file


@needs_ssh
def test_the_command_line_comes_first(tmp_path: Path) -> None:
    seen = where(tmp_path, "-6", "-tt", "-o", "Port=2022", "-o", "ControlPath=none", "shop")
    assert (seen.port, seen.family, seen.control_path) == (2022, "inet6", None)


@needs_ssh
def test_a_host_is_never_an_option(tmp_path: Path) -> None:
    # Read as an option, this would leave ssh without a host.
    with pytest.raises(PortknockError, match="hostname contains invalid characters"):
        where(tmp_path, "-oProxyCommand=true")


@needs_ssh
def test_what_ssh_refuses(tmp_path: Path) -> None:
    with pytest.raises(PortknockError, match=r"\Assh_executable: expected 'ssh' to answer -G; got '.+'\.\Z"):
        where(tmp_path, "-o", "NoSuchOption=1", "shop")


def test_no_such_program() -> None:
    with pytest.raises(PortknockError, match=r"expected '/nonexistent/ssh' to answer -G; got .*No such file"):
        locate("/nonexistent/ssh", [], "shop", 20)


@pytest.mark.parametrize("text", ["", "hostname shop\n", "port 22\n", "hostname shop\nport ssh\n"])
def test_foreign_output(text: str) -> None:
    with pytest.raises(PortknockError, match=r"expected hostname, port and addressfamily from -G; got something else"):
        read_configuration(text)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, []),
        (
            {
                "ssh_args": "-o ControlPersist=60s",
                "port": 2222,
                "remote_user": "admin",
                "ssh_common_args": '-o "ProxyCommand=nc %h %p"',
                "ssh_extra_args": "-4",
            },
            [
                *("-o", "ControlPersist=60s", "-o", "Port=2222", "-o", 'User="admin"'),
                *("-o", "ProxyCommand=nc %h %p", "-4"),
            ],
        ),
    ],
)
def test_arguments_in_the_order_of_core(options: dict[str, Any], arguments: list[str]) -> None:
    assert ssh_arguments(options.get) == arguments
