"""What users and deploys ask of machines: changes of intent by compare-and-set, and waits.

Owns every change of a placed machine's claim (a new configuration is updates.py's). A command
only writes what is wanted; the machine's host does it (host.py), so a command is done as soon
as etcd has it, and a wait is a separate thing with a deadline of its own, after which it says
what was last known.

Invariant: `destroyed` is final; nothing changes a claim after it. A command repeated, or
whose answer got lost, has the effect of one. A command with a `nonce` (empty: the caller holds
no lease) respects leases (leases.py); one without is flyd's own. Called by the API and by loops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import msgspec

from flyd.errors import Conflict, NotFound, OutcomeUnknown, Unavailable
from flyd.machines import leases
from flyd.machines.summary import last_known
from flyd.model import (
    Desired,
    Machine,
    MachineState,
    MachineStatus,
    Secrets,
    StopConfig,
    Value,
    decode,
    encode,
)
from flyd.ports import KV, Put, Unchanged
from flyd.store import keys
from flyd.store.mirror import Mirror

COMMAND_ATTEMPTS = 16
"""Tries before a command that keeps losing to other writers is given up."""

T = TypeVar("T", bound=Value)


async def set_desired(
    kv: KV,
    app: str,
    machine_id: str,
    desired: Desired,
    *,
    stop: StopConfig | None = None,
    nonce: str | None = None,
    guards: Sequence[Unchanged] = (),
) -> Machine:
    """Want the machine started, stopped (as `stop` says, else as configured) or destroyed."""

    def wanted(machine: Machine) -> Machine:
        return msgspec.structs.replace(machine, desired=desired, stop=stop)

    return await _change_machine(kv, app, machine_id, wanted, guards, nonce)


async def restart(
    kv: KV, app: str, machine_id: str, *, stop: StopConfig | None = None, nonce: str | None = None
) -> Machine:
    """Want the machine's process started afresh, also if it is stopped or has given up."""
    target: int | None = None

    def wanted(machine: Machine) -> Machine:
        nonlocal target
        target = machine.restart_nonce + 1 if target is None else target
        return msgspec.structs.replace(
            machine,
            desired=Desired.STARTED,
            restart_nonce=max(machine.restart_nonce, target),
            stop=stop,
        )

    return await _change_machine(kv, app, machine_id, wanted, (), nonce)


async def set_cordoned(
    kv: KV,
    app: str,
    machine_id: str,
    cordoned: bool,
    *,
    nonce: str | None = None,
    guards: Sequence[Unchanged] = (),
) -> Machine:
    """Keep the machine out of routing, or let it back in."""

    def wanted(machine: Machine) -> Machine:
        return msgspec.structs.replace(machine, cordoned=cordoned)

    return await _change_machine(kv, app, machine_id, wanted, guards, nonce)


async def set_metadata(
    kv: KV, app: str, machine_id: str, key: str, value: str | None, *, nonce: str | None = None
) -> Machine:
    """Set one key of the machine's metadata; None removes it. The version stays the same."""

    def wanted(machine: Machine) -> Machine:
        metadata = {k: v for k, v in machine.config.metadata.items() if k != key}
        if value is not None:
            metadata[key] = value
        config = msgspec.structs.replace(machine.config, metadata=metadata)
        return msgspec.structs.replace(machine, config=config)

    return await _change_machine(kv, app, machine_id, wanted, (), nonce)


async def set_secrets(kv: KV, app: str, values: Mapping[str, str]) -> tuple[str, ...]:
    """Merge into the app's secrets; the names of all of them. Machines see them at their next start.

    An empty value removes the name.
    """

    def merged(secrets: Secrets) -> Secrets:
        both = {**secrets.values, **values}
        return Secrets(app=app, values={name: value for name, value in both.items() if value})

    changed = await _compare_and_set(kv, keys.secrets(app), Secrets, Secrets(app=app), merged)
    return tuple(sorted(changed.values))


