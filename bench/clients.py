"""The clients of bench/failover.py, and what they remember of each row that was acknowledged.

One goes where writes are taken: it keeps a session with every member, asks those that are not primary
again and again whether they are by now, and leaves one that has not answered an insert for INSERT_S. The
other stays with the member that it was given, whatever happens. Both are the same for every rig.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

import psycopg

from bench.rig import Rig

INSERT_S = 0.5  # the client leaves a member that takes longer
CONNECT_S = 1.0
ASK_S = 0.5  # a member that does not answer is asked on a new session
ASK_EVERY_S = 0.005

Connection = psycopg.AsyncConnection[tuple[object, ...]]


class Ledger:
    """What was acknowledged, when, and by whom."""

    def __init__(self) -> None:
        self.numbers = 0
        self.acks: list[tuple[int, float, str]] = []  # to the client that goes where writes are taken
        self.stayed: list[tuple[int, float, float, str]] = []  # likewise, and when asked, to who stays

    def next(self) -> int:
        """A number whose fate is unknown is not used again."""
        self.numbers += 1
        return self.numbers


async def connect(rig: Rig, node: str) -> Connection:
    """A session on one member."""
    host, _, port = rig.addresses[node].rpartition(":")
    return await psycopg.AsyncConnection.connect(
        f"host={host} port={port} user=postgres dbname=postgres", password=rig.password, autocommit=True
    )


async def connect_writable(rig: Rig) -> tuple[str, Connection]:
    """A session on the first member that is out of recovery; none waits for another's answer."""
    tasks = [asyncio.ensure_future(_until_writable(rig, node)) for node in sorted(rig.addresses)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return min((task.result() for task in done), key=lambda found: found[0])
    finally:
        for task in tasks:
            task.cancel()


async def _until_writable(rig: Rig, node: str) -> tuple[str, Connection]:
    """A session with this member, from when it is out of recovery; asked on one session while that lasts."""
    while True:
        with contextlib.suppress(psycopg.Error, OSError, TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                connection = await connect(rig, node)
            try:
                while not await _takes_writes(connection):
                    await asyncio.sleep(ASK_EVERY_S)
            except BaseException:
                await connection.close()
                raise
            return node, connection
        await asyncio.sleep(ASK_EVERY_S)


async def _takes_writes(connection: Connection) -> bool:
    async with asyncio.timeout(ASK_S):
        row = await (await connection.execute("SELECT pg_is_in_recovery()")).fetchone()
    return row == (False,)


async def write(rig: Rig, ledger: Ledger) -> None:
    """Rows without pause, where they are taken, for ever."""
    left: list[asyncio.Task[None]] = []  # inserts that nobody waits for: to cancel one would block
    while True:
        with contextlib.suppress(psycopg.Error, OSError, TimeoutError):
            node, connection = await connect_writable(rig)
            while True:
                insert = asyncio.create_task(_insert_one(connection, ledger, node))
                if not (await asyncio.wait({insert}, timeout=INSERT_S))[0]:
                    left.append(insert)
                    insert.add_done_callback(_forget)
                    break
                insert.result()
        await asyncio.sleep(ASK_EVERY_S)


def _forget(insert: asyncio.Task[None]) -> None:
    """Nobody waits for it any more: its end is no news."""
    if not insert.cancelled():
        insert.exception()


async def _insert_one(connection: Connection, ledger: Ledger, node: str) -> None:
    """One row, noted when it is acknowledged."""
    number = ledger.next()
    await connection.execute("INSERT INTO rows VALUES (%s)", (number,))
    ledger.acks.append((number, time.monotonic(), node))


async def stay(rig: Rig, ledger: Ledger, node: str) -> None:
    """Rows without pause at `node`, until that fails."""
    with contextlib.suppress(psycopg.Error, OSError):
        connection = await connect(rig, node)
        async with connection:
            while True:
                number, asked_s = ledger.next(), time.monotonic()
                await connection.execute("INSERT INTO rows VALUES (%s)", (number,))
                ledger.stayed.append((number, asked_s, time.monotonic(), node))
