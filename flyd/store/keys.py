"""The whole key space of etcd, on one page.

Everything lives under ROOT. Values are JSON (flyd/model.py, pgha/model.py). Who writes:

    hosts/<host>                     Host           the host, when it joins; stays when it is lost
    alive/<host>                     true           the host, under its lease: there while it lives
    memberships/<host>               Membership     its founding or joining, its renewals; expelling marks it
    tokens/<token>                   JoinToken      the API; the host that uses it
    authorities                      Authorities    the founding host, once: who reads it can sign
    losses/<host>                    Loss           placement's leader, while the host is lost
    drains/<host>                    Drain          the API begins and cancels; placement's leader
    settings/host_loss               LossRule       the API
    reservations/<host>              Reservations   placement, in the txn that places or frees
    apps/<app>                       App            the API
    secrets/<app>                    Secrets        the API
    machines/<app>/<machine>         Machine        placement, deploys, users: the intent
    status/<app>/<machine>           MachineStatus  the machine's host, nobody else
    volumes/<app>/<volume>           Volume         placement (attach epoch), the API
    destroyed_volumes/<host>/<volume>  Destroyed    the API (24 h to take it back); the host, which purges
    volume_moves/<app>/<volume>      VolumeMove     the API begins it; the volume's host; the new host ends it
    volume_copies/<app>/<volume>/<host>  VolumeCopy  the host that has the copy
    releases/<app>/<version>         Release        the API (deploy); version is 8 digits
    runs/<app>/<run>                 DeployRun      the elected deployer; created by the API
    ports/<port>                     app name       the API: who owns a port of every edge;
                                                    the elected deployer gives back
    leaders/<role>                   host name      store/leader.py, under a lease
    events/<app>/<time ns>-<source>  Event          anyone; incidents/recorder.py prunes
    pg/<cluster>/leader              PostgresLeader pgha, by a take-over's compare-and-set
    pg/<cluster>/members/<node>      PostgresMember the member itself
    pg/<cluster>/...                 the rest: see pgha/keys.py

A trailing slash is part of every prefix, so `machines/web/` never matches `machines/web2/`.
"""

from __future__ import annotations

ROOT = "/flyd/v1/"

HOSTS = ROOT + "hosts/"
ALIVE = ROOT + "alive/"
MEMBERSHIPS = ROOT + "memberships/"
TOKENS = ROOT + "tokens/"
AUTHORITIES = ROOT + "authorities"
LOSSES = ROOT + "losses/"
DRAINS = ROOT + "drains/"
SETTINGS = ROOT + "settings/"
HOST_LOSS = SETTINGS + "host_loss"
RESERVATIONS = ROOT + "reservations/"
APPS = ROOT + "apps/"
SECRETS = ROOT + "secrets/"
MACHINES = ROOT + "machines/"
STATUS = ROOT + "status/"
VOLUMES = ROOT + "volumes/"
VOLUME_MOVES = ROOT + "volume_moves/"
VOLUME_COPIES = ROOT + "volume_copies/"
RELEASES = ROOT + "releases/"
RUNS = ROOT + "runs/"
PORTS = ROOT + "ports/"
LEADERS = ROOT + "leaders/"
EVENTS = ROOT + "events/"
PG = ROOT + "pg/"


def host(name: str) -> str:
    """A host's description."""
    return HOSTS + name


def alive(name: str) -> str:
    """A host's sign of life."""
    return ALIVE + name


def membership(host_name: str) -> str:
    """A host's stay in the cluster."""
    return MEMBERSHIPS + host_name


def token(token_id: str) -> str:
    """A join token."""
    return TOKENS + token_id


def loss(host_name: str) -> str:
    """What became of a lost host."""
    return LOSSES + host_name


def drain(host_name: str) -> str:
    """A host's drain."""
    return DRAINS + host_name


def reservations(host_name: str) -> str:
    """What is promised on a host."""
    return RESERVATIONS + host_name


def app(name: str) -> str:
    """An application."""
    return APPS + name


def secrets(app_name: str) -> str:
    """An application's secrets."""
    return SECRETS + app_name


def machine(app_name: str, machine_id: str) -> str:
    """A machine's intent."""
    return f"{MACHINES}{app_name}/{machine_id}"


def status(app_name: str, machine_id: str) -> str:
    """A machine's status as its host says."""
    return f"{STATUS}{app_name}/{machine_id}"


def volume(app_name: str, volume_id: str) -> str:
    """A volume."""
    return f"{VOLUMES}{app_name}/{volume_id}"


def volume_move(app_name: str, volume_id: str) -> str:
    """A volume's move to another host."""
    return f"{VOLUME_MOVES}{app_name}/{volume_id}"


def volume_copy(app_name: str, volume_id: str, host_name: str) -> str:
    """A volume's copy on another host."""
    return f"{VOLUME_COPIES}{app_name}/{volume_id}/{host_name}"


def release(app_name: str, version: int) -> str:
    """A release; eight digits keep the key order the version order."""
    return f"{RELEASES}{app_name}/{version:08d}"


def run(app_name: str, run_id: str) -> str:
    """A deploy run."""
    return f"{RUNS}{app_name}/{run_id}"


def port(number: int) -> str:
    """The owner of an edge port."""
    return f"{PORTS}{number}"


def is_postgres_lease(key: str) -> bool:
    """Whether it is a Postgres primary's sign of life (pgha/keys.py): only its members look at those."""
    return key.startswith(PG) and key.endswith("/lease")


def leader(role: str) -> str:
    """Who leads in a role."""
    return LEADERS + role


def event(app_name: str, at_s: float, source: str) -> str:
    """A line of history; nanoseconds, zero-padded, keep the key order the time order."""
    return f"{EVENTS}{app_name}/{int(at_s * 1e9):020d}-{source}"


def last_part(key: str) -> str:
    """The part of a key after its last slash."""
    return key.rpartition("/")[2]


def postgres_leader(cluster: str) -> str:
    """Who may be primary of a Postgres cluster."""
    return f"{PG}{cluster}/leader"


def postgres_members(cluster: str) -> str:
    """Prefix of what the members of a Postgres cluster say of themselves."""
    return f"{PG}{cluster}/members/"
