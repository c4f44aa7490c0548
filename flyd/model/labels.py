"""Labels: what a host says of itself in flyd.toml, and what a machine demands of its host.

One rule for both, so that what can be demanded can be said. Pure; called where such text is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")
VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/:-]{0,126}[A-Za-z0-9])?")
MAX_LABELS = 64


def wrong_name(name: str) -> str:
    """What is wrong with a label's name; empty: nothing."""
    if NAME.fullmatch(name):
        return ""
    return f"{name!r} is no label's name: up to 63 letters, digits, . _ / -, at both ends a letter or digit"


def wrong_value(value: str) -> str:
    """What is wrong with a label's value; empty: nothing."""
    if VALUE.fullmatch(value):
        return ""
    signs = "letters, digits, . _ / : -"
    return f"{value!r} is no label's value: up to 128 {signs}, at both ends a letter or digit"


def wrong(labels: Mapping[str, str]) -> str:
    """The first thing wrong with all of these; empty: nothing."""
    if len(labels) > MAX_LABELS:
        return f"{len(labels)} labels are too many: at most {MAX_LABELS}"
    for name, value in sorted(labels.items()):
        against = wrong_name(name) or wrong_value(value)
        if against:
            return against
    return ""
