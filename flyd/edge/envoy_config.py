"""How flyd wants Envoy to behave: clusters, listeners and routes as Envoy's JSON.

Owns every number and option that Envoy is given, and why. Pure. Called by
flyd/edge/routes.py, which decides what there is to route; this file only says how.

The reasons, once:
- Nobody tells Envoy that a machine is dead. It finds out by itself (refused and timed-out
  connections, its own checks each second), so flyd and etcd may both be gone.
- Only requests that cannot have reached the application are retried, so a POST is never
  done twice.
- Ports are bound without SO_REUSEPORT: a port that somebody else has must be an error that
  is seen, not a share of the traffic that is lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flyd.edge.resources import Body
from flyd.model import Check, Concurrency

CONNECT_TIMEOUT = "1s"
CHECK_INTERVAL = "1s"
POSTGRES_CHECK_INTERVAL = "5s"  # each costs a Postgres a process
TCP_CHECK_TIMEOUT = "2s"
CHECK_TIMEOUT_MIN_S = 0.1
CHECK_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH")
EJECTION_TIME = "1s"
MAX_EJECTION_TIME = "10s"
LOCAL_FAILURES_TO_EJECT = 3
HTTP_RETRIES = 3
TCP_CONNECT_ATTEMPTS = 4
HOST_SELECTION_ATTEMPTS = 5
UPSTREAM_IDLE = "4s"  # below the keep-alive of common servers (5 s), so that we close first
STREAM_IDLE = "3600s"
KEEPALIVE: Body = {"keepalive_time": 5, "keepalive_interval": 5, "keepalive_probes": 3}
REQUEST_HEADERS_TIMEOUT = "60s"
EJECTION: Body = {
    "split_external_local_origin_errors": True,
    "consecutive_local_origin_failure": LOCAL_FAILURES_TO_EJECT,
    "enforcing_consecutive_5xx": 0,
    "enforcing_success_rate": 0,
    "enforcing_local_origin_success_rate": 0,
    "interval": "1s",
    "base_ejection_time": EJECTION_TIME,
    "max_ejection_time": MAX_EJECTION_TIME,
    "max_ejection_percent": 100,
}
UNLIMITED = 1_000_000  # Envoy's own limits are 1,024 connections and 3 retries a cluster
POSTGRES_CONNECT_ATTEMPTS = 60  # with the back-off below about 8 s: longer than a take-over
POSTGRES_RETRY_MIN = "0.050s"
POSTGRES_RETRY_MAX = "0.250s"
NOWHERE: Body = {"pipe": {"path": "/dev/null/no-primary"}}  # can never exist: refuses at once

HTTP_ROUTES = "http"
RETRY_ON = "connect-failure,refused-stream,reset-before-request"
ADS: Body = {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}

_TYPE = "type.googleapis.com/envoy."


def _typed(name: str, kind: str, **fields: Any) -> Body:
    return {"name": name, "typed_config": {"@type": _TYPE + kind, **fields}}


def socket_address(address: str, port: int) -> Body:
    """An IP address and port."""
    return {"socket_address": {"address": address, "port_value": port}}


def endpoint(address: str, port: int) -> Body:
    """One endpoint of a cluster; health checks ask it by its own address, as flyd's do."""
    return {
        "endpoint": {
            "address": socket_address(address, port),
            "health_check_config": {"hostname": f"{address}:{port}"},
        }
    }


def assignment(name: str, localities: Iterable[tuple[str, list[Body]]]) -> Body:
    """A cluster's endpoints, by region, nearest region first: each place is a priority."""
    return {
        "cluster_name": name,
        "endpoints": [
            {"locality": {"region": region}, "priority": priority, "lb_endpoints": endpoints}
            for priority, (region, endpoints) in enumerate(localities)
        ],
    }


# --------------------------------------------------------------------------- clusters


