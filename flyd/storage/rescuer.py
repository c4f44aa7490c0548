"""The elected loop that brings lost hosts' volumes back where their owners' rules allow it.

Decides nothing: recovery_rule.py. Does nothing itself either: it asks the host that has the newest copy,
which does what `fly volumes recover` does (recovery.py), all or nothing. So a deposed leader that asks late
changes nothing that a person could not have, and never that of a host which gives signs of life. A silence is
counted from when this flyd began to lead: late, never early. Run by flyd/daemon.py in the leader's scope.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from flyd.errors import FlydError
from flyd.hosts.membership import LEASE_TTL_S
from flyd.model import Event, Host, Volume, encode
from flyd.model.cluster import LossRule
from flyd.placement.loss import Silence, track
from flyd.ports import KV, Clock, Put, Unchanged
from flyd.storage.copies import VolumeCopy, copies_prefix
from flyd.storage.recovery_rule import Verdict, judge
from flyd.store import keys
from flyd.store.mirror import Mirror

log = structlog.get_logger(__name__)

LOOK_S = 2.0
AGAIN_S = 30.0  # after a recovery that failed
RECOVERING = "volume.recovering"
RECOVERY_HELD = "volume.recovery_held"

Recover = Callable[[str, str, str], Awaitable[None]]
"""Has a host bring a volume back from its copy: host, app, volume."""


class VolumeRescuer:
    """One flyd's, for as long as it leads."""

    def __init__(self, kv: KV, mirror: Mirror, recover: Recover, *, clock: Clock) -> None:
        self._kv = kv
        self._mirror = mirror
        self._recover = recover
        self._clock = clock
        self._silences: dict[str, Silence] = {}
        self._told: dict[str, str] = {}  # volume -> why it was said to stay lost
        self._not_before_s: dict[str, float] = {}  # monotonic, by volume

    async def keep_rescuing(self, guard: Unchanged) -> None:
        """Look every LOOK_S until leadership ends (cancels) this."""
        self._silences.clear()
        await self._mirror.wait_synced()
        while True:
            try:
                await self.look(guard)
            except FlydError as error:
                log.warning("volumes.rescue_failed", error=error.message)
            await asyncio.sleep(LOOK_S)

    async def look(self, guard: Unchanged) -> None:
        """Every volume with a rule whose host is silent, once."""
        hosts = {item.value.name: item.mod_revision for item in self._mirror.list(keys.HOSTS, Host)}
        signs = (keys.last_part(item.key) for item in self._mirror.list(keys.ALIVE, bytes))
        alive = [name for name in signs if name in hosts]
        now_s = self._clock.monotonic_s()
        self._silences = track(self._silences, hosts, alive, now_s)
        found = self._mirror.get(keys.HOST_LOSS, LossRule)
        grace_s = (found.value if found else LossRule()).grace_s
        for volume in [item.value for item in self._mirror.list(keys.VOLUMES, Volume)]:
            silence = self._silences.get(volume.host)
            if silence is None or not volume.recover_max_age_s:
                self._told.pop(volume.id, None)
                continue
            verdict = judge(
                volume,
                [item.value for item in self._mirror.list(copies_prefix(volume), VolumeCopy)],
                alive,
                list(self._silences),
                silent_s=now_s - silence.since_s + LEASE_TTL_S,
                grace_s=grace_s,
                now_s=self._clock.wall_s(),
            )
            await self._carry_out(volume, verdict, guard)

    async def _carry_out(self, volume: Volume, verdict: Verdict, guard: Unchanged) -> None:
        if verdict.held:
            await self._tell(volume, verdict.held, guard)
        if not verdict.host or self._not_before_s.get(volume.id, 0.0) > self._clock.monotonic_s():
            return
        self._not_before_s[volume.id] = self._clock.monotonic_s() + AGAIN_S
        text = (
            f"host {volume.host} of volume {volume.name} ({volume.id}) is lost: it comes back from the copy "
            f"on {verdict.host}, which was {verdict.age_s:.0f} s old when the host fell silent "
            f"(its rule allows {volume.recover_max_age_s:.0f} s)"
        )
        await self._write(volume, RECOVERING, text, guard)
        try:
            await self._recover(verdict.host, volume.app, volume.id)
        except FlydError as error:
            log.warning("volumes.not_recovered", volume=volume.id, error=error.message)
            await self._tell(volume, error.message, guard)

    async def _tell(self, volume: Volume, why: str, guard: Unchanged) -> None:
        """Once for each reason."""
        if self._told.get(volume.id) == why:
            return
        text = f"volume {volume.name} ({volume.id}) of lost host {volume.host} stays there: {why}"
        await self._write(volume, RECOVERY_HELD, text, guard)
        self._told[volume.id] = why

    async def _write(self, volume: Volume, kind: str, message: str, guard: Unchanged) -> None:
        at_s = self._clock.wall_s()
        fields = {"volume": volume.id, "host": volume.host}
        line = Event(at_s=at_s, app=volume.app, source=volume.id, kind=kind, message=message, fields=fields)
        key = keys.event(volume.app, at_s, f"{volume.id}-{kind.rpartition('.')[2]}")
        await self._kv.txn((guard,), (Put(key, encode(line)),))
