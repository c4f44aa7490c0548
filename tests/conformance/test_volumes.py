"""What every volume store does (ports.VolumeStore); add a store to STORES to put it through this."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flyd.errors import InvalidInput, NotFound, Refused
from flyd.ports import VolumeStore
from volumes.directory import DirectoryVolumes

STORES: dict[str, Callable[[Path], VolumeStore]] = {"directory": DirectoryVolumes}


@pytest.fixture(params=sorted(STORES))
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], VolumeStore]:
    """Each call answers a new store over the same disk, as after a restart of flyd."""
    return lambda: STORES[request.param](tmp_path / "volumes")


async def test_data_outlives_machines_and_flyd(open_store: Callable[[], VolumeStore]) -> None:
    store = open_store()
    await store.create("vol1", 1)
    path = await store.attach("vol1", "m1", 1)
    (Path(path) / "file").write_text("kept")
    await store.detach("vol1", "m1", 1)
    await store.create("vol1", 1)
    assert await open_store().attach("vol1", "m2", 2) == path
    assert (Path(path) / "file").read_text() == "kept"


async def test_attach_can_be_repeated_and_restarted(open_store: Callable[[], VolumeStore]) -> None:
    store = open_store()
    await store.create("vol1", 1)
    path = await store.attach("vol1", "m1", 3)
    assert await store.attach("vol1", "m1", 3) == path
    assert await open_store().attach("vol1", "m1", 3) == path
    await store.detach("vol1", "m1", 3)
    await store.detach("vol1", "m1", 3)
    assert await store.attach("vol1", "m1", 3) == path


async def test_an_older_epoch_is_refused(open_store: Callable[[], VolumeStore]) -> None:
    store = open_store()
    await store.create("vol1", 1)
    await store.attach("vol1", "m1", 1)
    await store.attach("vol1", "m2", 2)  # m1's host's flyd was down when it was destroyed
    with pytest.raises(Refused, match="machine m2 has claimed it since, with epoch 2"):
        await open_store().attach("vol1", "m1", 1)
    await store.detach("vol1", "m2", 2)
    with pytest.raises(Refused):
        await open_store().attach("vol1", "m1", 1)


async def test_two_machines_never_share_an_epoch(open_store: Callable[[], VolumeStore]) -> None:
    store = open_store()
    await store.create("vol1", 1)
    await store.attach("vol1", "m1", 1)
    for _ in range(2):
        with pytest.raises(Refused, match="epoch 1 is machine m1's claim"):
            await store.attach("vol1", "m2", 1)
        await store.detach("vol1", "m1", 1)


async def test_a_late_detach_disturbs_nobody(open_store: Callable[[], VolumeStore]) -> None:
    store = open_store()
    await store.create("vol1", 1)
    await store.attach("vol1", "m1", 1)
    await store.attach("vol1", "m2", 2)
    for machine_id, epoch in (("m1", 1), ("m2", 1), ("m1", 2)):
        await store.detach("vol1", machine_id, epoch)
        with pytest.raises(Refused, match="attached to machine m2"):
            await store.destroy("vol1")


async def test_destroy_only_when_detached(open_store: Callable[[], VolumeStore]) -> None:
    store = open_store()
    await store.create("vol1", 1)
    path = await store.attach("vol1", "m1", 1)
    with pytest.raises(Refused, match="attached to machine m1"):
        await open_store().destroy("vol1")
    await store.detach("vol1", "m1", 1)
    await store.destroy("vol1")
    await store.destroy("vol1")
    assert not os.path.exists(path)
    with pytest.raises(NotFound, match="vol1"):
        await store.attach("vol1", "m1", 2)
    await store.detach("vol1", "m1", 1)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a\0b"])
async def test_names_stay_inside(open_store: Callable[[], VolumeStore], name: str) -> None:
    store = open_store()
    with pytest.raises(InvalidInput, match="no volume id"):
        await store.create(name, 1)
    with pytest.raises(InvalidInput, match="no volume id"):
        await store.destroy(name)
