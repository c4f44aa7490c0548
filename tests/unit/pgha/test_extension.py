"""A voter that bears with a holder while etcd is silent: what it may say, and what it then may not do."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from flyd.model import encode
from flyd.ports import Put
from pgha import keys
from pgha.decide import decide
from pgha.extension import Extensions
from pgha.membership import acks_needed, votes_needed
from pgha.model import (
    ANY_EPOCH,
    GRACE_S,
    TTL_S,
    Action,
    AgentConfig,
    Decision,
    Doubt,
    Extension,
    Lease,
    Plea,
    View,
    Vote,
)
from pgha.observe import ClusterRecords
from pgha.voice import UdpVoice
from tests.simulation.loop import current, run
from tests.simulation.network import ETCD, Network, SimulatedClock, SimulatedKV, Store
from tests.support.etcd import free_ports
from tests.support.pgha_views import NOW, ROUND, but

CONFIG = AgentConfig(cluster="db", node="b", voters=("a", "b", "c"), region="r", address="b:1")
PLEA = Plea(cluster="db", node="a", epoch=4)
GIVEN = Extension(epoch=4, until_s=NOW + 0.1)
DOUBTS = tuple(Doubt(node=node, revision=50, evidence="refused") for node in ("b", "c"))
VOTE = Decision(rule="vote", action=Action.VOTE, revision=50)


@pytest.mark.parametrize("members", range(2, 10))
def test_the_holder_and_those_that_bear_with_it_leave_too_few_to_elect(members: int) -> None:
    assert members - 1 - acks_needed(members) < votes_needed(members)


@pytest.mark.parametrize(
    ("name", "view", "rule"),
    [
        ("the lease is old", but(ROUND, extension=GIVEN), "following"),
        ("a quorum doubts", but(ROUND, extension=GIVEN, doubts=DOUBTS), "extended"),
        ("began just now", but(ROUND, extension=Extension(epoch=ANY_EPOCH, until_s=NOW + 0.1)), "following"),
        ("its time is over", but(ROUND, extension=Extension(epoch=4, until_s=NOW)), "vote"),
        ("for an older epoch", but(ROUND, extension=Extension(epoch=3, until_s=NOW + 9)), "vote"),
        (
            "given back",
            but(ROUND, extension=GIVEN, lease=Lease(epoch=4, node="a", released=True)),
            "vote",
        ),
    ],
)
def test_when_a_voter_that_gave_its_word_may_vote(name: str, view: View, rule: str) -> None:
    free = msgspec.structs.replace(
        view,
        data=msgspec.structs.replace(view.data, promised=20),
        status=msgspec.structs.replace(view.status, upstream="10.0.0.a:5432", streaming=True),
    )
    assert decide(free, "b", NOW).rule == rule


class Voter:
    """One voter's extensions on a simulated etcd that names `a` as holder of epoch 4."""

    def __init__(self) -> None:
        self.network, self.store = Network(), Store()
        kv = SimulatedKV(self.network, self.store, "b")
        self.records = ClusterRecords("db", kv, SimulatedClock())
        self.extensions = Extensions(CONFIG, kv, SimulatedClock(), self.records)
        self.renew(Lease(epoch=4, node="a"))

    def renew(self, lease: Lease) -> int:
        return self.store.txn((), (Put(keys.lease("db"), encode(lease)),)).revision

    async def begin(self) -> None:
        await self.records.refresh()
        self.extensions.promised(0)
        await asyncio.sleep(TTL_S)  # what it may have said before it began is over

    def lose_etcd(self) -> None:
        self.network.cut("b", ETCD)


def test_says_no_while_etcd_answers_and_yes_when_it_does_not() -> None:
    async def main() -> None:
        voter = Voter()
        await voter.begin()
        assert not await voter.extensions.answer(PLEA)
        voter.lose_etcd()
        await asyncio.sleep(1)
        assert await voter.extensions.answer(PLEA)
        assert voter.extensions.given == Extension(epoch=4, until_s=current().time() + TTL_S)
        voter.network.heal()
        await asyncio.sleep(GRACE_S - 0.5)
        assert await voter.extensions.answer(PLEA)
        await asyncio.sleep(1.0)
        assert not await voter.extensions.answer(PLEA)

    run(1, main)


@pytest.mark.parametrize(
    "plea",
    [
        Plea(cluster="other", node="a", epoch=4),
        Plea(cluster="db", node="c", epoch=4),
        Plea(cluster="db", node="a", epoch=3),
        Plea(cluster="db", node="b", epoch=4),
    ],
)
def test_only_the_holder_of_the_lease_is_heard(plea: Plea) -> None:
    async def main() -> None:
        voter = Voter()
        await voter.begin()
        voter.lose_etcd()
        assert not await voter.extensions.answer(plea)
        assert await voter.extensions.answer(PLEA)

    run(1, main)


def test_who_gave_its_word_does_not_vote_and_who_began_to_vote_does_not_give_it() -> None:
    async def main() -> None:
        voter = Voter()
        await voter.begin()
        voter.lose_etcd()
        assert await voter.extensions.answer(PLEA)
        assert not voter.extensions.close(voter.records.lease_revision)
        await asyncio.sleep(TTL_S)
        assert voter.extensions.close(voter.records.lease_revision)
        assert not await voter.extensions.answer(PLEA)
        voter.network.heal()
        voter.renew(Lease(epoch=4, node="a", count=1))
        await voter.records.refresh()
        voter.lose_etcd()
        await asyncio.sleep(1)
        assert await voter.extensions.answer(PLEA)

    run(1, main)


@pytest.mark.parametrize("how", ["promise", "vote"])
def test_a_vote_of_an_earlier_run_counts(how: str) -> None:
    async def main() -> None:
        voter = Voter()
        await voter.begin()
        revision = voter.records.lease_revision
        if how == "promise":
            voter.extensions.promised(revision)
        else:
            said = Vote(node="b", revision=revision, epoch=4, lsn=1)
            voter.store.txn((), (Put(keys.vote("db", revision, "b"), encode(said)),))
            await voter.records.refresh()
        voter.lose_etcd()
        assert not await voter.extensions.answer(PLEA)

    run(1, main)


def test_right_after_its_start_it_votes_on_nothing_but_a_lease_given_back() -> None:
    async def main() -> None:
        voter = Voter()
        await voter.records.refresh()
        assert not voter.extensions.close(voter.records.lease_revision)
        voter.renew(Lease(epoch=4, node="a", released=True))
        await voter.records.refresh()
        assert voter.extensions.close(voter.records.lease_revision)

    run(1, main)


async def test_the_voice_is_heard_by_those_who_know_the_password() -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    heard: list[Plea] = []

    async def answer(plea: Plea) -> bool:
        heard.append(plea)
        return plea.epoch == 4

    async with asyncio.TaskGroup() as group:
        listening = group.create_task(UdpVoice(address, "secret").listen(answer))
        ours = UdpVoice("127.0.0.1:1", "secret")
        async with asyncio.timeout(20.0):
            while not await ours.ask(address, PLEA, 1.0):
                pass  # it may not listen yet
        assert not await ours.ask(address, msgspec.structs.replace(PLEA, epoch=5), 20.0)
        count = len(heard)
        assert not await UdpVoice("127.0.0.1:1", "guess").ask(address, PLEA, 0.1)
        assert await ours.ask(address, PLEA, 20.0)
        assert len(heard) == count + 1
        listening.cancel()
