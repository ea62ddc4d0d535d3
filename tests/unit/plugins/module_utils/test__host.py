# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A gate's files and their order, with a kernel that is a file: the real one is what the scenarios are for."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils import _host
from ansible_collections.fleet.portknock.plugins.module_utils._backends import (
    CONFIG_FOLDER,
    OPENER_ON_TRIAL,
    UNIT_FOLDER,
    HostFile,
)
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._host import WANTED_BY, GateHost, Wanted
from ansible_collections.fleet.portknock.plugins.module_utils._system import Completed, run

UNIT = "fleet-portknock.service"
SERVICE = "fleet-portknock-watch.service"
OPENER = "fleet-portknock-opener.service"
TEXTS = {"closed": "closed\n", "load": "load\n", "unit": "unit\n", "watch_unit": "service\n", "gate": "the gate\n"}
WANTED = Wanted(TEXTS, keyring="k1", generation=1, fingerprint="f1")
NEWER = Wanted(
    {**TEXTS, "gate": "another gate\n", "unit": "another unit\n"}, keyring="k1", generation=2, fingerprint="f2"
)


class FileBackend:
    """A back end whose kernel is one file, an object a line."""

    name = "file"
    program = "true"
    installed = "1.0"
    files: Mapping[str, HostFile] = {
        "closed": HostFile("closed", f"{CONFIG_FOLDER}/closed.nft", 0o600),
        "load": HostFile("load", f"{CONFIG_FOLDER}/load.sh", 0o700),
        "unit": HostFile("unit", f"{UNIT_FOLDER}/{UNIT}", 0o644),
        "watch_unit": HostFile("service", f"{UNIT_FOLDER}/{SERVICE}", 0o644),
        "gate": HostFile("gate", f"{CONFIG_FOLDER}/gate.rules", 0o600),
    }
    units: Sequence[str] = (UNIT, SERVICE)
    services: Sequence[str] = (SERVICE,)
    kernel = "file"
    closed = "closed"
    opener: Optional[str] = None
    opener_files: Sequence[str] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        self.refuses = ""
        self.forgot = 0
        self.armed: list[str] = []

    def version(self) -> str:
        return self.installed

    def check(self, texts: Mapping[str, str]) -> None:
        if texts["gate"] == self.refuses:
            raise PortknockError("gate: refused.")

    def boot_text(self, text: str) -> str:
        return f"BOOT\n{text}"

    def body(self, boot_text: str) -> Optional[str]:
        return boot_text.partition("BOOT\n")[2] or None

    def listing(self) -> Optional[dict[str, Any]]:
        return {"text": self.path.read_text()} if self.path.exists() else None

    def digests(self, listing: dict[str, Any]) -> dict[str, str]:
        return {line.split()[0]: line for line in listing["text"].splitlines()}

    def kernel_text(self) -> Optional[str]:
        return self.path.read_text() if self.path.exists() else None

    def accepts(self, text: str) -> bool:
        return "broken" not in text

    def load(self, text: str, listing: Optional[dict[str, Any]]) -> None:
        self.path.write_text(text)

    def forgetting(self, text: str) -> str:
        self.forgot += 1
        return text

    def arm(self, texts: Mapping[str, str]) -> None:
        self.armed.append(self.path.read_text())

    def arm_command(self, root: str) -> str:
        return f"cat {shlex.quote(str(self.path))} >> {shlex.quote(f'{self.path}.armed')} || :"

    def unload(self) -> None:
        self.path.unlink(missing_ok=True)

    def unload_text(self) -> str:
        return "BOOT\n"

    def left_behind(self) -> list[str]:
        return [f"{self.name} was here"]

    def unload_command(self) -> str:
        return f"rm -f {shlex.quote(str(self.path))}"

    def restore_command(self, path: str) -> str:
        kernel = shlex.quote(str(self.path))
        return f"sed '0,/BOOT/d' {path} > {kernel} && if ! [ -s {kernel} ]; then rm {kernel}; fi"


@pytest.fixture
def backend(tmp_path: Path) -> FileBackend:
    return FileBackend(tmp_path / "kernel")


