"""Copies of volumes on other hosts: their records in etcd, and which to make now (pure).

    volume_copies/<app>/<volume>/<host>   VolumeCopy   the host that has the copy, once it is whole there

On that host's disk the copies of a volume are the snapshots of one that is called `<volume>.copy`, which no
machine ever gets. The record says as of when the data is, not when it came.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from flyd.errors import InvalidInput
from flyd.model import Host, Value, Volume
from flyd.store import keys

MAX_REPLICAS = 3
MIN_EVERY_S = 1.0
MAX_EVERY_S = 7 * 86400.0
MIN_VERIFY_EVERY_S = 60.0
MAX_VERIFY_EVERY_S = 365 * 86400.0
COPY_BYTES_PER_S = 64 << 20  # so much of a network and of two disks a scheduled copy takes
SNAPSHOT_PREFIX = "copy-"
_SUFFIX = ".copy"


class VolumeCopy(Value, frozen=True, kw_only=True):
    """The newest copy of a volume on one other host."""

    app: str
    volume: str
    host: str
    source: str  # the host it was copied from
    snapshot: str
    made_at_s: float  # as of when the data is
    copied_at_s: float
    size_gb: int
    used_bytes: int
    consistent: bool = True
    verified_at_s: float = 0.0  # when any copy here was last restored and compared; 0: never
    verify_error: str = ""  # why that failed, if it did


class CopyPlan(Value, frozen=True, kw_only=True):
    """What is to be done for one volume."""

    due: tuple[str, ...] = ()  # hosts that are to get a copy now
    lacking: str = ""  # why it has fewer hosts than it should


def copy_id(volume_id: str) -> str:
    """What a volume's copies are called on another host's disk."""
    return volume_id + _SUFFIX


def is_copy(volume_id: str) -> bool:
    """Whether something on a host's disk is copies of another host's volume."""
    return volume_id.endswith(_SUFFIX)


def copied_volume(on_disk: str) -> str:
    """The volume that something called `<volume>.copy` holds copies of."""
    return on_disk.removesuffix(_SUFFIX)


def copies_prefix(volume: Volume) -> str:
    """Where the records of a volume's copies are."""
    return keys.volume_copy(volume.app, volume.id, "")


def check_policy(replicas: int, every_s: float) -> None:
    """InvalidInput for what can not be kept."""
    if not 0 <= replicas <= MAX_REPLICAS:
        raise InvalidInput(f"{replicas} replicas: it must be 0 to {MAX_REPLICAS}")
    if not MIN_EVERY_S <= every_s <= MAX_EVERY_S:
        raise InvalidInput(
            f"a copy every {every_s:g} s: it must be {MIN_EVERY_S:g} s to {MAX_EVERY_S / 86400:g} days",
            hint="For example: --every 15m",
        )


def check_verifying(every_s: float) -> None:
    """InvalidInput for what can not be kept."""
    if every_s and not MIN_VERIFY_EVERY_S <= every_s <= MAX_VERIFY_EVERY_S:
        raise InvalidInput(
            f"a trial restore every {every_s:g} s: it must be a minute to a year, or 0s for never",
            hint="For example: --verify-every 168h",
        )


def verify_due(volume: Volume, copies: Sequence[VolumeCopy], host: str, now_s: float) -> bool:
    """Whether this host is to restore its copy of the volume now: it has the newest, and it is time.

    A trial from the future (a clock was set back) counts for no longer than `verify_every_s`.
    """
    copy = newest(copies)
    if not volume.verify_every_s or copy is None or copy.host != host:
        return False
    tried_s = max(c.verified_at_s for c in copies)
    return abs(now_s - tried_s) >= volume.verify_every_s


def verified(copies: Sequence[VolumeCopy]) -> tuple[float, str]:
    """When a copy was last restored and compared, and why that failed; 0 and nothing: never."""
    last = max(copies, key=lambda copy: (copy.verified_at_s, copy.host), default=None)
    return (last.verified_at_s, last.verify_error) if last is not None else (0.0, "")


def plan_copies(
    volume: Volume,
    copies: Sequence[VolumeCopy],
    alive: Sequence[Host],
    free_gb: Mapping[str, int],
    now_s: float,
    begun: Collection[str] = (),
) -> CopyPlan:
    """Which hosts get a copy now: those that have one go on; others in another region before others in this.

    `begun`: hosts on which disk is promised to it, so that a first copy goes on where it was cut short.
    A copy from the future (a clock was set back) counts as new for no longer than `copy_every_s`.
    """
    living = {host.name: host for host in alive if host.name != volume.host}
    had = {copy.host: copy for copy in copies if copy.host in living}
    targets = sorted(had, key=lambda name: (-had[name].made_at_s, name))[: volume.replicas]
    others = sorted(
        (
            host
            for name, host in living.items()
            if name not in had
            and not host.cordoned
            and (name in begun or free_gb.get(name, 0) >= volume.size_gb)
        ),
        key=lambda host: (
            host.name not in begun,
            host.region == volume.region,
            -free_gb.get(host.name, 0),
            host.name,
        ),
    )
    targets += [host.name for host in others[: volume.replicas - len(targets)]]
    due = [n for n in targets if n not in had or abs(now_s - had[n].made_at_s) >= volume.copy_every_s]
    lacking = ""
    if len(targets) < volume.replicas:
        lacking = (
            f"copies wanted on other hosts: {volume.replicas}, possible: {len(targets)}; all others are "
            f"lost, cordoned or have less than {volume.size_gb} GB free"
        )
    return CopyPlan(due=tuple(due), lacking=lacking)


def newest(copies: Sequence[VolumeCopy]) -> VolumeCopy | None:
    """The copy with the youngest data."""
    return max(copies, key=lambda copy: (copy.made_at_s, copy.host), default=None)


def pause_s(sent_bytes: int, elapsed_s: float, max_bytes_per_s: int) -> float:
    """How long to wait with the next piece; 0 as a limit is none."""
    return max(0.0, sent_bytes / max_bytes_per_s - elapsed_s) if max_bytes_per_s > 0 else 0.0
