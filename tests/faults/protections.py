# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The collection without one of its protections, to see that each fault could do harm.

The product has no switch for this: a copy of it is made in which texts are replaced. Each must be there exactly once, so that
none of these can become stale unnoticed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from hosts import Step
from lab import ROOT

_PARTS = ("plugins", "roles", "playbooks", "meta", "galaxy.yml")
_TRIAL = "plugins/module_utils/_trial.py"
_HOST = "plugins/module_utils/_host.py"
_NFTABLES = "plugins/module_utils/_backend_nftables.py"
_ROTATION = "plugins/module_utils/_rotation.py"
_SYSTEM = "plugins/module_utils/_system.py"
_CONTROLLERS_KEYRING = "plugins/plugin_utils/_keyring.py"
_TEMPLATES = "roles/knock_server/templates/nftables"


class Cut(NamedTuple):
    """One text of one file, and what takes its place."""

    file: str
    text: str
    instead: str = ""


class Protection(NamedTuple):
    """What keeps a fault from doing harm, and how to take it out.

    ``fault`` names the fault that then does harm, at this step of this kind of play.
    """

    name: str
    fault: str
    kind: str
    step: Step
    cuts: tuple[Cut, ...]


# Armed for long after the test, so that the calls stay the same.
_NO_TIMER = (Cut(_TRIAL, "armed = self._arm(run, seconds)\n", "armed = self._arm(run, 86400)\n"),)

