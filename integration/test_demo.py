"""What `make demo` does that its run in test_readme.py leaves out (`make demo ETCD_LEADER=1`)."""

from __future__ import annotations

import pytest

from examples.demo.commands import move_etcd_leader
from flyd.cluster.layout import ETCD_CLIENT_PORT
from integration.cluster import Cluster

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("name", ["iad-1", "ams-1"])
def test_etcds_leader_moves_to_a_host(cluster: Cluster, name: str) -> None:
    endpoints = [f"https://{host.address}:{ETCD_CLIENT_PORT}" for host in cluster.local.plan.hosts]
    identity = cluster.local.root / name / "data" / "identity"
    move_etcd_leader(endpoints, name, identity)  # raises unless it leads then
