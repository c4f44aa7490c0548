"""Hostile calls, made from the services' descriptors: a method that is new is covered by itself.

The same seed gives the same calls, but for the ids of machines and volumes that live at that moment:
the messages of a call that went wrong are printed whole.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

import flyd.v1

APPS = ("hostile-1", "hostile-2")
REGIONS = ("ams", "iad", "sin")
LARGEST_BYTES = 4 * 1024 * 1024  # that flyd takes
DEPTH = 5
SHOWN_BYTES = 2000

# Calls that may wait for what others do: these get a short deadline, and may pass it.
WAITING = (
    "Wait",
    "Watch",
    "Stream",
    "Session",
    "Exec",
    "DeleteApp",
    "CreateCluster",
    "AttachApp",
    "Failover",
)
WAITING_UPLOADS = ("UploadSource", "UploadImage", "SpreadImage", "EnsureImage")

HOSTILE_TEXTS = (
    "",
    ".",
    "..",
    "../",
    "../../../../etc/passwd",
    "hostile-1/../../secrets/hostile-2",
    "hostile-1/",
    "/flyd/v1/authorities",
    "/etc/passwd",
    "..\\..\\x",
    "%2e%2e%2f",
    "a\0b",
    "\0",
    "\n\r\x1b[2J",
    "x" * 64,
    "x" * 300,
    "x" * 70_000,
    "é" * 40_000,
    "\u202enimda",
    "\ufeff",
    "\U0001f525" * 100,
    "ｈｏｓｔｉｌｅ－１",
    "hostile-1 ",
    "HOSTILE-1",
    "-",
    "--force",
    "'; DROP TABLE machines; --",
    "$(reboot)",
    "${HOME}",
    "{}",
    "[[[[[[[[[[",
    "[" * 50_000,
    "a = " + "[" * 5_000,
    "null",
    "NaN",
    "0",
    "-1",
    "18446744073709551616",
    "*",
    "=",
    "A=B",
    "a" * 64,  # a digest that nobody has
    "image:sha256:" + "b" * 64,
    "source:sha256:" + "c" * 64,
    "source:sha256:../../../x",
    "host:",
)
HOSTILE_WHOLES = (
    -1,
    0,
    1,
    2,
    7,
    100,
    1001,
    65_535,
    65_536,
    2**31 - 1,
    -(2**31),
    2**32 - 1,
    2**63 - 1,
    -(2**63),
)
HOSTILE_REALS = (math.nan, math.inf, -math.inf, -1.0, -0.0, 5e-324, 1e-9, 0.01, 1.0, 60.0, 1e18, 1.8e308)
TOML = """
app = "hostile-1"
primary_region = "ams"
[processes]
  app = "sleep 600"
[[vm]]
  memory = "32mb"
[deploy]
  wait_timeout = "1s"
"""
UNDEFINED_WIRE = (
    b"\xff" * 12,  # a varint without an end
    b"\x0a\x7f" + b"x",  # longer than what comes
    b"\x0b" * 5_000,  # groups in groups
    b"\x0a\x02\xff\xfe",  # no UTF-8
    b"\x0f",  # a wire type that there is not
    b"\x00\x00",  # field 0
)


@dataclass(frozen=True)
class Call:
    """One call: what is sent, and how the client behaves."""

    number: int
    method: str  # /package.Service/Method
    client_streams: bool
    server_streams: bool
    messages: tuple[bytes, ...]
    manner: str  # "whole"; "cut": the client goes away; "half": the stream stops in the middle
    may_wait: bool

    def __str__(self) -> str:
        shown = ", ".join(
            m[:SHOWN_BYTES].hex() + ("..." if len(m) > SHOWN_BYTES else "") for m in self.messages
        )
        return f"call {self.number} {self.method} ({self.manner}) [{shown[: 4 * SHOWN_BYTES]}]"


@dataclass
class Known:
    """What lives now, as an insider would know it."""

    machines: list[str] = field(default_factory=list[str])
    volumes: list[str] = field(default_factory=list[str])
    nonces: list[str] = field(default_factory=list[str])  # most of them expired
    runs: list[str] = field(default_factory=list[str])


def methods() -> list[MethodDescriptor]:
    """Every method of every service of flyd's API."""
    found: list[MethodDescriptor] = []
    for module in sorted(info.name for info in pkgutil.iter_modules(flyd.v1.__path__)):
        if module.endswith("_pb2"):
            file = importlib.import_module(f"flyd.v1.{module}").DESCRIPTOR
            for _, service in sorted(file.services_by_name.items()):
                found += service.methods
    return found