def _health_check(checks: tuple[Check, ...]) -> Body:
    """The service's first plain HTTP check if Envoy can make it, else whether it takes a connection."""
    common: Body = {
        "interval": CHECK_INTERVAL,
        "no_traffic_interval": CHECK_INTERVAL,
        "unhealthy_threshold": 1,
        "healthy_threshold": 1,
    }
    http = next((c for c in checks if c.kind == "http" and c.protocol == "http"), None)
    if http is None or http.method.upper() not in CHECK_METHODS:
        return {**common, "timeout": TCP_CHECK_TIMEOUT, "tcp_health_check": {}}
    return {
        **common,
        "timeout": f"{max(http.timeout_s, CHECK_TIMEOUT_MIN_S):.3f}s",
        "http_health_check": {
            "path": http.path or "/",
            "method": http.method.upper(),
            "request_headers_to_add": [_header(name, http.headers[name]) for name in sorted(http.headers)],
            "expected_statuses": [{"start": 200, "end": 400}],
        },
    }


def service_cluster(name: str, checks: tuple[Check, ...], concurrency: Concurrency, *, http: bool) -> Body:
    """The machines behind one service of an application.

    `hard_limit` is per machine and per edge: Envoy queues what is above it. (HTTP goes to
    machines as HTTP/1.1, one request a connection, so both types of limit are the same.)
    Outlier ejection looks only at failures to reach the machine: an application that
    answers 500 is alive, and ejecting it everywhere would only turn 500s into 503s.
    """
    thresholds: dict[str, Any] = {
        "thresholds": [
            {
                "max_connections": UNLIMITED,
                "max_pending_requests": UNLIMITED,
                "max_requests": UNLIMITED,
                "max_retries": UNLIMITED,
            }
        ]
    }
    if concurrency.hard_limit:
        thresholds["per_host_thresholds"] = [{"max_connections": concurrency.hard_limit}]
    cluster: dict[str, Any] = {
        **_eds_cluster(name),
        "lb_policy": "LEAST_REQUEST",
        "health_checks": [_health_check(checks)],
        "circuit_breakers": thresholds,
        "outlier_detection": EJECTION,
        # A machine that is cordoned or stopping leaves at once, though its checks still pass.
        "ignore_health_on_host_removal": True,
    }
    if http:
        cluster["typed_extension_protocol_options"] = {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": _TYPE + "extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http_protocol_options": {}},
                "common_http_protocol_options": {"idle_timeout": UPSTREAM_IDLE},
            }
        }
    return cluster


def postgres_cluster(name: str) -> Body:
    """The primary alone. No checks: flyd says where it is, and a refusal is retried."""
    return {
        **_eds_cluster(name),
        "circuit_breakers": {
            "thresholds": [{"max_connections": UNLIMITED, "max_pending_requests": UNLIMITED}]
        },
    }


def postgres_read_cluster(name: str) -> Body:
    """The members that reads may go to: one that cannot be reached is left for the next nearest."""
    check = {**_health_check(()), "interval": POSTGRES_CHECK_INTERVAL}
    check["no_traffic_interval"] = POSTGRES_CHECK_INTERVAL
    return {
        **postgres_cluster(name),
        "health_checks": [check],
        "outlier_detection": EJECTION,
        "ignore_health_on_host_removal": True,
    }


def _eds_cluster(name: str) -> Body:
    return {
        "name": name,
        "type": "EDS",
        "eds_cluster_config": {"eds_config": ADS},
        "connect_timeout": CONNECT_TIMEOUT,
        # A host that vanished says nothing: without this its WebSockets would stay for ever.
        "upstream_connection_options": {"tcp_keepalive": KEEPALIVE},
        "common_lb_config": {
            "healthy_panic_threshold": {"value": 0},
            # Envoy keeps back what its checks find for a second, to spare its workers when thousands
            # of endpoints change: a machine would serve, and a dead one be left, that much later.
            "update_merge_window": "0s",
        },
    }


# --------------------------------------------------------------------------- listeners


def _listener(name: str, address: str, port: int, chain: str, network_filter: Body) -> Body:
    return {
        "name": name,
        "address": socket_address(address, port),
        "enable_reuse_port": False,
        # The bridge that carries the private address may come up after Envoy.
        "freebind": True,
        "filter_chains": [{"name": chain, "filters": [network_filter]}],
    }