class Systemd:
    """What systemctl does to links, and which services run: they do where their unit is there when they are started."""

    def __init__(self, units: Path) -> None:
        self._units = units
        self.running: set[str] = set()
        self.reloads = True
        self.starts = 0
        self.asked: list[str] = []

    def __call__(self, argv: Sequence[str], stdin: Optional[str] = None) -> Completed:
        if argv[0] == "systemd-run":
            self.running |= {word[7:] for word in argv if word.startswith("--unit=") and word.endswith(".service")}
            return Completed(self.starts, "", "")
        if argv[0] == "/bin/sh":
            return self._shell(argv)
        if argv[0] != "systemctl":
            return run(argv, stdin)
        _quiet, verb, *units = argv[1:]
        self.asked.append(verb)
        if verb == "is-active":
            return Completed(0 if units[0] in self.running else 3, "", "")
        if verb == "restart":
            self.running |= set(units)
        if verb == "stop":
            self.running -= set(units)
        if verb == "enable":
            for unit in units:
                link = self._units / f"{WANTED_BY}.wants" / unit
                link.unlink(missing_ok=True)
                link.symlink_to(self._units / unit)
        return Completed(0, "", "")

    def _shell(self, argv: Sequence[str]) -> Completed:
        """A shell whose systemctl notes what it was asked, and removes links and services as the real one does."""
        asked = self._units.parent / "systemctl-calls"
        asked.write_text("")
        path = self._units.parent / "bin"
        path.mkdir(exist_ok=True)
        program = path / "systemctl"
        refused = "" if self.reloads else 'case "$*" in *disable* | *daemon-reload*) exit 1 ;; esac\n'
        program.write_text(f'#!/bin/sh\n{refused}echo "$*" >>{asked}\n')
        program.chmod(0o755)
        script = Path(argv[1]).read_text() if len(argv) == 2 else argv[2]
        done = run(
            [
                "/bin/sh",
                "-c",
                script.replace("PATH=/", f"PATH={path}:/", 1) if len(argv) == 2 else f"PATH={path}:$PATH; {script}",
            ]
        )
        for line in asked.read_text().splitlines():
            verbs, units = set(line.split()), {word for word in line.split() if word.endswith(".service")}
            if verbs & {"stop", "--now"}:
                self.running -= units
            if verbs & {"start", "restart"}:
                self.running |= units
        asked.unlink()
        return done


@pytest.fixture
def systemd(tmp_path: Path) -> Systemd:
    return Systemd(tmp_path / "etc/systemd/system")


@pytest.fixture
def host(tmp_path: Path, backend: FileBackend, systemd: Systemd) -> GateHost:
    (tmp_path / f"etc/systemd/system/{WANTED_BY}.wants").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    return GateHost(backend, str(tmp_path), systemd)  # type: ignore[arg-type]


def apply(host: GateHost, wanted: Wanted) -> None:
    with host.trial.turn("aa"):
        host.apply(wanted, host.inspect(), "aa", 3600)


def test_one_time_sequences_are_armed_for_the_trial_and_after_the_way_back(
    host: GateHost, backend: FileBackend, tmp_path: Path
) -> None:
    """Each load leaves a kernel in which nothing is armed, or not what the gate on trial needs."""
    apply(host, WANTED)
    confirm(host, WANTED)
    apply(host, NEWER)
    assert backend.armed == ["the gate\n", "another gate\n"]
    host.trial.restore("aa")
    assert (tmp_path / "kernel").read_text() == "the gate\n"
    assert (tmp_path / "kernel.armed").read_text() == "the gate\n"


def confirm(host: GateHost, wanted: Wanted) -> None:
    with host.trial.turn("aa"):
        host.confirm(wanted, "aa")


