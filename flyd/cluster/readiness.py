"""Waiting until the flyds of a local cluster serve, whatever their hosts are made of."""

from __future__ import annotations

import time
from collections.abc import Callable

from flyd.cluster.layout import API_PORT, LocalHost
from flyd.errors import Unavailable

UP_TIMEOUT_S = 60.0
POLL_S = 0.05

Progress = Callable[[str], None]


def wait_serving(
    hosts: tuple[LocalHost, ...],
    log_tail: Callable[[LocalHost], str],
    ended: Callable[[LocalHost], bool] = lambda _: False,
) -> None:
    """Return once each host's flyd says that it serves; one that does not is reported with its log's end."""
    deadline = time.monotonic() + UP_TIMEOUT_S
    for host in hosts:
        while not _serves(host):
            if ended(host) or time.monotonic() > deadline:
                raise Unavailable(
                    f"flyd on {host.name} did not come up; the end of its log:\n{log_tail(host)}",
                    hint="`fly cluster up` removed what it had started; etcd's log is beside flyd's.",
                )
            time.sleep(POLL_S)


def _serves(host: LocalHost) -> bool:
    """Whether the host's flyd answers gRPC's standard health check."""
    import grpc  # a slow import that only this needs
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"{host.address}:{API_PORT}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1.0)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
