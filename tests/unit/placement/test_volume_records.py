"""Creating a volume while answers are lost or come late: never two of them, and it is said what is known."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from flyd.errors import OutcomeUnknown, Unavailable
from flyd.model import Host, Reservations, Volume, decode, encode
from flyd.placement.volumes import create_volume, list_volumes
from flyd.ports import KV, Delete, Listing, Put, TxnResult, Unchanged
from flyd.store import keys
from flyd.store.memory import MemoryKV
from tests.support.placing import CountedEntropy, FixedClock, join, make_host


async def create(kv: KV) -> Volume:
    return await create_volume(kv, "chat", "data", "ams", 3, clock=FixedClock(), entropy=CountedEntropy())


class LateWrite(MemoryKV):
    """The first write takes effect around the second, whose sender has chosen another host meanwhile."""

    def __init__(self, before_second: bool) -> None:
        super().__init__()
        self._before_second = before_second
        self._late: tuple[Sequence[Unchanged], Sequence[Put | Delete]] | None = None
        self.first_host = ""

    async def txn(self, compares: Sequence[Unchanged], effects: Sequence[Put | Delete]) -> TxnResult:
        if self._late is None:
            self._late = (compares, effects)
            self.first_host = keys.last_part(effects[0].key)
            await self._cordon(self.first_host)
            raise OutcomeUnknown("no answer yet")
        if self._before_second:
            await super().txn(*self._late)
            return await super().txn(compares, effects)
        result = await super().txn(compares, effects)
        await super().txn(*self._late)
        return result

    async def _cordon(self, name: str) -> None:
        """For the second sender alone: a changed record would stop the late write whatever its id."""
        record = await self.get(keys.host(name))
        assert record is not None
        self.cordoned = msgspec.structs.replace(decode(record.value, Host), cordoned=True)

    async def list(self, prefix: str) -> Listing:
        listing = await super().list(prefix)
        if prefix != keys.HOSTS or self._late is None:
            return listing
        items = tuple(
            msgspec.structs.replace(i, value=encode(self.cordoned))
            if i.key == keys.host(self.first_host)
            else i
            for i in listing.items
        )
        return msgspec.structs.replace(listing, items=items)


@pytest.mark.parametrize("before_second", [True, False])
async def test_a_write_that_takes_effect_late_makes_no_second_volume(before_second: bool) -> None:
    kv = LateWrite(before_second)
    await join(kv, make_host("ams-1"), make_host("ams-2"))
    made = await create(kv)
    assert await list_volumes(kv, "chat") == (made,)
    assert (made.host == kv.first_host) == before_second
    held = [decode(i.value, Reservations) for i in (await kv.list(keys.RESERVATIONS)).items]
    assert [(r.host, r.volumes_gb) for r in held] == [(made.host, {made.id: 3})]


async def test_it_is_said_if_nobody_knows_whether_it_was_made() -> None:
    class GoneAfterTheWrite(MemoryKV):
        gone = False

        async def _before(self, op: str) -> None:
            if self.gone:
                raise Unavailable("etcd does not answer")

        async def _after(self, op: str) -> None:
            if op == "txn":
                self.gone = True
                raise OutcomeUnknown("the answer got lost")

    kv = GoneAfterTheWrite()
    await join(kv, make_host("ams-1"))
    with pytest.raises(
        OutcomeUnknown, match="whether volume data of app chat was created is not known"
    ) as told:
        await create(kv)
    kv.gone = False
    (made,) = await list_volumes(kv, "chat")
    assert made.id in told.value.hint