async def wait_state(
    mirror: Mirror, machine: Machine, state: MachineState, timeout_s: float, *, instance_id: str = ""
) -> MachineStatus:
    """Return once the machine's host says that it is in `state`; Unavailable past the deadline.

    With `instance_id` only the state of that version counts.
    """

    def reached() -> MachineStatus | None:
        if mirror.get(keys.machine(machine.app, machine.id), Machine) is None:
            raise NotFound(f"machine {machine.id} of app {machine.app} was destroyed while waiting for it")
        status = _status(mirror, machine)
        fits = status is not None and instance_id in ("", status.instance_id)
        return status if status is not None and fits and status.state is state else None

    return await _wait(mirror, machine, reached, f"did not become {state.value}", timeout_s)


async def wait_healthy(mirror: Mirror, machine: Machine, timeout_s: float) -> MachineStatus:
    """Return once the machine is started and all its checks pass; Unavailable past the deadline."""

    def healthy() -> MachineStatus | None:
        status = _status(mirror, machine)
        return status if status is not None and status.healthy() else None

    return await _wait(mirror, machine, healthy, "did not become healthy", timeout_s)


async def wait_gone(mirror: Mirror, machine: Machine, timeout_s: float) -> None:
    """Return once the machine is destroyed and all that it held is free."""

    def gone() -> bool | None:
        return True if mirror.get(keys.machine(machine.app, machine.id), Machine) is None else None

    await _wait(mirror, machine, gone, "was not destroyed", timeout_s)


W = TypeVar("W")


async def _wait(
    mirror: Mirror, machine: Machine, look: Callable[[], W | None], what: str, timeout_s: float
) -> W:
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                version = mirror.version
                found = look()
                if found is not None:
                    return found
                await mirror.wait_change(version)
    except TimeoutError:
        raise Unavailable(
            f"machine {machine.id} of app {machine.app} on host {machine.host} {what} in {timeout_s:g} s; "
            f"last known: {last_known(_status(mirror, machine))}",
            hint=f"`fly logs -a {machine.app}` shows what it printed, `fly hosts list` if its host is up.",
        ) from None


def _status(mirror: Mirror, machine: Machine) -> MachineStatus | None:
    found = mirror.get(keys.status(machine.app, machine.id), MachineStatus)
    return found.value if found is not None else None


async def _change_machine(
    kv: KV,
    app: str,
    machine_id: str,
    change: Callable[[Machine], Machine],
    guards: Sequence[Unchanged],
    nonce: str | None,
) -> Machine:
    def checked(machine: Machine) -> Machine:
        changed = change(machine)
        if machine.desired is Desired.DESTROYED and changed != machine:
            raise Conflict(
                f"machine {machine_id} of app {app} is being destroyed",
                hint="It can not be brought back; a deploy makes new machines.",
            )
        return changed

    async def guards_now() -> Sequence[Unchanged]:
        return guards if nonce is None else (*guards, await leases.guard(kv, app, machine_id, nonce))

    return await _compare_and_set(kv, keys.machine(app, machine_id), Machine, None, checked, guards_now)


async def _no_guards() -> Sequence[Unchanged]:
    return ()


async def _compare_and_set(
    kv: KV,
    key: str,
    kind: type[T],
    absent: T | None,
    change: Callable[[T], T],
    guards: Callable[[], Awaitable[Sequence[Unchanged]]] = _no_guards,
) -> T:
    """Read, change, write back if nobody else did; `absent` stands in for a key that is not there.

    `guards` are the compares of one attempt, as of now; what they raise ends the command.
    """
    for _ in range(COMMAND_ATTEMPTS):
        record = await kv.get(key)
        if record is None and absent is None:
            raise NotFound(
                f"no {kind.__name__.lower()} {keys.last_part(key)!r}", hint="`fly machine list` shows all."
            )
        before = decode(record.value, kind) if record is not None else absent
        assert before is not None
        held = await guards()
        after = change(before)
        if record is not None and after == before:
            return after
        compare = Unchanged(key, record.mod_revision if record is not None else 0)
        try:
            result = await kv.txn((*held, compare), (Put(key, encode(after)),))
        except OutcomeUnknown:
            continue  # the change repeated is no change
        if result.succeeded:
            return after
    raise Conflict(
        f"{key} was not changed: others wrote it {COMMAND_ATTEMPTS} times in a row", hint="Try again."
    )
