"""Commits placements: one machine, or several that wait at the same time, by one etcd transaction.

What a transaction writes and compares is draft.py; this owns the trying. Whoever loses to another
placer looks again and decides again. `Placer` is a flyd's own: it decides on a sighting that
follows the mirror, and commits the orders that wait for it together, so that many cost etcd little
more than one.

Any flyd may place. A caller that gives the machine's id gets the same machine however
often it asks: an order whose outcome was unknown, or that a crashed deployer repeats, is
found instead of placed twice. What was placed is given back by the machine's host, once it
has destroyed the machine (flyd/machines/free.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from flyd.errors import Conflict, NotFound, OutcomeUnknown, Unavailable, Unplaceable
from flyd.model import Machine
from flyd.placement import ids
from flyd.placement.draft import Draft, request_of
from flyd.placement.scheduler import Order
from flyd.placement.snapshot import Follower
from flyd.placement.verdicts import Verdict, verdicts
from flyd.ports import KV, Clock, Delete, Entropy, Put, Unchanged
from flyd.store import keys
from flyd.store.mirror import Mirror

PLACE_ATTEMPTS = 24
"""Tries before a placement that keeps losing to others is given up."""

PLACE_BACKOFF_S = 0.02
"""Longest wait before the second try; grows by as much with each further one."""

MAX_EFFECTS = 100
"""Records in one transaction; etcd takes 128. One machine is two, and one for each of its volumes."""

TURN_S = 0.05
"""Longest wait, after a commit, for the mirror to show it before the next one: other flyds' turn.

Who goes on at once on what it alone knows wins every time, and the others' orders wait for seconds.
"""

CATCH_UP_S = 3.0
"""How long the mirror may stand still while etcd is ahead of it."""


class Placer:
    """A flyd's placer. The mirror must hold HOSTS, ALIVE, RESERVATIONS, VOLUMES and MACHINES.

    Where it also holds APPS, nothing is placed for an app that is destroyed meanwhile.
    """

    def __init__(self, kv: KV, mirror: Mirror, *, clock: Clock, entropy: Entropy) -> None:
        self._kv = kv
        self._mirror = mirror
        self._follower = Follower(mirror)
        self._clock = clock
        self._entropy = entropy
        self._turn = asyncio.Lock()
        self._committed = 0  # the revision of the newest commit
        self._waiting: list[_Waiting] = []

    async def place(self, order: Order, *, guards: Sequence[Unchanged] = ()) -> Machine:
        """One machine; `guards` are further compares (a leader's, a run's).

        Raises Unplaceable with each host's reason, Conflict when the compares keep failing.
        """
        order = _named(order, self._entropy)
        if guards:  # a guard that fails must fail nobody else
            return (await self.place_all([order], guards=guards))[0]
        mine = _Waiting(order, self._app_revision(order.app))
        self._waiting.append(mine)
        try:
            while not mine.ended:
                async with self._turn:
                    if not mine.ended:
                        await self._commit_waiting()
        finally:
            if mine in self._waiting:
                self._waiting.remove(mine)
        return mine.outcome()

    async def place_all(
        self,
        orders: Sequence[Order],
        *,
        guards: Sequence[Unchanged] = (),
        effects: Sequence[Put | Delete] = (),
    ) -> tuple[Machine, ...]:
        """Place all or none, together with further effects: one transaction."""
        batch = [_Waiting(_named(order, self._entropy), self._app_revision(order.app)) for order in orders]
        async with self._turn:
            await self._commit(batch, guards, effects, whole=True)
        return tuple(waiting.outcome() for waiting in batch)

    async def preview(self, orders: Sequence[Order]) -> tuple[Machine, ...]:
        """Where these would go, one after the other, or Unplaceable. Nothing is placed."""
        async with self._turn:
            await self._catch_up()
            draft = Draft(self._follower.look(), self._clock, self._entropy)
            try:
                return tuple(draft.place(_named(order, self._entropy)) for order in orders)
            finally:
                self._follower.forget(draft.records)

    async def verdicts(self, order: Order) -> tuple[Verdict, ...]:
        """What speaks for and against each host. Nothing is placed."""
        async with self._turn:
            await self._catch_up()
            return verdicts(request_of(order), self._follower.look().snapshot)

    async def _commit_waiting(self) -> None:
        """The oldest orders that wait, as many as one transaction takes."""
        batch: list[_Waiting] = []
        size = 0
        for waiting in self._waiting:
            size += 2 + len(waiting.order.config.mounts)
            if batch and size > MAX_EFFECTS:
                break
            batch.append(waiting)
        await self._commit(batch, (), (), whole=False)
        self._waiting = [waiting for waiting in self._waiting if not waiting.ended]

    async def _commit(
        self,
        batch: Sequence[_Waiting],
        guards: Sequence[Unchanged],
        effects: Sequence[Put | Delete],
        *,
        whole: bool,
    ) -> None:
        """End every order of the batch. `whole`: one that can not be placed refuses them all."""
        await self._leave_others_a_turn()
        current = False  # whether the sighting is known to be as new as the call
        for attempt in range(PLACE_ATTEMPTS):
            draft = Draft(self._follower.look(), self._clock, self._entropy)
            try:
                apps = {w.order.app: self._app_revision(w.order.app) for w in batch}
                refused = [w for w in batch if not w.ended and not w.try_on(draft, apps[w.order.app])]
                if refused and not current:
                    await self._catch_up()
                    current = True
                    continue
                if refused and whole:
                    raise refused[0].refusal or _given_up(refused[0].order)
                stand = [Unchanged(keys.app(app), revision) for app, revision in apps.items() if revision]
                if await self._write(draft, guards, stand, effects, attempt):
                    for waiting in batch:
                        waiting.ended = True
                    return
            finally:
                self._follower.forget(draft.records)
        for waiting in batch:
            waiting.refusal, waiting.ended = _given_up(waiting.order), True

    async def _write(
        self,
        draft: Draft,
        guards: Sequence[Unchanged],
        apps: Sequence[Unchanged],
        effects: Sequence[Put | Delete],
        attempt: int,
    ) -> bool:
        """One transaction. Past a failed one, the sighting is as new as its answer."""
        compares, records = draft.transaction()
        if not records and not effects:
            return True
        try:
            result = await self._kv.txn((*guards, *apps, *compares), (*records, *effects))
        except OutcomeUnknown as error:
            try:
                await self._catch_up()  # tells: the machines are there, or never will be by this txn
            except Unavailable:
                raise error from None
            return False
        if result.succeeded:
            self._follower.confirm(draft.records, result.revision)
            self._committed = result.revision
            return True
        await self._shown(result.revision)
        await wait_before_retry(self._kv, attempt, self._entropy, guards)
        return False

    def _app_revision(self, app: str) -> int:
        """Of the app's record; 0 where there is none, or none is mirrored."""
        found = self._mirror.get(keys.app(app), bytes)
        return found.mod_revision if found is not None else 0

    async def _leave_others_a_turn(self) -> None:
        try:
            async with asyncio.timeout(TURN_S):
                await self._mirror.wait_revision(self._committed)
        except TimeoutError:
            return

    async def _catch_up(self) -> None:
        """Wait until the mirror shows all that etcd has now."""
        await self._shown((await self._kv.list(keys.ALIVE)).revision)

    async def _shown(self, revision: int) -> None:
        """Wait until the mirror is as new as `revision`, for as long as it moves at all."""
        while (seen := self._mirror.revision) < revision:
            try:
                async with asyncio.timeout(CATCH_UP_S):
                    await self._mirror.wait_revision(seen + 1)
            except TimeoutError:
                raise Unavailable(
                    f"this flyd can not place: what it knows of etcd is {self._mirror.stale_s():.0f} s old",
                    hint="It comes back once etcd can be watched again; FLY_API names another flyd to ask.",
                ) from None


