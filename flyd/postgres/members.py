"""The machine side of a change of members: one more machine with a volume, or one less.

Whose word counts is pgha's (pgha/changes.py asks, the primary's agent walks). A new machine and the wish that
it be a member are one transaction: there is never one without the other. A machine is destroyed only once its
member is out for good. Both can be called again after a crash of this flyd.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from flyd.errors import Conflict
from flyd.model import Machine, MachineConfig, decode
from flyd.placement.placer import Placer
from flyd.placement.scheduler import Order
from flyd.ports import KV
from flyd.store import keys
from pgha import changes
from pgha.membership import everybody, in_flux
from pgha.model import Membership

ONLY_AT_THE_BEGINNING = ("PGHA_RESTORE_FROM", "PGHA_RESTORE_TO")


async def machines(kv: KV, cluster: str) -> dict[str, Machine]:
    """The members' machines, by member."""
    listing = await kv.list(f"{keys.MACHINES}{cluster}/")
    return {m.name: m for m in (decode(item.value, Machine) for item in listing.items)}


async def add(kv: KV, placer: Placer, cluster: str, region: str) -> str:
    """Place a machine in the region and ask for its membership; the member's name.

    Called while that region's member is being let in already: its name, nothing else.
    """
    record, made = await changes.membership(kv, cluster), await machines(kv, cluster)
    for name in in_flux(record):
        if name in record.target and name in made and made[name].region == region:
            return name
    name = next_name(cluster, record, list(made))
    wish = await changes.addition(kv, cluster, name)
    if not made:
        raise Conflict(f"Postgres cluster {cluster!r} has no machines: what would the new one be like?")
    config = newcomer(next(iter(made.values())).config, name, wish.record.target)
    order = Order(app=cluster, region=region, name=name, config=config)
    await placer.place_all([order], guards=wish.compares, effects=[wish.effect])
    return name


def next_name(cluster: str, record: Membership, machine_names: Sequence[str]) -> str:
    """The lowest number above all that there ever were."""
    taken = (*everybody(record.quorum), *record.target, *record.retired, *machine_names)
    numbers = [int(m[1]) for n in taken if (m := re.fullmatch(re.escape(cluster) + r"-(\d+)", n))]
    return f"{cluster}-{max(numbers, default=0) + 1}"


def newcomer(sibling: MachineConfig, name: str, members: Sequence[str]) -> MachineConfig:
    """As another member's machine, with a name and a volume of its own. Pure."""
    env = {key: value for key, value in sibling.env.items() if key not in ONLY_AT_THE_BEGINNING}
    return msgspec.structs.replace(
        sibling,
        env=env | {"PGHA_NODE": name, "PGHA_VOTERS": ",".join(members)},
        metadata=sibling.metadata | {"postgres_node": name},
        mounts=tuple(msgspec.structs.replace(mount, volume="") for mount in sibling.mounts),
    )


def standing(record: Membership, name: str) -> str:
    """What a member is to its cluster, in a word. Pure."""
    if name in in_flux(record):
        return "joining" if name in record.target else "leaving"
    return "member" if name in record.target else "removed"
