# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host's side of a commit-confirmed change, whatever it changes: one call a phase, asked for by an action plugin."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

from ansible_collections.fleet.portknock.plugins.module_utils._trial import Trial

PHASES = ("compare", "apply", "confirm", "rollback")


class Difference(NamedTuple):
    """One thing that is not as it is wanted; the texts are masked and may be shown."""

    what: str
    before: str
    after: str


class Change:
    """What a run wants to be different on a host.

    Every method but :meth:`preview` is called with the trial's lock held, :meth:`outcome` without it.
    """

    def preview(self) -> dict[str, Any]:
        """What would change, for check mode: nothing is written."""
        return self.plan()

    def plan(self) -> dict[str, Any]:
        """What would change, as a task's result (see :func:`planned`)."""
        raise NotImplementedError

    def settled(self) -> Optional[dict[str, Any]]:
        """There is nothing to change; returns what is to stand in the result besides."""
        raise NotImplementedError

    def begin(self) -> dict[str, Any]:
        """Arm the way back and put the change that :meth:`plan` found on trial.

        :returns: what whoever proves it has to know.
        """
        raise NotImplementedError

    def confirm(self) -> Optional[dict[str, Any]]:
        """Make it the state that a reboot brings back, and disarm; returns what is to stand in the result besides."""
        raise NotImplementedError

    def outcome(self) -> Optional[str]:
        """What became of it: ``confirmed`` or ``restored``; None while it is still on trial."""
        raise NotImplementedError


def run_change(phase: str, change: Change, trial: Trial, run: str, check_mode: bool) -> dict[str, Any]:
    """Do one phase: see what would change, begin a trial, confirm it or go back.

    :param run: the run's id: hexadecimal digits.
    :returns: the module's result.
    :raises PortknockError: with nothing changed, or with the way back armed.
    """
    if phase == "rollback":
        trial.restore(run)
        return {"changed": False, "outcome": change.outcome()}
    if phase == "confirm":
        with trial.turn(run):
            return {"changed": True, **(change.confirm() or {})}
    if check_mode:
        return change.preview()
    # ssh repeats a command whose connection was cut: what the first one did is undone.
    trial.restore(run)
    try:
        with trial.turn(run):
            result = change.plan()
            if not result["changed"]:
                result.update(change.settled() or {})
            elif phase == "apply":
                result.update(change.begin(), on_trial=True)
            return result
    except BaseException:
        # Whatever went wrong after the way back was armed, it need not wait for the timer.
        trial.restore(run)
        raise


def planned(differences: list[Difference]) -> dict[str, Any]:
    """Differences as a task's result."""
    return {
        "changed": bool(differences),
        "reasons": [difference.what for difference in differences],
        "diff": [
            {"before_header": item.what, "after_header": item.what, "before": item.before, "after": item.after}
            for item in differences
        ],
    }


__all__ = ("PHASES", "Change", "Difference", "planned", "run_change")
