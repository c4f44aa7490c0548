"""The edge with a real Envoy and small real applications behind it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys

import msgspec
import pytest

from flyd.edge import xds
from flyd.edge.envoy import Envoy
from flyd.edge.resources import EdgeConfig
from flyd.edge.routes import EdgeView, edge_config
from flyd.edge.xds import AdsServer
from flyd.model import App, AppKind, Concurrency, PostgresLeader, encode
from integration.cluster import promised
from tests.support.edge import host, http_service, machine, tcp_service
from tests.support.envoy import LoopClock, ads_address, free_port, wait_until
from tests.support.site import (
    CHAT,
    HTTP_METHODS,
    Backend,
    Site,
    answers,
    at,
    backend,
    checked,
    connected,
    echo,
    site,
)

pytestmark = pytest.mark.timeout(60)

SERVES_WITHIN_S = 0.5
HEARD = "cluster.chat/http.update_success"  # endpoints are the one thing that a new flyd repeats


# --------------------------------------------------------------------------- HTTP


async def test_a_request_reaches_the_app_with_flys_headers_and_unknown_names_do_not() -> None:
    async with site() as here, backend("one") as one:
        here.serve(at(one, "m1", "fra"))
        await here.wait_who("one")
        answer = await here.get("chat.internal:81", **{"Fly-Client-IP": "9.9.9.9", "Fly-Region": "mars"})
        seen = dict(line.split(": ", 1) for line in answer.text.split("\r\n")[1:] if ": " in line)
        assert seen["fly-client-ip"] == "127.0.0.1"
        assert seen["fly-region"] == "fra"
        assert seen["fly-forwarded-port"] == seen["x-forwarded-port"] == str(here.port)
        assert seen["x-forwarded-proto"] == "http"
        assert seen["host"] == "chat.internal:81"
        assert "x-forwarded-for" in seen
        assert seen["via"] == "1.1 flyd"
        assert answer.headers["server"] == "own"
        assert answer.headers["fly-request-id"] == seen["x-request-id"]
        assert {name for name in seen if name.startswith("x-envoy")} == set()
        nobody = await here.get("other.localhost")
        assert (nobody.status_code, nobody.text) == (404, "no app answers to this name here\n")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is the HTTP/2 client")
async def test_http_2_with_prior_knowledge() -> None:
    async with site() as here, backend("one") as one:
        here.serve(at(one, "m1", "fra"))
        await here.wait_who("one")
        curl = await asyncio.create_subprocess_exec(
            *("curl", "-s", "--http2-prior-knowledge", "-H", "host: chat"),
            *("-w", "HTTP %{http_version}", here.url),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await curl.communicate()
        assert out.startswith(b"one\n")
        assert out.endswith(b"HTTP 2")


async def test_the_first_machine_of_an_app_serves_as_soon_as_it_is_routed() -> None:
    async with site() as here, backend("one") as one:
        first = at(one, "m1", "fra")
        here.serve(msgspec.structs.replace(first, cordoned=True))
        await here.wait_who("503")
        here.serve(first)
        async with asyncio.timeout(promised(SERVES_WITHIN_S)):
            await here.wait_who("one")


async def test_a_websocket_outlives_its_cluster_s_change_its_cordon_and_a_new_flyd() -> None:
    async with site() as here, echo() as port:
        one = machine("m1", "fra", http_service(port), ip="127.0.0.1")
        here.serve(one)
        open_socket = await connected(here)
        assert await answers(open_socket, "hello")

        limited = http_service(port, concurrency=Concurrency(hard_limit=5))
        here.serve(machine("m1", "fra", limited, ip="127.0.0.1"))
        await here.edge.wait_stat("cluster_manager.cluster_modified", 1)
        assert await answers(open_socket, "still here")

        config = here.serve(msgspec.structs.replace(one, cordoned=True))
        await here.wait_who("503")
        assert await answers(open_socket, "cordoned")

        ads = await here.edge.restart_ads()
        ads.publish(config)
        assert await answers(open_socket, "another flyd")
        await open_socket.close()


async def test_a_hard_limit_queues_what_is_above_it() -> None:
    at_once, most = 0, 0

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal at_once, most
        while (head := await reader.read(65536)).startswith(HTTP_METHODS):
            counted = b"chat" in head
            at_once += counted
            most = max(most, at_once)
            await asyncio.sleep(0.05)
            at_once -= counted
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async with site() as here, await asyncio.start_server(slow, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        limited = http_service(port, concurrency=Concurrency(hard_limit=2))
        here.serve(machine("m1", "fra", limited, ip="127.0.0.1"))
        await here.wait_who("")
        answered = await asyncio.gather(*(here.get("chat") for _ in range(10)))
        assert {a.status_code for a in answered} == {200}
        assert most == 2


# --------------------------------------------------------------------------- fail-over


async def test_the_near_region_s_death_fails_no_new_request_and_needs_no_flyd() -> None:
    async with site() as here, backend("near") as near, backend("far") as far, backend("moon") as moon:
        here.serve(
            at(near, "m1", "fra", checked), at(far, "m2", "iad", checked), at(moon, "m3", "sin", checked)
        )
        await here.wait_who("near")
        await here.edge.ads.stop()  # flyd is gone: Envoy is on its own
        async with here.load() as seen:
            await wait_until(lambda: len(seen) > 50, "traffic")
            assert set(seen) == {"near"}
            near.kill()
            killed_at = len(seen)
            await wait_until(lambda: seen.count("far") > 50, "fail-over to the next region")
        failed = [a for a in seen if a not in ("near", "far", "moon")]
        assert len(failed) <= 3, failed  # those that the killed backend had already been sent
        assert all(a not in ("near", "far", "moon") for a in failed)
        assert seen[killed_at + 6 :].count("far") >= len(seen[killed_at + 6 :]) - 10
        await near.start()
        await here.wait_who("near")


async def test_a_frozen_machine_is_left_alone_within_seconds_and_comes_back() -> None:
    async with site() as here, backend("near") as near, backend("far") as far:
        here.serve(at(near, "m1", "fra", checked), at(far, "m2", "iad", checked))
        await here.wait_who("near")
        near.thawed.clear()
        await here.edge.wait_stat("cluster.chat/http.health_check.failure", 1)
        async with asyncio.timeout(1):
            assert await here.who() == "far"
        near.thawed.set()
        await here.wait_who("near")


async def flyd_process(here: Site, config: EdgeConfig) -> asyncio.subprocess.Process:
    """Another process that publishes `config`, once Envoy has heard it."""
    heard = (await here.edge.stats(HEARD))[HEARD]
    file = here.edge.folder / "config.json"
    file.write_bytes(encode(config))
    command = (sys.executable, "-m", "tests.support.ads_process", ads_address(here.edge.folder), str(file))
    process = await asyncio.create_subprocess_exec(*command)
    await here.edge.wait_stat(HEARD, heard + 1)
    return process


async def test_killing_flyd_changes_nothing_and_neither_does_a_new_one_that_knows_the_same() -> None:
    async with site() as here, backend("near") as near, backend("far") as far, echo() as port:
        talk = machine("m3", "fra", http_service(port), app="talk", ip="127.0.0.1")
        config = here.serve(
            *(at(near, "m1", "fra", checked), at(far, "m2", "iad", checked), talk),
            apps=(CHAT, App(name="talk")),
        )
        await here.wait_who("near")
        open_socket = await connected(here, "talk")
        pattern = "listener_(added|modified|removed)|cluster_(added|modified|removed)|update_rejected"
        before = await here.edge.stats(pattern)
        await here.edge.ads.stop()
        async with here.load() as seen:
            for _ in range(2):
                flyd = await flyd_process(here, config)
                assert await answers(open_socket, "with flyd")
                flyd.kill()
                await flyd.wait()
                more = len(seen) + 50
                await wait_until(lambda more=more: len(seen) > more, "traffic without flyd")
                assert await answers(open_socket, "without flyd")
        assert set(seen) == {"near"}
        assert await here.edge.stats(pattern) == before
        await open_socket.close()


async def test_a_started_flyd_that_knows_nothing_yet_takes_nothing_away() -> None:
    async with site() as here, backend("near") as near:
        here.serve(at(near, "m1", "fra"))
        await here.wait_who("near")
        await here.edge.restart_ads()
        await here.edge.wait_stat("control_plane.connected_state", 1)
        async with here.load() as seen:
            await wait_until(lambda: len(seen) > 50, "traffic")
        assert set(seen) == {"near"}


# --------------------------------------------------------------------------- TCP and Postgres


async def say(port: int, text: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(text)
    async with asyncio.timeout(10):
        answer = await reader.read(100)
    writer.close()
    return answer


async def test_a_raw_tcp_port() -> None:
    async with site() as here, backend("one") as one:
        port = free_port()
        here.serve(machine("m1", "fra", tcp_service(one.port, port), ip="127.0.0.1"))
        await here.edge.wait_stat("listener_manager.listener_create_success", 1)
        assert await say(port, b"ping") == b"ping"


def free_pair() -> int:
    """A port that is free, like the one after it."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


