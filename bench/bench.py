# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What site.yml and rotate.yml cost, as a ratio to the least that Ansible itself costs on the same hosts in the same minutes.

The floor is a play that gathers facts and pings, with the connection settings of site.yml. Every measured run begins
without an ssh master, as a scheduled run does; floor and run alternate, so that a busy machine slows both. site.yml is
measured without sshd_hardening, whose call is not the gate's; rotate.yml rotates all hosts at once, as the floor asks all at
once. Asserts nothing: the numbers are for people.

Usage: bench.py [REPETITIONS]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLEET = ROOT / ".cache" / "fleet" / "bench"
FLEET_SCRIPT = ROOT / "scripts" / "fleet.py"
HOSTS = ("web1=debian11", "web2=debian12", "web3=debian13")
MANY_HOSTS = tuple(f"web{number}=debian12" for number in range(1, 21))
REPETITIONS = 5
SECOND_RUNS = 2
ROTATIONS = 2
SITE = ("fleet.portknock.site", "--extra-vars", "sshd_hardening_enabled=false")
ROTATE = ("fleet.portknock.rotate", "--extra-vars", "portknock_hosts=all portknock_serial=100%")
FLOOR = """\
---
- name: The least that a play costs
  hosts: all
  connection: fleet.portknock.knock_ssh
  gather_facts: true
  become: true
  tasks:
    - name: Answer
      ansible.builtin.ping:
"""
WANTED = {"first run": 3.0, "second run": 1.3, "rotation": 3.0}
FLOOR_OF = {
    "first run": "floor, no gate yet",
    "second run": "floor, through the gate",
    "rotation": "floor, between rotations",
}


def play(playbook: str, *arguments: str) -> float:
    """Seconds of one ansible-playbook that starts without an ssh master."""
    with tempfile.TemporaryDirectory(prefix="portknock-") as control:
        environment = {
            **os.environ,
            "ANSIBLE_CONFIG": str(FLEET / "ansible.cfg"),
            "ANSIBLE_HOME": str(ROOT / ".cache" / "ansible"),
            "ANSIBLE_SSH_CONTROL_PATH_DIR": control,
        }
        start = time.perf_counter()
        done = subprocess.run(
            ["ansible-playbook", playbook, *arguments],
            cwd=FLEET,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{playbook} failed:\n{done.stdout}{done.stderr}")
    return seconds


def fleet(*arguments: str) -> None:
    subprocess.run([sys.executable, str(FLEET_SCRIPT), *arguments], check=True)


def say(text: str) -> None:
    """With what else the machine does: the load average of the last minute."""
    print(f"{text} (load {os.getloadavg()[0]:.1f})", flush=True)


def measure(repetitions: int) -> dict[str, list[float]]:
    """Seconds of each run, on few hosts."""
    times: dict[str, list[float]] = {name: [] for kind in WANTED for name in (FLOOR_OF[kind], kind)}
    for repetition in range(repetitions):
        say(f"{len(HOSTS)} hosts, repetition {repetition + 1} of {repetitions}")
        fleet("up", "bench", *HOSTS)
        (FLEET / "floor.yml").write_text(FLOOR)
        # Not counted: it fills the new containers' caches.
        play("floor.yml")
        times[FLOOR_OF["first run"]].append(play("floor.yml"))
        times["first run"].append(play(*SITE))
        for _ in range(SECOND_RUNS):
            times[FLOOR_OF["second run"]].append(play("floor.yml"))
            times["second run"].append(play(*SITE))
        for _ in range(ROTATIONS):
            measure_rotation(times)
    return times


def measure_many(repetitions: int) -> dict[str, list[float]]:
    """Seconds of each rotation, on many hosts."""
    times: dict[str, list[float]] = {FLOOR_OF["rotation"]: [], "rotation": []}
    fleet("up", "bench", *MANY_HOSTS)
    (FLEET / "floor.yml").write_text(FLOOR)
    play(*SITE)
    for repetition in range(repetitions):
        say(f"{len(MANY_HOSTS)} hosts, repetition {repetition + 1} of {repetitions}")
        measure_rotation(times)
    return times


def measure_rotation(times: dict[str, list[float]]) -> None:
    times[FLOOR_OF["rotation"]].append(play("floor.yml"))
    times["rotation"].append(play(*ROTATE))


def show(hosts: int, times: dict[str, list[float]]) -> None:
    print(f"\n{f'{hosts} hosts':24} median   fastest    slowest  ratio of medians")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        line = f"{name:24} {median:6.2f} s  {min(seconds):6.2f} s  {max(seconds):6.2f} s"
        if name in WANTED:
            line += f"  {median / statistics.median(times[FLOOR_OF[name]]):.2f}  (wanted: at most {WANTED[name]:g})"
        print(line)


def main(arguments: list[str]) -> int:
    repetitions = int(arguments[0]) if arguments else REPETITIONS
    try:
        few, many = measure(repetitions), measure_many(repetitions)
    finally:
        fleet("down", "bench")
    show(len(HOSTS), few)
    show(len(MANY_HOSTS), many)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
