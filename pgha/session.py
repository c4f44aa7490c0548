"""SQL to Postgres: one connection, opened when needed, closed at the first trouble; deadlines always.

Called by pgha/postgres.py. Every trouble is `Unavailable`.
"""

from __future__ import annotations

import asyncio
from typing import Any, LiteralString, cast

import psycopg
from psycopg.conninfo import make_conninfo

from flyd.errors import Unavailable

QUERY_S = 1.0
PROBE_S = 10.0

Row = tuple[Any, ...]


class SqlSession:
    """A superuser's connection over the private socket; one query at a time."""

    def __init__(self, socket_dir: str, port: int, user: str) -> None:
        self._conninfo = make_conninfo(
            host=socket_dir, port=port, user=user, dbname="postgres", application_name="pgha"
        )
        self._connection: psycopg.AsyncConnection[Row] | None = None
        self._busy = asyncio.Lock()

    async def query(self, sql: str, timeout_s: float = QUERY_S) -> list[Row]:
        """The rows of one statement."""
        async with self._busy:
            try:
                async with asyncio.timeout(timeout_s):
                    connection = await self._connected()
                    cursor = await connection.execute(cast(LiteralString, sql))
                    return await cursor.fetchall() if cursor.description is not None else []
            except (psycopg.Error, OSError, TimeoutError) as error:
                await self._drop()
                raise Unavailable(f"Postgres did not answer: {_first_line(error)}") from error
            except asyncio.CancelledError:
                await self._drop()
                raise

    async def close(self) -> None:
        """Forget the connection; the next query opens another."""
        async with self._busy:
            await self._drop()

    async def _connected(self) -> psycopg.AsyncConnection[Row]:
        if self._connection is None:
            self._connection = await psycopg.AsyncConnection.connect(self._conninfo, autocommit=True)
        return self._connection

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


async def probe(address: str, user: str, password: str, sql: LiteralString) -> None:
    """One statement on another member's server; Unavailable if that does not work."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(PROBE_S):
            connection = await psycopg.AsyncConnection.connect(
                autocommit=True,
                host=host.strip("[]"),
                port=port,
                user=user,
                password=password,
                dbname="postgres",
                connect_timeout=2,
            )
            async with connection:
                await connection.execute(sql)
    except (psycopg.Error, OSError, TimeoutError) as error:
        raise Unavailable(f"{address} did not answer: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
