"""What the scheduler thinks of each host, for people: accepted with its rank, or refused and why. Pure.

Called by the API for `fly machine place` and `fly scale count --dry-run`. Decides nothing: it asks
the same functions as `schedule`, so the first of the accepted hosts is the one that is taken.
"""

from __future__ import annotations

from flyd.model import Value
from flyd.placement.index import Snapshot
from flyd.placement.scheduler import Placement, Request, fit, rank, spread_of


class Verdict(Value, frozen=True, kw_only=True):
    """One host's. `rank`: 1 is taken; 0: refused. `reason`: why, or what the rank rests on."""

    host: str
    region: str
    rank: int
    reason: str


def verdicts(request: Request, snapshot: Snapshot) -> tuple[Verdict, ...]:
    """Every host's: the accepted ones from the best on, then the refused ones by name."""
    spread = spread_of(request, snapshot)
    fits = {host.name: fit(request, snapshot, host) for host in snapshot.hosts}
    accepted = sorted(
        (host for host in snapshot.hosts if isinstance(fits[host.name], Placement)),
        key=lambda host: rank(request, spread, snapshot, host),
    )
    found: list[Verdict] = []
    for number, host in enumerate(accepted, start=1):
        on_host, in_region, _, _ = rank(request, spread, snapshot, host)
        said = (
            f"{on_host} of group {request.spread_group} here, {in_region} in {host.region}, "
            f"{snapshot.free[host.name].memory_mb} MB memory free"
        )
        found.append(Verdict(host=host.name, region=host.region, rank=number, reason=said))
    for host in sorted(snapshot.hosts, key=lambda host: host.name):
        outcome = fits[host.name]
        if isinstance(outcome, str):
            found.append(Verdict(host=host.name, region=host.region, rank=0, reason=outcome))
    return tuple(found)
