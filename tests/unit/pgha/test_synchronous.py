"""Which processes of a server may release commits: by their titles, as PostgreSQL writes them."""

from __future__ import annotations

import pytest

from pgha.synchronous import may_send


@pytest.mark.parametrize(
    ("title", "sends"),
    [
        (b"postgres: db-1: walsender pgha_replication 10.0.0.2(4711) streaming 0/3000148\0\0", True),
        (b"postgres: walsender pgha_replication 10.0.0.2(4711) idle", True),
        (b"postgres: db-1: pgha_replication [local] startup", True),
        (b"postgres: db-1: pgha_replication [unknown] 10.0.0.2(4711) authentication", True),
        (b"postgres: db-1: [unknown] [unknown] 10.0.0.2(4711) initializing", True),
        (b"postgres: db-1: chat authentication 10.0.0.2(4711) idle", False),  # a database of that name
        (b"postgres: db-1: chat walsender 10.0.0.2(4711) idle in transaction", False),
        (b"postgres: db-1: walwriter ", False),
        (b"postgres: db-1: checkpointer ", False),
        (b"/usr/lib/postgresql/15/bin/postgres\0-D\0/data", False),
    ],
)
def test_titles(title: bytes, sends: bool) -> None:
    assert may_send(title) is sends
