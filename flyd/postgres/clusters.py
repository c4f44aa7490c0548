"""Postgres clusters as applications of flyd: an app of kind postgres, one machine with a volume
for each member, each running pgha (which alone decides who is primary).

Member names are <cluster>-1, <cluster>-2, ...: they are the constant voter set and stay when a
machine is replaced. `create` can be called again after a crash: what exists is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from flyd.errors import Conflict, InvalidInput
from flyd.model import (
    OWN_IMAGE,
    App,
    AppKind,
    Check,
    Guest,
    Machine,
    MachineConfig,
    Mount,
    RestartPolicy,
    Secrets,
    StopConfig,
    Value,
    decode,
    encode,
)
from flyd.placement.placer import Placer
from flyd.placement.scheduler import Order
from flyd.ports import KV, Clock, Entropy, Put, Unchanged
from flyd.store import keys

FIRST_PORT = 5432
LAST_PORT = 5631
SUPERUSER_SECRET = "PGHA_SUPERUSER_PASSWORD"
REPLICATION_SECRET = "PGHA_REPLICATION_PASSWORD"
STOP_TIMEOUT_S = 30.0
DATA_PATH = "/data"
ARCHIVE_ENV = "PGHA_ARCHIVE_DIR"


class ArchiveOptions(Value, frozen=True, kw_only=True):
    """Where a cluster's WAL and base backups go, and whose it begins with."""

    directory: str = ""  # of this cluster alone; empty: none
    restore_from: str = ""  # another cluster's directory
    restore_to: str = ""  # ISO 8601; empty: all that was archived

    def env(self) -> dict[str, str]:
        """As pgha is told."""
        told = {
            ARCHIVE_ENV: self.directory,
            "PGHA_RESTORE_FROM": self.restore_from,
            "PGHA_RESTORE_TO": self.restore_to,
        }
        return {name: value for name, value in told.items() if value}


NO_ARCHIVE = ArchiveOptions()


def archive_options(
    shared: str, cluster: str, restore_from: str = "", restore_to: str = ""
) -> ArchiveOptions:
    """A cluster's own part of a folder that all hosts reach; refuses one that cannot be."""
    if not shared:
        return ArchiveOptions()
    inside = PurePosixPath(shared).is_relative_to(DATA_PATH)
    if not shared.startswith("/") or ".." in PurePosixPath(shared).parts or inside:
        raise InvalidInput(
            f"{shared!r} can not be the archive's folder",
            hint=f"Give a full path that every host reaches, not below {DATA_PATH}: that is each volume.",
        )
    directory = str(PurePosixPath(shared) / cluster)
    return ArchiveOptions(directory=directory, restore_from=restore_from, restore_to=restore_to)


def member_config(
    cluster: str,
    node: str,
    voters: Sequence[str],
    memory_mb: int,
    volume_size_gb: int,
    archive: ArchiveOptions = NO_ARCHIVE,
) -> MachineConfig:
    """What one member's machine is. Pure."""
    return MachineConfig(
        image=OWN_IMAGE,
        cmd=("pgha", "run"),
        env={
            "PGHA_CLUSTER": cluster,
            "PGHA_NODE": node,
            "PGHA_VOTERS": ",".join(voters),
            "PGHA_DATA_DIR": f"{DATA_PATH}/postgres",
            **archive.env(),
        },
        guest=Guest(memory_mb=memory_mb),
        checks={"postgres": Check(kind="tcp", port=FIRST_PORT, interval_s=5.0, grace_period_s=30.0)},
        mounts=(Mount(path=DATA_PATH, name="pg_data", size_gb=volume_size_gb),),
        restart=RestartPolicy(policy="always"),
        stop=StopConfig(signal="SIGTERM", timeout_s=STOP_TIMEOUT_S),
        metadata={"postgres_node": node},
        process_group="postgres",
    )


async def create(
    kv: KV,
    placer: Placer,
    name: str,
    regions: Sequence[str],
    *,
    memory_mb: int,
    volume_size_gb: int,
    network: str = "",
    archive: ArchiveOptions = NO_ARCHIVE,
    clock: Clock,
    entropy: Entropy,
) -> App:
    """Make the app with a port of its own, its passwords, and a member in each region."""
    if len(regions) < 2:
        raise InvalidInput(
            f"a Postgres cluster needs at least two regions, not {len(regions)}",
            hint="With one copy, losing its host loses the data. Example: --regions ams,iad,sin",
        )
    app = await _create_app(kv, name, regions, network, clock, entropy)
    voters = [f"{name}-{number}" for number in range(1, len(regions) + 1)]
    existing = await _machine_names(kv, name)
    for node, region in zip(voters, regions, strict=True):
        if node in existing:
            continue
        config = member_config(name, node, voters, memory_mb, volume_size_gb, archive)
        await placer.place(Order(app=name, region=region, name=node, config=config))
    return app


async def _create_app(
    kv: KV, name: str, regions: Sequence[str], network: str, clock: Clock, entropy: Entropy
) -> App:
    """The app, its secrets and its endpoints' two ports in one transaction."""
    for port in await _free_pairs(kv):
        app = App(
            name=name,
            kind=AppKind.POSTGRES,
            created_at_s=clock.wall_s(),
            regions=tuple(regions),
            endpoint_port=port,
            network=network,
        )
        claims = (keys.port(app.endpoint_port), keys.port(app.read_port))
        secrets = Secrets(
            app=name, values={SUPERUSER_SECRET: entropy.token(24), REPLICATION_SECRET: entropy.token(24)}
        )
        result = await kv.txn(
            [Unchanged(key, 0) for key in (keys.app(name), *claims)],
            [
                Put(keys.app(name), encode(app)),
                Put(keys.secrets(name), encode(secrets)),
                *(Put(key, f'"{name}"'.encode()) for key in claims),
            ],
        )
        if result.succeeded:
            return app
        taken = await kv.get(keys.app(name))
        if taken is not None:
            found = decode(taken.value, App)
            if (found.kind, found.regions, found.network) == (AppKind.POSTGRES, tuple(regions), network):
                return found
            raise Conflict(
                f"an app is already called {name!r}",
                hint="Choose another name, or `fly apps list` to see what it is.",
            )
    raise Conflict(f"all ports from {FIRST_PORT} to {LAST_PORT} have an owner already")


async def _free_pairs(kv: KV) -> list[int]:
    """The first ports of pairs: an endpoint's, and the one after it for reads."""
    taken = {keys.last_part(item.key) for item in (await kv.list(keys.PORTS)).items}
    return [port for port in range(FIRST_PORT, LAST_PORT, 2) if taken.isdisjoint((str(port), str(port + 1)))]


async def _machine_names(kv: KV, app: str) -> set[str]:
    listing = await kv.list(f"{keys.MACHINES}{app}/")
    return {decode(item.value, Machine).name for item in listing.items}
