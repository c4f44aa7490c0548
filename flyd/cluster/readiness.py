"""Waiting until the flyds of a local cluster serve, whatever their hosts are made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from flyd.cluster.layout import API_PORT, LocalHost
from flyd.cluster.registry import user_folder
from flyd.errors import Unavailable

if TYPE_CHECKING:
    import grpc

UP_TIMEOUT_S = 60.0
POLL_S = 0.05


def wait_serving(
    cluster: str,
    hosts: tuple[LocalHost, ...],
    log_tail: Callable[[LocalHost], str],
    ended: Callable[[LocalHost], bool] = lambda _: False,
) -> None:
    """Return once each host's flyd says that it serves; one that does not is reported with its log's end."""
    deadline = time.monotonic() + UP_TIMEOUT_S
    for host in hosts:
        while not serves(cluster, host.address):
            if ended(host) or time.monotonic() > deadline:
                raise Unavailable(
                    f"flyd on {host.name} did not come up; the end of its log:\n{log_tail(host)}",
                    hint="`fly cluster up` removed what it had started; etcd's log is beside flyd's.",
                )
            time.sleep(POLL_S)


def open_channel(cluster: str, address: str) -> grpc.Channel:
    """A channel to the flyd at a host's address, with this machine's identity in the cluster."""
    from flyd.identity.credentials import Credentials  # loads grpc, which `fly cluster status` needs not

    return Credentials(user_folder(cluster)).open_channel(f"{address}:{API_PORT}")


def serves(cluster: str, address: str) -> bool:
    """Whether the flyd at a host's address answers gRPC's standard health check."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with open_channel(cluster, address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1.0)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
