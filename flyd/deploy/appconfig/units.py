"""Durations and sizes as fly.toml writes them. Each function raises ValueError with what it expected."""

from __future__ import annotations

import re

_DURATION_UNITS_S = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}
_DURATION_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)")
_NUMBER = re.compile(r"\d+")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)
_SIZE_UNITS_MB = {"k": 1 / 1024, "m": 1.0, "g": 1024.0, "t": 1024.0 * 1024}


def duration_s(value: object, *, bare_s: float) -> float | None:
    """A Go duration ("1m30s") or a bare number of `bare_s` each, in seconds; None for an empty string."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a duration such as '10s', not {value!r}")
    if isinstance(value, int | float):
        if not 0 <= value < float("inf"):
            raise ValueError(f"a duration can not be {value!r}")
        return value * bare_s
    text = value.strip()
    if not text:
        return None
    if _NUMBER.fullmatch(text):
        return int(text) * bare_s
    parts = _DURATION_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"expected a duration such as '10s', '500ms' or '1m30s', not {value!r}")
    return sum(float(number) * _DURATION_UNITS_S[unit] for number, unit in parts)


def memory_mb(value: object) -> int:
    """An amount of memory: "512mb", "1gb" or a bare number of MiB."""
    return _size_mb(value, bare="m", example="'512mb' or '1gb'")


def disk_gb(value: object) -> int:
    """A size of a volume: "10gb" or a bare number of GB; a part of a GB counts as a whole one."""
    return -(-_size_mb(value, bare="g", example="'10gb'") // 1024)


def _size_mb(value: object, *, bare: str, example: str) -> int:
    match = None
    if isinstance(value, int | str) and not isinstance(value, bool):
        match = _SIZE.fullmatch(str(value).strip())
    if match is None:
        raise ValueError(f"expected a size such as {example}, not {value!r}")
    return int(float(match[1]) * _SIZE_UNITS_MB[match[2].lower() or bare])
