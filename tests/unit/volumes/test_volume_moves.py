"""A volume moves with its machine: nothing is lost, whatever dies on the way, and a failure undoes itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from flyd.errors import Conflict, OutcomeUnknown, Refused, Unavailable
from flyd.machines.commands import set_desired
from flyd.model import App, AppKind, Desired, Machine, MachineState, MachineStatus, Volume, decode, encode
from flyd.storage import moving, records
from flyd.storage.copies import copy_id
from flyd.storage.keeper import VolumeKeeper
from flyd.storage.moving import FAILED, STOPPING, SWITCHING, VolumeMove, VolumeMover, begin_move
from flyd.store import keys
from tests.support.volume_site import HOSTS, MACHINE, Site, Stop, failing, memory, running

__all__ = ["memory"]  # a fixture
STATUS = keys.status("web", "m1")
MOVE = keys.volume_move("web", "vol1")


class Moving:
    """A site whose machine writes until it is stopped, as its host would see to."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.mover = self.new_mover()
        self.adopted = 0

    def new_mover(self) -> VolumeMover:
        """As after a start of flyd."""
        site = self.site
        return VolumeMover("ams-1", site.kv, site.mirror, site.copier, self, clock=site.clock)

    async def adopt(self, host: str, app: str, volume_id: str) -> None:
        self.adopted += 1
        target = next(h for h in HOSTS if h.name == host)
        await self.site.recovery(target).adopt(app, volume_id)

    async def keep_copy(self, host: str, order: Any) -> int:
        return await self.site.keep_copy(host, order)

    async def begin(self) -> VolumeMove:
        (volume,) = (await self.site.volumes()).values()
        move = await begin_move(self.site.kv, volume, "iad-1", "vol_new", clock=self.site.clock)
        await self.site.seen()
        return move

    async def obey(self) -> None:
        """The machine's host: it stops what is to be stopped, after a last write."""
        while True:
            machine = await self.site.machine()
            record = await self.site.kv.get(STATUS)
            state = decode(record.value, MachineStatus).state if record else None
            if machine.host == "ams-1" and machine.desired is Desired.STOPPED:
                if state is not MachineState.STOPPED:
                    await self.site.write("the last word")
                    await self.say(MachineState.STOPPED)
            elif machine.host == "ams-1" and state is not MachineState.STARTED:
                await self.say(MachineState.STARTED)
            await asyncio.sleep(0)

    async def say(self, state: MachineState) -> None:
        status = MachineStatus(id="m1", app="web", host="ams-1", instance_id="I1", epoch=3, state=state)
        await self.site.kv.put(STATUS, encode(status))

    async def move(self) -> VolumeMove | None:
        record = await self.site.kv.get(MOVE)
        return decode(record.value, VolumeMove) if record else None

    async def round(self) -> None:
        await self.site.seen()
        async with asyncio.timeout(20):
            await self.mover.round()

    async def check_moved(self) -> None:
        """All of it is on the target, once."""
        site = self.site
        assert await self.move() is None
        there, machine = await site.volumes(), await site.machine()
        assert [(v.id, v.host, v.attached_machine) for v in there.values()] == [("vol_new", "iad-1", "m1")]
        assert (machine.host, machine.epoch, machine.desired) == ("iad-1", 4, Desired.STARTED)
        assert machine.config.mounts[0].volume == "vol_new"
        store = site.stores["iad-1"]
        data = Path(await store.attach("vol_new", "m1", there["vol_new"].epoch))
        assert (data / "file").read_text() == "the last word"
        held = await site.promised("iad-1")
        assert held.volumes_gb == {copy_id("vol1"): 2, "vol_new": 2}
        (kept,) = await records.list_destroyed(site.kv)
        assert (kept.volume.id, kept.volume.host) == ("vol1", "ams-1")


@asynccontextmanager
async def moving_site(root: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Moving]:
    monkeypatch.setattr(moving, "LOOK_S", 0.0)
    monkeypatch.setattr(moving, "AGAIN_S", 0.0)
    async with running(root) as site:
        await site.write("one")
        world = Moving(site)
        await world.say(MachineState.STARTED)
        async with asyncio.TaskGroup() as group:
            obeying = group.create_task(world.obey())
            yield world
            obeying.cancel()


