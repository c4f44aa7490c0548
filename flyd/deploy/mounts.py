"""Refuses a deploy that would begin with an empty volume where the app's data lies elsewhere. Pure.

A mount without a free volume of its name gets a new one when its machine is placed: right for a
new app, and a silent loss of all data to the user for one whose volume is in another region. So
each mount of a run's slots must find a volume: the one that the slot's old machine holds, or a free
one in the region; a new one is made only for a name of which the app has none.

Called by requests.py. Placement takes the volumes itself (flyd/placement/scheduler.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from flyd.deploy import plan
from flyd.deploy.releases import DeployRun, Release, Slot
from flyd.errors import Refused
from flyd.model import Machine, Volume


def refuse_lost_data(
    run: DeployRun, release: Release, machines: Sequence[Machine], volumes: Sequence[Volume]
) -> None:
    """Raise if a machine of the run would be given an empty volume instead of one that exists."""
    free = [v for v in volumes if not v.attached_machine]
    known = [v for v in volumes if _holds_data(run, v)]
    for slot in plan.slots(run, release, machines):
        mounts = release.config.groups[slot.group].mounts if slot.wanted else ()
        for name in [m.name for m in mounts if m.name not in _held(slot)]:
            here = next((v for v in free if (v.name, v.region) == (name, slot.region)), None)
            if here is not None:
                free.remove(here)
            elif elsewhere := [v for v in known if v.name == name]:
                raise _refusal(run.app, slot, name, elsewhere)


def _holds_data(run: DeployRun, volume: Volume) -> bool:
    """What only a first deploy that failed has used holds nothing yet; what a person made counts."""
    return bool(run.previous_version or volume.attached_machine or volume.epoch == 0)


def _held(slot: Slot) -> list[str]:
    return [mount.name for mount in slot.old.config.mounts] if slot.old is not None else []


def _refusal(app: str, slot: Slot, name: str, volumes: Sequence[Volume]) -> Refused:
    places = ", ".join(
        f"{v.id} in {v.region}"
        + (f" (attached to machine {v.attached_machine})" if v.attached_machine else "")
        for v in sorted(volumes, key=lambda v: v.id)
    )
    return Refused(
        f"group {slot.group} of app {app} would begin with an empty volume {name} in {slot.region}: "
        f"no volume of that name is free there, and the app's data is in {places}",
        hint=f"If that is what you want, make the volume first: fly volumes create {name} "
        f"--region {slot.region} -a {app}. Else deploy to the region where the data is.",
    )
