"""What VolumesService shows of destroyed volumes and of snapshots; a volume itself is in views.py. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from flyd.api import views
from flyd.model import Volume
from flyd.storage import records
from flyd.storage.copies import VolumeCopy, newest, verified
from flyd.storage.local import VolumeSnapshot
from flyd.v1 import volumes_pb2 as pb


def copied_view(volume: Volume, copies: Sequence[VolumeCopy]) -> pb.Volume:
    """A volume with the age of its newest copy, and when one was last restored."""
    shown = views.volume(volume)
    if (copy := newest(copies)) is not None:
        shown.newest_copy_at, shown.newest_copy_host = copy.made_at_s, copy.host
        shown.verified_at, shown.verify_error = verified(copies)
    return shown


def destroyed_view(value: records.Destroyed) -> pb.Volume:
    """A destroyed volume, with when."""
    shown = views.volume(value.volume)
    shown.destroyed_at = value.at_s
    return shown


def snapshot_view(volume_id: str, value: VolumeSnapshot) -> pb.VolumeSnapshot:
    """A snapshot."""
    return pb.VolumeSnapshot(
        id=value.id,
        volume_id=volume_id,
        created_at=value.made_at_s,
        size_gb=value.size_gb,
        used_bytes=value.used_bytes,
        scheduled=value.scheduled,
        consistent=value.consistent,
    )