async def test_a_volume_moves_with_its_machine(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with moving_site(memory, monkeypatch) as world:
        begun = await world.begin()
        assert await world.begin() == begun  # asked again: the same one
        await world.round()
        await world.check_moved()
        assert sum(world.site.moved) < 2_100_000  # all of it once, and the increments
        keeper = VolumeKeeper(
            "ams-1", world.site.kv, world.site.stores["ams-1"],
            clock=world.site.clock, entropy=world.site.entropy,
        )  # fmt: skip
        await world.site.stores["ams-1"].detach("vol1", "m1", 1)  # as the end of the old machine does
        world.site.clock.now_s += records.KEPT_S
        await keeper.round()
        assert [h.id for h in await world.site.stores["ams-1"].held()] == []


async def test_a_volume_without_a_machine_moves(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with moving_site(memory, monkeypatch) as world:
        (volume,) = (await world.site.volumes()).values()
        await world.site.put(replace(volume, attached_machine=""))
        await world.begin()
        await world.round()
        (moved,) = (await world.site.volumes()).values()
        assert (moved.id, moved.host, moved.attached_machine) == ("vol_new", "iad-1", "")
        assert (await world.site.machine()).host == "ams-1"


@pytest.mark.parametrize("what", ["txn before", "txn after", "txn unknown", "copy", "adopt"])
async def test_killed_around_every_step_it_converges(
    memory: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """flyd dies, or an answer is lost, at the n-th call of a kind; the next flyd goes on with the record."""
    points, reached = 0, True
    while reached:
        points += 1
        async with moving_site(memory / str(points), monkeypatch) as world:
            await world.begin()
            counted: list[int] = []
            with monkeypatch.context() as patch:
                _plant(patch, world, what, points, counted)
                with suppress(Stop):
                    await world.round()
            reached = bool(counted)
            world.mover = world.new_mover()
            await world.round()
            await world.check_moved()
    assert points > 1, "it was killed somewhere"
    print(f"{what}: {points - 1} points")


def _plant(patch: pytest.MonkeyPatch, world: Moving, what: str, at: int, counted: list[int]) -> None:
    def error() -> Exception:
        counted.append(at)
        return OutcomeUnknown("?") if what.endswith("unknown") else Stop()

    where: dict[str, tuple[Any, str]] = {"copy": (world.site, "keep_copy"), "adopt": (world, "adopt")}
    owner, name = where.get(what, (world.site.kv, "txn"))
    after = what.endswith(("after", "unknown", "copy", "adopt"))
    patch.setattr(owner, name, failing(getattr(owner, name), at, error, after=after))


async def _started_by_somebody(world: Moving) -> None:
    await set_desired(world.site.kv, "web", "m1", Desired.STARTED)


async def _given_up(world: Moving) -> None:
    await set_desired(world.site.kv, "web", "m1", Desired.DESTROYED)


@pytest.mark.parametrize("meddle", [_started_by_somebody, _given_up])
@pytest.mark.parametrize("phase", [STOPPING, SWITCHING])
async def test_a_machine_that_somebody_wants_otherwise_stays(
    memory: Path, monkeypatch: pytest.MonkeyPatch, meddle: Callable[[Moving], Any], phase: str
) -> None:
    async with moving_site(memory, monkeypatch) as world:
        await world.begin()
        name = "_copy_last" if phase == STOPPING else "_switch"
        step = getattr(world.mover, name)

        async def meddled(move: VolumeMove) -> Any:
            await meddle(world)
            return await step(move)

        monkeypatch.setattr(world.mover, name, meddled)
        await world.round()
        failed = await world.move()
        assert failed is not None
        assert failed.phase == FAILED
        assert failed.error
        machine = await world.site.machine()
        assert machine.host == "ams-1"
        assert machine.desired is (Desired.STARTED if meddle is _started_by_somebody else Desired.DESTROYED)
        assert list(await world.site.volumes()) == ["vol1"]
        again = await world.begin() if machine.desired is Desired.STARTED else None
        assert again is None or again.phase != FAILED


async def test_a_target_that_does_not_answer_undoes_it(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with moving_site(memory, monkeypatch) as world:
        monkeypatch.setattr(moving, "TRIES", 3)

        async def adopt(*_: Any) -> None:
            raise Unavailable("it does not answer")

        monkeypatch.setattr(world, "adopt", adopt)
        await world.begin()
        await world.round()
        failed = await world.move()
        assert failed is not None
        assert failed.error == "it does not answer (while switching)"
        assert (await world.site.machine()).desired is Desired.STARTED
        await world.mover.round()  # a failed one is left alone


async def test_what_can_not_move(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with moving_site(memory, monkeypatch) as world:
        volume = next(iter((await world.site.volumes()).values()))
        assert isinstance(volume, Volume)
        for changed, error, text in (
            (App(name="web", kind=AppKind.POSTGRES), Refused, "member of Postgres cluster"),
            (replace(MACHINE, desired=Desired.DESTROYED), Conflict, "is being destroyed"),
        ):
            await world.site.put(changed)
            with pytest.raises(error, match=text):
                await world.begin()
            await world.site.put(App(name="web", regions=("ams",)), MACHINE)
        assert isinstance(await world.site.machine(), Machine)
        assert await world.move() is None
