"""A volume that comes back while its host is about to remove it: it lives whole, or it is gone."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from flyd.errors import NotFound
from flyd.model import App, Volume, encode
from flyd.storage import records
from flyd.storage.records import Destroyed
from flyd.store import keys
from flyd.store.memory import MemoryKV
from tests.support.placing import CountedEntropy
from tests.unit.volumes.test_volumes_api import running

VOLUME = Volume(id="vol_1", name="data", app="web", region="ams", host="ams-1", size_gb=1)


@pytest.mark.parametrize("request_number", range(1, 6))
async def test_it_can_not_come_back_once_it_is_forgotten(request_number: int) -> None:
    """The host forgets it right before any of the requests by which somebody brings it back."""

    class Racing(MemoryKV):
        requests = 0
        racing = False

        async def _before(self, op: str) -> None:
            await super()._before(op)
            if not self.racing:
                return
            self.requests += 1
            if self.requests == request_number:
                self.racing = False
                (destroyed,) = await records.list_destroyed(self)
                await records.forget(self, destroyed, entropy=CountedEntropy())

    kv = Racing()
    await kv.put(keys.app("web"), encode(App(name="web")))
    await kv.put(keys.volume("web", "vol_1"), encode(VOLUME))
    await records.destroy(kv, "web", "vol_1", 1.0, entropy=CountedEntropy())
    kv.racing = True
    try:
        await records.undestroy(kv, "web", "vol_1", entropy=CountedEntropy())
    except NotFound:
        assert await kv.get(keys.volume("web", "vol_1")) is None
        assert not kv.racing
    else:
        assert kv.racing, "it was forgotten, and came back"


@pytest.mark.parametrize("back_before", [True, False], ids=["back long before", "back meanwhile"])
async def test_one_that_is_destroyed_again_meanwhile_is_kept_for_its_whole_day(
    tmp_path: Path, back_before: bool
) -> None:
    async with running(tmp_path) as world:
        volume_id = await world.make()
        await world.destroy(volume_id)
        await world.keeper.round()

        async def bring_back() -> None:
            await records.undestroy(world.kv, "web", volume_id, entropy=world.entropy)

        if back_before:
            await bring_back()
        world.clock.now_s += 2 * records.KEPT_S
        listed = records.list_destroyed

        async def then_destroyed(kv: MemoryKV, host: str = "") -> tuple[Destroyed, ...]:
            found = await listed(kv, host)
            if not back_before:
                await bring_back()
            await world.destroy(volume_id)
            return found

        with mock.patch.object(records, "list_destroyed", then_destroyed):
            await world.keeper.round()
        await world.keeper.round()
        await world.undestroy(volume_id)
        assert await world.text(volume_id) == "one"
