"""How a volume's move is begun and watched. The volume's host does it: storage/moving.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc.aio

from flyd.api import views
from flyd.api.context import ApiContext
from flyd.api.status import from_rpc
from flyd.errors import Conflict, InvalidInput, Refused, Unavailable, Unplaceable
from flyd.model import Desired, Host, Machine, MachineState, MachineStatus, Reservations, Volume
from flyd.model.image import IMAGE_PREFIX
from flyd.placement.ids import new_volume_id
from flyd.placement.index import free_capacity
from flyd.placement.snapshot import read_snapshot
from flyd.storage.copies import copy_id
from flyd.storage.moving import COPYING, FAILED, VolumeMove, begin_move
from flyd.storage.relocation import check_relocatable, place
from flyd.store import keys
from flyd.v1 import images_pb2, images_pb2_grpc
from flyd.v1 import volumes_pb2 as pb

STARTING, DONE = "starting", "done"
START_TIMEOUT_S = 120.0
IMAGE_TIMEOUT_S = 1800.0


async def begin(ctx: ApiContext, volume: Volume, host_name: str) -> VolumeMove:
    """Write the move down, if the target can take volume and machine."""
    host = ctx.peers.host(host_name)
    if host.name == volume.host:
        raise InvalidInput(f"volume {volume.id} is on {host.name} already")
    for name in (host.name, volume.host):
        if not ctx.alive(name):
            hint = "`fly volumes recover` brings a lost host's volume back from a copy."
            raise Unavailable(f"host {name} is lost", hint=hint if name == volume.host else "")
    if host.cordoned:
        raise Refused(f"host {host.name} is cordoned", hint=f"fly hosts uncordon {host.name}")
    _check_room(ctx, volume, host)
    machine = await check_relocatable(ctx.kv, volume)
    if machine is not None:
        place(await read_snapshot(ctx.kv, volume.app), machine, host.name)
        await _bring_image(ctx, machine, host)
    return await begin_move(ctx.kv, volume, host.name, new_volume_id(ctx.entropy), clock=ctx.clock)


async def _bring_image(ctx: ApiContext, machine: Machine, host: Host) -> None:
    """Now, for its fetching would count as downtime later."""
    if not machine.config.image.startswith(IMAGE_PREFIX):
        return
    image_id = machine.config.image.removeprefix(IMAGE_PREFIX)
    if host.name == ctx.host.name and ctx.images is not None:
        await ctx.images.ensure(image_id)
        return
    stub = images_pb2_grpc.ImagesServiceStub(ctx.peers.channel(host))
    request = images_pb2.EnsureImageRequest(image_id=image_id)
    try:
        await stub.EnsureImage(request, timeout=IMAGE_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error, f"{host.name} ({host.api_address})") from error


def _check_room(ctx: ApiContext, volume: Volume, host: Host) -> None:
    """For the volume and, for a while, the copy that it is made of."""
    found = ctx.mirror.get(keys.reservations(host.name), Reservations)
    promised = found.value if found else Reservations(host=host.name)
    needed_gb = 2 * volume.size_gb - promised.volumes_gb.get(copy_id(volume.id), 0)
    free_gb = free_capacity(host, promised).disk_gb
    if needed_gb > free_gb:
        reason = f"{needed_gb} GB are needed, {free_gb} GB of its disk are free"
        raise Unplaceable(
            f"host {host.name} has no room for volume {volume.id} and the copy that it is made of: {reason}",
            {host.name: reason},
            hint="Free disk there, or take another host: `fly hosts list` shows what each has.",
        )


async def watch(ctx: ApiContext, move: VolumeMove) -> AsyncIterator[pb.MoveVolumeResponse]:
    """Each phase as it begins, to the end; Conflict with the reason if the move failed."""
    key, told, moved_bytes = keys.volume_move(move.volume.app, move.volume.id), "", 0
    stood_since_s: float | None = None
    while True:
        version = ctx.mirror.version
        found = ctx.mirror.get(key, VolumeMove)
        made = ctx.mirror.get(keys.volume(move.volume.app, move.new_id), Volume)
        phase = told
        if found is not None and found.value.new_id == move.new_id:
            phase, moved_bytes = found.value.phase, found.value.moved_bytes
        elif made is not None:
            phase = STARTING
        if phase == FAILED and found is not None:
            raise Conflict(
                f"volume {move.volume.id} was not moved: {found.value.error}",
                hint="It is where it was, and its machine as it was wanted. Moving it can be tried again.",
            )
        if phase not in ("", COPYING) and stood_since_s is None:
            stood_since_s = ctx.clock.monotonic_s()
        if phase != told:
            told = phase
            yield pb.MoveVolumeResponse(phase=phase, moved_bytes=moved_bytes)
        if made is not None and _runs(ctx, made.value):
            stood_s = ctx.clock.monotonic_s() - (stood_since_s or ctx.clock.monotonic_s())
            yield pb.MoveVolumeResponse(
                phase=DONE,
                moved_bytes=moved_bytes,
                volume=views.volume(made.value),
                downtime_s=stood_s if move.was is Desired.STARTED else 0.0,
            )
            return
        await _wait(ctx, version, told)


async def _wait(ctx: ApiContext, version: int, phase: str) -> None:
    try:
        async with asyncio.timeout(START_TIMEOUT_S if phase == STARTING else None):
            await ctx.mirror.wait_change(version)
    except TimeoutError:
        raise Unavailable(
            f"the volume was moved, and its machine has not started within {START_TIMEOUT_S:g} s",
            hint="`fly machine list` and `fly logs` show why.",
        ) from None


def _runs(ctx: ApiContext, volume: Volume) -> bool:
    """Whether the volume's machine is as it is wanted on the volume's host."""
    if not volume.attached_machine:
        return True
    machine = ctx.machine(volume.app, volume.attached_machine)
    if machine.desired is not Desired.STARTED:
        return True
    found = ctx.mirror.get(keys.status(volume.app, machine.id), MachineStatus)
    status = found.value if found else None
    return status is not None and status.host == volume.host and status.state is MachineState.STARTED