class Database:
    """A Postgres application's endpoint on one edge."""

    def __init__(self, here: Site) -> None:
        self.here = here
        self.port = free_pair()
        self.app = App(name="db", kind=AppKind.POSTGRES, endpoint_port=self.port)

    def leader(self, epoch: int, of: Backend, *, serving: bool) -> None:
        leader = PostgresLeader(
            cluster="db", epoch=epoch, node=of.name, address=f"127.0.0.1:{of.port}", serving=serving
        )
        view = EdgeView(host=host("fra", http_port=self.here.port), apps=(self.app,), leaders={"db": leader})
        self.here.edge.ads.publish(edge_config(view))


async def test_a_database_session_ends_when_the_leader_changes_and_new_ones_wait_for_it() -> None:
    async with site() as here, backend("old") as old, backend("new") as new:
        database = Database(here)
        database.leader(7, old, serving=True)
        await here.edge.wait_stat("listener_manager.listener_create_success", 3)
        reader, writer = await asyncio.open_connection("127.0.0.1", database.port)
        writer.write(b"select 1")
        assert await reader.read(100) == b"select 1"

        database.leader(8, new, serving=False)  # the old backend lives on and keeps its side open
        async with asyncio.timeout(1):
            assert await reader.read(100) == b""
        writer.close()

        waiting = asyncio.get_running_loop().create_task(say(database.port, b"select 2"))
        await here.edge.wait_stat("cluster.db/postgres.upstream_cx_connect_fail", 3)
        assert not waiting.done()
        database.leader(8, new, serving=True)
        async with asyncio.timeout(1):
            assert await waiting == b"select 2"


