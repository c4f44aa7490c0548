"""Publishing what a host says of its machines: status/<app>/<machine>.

Owns which statuses still have to be written. Invariants: each write is compared against
the claim, so a status exists only while its claim does and is written only by the host
that the claim names; while etcd is away what changed is kept, and the newest of it is
published when etcd is back. Called by host.py alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from flyd.errors import Unavailable
from flyd.model import Machine, MachineStatus, encode
from flyd.ports import KV, Put, Unchanged
from flyd.store import keys

log = structlog.get_logger(__name__)

COALESCE_S = 0.01  # a change goes out at once, those within this time after it as one
RETRY_S = 0.5  # after Unavailable, or after losing to another writer


class Statuses:
    """The statuses of one host. `status` answers the newest, `claim` the claim if it is ours."""

    def __init__(
        self,
        kv: KV,
        host: str,
        status: Callable[[str], MachineStatus | None],
        claim: Callable[[str], tuple[Machine, int] | None],
    ) -> None:
        self._kv = kv
        self._host = host
        self._status = status
        self._claim = claim
        self._waiting: dict[str, None] = {}
        self._published: dict[str, MachineStatus] = {}
        self._wakeup = asyncio.Event()

    def changed(self, machine_id: str) -> None:
        """A machine's status has (or may have) changed."""
        self._waiting[machine_id] = None
        self._wakeup.set()

    def claims_changed(self) -> None:
        """Claims have changed: what could not be written under the old ones may be now."""
        if self._waiting:
            self._wakeup.set()

    async def keep_published(self) -> None:
        """Publish what changed, for ever."""
        silent = False
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            try:
                for machine_id in list(self._waiting):
                    await self._publish(machine_id)
                silent = False
            except Unavailable as error:
                if not silent:
                    log.warning("host.publish_failed", host=self._host, error=str(error))
                silent = True
                await asyncio.sleep(RETRY_S)
                self._wakeup.set()
            await asyncio.sleep(COALESCE_S)

    async def _publish(self, machine_id: str) -> None:
        status, claim = self._status(machine_id), self._claim(machine_id)
        if status is None or claim is None:
            self._waiting.pop(machine_id, None)
            self._published.pop(machine_id, None)
            return
        if status != self._published.get(machine_id):
            if not await self._write(status, claim[1]):
                asyncio.get_running_loop().call_later(RETRY_S, self._wakeup.set)
                return
            self._published[machine_id] = status
        if self._status(machine_id) == status:
            self._waiting.pop(machine_id, None)

    async def _write(self, status: MachineStatus, claim_revision: int) -> bool:
        """One attempt; False: the claim or the status has just changed.

        The status' own revision is compared too: a write whose answer got lost may take effect
        late, and must then not undo a newer one.
        """
        key = keys.status(status.app, status.id)
        stored = await self._kv.get(key)
        on_claim = Unchanged(keys.machine(status.app, status.id), claim_revision)
        on_status = Unchanged(key, stored.mod_revision if stored else 0)
        return (await self._kv.txn((on_claim, on_status), (Put(key, encode(status)),))).succeeded
