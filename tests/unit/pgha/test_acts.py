"""What was decided on one view of etcd is not done to a newer one."""

from __future__ import annotations

from typing import Any, cast

from flyd.model import PostgresLeader, decode, encode
from flyd.store.memory import MemoryEtcd, MemoryKV
from pgha import keys
from pgha.acts import Acts
from pgha.journal import Journal
from pgha.membership import retargeted, settled
from pgha.model import Action, AgentConfig, Decision, Membership, View
from pgha.observe import ClusterRecords
from pgha.term import Term
from tests.support.pgha_views import LEADING, NODES, but, leader
from tests.support.placing import FixedClock

CONFIG = AgentConfig(cluster="db", node="a", voters=NODES, region="r", address="a:1")
RECORD = Membership(quorum=settled(NODES), target=NODES)


class Unarmed:
    """ports.Killer."""

    def arm(self, deadline_s: float) -> None:
        """Nothing."""


class Scene:
    """a leads epoch 4 and decides something; then b takes over, and a hears of it before it acts."""

    def __init__(self) -> None:
        self.kv = MemoryKV(MemoryEtcd())
        self.clock = clock = cast(Any, FixedClock())
        records = ClusterRecords("db", self.kv, clock)
        self.term = Term("db", "a", self.kv, clock, Unarmed())
        journal = Journal("db", "a", self.kv, clock)
        nothing = cast(Any, None)
        self.acts = Acts(CONFIG, self.kv, nothing, clock, records, self.term, journal, nothing)
        self.records = records

    async def begin(self) -> View:
        seen = await self.kv.put(keys.postgres_leader("db"), encode(leader("a")))
        record = await self.kv.put(keys.membership("db"), encode(RECORD))
        self.term.begin(4, 1, self.clock.monotonic_s())
        view = but(LEADING, leader_revision=seen, membership_revision=record, membership=RECORD)
        await self.kv.put(keys.postgres_leader("db"), encode(leader("b", 5)))
        await self.records.refresh()
        return view


async def test_a_switchover_decided_before_somebody_took_over_writes_no_old_leader_back() -> None:
    scene = Scene()
    await scene.acts.hand_over(await scene.begin(), "b", 1.0)
    item = await scene.kv.get(keys.postgres_leader("db"))
    assert item is not None
    assert decode(item.value, PostgresLeader) == leader("b", 5)


async def test_nor_does_it_change_the_members_but_by_what_is_so_now() -> None:
    scene = Scene()
    view = await scene.begin()
    assert scene.term.valid()
    step = retargeted(RECORD, NODES[:2])
    await scene.acts.do(view, Decision(rule="r", action=Action.RECONFIGURE, membership=step))
    item = await scene.kv.get(keys.membership("db"))
    assert item is not None
    assert decode(item.value, Membership) == RECORD
    now = but(view, leader_revision=scene.records.mod_revision(keys.postgres_leader("db")))
    await scene.acts.do(now, Decision(rule="r", action=Action.RECONFIGURE, membership=step))
    item = await scene.kv.get(keys.membership("db"))
    assert item is not None
    assert decode(item.value, Membership) == step
