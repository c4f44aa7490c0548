"""Joining by the rules: a token once, a name and a subnet for one host, the same again for the same key."""

from __future__ import annotations

import asyncio
import random  # noqa: TID251 - a seeded choice of a test
from pathlib import Path

import pytest

from flyd.errors import Conflict, Denied, InvalidInput, NotFound, Unavailable
from flyd.hosts import joining
from flyd.hosts.identity import put_founding, refused_serials
from flyd.identity import signing
from flyd.identity.certificates import new_authorities, new_key, public_key
from flyd.identity.folder import FOUNDING
from flyd.identity.tokens import read_token
from flyd.model import Founding, Membership, encode
from flyd.ports import Put
from flyd.store import keys
from flyd.store.memory import MemoryEtcd, MemoryKV

NOW_S = 1_800_000_000.0
HOUR_S = 3600.0
AUTHORITIES = new_authorities("c1", NOW_S, 24 * HOUR_S)
KEYS = [public_key(new_key()) for _ in range(3)]


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = NOW_S

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s


class Entropy:
    """Numbers in order."""

    def __init__(self) -> None:
        self._next = 0

    def token(self, n_bytes: int) -> str:
        self._next += 1
        return f"{self._next:0{2 * n_bytes}x}"


class World:
    """An etcd with authorities and one member, ams-1 on 10.211."""

    def __init__(self) -> None:
        self.etcd = MemoryEtcd()
        self.kv = MemoryKV(self.etcd)
        self.clock, self.entropy = Clock(), Entropy()

    async def begin(self) -> World:
        await self.kv.txn([], [Put(keys.AUTHORITIES, encode(AUTHORITIES))])
        await self.kv.put(keys.membership("ams-1"), encode(member("ams-1", "10.211")))
        return self

    async def token(self, lifetime_s: float = HOUR_S) -> str:
        token, _ = await joining.create_token(
            self.kv, ["192.0.2.1:4280"], lifetime_s, "user:admin", clock=self.clock, entropy=self.entropy
        )
        return token.id

    async def join(
        self, token: str, name: str = "fra-1", key: str = KEYS[0], subnet: str = ""
    ) -> joining.Joined:
        newcomer = joining.Newcomer(name=name, addresses=("192.0.2.9",), subnet=subnet, public_key=key)
        return await joining.join(self.kv, token, newcomer, clock=self.clock, entropy=self.entropy)


