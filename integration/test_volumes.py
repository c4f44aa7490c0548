"""Volumes in plain directories, the default: copied to another host and restored there, by the command."""

from __future__ import annotations

from typing import Any

import pytest

from integration.cluster import Cluster, wait_for

pytestmark = pytest.mark.timeout(120)

WRONG, ABSENT = 2, 3


def test_copies_of_a_directory_volume_are_made_shown_and_restored(cluster: Cluster) -> None:
    fly = cluster.fly

    def shown() -> dict[str, Any]:
        (volume,) = fly("volumes", "list", "--app", "notes", "--json").json()
        return volume

    volume = shown()
    assert "NONE" in fly("volumes", "list", "--app", "notes").out
    fly("volumes", "update", volume["id"], "--replicas", "1", "--every", "2s", "--app", "notes")
    wait_for(lambda: shown().get("newest_copy_at"), "there is a copy", 90.0)
    volume = shown()
    assert volume["newest_copy_host"] != volume["host"]
    assert f"on {volume['newest_copy_host']}" in fly("volumes", "list", "--app", "notes").out
    fly("volumes", "update", volume["id"], "--replicas", "0", "--app", "notes")
    verified = fly("volumes", "verify", volume["id"], "--app", "notes", "--json").json()
    assert verified["host"] == volume["newest_copy_host"]
    told = fly("incidents", "list", "--app", "notes").out
    assert "volume.verified" in told


def test_what_makes_no_sense_is_refused(cluster: Cluster) -> None:
    fly = cluster.fly
    (volume,) = fly("volumes", "list", "--app", "notes", "--json").json()
    for words in (
        ("--replicas", "4"),
        ("--replicas", "-1"),
        ("--replicas", "1", "--every", "0s"),
        ("--every", "soon"),
        ("--extend-at", "90"),
        (),
    ):
        fly.refused(WRONG, "volumes", "update", volume["id"], *words, "--app", "notes")
    for verb in ("update", "verify", "recover", "move"):
        more = {"update": ("--replicas", "1"), "recover": ("--yes",), "move": ("--to", "iad-1")}.get(verb, ())
        said = fly.refused(ABSENT, "volumes", verb, "vol_nothing", *more, "--app", "notes")
        assert "does not exist" in said
