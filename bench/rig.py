"""What bench/failover.py needs of a cluster of three Postgres members, whoever keeps it."""

from __future__ import annotations

import signal
from typing import Protocol

from bench.cables import Cables
from tests.support.etcd import EtcdCluster, Member


class Rig(Protocol):
    """A cluster that can be hurt."""

    name: str
    password: str  # of user postgres
    addresses: dict[str, str]  # node -> ip:port of its Postgres
    etcd: EtcdCluster
    cables: Cables
    lost_etcd: Member | None  # killed, to be started again

    async def wait_whole(self) -> str:
        """The primary, once both others stream from it."""
        ...

    async def kill(self, node: str) -> None:
        """SIGKILL to the agent and all of its Postgres."""
        ...

    def signal(self, node: str, number: signal.Signals) -> None:
        """To the agent and all of its Postgres."""
        ...

    async def kill_postgres(self, node: str) -> None:
        """SIGKILL to Postgres alone."""
        ...

    async def switch_over(self, node: str) -> None:
        """Ask for the primary, `node`, to be another one."""
        ...

    async def start(self, node: str) -> None:
        """Start the agent again."""
        ...
