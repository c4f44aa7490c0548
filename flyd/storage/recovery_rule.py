"""Whether a lost host's volume comes back by itself: the rule that its owner made, applied. Pure.

- rule: only where the volume's record allows it (`recover_max_age_s`), for so much lost data at most: the age
  that the newest copy had when the host fell silent.
- grace: never before the host has been silent for the cluster's grace period (`fly hosts grace`): one that is
  only just away keeps its volume.
- most hosts: while more than half of the hosts are lost it is the network or etcd, and nothing comes back.

Called by rescuer.py; recovery.py compares once more that the host is silent, in the transaction itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from flyd.errors import InvalidInput
from flyd.model import Value, Volume
from flyd.storage.copies import VolumeCopy, newest

MAX_AGE_S = 30 * 86400.0


class Verdict(Value, frozen=True, kw_only=True):
    """What is to be done about one volume now: nothing, unless `host` says where it comes back."""

    host: str = ""
    age_s: float = 0.0  # of the copy, when the lost host fell silent
    held: str = ""  # why it stays lost although its rule would let it come back


def check_rule(max_age_s: float, replicas: int) -> None:
    """InvalidInput for a rule that can not be kept."""
    if not 0 <= max_age_s <= MAX_AGE_S:
        raise InvalidInput(f"a recovery within {max_age_s:g} s: it must be 0 s to {MAX_AGE_S / 86400:g} days")
    if max_age_s and not replicas:
        raise InvalidInput(
            "a volume without copies on other hosts can not come back by itself",
            hint="Give it copies with the same command: --replicas 1",
        )


def judge(
    volume: Volume,
    copies: Sequence[VolumeCopy],
    alive: Collection[str],
    lost: Collection[str],
    *,
    silent_s: float,
    grace_s: float,
    now_s: float,
) -> Verdict:
    """What to do about a volume whose host has been silent for `silent_s`; `lost`: all silent hosts."""
    if not volume.recover_max_age_s or silent_s < grace_s:
        return Verdict()
    if len(lost) > len(alive):
        return Verdict(held=f"{len(lost)} of {len(lost) + len(alive)} hosts are lost: that is the network")
    copy = newest([c for c in copies if c.host in alive])
    if copy is None:
        return Verdict(held="no host that lives has a copy of it")
    age_s = max(0.0, now_s - silent_s - copy.made_at_s)
    if age_s > volume.recover_max_age_s:
        return Verdict(
            age_s=age_s,
            held=f"its newest copy, on {copy.host}, was {age_s:.0f} s old when {volume.host} fell silent; "
            f"its rule allows {volume.recover_max_age_s:.0f} s",
        )
    return Verdict(host=copy.host, age_s=age_s)
