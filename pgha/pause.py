"""A person's pause: what a decision is worth while there is one. Pure; called by pgha/decide.py."""

from __future__ import annotations

from pgha.model import Action, Decision, View

HELD_BACK = (Action.DOUBT, Action.VOTE, Action.TAKE_OVER, Action.COPY, Action.REWIND, Action.RECONFIGURE)


def held_back(view: View, decision: Decision) -> Decision:
    """While a person has paused the cluster nothing moves the primary or replaces data.

    What ends an old primary goes on, and so does getting up as a replica: neither may wait for a person.
    """
    if view.pause is None or decision.action not in HELD_BACK:
        return decision
    return Decision(rule="paused", detail=f"held back: {decision.action}, for {decision.rule}")
