"""MachinesService over a store: what each call writes, refuses and shows; no host acts here."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import msgspec
import pytest

from flyd.errors import Conflict, InvalidInput, Refused, Unavailable
from flyd.model import MachineState, Reservations, StopConfig, decode, encode
from flyd.model.machine import ListenSocket, Process
from flyd.ports import Delete
from flyd.store import keys
from flyd.v1 import machines_pb2 as pb
from tests.support.machines_api import HOST, running

# --------------------------------------------------------------------------- create once


async def test_a_retried_create_makes_one_machine() -> None:
    async with running() as api:
        first, second = await asyncio.gather(api.create(idempotency_key="k"), api.create(idempotency_key="k"))
        third = await api.create(idempotency_key="k")
        assert first.id == second.id == third.id
        assert (await api.create(idempotency_key="other")).id != first.id
        with pytest.raises(Conflict, match="another request"):
            await api.create(idempotency_key="k", name="different")
        assert len((await api.kv.list(keys.MACHINES)).items) == 2


async def test_a_retry_after_the_destroy_makes_nothing() -> None:
    async with running() as api:
        made = await api.create(idempotency_key="k")
        await api.kv.txn((), (Delete(keys.machine("web", made.id)),))
        with pytest.raises(Conflict, match="is destroyed"):
            await api.create(idempotency_key="k")


# --------------------------------------------------------------------------- update


async def test_an_update_is_of_one_version() -> None:
    async with running() as api:
        made = await api.create()
        made.config.env["MODE"] = "fast"
        request = pb.UpdateMachineRequest(
            machine_id=made.id, config=made.config, current_version=made.instance_id
        )
        updated = (await api.service.UpdateMachine(request, None)).machine
        assert updated.instance_id != made.instance_id
        assert (await api.claim(made.id)).config.env == {"MODE": "fast"}
        with pytest.raises(Conflict, match=f"at version {updated.instance_id} by now"):
            await api.service.UpdateMachine(request, None)
        with pytest.raises(InvalidInput, match="no config"):
            await api.service.UpdateMachine(pb.UpdateMachineRequest(machine_id=made.id), None)


async def test_an_update_keeps_what_the_host_promised_true() -> None:
    async with running() as api:
        made = await api.create()
        made.config.guest.memory_mb = 1024
        await api.service.UpdateMachine(pb.UpdateMachineRequest(machine_id=made.id, config=made.config), None)
        record = await api.kv.get(keys.reservations(made.host))
        assert record is not None
        assert decode(record.value, Reservations).machines[made.id].memory_mb == 1024
        made.config.guest.memory_mb = HOST.capacity.memory_mb + 1
        with pytest.raises(Refused, match="has no room"):
            await api.service.UpdateMachine(
                pb.UpdateMachineRequest(machine_id=made.id, config=made.config), None
            )


async def test_an_update_keeps_the_volumes() -> None:
    async with running() as api:
        config = pb.MachineConfig(image="host:", mounts=[pb.MachineMount(path="/data", name="data")])
        request = pb.CreateMachineRequest(app_name="web", config=config)
        made = (await api.service.CreateMachine(request, None)).machine
        volume = made.config.mounts[0].volume
        await api.seen(made.id)
        moved = pb.MachineConfig(image="host:", mounts=[pb.MachineMount(path="/srv", name="data")])
        updated = await api.service.UpdateMachine(
            pb.UpdateMachineRequest(machine_id=made.id, config=moved), None
        )
        assert [(m.path, m.volume) for m in updated.machine.config.mounts] == [("/srv", volume)]
        for wrong in (
            pb.MachineConfig(image="host:"),
            pb.MachineConfig(image="host:", mounts=[pb.MachineMount(path="/d", volume="vol_x")]),
        ):
            with pytest.raises(Refused, match="volume"):
                await api.service.UpdateMachine(
                    pb.UpdateMachineRequest(machine_id=made.id, config=wrong), None
                )


async def test_a_configuration_comes_back_whole() -> None:
    async with running() as api:
        check = pb.MachineHealthCheck(
            type="http", port=8080, interval=5, timeout=1, grace_period=2, method="GET", path="/up",
            protocol="http", headers={"X-A": "b"}, restart_limit=3,
        )  # fmt: skip
        config = pb.MachineConfig(
            image="host:",
            cmd=["serve", "--fast"],
            env={"A": "b"},
            guest=pb.MachineGuest(cpu_kind="shared", cpus=2, memory_mb=128),
            restart_policy="always",
            max_retries=7,
            metadata={"role": "web"},
            services=[
                pb.MachineService(
                    internal_port=8080,
                    protocol="tcp",
                    ports=[pb.MachinePort(port=80, handlers=["http"])],
                    checks=[check],
                    concurrency=pb.MachineConcurrency(type="requests", soft_limit=5, hard_limit=9),
                )
            ],
            checks={"up": check},
            stop=pb.MachineStop(signal="SIGTERM", timeout=0.0),
            auto_destroy=True,
            process_group="worker",
            host_labels={"disk": "fast"},
        )
        request = pb.CreateMachineRequest(app_name="web", config=config)
        made = (await api.service.CreateMachine(request, None)).machine
        assert made.config == config


async def test_a_schedule_comes_back_and_one_that_would_never_start_anything_is_refused() -> None:
    async with running() as api:
        config = pb.MachineConfig(image="host:", schedule="daily", restart_policy="no")
        request = pb.CreateMachineRequest(app_name="web", config=config)
        assert (await api.service.CreateMachine(request, None)).machine.config.schedule == "daily"
        for wrong, said in (
            (pb.MachineConfig(schedule="yearly"), "schedule can not be 'yearly'"),
            (pb.MachineConfig(schedule="daily", auto_destroy=True), "destroyed once it has ended"),
            (pb.MachineConfig(schedule="daily", restart_policy="always"), "never rests"),
        ):
            with pytest.raises(InvalidInput, match=said):
                await api.service.CreateMachine(pb.CreateMachineRequest(app_name="web", config=wrong), None)


async def test_one_that_waits_for_its_schedule_can_be_started_at_once() -> None:
    async with running() as api:
        config = pb.MachineConfig(image="host:", schedule="daily")
        made = (
            await api.service.CreateMachine(pb.CreateMachineRequest(app_name="web", config=config), None)
        ).machine
        claim = msgspec.structs.replace(await api.claim(made.id), starts_at_s=4e9)
        revision = await api.kv.put(keys.machine("web", made.id), encode(claim))
        await api.mirror.wait_revision(revision)
        await api.service.StartMachine(pb.StartMachineRequest(machine_id=made.id), None)
        assert (await api.claim(made.id)).restart_nonce == 1


# --------------------------------------------------------------------------- stop, signal, destroy


async def test_a_stop_as_asked_for_and_as_configured() -> None:
    async with running() as api:
        made = await api.create()
        stop = pb.StopMachineRequest(machine_id=made.id, signal="TERM", timeout=7200)
        await api.service.StopMachine(stop, None)
        assert (await api.claim(made.id)).stop == StopConfig(signal="SIGTERM", timeout_s=7200)
        await api.service.StopMachine(pb.StopMachineRequest(machine_id=made.id, timeout=1), None)
        assert (await api.claim(made.id)).stop == StopConfig(signal="SIGINT", timeout_s=1)
        await api.service.StopMachine(pb.StopMachineRequest(machine_id=made.id), None)
        assert (await api.claim(made.id)).stop is None
        for wrong in ({"signal": "NONSENSE"}, {"timeout": -1.0}, {"timeout": 1e9}, {"timeout": float("nan")}):
            with pytest.raises(InvalidInput):
                await api.service.StopMachine(
                    pb.StopMachineRequest(machine_id=made.id, **cast(Any, wrong)), None
                )


async def test_signal_and_ps_are_of_the_driver() -> None:
    async with running() as api:
        made = await api.create(region="ams")
        await api.service.SignalMachine(pb.SignalMachineRequest(machine_id=made.id, signal="HUP"), None)
        assert api.driver.signals == [(made.id, "SIGHUP")]
        with pytest.raises(Refused, match="not running"):
            await api.service.ListMachineProcesses(pb.ListMachineProcessesRequest(machine_id=made.id), None)


async def test_ps_warns_of_services_that_nobody_listens_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as api:
        config = pb.MachineConfig(
            image="host:", services=[pb.MachineService(internal_port=port) for port in (80, 81, 82)]
        )
        request = pb.CreateMachineRequest(app_name="web", region="ams", config=config)
        made = (await api.service.CreateMachine(request, None)).machine
        await api.seen(made.id)
        listens = (
            ListenSocket(protocol="tcp6", address="::", port=80),
            ListenSocket(protocol="tcp", address="127.0.0.1", port=81),
        )

        async def processes(machine_id: str) -> tuple[Process, ...]:
            return (Process(pid=7, command="serve", listens=listens),)

        monkeypatch.setattr(api.driver, "processes", processes)
        answer = await api.service.ListMachineProcesses(
            pb.ListMachineProcessesRequest(machine_id=made.id), None
        )
        assert [s.port for p in answer.processes for s in p.listen_sockets] == [80, 81]
        assert [w.partition(":")[0] for w in answer.warnings] == [
            "port 81 is listened on at 127.0.0.1 alone",
            "nothing listens on port 82 (tcp), a service's internal port",
        ]


async def test_a_started_machine_is_destroyed_by_force_alone() -> None:
    async with running() as api:
        made = await api.create()
        await api.say(made.id, MachineState.STARTED)
        with pytest.raises(Refused, match="is started"):
            await api.service.DestroyMachine(pb.DestroyMachineRequest(machine_id=made.id), None)
        await api.service.DestroyMachine(pb.DestroyMachineRequest(machine_id=made.id, force=True), None)
        assert (await api.claim(made.id)).desired == "destroyed"


async def test_clone_cordon_and_metadata() -> None:
    async with running() as api:
        made = await api.create(name="first")
        await api.service.CordonMachine(pb.CordonMachineRequest(machine_id=made.id), None)
        assert (await api.claim(made.id)).cordoned
        await api.service.UncordonMachine(pb.UncordonMachineRequest(machine_id=made.id), None)
        put = pb.SetMachineMetadataRequest(machine_id=made.id, key="role", value="db")
        await api.service.SetMachineMetadata(put, None)
        claim = await api.claim(made.id)
        assert (claim.cordoned, claim.config.metadata, claim.instance_id) == (
            False, {"role": "db"}, made.instance_id,
        )  # fmt: skip
        twin = (
            await api.service.CloneMachine(pb.CloneMachineRequest(machine_id=made.id, region="iad"), None)
        ).machine
        assert (twin.region, dict(twin.config.metadata)) == ("iad", {"role": "db"})
        assert twin.name not in ("", "first")
        gone = pb.DeleteMachineMetadataRequest(machine_id=made.id, key="role")
        await api.service.DeleteMachineMetadata(gone, None)
        await api.service.DeleteMachineMetadata(gone, None)
        await api.claim(made.id)
        shown = await api.service.GetMachineMetadata(pb.GetMachineMetadataRequest(machine_id=made.id), None)
        assert dict(shown.metadata) == {}


# --------------------------------------------------------------------------- lists, waits, watches


async def test_lists_are_filtered_and_come_in_pages() -> None:
    async with running() as api:
        made = [await api.create(region=region) for region in ("ams", "iad", "ams", "ams")]
        await api.say(made[0].id, MachineState.STARTED)
        await api.service.SetMachineMetadata(
            pb.SetMachineMetadataRequest(machine_id=made[2].id, key="role", value="db"), None
        )
        await api.claim(made[2].id)

        async def ids(**filters: Any) -> list[str]:
            request = pb.ListMachinesRequest(app_name="web", **filters)
            return [m.id for m in (await api.service.ListMachines(request, None)).machines]

        assert set(await ids(region="ams")) == {made[0].id, made[2].id, made[3].id}
        assert await ids(state="started") == [made[0].id]
        assert await ids(metadata={"role": "db"}) == [made[2].id]
        assert await ids(metadata={"role": "db"}, region="iad") == []
        everything, token, pages = await ids(), "", list[str]()
        while True:
            request = pb.ListMachinesRequest(app_name="web", page_size=3, page_token=token)
            answer = await api.service.ListMachines(request, None)
            pages += [m.id for m in answer.machines]
            token = answer.next_page_token
            if not token:
                break
        assert pages == everything
        for wrong in ({"page_size": -1}, {"page_token": "!"}, {"state": "dancing"}):
            with pytest.raises(InvalidInput):
                await ids(**wrong)


async def test_a_wait_is_woken_by_the_state_of_the_version() -> None:
    async with running() as api:
        made = await api.create()
        request = pb.WaitMachineRequest(machine_id=made.id, state="stopped", timeout=5)
        async with asyncio.TaskGroup() as group:
            waits = group.create_task(api.service.WaitMachine(request, None))
            await asyncio.sleep(0)
            await api.say(made.id, MachineState.STARTED)
            await asyncio.sleep(0)
            assert not waits.done()
            await api.say(made.id, MachineState.STOPPED)
            assert (await waits).machine.state == "stopped"
        request.instance_id, request.timeout = "another", 0.05
        with pytest.raises(Unavailable, match="did not become stopped"):
            await api.service.WaitMachine(request, None)


async def test_a_watch_tells_of_each_change() -> None:
    async with running() as api:
        made = await api.create()
        watch = aiter(api.service.WatchMachines(pb.WatchMachinesRequest(app_name="web"), None))
        assert [m.id for m in (await anext(watch)).machines] == [made.id]
        await api.say(made.id, MachineState.STARTED)
        async with asyncio.timeout(5):
            (told,) = (await anext(watch)).machines
        assert (told.id, told.state) == (made.id, "started")
        await api.kv.txn((), (Delete(keys.machine("web", made.id)), Delete(keys.status("web", made.id))))
        async with asyncio.timeout(5):
            assert list((await anext(watch)).destroyed_ids) == [made.id]
        await cast(Any, watch).aclose()
