"""Machines as the API shows them, made once for each change: a list of a thousand costs few ms, not 25.

Called by machines.py alone. Tested by tests/unit/api/test_machine_cache.py.
"""

from __future__ import annotations

from collections.abc import Callable

from flyd.api import machine_views as views
from flyd.api.machine_lists import Entry
from flyd.v1 import machines_pb2 as pb

MAX_KEPT = 20_000
"""Views (about 1 KB each); with more machines than that they are made anew each time."""


class ShownMachines:
    """What was shown of each claim, for as long as neither it nor its status nor its host's life changes."""

    def __init__(self, alive: Callable[[str], bool]) -> None:
        self._alive = alive
        self._shown: dict[str, tuple[tuple[int, int, bool], pb.Machine]] = {}

    def show(self, entry: Entry) -> pb.Machine:
        """The machine; to be read only."""
        claim, status = entry
        alive = self._alive(claim.value.host)
        mark = (claim.mod_revision, status.mod_revision if status is not None else 0, alive)
        held = self._shown.get(claim.key)
        if held is None or held[0] != mark:
            held = mark, views.machine(claim.value, status.value if status else None, alive)
            if len(self._shown) >= MAX_KEPT:
                self._shown.clear()  # also what was kept of machines that are gone
            self._shown[claim.key] = held
        return held[1]
