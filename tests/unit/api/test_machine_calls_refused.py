"""What MachinesService refuses: changes of a machine that somebody leased, and what can never work."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from flyd.errors import Conflict, InvalidInput, NotFound, Refused
from flyd.model import Machine, decode
from flyd.store import keys
from flyd.v1 import machines_pb2 as pb
from tests.support.machines_api import running

# --------------------------------------------------------------------------- leases


async def test_a_lease_keeps_others_from_every_change() -> None:
    async with running() as api:
        made, service = await api.create(region="ams"), api.service
        config = pb.MachineConfig(image="host:")
        taken = (
            await service.AcquireMachineLease(
                pb.AcquireMachineLeaseRequest(machine_id=made.id, owner="ada", description="repair"), None
            )
        ).lease
        of: dict[str, Any] = {"machine_id": made.id}
        changes: list[tuple[Any, Any]] = [
            (service.StopMachine, pb.StopMachineRequest(**of)),
            (service.StartMachine, pb.StartMachineRequest(**of)),
            (service.RestartMachine, pb.RestartMachineRequest(**of)),
            (service.CordonMachine, pb.CordonMachineRequest(**of)),
            (service.UncordonMachine, pb.UncordonMachineRequest(**of)),
            (service.SignalMachine, pb.SignalMachineRequest(signal="SIGHUP", **of)),
            (service.UpdateMachine, pb.UpdateMachineRequest(config=config, **of)),
            (service.SetMachineMetadata, pb.SetMachineMetadataRequest(key="a", value="b", **of)),
            (service.DeleteMachineMetadata, pb.DeleteMachineMetadataRequest(key="a", **of)),
            (service.DestroyMachine, pb.DestroyMachineRequest(**of)),
        ]
        before = await api.claim(made.id)
        for call, request in changes:
            for nonce in ("", "wrong"):
                request.lease_nonce = nonce
                with pytest.raises(Conflict, match="is leased by ada for repair"):
                    await call(request, None)
        assert await api.claim(made.id) == before
        for call, request in changes:
            request.lease_nonce = taken.nonce
            await call(request, None)
        assert (await api.claim(made.id)).desired == "destroyed"


async def test_a_lease_is_one_persons_until_it_ends() -> None:
    async with running() as api:
        made, service = await api.create(), api.service
        acquire = pb.AcquireMachineLeaseRequest(machine_id=made.id, owner="ada", ttl=10)
        taken = (await service.AcquireMachineLease(acquire, None)).lease
        with pytest.raises(Conflict, match="leased by ada"):
            await service.AcquireMachineLease(acquire, None)
        shown = (await service.GetMachineLease(pb.GetMachineLeaseRequest(machine_id=made.id), None)).lease
        assert (shown.owner, shown.nonce) == ("ada", "")
        renew = pb.RenewMachineLeaseRequest(machine_id=made.id, nonce=taken.nonce)
        assert (await service.RenewMachineLease(renew, None)).lease.nonce == taken.nonce
        with pytest.raises(Conflict, match="leased by ada"):
            await service.RenewMachineLease(pb.RenewMachineLeaseRequest(machine_id=made.id, nonce="x"), None)
        release = pb.ReleaseMachineLeaseRequest(machine_id=made.id, nonce=taken.nonce)
        await service.ReleaseMachineLease(release, None)
        with pytest.raises(Conflict, match="is gone"):
            await service.ReleaseMachineLease(release, None)
        with pytest.raises(NotFound, match="nobody holds"):
            await service.GetMachineLease(pb.GetMachineLeaseRequest(machine_id=made.id), None)
        late = pb.StopMachineRequest(machine_id=made.id, lease_nonce=taken.nonce)
        with pytest.raises(Conflict, match="is gone"):
            await service.StopMachine(late, None)
        for ttl in (-1, 1, 10**6):
            with pytest.raises(InvalidInput):
                await service.AcquireMachineLease(
                    pb.AcquireMachineLeaseRequest(machine_id=made.id, ttl=ttl), None
                )


async def test_a_lease_whose_holder_died_is_taken_over() -> None:
    async with running() as api:
        made, service = await api.create(), api.service
        acquire = pb.AcquireMachineLeaseRequest(machine_id=made.id, owner="ada", ttl=2)
        await service.AcquireMachineLease(acquire, None)
        acquire.owner = "bob"
        async with asyncio.timeout(10):
            while True:  # what a script does: there is no event for a free lease
                try:
                    taken = (await service.AcquireMachineLease(acquire, None)).lease
                    break
                except Conflict:
                    await asyncio.sleep(0.1)
        assert taken.owner == "bob"
        cleared = pb.ReleaseMachineLeaseRequest(machine_id=made.id, force=True)
        await service.ReleaseMachineLease(cleared, None)


# --------------------------------------------------------------------------- hostile input


@pytest.mark.parametrize(
    "config",
    [
        pb.MachineConfig(guest=pb.MachineGuest(memory_mb=-1)),
        pb.MachineConfig(guest=pb.MachineGuest(cpus=-5)),
        pb.MachineConfig(guest=pb.MachineGuest(cpu_kind="quantum")),
        pb.MachineConfig(cmd=["a\0b"]),
        pb.MachineConfig(env={"A=B": "c"}),
        pb.MachineConfig(env={"": "c"}),
        pb.MachineConfig(image="x" * 100_000),
        pb.MachineConfig(restart_policy="sometimes"),
        pb.MachineConfig(max_retries=-1),
        pb.MachineConfig(mounts=[pb.MachineMount(path="/../etc", name="d")]),
        pb.MachineConfig(mounts=[pb.MachineMount(path="data", name="d")]),
        pb.MachineConfig(mounts=[pb.MachineMount(path="/d", name="d", size_gb=-3)]),
        pb.MachineConfig(mounts=[pb.MachineMount(path="/d")]),
        pb.MachineConfig(services=[pb.MachineService(internal_port=70_000)]),
        pb.MachineConfig(checks={"a": pb.MachineHealthCheck(type="exec", port=1)}),
        pb.MachineConfig(checks={"a": pb.MachineHealthCheck(type="tcp", port=1, interval=float("nan"))}),
        pb.MachineConfig(stop=pb.MachineStop(signal="SIGNONSENSE")),
        pb.MachineConfig(stop=pb.MachineStop(timeout=float("inf"))),
        pb.MachineConfig(metadata={"a b": "c"}),
        pb.MachineConfig(cmd=["x"] * 2000),
    ],
    ids=str,
)
async def test_what_can_never_work_is_refused_before_anything_is_written(config: pb.MachineConfig) -> None:
    async with running() as api:
        with pytest.raises(InvalidInput):
            await api.service.CreateMachine(pb.CreateMachineRequest(app_name="web", config=config), None)
        assert (await api.kv.list(keys.MACHINES)).items == ()


@pytest.mark.parametrize("name", ["../../etc", "a/b", "x" * 64, "é", "a b", "a\n"])
async def test_names_are_plain(name: str) -> None:
    async with running() as api:
        with pytest.raises(InvalidInput, match="can not be called"):
            await api.create(name=name)
        with pytest.raises(NotFound):
            await api.service.GetMachine(pb.GetMachineRequest(app_name="web", machine_id=name), None)


def test_a_claim_of_an_older_flyd_is_read() -> None:
    older = msgspec.json.encode(
        {"id": "m1", "app": "web", "name": "w", "region": "ams", "host": "h", "instance_id": "i",
         "config": {"image": "host:"}, "private_ip": "127.0.0.2"}
    )  # fmt: skip
    claim = decode(older, Machine)
    assert (claim.stop, claim.config.auto_destroy) == (None, False)


# --------------------------------------------------------------------------- suspend


async def test_a_suspend_is_refused_and_says_what_to_do() -> None:
    async with running() as api:
        made = await api.create()
        before = await api.claim(made.id)
        with pytest.raises(Refused, match="can not keep a machine's memory") as refused:
            await api.service.SuspendMachine(pb.SuspendMachineRequest(machine_id=made.id), None)
        assert f"fly machine stop {made.id}" in refused.value.hint
        with pytest.raises(NotFound):
            await api.service.SuspendMachine(pb.SuspendMachineRequest(machine_id="none"), None)
        assert await api.claim(made.id) == before
