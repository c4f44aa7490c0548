"""Ids and names, in the shapes that Fly's users know.

All chance comes from ports.Entropy, all time from ports.Clock; what is derived (a
machine's name) is derived from the id alone. Called by placer.py and by deploys.
"""

from __future__ import annotations

import hashlib

from flyd.ports import Clock, Entropy

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_ADJECTIVES = (
    "autumn", "bitter", "bold", "calm", "cold", "crimson", "damp", "dark",
    "divine", "falling", "fragrant", "frosty", "green", "hidden", "holy", "icy",
    "late", "little", "lively", "long", "misty", "nameless", "old", "patient",
    "proud", "quiet", "rough", "shy", "silent", "snowy", "solitary", "wild",
)  # fmt: skip
_NOUNS = (
    "bird", "breeze", "brook", "bush", "cherry", "cloud", "dawn", "dew",
    "dream", "dust", "feather", "field", "fire", "flower", "fog", "forest",
    "frost", "glade", "grass", "haze", "hill", "lake", "leaf", "meadow",
    "moon", "morning", "night", "paper", "pine", "pond", "rain", "river",
)  # fmt: skip


def new_machine_id(entropy: Entropy) -> str:
    """14 hex digits."""
    return entropy.token(7)


def derived_machine_id(*parts: str) -> str:
    """The machine id that a step always has, however often it is repeated."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:14]


def new_volume_id(entropy: Entropy) -> str:
    """`vol_` and 16 hex digits."""
    return "vol_" + entropy.token(8)


def new_instance_id(clock: Clock, entropy: Entropy) -> str:
    """A ULID: 48 bits of time in ms, 80 bits of chance; sorts by time."""
    number = (int(clock.wall_s() * 1000) & (2**48 - 1)) << 80 | int(entropy.token(10), 16)
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def machine_name(machine_id: str) -> str:
    """A name for people, always the same for the same id: `quiet-river-0417`."""
    digest = hashlib.sha256(machine_id.encode()).digest()
    number = int.from_bytes(digest[2:4], "big") % 10_000
    return f"{_ADJECTIVES[digest[0] % 32]}-{_NOUNS[digest[1] % 32]}-{number:04d}"
