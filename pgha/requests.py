"""What people ask of a cluster; carried out by its members (pgha/decide.py)."""

from __future__ import annotations

from flyd.model import encode
from flyd.ports import KV, Clock
from pgha import keys
from pgha.model import Switchover


async def request_switchover(kv: KV, cluster: str, target: str, clock: Clock) -> None:
    """Ask the primary to hand over to `target`, or to the best replica if it is empty."""
    wish = Switchover(target=target, requested_at_s=clock.wall_s())
    await kv.put(keys.switchover(cluster), encode(wish))
