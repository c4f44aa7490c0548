"""A restore is tried, compared with what was copied, and told of; nothing of it is left."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from flyd.errors import InvalidInput, Refused, Unavailable
from flyd.model import Event, decode
from flyd.storage.copies import VolumeCopy, check_verifying, copy_id, verify_due
from flyd.storage.verification import Verification, VolumeVerifier
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


def a_copy(host: str, made_at_s: float, verified_at_s: float) -> VolumeCopy:
    return VolumeCopy(
        app="web", volume="vol1", host=host, source="ams-1", snapshot="s", made_at_s=made_at_s,
        copied_at_s=made_at_s, size_gb=2, used_bytes=1, verified_at_s=verified_at_s,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("every_s", "copies", "due"),
    [
        (0.0, [a_copy("iad-1", 900, 0)], False),
        (100.0, [a_copy("iad-1", 900, 0)], True),
        (100.0, [a_copy("iad-1", 900, 901)], False),
        (100.0, [a_copy("iad-1", 900, 899)], True),
        (100.0, [a_copy("iad-1", 900, 5000)], True),  # a clock was set back
        (100.0, [a_copy("iad-1", 900, 0), a_copy("sin-1", 950, 0)], False),  # the newest is not here
        (100.0, [a_copy("iad-1", 950, 0), a_copy("sin-1", 900, 990)], False),  # the other one was just tried
        (100.0, [], False),
    ],
)
def test_when_a_trial_is_due(every_s: float, copies: list[VolumeCopy], due: bool) -> None:
    assert verify_due(replace(VOLUME, verify_every_s=every_s), copies, "iad-1", 1000.0) is due


@pytest.mark.parametrize("every_s", [-1.0, 59.0, 4e7, float("inf")])
def test_trials_that_make_no_sense(every_s: float) -> None:
    with pytest.raises(InvalidInput, match="it must be"):
        check_verifying(every_s)


async def test_trials_come_when_they_are_due_and_their_outcome_stays_with_the_copy(memory: Path) -> None:
    async with running(memory) as site:
        await site.write("one")
        await site.round()
        there = (await site.volumes())["vol1"]
        await site.put(replace(there, verify_every_s=3600.0))
        verifier = VolumeVerifier("iad-1", site.mirror, verification(site, "iad-1"), clock=site.clock)

        async def trials(after_s: float) -> list[str]:
            site.clock.now_s += after_s
            await verifier.round()
            await site.seen()
            return await told(site)

        assert await trials(0.0) == ["volume.verified"]
        (copy,) = await site.copies()
        assert (copy.verified_at_s, copy.verify_error) == (site.clock.now_s, "")
        assert await trials(3599.0) == ["volume.verified"]
        await site.write("two")
        await site.round(900.0)
        (newer,) = await site.copies()
        assert (newer.made_at_s > copy.made_at_s, newer.verified_at_s) == (True, copy.verified_at_s)
        data = memory / "iad-1" / copy_id("vol1") / "snapshots" / newer.snapshot / "data"
        (data / "file").write_text("rotten")
        assert await trials(0.0) == ["volume.verified", "volume.not_verified"]
        (copy,) = await site.copies()
        assert (copy.verified_at_s, "is not what ams-1 has" in copy.verify_error) == (site.clock.now_s, True)