def files(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below /etc and the kernel: what has to be as before, byte for byte."""
    found = [path for path in (root / "etc/systemd/system").rglob("*") if path.is_file() or path.is_symlink()]
    found += (root / "etc/fleet-portknock").glob("*")
    return {
        str(path): (path.lstat().st_mode, path.read_bytes() if path.exists() else b"")
        for path in (*found, root / "kernel")
        if path.is_symlink() or path.exists()
    }


def whats(host: GateHost, wanted: Wanted) -> list[str]:
    return [difference.what.rpartition("/")[2] for difference in host.differences(wanted, host.inspect())]


def test_a_virgin_host_lacks_everything(host: GateHost) -> None:
    assert whats(host, WANTED) == ["closed.nft", "load.sh", UNIT, SERVICE, "gate.rules", "the kernel's table"]
    assert not host.exists(host.inspect())


def test_trial_writes_nothing_that_a_reboot_would_bring_back(host: GateHost, tmp_path: Path) -> None:
    before = files(tmp_path)
    apply(host, WANTED)
    after = files(tmp_path)
    assert after.pop(str(tmp_path / "kernel"))[1] == b"the gate\n"
    assert after == before


def test_confirmed_gate_leaves_nothing_to_do(host: GateHost) -> None:
    apply(host, WANTED)
    confirm(host, WANTED)
    assert whats(host, WANTED) == []
    assert host.trial.pending() is None


@pytest.mark.parametrize(
    ("changed", "dies", "expected"),
    [
        pytest.param("gate", False, [], id="new secrets"),
        pytest.param("gate", True, ["daemon-reload", "restart"], id="new secrets, and the watch has died"),
        pytest.param("watch_unit", False, ["daemon-reload", "restart"], id="a new unit"),
    ],
)
def test_services_are_left_alone_where_only_the_gate_is_new(
    host: GateHost, systemd: Systemd, changed: str, dies: bool, expected: list[str]
) -> None:
    apply(host, WANTED)
    confirm(host, WANTED)
    wanted = WANTED._replace(texts={**WANTED.texts, changed: "another\n"}, generation=2)
    apply(host, wanted)
    if dies:
        systemd.running.clear()
    systemd.asked.clear()
    confirm(host, wanted)
    assert [verb for verb in systemd.asked if verb in ("daemon-reload", "restart")] == expected
    assert systemd.running == {SERVICE}
    assert whats(host, wanted) == []


def test_confirmation_asked_for_again_finishes_what_died_before_systemd_was_told(
    host: GateHost, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(host, WANTED)
    confirm(host, WANTED)
    apply(host, NEWER)

    def dies(*_arguments: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(host, "_systemctl", dies)
        with pytest.raises(KeyboardInterrupt):
            confirm(host, NEWER)
    systemd.asked.clear()
    confirm(host, NEWER)
    assert {"daemon-reload", "restart"} <= set(systemd.asked)


def test_files_with_secrets_are_roots_alone(host: GateHost, tmp_path: Path) -> None:
    apply(host, WANTED)
    confirm(host, WANTED)
    config = tmp_path / "etc/fleet-portknock"
    assert config.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in config.iterdir()} == {
        "gate.rules": 0o600,
        "closed.nft": 0o600,
        "load.sh": 0o700,
    }


@pytest.mark.parametrize("former", [None, WANTED])
def test_going_back_leaves_every_byte_as_before(host: GateHost, tmp_path: Path, former: Optional[Wanted]) -> None:
    if former is not None:
        apply(host, former)
        confirm(host, former)
    before = files(tmp_path)
    apply(host, NEWER)
    assert files(tmp_path) != before
    host.trial.restore("aa")
    assert files(tmp_path) == before
    assert not (tmp_path / "run/fleet-portknock/trial").exists()


@pytest.mark.parametrize("former", [None, WANTED])
def test_confirmation_that_dies_before_the_commit_is_undone(
    host: GateHost, systemd: Systemd, tmp_path: Path, former: Optional[Wanted], monkeypatch: pytest.MonkeyPatch
) -> None:
    if former is not None:
        apply(host, former)
        confirm(host, former)
    before = files(tmp_path)
    apply(host, NEWER)
    real = os.replace

    def dies_at_the_commit(source: str, target: str) -> None:
        if target.endswith("gate.rules"):
            raise KeyboardInterrupt
        real(source, target)

    running = set(systemd.running)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dies_at_the_commit)
        with pytest.raises(KeyboardInterrupt):
            confirm(host, NEWER)
    assert files(tmp_path) != before
    assert systemd.running == {SERVICE}
    host.trial.restore("aa")
    assert files(tmp_path) == before
    assert systemd.running == running


def test_confirmation_that_dies_after_the_commit_stands(
    host: GateHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(host, WANTED)

    def dies() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(host.trial, "end", dies)
        with pytest.raises(KeyboardInterrupt):
            confirm(host, WANTED)
    host.trial.restore("aa")
    assert whats(host, WANTED) == []


def test_a_run_can_ask_what_became_of_it(host: GateHost) -> None:
    apply(host, WANTED)
    assert host.outcome("aa", removal=False) is None
    host.trial.restore("aa")
    assert host.outcome("aa", removal=False) == "restored"
    apply(host, WANTED)
    confirm(host, WANTED)
    assert host.outcome("aa", removal=False) == "confirmed"
    assert host.outcome("bb", removal=False) == "restored"
    assert host.outcome("bb", removal=True) == "restored"
    with host.trial.turn("bb"):
        host.take_away(host.inspect(), "bb", 3600)
        host.confirm_away("bb")
    assert host.outcome("bb", removal=True) == "confirmed"


def test_removal_that_is_not_confirmed_brings_the_gate_back(host: GateHost, tmp_path: Path) -> None:
    apply(host, WANTED)
    confirm(host, WANTED)
    before = files(tmp_path)
    with host.trial.turn("bb"):
        host.take_away(host.inspect(), "bb", 3600)
    assert not (tmp_path / "kernel").exists()
    host.trial.restore("bb")
    assert files(tmp_path) == before


def test_removal_that_dies_after_the_commit_is_finished(
    host: GateHost, systemd: Systemd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(tmp_path)
    apply(host, WANTED)
    confirm(host, WANTED)

    def dies(_path: str) -> None:
        os.unlink(tmp_path / "etc/fleet-portknock/gate.rules")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, host.trial.turn("bb"):
        host.take_away(host.inspect(), "bb", 3600)
        patched.setattr(_host, "remove_file", dies)
        with pytest.raises(KeyboardInterrupt):
            host.confirm_away("bb")
    assert systemd.running == {SERVICE}
    host.trial.restore("bb")
    assert files(tmp_path) == before
    assert systemd.running == set()
    assert not host.exists(host.inspect())


def test_removal_leaves_nothing_even_where_systemd_reloads_nothing(
    host: GateHost, systemd: Systemd, tmp_path: Path
) -> None:
    before = files(tmp_path)
    apply(host, WANTED)
    confirm(host, WANTED)
    systemd.reloads = False
    with host.trial.turn("bb"):
        host.take_away(host.inspect(), "bb", 3600)
        with pytest.raises(PortknockError, match="can't be removed"):
            host.confirm_away("bb")
    host.trial.restore("bb")
    assert files(tmp_path) == before
    assert systemd.running == set()


def test_removal_leaves_nothing(host: GateHost, systemd: Systemd, tmp_path: Path) -> None:
    before = files(tmp_path)
    apply(host, WANTED)
    confirm(host, WANTED)
    with host.trial.turn("bb"):
        host.take_away(host.inspect(), "bb", 3600)
        host.confirm_away("bb")
        host.forget()
    assert files(tmp_path) == before
    assert systemd.running == set()
    assert list((tmp_path / "run").iterdir()) == []
    assert not (tmp_path / "etc/fleet-portknock").exists()


@pytest.mark.parametrize(
    "lost", ["rm -r {root}/etc/fleet-portknock", "echo broken > {root}/etc/fleet-portknock/gate.rules"]
)
def test_repair_that_is_not_confirmed_leaves_the_port_closed(host: GateHost, tmp_path: Path, lost: str) -> None:
    """The kernel still has the gate, its file is gone or useless."""
    apply(host, WANTED)
    confirm(host, WANTED)
    os.system(lost.format(root=tmp_path))  # noqa: S605
    before = files(tmp_path)
    apply(host, NEWER)
    host.trial.restore("aa")
    assert files(tmp_path) == before
    assert (tmp_path / "kernel").read_text() == "the gate\n"


def test_removal_without_a_file_goes_back_too(host: GateHost, tmp_path: Path) -> None:
    apply(host, WANTED)
    confirm(host, WANTED)
    os.system(f"rm -r {tmp_path}/etc/fleet-portknock")  # noqa: S605
    with host.trial.turn("bb"):
        host.take_away(host.inspect(), "bb", 3600)
    host.trial.restore("bb")
    assert (tmp_path / "kernel").read_text() == "the gate\n"
    assert host.outcome("bb", removal=True) == "restored"


def test_gate_that_does_not_load_goes_back_to_the_closed_table(host: GateHost, tmp_path: Path) -> None:
    apply(host, WANTED)
    confirm(host, WANTED)
    os.system(f"echo broken > {tmp_path}/etc/fleet-portknock/gate.rules; rm {tmp_path}/kernel")  # noqa: S605
    apply(host, NEWER)
    host.trial.restore("aa")
    assert (tmp_path / "kernel").read_text() == "closed\n"


def test_file_that_is_no_text_is_repaired(host: GateHost, tmp_path: Path) -> None:
    apply(host, WANTED)
    confirm(host, WANTED)
    (tmp_path / "etc/fleet-portknock/gate.rules").write_bytes(b"\xff\xfe")
    assert "gate.rules" in whats(host, WANTED)
    apply(host, WANTED)
    confirm(host, WANTED)
    assert whats(host, WANTED) == []


def test_refused_rules_change_nothing(host: GateHost, backend: FileBackend, tmp_path: Path) -> None:
    backend.refuses = WANTED.texts["gate"]
    before = files(tmp_path)
    with pytest.raises(PortknockError, match=r"^gate: refused"):
        apply(host, WANTED)
    assert files(tmp_path) == before
    assert host.trial.pending() is None


@pytest.mark.parametrize("spoil", [FileBackend.unload, lambda backend: backend.load("the former gate\n", None)])
def test_what_was_not_loaded_for_the_trial_is_not_confirmed(
    host: GateHost, backend: FileBackend, spoil: Callable[[FileBackend], None]
) -> None:
    apply(host, WANTED)
    spoil(backend)
    with pytest.raises(PortknockError, match="another program has changed it"):
        confirm(host, WANTED)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        ("rm {root}/kernel", ["the kernel's table"]),
        ("echo tampered > {root}/kernel", ["the kernel's table"]),
        ("echo more >> {root}/etc/fleet-portknock/gate.rules", ["gate.rules"]),
        ("rm {root}/etc/fleet-portknock/gate.rules", ["gate.rules", "the kernel's table"]),
        ("rm {root}/etc/fleet-portknock/closed.nft", ["closed.nft"]),
        ("chmod 644 {root}/etc/fleet-portknock/gate.rules", ["fleet-portknock"]),
        ("rm {root}/etc/systemd/system/sysinit.target.wants/fleet-portknock.service", [UNIT]),
        ("rm {root}/etc/systemd/system/fleet-portknock.service", [UNIT]),
    ],
)
def test_drift_is_seen(host: GateHost, tmp_path: Path, spoil: str, expected: list[str]) -> None:
    apply(host, WANTED)
    confirm(host, WANTED)
    os.system(spoil.format(root=tmp_path))  # noqa: S605
    assert whats(host, WANTED) == expected
    apply(host, WANTED)
    confirm(host, WANTED)
    assert whats(host, WANTED) == []


def test_other_secrets_and_an_upgrade_are_seen(host: GateHost, backend: FileBackend) -> None:
    apply(host, WANTED)
    confirm(host, WANTED)
    assert whats(host, WANTED._replace(keyring="k2", generation=2)) == ["keyring", "generation"]
    backend.installed = "1.1"
    assert whats(host, WANTED) == ["the kernel's table"]


def test_service_that_does_not_run_is_drift(host: GateHost, systemd: Systemd) -> None:
    apply(host, WANTED)
    confirm(host, WANTED)
    systemd.running.clear()
    assert whats(host, WANTED) == [SERVICE]
    apply(host, WANTED)
    confirm(host, WANTED)
    assert whats(host, WANTED) == []


def test_what_differs_in_the_kernel_is_named_and_not_shown(host: GateHost, tmp_path: Path) -> None:
    wanted = Wanted({**TEXTS, "gate": "lock 48396\nstep 51203\n"}, keyring="k1", generation=1, fingerprint="f1")
    apply(host, wanted)
    confirm(host, wanted)
    (tmp_path / "kernel").write_text("lock 48397\nmore 51204\n")
    (difference,) = host.differences(wanted, host.inspect())
    assert difference.before == "lock was changed\nmore was added\nstep is missing\n"


def test_gate_on_disk_without_a_record_of_what_was_loaded_is_made_anew(host: GateHost, tmp_path: Path) -> None:
    apply(host, WANTED)
    confirm(host, WANTED)
    gate = tmp_path / "etc/fleet-portknock/gate.rules"
    gate.write_text(gate.read_text().replace('"digests"', '"others"'))
    assert whats(host, WANTED) == ["the kernel's table"]


@pytest.mark.parametrize(("removal", "kind"), [(False, "applied"), (True, "absent")])
def test_what_is_on_trial_is_noted_for_the_watch(host: GateHost, tmp_path: Path, removal: bool, kind: str) -> None:
    apply(host, WANTED)
    if removal:
        confirm(host, WANTED)
        with host.trial.turn("bb"):
            host.take_away(host.inspect(), "bb", 3600)
    assert (tmp_path / "run/fleet-portknock/trial/kind").read_text() == kind


def named(wanted: Wanted, keyring: str = "k1", **names: str) -> Wanted:
    """A gate with these operators, by their numbers."""
    return wanted._replace(keyring=keyring, operators={number[1:]: name for number, name in names.items()})


def names(host: GateHost) -> dict[str, str]:
    return dict(host.names(host.inspect()))


def test_who_a_number_means_is_known_after_they_have_gone(host: GateHost, backend: FileBackend) -> None:
    assert names(host) == {}
    for wanted in (named(WANTED, n1="alice", n2="bob"), named(NEWER, n1="alice", n3="carol")):
        apply(host, wanted)
        confirm(host, wanted)
    assert names(host) == {"1": "alice", "2": "bob", "3": "carol"}
    # The first one found nothing that it could have known of.
    assert backend.forgot == 1
    assert whats(host, named(NEWER, n1="alice", n3="carol")) == []


@pytest.mark.parametrize(
    "other",
    [named(NEWER, "k2", n1="dave"), named(NEWER, "k2", n1="alice"), named(NEWER, n1="bob", n2="alice")],
    ids=["keyring", "keyring-same-name", "number"],
)
def test_no_opening_is_put_down_to_another(host: GateHost, backend: FileBackend, other: Wanted) -> None:
    """Neither while the new gate is on trial nor after."""
    first = named(WANTED, n1="alice", n2="bob")
    apply(host, first)
    confirm(host, first)
    apply(host, other)
    assert backend.forgot == 2
    assert names(host) == dict(other.operators)
    confirm(host, other)
    assert names(host) == dict(other.operators)


def test_names_go_back_with_the_gate(host: GateHost) -> None:
    first = named(WANTED, n1="alice")
    apply(host, first)
    confirm(host, first)
    apply(host, named(NEWER, "k2", n1="bob"))
    host.trial.restore("aa")
    assert names(host) == {"1": "alice"}


def test_a_gate_of_an_earlier_release_names_nobody(host: GateHost, tmp_path: Path) -> None:
    wanted = named(WANTED, n1="alice")
    apply(host, wanted)
    confirm(host, wanted)
    gate = tmp_path / "etc/fleet-portknock/gate.rules"
    gate.write_text(gate.read_text().replace('"operators"', '"others"'))
    assert names(host) == {}


class OpenedByDaemon(FileBackend):
    """Another one for the same kernel, with a daemon that opens."""

    name = "daemon"
    files: Mapping[str, HostFile] = {
        **{name: file for name, file in FileBackend.files.items() if name != "gate"},
        "opener": HostFile("opener", f"{CONFIG_FOLDER}/opener.py", 0o700),
        "opener_conf": HostFile("opener_conf", f"{CONFIG_FOLDER}/opener.conf", 0o600),
        "opener_unit": HostFile("opener_unit", f"{UNIT_FOLDER}/{OPENER}", 0o644),
        "off": HostFile("off", f"{UNIT_FOLDER}/packaged.service.d/fleet-portknock.conf", 0o644),
        "gate": FileBackend.files["gate"],
    }
    units = (UNIT, SERVICE, OPENER)
    services = (SERVICE, OPENER)
    opener = OPENER
    opener_files = ("opener", "opener_conf")


class OfAnotherKernel(FileBackend):
    """One whose rules are somewhere else."""

    name = "other"
    kernel = "other"

    def __init__(self, path: Path) -> None:
        super().__init__(path.with_name("other-kernel"))


BACKENDS = (FileBackend, OpenedByDaemon, OfAnotherKernel)
MORE = {"opener": "program\n", "opener_conf": "secret\n", "opener_unit": "opener\n", "off": "not this one\n"}


class Switch:
    """A host whose gate is made by one back end after another."""

    def __init__(self, root: Path, systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = root
        self._systemd = systemd
        (root / f"etc/systemd/system/{WANTED_BY}.wants").mkdir(parents=True)
        (root / "run").mkdir()
        for name, files in ((backend.name, backend.files) for backend in BACKENDS):
            monkeypatch.setitem(_host.BACK_ENDS, name, None)
            for key, file in files.items():
                if key not in _host.FILES:
                    monkeypatch.setitem(_host.FILES, key, file)

    def host(self, backend: type[FileBackend]) -> GateHost:
        by_name = {other.name: other for other in BACKENDS}
        return GateHost(
            backend(self._root / "kernel"),  # type: ignore[arg-type]
            str(self._root),
            self._systemd,
            lambda name, _run: by_name[name](self._root / "kernel"),  # type: ignore[arg-type, return-value]
        )

    def wanted(self, backend: type[FileBackend]) -> Wanted:
        texts = {**TEXTS, **MORE, "gate": f"the gate of {backend.name}\n"}
        return WANTED._replace(texts={name: texts[name] for name in backend.files})

    def state(self) -> tuple[dict[str, tuple[int, bytes]], str, frozenset[str]]:
        other = self._root / "other-kernel"
        kernel = other.read_text() if other.exists() else ""
        return files(self._root), kernel, frozenset(self._systemd.running)


@pytest.fixture
def switch(tmp_path: Path, systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> Switch:
    return Switch(tmp_path, systemd, monkeypatch)


switches = pytest.mark.parametrize(
    ("former", "later"), [(one, two) for one in BACKENDS for two in BACKENDS if one is not two]
)


@switches
def test_another_back_end_takes_the_gate_over(
    switch: Switch, tmp_path: Path, former: type[FileBackend], later: type[FileBackend]
) -> None:
    """With nothing left of the former one: as if it had never been there, but for who ran the confirmation."""
    host = switch.host(former)
    apply(host, switch.wanted(former))
    confirm(host, switch.wanted(former))
    host = switch.host(later)
    assert "the back end" in whats(host, switch.wanted(later))
    apply(host, switch.wanted(later))
    with host.trial.turn("aa"):
        told = host.confirm(switch.wanted(later), "aa")
    assert told == ([f"{former.name} was here"] if OfAnotherKernel in (former, later) else [])
    assert whats(host, switch.wanted(later)) == []
    found, other, running = switch.state()
    assert {Path(path).name for path in found if "kernel" not in path} == {
        Path(file.path).name for file in later.files.values()
    }
    assert (other != "") == (later is OfAnotherKernel)
    assert (str(tmp_path / "kernel") in found) == (later is not OfAnotherKernel)
    assert running == set(later.services)
    assert len(list(tmp_path.rglob("*.service.d"))) == (later is OpenedByDaemon)


@switches
def test_a_change_of_the_back_end_goes_back(
    switch: Switch, tmp_path: Path, former: type[FileBackend], later: type[FileBackend]
) -> None:
    host = switch.host(former)
    apply(host, switch.wanted(former))
    confirm(host, switch.wanted(former))
    before = switch.state()
    host = switch.host(later)
    apply(host, switch.wanted(later))
    assert switch.state() != before
    host.trial.restore("aa")
    assert switch.state() == before
    assert len(list(tmp_path.rglob("*.service.d"))) == (former is OpenedByDaemon)


@switches
def test_a_change_of_the_back_end_that_dies_after_the_commit_is_finished(
    switch: Switch, former: type[FileBackend], later: type[FileBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = switch.host(former)
    apply(host, switch.wanted(former))
    confirm(host, switch.wanted(former))
    host = switch.host(later)
    apply(host, switch.wanted(later))

    def dies(_names: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(host, "_leftovers_command", dies)
        with pytest.raises(KeyboardInterrupt):
            confirm(host, switch.wanted(later))
    host.trial.restore("aa")
    assert whats(host, switch.wanted(later)) == []
    assert switch.state()[2] == set(later.services)


def test_the_opener_on_trial_has_files_of_its_own(switch: Switch, tmp_path: Path) -> None:
    """Nothing of it is on disk, and none but root can read it."""
    host = switch.host(OpenedByDaemon)
    apply(host, switch.wanted(OpenedByDaemon))
    folder = tmp_path / "run/fleet-portknock/trial/opener"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        "opener.py": 0o700,
        "opener.conf": 0o600,
    }
    assert switch.state()[2] == {OPENER_ON_TRIAL}
    assert not (tmp_path / "etc/fleet-portknock").exists()


def test_new_secrets_of_an_opener_are_tried_out_and_go_back(switch: Switch) -> None:
    host, wanted = switch.host(OpenedByDaemon), switch.wanted(OpenedByDaemon)
    apply(host, wanted)
    confirm(host, wanted)
    before = switch.state()
    apply(host, wanted._replace(texts={**wanted.texts, "opener_conf": "another secret\n"}))
    assert switch.state()[2] == {SERVICE, OPENER_ON_TRIAL}
    host.trial.restore("aa")
    assert switch.state() == before


def test_an_opener_that_stays_as_it_is_goes_on(switch: Switch) -> None:
    host, wanted = switch.host(OpenedByDaemon), switch.wanted(OpenedByDaemon)
    apply(host, wanted)
    confirm(host, wanted)
    newer = wanted._replace(texts={**wanted.texts, "gate": "another gate\n"})
    apply(host, newer)
    assert switch.state()[2] == {SERVICE, OPENER}
    confirm(host, newer)
    assert whats(host, newer) == []


def test_an_opener_that_does_not_start_is_no_gate(switch: Switch, systemd: Systemd) -> None:
    host, wanted = switch.host(OpenedByDaemon), switch.wanted(OpenedByDaemon)
    systemd.starts = 1
    with pytest.raises(PortknockError, match="can't be started"):
        apply(host, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whoever_is_asked_takes_another_s_gate_away(switch: Switch, tmp_path: Path, backend: type[FileBackend]) -> None:
    host = switch.host(backend)
    apply(host, switch.wanted(backend))
    confirm(host, switch.wanted(backend))
    asked = switch.host(OfAnotherKernel if backend is FileBackend else FileBackend)
    with asked.trial.turn("bb"):
        asked.take_away(asked.inspect(), "bb", 3600)
        assert asked.confirm_away("bb") == [f"{backend.name} was here"]
    assert switch.state() == ({}, "", frozenset())
    assert list(tmp_path.rglob("*.service.d")) == []
