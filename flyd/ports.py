"""The contracts between the deciding code and the outside world.

Each protocol here has a real adapter (named after the outside thing it touches), a
fake for unit tests and simulation, and one conformance suite in tests/conformance
that both pass. Adapters decide nothing; callers never learn which one they have.
Only flyd/daemon.py, pgha/main.py and the tests' worlds choose adapters.

Virtual time: code waits with `asyncio.sleep` and `asyncio.timeout`, so under the
simulator (tests/simulation/loop.py) waiting is free. `Clock.monotonic_s` must be the
loop's clock there; nothing else may ask the system for the time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from flyd.model import (
    BlobNeed,
    BlobPart,
    ExecOutput,
    ExitStatus,
    HeldImage,
    ImageMove,
    ImagePlan,
    LogLine,
    MachineSpec,
    Observed,
    RunEvent,
)
from flyd.model.machine import Process

# --------------------------------------------------------------------------- time and chance


class Clock(Protocol):
    """Time, given from outside."""

    def monotonic_s(self) -> float:
        """Seconds on a clock that never jumps; comparable only within one process."""
        ...

    def wall_s(self) -> float:
        """Seconds since the epoch, for people and records; never for a decision."""
        ...


class Entropy(Protocol):
    """Chance, given from outside."""

    def token(self, n_bytes: int) -> str:
        """`n_bytes` of randomness as lower-case hex."""
        ...


# --------------------------------------------------------------------------- the shared store


class KeyValue(msgspec.Struct, frozen=True):
    """One key as it stood at some revision."""

    key: str
    value: bytes
    mod_revision: int  # revision of the last put
    create_revision: int  # revision of the put that created it
    lease: int = 0  # 0: not bound to a lease


class Listing(msgspec.Struct, frozen=True):
    """All keys under a prefix, in key order, as of one revision."""

    revision: int
    items: tuple[KeyValue, ...]


class Unchanged(msgspec.Struct, frozen=True):
    """Compare: the key's last put was at `mod_revision`; 0 means that the key is absent."""

    key: str
    mod_revision: int


class Put(msgspec.Struct, frozen=True):
    """Effect: set the key, bound to a lease unless `lease` is 0."""

    key: str
    value: bytes
    lease: int = 0


class Delete(msgspec.Struct, frozen=True):
    """Effect: remove the key; removing an absent key is no error."""

    key: str


class TxnResult(msgspec.Struct, frozen=True):
    """Whether all compares held (then all effects happened, at `revision`)."""

    succeeded: bool
    revision: int


class Change(msgspec.Struct, frozen=True):
    """One event of a watch: the new value, or None for a deletion (also by lease expiry)."""

    key: str
    value: KeyValue | None
    mod_revision: int


class WatchBatch(msgspec.Struct, frozen=True):
    """Changes that took effect up to and including `revision`, in order; none: a sign of life."""

    revision: int
    changes: tuple[Change, ...]


class KV(Protocol):
    """A linearizable store with compare-and-set, leases and watches: etcd v3.

    Every call has a deadline (the adapter's, REQUEST_TIMEOUT_S) and raises
    `Unavailable` past it. A `txn` whose answer got lost raises `OutcomeUnknown`:
    it may have happened, and is never sent again by the adapter.
    """

    async def get(self, key: str) -> KeyValue | None:
        """The key now, by a linearizable read; None if absent."""
        ...

    async def list(self, prefix: str) -> Listing:
        """All keys that begin with `prefix`."""
        ...

    async def txn(self, compares: Sequence[Unchanged], effects: Sequence[Put | Delete]) -> TxnResult:
        """If all compares hold, do all effects, atomically; otherwise nothing."""
        ...

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        """Set a key without a compare; returns the revision."""
        ...

    def watch(self, prefix: str, from_revision: int) -> AsyncIterator[WatchBatch]:
        """Every change under `prefix` from `from_revision` on, without gaps, for ever.

        Reconnects by itself and goes on where it was. Raises `Compacted` when the
        revisions in between are gone: list again. Never skips silently.
        """
        ...

    async def lease_grant(self, ttl_s: int) -> int:
        """A new lease, whole seconds (etcd's floor is 2 at its default election timeout)."""
        ...

    async def lease_keepalive(self, lease: int) -> int:
        """Renew once; returns the TTL now granted, 0 if the lease is gone."""
        ...

    async def lease_revoke(self, lease: int) -> None:
        """End the lease at once; its keys vanish. Unknown leases are no error."""
        ...

    async def close(self) -> None:
        """Give up connections; running calls and watches end with `Unavailable`."""
        ...


# --------------------------------------------------------------------------- a host's own parts


class TerminalSize(msgspec.Struct, frozen=True):
    """A terminal's size in characters."""

    columns: int
    rows: int


class Terminal(msgspec.Struct, frozen=True):
    """The terminal that a session's command is given; `kind` is what TERM tells the command."""

    size: TerminalSize
    kind: str


class SessionClient(msgspec.Struct, frozen=True):
    """Who has a session in a machine: what comes from there, and what takes what goes there.

    `inputs` is what is typed and the terminal's new sizes; `output` returns when there is room for
    the next piece. Without a terminal the command gets pipes.
    """

    terminal: Terminal | None
    inputs: AsyncIterator[bytes | TerminalSize]
    output: Callable[[ExecOutput], Awaitable[None]]


