"""How many machines a process group has in each region, and what a scale changes. Pure.

Counts stand in the app's record (`App.counts`) where somebody has said so by `fly scale count`; where
nobody has, a group with services has one machine in each of the app's regions, one without services
one in the primary region. plan.py makes so many slots; scale.py brings an app there without a deploy.

Invariants: of too many machines the newest go, those first that are out of routing already; nothing
goes beyond the count. Volumes are never destroyed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from flyd.model import App, Desired, Machine, Value

Counts = Mapping[str, Mapping[str, int]]
"""Process group -> region -> machines."""

MAX_COUNT = 1000
"""Machines of a group in one region: what `fly scale count` takes."""


class Change(Value, frozen=True, kw_only=True):
    """What happens to a group in a region: `add` machines are placed, `remove` goes, `keep` stays."""

    region: str
    group: str
    want: int
    keep: tuple[Machine, ...] = ()
    remove: tuple[Machine, ...] = ()

    @property
    def add(self) -> int:
        """How many are to be placed."""
        return max(0, self.want - len(self.keep))


def wanted(counts: Counts, group: str, region: str, *, everywhere: bool, primary: str) -> int:
    """How many machines a group has in one of the app's regions. `everywhere`: it has services."""
    usual = 1 if everywhere or region == primary else 0
    return counts.get(group, {}).get(region, usual)


def members(machines: Sequence[Machine], group: str, region: str) -> tuple[Machine, ...]:
    """The machines that releases have put there, from those that stay longest to the first to go."""
    found = (
        m
        for m in machines
        if m.release > 0
        and m.desired is not Desired.DESTROYED
        and (m.config.process_group, m.region) == (group, region)
    )
    return tuple(sorted(found, key=lambda m: (m.cordoned, m.created_at_s, m.id)))


def spread(total: int, regions: Sequence[str], have: Mapping[str, int]) -> dict[str, int]:
    """The total over the regions, even within one; what is left over stays where most machines are."""
    each, over = divmod(total, len(regions))
    first = sorted(regions, key=lambda region: (-have.get(region, 0), regions.index(region)))[:over]
    return {region: each + (region in first) for region in regions}


def changes(machines: Sequence[Machine], group: str, target: Mapping[str, int]) -> tuple[Change, ...]:
    """What brings each region of the target there, in its order."""
    found: list[Change] = []
    for region, want in target.items():
        have = members(machines, group, region)
        found.append(Change(region=region, group=group, want=want, keep=have[:want], remove=have[want:]))
    return tuple(found)


def recorded(app: App, group: str, reached: Mapping[str, int], served: Sequence[str]) -> App:
    """The app with these counts said. `served`: its groups with services.

    A region that is new to the app is new for this group alone: the others are said to have none.
    """
    counts = {name: dict(regions) for name, regions in app.counts.items()}
    regions = list(app.regions)
    for region, number in reached.items():
        if region not in regions and number:
            regions.append(region)
            for other in served:
                if other != group:
                    counts.setdefault(other, {}).setdefault(region, 0)
        counts.setdefault(group, {})[region] = number
    return msgspec.structs.replace(app, counts=counts, regions=tuple(regions))
