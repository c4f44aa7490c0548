"""Leases, updates and idempotency keys while answers get lost and others compete."""

from __future__ import annotations

import asyncio

import pytest

from flyd.errors import Conflict, FlydError, OutcomeUnknown
from flyd.machines import commands, idempotency, leases, updates
from flyd.model import Desired, Machine, MachineConfig, Reservations, decode, encode
from flyd.ports import KV
from flyd.store import keys
from flyd.store.memory import MemoryEtcd, MemoryKV
from tests.support.placing import CountedEntropy, FixedClock, make_host, make_machine

HOST = make_host("ams-1")
MACHINE = make_machine("m1", HOST)
CLOCK = FixedClock()


class LostAnswers(MemoryKV):
    """Every other transaction is done, and its answer lost."""

    txns = 0

    async def _after(self, op: str) -> None:
        if op == "txn":
            self.txns += 1
            if self.txns % 2:
                raise OutcomeUnknown("the answer got lost")


async def with_machine(kv: KV) -> KV:
    await kv.put(keys.machine("chat", "m1"), encode(MACHINE))
    await kv.put(keys.host(HOST.name), encode(HOST))
    await kv.put(keys.reservations(HOST.name), encode(Reservations(host=HOST.name)))
    return kv


async def stored(kv: KV) -> Machine:
    record = await kv.get(keys.machine("chat", "m1"))
    assert record is not None
    return decode(record.value, Machine)


async def taken_by(kv: KV, owner: str, ttl_s: int = 60) -> leases.MachineLease:
    return await leases.acquire(
        kv, "chat", "m1", owner=owner, ttl_s=ttl_s, clock=CLOCK, entropy=CountedEntropy(owner)
    )


async def test_of_many_that_want_it_one_gets_it() -> None:
    kv = await with_machine(MemoryKV())

    async def attempt(owner: str) -> str:
        try:
            return (await taken_by(kv, owner)).owner
        except Conflict as error:
            return error.message

    answers = await asyncio.gather(*(attempt(f"user{number}") for number in range(8)))
    held = await leases.find(kv, "chat", "m1")
    assert sorted(answers).count(held.owner) == 1
    assert answers.count(f"machine m1 is leased by {held.owner}") == 7


async def test_lost_answers_take_renew_and_give_back_once() -> None:
    kv = await with_machine(LostAnswers())
    held = await taken_by(kv, "ada")
    assert (await leases.find(kv, "chat", "m1")).nonce == held.nonce
    await leases.renew(kv, "chat", "m1", held.nonce, clock=CLOCK)
    await leases.release(kv, "chat", "m1", held.nonce)
    assert await kv.get(leases.lease_key("chat", "m1")) is None


async def test_the_loser_leaves_no_etcd_lease_behind() -> None:
    etcd = MemoryEtcd()
    kv = await with_machine(MemoryKV(etcd))
    held = await taken_by(kv, "ada")
    with pytest.raises(Conflict):
        await taken_by(kv, "bob")
    await leases.release(kv, "chat", "m1", held.nonce)
    assert await kv.lease_keepalive(held.lease) == 0


async def test_a_lease_taken_in_the_middle_of_a_change_stops_it() -> None:
    """The guard is compared in the change's own transaction, not only looked at before it."""
    kv = await with_machine(MemoryKV())
    guard = await leases.guard(kv, "chat", "m1", "")
    await taken_by(kv, "ada")
    result = await kv.txn((guard,), ())
    assert not result.succeeded
    with pytest.raises(Conflict, match="leased by ada"):
        await commands.set_desired(kv, "chat", "m1", Desired.STOPPED, nonce="")
    await commands.set_desired(kv, "chat", "m1", Desired.STOPPED)  # flyd's own loops do not ask
    assert (await stored(kv)).desired is Desired.STOPPED


async def test_an_update_whose_answer_was_lost_happens_once() -> None:
    kv = await with_machine(LostAnswers())
    config = MachineConfig(image="host:", env={"A": "b"})
    updated = await updates.update(
        kv, "chat", "m1", config, current_version="Im1", clock=CLOCK, entropy=CountedEntropy()
    )
    assert await stored(kv) == updated


async def test_of_two_updates_of_one_version_one_wins() -> None:
    kv = await with_machine(MemoryKV())

    async def attempt(number: int) -> str | None:
        config = MachineConfig(image="host:", env={"N": str(number)})
        try:
            made = await updates.update(
                kv, "chat", "m1", config,
                current_version="Im1", clock=CLOCK, entropy=CountedEntropy(str(number)),
            )  # fmt: skip
        except FlydError:
            return None
        return made.instance_id

    answers = await asyncio.gather(*(attempt(number) for number in range(5)))
    assert [answer for answer in answers if answer] == [(await stored(kv)).instance_id]


async def test_a_key_stands_for_one_machine_also_when_answers_are_lost() -> None:
    kv = LostAnswers()
    entropy = CountedEntropy()
    made = await idempotency.remember(kv, "chat", "k", b"request", entropy=entropy)
    again = await idempotency.remember(kv, "chat", "k", b"request", entropy=entropy)
    assert made.machine_id == again.machine_id
    assert not again.done
    kv.txns = 1
    await idempotency.mark_done(kv, "chat", "k", again)
    assert (await idempotency.remember(kv, "chat", "k", b"request", entropy=entropy)).done
    assert (await idempotency.remember(kv, "other", "k", b"x", entropy=entropy)).machine_id != made.machine_id


async def test_of_many_first_calls_with_one_key_all_get_one_machine() -> None:
    kv = MemoryKV()
    entropy = CountedEntropy()
    found = await asyncio.gather(
        *(idempotency.remember(kv, "chat", "k", b"request", entropy=entropy) for _ in range(6))
    )
    assert len({made.machine_id for made in found}) == 1
    assert await kv.lease_keepalive(found[0].lease) > 0
