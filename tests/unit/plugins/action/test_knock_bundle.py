# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""client.yml in real runs of ansible-playbook; no host is connected to."""

from __future__ import annotations

import json
import re
from secrets import token_hex
from typing import Any

import yaml
from ansible_collections.fleet.portknock.plugins.module_utils._client import Bundle
from ansible_collections.fleet.portknock.plugins.plugin_utils._bundle import load
from playing import Run, counts

CLIENT = "fleet.portknock.client"
ALICE = ("-e", "portknock_operator=alice")
GIVEN = [["48397/tcp", "60013/tcp", "52999/tcp"], ["33107/tcp", "48211/tcp", "39001/tcp"]]
PEOPLE = {"operators": ["alice", "bob"]}


def made(run: Run, name: str = "portknock_bundles/alice.tar") -> Bundle:
    return load(str(run.folder / name))


def secrets(bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bundle.files["secrets.json"])["hosts"]
    return found


def kept(run: Run, host: str, operator: str) -> list[str]:
    knocks: list[str] = yaml.safe_load(run.view(host))["operators"][operator]["current"]["knocks"]
    return knocks


def leaks(run: Run, printed: str) -> list[str]:
    """Which knocks of the keyring a text shows."""
    ports = {knock for path in run.ring.glob("*.yml") for knock in re.findall(r"- (\d+)/", run.view(path.stem))}
    return [port for port in ports if re.search(rf"(?<![\w.])(?:{port}/|\[?'?{port}\b)", printed)]


def test_made_once_for_her_hosts(run: Run) -> None:
    (run.folder / "hosts").write_text("web1 ansible_host=192.0.2.7 ansible_port=2222\nweb2\nweb3\nweb4\n")
    operators = "{{ ['bob'] if inventory_hostname == 'web3' else ['alice', 'bob'] }}"
    run({"operators": operators}, "--limit", "web1,web2,web3")
    printed = run.play(CLIENT, *ALICE, "--check", "--diff")
    assert counts(printed) == {"web1": (1, 0)}
    assert "+  web1: 192.0.2.7 port 2222, 1 reusable, 0 one-time\n" in printed
    assert not (run.folder / "portknock_bundles").exists()

    printed += run.play(CLIENT, *ALICE, "--diff", "-vvvvv")
    assert "\nweb3" not in re.sub(r"(?s)^.*PLAY RECAP", "", printed)
    assert re.search(r'"left_out": \{\s*"web3": "no sequence",\s*"web4": "no sequence"\s*\}', printed)
    assert "tar -xf alice.tar && portknock/portknock install" in printed
    assert leaks(run, printed) == []
    bundle = made(run)
    assert secrets(bundle) == {
        "web1": {"hostname": "192.0.2.7", "port": 2222, "sequences": [kept(run, "web1", "alice")]},
        "web2": {"hostname": "web2", "port": 22, "sequences": [kept(run, "web2", "alice")]},
    }
    assert bundle.manifest.keyrings == (json.loads((run.ring / "keyring.json").read_text())["keyring"],)
    path = run.folder / "portknock_bundles" / "alice.tar"
    inode = path.stat().st_ino
    assert counts(run.play(CLIENT, *ALICE, "--diff")) == {"web1": (0, 0)}
    assert path.stat().st_ino == inode
    printed = run.play(CLIENT, *ALICE, "-e", "portknock_hosts=web2", "-e", "knock_client_bundle=mine", "-v")
    assert list(secrets(made(run, "mine"))) == ["web2"]
    assert f"{run.folder}/mine/portknock install" in printed


def test_who_has_to_be_said(run: Run) -> None:
    printed = run.play(CLIENT)
    assert "client.yml makes the bundle of one operator: name them with -e portknock_operator=NAME." in printed
    assert counts(printed) == {"web1": (0, 1)}


