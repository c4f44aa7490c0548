"""Values for tests of the edge: hosts, machines and their statuses, with few words."""

from __future__ import annotations

from flyd.model import (
    Check,
    CheckStatus,
    Concurrency,
    Desired,
    Host,
    Machine,
    MachineConfig,
    MachineState,
    MachineStatus,
    Resources,
    Service,
    ServicePort,
)

HTTP = (ServicePort(port=80, handlers=("http",)), ServicePort(port=443, handlers=("tls", "http")))


def host(region: str, *, address: str = "127.0.0.1", http_port: int = 8080) -> Host:
    return Host(
        name=f"{region}-1",
        region=region,
        api_address="127.0.0.1:1",
        address=address,
        subnet="127.11",
        capacity=Resources(),
        driver="process",
        version="0",
        http_port=http_port,
    )


def http_service(
    port: int = 8080, *, checks: tuple[Check, ...] = (), concurrency: Concurrency | None = None
) -> Service:
    return Service(internal_port=port, ports=HTTP, checks=checks, concurrency=concurrency or Concurrency())


def tcp_service(internal_port: int, port: int) -> Service:
    return Service(internal_port=internal_port, ports=(ServicePort(port=port),))


def machine(
    machine_id: str,
    region: str,
    *services: Service,
    app: str = "chat",
    ip: str = "127.11.0.2",
    release: int = 1,
    desired: Desired = Desired.STARTED,
    cordoned: bool = False,
) -> Machine:
    return Machine(
        id=machine_id,
        app=app,
        name=machine_id,
        region=region,
        host=f"{region}-1",
        instance_id="i1",
        config=MachineConfig(image="host:", services=services),
        private_ip=ip,
        desired=desired,
        release=release,
        cordoned=cordoned,
    )


def status(
    of: Machine, *, state: MachineState = MachineState.STARTED, host: str = "", gate: str = "passing"
) -> MachineStatus:
    return MachineStatus(
        id=of.id,
        app=of.app,
        host=host or of.host,
        instance_id=of.instance_id,
        epoch=of.epoch,
        state=state,
        checks=(CheckStatus(name="servicecheck-0", status=gate, gates_routing=True),),
    )