def http_listener(address: str, port: int) -> Body:
    """The public HTTP port. All that changes is in its routes, so it never changes itself."""
    manager = _typed(
        "envoy.filters.network.http_connection_manager",
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="http",
        codec_type="AUTO",
        rds={"route_config_name": HTTP_ROUTES, "config_source": ADS},
        http_filters=[
            _typed(
                "envoy.filters.http.router",
                "extensions.filters.http.router.v3.Router",
                suppress_envoy_headers=True,
            )
        ],
        upgrade_configs=[{"upgrade_type": "websocket"}],
        http2_protocol_options={"allow_connect": True},
        use_remote_address=True,
        server_header_transformation="PASS_THROUGH",
        via="1.1 flyd",
        stream_idle_timeout=STREAM_IDLE,
        request_headers_timeout=REQUEST_HEADERS_TIMEOUT,
    )
    return _listener("http", address, port, "http", manager)


def tcp_listener(name: str, address: str, port: int, cluster: str) -> Body:
    """A port whose bytes go to a cluster as they are."""
    proxy = _typed(
        "envoy.filters.network.tcp_proxy",
        "extensions.filters.network.tcp_proxy.v3.TcpProxy",
        stat_prefix="tcp",
        cluster=cluster,
        idle_timeout="0s",
        max_connect_attempts=TCP_CONNECT_ATTEMPTS,
    )
    return _listener(name, address, port, "tcp", proxy)


def postgres_listener(name: str, address: str, port: int, cluster: str, chain: str) -> Body:
    """The port that follows a Postgres primary, or the one for reads.

    The primary's filter chain carries the epoch in its name: with a new epoch Envoy replaces
    the chain and closes what it had accepted for the old one, at once (`--drain-time-s 0`),
    which removing an endpoint would not do. While no primary serves, new connections are
    held and tried again instead of refused, so that a client's pool comes back the moment
    the new primary opens and not after its own back-off.
    """
    proxy = _typed(
        "envoy.filters.network.tcp_proxy",
        "extensions.filters.network.tcp_proxy.v3.TcpProxy",
        stat_prefix="postgres",
        cluster=cluster,
        idle_timeout="0s",
        max_connect_attempts=POSTGRES_CONNECT_ATTEMPTS,
        backoff_options={"base_interval": POSTGRES_RETRY_MIN, "max_interval": POSTGRES_RETRY_MAX},
    )
    return _listener(name, address, port, chain, proxy)


# --------------------------------------------------------------------------- routes


def _header(name: str, value: str) -> Body:
    # A percent sign begins a command in Envoy's format strings.
    return {"header": {"key": name, "value": value.replace("%", "%%")}}


def _overwrite(name: str, value: str) -> Body:
    return {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def virtual_host(app: str, domains: list[str], cluster: str) -> Body:
    """One application's names. No time limit on requests: WebSockets and uploads take as they take."""
    return {
        "name": app,
        "domains": domains,
        "routes": [
            {
                "match": {"prefix": "/"},
                "route": {
                    "cluster": cluster,
                    "timeout": "0s",
                    "retry_policy": _retry_policy(),
                },
            }
        ],
    }


def _retry_policy() -> Body:
    return {
        "retry_on": RETRY_ON,
        "num_retries": HTTP_RETRIES,
        "retry_host_predicate": [
            _typed(
                "envoy.retry_host_predicates.previous_hosts",
                "extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
            )
        ],
        "host_selection_retry_max_attempts": HOST_SELECTION_ATTEMPTS,
        "retry_priority": _typed(
            "envoy.retry_priorities.previous_priorities",
            "extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
            update_frequency=1,
        ),
    }


def http_routes(region: str, port: int, hosts: Iterable[Body]) -> Body:
    """All applications' names, and the answer to any other name."""
    nobody = {
        "name": "nobody",
        "domains": ["*"],
        "routes": [
            {
                "match": {"prefix": "/"},
                "direct_response": {
                    "status": 404,
                    "body": {"inline_string": "no app answers to this name here\n"},
                },
            }
        ],
    }
    return {
        "name": HTTP_ROUTES,
        "virtual_hosts": [*hosts, nobody],
        "ignore_port_in_host_matching": True,
        "request_headers_to_remove": ["x-envoy-external-address"],
        "request_headers_to_add": [
            _overwrite("fly-client-ip", "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"),
            _overwrite("fly-region", region),
            _overwrite("fly-forwarded-port", str(port)),
            _overwrite("x-forwarded-port", str(port)),
        ],
        "response_headers_to_add": [_overwrite("fly-request-id", "%REQ(x-request-id)%")],
    }