def test_what_is_wrong_is_said(run: Run) -> None:
    """Nothing is written then."""
    (run.folder / "text.tar").write_text("text")
    run({"operators": ["alice"]}, "--limit", "web1")
    alice = {"operator": "alice"}
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("knock_bundle", {"operator": ""}, "portknock_operator: expected the name of an operator; got nothing."),
        ("knock_bundle", {"operator": "../x"}, "whom one of the hosts lets in; got '../x', who has"),
        ("knock_bundle", {**alice, "hosts": ["web9"]}, "hosts: expected hosts of the inventory; got web9."),
        ("knock_bundle", {**alice, "fleet": "../x"}, "knock_client_fleet: expected up to 32 letters"),
        ("knock_bundle", {**alice, "dest": "none/a.tar"}, "knock_client_bundle: expected a path in a folder that is"),
        ("knock_client", {}, "knock_client_operator: expected the name of an operator, or knock_client_bundle; got"),
        ("knock_client", {"operator": "../x"}, "expected names of 1 to 64 letters"),
        ("knock_client", alice, f"at {run.folder}/portknock_bundles/alice.tar; got: No such file or directory."),
        ("knock_client", {"bundle": "text.tar"}, "text.tar: expected a bundle that client.yml has made; got another"),
        ("knock_client", {"state": "absent", "fleet": "../.."}, "knock_client_fleet: expected up to 32 letters"),
    ]
    tasks = [{f"fleet.portknock.{name}": arguments, "ignore_errors": True} for name, arguments, _complaint in wrong]
    printed = run.tasks(tasks, "--limit", "web1", "-e", "ansible_connection=local")
    assert f"ignored={len(wrong)}" in printed
    for _name, _arguments, complaint in wrong:
        assert complaint in printed
    assert "knock_client_port: expected a port from 1 to 65535, or 0, for web1; got 'ssh'." in run.tasks(
        [{"fleet.portknock.knock_bundle": alice}], "--limit", "web1", "-e", "knock_client_port=ssh"
    )
    assert not (run.folder / "portknock_bundles").exists()


def test_where_peoples_ssh_goes(run: Run) -> None:
    """What ssh on the controller makes of a host, unless the inventory says otherwise."""
    (run.folder / "ssh_config").write_text(
        "Host web1\n  HostName web1.example.org\n  Port 2200\n  AddressFamily inet6\n"
    )
    (run.folder / "hosts").write_text(
        "web1 ansible_user=robot\nweb2 ansible_host=192.0.2.8 knock_client_hostname=shop.example.org knock_client_port=443 "
        "knock_client_remote_user=al\nweb3 ansible_ssh_common_args='-J jump.example.org'\n"
        "web4 ansible_ssh_common_args='-J x' knock_from_jump=false knock_client_jump=al@jump\n"
        "web5 ansible_ssh_common_args='-J x' knock_client_jump=none\nweb6 ansible_ssh_common_args='-o ProxyCommand=x'\n"
    )
    run(PEOPLE)
    printed = run.play(CLIENT, *ALICE, ANSIBLE_SSH_ARGS=f"-F {run.folder}/ssh_config")
    config = made(run).files["config"].decode().split("\n\n")[1:]
    place = "~/.ssh/portknock"
    connect = f"  ProxyCommand {place}/portknock connect --secrets {place}/secrets.json"
    assert config[:2] == [
        f"Host web1\n  HostName web1.example.org\n  Port 2200\n  AddressFamily inet6\n{connect} -6 --name web1 %h %p",
        f"Host web2\n  HostName shop.example.org\n  Port 443\n  User al\n{connect} --name web2 %h %p",
    ]
    assert config[3] == "Host web4\n  HostName web4\n  ProxyJump al@jump"
    assert "".join(config).count("ProxyJump") == 1
    found = secrets(made(run))
    assert {host: access["jump"] for host, access in found.items() if "jump" in access} == {
        "web3": "jump.example.org",
        "web4": "al@jump",
    }
    assert re.findall(r"(web\d): ssh on the controller goes through a ProxyCommand", printed) == ["web6"]


