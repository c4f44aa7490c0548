"""pgha.ports.Voice on the simulated network: a question and its answer may each be swallowed by a cut."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from pgha.model import Plea
from tests.simulation.loop import current
from tests.simulation.postgres import PORT, PostgresHost

Heard = asyncio.Queue[tuple[Plea, Callable[[bool], None]]]


class SimulatedVoice:
    """One for each run of an agent; `ears` are those of the whole cluster, by the member's name."""

    def __init__(self, host: PostgresHost, ears: dict[str, Heard]) -> None:
        self._host = host
        self._ears = ears

    async def ask(self, address: str, plea: Plea, timeout_s: float) -> bool:
        name, network = address.removesuffix(PORT), self._host.network
        said: asyncio.Future[bool] = current().create_future()

        def settle(yes: bool) -> None:
            if not said.done():
                said.set_result(yes)

        def reply(yes: bool) -> None:
            network.send(name, self._host.name, lambda: settle(yes))

        def arrive() -> None:
            if name in self._ears:
                self._ears[name].put_nowait((plea, reply))

        network.send(self._host.name, name, arrive)
        try:
            async with asyncio.timeout(timeout_s):
                return await said
        except TimeoutError:
            return False

    async def listen(self, answer: Callable[[Plea], Awaitable[bool]]) -> None:
        heard: Heard = asyncio.Queue()
        self._ears[self._host.name] = heard

        async def settle(plea: Plea, reply: Callable[[bool], None]) -> None:
            reply(await answer(plea))

        async with asyncio.TaskGroup() as group:
            while True:
                plea, reply = await heard.get()
                group.create_task(settle(plea, reply))
