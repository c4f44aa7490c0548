"""The loop that frees a host of old images: when a deploy has ended, and once at the start.

Decides nothing: what may go is layers.expendable's word. Started by the daemon on hosts whose driver
is Docker; acts only on images that carry flyd's mark, and the engine itself keeps those that a
container uses.
"""

from __future__ import annotations

import structlog

from flyd.deploy.releases import DeployRun, Release, ReleaseStatus, RunState
from flyd.errors import FlydError
from flyd.images.layers import Deployed, expendable
from flyd.model import Machine
from flyd.ports import Clock, ImageStore
from flyd.store import keys
from flyd.store.mirror import Mirror

log = structlog.get_logger(__name__)


async def keep_images_pruned(mirror: Mirror, images: ImageStore, clock: Clock) -> None:
    """Prune whenever the set of ended runs has changed. The mirror must hold MACHINES, RELEASES and RUNS."""
    await mirror.wait_synced()
    pruned: frozenset[str] | None = None
    while True:
        version = mirror.version
        ended = frozenset(
            item.value.id
            for item in mirror.list(keys.RUNS, DeployRun)
            if item.value.state is not RunState.RUNNING
        )
        if ended != pruned:
            pruned = ended
            try:
                await prune(mirror, images, clock)
            except FlydError as error:  # the next deploy's end tries again
                log.warning("images.prune_failed", error=str(error))
        await mirror.wait_change(version)


async def prune(mirror: Mirror, images: ImageStore, clock: Clock) -> None:
    """Remove what may go now."""
    now_s = clock.wall_s()
    releases = [
        Deployed(app=r.app, version=r.version, image=r.image, complete=r.status is ReleaseStatus.COMPLETE)
        for r in (item.value for item in mirror.list(keys.RELEASES, Release))
    ]
    in_use = frozenset(item.value.config.image for item in mirror.list(keys.MACHINES, Machine))
    for image_id in expendable(await images.held(), releases, in_use, now_s):
        await images.remove(image_id)
    await images.tidy(now_s)
