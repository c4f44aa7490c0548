"""Which kind of cluster a layout describes: hosts that are processes, or hosts in containers."""

from __future__ import annotations

from flyd.cluster.layout import Layout
from flyd.cluster.registry import Cluster


def open_cluster(plan: Layout) -> Cluster:
    """The cluster of this layout, by its provider."""
    if plan.provider == "docker":
        from flyd.cluster.containers import ContainerCluster  # only this one needs an engine

        return ContainerCluster(plan)
    from flyd.cluster.local import LocalCluster

    return LocalCluster(plan)
