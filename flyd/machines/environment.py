"""A claim made concrete on one host: the environment, command and mounts of a machine.

Owns the reserved variables (FLY_*, PRIMARY_REGION, PORT), their order (secrets over env,
reserved names over both), and three rewritings:

- `<postgres app>.internal:5432` becomes this host's endpoint that follows the primary, and
  port 5433 the one that leads to the nearest member, for reads;
- `$NAME` and `${NAME}` in command words become the machine's own variables (no shell);
- under the process driver, which has no containers, a mount's path in the machine becomes
  the volume's path on the host.

Pure; called by operations.py with paths that the volume and source stores gave.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from flyd.model import Host, Machine, MachineSpec, Value

POSTGRES_PORT = 5432
READ_PORT = POSTGRES_PORT + 1
SOURCE_PREFIX = "source:sha256:"
PROCESS_DRIVER = "process"
RUN_AS = "run_as"  # metadata: the user a machine runs as


class VolumeGrant(Value, frozen=True, kw_only=True):
    """A volume that this machine holds: the epoch fences the attach."""

    id: str
    epoch: int
    size_gb: int
    path: str  # in the machine


class Assignment(Value, frozen=True, kw_only=True):
    """All that a host needs to run a machine without asking etcd again.

    Kept in the host's records, so that restarts go on while etcd is down.
    """

    claim: Machine
    primary_region: str
    secrets: dict[str, str] = {}
    volumes: tuple[VolumeGrant, ...] = ()
    databases: dict[str, int] = {}  # Postgres app -> its endpoint's port on every host; reads: the next one


def source_digest(image: str) -> str:
    """The sha256 of the source tree that an image names; empty for `host:`."""
    return image.removeprefix(SOURCE_PREFIX) if image.startswith(SOURCE_PREFIX) else ""


def machine_spec(
    assignment: Assignment, host: Host, source_path: str, volume_paths: Mapping[str, str]
) -> MachineSpec:
    """What the driver is to run. `volume_paths` maps a volume's id to its path on this host."""
    claim = assignment.claim
    config = claim.config
    mounts = {grant.path: volume_paths[grant.id] for grant in assignment.volumes}
    rewritten = mounts if host.driver == PROCESS_DRIVER else {}
    given = {
        name: _localise(value, assignment, host, rewritten)
        for name, value in {**config.env, **assignment.secrets}.items()
    }
    if "PORT" not in given and config.services:
        given["PORT"] = str(config.services[0].internal_port)
    env = {**given, **reserved(assignment)}
    command = tuple(_expand(_localise(word, assignment, host, rewritten), env) for word in config.cmd)
    return MachineSpec(
        machine_id=claim.id,
        app=claim.app,
        instance_id=claim.instance_id,
        command=command,
        env=env,
        private_ip=claim.private_ip,
        image=config.image,
        source_path=source_path,
        mounts=tuple((on_host, in_machine) for in_machine, on_host in mounts.items()),
        user=config.metadata.get(RUN_AS, ""),
        guest=config.guest,
    )


def reserved(assignment: Assignment) -> dict[str, str]:
    """The variables that flyd sets and nobody overrides."""
    claim = assignment.claim
    names = {
        "FLY_APP_NAME": claim.app,
        "FLY_MACHINE_ID": claim.id,
        "FLY_ALLOC_ID": claim.id,
        "FLY_REGION": claim.region,
        "FLY_IMAGE_REF": claim.config.image,
        "FLY_MACHINE_VERSION": claim.instance_id,
        "FLY_PRIVATE_IP": claim.private_ip,
        "FLY_PROCESS_GROUP": claim.config.process_group,
        "FLY_VM_MEMORY_MB": str(claim.config.guest.memory_mb),
        "PRIMARY_REGION": assignment.primary_region,
    }
    if claim.release:
        names["FLY_RELEASE_VERSION"] = str(claim.release)
    return names


def _localise(text: str, assignment: Assignment, host: Host, mounts: Mapping[str, str]) -> str:
    """Put this host's own addresses and paths where the machine's names stand."""
    for name, port in sorted(assignment.databases.items()):
        for named, own in ((POSTGRES_PORT, port), (READ_PORT, port + 1)):
            pattern = rf"(?<![\w.-]){re.escape(name)}\.internal:{named}(?!\d)"
            text = re.sub(pattern, f"{host.address}:{own}", text)
    if not mounts:
        return text
    # One pass over all mounts, longest path first: a host path may itself contain a mount's path.
    longest_first = sorted(mounts, key=lambda path: (-len(path), path))
    paths = "|".join(re.escape(path.rstrip("/")) for path in longest_first)
    by_path = {path.rstrip("/"): on_host for path, on_host in mounts.items()}
    return re.sub(rf"(?<![\w.-])({paths})(?=$|[/:;,&?\"'\s])", lambda m: by_path[m.group(1)], text)


def _expand(word: str, env: Mapping[str, str]) -> str:
    """Replace references to variables that the machine has; others stay as they are."""
    return re.sub(
        r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))",
        lambda m: env.get(m.group(1) or m.group(2), m.group(0)),
        word,
    )
