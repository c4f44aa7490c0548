"""EventsService: the history, oldest first."""

from __future__ import annotations

from typing import Any

from flyd.api import views
from flyd.api.context import ApiContext
from flyd.model import Event, decode
from flyd.store import keys
from flyd.v1 import events_pb2, events_pb2_grpc


class EventsServicer(events_pb2_grpc.EventsServiceServicer):
    """Events over gRPC."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def ListEvents(
        self, request: events_pb2.ListEventsRequest, context: Any
    ) -> events_pb2.ListEventsResponse:
        """Straight from etcd: history is read seldom and is not mirrored."""
        listing = await self._context.kv.list(f"{keys.EVENTS}{request.app_name}/")
        events = [decode(item.value, Event) for item in listing.items]
        return events_pb2.ListEventsResponse(
            events=[views.event(e) for e in events if e.at_s > request.since]
        )