async def test_a_session_opened_before_serving_is_not_cut_by_serving() -> None:
    async with site() as here, backend("one") as one:
        database = Database(here)
        database.leader(3, one, serving=False)
        await here.edge.wait_stat("listener_manager.listener_create_success", 3)
        sessions = [asyncio.get_running_loop().create_task(say(database.port, b"x")) for _ in range(5)]
        await here.edge.wait_stat("cluster.db/postgres.upstream_cx_connect_fail", 5)
        database.leader(3, one, serving=True)
        assert await asyncio.gather(*sessions) == [b"x"] * 5


# --------------------------------------------------------------------------- the process


async def test_a_taken_port_is_said_and_taken_over_when_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xds, "RETRY_REFUSED_S", 0.2)
    async with site() as here, backend("one") as one:
        with socket.socket() as other:
            other.bind(("127.0.0.1", here.port))
            other.listen()
            here.serve(at(one, "m1", "fra"))
            await wait_until(lambda: bool(here.edge.ads.problems), "the problem")
            (problem,) = here.edge.ads.problems
            assert f"127.0.0.1 port {here.port}: Address already in use" in problem
            assert f"ss -ltnp 'sport = :{here.port}'" in problem
        await here.wait_who("one")
        await wait_until(lambda: not here.edge.ads.problems, "no problem any more")


async def test_a_killed_envoy_is_started_again_with_all_that_it_served() -> None:
    async with site() as here, backend("one") as one:
        here.serve(at(one, "m1", "fra"))
        await here.wait_who("one")
        first = here.edge.envoy.pid
        os.kill(first, signal.SIGKILL)
        await wait_until(lambda: here.edge.envoy.pid not in (0, first), "another Envoy")
        await here.wait_who("one")


async def test_a_new_flyd_adopts_the_running_envoy_however_early_the_first_was_killed() -> None:
    async with site() as here:
        folder, address = here.edge.folder / "envoy", ads_address(here.edge.folder)
        await wait_until((folder / "envoy.pid").exists, "Envoy's start")
        again = Envoy(folder, "fra-1", "fra", address, LoopClock())
        keeper = asyncio.get_running_loop().create_task(again.keep())
        await wait_until(lambda: again.pid != 0, "Envoy")
        pid = again.pid
        assert (folder / "envoy.pid").read_text() == f"{pid}\n"
        assert os.getsid(pid) == pid  # a session of its own: no signal to flyd's reaches it
        here.serve()
        await here.edge.wait_stat("listener_manager.listener_create_success", 1)
        assert again.pid == pid
        keeper.cancel()


async def test_the_socket_of_a_killed_flyd_is_no_obstacle() -> None:
    async with site() as here:
        path = ads_address(here.edge.folder).removeprefix("unix:") + "2"
        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(path)
        assert os.path.exists(path)
        second = AdsServer(f"unix:{path}")
        await second.start()
        await second.stop()
