"""What an operation works on: a claim with all that belongs to it, as the mirror has it now.

Pure but for reading the mirror. Called by host.py; the assignment goes into the run's first event,
so a resumed run needs no etcd.
"""

from __future__ import annotations

import msgspec

from flyd.machines.environment import Assignment, VolumeGrant
from flyd.machines.fencing import ended_soon
from flyd.model import App, AppKind, Desired, Machine, Secrets, Volume
from flyd.store import keys
from flyd.store.mirror import Mirror


def doomed(kept: Assignment, claim: Machine | None) -> Assignment:
    """What a DESTROY works on: what the host remembers of the machine, `claim` as etcd has it."""
    elsewhere = claim is None or claim.host != kept.claim.host
    stale = elsewhere or (claim is not None and claim.epoch > kept.claim.epoch)  # it was, and came back
    ours = ended_soon(kept.claim) if stale else kept.claim
    return msgspec.structs.replace(kept, claim=msgspec.structs.replace(ours, desired=Desired.DESTROYED))


def assignment_of(claim: Machine, mirror: Mirror) -> Assignment:
    """A claim with its app's secrets, its volumes' epochs and the databases it may name."""
    app = mirror.get(keys.app(claim.app), App)
    secrets = mirror.get(keys.secrets(claim.app), Secrets)
    grants: list[VolumeGrant] = []
    for mount in claim.config.mounts:
        found = mirror.get(keys.volume(claim.app, mount.volume), Volume) if mount.volume else None
        if found and found.value.host == claim.host and found.value.attached_machine == claim.id:
            volume = found.value
            grants.append(
                VolumeGrant(id=volume.id, epoch=volume.epoch, size_gb=volume.size_gb, path=mount.path)
            )
    databases = {
        found.value.name: found.value.endpoint_port
        for found in mirror.list(keys.APPS, App)
        if found.value.kind is AppKind.POSTGRES and found.value.endpoint_port
    }
    regions = app.value.regions if app else ()
    return Assignment(
        claim=claim,
        primary_region=regions[0] if regions else claim.region,
        secrets=secrets.value.values if secrets else {},
        volumes=tuple(grants),
        databases=databases,
    )
