"""What may be asked of a cluster's members, and what is refused; nothing is written then."""

from __future__ import annotations

import pytest

from flyd.errors import Conflict, FlydError, NotFound, Refused
from flyd.model import PostgresLeader, PostgresMember, encode
from flyd.store.keys import postgres_leader
from flyd.store.memory import MemoryEtcd, MemoryKV
from pgha import changes, keys
from pgha.membership import next_step, settled, stepped
from pgha.model import Membership, Pause


async def cluster(*members: str, down: tuple[str, ...] = (), retired: tuple[str, ...] = ()) -> MemoryKV:
    """Led by the first; the others stream, but those that are down."""
    kv = MemoryKV(MemoryEtcd())
    record = Membership(quorum=settled(members), target=members, retired=retired)
    await kv.put(keys.membership("db"), encode(record))
    leader = PostgresLeader(cluster="db", epoch=2, node=members[0], address="a:1", serving=True)
    await kv.put(postgres_leader("db"), encode(leader))
    for name in members:
        said = PostgresMember(node=name, region="r", address="a:1", streaming=name not in (members[0], *down))
        await kv.put(keys.member("db", name), encode(said))
    return kv


async def step(kv: MemoryKV) -> None:
    """What the primary does."""
    record = await changes.membership(kv, "db")
    quorum = next_step(record.quorum, record.target)
    assert quorum is not None
    await kv.put(keys.membership("db"), encode(stepped(record, quorum)))


async def refused(kv: MemoryKV, kind: type[FlydError], words: str, verb: str, node: str) -> None:
    before = await kv.get(keys.membership("db"))
    ask = changes.request_add if verb == "add" else changes.request_remove
    with pytest.raises(kind, match=words):
        await ask(kv, "db", node)
    assert await kv.get(keys.membership("db")) == before


async def test_a_member_is_asked_for_once() -> None:
    kv = await cluster("a", "b", "c")
    assert (await changes.request_add(kv, "db", "d")).target == ("a", "b", "c", "d")
    before = await kv.get(keys.membership("db"))
    await changes.request_add(kv, "db", "d")
    assert await kv.get(keys.membership("db")) == before
    await refused(kv, Conflict, "being changed already, to a, b, c, d", "add", "e")
    await refused(kv, Conflict, "being changed already", "remove", "c")


async def test_a_change_can_be_turned_back_half_way() -> None:
    kv = await cluster("a", "b", "c")
    await changes.request_add(kv, "db", "d")
    await step(kv)
    assert (await changes.request_remove(kv, "db", "d")).target == ("a", "b", "c")
    assert (await changes.request_add(kv, "db", "d")).target == ("a", "b", "c", "d")
    await changes.request_remove(kv, "db", "d")
    await step(kv)
    assert (await changes.membership(kv, "db")).retired == ("d",)
    await refused(kv, Refused, "a name does not come back", "add", "d")
    assert "d" in (await changes.request_remove(kv, "db", "d")).retired  # again: nothing new


@pytest.mark.parametrize(
    ("members", "down", "node", "kind", "words"),
    [
        ("abc", "", "x", NotFound, "x is no member of db"),
        ("abc", "", "a", Refused, "a is the primary"),
        ("ab", "", "b", Refused, "needs at least 2"),
        ("abc", "b", "c", Refused, "no quorum of db would be left: b does not stream"),
        ("abcde", "de", "c", Refused, "no quorum"),
    ],
)
async def test_removals_that_are_refused(
    members: str, down: str, node: str, kind: type[FlydError], words: str
) -> None:
    kv = await cluster(*members, down=tuple(down))
    await refused(kv, kind, words, "remove", node)


async def test_the_one_that_is_down_may_go() -> None:
    kv = await cluster("a", "b", "c", down=("b",))
    assert (await changes.request_remove(kv, "db", "b")).target == ("a", "c")


async def test_not_while_paused_and_not_without_a_record() -> None:
    kv = await cluster("a", "b", "c")
    await kv.put(keys.pause("db"), encode(Pause()))
    await refused(kv, Conflict, "paused", "add", "d")
    await refused(kv, Conflict, "paused", "remove", "c")
    with pytest.raises(NotFound, match="has not recorded its members yet"):
        await changes.membership(kv, "other")


async def test_there_is_a_most() -> None:
    kv = await cluster(*"abcdefghi")
    await refused(kv, Refused, "can not have more than 9", "add", "j")