PROTECTIONS: tuple[Protection, ...] = (
    Protection("the timer", "controller killed", "broken", Step("after apply"), _NO_TIMER),
    Protection("the timer", "process on the host killed", "broken", Step("apply", "nft -j list", 2), _NO_TIMER),
    Protection("the timer", "network cut", "broken", Step("after apply"), _NO_TIMER),
    Protection(
        "kept only when confirmed",
        "host restarted",
        "broken",
        Step("after apply"),
        (
            Cut(
                _HOST,
                """\
        write_text(self.trial.path("loaded"), _as_text(self._digests()), 0o600)
""",
                """\
        write_text(self.trial.path("loaded"), _as_text(self._digests()), 0o600)
        write_text(self._gate, self._boot_text(wanted, self._digests(), run, {}), 0o600)
""",
            ),
        ),
    ),
    Protection(
        "one transaction",
        "nft fails",
        "change",
        Step("apply", "nft -f"),
        (
            Cut(
                _NFTABLES,
                'done = self._run([self.program, "-f", "-"], replace_transaction(text, listing))',
                'self._run(["/usr/sbin/nft", "-f", "-"], _FRESH_TABLE)\n'
                # Long enough for whoever looks from outside on a busy machine.
                '            self._run(["sleep", "1"], None)\n'
                '            done = self._run([self.program, "-f", "-"], text)',
            ),
        ),
    ),
    Protection(
        "what fails stops the confirmation",
        "systemctl fails, later flushed",
        "first",
        Step("confirm", "systemctl restart"),
        (
            Cut(
                _HOST,
                '        if done.code != 0:\n            raise PortknockError(f"systemctl',
                '        if False:\n            raise PortknockError(f"systemctl',
            ),
        ),
    ),
    Protection(
        "a process in place of the timer",
        "systemd-run fails, controller killed",
        "broken",
        Step("apply", "systemd-run"),
        (Cut(_TRIAL, "        if armed.code == 0:\n            return timer, None\n", "        return timer, None\n"),),
    ),
    Protection(
        "the way back is written first",
        "disk full: /run",
        "broken",
        Step("apply", "nft -c -f"),
        (
            Cut(
                _TRIAL,
                "        except BaseException as exc:\n            self._disarm(armed)\n",
                "        except BaseException as exc:\n            self._disarm(armed)\n            return\n",
            ),
            # It fails, too, where the disk is full, and nothing is loaded then.
            Cut(
                _HOST,
                '        write_text(self.trial.path("names"), _as_text(_names(found.state, wanted)), 0o600)\n',
                "",
            ),
        ),
    ),
    Protection(
        "files replaced as a whole",
        "disk full: /etc/fleet-portknock",
        "change",
        Step("confirm", "nft --version"),
        (Cut(_SYSTEM, "    temporary = temporary_path(path)\n", "    temporary = path\n"),),
    ),
    Protection(
        "entries of other keyrings are refused",
        "foreign sequence planted",
        "change",
        Step("look", "nft -j list"),
        (Cut(_CONTROLLERS_KEYRING, "        if kept.keyring_id != keyring_id:\n", "        if False:\n"),),
    ),
    Protection(
        "secrets of one generation are compared",
        "wrong sequence planted",
        "change",
        Step("look", "nft -j list"),
        (
            Cut(
                "plugins/module_utils/_keyring.py",
                "    if state is not None and state.contradicts(entry):\n",
                "    if False:\n",
            ),
        ),
    ),
    Protection(
        "the monotonic clock",
        "clock stepped, controller killed",
        "broken",
        Step("after apply"),
        (
            Cut(
                _TRIAL,
                '                f"--on-active={seconds}",\n                "--timer-property=AccuracySec=100ms",\n',
            ),
            Cut(
                _TRIAL,
                "                command,\n",
                '                f"until [ $(date +%s) -ge {int(time.time()) + seconds} ]; do sleep 0.2; done; "\n'
                "                + command,\n",
            ),
        ),
    ),
    Protection(
        "the lock",
        "second run",
        "change",
        Step("confirm", "nft --version"),
        (
            Cut(_TRIAL, "                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"),
            Cut(
                _TRIAL,
                "                if pending is None or pending.run in (run, tried):\n",
                "                if pending is None or True:\n",
            ),
        ),
    ),
    Protection(
        "the watcher",
        "flushed by a stranger",
        "change",
        Step("after confirm"),
        (Cut(f"{_TEMPLATES}/watch.py", "        if reason or not is_well:\n", "        if not is_well:\n"),),
    ),
    Protection(
        "the watcher is started again",
        "daemon killed, then flushed",
        "change",
        Step("after confirm"),
        (
            Cut(
                "roles/knock_server/templates/common/fleet-portknock-watch.service.j2",
                "Restart=always\n",
                "Restart=no\n",
            ),
        ),
    ),
    Protection(
        "a rotation keeps both",
        "controller killed",
        "rotate",
        Step("former retired"),
        (
            Cut(
                _ROTATION,
                "replace(operator, next=new.make().with_spa(spa, gnupg), both=True, both_since=None)",
                "replace(operator, current=new.make().with_spa(spa, gnupg))",
            ),
        ),
    ),
    Protection(
        "nothing is retired before both open",
        "controller killed",
        "rotate",
        Step("former retired"),
        (
            Cut(
                "roles/knock_server/tasks/rotate.yml",
                "    - name: Let them open beside the former ones\n      ansible.builtin.import_tasks: gate.yml\n",
            ),
            Cut(
                _ROTATION,
                """\
        if operator.both_since is None:
            done[name] = UNPROVED
            continue
        end = seconds_since_1970(operator.both_since) + grace
""",
                "        end = 0\n",
            ),
        ),
    ),
)


def without(protection: Protection, folder: Path) -> Path:
    """Make a copy of the collection that lacks a protection.

    :returns: what ANSIBLE_COLLECTIONS_PATH has to be.
    """
    collection = folder / "ansible_collections/fleet/portknock"
    shutil.rmtree(folder, ignore_errors=True)
    collection.mkdir(parents=True)
    for part in _PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, collection / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, collection / part)
    for cut in protection.cuts:
        path = collection / cut.file
        text = path.read_text()
        if text.count(cut.text) != 1:
            raise SystemExit(
                f"{cut.file} has changed: what `{protection.name}` takes out is there {text.count(cut.text)} times"
            )
        path.write_text(text.replace(cut.text, cut.instead))
    return folder