class Driver(Protocol):
    """What runs machines on this host: process groups or containers (flyd/drivers).

    All calls are idempotent: called twice, the second changes nothing and answers the
    same. Machines outlive the driver object and flyd; `observe` finds them again.
    """

    async def create(self, spec: MachineSpec) -> None:
        """Make everything a start needs (directories, files, source tree), start nothing."""
        ...

    async def start(self, spec: MachineSpec) -> Observed:
        """Start the machine; if this instance already runs, answer as it runs."""
        ...

    async def stop(self, machine_id: str, signal: str, timeout_s: float) -> ExitStatus | None:
        """Signal, wait up to `timeout_s`, then SIGKILL the whole group. None: was not running."""
        ...

    async def destroy(self, machine_id: str) -> None:
        """Kill what runs and remove what `create` made; volumes are not touched."""
        ...

    async def observe(self) -> Mapping[str, Observed]:
        """Every machine this driver knows on this host, by id, as it is now."""
        ...

    async def look(self, machine_id: str) -> Observed | None:
        """One machine as `observe` shows it, without a look at the others; None: not known here."""
        ...

    async def signal(self, machine_id: str, signal: str) -> None:
        """Send a signal to the machine's main process; `Refused` if it does not run."""
        ...

    async def processes(self, machine_id: str) -> tuple[Process, ...]:
        """What runs in the machine now, by pid, each with the sockets it listens on; none if stopped."""
        ...

    def exits(self) -> AsyncIterator[str]:
        """Ids of machines whose process has ended, as it happens (`observe` has the status)."""
        ...

    def exec(self, machine_id: str, command: Sequence[str], timeout_s: float) -> AsyncIterator[ExecOutput]:
        """Run a command in the machine's environment; output as it comes, the exit code last."""
        ...

    async def session(self, machine_id: str, command: Sequence[str], client: SessionClient) -> int:
        """`exec` with input, to the command's exit code.

        With a terminal all output is stdout, and the end of the input is as Ctrl-D. No deadline: what
        the command started in its session ends with it, and all of it when the call is cancelled.
        """
        ...

    def logs(self, machine_id: str, *, tail: int, follow: bool) -> AsyncIterator[LogLine]:
        """The last `tail` lines, then with `follow` every new one."""
        ...


KEPT_ENDED_RUNS = 500


class RunLog(Protocol):
    """A host's own durable memory: what it has done and is doing. Append-only, synchronous.

    `append` returns only when the event would survive a power cut. Of the runs that have
    ended, the newest KEPT_ENDED_RUNS are kept for people to look at; older ones are forgotten.
    """

    def append(self, event: RunEvent) -> None:
        """Add one event; `event.sequence` must be the next of its run (else InvariantBroken)."""
        ...

    def events(self, run_id: str) -> tuple[RunEvent, ...]:
        """All events of one run, in order."""
        ...

    def open_runs(self) -> tuple[str, ...]:
        """Ids of runs that have begun and not ended, oldest first."""
        ...

    def put_record(self, key: str, value: bytes) -> None:
        """Durably set one small record (a machine's last known spec, a restart counter)."""
        ...

    def delete_record(self, key: str) -> None:
        """Durably remove one record; absent is no error."""
        ...

    def records(self, prefix: str) -> Mapping[str, bytes]:
        """All records whose key begins with `prefix`."""
        ...


class VolumeStore(Protocol):
    """The host's volumes as its machines need them, fenced by an epoch (volumes/store.py).

    All else that a host does with them is flyd/storage/local.py's.
    """

    async def create(self, volume_id: str, size_gb: int) -> None:
        """Make the volume; idempotent."""
        ...

    async def attach(self, volume_id: str, machine_id: str, epoch: int) -> str:
        """Claim the volume and answer its path; an epoch older than the recorded one is `Refused`."""
        ...

    async def detach(self, volume_id: str, machine_id: str, epoch: int) -> None:
        """Give the volume back; a later claim is not disturbed."""
        ...


class SourceStore(Protocol):
    """Content-addressed source trees (what an "image" is to the process driver)."""

    async def ensure(self, digest: str) -> str:
        """The path of the unpacked tree, fetched from another host if it is not here yet."""
        ...

    async def receive(self, digest: str, chunks: AsyncIterator[bytes]) -> None:
        """Store a packed tree; `InvalidInput` if its sha256 is not `digest`, and nothing is kept."""
        ...

    def open(self, digest: str) -> AsyncIterator[bytes]:
        """The packed tree in chunks; `NotFound` if it is not on this host."""
        ...


class ImageStore(Protocol):
    """Container images on a host's engine, moved between hosts by content (flyd/images/)."""

    async def has(self, image_id: str) -> bool:
        """Whether the engine has the image."""
        ...

    async def ensure(self, image_id: str) -> ImageMove:
        """Have the image on the engine, fetched from another host if it is not here yet."""
        ...

    async def plan(self, image_id: str, layers: Sequence[str]) -> ImagePlan:
        """What must be sent for an image with these layers (diff ids, the lowest first)."""
        ...

    async def receive(self, image_id: str, parts: AsyncIterator[BlobPart]) -> ImageMove:
        """Take the parts, then load the image. What came before a cut is kept; a blob whose
        sha256 is not its name is `Refused` and forgotten, and nothing of the image is loaded."""
        ...

    async def layers(self, image_id: str) -> tuple[str, ...]:
        """The layers of an image that is on this host; `NotFound` if it is not."""
        ...

    def open(self, image_id: str, needs: Sequence[BlobNeed]) -> AsyncIterator[BlobPart]:
        """These blobs of an image that is on this host, each from its offset on."""
        ...

    async def held(self) -> tuple[HeldImage, ...]:
        """The images that are on this host by flyd's doing."""
        ...

    async def remove(self, image_id: str) -> None:
        """Give an image up; one that a container uses stays. Absent is no error."""
        ...

    async def tidy(self, now_s: float) -> None:
        """Forget old half-received blobs, and complete ones beyond what is kept to pass on."""
        ...
