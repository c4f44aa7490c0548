"""The contract between the controller and one member's Postgres.

Real adapter: pgha/postgres.py. The simulator has a fake (WAL as a list). Both pass
tests/conformance/test_postgres.py. An adapter decides nothing.

What every adapter is given when it is made, and never changes: the member's own name and
address, and the members that the cluster began with. So `synchronous_standby_names` is
`ANY k (all others)` from before the first start on; `synchronise` puts others there, never nobody.

Postgres is *never* started outside recovery: `start` always makes a standby without
upstream, and `promote` is the only way out. So a crash always ends a term as primary.

Every call is bounded by a deadline of the adapter and raises `Unavailable` past it or when
Postgres is not there. All calls are idempotent. All but `kill`, `status` and `replicas` are made by one
task, one after the other; those three may come at any time, and whatever they interrupt raises `Unavailable`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from pgha.model import Answer, Data, Plea, Position, Replica, Status, Synchronous


class Postgres(Protocol):
    """One member's Postgres server and its data directory."""

    async def data(self) -> Data:
        """What is on disk (works while Postgres is down)."""
        ...

    async def save_promise(self, revision: int) -> None:
        """Record the promise; on return it would survive a power cut."""
        ...

    async def initialise(self) -> None:
        """`initdb` into an empty directory: timeline 1, all roles. All or nothing: a crash leaves it empty.

        `Refused` if there is data.
        """
        ...

    async def start(self) -> None:
        """Start as a standby without upstream (fenced), killing leftovers of an earlier run first.

        Returns once the server runs; `status().ready` says when it takes connections.
        """
        ...

    async def stop(self, timeout_s: float) -> bool:
        """Fast shutdown: a primary first hands all its WAL to its standbys. False: had to be killed."""
        ...

    async def kill(self) -> None:
        """On return every process of this data directory is dead: nothing more is acknowledged."""
        ...

    async def status(self) -> Status:
        """What Postgres is now; a server that is down or starting is an answer, not an error."""
        ...

    async def wait_ended(self) -> None:
        """Return soon after the server, or its walreceiver, has ended; it may also return without cause."""
        ...

    async def replicas(self) -> tuple[Replica, ...]:
        """As a primary: who streams from us and how far each has flushed. Strangers, too."""
        ...

    async def follow(self, address: str) -> None:
        """Stream from that server from now on."""
        ...

    async def fence(self) -> Position:
        """Stop streaming; answer where flushed WAL ends once nothing can add to it or acknowledge any more.

        The walreceiver's *process* is gone on return and stays away until `follow`.
        """
        ...

    async def synchronise(self, wanted: Synchronous) -> int:
        """Wait for these from now on; `status().synchronous` says so once no process goes by others.

        Answers an LSN past everything that a primary has acknowledged by earlier ones.
        """
        ...

    async def promote(self, timeline: int) -> int:
        """Leave recovery on exactly `timeline`; answers the LSN at which it left its parent.

        `InvariantBroken` if Postgres is out of recovery on another timeline.
        """
        ...

    async def checkpoint(self) -> None:
        """Write a checkpoint (so that others can rewind to us)."""
        ...

    async def rewind(self, address: str) -> bool:
        """Make our data directory an ancestor of that primary's. Postgres is down on return.

        From its beginning to its success `data().state` is DAMAGED. False: it cannot be done, copy instead.
        """
        ...

    async def copy(self, address: str) -> None:
        """Replace our data by a copy of that primary's. Postgres is down on return; DAMAGED until done."""
        ...


class Lookout(Protocol):
    """How another member's Postgres looks from here (pgha/lookout.py)."""

    async def ask(self, address: str, timeout_s: float) -> Answer:
        """Whether something there answers as a Postgres does; SILENT after `timeout_s` at the latest."""
        ...


class Voice(Protocol):
    """How the agents of a cluster reach each other without etcd (pgha/voice.py). Anything may get lost."""

    async def ask(self, address: str, plea: Plea, timeout_s: float) -> bool:
        """Whether that member's agent said yes to this question; False after `timeout_s` at the latest."""
        ...

    async def listen(self, answer: Callable[[Plea], Awaitable[bool]]) -> None:
        """Answer what other members ask, for ever. Who does not know the cluster's password is not heard."""
        ...


class Killer(Protocol):
    """What ends Postgres at the lease's deadline whatever the agent does (pgha/killer.py)."""

    def arm(self, deadline_s: float) -> None:
        """Postgres is to be dead at `deadline_s` of the monotonic clock, unless armed anew; 0: disarmed."""
        ...
