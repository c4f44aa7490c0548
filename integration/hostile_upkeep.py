"""Keeps the cluster under attack worth attacking: apps, machines, volumes and leases that are real."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import grpc.aio

from flyd.identity.credentials import SecureChannel
from flyd.v1 import (
    apps_pb2,
    apps_pb2_grpc,
    machines_pb2,
    machines_pb2_grpc,
    releases_pb2,
    releases_pb2_grpc,
    volumes_pb2,
    volumes_pb2_grpc,
)
from integration.hostile_calls import APPS, REGIONS, Known

TEND_S = 1.0
CALL_S = 10.0
DELETE_S = 90.0
MIN_MACHINES, MAX_MACHINES = 4, 16
MIN_VOLUMES = 3
LEASE_S = 2
KEPT_NONCES = 20
SLEEP = machines_pb2.MachineConfig(cmd=["sleep", "600"], guest=machines_pb2.MachineGuest(memory_mb=32))


class Upkeep:
    """An operator beside the attackers; whatever of its calls they spoil is tried again."""

    def __init__(self, channel: SecureChannel, known: Known) -> None:
        made: Any = channel.get()
        self._apps: Any = apps_pb2_grpc.AppsServiceStub(made)
        self._machines: Any = machines_pb2_grpc.MachinesServiceStub(made)
        self._volumes: Any = volumes_pb2_grpc.VolumesServiceStub(made)
        self._releases: Any = releases_pb2_grpc.ReleasesServiceStub(made)
        self._known = known

    async def keep(self) -> None:
        """For ever."""
        while True:
            with suppress(grpc.aio.AioRpcError):
                await self.once()
            await asyncio.sleep(TEND_S)

    async def once(self) -> None:
        """Look at what there is, make what is lacking."""
        there = [
            app.name for app in (await self._apps.ListApps(apps_pb2.ListAppsRequest(), timeout=CALL_S)).apps
        ]
        for app in APPS:
            if app not in there:
                await self._apps.CreateApp(apps_pb2.CreateAppRequest(app_name=app), timeout=CALL_S)
        listed = (
            await self._machines.ListMachines(machines_pb2.ListMachinesRequest(), timeout=CALL_S)
        ).machines
        steady = [m for m in listed if m.state == "started" and m.desired_state == "started"]
        for number in range(MIN_MACHINES - len(steady)):
            await self._machines.CreateMachine(
                machines_pb2.CreateMachineRequest(
                    app_name=APPS[number % len(APPS)], region=REGIONS[number % len(REGIONS)], config=SLEEP
                ),
                timeout=CALL_S,
            )
        for machine in listed[MAX_MACHINES:]:
            await self._machines.DestroyMachine(
                machines_pb2.DestroyMachineRequest(machine_id=machine.id, force=True), timeout=CALL_S
            )
        volumes = (await self._volumes.ListVolumes(volumes_pb2.ListVolumesRequest(), timeout=CALL_S)).volumes
        for number in range(MIN_VOLUMES - len(volumes)):
            request = volumes_pb2.CreateVolumeRequest(
                app_name=APPS[0], name="data", region=REGIONS[number], size_gb=1
            )
            await self._volumes.CreateVolume(request, timeout=CALL_S)
        self._known.machines[:] = [machine.id for machine in listed]
        self._known.volumes[:] = [volume.id for volume in volumes]
        request = releases_pb2.ListReleasesRequest(app_name=APPS[0])
        found = (await self._releases.ListReleases(request, timeout=CALL_S)).releases
        self._known.runs[:] = [release.run_id for release in found]
        if steady:
            lease = machines_pb2.AcquireMachineLeaseRequest(
                machine_id=steady[0].id, ttl=LEASE_S, owner="upkeep"
            )
            taken = (await self._machines.AcquireMachineLease(lease, timeout=CALL_S)).lease
            self._known.nonces[:] = [*self._known.nonces, taken.nonce][-KEPT_NONCES:]

    async def delete_all(self) -> None:
        """Every app, with all that it has."""
        async with asyncio.timeout(DELETE_S):
            while apps := (await self._apps.ListApps(apps_pb2.ListAppsRequest(), timeout=CALL_S)).apps:
                for app in apps:
                    request = apps_pb2.DeleteAppRequest(app_name=app.name, with_volumes=True)
                    with suppress(grpc.aio.AioRpcError):
                        await self._apps.DeleteApp(request, timeout=DELETE_S)
                await asyncio.sleep(TEND_S)
