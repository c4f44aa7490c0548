"""PostgresService's part about members: machines by flyd/postgres, words by pgha, and the wait for both."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from flyd.api import views
from flyd.api.apps import check_regions
from flyd.api.context import ApiContext
from flyd.errors import InvalidInput, Unavailable
from flyd.machines import commands
from flyd.model import App, Desired, Machine, PostgresLeader, PostgresMember, Volume
from flyd.postgres import members
from flyd.storage import records
from flyd.store import keys
from flyd.v1 import postgres_pb2
from pgha import changes
from pgha.change import described
from pgha.keys import membership as membership_key
from pgha.membership import everybody, resting
from pgha.model import Membership

CHANGE_TIMEOUT_S = 3600.0  # a new member copies all data first
GONE_TIMEOUT_S = 60.0


async def list_members(context: ApiContext, cluster: App) -> postgres_pb2.ListMembersResponse:
    """By etcd's record, and what each last said of itself."""
    record = await changes.membership(context.kv, cluster.name)
    said = _said(context, cluster.name)
    made = await members.machines(context.kv, cluster.name)
    counted = dict.fromkeys((*everybody(record.quorum), *record.target))
    names = (*counted, *(n for n in record.retired if n in made))
    leader = context.mirror.get(keys.postgres_leader(cluster.name), PostgresLeader)
    primary = said.get(leader.value.node) if leader else None
    changing = not resting(record)
    return postgres_pb2.ListMembersResponse(
        members=[_shown(context, record, n, said.get(n), made.get(n)) for n in names],
        quorum=described(record.quorum),
        changing=changing,
        progress=primary.detail if changing and primary else "",
    )


def _said(context: ApiContext, cluster: str) -> dict[str, PostgresMember]:
    listed = context.mirror.list(keys.postgres_members(cluster), PostgresMember)
    return {item.value.node: item.value for item in listed}


def _shown(
    context: ApiContext, record: Membership, name: str, said: PostgresMember | None, machine: Machine | None
) -> postgres_pb2.PostgresMember:
    member = said or PostgresMember(
        node=name,
        region=machine.region if machine else "",
        address="",
        machine_id=machine.id if machine else "",
    )
    shown = views.postgres_member(member, machine is not None and context.alive(machine.host))
    shown.standing = members.standing(record, name)
    return shown


async def add(context: ApiContext, cluster: App, region: str) -> postgres_pb2.PostgresMember:
    """Wait until the new member's word counts."""
    if not region:
        raise InvalidInput("where is the new member to be?", hint="--region, for example --region fra")
    check_regions(context, [region])
    name = await members.add(context.kv, context.placer, cluster.name, region)
    record = await _wait(context, cluster.name, lambda r: resting(r) and name in (*r.target, *r.retired))
    if name in record.retired:
        raise Unavailable(f"{name} was taken out again before it was a member of {cluster.name}")
    made = await members.machines(context.kv, cluster.name)
    return _shown(context, record, name, _said(context, cluster.name).get(name), made.get(name))


async def remove(context: ApiContext, cluster: App, name: str) -> postgres_pb2.RemoveMemberResponse:
    """Its word first; then its machine, its volume, and what it last said."""
    kv, app = context.kv, cluster.name
    await changes.request_remove(kv, app, name)
    record = await _wait(context, app, lambda r: name in r.retired or name in r.target)
    if name not in record.retired:
        raise Unavailable(f"the removal of {name} from {app} was turned back meanwhile")
    machine = (await members.machines(kv, app)).get(name)
    if machine is not None:
        await commands.set_desired(kv, app, machine.id, Desired.DESTROYED)
        if not context.alive(machine.host):
            return postgres_pb2.RemoveMemberResponse(machine_left=True, machine_id=machine.id)
        held = [v.value for v in context.mirror.list(f"{keys.VOLUMES}{app}/", Volume)]
        await commands.wait_gone(context.mirror, machine, GONE_TIMEOUT_S)
        for volume in held:
            if volume.attached_machine == machine.id:
                await records.destroy(kv, app, volume.id, context.clock.wall_s(), entropy=context.entropy)
    await changes.forget(kv, app, name)
    return postgres_pb2.RemoveMemberResponse(machine_id=machine.id if machine else "")


async def _wait(context: ApiContext, cluster: str, reached: Callable[[Membership], bool]) -> Membership:
    """The record, once it is as wanted."""
    mirror, key = context.mirror, membership_key(cluster)
    await mirror.wait_revision((await context.kv.list(key)).revision)  # it has what was just asked for
    try:
        async with asyncio.timeout(CHANGE_TIMEOUT_S):
            while True:
                version, found = mirror.version, mirror.get(key, Membership)
                if found is not None and reached(found.value):
                    return found.value
                await mirror.wait_change(version)
    except TimeoutError:
        raise Unavailable(
            f"the members of {cluster} are not as wished after {CHANGE_TIMEOUT_S:.0f} s; the change goes on",
            hint=f"`fly postgres members list -a {cluster}` shows what it waits for.",
        ) from None
