"""Which keys a fly.toml may have, and which of them flyd does not act on.

Fly ignores an unknown key without a word; here it is named, with its line and the key
that was probably meant. A key that Fly knows and flyd does not use is named too, since
a setting that does nothing is worse than none. Used by `parse.py` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, cast

from flyd.deploy.appconfig.positions import Path
from flyd.deploy.appconfig.table import Remarks

# A leaf is "" if flyd uses the key (or keeps it as written), else what to say about it.
# "*" stands for any name.
Schema = Mapping[str, "str | Schema"]

USED = ""
UNUSED = "flyd does not use this yet: ignored"
EDGE_UNUSED = "the edge does not use this yet: ignored"
TLS_UNUSED = "checks verify no certificate by name yet: ignored"
VOLUME_UNUSED = "flyd neither grows nor snapshots volumes by this key yet: ignored"

_HTTP_CHECK: Schema = {
    "interval": USED,
    "timeout": USED,
    "grace_period": USED,
    "method": USED,
    "path": USED,
    "protocol": USED,
    "headers": USED,
    "tls_skip_verify": TLS_UNUSED,
    "tls_server_name": TLS_UNUSED,
}
_CONCURRENCY: Schema = {"type": USED, "soft_limit": USED, "hard_limit": USED}
_SERVICE: Schema = {
    "internal_port": USED,
    "auto_stop_machines": USED,
    "auto_start_machines": USED,
    "min_machines_running": USED,
    "processes": USED,
    "concurrency": _CONCURRENCY,
    "machine_checks": UNUSED,
}
_VM: Schema = {
    "size": USED,
    "memory": USED,
    "memory_mb": USED,
    "cpus": USED,
    "cpu_kind": USED,
    "processes": USED,
    "max_memory_mb": UNUSED,
    "gpus": UNUSED,
    "gpu_kind": UNUSED,
    "kernel_args": UNUSED,
    "host_dedication_id": UNUSED,
    "persist_rootfs": UNUSED,
}
_MOUNT: Schema = {
    "source": USED,
    "destination": USED,
    "initial_size": USED,
    "processes": USED,
    "snapshot_retention": VOLUME_UNUSED,
    "scheduled_snapshots": VOLUME_UNUSED,
    "auto_extend_size_threshold": VOLUME_UNUSED,
    "auto_extend_size_increment": VOLUME_UNUSED,
    "auto_extend_size_limit": VOLUME_UNUSED,
}
_VOLUME_RULE: Schema = {"replicas": USED, "every": USED, "recover_within": USED}
_BUILD: Schema = dict.fromkeys(
    [
        "builder",
        "buildpacks",
        "image",
        "builtin",
        "settings",
        "dockerfile",
        "ignorefile",
        "build-target",
        "build_target",
        "args",
        "compose",
        "compression",
        "compression_level",
    ],
    USED,
)
_EXPERIMENTAL: Schema = {
    "cmd": USED,
    "entrypoint": USED,
    "exec": USED,
    "kill_timeout": USED,
    "auto_rollback": "not needed: flyd always undoes a deploy that fails",
    "metrics_port": UNUSED,
    "metrics_path": UNUSED,
    "enable_consul": "flyd has no Consul: ignored",
    "enable_etcd": "flyd gives applications no etcd: ignored",
    "lazy_load_images": UNUSED,
    "attached": UNUSED,
    "machine_config": UNUSED,
}
SCHEMA: Schema = {
    "app": USED,
    "primary_region": USED,
    "kill_signal": USED,
    "kill_timeout": USED,
    "swap_size_mb": UNUSED,
    "console_command": UNUSED,
    "host_dedication_id": UNUSED,
    "machine_config": UNUSED,
    "container": UNUSED,
    "build": _BUILD,
    "deploy": {
        "strategy": USED,
        "max_unavailable": USED,
        "wait_timeout": USED,
        "release_command": USED,
        "release_command_timeout": USED,
        "release_command_vm": _VM,
        "seed_command": UNUSED,
    },
    "env": USED,
    "processes": USED,
    "http_service": {
        **_SERVICE,
        "force_https": USED,
        "checks": _HTTP_CHECK,
        "tls_options": EDGE_UNUSED,
        "http_options": EDGE_UNUSED,
    },
    "services": {
        **_SERVICE,
        "protocol": USED,
        "ports": {
            "port": USED,
            "start_port": USED,
            "end_port": USED,
            "handlers": USED,
            "force_https": USED,
            "tls_options": EDGE_UNUSED,
            "http_options": EDGE_UNUSED,
            "proxy_proto_options": EDGE_UNUSED,
        },
        "tcp_checks": {"interval": USED, "timeout": USED, "grace_period": USED},
        "http_checks": _HTTP_CHECK,
    },
    "checks": {"*": {**_HTTP_CHECK, "type": USED, "port": USED, "processes": USED, "name": USED}},
    "machine_checks": UNUSED,
    "mounts": _MOUNT,
    "mount": _MOUNT,
    "vm": _VM,
    "compute": _VM,
    "computes": _VM,
    "restart": {"policy": USED, "retries": USED, "processes": USED},
    "files": "flyd writes no files into machines yet: ignored",
    "statics": "the edge serves no static files yet, the application must: ignored",
    "metrics": UNUSED,
    "metric": UNUSED,
    "experimental": _EXPERIMENTAL,
    # Our own keys, all below one table, which Fly ignores.
    "flyd": {"regions": USED, "liveness": {"*": USED}, "require": USED, "volumes": {"*": _VOLUME_RULE}},
}


def remark_on_keys(document: dict[str, Any], remarks: Remarks) -> None:
    """Warn of each key that is unknown, or known and not used."""
    _walk(document, SCHEMA, (), remarks)


def _walk(values: object, schema: Schema, path: Path, remarks: Remarks) -> None:
    if isinstance(values, list):
        for index, item in enumerate(cast("list[object]", values)):
            _walk(item, schema, (*path, index), remarks)
    if not isinstance(values, dict):
        return
    for key, value in cast("dict[str, object]", values).items():
        rule = schema.get(key, schema.get("*"))
        below = (*path, key)
        if rule is None:
            remarks.warn(below, f"unknown key: ignored{_meant(key, schema)}")
        elif isinstance(rule, str):
            if rule and value not in ([], {}, "", False):
                remarks.warn(below, rule)
        else:
            _walk(value, rule, below, remarks)


def _meant(key: str, schema: Schema) -> str:
    close = get_close_matches(key.lower(), [known for known in schema if known != "*"], n=1, cutoff=0.8)
    return f" (did you mean {close[0]!r}?)" if close else ""
