"""VolumesService: copies are asked for, their age is shown, and what can not come back says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flyd.errors import InvalidInput, NotFound, Refused, Unavailable
from flyd.model import App, AppKind, encode
from flyd.ports import Delete
from flyd.storage.copies import VolumeCopy
from flyd.store import keys
from flyd.v1 import volumes_pb2 as pb
from tests.unit.volumes.test_volumes_api import HOST, running


async def test_copies_are_asked_for_and_their_age_is_shown(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        volume_id = await world.make()

        async def update(**changed: Any) -> pb.Volume:
            request = pb.UpdateVolumeRequest(app_name="web", volume_id=volume_id, **changed)
            volume = (await world.api.UpdateVolume(request, None)).volume
            await world.seen()
            return volume

        changed = await update(replicas=2)
        assert (changed.replicas, changed.copy_every_s) == (2, 900.0)
        changed = await update(copy_every_s=60.0)
        assert (changed.replicas, changed.copy_every_s) == (2, 60.0)
        for wrong in (
            {"replicas": -1},
            {"replicas": 4},
            {"copy_every_s": 0.0},
            {"copy_every_s": float("nan")},
        ):
            with pytest.raises(InvalidInput, match="it must be"):
                await update(**wrong)
        listed = pb.ListVolumesRequest(app_name="web")
        (shown,) = (await world.api.ListVolumes(listed, None)).volumes
        assert shown.newest_copy_at == 0.0
        for host, at_s in (("iad-1", 5.0), ("sin-1", 7.0)):
            copy = VolumeCopy(
                app="web", volume=volume_id, host=host, source="ams-1", snapshot="s", made_at_s=at_s,
                copied_at_s=9.0, size_gb=2, used_bytes=1,
            )  # fmt: skip
            await world.kv.put(keys.volume_copy("web", volume_id, host), encode(copy))
        await world.seen()
        (shown,) = (await world.api.ListVolumes(listed, None)).volumes
        assert (shown.newest_copy_at, shown.newest_copy_host) == (7.0, "sin-1")
        await world.kv.put(keys.app("web"), encode(App(name="web", kind=AppKind.POSTGRES)))
        await world.seen()
        with pytest.raises(Refused, match="member of Postgres cluster"):
            await update(replicas=1)


async def test_what_can_not_be_recovered_says_why(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        volume_id = await world.make()
        request = pb.RecoverVolumeRequest(app_name="web", volume_id=volume_id)
        with pytest.raises(Refused, match="is alive"):
            await world.api.RecoverVolume(request, None)
        await world.kv.txn((), (Delete(keys.alive(HOST.name)),))
        await world.seen()
        with pytest.raises(Unavailable, match="no host that lives has a copy") as said:
            await world.api.RecoverVolume(request, None)
        assert "on ams-1's disk alone" in said.value.hint
        for wrong in ("nothing", "../x", "a/b", ""):
            with pytest.raises(NotFound, match="does not exist"):
                await world.api.RecoverVolume(pb.RecoverVolumeRequest(app_name="web", volume_id=wrong), None)
