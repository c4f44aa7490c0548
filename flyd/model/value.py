"""The base of all stored values, and how they are written down."""

from __future__ import annotations

from typing import TypeVar

import msgspec

T = TypeVar("T")


def encode(value: msgspec.Struct) -> bytes:
    """A value as JSON."""
    return msgspec.json.encode(value)


def decode(data: bytes, kind: type[T]) -> T:
    """JSON as a value of `kind`; raises msgspec.ValidationError with the path of a wrong field."""
    return msgspec.json.decode(data, type=kind)


class Value(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all stored values."""
