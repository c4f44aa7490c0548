"""Raw TCP ports: one owner each, however many deploys begin at once, and given back when not wanted."""

from __future__ import annotations

import asyncio

import pytest

from flyd.deploy.appconfig import AppConfig, ProcessGroup
from flyd.deploy.ports import MAX_TCP_PORTS, tcp_ports
from flyd.deploy.releases import DeployRun, RunState, list_releases
from flyd.deploy.requests import start_deploy
from flyd.errors import Conflict, InvalidInput
from flyd.model import App, Machine, Service, ServicePort, decode, encode
from flyd.ports import KV
from flyd.store import keys
from flyd.store.memory import MemoryKV
from tests.simulation.loop import current
from tests.support.deployers import deployer_process, new_cluster, simulate, start, wait_ended
from tests.support.placing import CountedEntropy, FixedClock
from tests.support.rollouts import make_config

HTTP = ServicePort(port=80, handlers=("http",))


def publishing(*ports: int) -> AppConfig:
    service = Service(internal_port=8080, ports=(HTTP, *(ServicePort(port=port) for port in ports)))
    return make_config(app=ProcessGroup(command=("serve",), services=(service,)))


async def owners(kv: KV) -> dict[str, str]:
    return {keys.last_part(i.key): decode(i.value, str) for i in (await kv.list(keys.PORTS)).items}


async def begin(kv: KV, app: str, *ports: int) -> DeployRun:
    return await start_deploy(
        kv, app, "host:", publishing(*ports), clock=FixedClock(), entropy=CountedEntropy(app)
    )


async def two_apps() -> MemoryKV:
    kv = MemoryKV()
    for name in ("chat", "shop"):
        await kv.put(keys.app(name), encode(App(name=name, regions=("ams",))))
    return kv


async def test_of_two_first_deploys_at_once_one_gets_the_port() -> None:
    for _ in range(10):
        kv = await two_apps()
        outcomes = await asyncio.gather(
            begin(kv, "chat", 7000, 7001), begin(kv, "shop", 7001), return_exceptions=True
        )
        (begun,) = [o for o in outcomes if isinstance(o, DeployRun)]
        (refused,) = [o for o in outcomes if isinstance(o, Conflict)]
        assert refused.message == f"port 7001 on the edge is taken by {begun.app}"
        assert set((await owners(kv)).values()) == {begun.app}
        assert [len(await list_releases(kv, app)) for app in sorted(("chat", "shop"))].count(0) == 1


async def test_a_port_of_a_postgres_cluster_is_refused() -> None:
    kv = await two_apps()
    await kv.put(keys.port(5432), b'"chat-db"')
    with pytest.raises(Conflict, match="port 5432 on the edge is taken by chat-db"):
        await begin(kv, "chat", 5432)
    assert await owners(kv) == {"5432": "chat-db"}


def test_only_tcp_without_handlers_takes_a_port() -> None:
    tls = ServicePort(port=443, handlers=("tls", "http"))
    services = (
        Service(internal_port=1, ports=(HTTP, tls, ServicePort(port=7001))),
        Service(internal_port=2, ports=(ServicePort(port=7001), ServicePort(port=7000))),
        Service(internal_port=3, ports=(ServicePort(port=53),), protocol="udp"),
    )
    assert tcp_ports(make_config(app=ProcessGroup(command=("x",), services=services))) == (7000, 7001)


def test_more_ports_than_a_transaction_can_claim_are_refused() -> None:
    assert len(tcp_ports(publishing(*range(7000, 7000 + MAX_TCP_PORTS)))) == MAX_TCP_PORTS
    with pytest.raises(InvalidInput, match=f"publishes {MAX_TCP_PORTS + 1} raw TCP ports"):
        tcp_ports(publishing(*range(7000, 7001 + MAX_TCP_PORTS)))


def sick_third(machine: Machine) -> str:
    return "exits" if machine.release == 3 else "ok"


def test_what_the_release_in_force_does_not_want_is_given_back_at_the_end_of_a_run() -> None:
    async def main() -> None:
        kv = await new_cluster(sick_third, "chat")
        await kv.put(keys.port(5432), b'"chat-db"')
        current().spawn("only", deployer_process(MemoryKV(kv.server), "only"))
        seen: list[tuple[RunState, list[str], list[str]]] = []
        for version, ports in ((1, (7000, 7001)), (2, (7001,)), (3, (7002,)), (4, ())):
            await start(kv, "chat", version, publishing(*ports))
            meanwhile = sorted(await owners(kv))
            seen.append(((await wait_ended(kv, "chat")).state, meanwhile, sorted(await owners(kv))))
        assert seen == [
            (RunState.COMPLETE, ["5432", "7000", "7001"], ["5432", "7000", "7001"]),
            (RunState.COMPLETE, ["5432", "7000", "7001"], ["5432", "7001"]),
            (RunState.FAILED, ["5432", "7001", "7002"], ["5432", "7001"]),
            (RunState.COMPLETE, ["5432", "7001"], ["5432"]),
        ]

    simulate(main, seeds=2)


def test_a_first_deploy_that_fails_keeps_no_port() -> None:
    async def main() -> None:
        kv = await new_cluster(lambda _machine: "exits", "chat")
        current().spawn("only", deployer_process(MemoryKV(kv.server), "only"))
        await start(kv, "chat", 1, publishing(7000))
        assert (await wait_ended(kv, "chat")).state is RunState.FAILED
        assert await owners(kv) == {}

    simulate(main, seeds=1)