class Generator:
    """Calls by chance, from a seed."""

    def __init__(self, seed: int, known: Known) -> None:
        self._dice = random.Random(seed)
        self._known = known
        self._methods = methods()

    def call(self, number: int) -> Call:
        """The next call. Methods take turns, so that each has its share."""
        dice, method = self._dice, self._methods[number % len(self._methods)]
        may_wait = method.name.startswith(WAITING) or method.name in WAITING_UPLOADS
        count = dice.choice((0, 1, 1, 2, 3, 10)) if method.client_streaming else 1
        return Call(
            number=number,
            method=f"/{method.containing_service.full_name}/{method.name}",
            client_streams=bool(method.client_streaming),
            server_streams=bool(method.server_streaming),
            messages=tuple(self._bytes(method) for _ in range(count)),
            manner=dice.choices(("whole", "cut", "half"), (90, 6, 4))[0],
            may_wait=may_wait,
        )

    def _bytes(self, method: MethodDescriptor) -> bytes:
        dice = self._dice
        data = self._message(method.input_type, DEPTH, (method.name,)).SerializeToString()
        match dice.choices(("whole", "flipped", "cut", "noise", "undefined", "padded"), (75, 8, 4, 4, 4, 5))[
            0
        ]:
            case "flipped" if data:
                changed = bytearray(data)
                for _ in range(dice.randint(1, 4)):
                    changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
                return bytes(changed)
            case "cut" if data:
                return data[: dice.randrange(len(data))]
            case "noise":
                return dice.randbytes(dice.choice((1, 10, 1000)))
            case "undefined":
                return data + dice.choice(UNDEFINED_WIRE)
            case "padded":  # a field that nobody knows
                size = dice.choice((1, 1000, 100_000))
                return data + b"\xfa\x7f" + _varint(size) + b"p" * size
            case _:
                return data

    def _message(self, kind: Descriptor, depth: int, within: tuple[str, ...]) -> Message:
        made = GetMessageClass(kind)()
        for described in kind.fields:
            if self._dice.random() < 0.3 or (depth == 0 and described.message_type is not None):
                continue
            if described.is_repeated:
                self._fill(made, described, depth, within)
            elif described.message_type is not None:
                inner = self._message(described.message_type, depth - 1, (*within, described.name))
                getattr(made, described.name).CopyFrom(inner)
            else:
                setattr(made, described.name, self._value(described, within))
        return made

    def _fill(self, made: Message, described: FieldDescriptor, depth: int, within: tuple[str, ...]) -> None:
        count = self._dice.choices((0, 1, 2, 1001), (30, 40, 28, 2))[0]
        kind, target = described.message_type, getattr(made, described.name)
        for _ in range(count):
            if kind is None:
                target.append(self._value(described, within))
            elif kind.GetOptions().map_entry:
                entry = kind.fields_by_name
                key, value = self._value(entry["key"], within), entry["value"]
                if value.message_type is None:
                    target[key] = self._value(value, within)
                else:
                    target[key].CopyFrom(self._message(value.message_type, depth - 1, within))
            else:
                target.append(self._message(kind, min(depth - 1, 1 if count > 2 else depth), within))

    def _value(self, described: FieldDescriptor, within: tuple[str, ...]) -> Any:
        dice, of = self._dice, FieldDescriptor
        match described.cpp_type:
            case of.CPPTYPE_BOOL:
                return dice.random() < 0.5
            case of.CPPTYPE_DOUBLE | of.CPPTYPE_FLOAT:
                return dice.choice(HOSTILE_REALS)
            case of.CPPTYPE_STRING if described.type == of.TYPE_BYTES:
                return dice.randbytes(dice.choice((0, 1, 100, 10_000)))
            case of.CPPTYPE_STRING:
                return self._text(described.name, within)
            case of.CPPTYPE_ENUM:
                return dice.choice((0, 1, 99, -1, 2**31 - 1))
            case kind:
                bits = 32 if kind in (of.CPPTYPE_INT32, of.CPPTYPE_UINT32) else 64
                low = 0 if kind in (of.CPPTYPE_UINT32, of.CPPTYPE_UINT64) else -(2 ** (bits - 1))
                high = 2**bits - 1 if low == 0 else 2 ** (bits - 1) - 1
                return dice.choice([number for number in HOSTILE_WHOLES if low <= number <= high])

    def _text(self, name: str, within: tuple[str, ...]) -> str:
        """As an insider would fill the field, about as often as not."""
        dice, known = self._dice, self._known
        plausible: dict[str, Callable[[], Sequence[str]]] = {
            "app_name": lambda: (*APPS, *APPS, "hostile-3", "hostile-4", ""),
            "cluster_name": lambda: (*APPS, "hostile-pg"),
            "machine_id": lambda: known.machines,
            "volume_id": lambda: known.volumes,
            "volume": lambda: known.volumes,
            "destroy_ids": lambda: known.machines,
            "run_id": lambda: known.runs,
            "lease_nonce": lambda: known.nonces,
            "nonce": lambda: known.nonces,
            # No Postgres is begun: one member in each region is too much for this machine.
            "region": lambda: REGIONS,
            "regions": lambda: () if within[0] == "CreateCluster" else REGIONS,
            "config": lambda: (TOML,),
            "name": lambda: ("data", "hostile-name"),
            "path": lambda: ("/data",),
            "signal": lambda: ("SIGTERM", "HUP", "SIGKILL"),
            "state": lambda: ("started", "stopped", "destroyed"),
            "type": lambda: ("tcp", "http"),
            "restart_policy": lambda: ("no", "always"),
            "cpu_kind": lambda: ("shared", "performance"),
            "command": lambda: ("true", "sleep", "cat", "env"),
            "cmd": lambda: ("sleep", "600"),
            "image": lambda: ("host:",),
            "digest": lambda: ("d" * 64,),
        }
        fitting = plausible.get(name, tuple)()
        return dice.choice(fitting if fitting and dice.random() < 0.65 else HOSTILE_TEXTS)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))