def member(host: str, subnet: str, **more: object) -> Membership:
    fields = {"id": f"m-{host}", "public_key": KEYS[2], "addresses": ("192.0.2.1",), "joined_at_s": NOW_S}
    return Membership(host=host, subnet=subnet, **{**fields, **more})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _signed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process for each signature; test_certificates.py has the one that is."""

    async def sign(request: signing.Issue | signing.Revoke | signing.MakeToken) -> signing.Signed:
        return signing.carry_out(request)

    monkeypatch.setattr(joining, "sign", sign)


@pytest.fixture
async def world() -> World:
    return await World().begin()


async def test_a_token_lets_one_host_in_once(world: World) -> None:
    token = await world.token()
    joined = await world.join(token)
    assert joined.membership.subnet == "10.212"
    assert joined.membership.serials == {joined.certificate.serial: joined.certificate.expires_at_s}
    with pytest.raises(Denied, match="used already, by fra-1"):
        await world.join(token, name="fra-2", key=KEYS[1])
    with pytest.raises(Denied, match="used already"):
        await world.join(token, key=KEYS[1])  # the name, but not the key


async def test_whoever_lost_the_answer_asks_again(world: World) -> None:
    token = await world.token()
    first, second = await world.join(token), await world.join(token)
    assert second.membership.id == first.membership.id
    assert set(second.membership.serials) == {first.certificate.serial, second.certificate.serial}


async def test_a_token_ends(world: World) -> None:
    token = await world.token(60.0)
    world.clock.now_s += 61.0
    with pytest.raises(Denied, match="expired 1 s ago"):
        await world.join(token)
    with pytest.raises(Denied, match="no such join token"):
        await world.join("unknown")


@pytest.mark.parametrize("lifetime_s", [0.0, -1.0, 31 * 24 * HOUR_S, float("nan")])
async def test_a_token_s_life_is_checked(world: World, lifetime_s: float) -> None:
    with pytest.raises(InvalidInput, match="can not last"):
        await world.token(lifetime_s)


async def test_the_token_s_text_is_of_its_record(world: World) -> None:
    token, text = await joining.create_token(
        world.kv, ["a:1", "b:2"], 60.0, "user:admin", clock=world.clock, entropy=world.entropy
    )
    assert read_token(text).api == ("a:1", "b:2")
    assert await world.kv.get(keys.token(token.id)) is not None


async def test_a_name_belongs_to_one_host(world: World) -> None:
    with pytest.raises(Conflict, match="a member already"):
        await world.join(await world.token(), name="ams-1")
    for name in ("any", "", "-x", "Upper", "a" * 41, "a/b", "a:b"):
        with pytest.raises(InvalidInput, match="can not be a host's name"):
            await world.join(await world.token(), name=name)


async def test_a_subnet_belongs_to_one_host(world: World) -> None:
    with pytest.raises(Conflict, match=r"10\.211 belongs to ams-1"):
        await world.join(await world.token(), subnet="10.211")
    assert (await world.join(await world.token(), subnet="10.99")).membership.subnet == "10.99"


async def test_of_many_at_once_no_two_get_one_subnet(world: World) -> None:
    tokens = [await world.token() for _ in range(6)]

    async def persist(number: int) -> str:
        while True:
            try:
                return (await world.join(tokens[number], name=f"h-{number}")).membership.subnet
            except Conflict:
                await asyncio.sleep(0)

    subnets = await asyncio.gather(*(persist(n) for n in range(6)))
    assert len(set(subnets)) == 6


async def test_expelled_and_back(world: World) -> None:
    joined = await world.join(await world.token())
    expelled = await joining.expel(world.kv, "fra-1", "user:admin", empty=True, clock=world.clock)
    assert expelled.refused == (joined.certificate.serial,)
    assert refused_serials([expelled], world.clock.now_s) == (joined.certificate.serial,)
    with pytest.raises(Denied, match="expelled from this cluster by user:admin"):
        await joining.renew(world.kv, "fra-1", joined.membership.id, clock=world.clock)
    back = await world.join(await world.token(), key=KEYS[1])
    assert back.membership.id != joined.membership.id
    assert back.membership.subnet == joined.membership.subnet
    assert refused_serials([back.membership], world.clock.now_s) == (joined.certificate.serial,)
    with pytest.raises(Denied):
        await joining.renew(world.kv, "fra-1", joined.membership.id, clock=world.clock)
    later_s = world.clock.now_s + 25 * HOUR_S  # both certificates have ended by themselves
    assert refused_serials([back.membership], later_s) == ()


async def test_expelling_again_changes_nothing(world: World) -> None:
    first = await joining.expel(world.kv, "ams-1", "user:admin", empty=False, clock=world.clock)
    world.clock.now_s += 5
    assert await joining.expel(world.kv, "ams-1", "user:other", empty=False, clock=world.clock) == first
    with pytest.raises(NotFound, match="no host is called 'nobody'"):
        await joining.expel(world.kv, "nobody", "user:admin", empty=True, clock=world.clock)


async def test_renewals_keep_the_membership(world: World) -> None:
    joined = await world.join(await world.token())
    renewed = await joining.renew(world.kv, "fra-1", joined.membership.id, clock=world.clock)
    assert renewed.membership.id == joined.membership.id
    world.clock.now_s += 25 * HOUR_S
    last = await joining.renew(world.kv, "fra-1", joined.membership.id, clock=world.clock)
    assert set(last.membership.serials) == {last.certificate.serial}  # those that ended are forgotten


async def test_founding_is_put_once(world: World, tmp_path: Path) -> None:
    kv = MemoryKV(MemoryEtcd())
    founding = Founding(authorities=AUTHORITIES, memberships=(member("ams-1", "10.211"),))
    (tmp_path / FOUNDING).write_bytes(encode(founding))
    await put_founding(kv, tmp_path)
    assert not (tmp_path / FOUNDING).exists()
    before = await kv.list(keys.ROOT)
    assert [item.key for item in before.items] == [keys.AUTHORITIES, keys.membership("ams-1")]
    (tmp_path / FOUNDING).write_bytes(encode(founding))  # killed before it was removed
    await put_founding(kv, tmp_path)
    assert (await kv.list(keys.ROOT)).items == before.items


@pytest.mark.parametrize("seed", range(20))
async def test_killed_anywhere_a_join_goes_on(seed: int) -> None:
    """Every call to etcd may fail, before or after it took effect; the newcomer asks until it is in."""
    world = await World().begin()
    token = await world.token()
    chance = random.Random(seed)
    real = world.kv.txn

    async def unsure(*arguments: object) -> object:
        fate = chance.random()
        if fate < 0.3:
            raise Unavailable("lost before")
        result = await real(*arguments)  # type: ignore[arg-type]
        if fate < 0.6:
            raise Unavailable("lost after")
        return result

    world.kv.txn = unsure  # type: ignore[method-assign]
    joined: joining.Joined | None = None
    while joined is None:
        try:
            joined = await world.join(token)
        except (Unavailable, Conflict):
            continue
    assert joined.membership.serials[joined.certificate.serial] == joined.certificate.expires_at_s
