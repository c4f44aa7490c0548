"""Members by the command, on a whole cluster: machines and volumes come and go with them."""

from __future__ import annotations

import json
import signal
import time

import pytest

from integration.cluster import REGIONS, Cluster, ended

REFUSED = 5
NOT_FOUND = 3


@pytest.mark.soak
def test_members_are_added_and_removed_by_command(cluster: Cluster) -> None:
    fly = cluster.fly
    words = ("postgres", "members")

    def listed() -> dict[str, str]:
        found = json.loads(fly(*words, "list", "-a", "pg", "--json").out)
        assert not found["changing"]
        return {m["node"]: m["standing"] for m in found["members"]}

    def held(noun: str) -> int:
        return len(json.loads(fly(noun, "list", "-a", "pg", "--json").out))

    fly("postgres", "create", "pg", "--regions", ",".join(REGIONS))
    assert "pg-1 is the primary" in fly.refused(REFUSED, *words, "remove", "-a", "pg", "pg-1")
    assert "no member of pg" in fly.refused(NOT_FOUND, *words, "remove", "-a", "pg", "nobody")

    # Whoever asked goes away: it goes on by itself.
    asked = fly.start(*words, "add", "-a", "pg", "--region", REGIONS[1])
    deadline_s = time.monotonic() + 60
    while "pg-4" not in fly(*words, "list", "-a", "pg").out:
        assert time.monotonic() < deadline_s
    asked.send_signal(signal.SIGINT)
    ended(asked)
    while json.loads(fly(*words, "list", "-a", "pg", "--json").out)["changing"]:
        assert time.monotonic() < deadline_s
    assert listed() == dict.fromkeys(("pg-1", "pg-2", "pg-3", "pg-4"), "member")

    fly(*words, "remove", "-a", "pg", "pg-3")
    fly(*words, "remove", "-a", "pg", "pg-3")  # again: nothing is left to do
    fly(*words, "remove", "-a", "pg", "pg-2")
    assert "needs at least 2" in fly.refused(REFUSED, *words, "remove", "-a", "pg", "pg-4")
    assert listed() == dict.fromkeys(("pg-1", "pg-4"), "member")
    assert held("volumes") == held("machine") == 2
    fly(*words, "add", "-a", "pg", "--region", REGIONS[2])
    assert set(listed()) == {"pg-1", "pg-4", "pg-5"}
    fly("apps", "destroy", "pg", "--with-volumes", "--yes")
