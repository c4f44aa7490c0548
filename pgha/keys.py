"""The controller's keys in etcd, beside those that the rest of flyd reads.

pg/<cluster>/leader              PostgresLeader  a take-over's compare-and-set; `serving` by the leader
pg/<cluster>/members/<node>      PostgresMember  the member itself
pg/<cluster>/bootstrap           Bootstrap       once, by compare-and-set; never changed
pg/<cluster>/membership          Membership      its first and each step: the primary; `target`: the API
pg/<cluster>/lease               Lease           its holder, by compare-and-set every RENEW_S
pg/<cluster>/votes/<rev>/<node>  Vote            the voter; <rev>: 16 digits, the lease's revision
pg/<cluster>/doubts/<node>       Doubt           the voter; it holds for one lease revision only
pg/<cluster>/history/<epoch>     Lineage         the take-over of that epoch; 8 digits
pg/<cluster>/switchover          Switchover      the API; removed by who carries it out or refuses it
pg/<cluster>/pause               Pause           the API, which removes it, too
pg/<cluster>/backup              Backup          the API; the primary takes it and removes the key
pg/<cluster>/backups/<name>      Backup          the primary that took it, or failed to
pg/<cluster>/schedule            Schedule        the API, which removes it, too
pg/<cluster>/drill               Drill           the API or the primary; a replica does it and removes the key
pg/<cluster>/drills/<backup>     DrillResult     the replica that tried it; removed with the backup
pg/<cluster>/archive             ArchiveState    the primary
pg/<cluster>/storage/<node>      Storage         the member itself
pg/<cluster>/archive_owner       ArchiveOwner    the first member whose archive is ready; never changed
"""

from __future__ import annotations

from flyd.store.keys import PG, postgres_leader, postgres_members

__all__ = [
    "archive",
    "archive_owner",
    "backup",
    "backup_wish",
    "backups",
    "bootstrap",
    "cluster",
    "doubt",
    "doubts",
    "drill",
    "drill_result",
    "drill_results",
    "histories",
    "history",
    "lease",
    "member",
    "membership",
    "pause",
    "postgres_leader",
    "schedule",
    "storage",
    "storages",
    "switchover",
    "vote",
    "votes",
]


def cluster(name: str) -> str:
    """Prefix of everything of one cluster."""
    return f"{PG}{name}/"


def bootstrap(name: str) -> str:
    """Who may run initdb."""
    return f"{PG}{name}/bootstrap"


def lease(name: str) -> str:
    """The holder's sign of life."""
    return f"{PG}{name}/lease"


def member(name: str, node: str) -> str:
    """What one member says of itself."""
    return postgres_members(name) + node


def membership(name: str) -> str:
    """Who the members are, and who they are to be."""
    return f"{PG}{name}/membership"


def votes(name: str, revision: int) -> str:
    """Prefix of the votes of one round."""
    return f"{PG}{name}/votes/{revision:016d}/"


def vote(name: str, revision: int, node: str) -> str:
    """One member's vote in one round."""
    return votes(name, revision) + node


def doubts(name: str) -> str:
    """Prefix of what voters hold against the present holder."""
    return f"{PG}{name}/doubts/"


def doubt(name: str, node: str) -> str:
    """One voter's latest word that the holder is gone."""
    return doubts(name) + node


def histories(name: str) -> str:
    """Prefix of all epochs."""
    return f"{PG}{name}/history/"


def history(name: str, epoch: int) -> str:
    """Where one epoch began."""
    return f"{histories(name)}{epoch:08d}"


def backup_wish(name: str) -> str:
    """A base backup is to be taken."""
    return f"{PG}{name}/backup"


def backups(name: str) -> str:
    """Prefix of the base backups."""
    return f"{PG}{name}/backups/"


def backup(name: str, backup_name: str) -> str:
    """One base backup."""
    return backups(name) + backup_name


def schedule(name: str) -> str:
    """When base backups are taken and how many are kept."""
    return f"{PG}{name}/schedule"


def drill(name: str) -> str:
    """A trial restore is to be made."""
    return f"{PG}{name}/drill"


def drill_results(name: str) -> str:
    """Prefix of what became of trial restores."""
    return f"{PG}{name}/drills/"


def drill_result(name: str, backup_name: str) -> str:
    """Of one backup's last trial restore."""
    return drill_results(name) + backup_name


def archive(name: str) -> str:
    """How far each backup reaches."""
    return f"{PG}{name}/archive"


def storages(name: str) -> str:
    """Prefix of what members say of their disks."""
    return f"{PG}{name}/storage/"


def storage(name: str, node: str) -> str:
    """What one member says of its disk and its archiver."""
    return storages(name) + node


def archive_owner(name: str) -> str:
    """Whose the archive is."""
    return f"{PG}{name}/archive_owner"


def pause(name: str) -> str:
    """There while nothing may happen by itself."""
    return f"{PG}{name}/pause"


def switchover(name: str) -> str:
    """A wish to move the primary."""
    return f"{PG}{name}/switchover"
