"""A person holds back all that a cluster does by itself."""

from __future__ import annotations

import pytest

from flyd.errors import Conflict, NotFound
from flyd.model import encode
from flyd.ports import Put
from pgha import keys
from pgha.decide import decide
from pgha.model import Action, Data, Lease, Pause, Status, View
from pgha.pause import HELD_BACK
from pgha.requests import paused, request_pause, request_resume, request_switchover
from tests.simulation.loop import run
from tests.simulation.network import Network, SimulatedKV, Store
from tests.support.pgha_views import CALM, EMPTY, FENCED, LEADING, NOW, PROMISED, ROUND, but, leader, vote

ELECTED = but(ROUND, votes=(vote("b"), vote("c")))


@pytest.mark.parametrize(
    ("view", "me"),
    [
        (ROUND, "b"),
        (ELECTED, "b"),
        (but(CALM, lease=Lease(epoch=4, node="a", released=True), data=PROMISED), "b"),
        (EMPTY, "b"),
    ],
)
def test_what_moves_the_primary_or_replaces_data_is_held_back(view: View, me: str) -> None:
    assert decide(view, me, NOW).action in HELD_BACK
    assert decide(but(view, pause=Pause()), me, NOW).rule == "paused"
    assert decide(but(view, pause=Pause()), me, NOW).action is Action.WAIT


@pytest.mark.parametrize(
    ("view", "action"),
    [
        (but(LEADING, leader=leader("b", 5)), Action.DEMOTE),
        (but(CALM, status=Status(), data=Data(state=CALM.data.state, system_id="7")), Action.START),
        (but(CALM, status=FENCED), Action.FOLLOW),
    ],
)
def test_what_ends_an_old_primary_or_gets_a_replica_up_is_not(view: View, action: Action) -> None:
    me = "a" if action is Action.DEMOTE else "b"
    assert decide(but(view, pause=Pause()), me, NOW).action is action


def test_a_pause_and_a_switchover_exclude_each_other() -> None:
    async def main() -> None:
        store = Store()
        kv = SimulatedKV(Network(), store, "host")
        with pytest.raises(NotFound):
            await request_pause(kv, "db", "", 1.0)
        store.txn((), (Put(keys.postgres_leader("db"), encode(leader("a"))),))
        first = await request_pause(kv, "db", "new disks", 1.0)
        assert await request_pause(kv, "db", "other", 2.0) == first
        assert await paused(kv, "db") == first
        with pytest.raises(Conflict, match="paused"):
            await request_switchover(kv, "db", "", 3.0)
        await request_resume(kv, "db")
        assert await paused(kv, "db") is None
        await request_switchover(kv, "db", "", 3.0)
        with pytest.raises(Conflict, match="under way"):
            await request_pause(kv, "db", "", 4.0)

    run(1, main)
