# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The watch's own decisions, and what it reads in the kernel's messages; the rest needs a kernel and is Molecule's."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils._backend_nftables import Nftables
from ansible_collections.fleet.portknock.plugins.module_utils._host import RUN_FOLDER
from ansible_collections.fleet.portknock.plugins.module_utils._nft import TABLE
from ansible_collections.fleet.portknock.plugins.module_utils._system import SEARCH_PATH

ROOT = Path(__file__).resolve().parents[3]
SOURCE = ROOT / "roles/knock_server/templates/nftables/watch.py"

# What kernel 6.18 told when nft 1.0.6 flushed a ruleset of the tables `inet fleet_portknock`, with one set, and `ip other`.
FLUSH = bytes.fromhex(
    "3c0000000b0a000001000000c25b00000100000314000100666c6565745f706f72746b6e6f636b0006000200730000000c0010000000000000000002"
    "3c000000050a000001000000c25b00000100000314000100666c6565745f706f72746b6e6f636b0006000300630000000c0002000000000000000001"
    "3c000000020a000001000000c25b00000100000314000100666c6565745f706f72746b6e6f636b0008000300000000000c0004000000000000000001"
    "34000000020a000001000000c25b0000020000030a0001006f7468657200000008000300000000000c0004000000000000000002"
)
OF_ANOTHER_TABLE = FLUSH[-52:]
# The end of what it told of that transaction.
GENERATION = bytes.fromhex("2c0000000f0a000001000000c25b00000000000308000100000000030800020000005bc2080003006e667400")


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    specification = importlib.util.spec_from_file_location("watch", SOURCE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "watch", module)
    specification.loader.exec_module(module)
    (tmp_path / "trial").mkdir()
    (tmp_path / "gate.rules").touch()
    monkeypatch.setattr(module, "GATE", str(tmp_path / "gate.rules"))
    monkeypatch.setattr(module, "LOCK", str(tmp_path / "lock"))
    monkeypatch.setattr(module, "TRIAL", str(tmp_path / "trial"))
    return module


class Programs:
    """nft, the loader and the way back, as far as the watch sees them."""

    def __init__(self, loads: bool = True, says: bool = True) -> None:
        self.loaded = False
        self.loads = loads
        self.says = says
        self.ran: list[str] = []

    def __call__(self, *argv: str) -> subprocess.CompletedProcess[str] | None:
        if argv[0] == "nft":
            tables = "table inet fleet_portknock\n" if self.loaded else "table inet fleet_portknock_of_others\n"
            return subprocess.CompletedProcess(argv, 0, tables, "") if self.says else None
        self.ran.append(Path(argv[1]).name)
        self.loaded = self.loads
        return subprocess.CompletedProcess(argv, 0 if self.loads else 1, "", "")


def test_a_flush_is_told_from_other_changes(watch: ModuleType) -> None:
    assert watch.read_change(FLUSH) == (True, None)
    assert watch.read_change(OF_ANOTHER_TABLE) == (False, None)
    assert watch.read_change(GENERATION) == (False, "nft (process 23490)")
    assert watch.read_change(FLUSH + GENERATION) == (True, "nft (process 23490)")


@pytest.mark.parametrize("length", [0, 7, 19, 60, 100])
def test_a_message_that_is_cut_off_is_no_error(watch: ModuleType, length: int) -> None:
    assert watch.read_change(FLUSH[:length]).took_away is False


def run(watch: ModuleType, monkeypatch: pytest.MonkeyPatch, programs: Programs) -> bool:
    monkeypatch.setattr(watch, "_run", programs)
    well: bool = watch.bring_back("It went")
    return well


