"""A program: processes that append to lists and read them; each transaction's begin and end is written down.

    python -m integration.histories.client URI FILE --table T --launch N --seed S     until its input ends
    python -m integration.histories.client URI FILE --table T --launch N --read KEYS  reads keys 0 to KEYS

It runs wherever a client of the database may be: in a host that is killed or cut off, too. FILE is in Elle's
EDN, and what is in it survives this program's SIGKILL. Each process has a connection of its own, to which it
returns as an application's pool would: after an error that is not the transaction's alone, with a new one.
Standard output has a line for each acknowledged append, at most one every 50 ms: its time.

What an end means: `ok`, the answer to COMMIT was COMMIT. `fail`, it certainly did not happen: an error came
before COMMIT was sent, or said that the transaction was rolled back. `info`: the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import IO, LiteralString, cast

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus

from integration.histories import edn
from integration.histories.model import Append, Event, Read, Step, Type

SLOTS = 10  # keys in use at a time
LENGTH = 24  # a list this long is left alone, and the next key taken: reads stay short
MAX_STEPS = 4
READ_AT_ONCE = 16
PAUSE_S = 0.02  # between a process' transactions, on average
RETRY_S = 0.05
CONNECT_S = 2
DEADLINE_S = 5.0  # of a transaction: then its connection is cut
PROGRESS_S = 0.05
LAUNCH_PROCESSES = 10_000
LAUNCH_VALUES = 10_000_000

ROLLED_BACK = (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected)

Connection = psycopg.AsyncConnection[tuple[object, ...]]


class Recorder:
    """The file, and the progress on standard output."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._lines = itertools.count()
        self._said_s = 0.0

    def write(self, kind: Type, process: int, steps: tuple[Step, ...], error: str = "") -> None:
        """In the kernel's hands when this returns. Monotonic time is one for all containers of a machine."""
        event = Event(kind, process, time.monotonic_ns(), steps, error)
        self._file.write(edn.line(event, next(self._lines)) + "\n")
        self._file.flush()
        if kind == "ok" and any(isinstance(step, Append) for step in steps):
            now_s = time.monotonic()
            if now_s - self._said_s > PROGRESS_S:
                self._said_s = now_s
                print(event.time_ns, flush=True)


class Lists:
    """The statements on one table of lists."""

    def __init__(self, table: str, isolation: str) -> None:
        name = sql.Identifier(table)
        self._create = sql.SQL("CREATE TABLE IF NOT EXISTS {} (k bigint PRIMARY KEY, v bigint[])").format(
            name
        )
        self._begin = sql.SQL(cast(LiteralString, f"BEGIN ISOLATION LEVEL {isolation}"))
        self._read = sql.SQL("SELECT v FROM {} WHERE k = %s").format(name)
        self._append = sql.SQL(
            "INSERT INTO {0} VALUES (%s, ARRAY[%s]::bigint[]) "
            "ON CONFLICT (k) DO UPDATE SET v = {0}.v || excluded.v RETURNING cardinality(v)"
        ).format(name)
        self._newest = sql.SQL("SELECT k %% %s, max(k) FROM {} GROUP BY 1").format(name)

    async def newest(self, connection: Connection) -> dict[int, int]:
        """The key last used of each slot; the table is made if there is none."""
        await connection.execute(self._create)
        cursor = await connection.execute(self._newest, (SLOTS,))
        return {int(str(slot)): int(str(key)) for slot, key in await cursor.fetchall()}

    async def begin(self, connection: Connection) -> None:
        """At the isolation level that the history is of."""
        await connection.execute(self._begin)

    async def do(self, connection: Connection, step: Step) -> tuple[Step, int]:
        """The step as it was answered, and how long the list is now."""
        if isinstance(step, Append):
            cursor = await connection.execute(self._append, (step.key, step.value))
            row = await cursor.fetchone()
            assert row is not None
            return step, int(str(row[0]))
        cursor = await connection.execute(self._read, (step.key,))
        row = await cursor.fetchone()
        values = () if row is None else tuple(cast(list[int], row[0]))
        return Read(step.key, values), len(values)


class Workload:
    """What the processes of one launch ask: chance from a seed, values that nobody else appends."""

    def __init__(self, launch: int, seed: int) -> None:
        self._values = itertools.count(launch * LAUNCH_VALUES)
        self._chance = random.Random(seed * 1000 + launch)
        self._keys = list(range(SLOTS))

    def look(self, key: int, length: int) -> None:
        """A list was seen to be this long: leave it if that is enough."""
        if length >= LENGTH and key == self._keys[key % SLOTS]:
            self._keys[key % SLOTS] = key + SLOTS

    def skip(self, newest: dict[int, int]) -> None:
        """Others have come further."""
        for slot, key in newest.items():
            self._keys[slot] = max(key, self._keys[slot])

    def steps(self) -> tuple[Step, ...]:
        """The next transaction."""
        return tuple(self._step() for _ in range(self._chance.randint(1, MAX_STEPS)))

    def _step(self) -> Step:
        key = self._chance.choice(self._keys)
        return Append(key, next(self._values)) if self._chance.random() < 0.5 else Read(key)

    def pause_s(self) -> float:
        """Until a process' next transaction."""
        return self._chance.uniform(0, 2 * PAUSE_S)


