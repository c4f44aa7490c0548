"""Messages in Postgres, and the news of them in every region.

`Messages` survives the database moving to another host: a dead connection is thrown
away and the statement is tried again until a deadline. That is safe because a message
is stored once for each key. `News` hears of every committed message over one
connection of its own (LISTEN), and catches up after a gap.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from typing import Any, TypeVar

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool

T = TypeVar("T")
Message = dict[str, Any]  # id, key, author, text, region, sent_at (ISO 8601)

DEADLINE_S = 5.0  # for one request, with all its retries
RETRY_PAUSE_S = 0.05
ACQUIRE_TIMEOUT_S = 0.25  # short, so that each retry makes the pool try to connect again
RECONNECT_PAUSE_S = 0.25
SILENCE_S = 5.0  # without news for so long, ask: the connection may be dead
MAX_POOL = 8
MAX_AUTHOR_CHARS, MAX_TEXT_CHARS, MAX_KEY_CHARS = 40, 1000, 80
MAX_PAGE = 500
RECENT = 50
OVERLAP_IDS = 100  # ids are given before commit, so a smaller one may appear later
MAX_WAITING = 200  # messages that a slow listener may be behind
MAX_ID = 2**63 - 1

ISO_8601 = """'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'"""
COLUMNS = f"id, key, author, text, region, to_char(sent_at AT TIME ZONE 'utc', {ISO_8601}) AS sent_at"

# A repeated key must write too: the row may be there and not yet on a replica (its first
# sender was cut off while the commit waited), and only a commit of our own waits for that.
SAVE = f"""
WITH saved AS (
    INSERT INTO messages (key, author, text, region) VALUES (%(key)s, %(author)s, %(text)s, %(region)s)
    ON CONFLICT (key) DO UPDATE SET key = excluded.key
    RETURNING {COLUMNS}
)
SELECT saved.*, pg_notify('messages', row_to_json(saved)::text) FROM saved
"""
AFTER = f"SELECT {COLUMNS} FROM messages WHERE id > %s ORDER BY id LIMIT %s"
LATEST = f"SELECT * FROM (SELECT {COLUMNS} FROM messages ORDER BY id DESC LIMIT %s) newest ORDER BY id"

# The database is away, or we still talk to one that is no longer the primary.
AWAY = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction)

CONNECTION: dict[str, Any] = {
    "autocommit": True,
    "row_factory": dict_row,
    "application_name": "chat",
    "connect_timeout": 2,
    "keepalives_idle": 2,
    "keepalives_interval": 1,
    "keepalives_count": 3,
    "tcp_user_timeout": 4000,
}

log = logging.getLogger("uvicorn.error")
logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # each failed attempt; `News` tells of it once


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class DatabaseAway(Exception):
    """No database answered within the deadline. The message may or may not be stored: send it again."""


async def _check(connection: AsyncConnection[DictRow]) -> None:
    """Before each use: a connection that died in the pool is replaced, not handed out."""
    await connection.execute("")


class Messages:
    """Reading and writing messages. Use it as a context; it starts without a database too."""

    def __init__(self, url: str) -> None:
        self._pool = AsyncConnectionPool(
            url,
            connection_class=AsyncConnection[DictRow],
            kwargs=CONNECTION,
            min_size=1,
            max_size=MAX_POOL,
            timeout=ACQUIRE_TIMEOUT_S,
            reconnect_timeout=0,  # no back-off of the pool's own: requests ask again
            check=_check,
            open=False,
        )

    async def __aenter__(self) -> Messages:
        await self._pool.open(wait=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.close()

    async def save(self, *, key: str, author: str, text: str, region: str) -> Message:
        """Store the message once and return it, committed."""
        rows = await self._query(SAVE, {"key": key, "author": author, "text": text, "region": region})
        return {name: value for name, value in rows[0].items() if name != "pg_notify"}

    async def after(self, message_id: int) -> list[Message]:
        """At most MAX_PAGE messages with greater ids, oldest first."""
        return await self._query(AFTER, (message_id, MAX_PAGE))

    async def latest(self) -> list[Message]:
        """The RECENT newest messages, oldest first."""
        return await self._query(LATEST, (RECENT,))

    async def _query(self, statement: str, parameters: Any) -> list[Message]:
        reason = "it did not answer"
        try:
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    try:
                        return await self._query_once(statement, parameters)
                    except AWAY as error:
                        reason = _one_line(error)
                    await asyncio.sleep(RETRY_PAUSE_S)
        except TimeoutError:
            raise DatabaseAway(f"no database within {DEADLINE_S:g} s: {reason}") from None

    async def _query_once(self, statement: str, parameters: Any) -> list[Message]:
        async with self._pool.connection() as connection:
            try:
                cursor = await connection.execute(statement.encode(), parameters)
                return await cursor.fetchall()
            except AWAY:
                await connection.close()  # then the pool replaces it
                raise


class News:
    """Committed messages from all regions, handed to every listener in this process."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._listeners: list[asyncio.Queue[Message | None]] = []
        self._seen: deque[int] = deque(maxlen=4 * OVERLAP_IDS)
        self._newest = 0

    def listen(self) -> asyncio.Queue[Message | None]:
        """A queue of messages from now on; None says that the listener was too slow and is cut off."""
        queue: asyncio.Queue[Message | None] = asyncio.Queue()
        self._listeners.append(queue)
        return queue

    def leave(self, queue: asyncio.Queue[Message | None]) -> None:
        """Stop listening."""
        if queue in self._listeners:
            self._listeners.remove(queue)

    async def keep_listening(self) -> None:
        """For ever: listen, and connect again when the database moves."""
        told = False
        while True:
            try:
                async with await AsyncConnection[DictRow].connect(self._url, **CONNECTION) as connection:
                    await connection.execute("LISTEN messages")
                    while True:
                        async with asyncio.timeout(DEADLINE_S):
                            await self._catch_up(connection)
                        told = False
                        async for notice in connection.notifies(timeout=SILENCE_S):
                            self._tell(json.loads(notice.payload))
            except (*AWAY, psycopg.errors.UndefinedTable, TimeoutError) as error:
                if not told:
                    log.warning("chat.news_lost reason=%s", _one_line(error))
                    told = True
            await asyncio.sleep(RECONNECT_PAUSE_S)

    async def _catch_up(self, connection: AsyncConnection[DictRow]) -> None:
        if not self._newest:  # the first time: what is older was never news here
            cursor = await connection.execute("SELECT coalesce(max(id), 0) AS id FROM messages")
            self._newest = (await cursor.fetchall())[0]["id"]
            return
        while True:
            start = max(0, self._newest - OVERLAP_IDS)
            cursor = await connection.execute(AFTER.encode(), (start, MAX_PAGE))
            rows = await cursor.fetchall()
            for message in rows:
                self._tell(message)
            if len(rows) < MAX_PAGE:
                return

    def _tell(self, message: Message) -> None:
        if message["id"] in self._seen:
            return
        self._seen.append(message["id"])
        self._newest = max(self._newest, message["id"])
        for queue in list(self._listeners):
            if queue.qsize() < MAX_WAITING:
                queue.put_nowait(message)
            else:
                self.leave(queue)
                queue.put_nowait(None)