class _Waiting:
    """An order, and how it ended."""

    def __init__(self, order: Order, app_revision: int) -> None:
        self.order = order
        self.ended = False
        self.refusal: Unplaceable | Conflict | NotFound | None = None
        self._had_app = app_revision > 0
        self._machine: Machine | None = None

    def try_on(self, draft: Draft, app_revision: int) -> bool:
        """Place it on the draft; False: refused."""
        if self._had_app and not app_revision:
            self.refusal = NotFound(f"app {self.order.app!r} was destroyed meanwhile")
            return False
        try:
            self._machine, self.refusal = draft.place(self.order), None
        except Unplaceable as error:
            self.refusal = error
        return self.refusal is None

    def outcome(self) -> Machine:
        """The machine, or raises the refusal."""
        if self.refusal is not None or self._machine is None:
            raise self.refusal or _given_up(self.order)
        return self._machine


async def wait_before_retry(kv: KV, attempt: int, entropy: Entropy, guards: Sequence[Unchanged] = ()) -> None:
    """Let competitors pass: a wait by chance, longer with each attempt.

    Raises Conflict at once where it is a guard that failed: no retry makes it hold again.
    """
    for guard in guards:
        record = await kv.get(guard.key)
        if (record.mod_revision if record is not None else 0) != guard.mod_revision:
            raise Conflict(f"{guard.key} has changed meanwhile, so what depends on it was not done")
    share = int(entropy.token(1), 16) / 255
    await asyncio.sleep(PLACE_BACKOFF_S * (attempt + 1) * share)


def _named(order: Order, entropy: Entropy) -> Order:
    """The order with the id that all its attempts share."""
    if order.machine_id:
        return order
    return msgspec.structs.replace(order, machine_id=ids.new_machine_id(entropy))


def _given_up(order: Order) -> Conflict:
    return Conflict(
        f"machine {order.machine_id} of app {order.app} was not placed: others changed the same records "
        f"{PLACE_ATTEMPTS} times in a row",
        hint="Try again; if it stays, look for a program that places or frees machines in a loop.",
    )
