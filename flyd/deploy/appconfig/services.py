"""Sections about traffic and health: `http_service`, `services`, `checks`.

A service check gates routing, a top-level check is only shown and waited for by
deploys, and may be one that restarts its machine (`flyd.liveness`). A bare number in a
check's duration is milliseconds, as Fly has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from flyd.deploy.appconfig.groups import Groups
from flyd.deploy.appconfig.positions import dotted
from flyd.deploy.appconfig.table import Table
from flyd.model import Check, Concurrency, Service, ServicePort

HANDLERS = ("http", "tls", "pg_tls", "proxy_proto", "edge_http")
MAX_PORT = 65535
MAX_LIMIT = 10**6  # of connections or requests at once

CHECK_BARE_S = 1e-3
MIN_CHECK_S, MAX_CHECK_S = 1.0, 60.0  # service checks are brought between these
MIN_TOP_CHECK_INTERVAL_S = 2.0
MAX_TOP_CHECK_TIMEOUT_S = 60.0
MAX_FAILURES = 1000
DEFAULT_CHECK = Check(kind="tcp", port=0)

_Services = dict[str, tuple[Service, ...]]


def read_services(root: Table, groups: Groups) -> _Services:
    """The services of each group."""
    found: dict[str, list[Service]] = {name: [] for name in groups.names}
    publishers: dict[int, str] = {}
    sections = [(root.table("http_service"), _http_service)] if "http_service" in root else []
    sections += [(section, _service) for section in root.tables("services")]
    for section, read in sections:
        service = read(section)
        for group in groups.of_service(section):
            if service.internal_port:
                found[group].append(service)
        _warn_of_idle_stop(section)
        for port in service.ports:
            if port.port in publishers:
                section.warn("ports", f"port {port.port} is also published by {publishers[port.port]}")
            publishers.setdefault(port.port, dotted(section.path))
    return {name: tuple(services) for name, services in found.items()}


def read_checks(root: Table, groups: Groups) -> dict[str, dict[str, Check]]:
    """The top-level checks of each group, by name."""
    found: dict[str, dict[str, Check]] = {name: {} for name in groups.names}
    if isinstance(root.values.get("checks", {}), list):
        named = [(section.text("name"), section) for section in root.tables("checks")]
    else:
        table = root.table("checks")
        named = [(name, table.table(name)) for name in table.values]
    http_port = root.table("http_service").integer("internal_port", 0, minimum=1, maximum=MAX_PORT)
    limits = _liveness(root, [name for name, _ in named])
    for name, section in named:
        check = msgspec.structs.replace(
            _top_level_check(section, http_port), restart_limit=limits.get(name, 0)
        )
        for group in groups.of(section):
            found[group][name] = check
    return found


def _liveness(root: Table, checks: Sequence[str]) -> dict[str, int]:
    """After how many failures in a row each of these checks restarts its machine."""
    table = root.table("flyd").table("liveness")
    limits: dict[str, int] = {}
    for name in table.values:
        limits[name] = table.integer(name, 0, minimum=1, maximum=MAX_FAILURES)
        if name not in checks:
            known = f"only {', '.join(checks)}" if checks else f"declare it under [checks.{name}]"
            table.error(name, f"there is no top-level check {name!r}: {known}")
    return limits


def _http_service(section: Table) -> Service:
    port = _internal_port(section)
    return Service(
        internal_port=port,
        ports=(
            ServicePort(port=80, handlers=("http",), force_https=_force_https(section)),
            ServicePort(port=443, handlers=("tls", "http")),
        ),
        checks=tuple(_service_check(check, "http", port) for check in section.tables("checks")),
        concurrency=_concurrency(section),
    )


def _service(section: Table) -> Service:
    port = _internal_port(section)
    protocol = section.one_of("protocol", ("tcp", "udp"), "tcp")
    if protocol == "udp":
        section.warn("protocol", "the edge forwards no UDP yet: only other machines reach this port")
    ports = tuple(_port(entry) for entry in section.tables("ports"))
    if not ports:
        section.warn("ports", "the service has no ports: only other machines reach it")
    checks = [_service_check(check, "tcp", port) for check in section.tables("tcp_checks")]
    checks += [_service_check(check, "http", port) for check in section.tables("http_checks")]
    return Service(
        internal_port=port,
        protocol=protocol,
        ports=tuple(p for p in ports if p.port),
        checks=tuple(checks),
        concurrency=_concurrency(section),
    )


def _internal_port(section: Table) -> int:
    port = section.integer("internal_port", 0, minimum=1, maximum=MAX_PORT)
    if "internal_port" not in section:
        # Fly loads such a service, and then it forwards nowhere.
        section.warn("internal_port", "is missing (the port the app listens on): nothing is forwarded")
    return port


def _port(section: Table) -> ServicePort:
    if "start_port" in section or "end_port" in section:
        section.error("start_port", "the edge forwards no ranges of ports: list each port")
    elif "port" not in section:
        section.error("port", "is missing: the public port")
    handlers = section.strings("handlers")
    for handler in handlers:
        if handler not in HANDLERS:
            section.error("handlers", f"{handler!r} is not one of {', '.join(HANDLERS)}")
    return ServicePort(
        port=section.integer("port", 0, minimum=1, maximum=MAX_PORT),
        handlers=handlers,
        force_https=_force_https(section),
    )


def _concurrency(section: Table) -> Concurrency:
    value = section.values.get("concurrency", {})
    if isinstance(value, str):  # the oldest form: "soft,hard"
        soft, _, hard = value.partition(",")
        table = Table(
            {"type": "requests", "soft_limit": soft, "hard_limit": hard},
            (*section.path, "concurrency"),
            section.remarks,
        )
    elif isinstance(value, list):
        section.warn("concurrency", "Fly refuses an array here: write one table; the first is used")
        tables = section.tables("concurrency")
        table = tables[0] if tables else Table({}, section.path, section.remarks)
    else:
        table = section.table("concurrency")
    kind = table.text("type") or "connections"
    if kind not in ("connections", "requests"):
        table.warn("type", f"{kind!r} is not connections or requests: connections are counted")
        kind = "connections"
    soft = table.integer("soft_limit", Concurrency().soft_limit, minimum=0, maximum=MAX_LIMIT)
    hard = table.integer("hard_limit", 0, minimum=0, maximum=MAX_LIMIT)
    if 0 < hard < soft and "soft_limit" in table:
        table.warn("soft_limit", f"is above hard_limit ({hard}): it is never reached")
    return Concurrency(type=kind, soft_limit=soft, hard_limit=hard)


def _force_https(section: Table) -> bool:
    wanted = section.flag("force_https")
    if wanted:
        section.warn("force_https", "the edge has no TLS yet: requests are served over plain HTTP")
    return wanted


def _warn_of_idle_stop(section: Table) -> None:
    if section.values.get("auto_stop_machines", False) not in (False, "off"):
        section.warn("auto_stop_machines", "flyd does not stop idle machines yet: they keep running")


def _service_check(section: Table, kind: str, port: int) -> Check:
    interval_s = _bounded_s(section, "interval", DEFAULT_CHECK.interval_s)
    timeout_s = _bounded_s(section, "timeout", DEFAULT_CHECK.timeout_s)
    grace_s = _bounded_s(section, "grace_period", DEFAULT_CHECK.grace_period_s, zero=True)
    return _check(section, kind, port, interval_s, timeout_s, grace_s)


def _bounded_s(section: Table, key: str, default: float, *, zero: bool = False) -> float:
    seconds = section.duration_s(key, default, bare_s=CHECK_BARE_S)
    bounded = min(max(seconds, MIN_CHECK_S), MAX_CHECK_S)
    if bounded == seconds or (zero and seconds == 0):
        return seconds
    section.warn(
        key, f"{seconds:g} s is not between {MIN_CHECK_S:g} and {MAX_CHECK_S:g} s: {bounded:g} s is used"
    )
    return bounded


def _top_level_check(section: Table, default_port: int) -> Check:
    kind = section.one_of("type", ("tcp", "http"), "tcp")
    if "type" not in section:
        section.error("type", "is missing: tcp or http")
    port = section.integer("port", default_port, minimum=1, maximum=MAX_PORT)
    if not port and "port" not in section:
        section.error("port", "is missing, and there is no http_service whose port could be meant")
    interval_s = section.duration_s("interval", DEFAULT_CHECK.interval_s, bare_s=CHECK_BARE_S)
    if interval_s < MIN_TOP_CHECK_INTERVAL_S:
        section.error("interval", f"{interval_s:g} s is less than {MIN_TOP_CHECK_INTERVAL_S:g} s")
    timeout_s = section.duration_s("timeout", DEFAULT_CHECK.timeout_s, bare_s=CHECK_BARE_S)
    if timeout_s > MAX_TOP_CHECK_TIMEOUT_S:
        section.error("timeout", f"{timeout_s:g} s is more than {MAX_TOP_CHECK_TIMEOUT_S:g} s")
    grace_s = section.duration_s("grace_period", DEFAULT_CHECK.grace_period_s, bare_s=CHECK_BARE_S)
    return _check(section, kind, port, interval_s, timeout_s, grace_s)


def _check(
    section: Table, kind: str, port: int, interval_s: float, timeout_s: float, grace_period_s: float
) -> Check:
    check = Check(
        kind=kind, port=port, interval_s=interval_s, timeout_s=timeout_s, grace_period_s=grace_period_s
    )
    if kind != "http":
        return check
    return msgspec.structs.replace(
        check,
        method=(section.text("method") or "GET").upper(),
        path=section.text("path") or "/",
        protocol=section.one_of("protocol", ("http", "https"), "http"),
        headers=_headers(section),
    )


def _headers(section: Table) -> dict[str, str]:
    if isinstance(section.values.get("headers", {}), list):  # the oldest form: {name, value} each
        return {entry.text("name"): entry.text("value") for entry in section.tables("headers")}
    table = section.table("headers")
    return {name: ", ".join(table.strings(name)) for name in table.values}
