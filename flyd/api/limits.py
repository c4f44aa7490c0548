"""What a request may hold at all: one look at every field of every request, before a servicer sees it.

`check` knows fields by their type and name, so that a new call is guarded from its first day: numbers
are finite and not negative, texts are not endless and hold no NUL byte, what becomes part of a key or
a path has neither slashes nor control characters, lists are countable. What a field means beyond that
(an app's name, a port) is the servicer's to judge.

Called by flyd/api/interceptor.py for each message that comes in. Pure.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable
from typing import Any, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from flyd.errors import InvalidInput

KIB = 1024
MAX_REQUEST_BYTES = 1024 * KIB  # a record of etcd may be no larger than 1.5 MiB
MESSAGE_BYTES = {
    "MachineConfig": 128 * KIB,
    "UploadSourceRequest": 4096 * KIB,  # pieces of what is larger; the server takes no larger messages
    "UploadImageRequest": 4096 * KIB,
    "BlobPart": 4096 * KIB,
    "SessionRequest": 4096 * KIB,
}
MAX_ENTRIES = 1000  # of a list or a map
MAX_REGIONS = 50
MAX_TEXT_CHARS = 64 * KIB
MAX_WORD_CHARS = 512  # of names, ids, tokens
MAX_NAME_CHARS = 256  # of a variable, a secret, a label
SHOWN_CHARS = 80  # of a wrong value, in the error

MAX_SECONDS = 1e11  # times since the epoch and durations: year 5138
NUMBERS: dict[str, tuple[int, int]] = {
    "size_gb": (1, 500),
    "volume_size_gb": (1, 500),
    "memory_mb": (1, 16 * KIB * KIB),
    "cpus": (1, 1024),
    "count": (0, 1000),
    "tail": (0, 100_000),
}
WHOLE = (0, 2**63 - 1)
UNITS = {"gb": " GB", "mb": " MB"}

REPEATED = {"regions": MAX_REGIONS, "addresses": 100}

# Fields whose text becomes a part of etcd's keys, of paths or of addresses; so does all that ends so.
WORDS = ("name", "network", "region", "regions", "host", "target", "process_group")
WORD_ENDINGS = ("_name", "_id", "_ids", "_hosts", "nonce", "digest")
FREE_TEXTS = ("config",)  # fly.toml: its own parser says better what is wrong, and where

SUBNET = re.compile(r"\d{1,3}\.\d{1,3}")


def check(request: Message) -> None:
    """Raise InvalidInput, naming the field, for what no call could ever mean."""
    _check_message(request, "")


def _check_message(message: Message, within: str) -> None:
    size, most = message.ByteSize(), MESSAGE_BYTES.get(message.DESCRIPTOR.name, MAX_REQUEST_BYTES)
    if size > most:
        what = within.rstrip(".") or "the request"
        raise InvalidInput(f"{what} is too large: {size} bytes, at most {most} are possible")
    for field, value in message.ListFields():
        where = within + field.name
        if not field.is_repeated:
            _check_value(field, value, where)
            continue
        if len(value) > (most_entries := REPEATED.get(field.name, MAX_ENTRIES)):
            raise InvalidInput(f"{where} has {len(value)} entries: at most {most_entries} are possible")
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            item = field.message_type.fields_by_name["value"]
            for key in value:
                _check_map_key(key, where)
                _check_value(item, value[key], f"{where}[{key}]")
        else:
            for number, one in enumerate(value):
                _check_value(field, one, f"{where}[{number}]")


def _check_value(field: FieldDescriptor, value: object, where: str) -> None:
    _CHECKS.get(field.cpp_type, _check_nothing)(field, cast(Any, value), where)


def _check_nothing(field: FieldDescriptor, value: object, where: str) -> None:
    """Booleans."""


def _check_inner(field: FieldDescriptor, value: Message, where: str) -> None:
    _check_message(value, f"{where}.")


def _check_real(field: FieldDescriptor, value: float, where: str) -> None:
    if not math.isfinite(value) or not 0 <= value <= MAX_SECONDS:
        raise InvalidInput(f"{where} can not be {value:g}", hint="It is a time in seconds, 0 or more.")


def _check_whole(field: FieldDescriptor, value: int, where: str) -> None:
    low, high = NUMBERS.get(field.name, WHOLE)
    if not low <= value <= high:
        unit = UNITS.get(field.name.rpartition("_")[2], "")
        possible = f"{low} to {high} is possible" if field.name in NUMBERS else "it is 0 or more"
        raise InvalidInput(f"{where} can not be {value}{unit}: {possible}")


def _check_enum(field: FieldDescriptor, value: int, where: str) -> None:
    kind = field.enum_type
    if kind is not None and value not in kind.values_by_number:
        raise InvalidInput(f"{where} can not be {value}", hint=f"One of {', '.join(kind.values_by_name)}.")


def _check_text(field: FieldDescriptor, value: str | bytes, where: str) -> None:
    if isinstance(value, bytes) or field.name in FREE_TEXTS:
        return  # as long as their message may be
    if len(value) > MAX_TEXT_CHARS:
        raise InvalidInput(f"{where} is too long: {len(value)} characters, at most {MAX_TEXT_CHARS}")
    if "\0" in value:
        raise InvalidInput(f"{where} holds a NUL byte")
    if field.name in WORDS or field.name.endswith(WORD_ENDINGS):
        _check_word(value, where)
    elif field.name == "subnet" and value:
        if not SUBNET.fullmatch(value) or any(int(part) > 255 for part in value.split(".")):
            raise InvalidInput(f"{where} can not be {_shown(value)}", hint="Two numbers, like 10.214.")
    elif field.name == "addresses":
        _check_address(value, where)


def _check_word(value: str, where: str) -> None:
    if len(value) > MAX_WORD_CHARS:
        raise InvalidInput(f"{where} is too long: {len(value)} characters, at most {MAX_WORD_CHARS}")
    if "/" in value or value in (".", "..") or not value.isprintable():
        raise InvalidInput(
            f"{where} can not be {_shown(value)}", hint="It has no slashes and no control characters."
        )


def _check_address(value: str, where: str) -> None:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        raise InvalidInput(f"{where} can not be {_shown(value)}", hint="An IP address.") from None


def _check_map_key(key: object, where: str) -> None:
    if isinstance(key, str) and not (
        0 < len(key) <= MAX_NAME_CHARS and "=" not in key and all(ord(c) > 32 for c in key)
    ):
        raise InvalidInput(
            f"{_shown(key)} is no name in {where}",
            hint=f"1 to {MAX_NAME_CHARS} characters, none of them a space or =.",
        )


def _shown(value: str) -> str:
    return repr(value[:SHOWN_CHARS]) + ("..." if len(value) > SHOWN_CHARS else "")


_CHECKS: dict[int, Callable[[FieldDescriptor, Any, str], None]] = {
    FieldDescriptor.CPPTYPE_STRING: _check_text,
    FieldDescriptor.CPPTYPE_MESSAGE: _check_inner,
    FieldDescriptor.CPPTYPE_DOUBLE: _check_real,
    FieldDescriptor.CPPTYPE_FLOAT: _check_real,
    FieldDescriptor.CPPTYPE_INT32: _check_whole,
    FieldDescriptor.CPPTYPE_INT64: _check_whole,
    FieldDescriptor.CPPTYPE_UINT32: _check_whole,
    FieldDescriptor.CPPTYPE_UINT64: _check_whole,
    FieldDescriptor.CPPTYPE_ENUM: _check_enum,
}