class Process:
    """One client: a transaction at a time, on one connection."""

    def __init__(self, number: int, step: int, lists: Lists, recorder: Recorder, workload: Workload) -> None:
        self._number = number
        self._step = step  # to the number under which it goes on after an end that nobody knows
        self._lists = lists
        self._recorder = recorder
        self._workload = workload

    async def run(self, uri: str, stop: asyncio.Event) -> None:
        """Until stopped; the transaction under way is ended."""
        while not stop.is_set():
            with contextlib.suppress(psycopg.Error, OSError, TimeoutError):
                async with _connected(uri) as connection:
                    with _deadline(connection):
                        self._workload.skip(await self._lists.newest(connection))
                    while not stop.is_set() and _idle(connection):
                        await self.transaction(connection, self._workload.steps())
                        await asyncio.sleep(self._workload.pause_s())
            await asyncio.sleep(RETRY_S)

    async def transaction(self, connection: Connection, steps: tuple[Step, ...]) -> Type:
        """One, written down; how it ended. Its connection is idle afterwards if it is good for another."""
        self._recorder.write("invoke", self._number, steps)
        done: list[Step] = []
        committing = False
        try:
            with _deadline(connection):
                await self._lists.begin(connection)
                for step in steps:
                    seen, length = await self._lists.do(connection, step)
                    self._workload.look(step.key, length)
                    done.append(seen)
                committing = True
                answer = (await connection.execute("COMMIT")).statusmessage
        except (psycopg.Error, OSError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if isinstance(error, ROLLED_BACK):
                await self._roll_back(connection)
            elif committing:
                self._recorder.write("info", self._number, steps, why)
                self._number += self._step
                return "info"
            self._recorder.write("fail", self._number, steps, why)
            return "fail"
        if answer != "COMMIT":
            self._recorder.write("fail", self._number, steps, f"COMMIT was answered {answer}")
            return "fail"
        self._recorder.write("ok", self._number, tuple(done))
        return "ok"

    async def _roll_back(self, connection: Connection) -> None:
        with contextlib.suppress(psycopg.Error, OSError), _deadline(connection):
            await connection.execute("ROLLBACK")


@contextlib.asynccontextmanager
async def _connected(uri: str) -> AsyncGenerator[Connection]:
    connection = await psycopg.AsyncConnection.connect(
        uri,
        autocommit=True,  # BEGIN and COMMIT are ours
        connect_timeout=CONNECT_S,
        tcp_user_timeout=1500,
        keepalives_idle=1,
        keepalives_interval=1,
    )
    try:
        yield connection
    finally:
        connection.pgconn.finish()  # says nothing to the server, which may be gone


def _idle(connection: Connection) -> bool:
    return connection.pgconn.transaction_status == TransactionStatus.IDLE


@contextlib.contextmanager
def _deadline(connection: Connection) -> Generator[None]:
    """Cut the connection if it takes too long: a cancelled COMMIT would be answered, and mean nothing."""
    ours = socket.socket(fileno=os.dup(connection.fileno()))

    def cut() -> None:
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)

    timer = asyncio.get_running_loop().call_later(DEADLINE_S, cut)
    try:
        yield
    finally:
        timer.cancel()
        ours.close()


async def work(uri: str, lists: Lists, recorder: Recorder, launch: int, seed: int, processes: int) -> None:
    """Processes side by side until standard input ends."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    workload = Workload(launch, seed)
    async with asyncio.TaskGroup() as group:
        for n in range(processes):
            process = Process(launch * LAUNCH_PROCESSES + n, processes, lists, recorder, workload)
            group.create_task(process.run(uri, stop))


async def read(uri: str, lists: Lists, recorder: Recorder, launch: int, keys: int) -> None:
    """Every key up to this one. Raises psycopg's errors: nothing should be in the way by then."""
    process = Process(launch * LAUNCH_PROCESSES, 1, lists, recorder, Workload(launch, 0))
    async with _connected(uri) as connection:
        for first in range(0, keys + 1, READ_AT_ONCE):
            some = tuple(Read(key) for key in range(first, min(first + READ_AT_ONCE, keys + 1)))
            if await process.transaction(connection, some) != "ok":
                sys.exit(f"keys {first} and on could not be read: see the file's last line")


def main() -> None:
    """As told on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("uri")
    parser.add_argument("file", type=Path)
    parser.add_argument("--table", required=True)
    parser.add_argument("--launch", type=int, required=True, help="no two of one history have the same")
    parser.add_argument("--isolation", default="SERIALIZABLE")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--read", type=int, metavar="KEYS")
    told = parser.parse_args()
    lists = Lists(told.table, told.isolation)
    with told.file.open("a") as file:
        recorder = Recorder(file)
        if told.read is None:
            asyncio.run(work(told.uri, lists, recorder, told.launch, told.seed, told.processes))
        else:
            asyncio.run(read(told.uri, lists, recorder, told.launch, told.read))


if __name__ == "__main__":
    main()
