"""A chat over WebSockets and HTTP, one process of many in several regions."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from messages import (
    MAX_AUTHOR_CHARS,
    MAX_ID,
    MAX_KEY_CHARS,
    MAX_TEXT_CHARS,
    DatabaseAway,
    Message,
    Messages,
    News,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

REGION = os.environ.get("FLY_REGION", "local")
MACHINE = os.environ.get("FLY_MACHINE_ID", "local")
PAGE = Path(__file__).parent / "page.html"
RETRY_AFTER_S = 1
TOO_SLOW = 1013  # WebSocket close code: try again later
LIMITS = {"author": MAX_AUTHOR_CHARS, "text": MAX_TEXT_CHARS, "key": MAX_KEY_CHARS}


class Unusable(Exception):
    """What the client sent can not be a message."""


async def page(_: Request) -> Response:
    return FileResponse(PAGE)


async def healthz(_: Request) -> Response:
    """Whether this process serves. The database is not asked: restarting us would not bring it back."""
    return PlainTextResponse("ok\n")


async def list_messages(request: Request) -> Response:
    after = request.query_params.get("after", "0")
    if not (after.isascii() and after.isdigit() and int(after) <= MAX_ID):
        return _failure(400, "invalid", f"after must be the id of a message, not {after!r}")
    try:
        rows = await _messages(request).after(int(after))
    except DatabaseAway as away:
        return _failure(503, "database_away", str(away))
    return JSONResponse({"region": REGION, "machine": MACHINE, "messages": rows})


async def post_message(request: Request) -> Response:
    try:
        message = await _messages(request).save(**_fields(await request.body()), region=REGION)
    except Unusable as unusable:
        return _failure(400, "invalid", str(unusable))
    except DatabaseAway as away:
        return _failure(503, "database_away", str(away))
    return JSONResponse({**message, "machine": MACHINE}, status_code=201)


async def socket(websocket: WebSocket) -> None:
    await websocket.accept()
    news = cast(News, websocket.app.state.news)
    queue = news.listen()
    try:
        await _send(websocket, {"type": "hello", "region": REGION, "machine": MACHINE})
        await _send_recent(websocket)
        async with asyncio.TaskGroup() as tasks:
            sender = tasks.create_task(_send_news(websocket, queue))
            await _receive(websocket)
            sender.cancel()
    except* WebSocketDisconnect:
        pass  # the client is gone: there is nobody to tell
    finally:
        news.leave(queue)


async def _send_recent(websocket: WebSocket) -> None:
    try:
        for message in await _messages(websocket).latest():
            await _send(websocket, {"type": "message", **message})
    except DatabaseAway as away:
        await _send(websocket, {"type": "notice", "reason": str(away)})


async def _send_news(websocket: WebSocket, queue: asyncio.Queue[Message | None]) -> None:
    while (message := await queue.get()) is not None:
        await _send(websocket, {"type": "message", **message})
    await websocket.close(TOO_SLOW, "too slow: connect again")


async def _receive(websocket: WebSocket) -> None:
    """Store what the client sends until it goes; each message is answered by saved or failed."""
    while (frame := await websocket.receive())["type"] != "websocket.disconnect":
        try:
            fields = _fields(frame.get("bytes") or (frame.get("text") or "").encode(errors="replace"))
        except Unusable as unusable:
            await _send(websocket, {"type": "failed", "reason": str(unusable), "retry": False})
            continue
        try:
            message = await _messages(websocket).save(**fields, region=REGION)
            await _send(websocket, {"type": "saved", "key": fields["key"], "id": message["id"]})
        except DatabaseAway as away:
            await _send(
                websocket, {"type": "failed", "key": fields["key"], "reason": str(away), "retry": True}
            )


def _fields(body: bytes) -> dict[str, str]:
    """The author, text and key of a message."""
    try:
        given: object = json.loads(body)
    except (ValueError, RecursionError):
        raise Unusable("expected JSON with author, text and key") from None
    if not isinstance(given, dict):
        raise Unusable("expected a JSON object with author, text and key")
    fields = cast("dict[str, object]", given)
    return {name: _field(fields.get(name), name, limit) for name, limit in LIMITS.items()}


def _field(value: object, name: str, limit: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Unusable(f"{name} is missing")
    if len(value) > limit:
        raise Unusable(f"{name} is longer than {limit} characters")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise Unusable(f"{name} holds characters that are no text")
    return value


def _failure(status: int, error: str, reason: str) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    content = {"error": error, "reason": reason, "region": REGION, "machine": MACHINE}
    return JSONResponse(content, status_code=status, headers=headers)


async def _send(websocket: WebSocket, frame: dict[str, Any]) -> None:
    if websocket.application_state is not WebSocketState.CONNECTED:
        raise WebSocketDisconnect(TOO_SLOW)  # we closed it ourselves, in _send_news
    await websocket.send_text(json.dumps(frame))


def _messages(connection: Request | WebSocket) -> Messages:
    return cast(Messages, connection.app.state.messages)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncGenerator[None]:
    url = os.environ.get("DATABASE_URL", "")
    if not url:
        raise RuntimeError("DATABASE_URL is not set: attach a database (fly postgres attach)")
    app.state.news = News(url)
    async with Messages(url) as messages, asyncio.TaskGroup() as tasks:
        app.state.messages = messages
        listening = tasks.create_task(app.state.news.keep_listening())
        yield
        listening.cancel()


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/", page),
        Route("/healthz", healthz),
        Route("/api/messages", list_messages, methods=["GET"]),
        Route("/api/messages", post_message, methods=["POST"]),
        WebSocketRoute("/ws", socket),
    ],
)
