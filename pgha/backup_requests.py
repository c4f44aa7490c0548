"""What others may ask about a cluster's backups, beyond one more: see requests.py. Called by the API."""

from __future__ import annotations

from flyd.errors import Conflict, InvalidInput, NotFound, Refused
from flyd.model import decode, encode
from flyd.ports import KV, Delete, Put, Unchanged
from pgha import keys
from pgha.backup_plan import ArchiveState, Drill, DrillResult, Schedule
from pgha.disk import Storage
from pgha.requests import taken

MIN_EVERY_S = 60.0
MAX_EVERY_S = 3650 * 86400.0


async def set_schedule(kv: KV, cluster: str, schedule: Schedule) -> None:
    """From now on; the first is taken at once if the newest complete one is older than `every_s`."""
    for what, every_s in (("backup", schedule.every_s), ("trial restore", schedule.verify_every_s)):
        never = what == "trial restore" and every_s == 0
        if not never and not MIN_EVERY_S <= every_s <= MAX_EVERY_S:  # nor NaN
            raise InvalidInput(f"no {what} can be every {every_s:g} s", hint="from 1m to 3650d")
    if schedule.keep < 1:
        raise InvalidInput("at least one backup is kept", hint="--keep 7")
    await kv.txn([], [Put(keys.schedule(cluster), encode(schedule))])


async def clear_schedule(kv: KV, cluster: str) -> None:
    """Nothing is taken, tried or dropped by itself any more."""
    await kv.txn([], [Delete(keys.schedule(cluster))])


async def schedule_of(kv: KV, cluster: str) -> Schedule | None:
    """The one in force."""
    item = await kv.get(keys.schedule(cluster))
    return None if item is None else decode(item.value, Schedule)


async def archive_state(kv: KV, cluster: str) -> ArchiveState:
    """How far each backup reaches, as the primary last found."""
    item = await kv.get(keys.archive(cluster))
    return ArchiveState() if item is None else decode(item.value, ArchiveState)


async def drill_results(kv: KV, cluster: str) -> dict[str, DrillResult]:
    """The last trial restore of each backup."""
    found = [decode(i.value, DrillResult) for i in (await kv.list(keys.drill_results(cluster))).items]
    return {result.backup: result for result in found}


async def storage(kv: KV, cluster: str) -> list[Storage]:
    """What each member last said of its disk and its archiver."""
    return [decode(item.value, Storage) for item in (await kv.list(keys.storages(cluster))).items]


async def request_drill(kv: KV, cluster: str, backup: str, now_wall_s: float) -> str:
    """Ask a replica for a trial restore of that backup (empty: the newest complete one); answers which."""
    complete = [b for b in await taken(kv, cluster) if b.finished_at_s]
    if not complete:
        raise Refused(f"{cluster} has no backup yet", hint=f"fly postgres backup create -a {cluster}")
    name = backup or max(complete, key=lambda b: b.finished_at_s).name
    if name not in [b.name for b in complete]:
        raise NotFound(
            f"{cluster} has no complete backup {name!r}", hint=f"fly postgres backup list -a {cluster}"
        )
    key, wish = keys.drill(cluster), Drill(backup=name, requested_at_s=now_wall_s)
    if not (await kv.txn([Unchanged(key, 0)], [Put(key, encode(wish))])).succeeded:
        raise Conflict(f"a trial restore of {cluster} is under way", hint="wait until it has ended")
    return name
