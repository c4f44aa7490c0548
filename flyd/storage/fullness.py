"""When a volume's being nearly full is news, and when it grows by itself: pure. Called by keeper.py.

A volume that has no limit (directories) is never full: it only holds more than was agreed.
"""

from __future__ import annotations

from enum import IntEnum

from flyd.errors import InvalidInput
from flyd.model import Volume

NEARLY = 0.90
FULL = 0.98
CLEARLY_LESS = 0.03  # below a threshold, before it can be news again


class Level(IntEnum):
    """How full."""

    ROOMY = 0
    NEARLY_FULL = 1
    FULL = 2


KINDS = {Level.NEARLY_FULL: "volume.nearly_full", Level.FULL: "volume.full"}


def level(before: Level, used_bytes: int, size_bytes: int) -> Level:
    """The level now; one that was reached is left only once there is clearly less."""
    part = used_bytes / size_bytes
    for reached, threshold in ((Level.FULL, FULL), (Level.NEARLY_FULL, NEARLY)):
        if part >= threshold - (CLEARLY_LESS if before >= reached else 0.0):
            return reached
    return Level.ROOMY


def story(reached: Level, volume_id: str, name: str, size_gb: int) -> str:
    """What is told of it, and what to do."""
    what = "is full: writes fail in the application" if reached is Level.FULL else "is nearly full"
    helps = f"fly volumes extend {volume_id} --size {size_gb + 1}"
    return f"volume {name} ({volume_id}, {size_gb} GB) {what}. `{helps}` helps."


def grown_gb(volume: Volume, used_bytes: int) -> int:
    """The size that the volume grows to by itself now; 0: it stays as it is."""
    if not volume.extend_percent or used_bytes * 100 < volume.extend_percent * (volume.size_gb << 30):
        return 0
    wanted_gb = min(volume.size_gb + volume.extend_gb, volume.extend_limit_gb)
    return wanted_gb if wanted_gb > volume.size_gb else 0


def check_extending(percent: int, by_gb: int, limit_gb: int, size_gb: int, max_gb: int) -> None:
    """InvalidInput for what a volume can not grow by; all numbers are free where it does not (percent 0)."""
    if not percent:
        return
    if not 50 <= percent <= 99:
        raise InvalidInput(f"a volume that grows when it is {percent} % full: it must be 50 to 99")
    if not 1 <= by_gb <= 100:
        raise InvalidInput(f"a volume that grows by {by_gb} GB: it must be 1 to 100")
    if not size_gb < limit_gb <= max_gb:
        raise InvalidInput(
            f"a volume of {size_gb} GB that grows to {limit_gb} GB: it must be {size_gb + 1} to {max_gb}",
            hint="Give --extend-limit: without a ceiling one full disk would fill a host.",
        )
