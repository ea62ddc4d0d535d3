# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The commit-confirmed mechanism with real shells, real locks and a timer that really fires."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Optional

import pytest
from ansible_collections.fleet.portknock.plugins.module_utils import _trial
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._system import Completed, run
from ansible_collections.fleet.portknock.plugins.module_utils._trial import Trial

LONG = 3600


def without_systemd(argv: Sequence[str], stdin: Optional[str] = None) -> Completed:
    """Programs as they are, but no systemd answers: the timer is a process of its own."""
    if argv[0] in ("systemd-run", "systemctl"):
        return Completed(1, "", "")
    return run(argv, stdin)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Trial]:
    trial = Trial(str(tmp_path / "run"), without_systemd)
    yield trial
    with trial.lock():
        trial.end()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.write_text("former")
    return path


def begin(trial: Trial, state: Path, name: str = "aa", seconds: int = LONG) -> None:
    with trial.lock():
        trial.begin(
            name,
            seconds,
            load=f"cp {trial.path('former')} {state}",
            files="true",
            committed=f"[ -e {state}.committed ]",
            finish=f"touch {state}.finished",
            texts={"former": "former"},
        )
    state.write_text("changed")


def test_unconfirmed_change_is_undone_by_the_timer(trial: Trial, state: Path) -> None:
    begin(trial, state, seconds=1)
    until(lambda: trial.pending() is None)
    assert state.read_text() == "former"


def test_timer_survives_whoever_armed_it(tmp_path: Path, state: Path) -> None:
    folder = tmp_path / "run"
    pid = os.fork()
    if pid == 0:
        os.setsid()
        begin(Trial(str(folder), without_systemd), state, seconds=1)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert state.read_text() == "changed"
    until(lambda: state.read_text() == "former")
    until(lambda: Trial(str(folder), without_systemd).pending() is None)


def test_committed_change_stays_and_is_finished_when_the_timer_fires(trial: Trial, state: Path) -> None:
    begin(trial, state, seconds=1)
    Path(f"{state}.committed").touch()
    until(lambda: trial.pending() is None)
    assert state.read_text() == "changed"
    assert Path(f"{state}.finished").exists()


def test_ended_trial_leaves_no_timer_and_no_way_back(trial: Trial, state: Path) -> None:
    begin(trial, state)
    pid = int(Path(trial.path("pid")).read_text())
    with trial.lock():
        trial.end()
    assert trial.pending() is None
    assert not os.path.exists(trial.path("restore-aa.sh"))
    until(lambda: _has_ended(pid))
    assert state.read_text() == "changed"


