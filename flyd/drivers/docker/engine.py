"""The Docker engine of one host, as the few blocking calls that the driver needs.

Owns the connection and the words of each failure (docker_errors.py). Every call is idempotent
where the engine lets it be: starting what runs, killing what has ended and removing what is gone
are no errors. Called from threads by driver.py and events.py. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docker import APIClient
from docker.errors import APIError
from docker.errors import NotFound as NoSuchThing
from docker.types import CancellableStream, IPAMConfig, IPAMPool

from flyd.drivers.docker.errors import translated
from flyd.drivers.docker.spec import (
    LABEL_HOST,
    HostNetwork,
    Seen,
    container_name,
    network_options,
    seen,
)
from flyd.errors import Conflict, Refused

DEFAULT_URL = "unix:///var/run/docker.sock"
CALL_TIMEOUT_S = 60
CONNECTIONS = 16
IPV6 = Path("/proc/sys/net/ipv6")

EVENTS = ("start", "die", "destroy")


class Engine:
    """One connection pool; usable from several threads."""

    def __init__(self, url: str, network: HostNetwork) -> None:
        self._url = url
        self._network = network
        self._host = network.host_name
        self._connected: APIClient | None = None

    @property
    def _client(self) -> Any:
        """Made at the first call, so that flyd starts also while its engine is down.

        Any: the SDK's types say little; each method here gives its answer a type.
        """
        client = self._connected
        if client is None:
            client = self._connected = APIClient(
                base_url=self._url, version="auto", timeout=CALL_TIMEOUT_S, max_pool_size=CONNECTIONS
            )
        return client

    def close(self) -> None:
        """Give up the connections."""
        if self._connected is not None:
            self._connected.close()

    # ------------------------------------------------------------------- the host's network

    def ensure_network(self) -> None:
        """Make the host's network, or see that the one there is the right one."""
        name = self._network.name
        with translated(self._host, f"make network {name}"):
            try:
                there: dict[str, Any] = self._client.inspect_network(name)
            except NoSuchThing:
                self._refuse_without_ipv6()
                pools = [
                    IPAMPool(subnet=self._network.cidr, gateway=self._network.gateway),
                    IPAMPool(subnet=self._network.cidr6, gateway=self._network.gateway6),
                ]
                self._client.create_network(
                    name,
                    driver="bridge",
                    enable_ipv6=True,
                    ipam=IPAMConfig(pool_configs=pools),
                    options=network_options(self._network),
                    labels={LABEL_HOST: self._host},
                    check_duplicate=True,
                )
                return
        configs: list[dict[str, str]] = there["IPAM"]["Config"] or []
        subnets = [config.get("Subnet", "") for config in configs]
        given = (self._network.cidr, self._network.cidr6)
        if any(subnet not in subnets for subnet in given):
            raise Conflict(
                f"network {name} on host {self._host} has the subnets {', '.join(subnets) or 'none'}, "
                f"but this host was given {' and '.join(given)}",
                hint=f"Stop its machines, then `docker network rm {name}`; flyd makes it anew.",
            )

    def _refuse_without_ipv6(self) -> None:
        """Machines have IPv6 addresses, and names say so to all hosts: one without would be half there."""
        if not IPV6.exists():
            raise Refused(
                f"the kernel of host {self._host} has no IPv6, which the network of its machines needs",
                hint="Boot it without ipv6.disable=1. Machines use it within the private network only.",
            )

    # ------------------------------------------------------------------- containers

    def list_own(self, *, running_only: bool = False) -> list[Seen]:
        """Every container with this host's label, also one that flyd's database does not know."""
        with translated(self._host, "list machines"):
            filters = {"label": f"{LABEL_HOST}={self._host}"}
            listed: list[dict[str, Any]] = self._client.containers(all=not running_only, filters=filters)
        found = [self._inspect(container["Id"]) for container in listed]
        return sorted((c for c in found if c is not None), key=lambda c: c.machine_id)

    def find(self, machine_id: str) -> Seen | None:
        """The machine's container; None if there is none, or if one of that name is not this host's."""
        return self._inspect(container_name(machine_id))

    def create(self, machine_id: str, body: Mapping[str, Any]) -> str:
        """Make the container; its id."""
        with translated(self._host, f"make machine {machine_id}"):
            made: dict[str, str] = self._client.create_container_from_config(body, container_name(machine_id))
        return made["Id"]

    def start(self, machine_id: str, container_id: str) -> None:
        """Start it, unless it runs."""
        with translated(self._host, f"start machine {machine_id}"):
            self._client.start(container_id)

    def kill(self, machine_id: str, container_id: str, signal: str) -> None:
        """Send a signal to its main process, unless it has ended."""
        with translated(self._host, f"send {signal} to machine {machine_id}"):
            try:
                self._client.kill(container_id, signal)
            except APIError as error:
                if error.status_code not in (404, 409):  # gone, or not running
                    raise

    def remove(self, machine_id: str, container_id: str, *, kill: bool = True) -> None:
        """Remove it with its anonymous volumes, unless it is gone; without `kill` one that runs stays."""
        with translated(self._host, f"remove machine {machine_id}"):
            try:
                self._client.remove_container(container_id, v=True, force=kill)
            except APIError as error:
                under_way = error.status_code == 409 and "already in progress" in str(error.explanation)
                if error.status_code != 404 and not under_way:
                    raise

    def _inspect(self, name: str) -> Seen | None:
        with translated(self._host, f"look at container {name}"):
            try:
                inspected: dict[str, Any] = self._client.inspect_container(name)
            except NoSuchThing:
                return None
        labels: Mapping[str, str] = inspected["Config"]["Labels"] or {}
        return seen(inspected) if labels.get(LABEL_HOST) == self._host else None

    # ------------------------------------------------------------------- streams

    def events(self, since_s: int) -> CancellableStream[dict[str, Any]]:
        """What happens to this host's containers, from `since_s` on."""
        with translated(self._host, "watch machines"):
            filters = {
                "type": "container",
                "event": list(EVENTS),
                "label": f"{LABEL_HOST}={self._host}",
            }
            return self._client.events(since=since_s, filters=filters, decode=True)

    def logs(
        self, machine_id: str, container_id: str, *, tail: int | str, since_s: int, follow: bool
    ) -> CancellableStream[bytes]:
        """Log messages with their times, one for each item."""
        with translated(self._host, f"read the log of machine {machine_id}"):
            return self._client.logs(
                container_id,
                stream=True,
                timestamps=True,
                tail=tail,
                since=since_s or None,
                follow=follow,
            )

    def exec_state(self, machine_id: str, exec_id: str) -> tuple[bool, int, int]:
        """Whether it runs, its pid on the host (0: it never ran) and its exit code."""
        with translated(self._host, f"look at a command in machine {machine_id}"):
            state = self._client.exec_inspect(exec_id)
        return bool(state["Running"]), int(state["Pid"] or 0), int(state["ExitCode"] or 0)