def test_a_gate_that_went_is_loaded(
    watch: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = Programs()
    assert run(watch, monkeypatch, programs)
    assert programs.ran == ["load.sh"]
    assert capsys.readouterr().err.startswith("<2>It went: it was loaded again within ")


def test_a_gate_that_is_there_is_left_alone(
    watch: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = Programs()
    programs.loaded = True
    assert run(watch, monkeypatch, programs)
    assert programs.ran == []
    assert capsys.readouterr().err == ""


def test_a_gate_that_was_never_confirmed_is_none_of_its_business(
    watch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gate.rules").unlink()
    programs = Programs()
    assert run(watch, monkeypatch, programs)
    assert programs.ran == []


@pytest.mark.parametrize(
    ("kind", "ran"), [("applied", ["restore-aa.sh"]), ("absent", []), ("moved", []), ("sshd", ["load.sh"])]
)
def test_what_is_on_trial_decides(
    watch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, ran: list[str]
) -> None:
    (tmp_path / "trial/run").write_text("aa")
    (tmp_path / "trial/kind").write_text(kind)
    programs = Programs()
    assert run(watch, monkeypatch, programs)
    assert programs.ran == ran


@pytest.mark.parametrize("programs", [Programs(loads=False), Programs(says=False)])
def test_what_did_not_work_is_tried_again(
    watch: ModuleType, monkeypatch: pytest.MonkeyPatch, programs: Programs
) -> None:
    assert not run(watch, monkeypatch, programs)


def test_a_run_that_holds_the_lock_for_long_does_not_keep_the_gate_away(
    watch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(watch, "LOCK_SECONDS", 0.05)
    with subprocess.Popen(
        ["flock", str(tmp_path / "lock"), "-c", "echo held; read end"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        programs = Programs()
        assert run(watch, monkeypatch, programs)
        holder.stdin.write("\n")
    assert programs.ran == ["load.sh"]


def test_names_are_those_of_the_collection(watch: ModuleType) -> None:
    """The watch runs where the collection is not, so it has them a second time."""
    pristine = SOURCE.read_text()
    assert f'GATE = "{Nftables.files["gate"].path}"' in pristine
    assert f'LOADER = "{Nftables.files["load"].path}"' in pristine
    assert f'STOCK = "{Nftables.files["stock"].path}"' in pristine
    assert f'LOCK = "{RUN_FOLDER}/lock"' in pristine
    assert f'TRIAL = "{RUN_FOLDER}/trial"' in pristine
    assert f'TABLE = "{TABLE}"' in pristine
    assert f'SEARCH_PATH = "{SEARCH_PATH}"' in pristine


class Stock:
    """The kernel's count of what has opened, and the program that arms, as far as the watch sees them."""

    def __init__(self, watch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.burnt: int | None = 0
        self.code = 0
        self.asked: list[str] = []
        monkeypatch.setattr(watch, "count_burnt", lambda: self.burnt)
        monkeypatch.setattr(watch, "_run", self._run)

    def _run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        self.asked.append(argv[-1])
        return subprocess.CompletedProcess(argv, self.code, "", "<2>No space.\n" if self.code else "")


def test_what_has_opened_is_made_up_for(
    watch: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stock, one_time = Stock(watch, monkeypatch), watch.OneTime()
    assert one_time.look() == watch.ONE_TIME_SECONDS
    assert one_time.look() == watch.ONE_TIME_SECONDS
    assert stock.asked == ["arm"]
    stock.burnt = 1
    one_time.look()
    one_time.look()
    assert stock.asked == ["arm", "arm"]
    one_time.look("renew")
    assert stock.asked == ["arm", "arm", "renew"]
    assert capsys.readouterr().err == ""


def test_a_gate_without_one_time_sequences_is_not_asked_again(
    watch: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, one_time = Stock(watch, monkeypatch), watch.OneTime()
    stock.burnt = None
    assert one_time.look() is None
    assert one_time.look("renew") is None
    assert stock.asked == []
    # A gate that has them comes as a change, which the kernel tells.
    stock.burnt = 0
    assert one_time.look() == watch.ONE_TIME_SECONDS
    assert stock.asked == ["arm"]


def test_what_can_t_be_armed_is_tried_again_and_told_once(
    watch: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stock, one_time = Stock(watch, monkeypatch), watch.OneTime()
    stock.code = 1
    assert one_time.look() == watch.ONE_TIME_RETRY_SECONDS
    assert one_time.look() == watch.ONE_TIME_RETRY_SECONDS
    assert stock.asked == ["arm", "arm"]
    assert capsys.readouterr().err == "<2>No space.\n"
    stock.code = 0
    assert one_time.look() == watch.ONE_TIME_SECONDS
    assert one_time.look() == watch.ONE_TIME_SECONDS
    assert stock.asked == ["arm"] * 3
