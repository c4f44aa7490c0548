"""What members of a cluster are told of its archive."""

from __future__ import annotations

import pytest

from flyd.errors import InvalidInput
from flyd.postgres.clusters import ArchiveOptions, archive_options, member_config


def test_each_cluster_has_a_part_of_its_own_and_a_restored_one_reads_the_old_ones() -> None:
    archive = archive_options(
        "/mnt/shared/", "chat-db-copy", "/mnt/shared/chat-db", "2026-11-23T21:04:05+00:00"
    )
    config = member_config("chat-db-copy", "chat-db-copy-1", ("chat-db-copy-1", "x"), 256, 1, archive)
    told = {name: value for name, value in config.env.items() if "ARCHIVE" in name or "RESTORE" in name}
    assert told == {
        "PGHA_ARCHIVE_DIR": "/mnt/shared/chat-db-copy",
        "PGHA_RESTORE_FROM": "/mnt/shared/chat-db",
        "PGHA_RESTORE_TO": "2026-11-23T21:04:05+00:00",
    }


def test_without_an_archive_nothing_is_said_of_it() -> None:
    config = member_config("db", "db-1", ("db-1", "db-2"), 256, 1, archive_options("", "db"))
    assert archive_options("", "db") == ArchiveOptions()
    assert not [name for name in config.env if "ARCHIVE" in name or "RESTORE" in name]


@pytest.mark.parametrize("shared", ["relative/path", "/mnt/../data", "/data", "/data/archive"])
def test_a_folder_that_cannot_be_the_archive_is_refused(shared: str) -> None:
    with pytest.raises(InvalidInput):
        archive_options(shared, "db")
