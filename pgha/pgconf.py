"""The text of Postgres' configuration files, as this controller wants them. Pure.

`synchronous_standby_names` follows from the record of the members (membership.py) and is in every
member's file from before its first start (I6): no primary ever runs without it.
Called by pgha/postgres.py.
"""

from __future__ import annotations

from flyd.model import Value
from pgha.model import Synchronous

REPLICATION_USER = "pgha_replication"
SUPERUSER = "postgres"
INCLUDE = "include_if_exists = 'pgha.conf'\n"

# Small defaults: many members share one development machine. Short network timeouts: a replica
# that is gone must not hold commits for long (I16). A crash must end the term, so no restart by itself.
SETTINGS = {
    "wal_level": "replica",
    "wal_log_hints": "on",
    "hot_standby": "on",
    "synchronous_commit": "on",
    "fsync": "on",
    "full_page_writes": "on",
    "restart_after_crash": "off",
    "max_connections": "100",
    "max_wal_senders": "16",
    "max_replication_slots": "16",
    "wal_keep_size": "256MB",
    "max_slot_wal_keep_size": "1GB",
    "max_wal_size": "256MB",
    "min_wal_size": "80MB",
    "shared_buffers": "32MB",
    "wal_sender_timeout": "3s",
    "wal_receiver_timeout": "3s",
    "wal_receiver_status_interval": "1s",
    "wal_retrieve_retry_interval": "100ms",
    "max_standby_streaming_delay": "3s",
    "max_standby_archive_delay": "3s",
    "tcp_keepalives_idle": "2",
    "tcp_keepalives_interval": "1",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "4s",
    "password_encryption": "scram-sha-256",
    "lc_messages": "C",
    "jit": "off",
    "recovery_target_timeline": "latest",
    "log_line_prefix": "%m [%p] ",
}

READ_ONLY = "default_transaction_read_only = 'on'  # the disk is nearly full: guard.py\n"

HBA = f"""\
# Written by pgha. The socket is in a directory that only Postgres' own user (and root) can enter.
local all all trust
host replication {REPLICATION_USER} all scram-sha-256
host all all all scram-sha-256
"""


class PostgresConfig(Value, frozen=True, kw_only=True):
    """What the adapter is given once."""

    node: str
    members: tuple[str, ...]  # that the cluster began with
    host: str
    port: int
    directory: str  # the member's own, on its volume
    bin_dir: str
    socket_dir: str  # private and short: a socket's path has at most 107 bytes
    superuser_password: str
    replication_password: str
    archive_dir: str = ""  # of this cluster alone, reached by every member; empty: no archive
    restore_from: str = ""  # the archive that the first member's data comes from; empty: initdb
    restore_to: str = ""  # ISO 8601; empty: all that there is


def quoted(text: str) -> str:
    """As a value of a configuration file or of a connection string."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def synchronous_names(me: str, wanted: Synchronous) -> str:
    """`ANY k (all others)`."""
    others = ", ".join('"' + name.replace('"', '""') + '"' for name in wanted.names if name != me)
    return f"ANY {wanted.acks} ({others})"


def conninfo(address: str, user: str, name: str, passfile: str) -> str:
    """How to reach another member's Postgres; the password is in a file that fencing takes away."""
    host, _, port = address.rpartition(":")
    parts = {
        "host": host.strip("[]"),
        "port": port,
        "user": user,
        "dbname": "postgres",
        "application_name": name,
        "passfile": passfile,
        "connect_timeout": "2",
        "keepalives_idle": "2",
        "keepalives_interval": "1",
        "keepalives_count": "3",
        "tcp_user_timeout": "4000",
    }
    return " ".join(f"{key}={quoted(value)}" for key, value in parts.items())


def server_config(
    *,
    me: str,
    synchronous: Synchronous,
    host: str,
    port: int,
    socket_dir: str,
    primary_conninfo: str,
    archive_command: str = "",
) -> str:
    """The whole of pgha.conf."""
    settings = SETTINGS | {
        "cluster_name": me,
        "listen_addresses": host,
        "port": str(port),
        "unix_socket_directories": socket_dir,
        "synchronous_standby_names": synchronous_names(me, synchronous),
        "primary_conninfo": primary_conninfo,
    }
    if archive_command:
        settings |= {"archive_mode": "always", "archive_command": archive_command, "archive_timeout": "60s"}
    lines = [f"{name} = '" + _escaped(value) + "'" for name, value in settings.items()]
    return "# Written by pgha at each change: do not edit.\n" + "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "''")