def test_sequences_that_the_inventory_gives(run: Run) -> None:
    """By hand or by the filter, each host its own, whether or not the keyring knows the host."""
    secret = token_hex(32)
    derived = "{{ knock_secret | fleet.portknock.knock_sequence(host=inventory_hostname, operator='alice') }}"
    variables = {
        "knock_secret": secret,
        "knock_server_operators": ["alice", "bob"],
        "knock_server_sequences": {"alice": derived, "bob": ["4839x"]},
    }
    (run.folder / "group_vars").mkdir()
    (run.folder / "group_vars" / "all.yml").write_text(json.dumps(variables))
    (run.folder / "host_vars").mkdir()
    (run.folder / "host_vars" / "web2.yml").write_text(json.dumps({"knock_server_sequences": {"alice": GIVEN}}))
    late = {"knock_server_valid_until": {"alice": "2026-02-01T00:00:00Z"}}
    (run.folder / "host_vars" / "late.yml").write_text(json.dumps(late))
    (run.folder / "hosts").write_text("web1\nweb2\nlate\nnew\n")
    run({"operators": ["alice"]}, "--limit", "web1")
    printed = run.play(CLIENT, *ALICE, "-vvv")
    assert re.search(r'"left_out": \{\s*"late": "expired since 2026-02-01T00:00:00Z"\s*\}', printed)
    found = {host: access["sequences"] for host, access in secrets(made(run)).items()}
    assert set(found) == {"web1", "web2", "new"}
    assert found["web1"][0] == kept(run, "web1", "alice")
    # What the gate honours is the keyring's until site.yml has run; the inventory's is what comes then.
    assert len(found["web1"]) == 2
    assert sorted(found["web2"]) == sorted(GIVEN)
    assert len(found["new"]) == 1
    assert found["new"][0] != found["web1"][1]
    assert secret not in printed
    ports = {knock.partition("/")[0] for knocks in found.values() for sequence in knocks for knock in sequence}
    assert not re.search(rf"(?<![\w.])(?:{'|'.join(ports)})(?:/|\b\")", printed)
    # Without any keyring.
    printed = run.play(
        CLIENT, *ALICE, "-e", f"knock_client_bundle={run.folder}/a.tar", "--limit", "new", inventory="hosts"
    )
    assert secrets(made(run, "a.tar")) == {"new": {"hostname": "new", "port": 22, "sequences": found["new"]}}
    assert made(run, "a.tar").manifest.keyrings == ()


def test_one_time_sequences_and_hosts_that_are_gone(run: Run) -> None:
    (run.folder / "hosts").write_text("web1\nweb2\nweb3\n")
    run([{"one_time": 16, **PEOPLE}, {"state": "promoted"}])
    run({"state": "revoked", "operator": "alice", **PEOPLE}, "--limit", "web2")
    run({"state": "removed"}, "--limit", "web3")
    printed = run.play(CLIENT, *ALICE, "--diff", "-vvv")
    assert "+  web1: web1 port 22, 0 reusable, 16 one-time\n" in printed
    assert '"web2": "revoked since 2' in printed
    assert '"web3": "the gate was taken away"' in printed
    (found,) = secrets(made(run)).values()
    stock = yaml.safe_load(run.view("web1"))["operators"]["alice"]["one_time"]["sequences"]
    assert found["one_time"]["sequences"] == {str(one): knocks.split() for one, knocks in stock.items()}
    assert not any(knock in printed for knocks in stock.values() for knock in knocks.split())


def test_a_folder_that_ansible_reads_as_inventory(run: Run) -> None:
    (run.folder / "sources").mkdir()
    (run.folder / "sources" / "hosts").write_text("web1\n")
    run.ring = run.folder / "sources" / "knock_keyring"
    run(PEOPLE, inventory="sources")
    printed = run.play(CLIENT, *ALICE, inventory="sources").replace("\n", " ")
    assert "Set knock_client_bundle to a folder elsewhere, or add ^portknock_bundles$ to ignore_patterns" in printed
