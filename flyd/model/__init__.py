"""The nouns of the product, as frozen values.

Everything that is stored in etcd or in a host's run log, and everything that decisions
read, is one of these. They are encoded as JSON by `encode`/`decode` (unknown fields are
ignored, so an older flyd can read a newer one's records). No behaviour lives here beyond
what follows from the value itself; nothing here reads a clock or makes an id.

Field names and meanings follow Fly's Machines API where there is one.
"""

from flyd.model.cluster import App, AppKind, Event, Host, Reservations, Resources, Secrets, Volume
from flyd.model.config import (
    OWN_IMAGE,
    Check,
    Concurrency,
    Guest,
    MachineConfig,
    Mount,
    RestartPolicy,
    Service,
    ServicePort,
    StopConfig,
    VolumeRule,
)
from flyd.model.identity import Authorities, Authority, Founding, JoinToken, Membership
from flyd.model.image import BlobNeed, BlobPart, HeldImage, ImageMove, ImagePlan
from flyd.model.machine import (
    MAX_EVENTS,
    CheckStatus,
    Desired,
    ExecOutput,
    ExitStatus,
    LogLine,
    Machine,
    MachineEvent,
    MachineSpec,
    MachineState,
    MachineStatus,
    Observed,
    RunEvent,
)
from flyd.model.postgres import PostgresLeader, PostgresMember
from flyd.model.value import Value, decode, encode

__all__ = [
    "MAX_EVENTS",
    "OWN_IMAGE",
    "App",
    "AppKind",
    "Authorities",
    "Authority",
    "BlobNeed",
    "BlobPart",
    "Check",
    "CheckStatus",
    "Concurrency",
    "Desired",
    "Event",
    "ExecOutput",
    "ExitStatus",
    "Founding",
    "Guest",
    "HeldImage",
    "Host",
    "ImageMove",
    "ImagePlan",
    "JoinToken",
    "LogLine",
    "Machine",
    "MachineConfig",
    "MachineEvent",
    "MachineSpec",
    "MachineState",
    "MachineStatus",
    "Membership",
    "Mount",
    "Observed",
    "PostgresLeader",
    "PostgresMember",
    "Reservations",
    "Resources",
    "RestartPolicy",
    "RunEvent",
    "Secrets",
    "Service",
    "ServicePort",
    "StopConfig",
    "Value",
    "Volume",
    "VolumeRule",
    "decode",
    "encode",
]
