"""Stops that go on: each waits for its machine's end, up to a day, and can be asked to hurry.

Owns how a machine is stopped now: the newest wish of its claim counts, also for a stop that is
already under way (a drain of two hours is cut short by a stop of five seconds, or made longer).
A stop that waits takes no worker's place in host.py. If flyd ends meanwhile, the next one stops
the machine anew, with the whole time again.

Called by the HALT step of operations.py; host.py says when a claim changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from flyd.errors import Unavailable
from flyd.machines.states import MAX_STOP_TIMEOUT_S, STOP_MARGIN_S
from flyd.model import ExitStatus, Machine, StopConfig
from flyd.ports import Driver


def stop_of(claim: Machine) -> StopConfig:
    """How a machine is to be stopped: as it was asked for, else as its configuration says."""
    stop = claim.stop or claim.config.stop
    return StopConfig(signal=stop.signal, timeout_s=min(stop.timeout_s, MAX_STOP_TIMEOUT_S))


class Halts:
    """The stops under way on one host. `newest` answers a machine's claim as of now.

    `began` is called when a stop begins to wait: whoever does it has time for others.
    """

    def __init__(
        self,
        driver: Driver,
        newest: Callable[[Machine], Machine] = lambda claim: claim,
        began: Callable[[], None] = lambda: None,
    ) -> None:
        self._driver = driver
        self._newest = newest
        self._began = began
        self._waits: dict[str, tuple[Machine, StopConfig, asyncio.Timeout]] = {}

    def count(self) -> int:
        """How many stops are under way."""
        return len(self._waits)

    def hurry(self, machine_id: str) -> None:
        """The claim has changed: if it wants another stop than the one under way, that one begins anew."""
        found = self._waits.get(machine_id)
        if found is None:
            return
        claim, stop, scope = found
        if stop_of(self._newest(claim)) != stop and not scope.expired():
            scope.reschedule(asyncio.get_running_loop().time())

    async def halt(self, claim: Machine, most_s: float = MAX_STOP_TIMEOUT_S) -> ExitStatus | None:
        """End the machine within `most_s`, and answer how; None if it never ran, or ended unasked.

        Done again it answers the same. Raises Unavailable if the driver does not end it
        within the wish's timeout and STOP_MARGIN_S.
        """
        while True:
            stop = stop_of(self._newest(claim))
            scope = asyncio.timeout(None)
            self._waits[claim.id] = (claim, stop, scope)
            self._began()
            try:
                async with scope:
                    return await self._stop(claim.id, stop.signal, min(stop.timeout_s, most_s))
            except TimeoutError:
                if not scope.expired():
                    raise
            finally:
                del self._waits[claim.id]

    async def _stop(self, machine_id: str, signal: str, timeout_s: float) -> ExitStatus | None:
        limit = asyncio.timeout(timeout_s + STOP_MARGIN_S)
        try:
            async with limit:
                exit = await self._driver.stop(machine_id, signal, timeout_s)
        except TimeoutError:
            if not limit.expired():
                raise
            raise Unavailable(
                f"not ended {STOP_MARGIN_S:g} s after {signal} and its {timeout_s:g} s",
                hint="Is its host's disk or engine stuck? flyd's log on that host tells more.",
            ) from None
        if exit is not None:
            return exit
        seen = await self._driver.look(machine_id)
        return seen.exit if seen is not None and seen.exit is not None and seen.exit.requested else None
