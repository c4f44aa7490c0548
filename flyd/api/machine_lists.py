"""Which machines a list shows, page by page, and what a watch tells. Pure."""

from __future__ import annotations

import base64
import binascii
from bisect import bisect_right
from collections.abc import Mapping, Sequence

from flyd.errors import InvalidInput
from flyd.model import Machine, MachineState, MachineStatus, Value
from flyd.store.mirror import Versioned

MAX_PAGE = 1000

Entry = tuple[Versioned[Machine], Versioned[MachineStatus] | None]


class Filter(Value, frozen=True, kw_only=True):
    """What a machine must be to be listed; empty: anything."""

    region: str = ""
    state: str = ""
    metadata: dict[str, str] = {}

    def shows(self, machine: Machine, status: MachineStatus | None) -> bool:
        """Whether the machine is listed. One without a status is `created`."""
        state = status.state if status is not None else MachineState.CREATED
        return (
            self.region in ("", machine.region)
            and self.state in ("", state.value)
            and all(machine.config.metadata.get(k) == v for k, v in self.metadata.items())
        )


def checked_state(state: str) -> str:
    """The name of a state; InvalidInput if there is none such."""
    if state and state not in set(MachineState):
        states = ", ".join(MachineState)
        raise InvalidInput(f"no state is called {state[:80]!r}", hint=f"States: {states}.")
    return state


def page(entries: Sequence[Entry], size: int, token: str) -> tuple[Sequence[Entry], str]:
    """The page after `token`, and the token of the next one; size 0: all. Entries are in key order."""
    if not 0 <= size <= MAX_PAGE:
        raise InvalidInput(f"a page can not have {size} machines: 1 to {MAX_PAGE}, or 0 for all")
    after = _key_of(token)
    start = bisect_right(entries, after, key=lambda entry: entry[0].key) if after else 0
    shown = entries[start : start + size] if size else entries[start:]
    more = start + len(shown) < len(entries)
    return shown, _token_of(shown[-1][0].key) if more and shown else ""


def _token_of(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode()).decode()


def _key_of(token: str) -> str:
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidInput(
            "the page_token is not one that flyd gave", hint="Begin again without one."
        ) from None


Seen = dict[str, tuple[int, int]]  # key of a claim -> revisions of claim and status


def revisions(entries: Sequence[Entry]) -> Seen:
    """What a watcher has seen once these entries were told."""
    return {m.key: (m.mod_revision, s.mod_revision if s else 0) for m, s in entries}


def news(entries: Sequence[Entry], seen: Mapping[str, tuple[int, int]]) -> tuple[list[Entry], list[str]]:
    """The entries that are new or changed since `seen`, and the ids of machines that are gone."""
    now = revisions(entries)
    changed = [entry for entry in entries if seen.get(entry[0].key) != now[entry[0].key]]
    gone = [key.rpartition("/")[2] for key in seen if key not in now]
    return changed, gone
