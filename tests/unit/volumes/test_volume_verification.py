"""A restore is tried, compared with what was copied, and told of; nothing of it is left."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from flyd.errors import Refused, Unavailable
from flyd.model import Event, decode
from flyd.storage.copies import copy_id
from flyd.storage.verification import Verification
from flyd.store import keys
from tests.support.volume_site import VOLUME, Site, memory, running

__all__ = ["memory"]  # a fixture


def verification(site: Site, host: str, *, answers: bool = True) -> Verification:
    async def digest(of: str, volume_id: str, snapshot_id: str) -> str:
        if not answers:
            raise Unavailable("it does not answer")
        return await site.stores[of].digest(volume_id, snapshot_id)

    return Verification(host, site.kv, site.stores[host], digest, clock=site.clock)


async def told(site: Site) -> list[str]:
    listing = await site.kv.list(f"{keys.EVENTS}web/")
    return [decode(item.value, Event).kind for item in listing.items]


async def test_a_copy_is_held_against_what_it_was_made_from(memory: Path) -> None:
    async with running(memory) as site:
        await site.write("one")
        await site.round()
        await site.write("two")
        (copy,) = await site.copies()
        before = [h.id for h in await site.stores["iad-1"].held()]
        await verification(site, "iad-1").verify(VOLUME, copy_id("vol1"))
        found = await verification(site, "iad-1").verify(VOLUME, copy_id("vol1"))
        assert (found.snapshot, found.data_at_s, found.compared_with) == (
            copy.snapshot, copy.made_at_s, "ams-1",
        )  # fmt: skip
        assert found.sha256 == await site.stores["ams-1"].digest("vol1", copy.snapshot)
        alone = await verification(site, "iad-1", answers=False).verify(VOLUME, copy_id("vol1"))
        assert alone.compared_with == "iad-1"
        assert [h.id for h in await site.stores["iad-1"].held()] == before
        site.clock.now_s += 1.0
        data = memory / "iad-1" / copy_id("vol1") / "snapshots" / copy.snapshot / "data"
        (data / "file").write_text("rotten")
        with pytest.raises(Refused, match="is not what ams-1 has"):
            await verification(site, "iad-1").verify(VOLUME, copy_id("vol1"))
        assert (await told(site)) == ["volume.verified", "volume.not_verified"]
        assert [h.id for h in await site.stores["iad-1"].held()] == before


async def test_a_volume_without_copies_is_restored_from_its_own_snapshot(memory: Path) -> None:
    async with running(memory) as site:
        await site.write("one")
        with pytest.raises(Unavailable, match="has no snapshot to restore"):
            await verification(site, "ams-1").verify(VOLUME, "vol1")
        await site.stores["ams-1"].snapshot("vol1", "mine", 5.0)
        found = await verification(site, "ams-1").verify(replace(VOLUME, size_gb=3), "vol1")
        assert (found.snapshot, found.compared_with) == ("mine", "ams-1")
        assert [h.id for h in await site.stores["ams-1"].held()] == ["vol1"]