def _has_ended(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def test_restore_goes_back_at_once(trial: Trial, state: Path) -> None:
    begin(trial, state)
    trial.restore("aa")
    assert state.read_text() == "former"
    assert trial.pending() is None


def test_restore_is_tried_until_it_succeeds(trial: Trial, state: Path, tmp_path: Path) -> None:
    tried = tmp_path / "tried"
    with trial.lock():
        # Fails the first time: the way back must not depend on one call of a program.
        load = f"if [ -e {tried} ]; then cp {trial.path('former')} {state}; else touch {tried}; false; fi"
        trial.begin("aa", LONG, load=load, files="true", committed="false", finish="true", texts={"former": "former"})
    state.write_text("changed")
    trial.restore("aa")
    assert state.read_text() == "former"


def test_script_of_an_earlier_run_leaves_a_later_trial_alone(trial: Trial, state: Path, tmp_path: Path) -> None:
    begin(trial, state, "aa")
    stale = tmp_path / "stale.sh"
    stale.write_text(Path(trial.path("restore-aa.sh")).read_text())
    with trial.lock():
        trial.end()
    begin(trial, state, "bb")
    subprocess.run(["sh", str(stale)], check=True)
    assert state.read_text() == "changed"
    pending = trial.pending()
    assert pending is not None
    assert pending.run == "bb"


def test_way_back_waits_for_a_confirmation_under_way(trial: Trial, state: Path) -> None:
    begin(trial, state, seconds=60)
    with trial.lock():
        script = subprocess.Popen(["sh", trial.path("restore-aa.sh")])
        with pytest.raises(subprocess.TimeoutExpired):
            script.wait(0.3)
        Path(f"{state}.committed").touch()
    assert script.wait(20) == 0
    assert state.read_text() == "changed"


def test_second_run_waits_until_the_first_ones_trial_has_ended(trial: Trial, state: Path) -> None:
    begin(trial, state, "aa", seconds=1)
    with trial.turn("bb"):
        assert state.read_text() == "former"
        assert trial.pending() is None


def test_second_run_does_the_work_of_a_timer_that_was_killed(
    trial: Trial, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(trial, state, "aa")
    Path(trial.path("deadline")).write_text("0")
    with trial.turn("bb"):
        assert state.read_text() == "former"


def test_what_can_not_go_back_is_taken_over(trial: Trial, state: Path) -> None:
    with trial.lock():
        trial.begin("aa", LONG, load="false", files="true", committed="false", finish="true", texts={})
    script = Path(trial.path("restore-aa.sh"))
    script.write_text(script.read_text().replace("-ge 20", "-ge 1"))
    Path(trial.path("deadline")).write_text("0")
    with trial.turn("bb"):
        trial.begin("bb", LONG, load="true", files="true", committed="false", finish="true", texts={})
    pending = trial.pending()
    assert pending is not None
    assert pending.run == "bb"


def test_another_runs_trial_is_not_ended(trial: Trial, state: Path) -> None:
    begin(trial, state, "aa")
    trial.restore("bb")
    assert state.read_text() == "changed"
    assert trial.pending() is not None


def test_confirmed_trial_stays_when_asked_to_go_back(trial: Trial, state: Path) -> None:
    begin(trial, state)
    Path(f"{state}.committed").touch()
    trial.restore("aa")
    assert trial.pending() is None
    assert state.read_text() == "changed"


def test_files_are_tried_again_without_loading_again(trial: Trial, state: Path, tmp_path: Path) -> None:
    loads, tried = tmp_path / "loads", tmp_path / "tried"
    with trial.lock():
        files = f"if [ -e {tried} ]; then true; else touch {tried}; false; fi"
        trial.begin("aa", LONG, load=f"echo x >>{loads}", files=files, committed="false", finish="true", texts={})
    trial.restore("aa")
    assert loads.read_text() == "x\n"


def test_lock_held_by_another_run_is_a_clear_error(trial: Trial) -> None:
    with trial.lock():
        pass
    path = f"{trial.folder}/lock"
    with open(path, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(PortknockError) as raised, trial.lock(wait=0.1):
            pass
    assert str(raised.value) == (
        f"Another run is changing this host: it has held {path} for more than 0 s. Try again when it has ended."
    )


def test_run_time_folder_is_roots_alone(trial: Trial, state: Path) -> None:
    begin(trial, state)
    assert os.stat(trial.folder).st_mode & 0o777 == 0o700
    assert os.stat(trial.path("former")).st_mode & 0o777 == 0o600


def test_nothing_is_armed_when_no_timer_can_be(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*_arguments: object, **_options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    trial = Trial(str(tmp_path / "run"), without_systemd)
    monkeypatch.setattr(subprocess, "Popen", no_process)
    with pytest.raises(PortknockError, match="so nothing was changed"), trial.lock():
        trial.begin("aa", LONG, load="true", files="true", committed="false", finish="true", texts={})
    assert trial.pending() is None


def test_nothing_is_left_by_a_run_that_dies_before_it_may_change_anything(
    trial: Trial, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = os.fork()
    if pid == 0:
        os.setsid()
        with trial.lock():
            # Dies where it would write the last file.
            monkeypatch.setattr(_trial, "_uptime", lambda: os.kill(os.getpid(), signal.SIGKILL))
            trial.begin("aa", 1, load="false", files="true", committed="false", finish="true", texts={"former": "x"})
    os.waitpid(pid, 0)
    assert os.path.exists(trial.path("former"))
    until(lambda: not os.path.exists(trial.path("")))
    assert state.read_text() == "former"


def test_confirmation_after_the_way_back_is_refused(trial: Trial, state: Path) -> None:
    begin(trial, state)
    trial.restore("aa")
    with pytest.raises(PortknockError, match="The trial has ended already"):
        trial.require("aa")
