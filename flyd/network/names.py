"""What the names of the private network mean on one host. Pure.

    <app>.internal                                 its started machines; of a Postgres app: this host's
                                                   own address, whose endpoint port follows the primary
    global.<app>.internal                          the same
    <region>.<app>.internal                        those in a region
    <id>.vm.<app>.internal                         one machine
    <group>.process.<app>.internal                 those of a process group
    top<n>.nearest.of.<app>.internal               the n nearest
    <value>.<key>.kv._metadata.<app>.internal      those whose metadata says so; of a Postgres app also
                                                   primary.role and replica.role, as the cluster stands now
    <app>.flycast                                  this host's own address: through the edge
    TXT [all.]regions. [all.]vms.<app>.internal, _apps.internal, [all.]_instances.internal

Rules:
- Only started machines are answered, nearest region first, then this host's own, then by id. Health
  is not asked: that is the edge's matter.
- Machines of hosts without a sign of life are left out while any other is left to answer. (Where
  they are all there is they are answered: a host whose flyd is away runs on.)
- Machines of hosts that were expelled are no longer named.
- A machine sees the apps of its own network only. Whoever is no machine (the host itself) sees all.
- A name that is ours and has nothing of the asked type is answered empty, never forwarded.
- AAAA means the same machines as A, of those hosts whose machines have IPv6 addresses that all others
  reach: with machines in containers, and a tunnel. A host's own address (endpoints, flycast) is IPv4.

Called by flyd/network/dns.py, once a question. Knows nothing of packets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum

from flyd.model import (
    App,
    AppKind,
    Desired,
    Host,
    Machine,
    MachineState,
    MachineStatus,
    PostgresLeader,
    Value,
)
from flyd.network.addresses import address6, subnet6
from flyd.network.regions import REGIONS, nearest_first

INTERNAL = "internal"
FLYCAST = "flycast"
TTL_S = 5
MAX_TEXT_BYTES = 32_000  # of a TXT answer; a DNS message ends at 64 KiB. What is over is left out.


class RecordType(StrEnum):
    """What is asked of a name. OTHER is every type of which we have nothing."""

    A = "A"
    AAAA = "AAAA"
    TXT = "TXT"
    OTHER = "OTHER"


class Outcome(StrEnum):
    """Whether a name is there, is not, or is for somebody else to say."""

    FOUND = "found"
    NO_SUCH_NAME = "no such name"
    NOT_OURS = "not ours"


class Question(Value, frozen=True, kw_only=True):
    """One question; `source` is the address that asks, "" is the host itself."""

    name: str
    type: RecordType
    source: str = ""


class Answer(Value, frozen=True, kw_only=True):
    """The records of the asked type: addresses, or one text for each TXT record."""

    outcome: Outcome
    records: tuple[str, ...] = ()


class Placed(Value, frozen=True, kw_only=True):
    """A machine, and what is known of it."""

    machine: Machine
    started: bool
    reachable: bool  # its host shows a sign of life


class NamesView(Value, frozen=True, kw_only=True):
    """All that names mean on `host`. Built by `names_view`; machines are in the order of answers."""

    host: Host
    regions: tuple[str, ...] = ()
    apps: dict[str, App] = {}
    machines: dict[str, tuple[Placed, ...]] = {}  # by app
    leaders: dict[str, PostgresLeader] = {}  # by app
    networks: dict[str, str] = {}  # the network of each machine's address
    six: dict[str, str] = {}  # the IPv6 address of each machine's address, where it has one


class _Named(Value, frozen=True, kw_only=True):
    """What a name has: None for types it can not have."""

    addresses: tuple[str, ...] = ()
    text: str | None = None


def names_view(
    host: Host,
    *,
    hosts: Iterable[Host],
    alive: Iterable[str],
    apps: Iterable[App],
    machines: Iterable[Machine],
    statuses: Iterable[MachineStatus],
    leaders: Iterable[PostgresLeader],
    expelled: Sequence[str] = (),
) -> NamesView:
    """The view of `host`, sorted once for all questions; `expelled` are names of hosts."""
    existing = [m for m in machines if m.desired is not Desired.DESTROYED]
    known = [m for m in existing if m.host not in expelled]
    gone = [m.private_ip for m in existing if m.host in expelled]
    rank = {region: n for n, region in enumerate(nearest_first(host.region, (m.region for m in known)))}
    living = frozenset((host.name, *alive))
    by_id = {s.id: s for s in statuses}
    all_hosts = {h.name: h for h in (*hosts, host)}
    tunnelled = frozenset(h.name for h in all_hosts.values() if h.wg_public_key and subnet6(h) is not None)
    by_name = {a.name: a for a in apps}
    grouped: dict[str, list[Placed]] = {}
    for machine in sorted(known, key=lambda m: (rank[m.region], m.host != host.name, m.id)):
        placed = Placed(
            machine=machine,
            started=_started(machine, by_id.get(machine.id)),
            reachable=machine.host in living,
        )
        grouped.setdefault(machine.app, []).append(placed)
    return NamesView(
        host=host,
        regions=tuple(sorted(h.region for h in all_hosts.values() if h.name not in expelled)),
        apps=by_name,
        machines={app: tuple(group) for app, group in grouped.items()},
        leaders={leader.cluster: leader for leader in leaders if _ip(leader) not in gone},
        networks={m.private_ip: by_name[m.app].network for m in known if m.app in by_name},
        six={m.private_ip: address6(m.private_ip) for m in known if m.host in tunnelled},
    )


def _started(machine: Machine, status: MachineStatus | None) -> bool:
    """A former host's word does not count, and what is about to stop is no longer named."""
    return (
        machine.desired is Desired.STARTED
        and status is not None
        and status.host == machine.host
        and status.state is MachineState.STARTED
    )


def answer(question: Question, view: NamesView) -> Answer:
    """What this host says to the question."""
    labels = question.name.lower().rstrip(".").split(".")
    domain = labels.pop()
    if domain not in (INTERNAL, FLYCAST):
        return Answer(outcome=Outcome.NOT_OURS)
    visible = _visible(view, question.source)
    found = _flycast(visible, labels) if domain == FLYCAST else _internal(visible, labels)
    if found is None:
        return Answer(outcome=Outcome.NO_SUCH_NAME)
    records: tuple[str, ...] = ()
    if question.type is RecordType.A:
        records = found.addresses
    elif question.type is RecordType.AAAA:
        records = tuple(view.six[a] for a in found.addresses if a in view.six)
    elif question.type is RecordType.TXT and found.text is not None:
        records = (found.text,)
    return Answer(outcome=Outcome.FOUND, records=records)


# --------------------------------------------------------------------------- who sees what


class _Visible(Value, frozen=True, kw_only=True):
    """The view as one asker sees it: the apps of `network` only, all if that is None."""

    view: NamesView
    network: str | None

    def app(self, name: str) -> App | None:
        app = self.view.apps.get(name)
        return app if app is not None and self.network in (None, app.network) else None

    def apps(self) -> list[str]:
        return [name for name in sorted(self.view.apps) if self.app(name) is not None]


def _visible(view: NamesView, source: str) -> _Visible:
    return _Visible(view=view, network=view.networks.get(source))


# --------------------------------------------------------------------------- names


def _flycast(visible: _Visible, labels: Sequence[str]) -> _Named | None:
    if len(labels) != 1 or visible.app(labels[0]) is None:
        return None
    return _Named(addresses=(visible.view.host.address,))


def _internal(visible: _Visible, labels: list[str]) -> _Named | None:
    """The name without its `.internal`."""
    match labels:
        case ["_apps"]:
            return _Named(text=_joined(",", visible.apps()))
        case ["_instances"]:
            return _Named(text=_instances(visible, with_stopped=False))
        case ["all", "_instances"]:
            return _Named(text=_instances(visible, with_stopped=True))
        case [*within, name]:
            app = visible.app(name)
            return _of_app(visible.view, app, within) if app is not None else None
        case _:
            return None


def _of_app(view: NamesView, app: App, within: list[str]) -> _Named | None:
    """A name within an app's: what stands before `<app>.internal`."""
    placed = view.machines.get(app.name, ())
    started = _answerable(placed)
    match within:
        case [] | ["global"]:
            if app.kind is AppKind.POSTGRES:
                return _Named(addresses=(view.host.address,))
            return _addresses(started)
        case ["regions"] | ["all", "regions"]:
            chosen = started if len(within) == 1 else placed
            return _Named(text=_joined(",", dict.fromkeys(p.machine.region for p in chosen)))
        case ["vms"] | ["all", "vms"]:
            chosen = started if len(within) == 1 else placed
            return _Named(text=_joined(",", (f"{p.machine.id} {p.machine.region}" for p in chosen)))
        case [machine_id, "vm"]:
            return _addresses([p for p in placed if p.started and p.machine.id == machine_id])
        case [group, "process"]:
            return _addresses(_answerable([p for p in placed if p.machine.config.process_group == group]))
        case [top, "nearest", "of"] if _top(top):
            return _addresses(started[: _top(top)])
        case [value, key, "kv", "_metadata"]:
            return _metadata(view, app, placed, key, value)
        case [region] if region in REGIONS or region in view.regions:
            return _addresses(_answerable([p for p in placed if p.machine.region == region]))
        case _:
            return None


def _top(label: str) -> int:
    """The n of `top<n>`, 0 if the label is not one."""
    count = label.removeprefix("top")
    return int(count) if label != count and count.isascii() and count.isdecimal() and len(count) < 4 else 0


def _metadata(view: NamesView, app: App, placed: Sequence[Placed], key: str, value: str) -> _Named:
    """DNS folds case, so the comparison does too."""
    if app.kind is AppKind.POSTGRES and key == "role":
        return _postgres_role(view, app, placed, value)
    return _addresses(
        _answerable(
            [
                p
                for p in placed
                if any(k.lower() == key and v.lower() == value for k, v in p.machine.config.metadata.items())
            ]
        )
    )


def _postgres_role(view: NamesView, app: App, placed: Sequence[Placed], role: str) -> _Named:
    """By who leads now, whether or not its host shows a sign of life."""
    leader = view.leaders.get(app.name)
    primary = _ip(leader) if leader is not None and leader.serving else ""
    if role == "primary":
        return _Named(addresses=(primary,) if primary else ())
    if role == "replica":
        return _addresses(_answerable([p for p in placed if p.machine.private_ip != primary]))
    return _Named()


def _ip(leader: PostgresLeader) -> str:
    return leader.address.rpartition(":")[0]


def _answerable(placed: Sequence[Placed]) -> list[Placed]:
    """The started ones; without those of silent hosts, unless these are all."""
    started = [p for p in placed if p.started]
    return [p for p in started if p.reachable] or started


def _addresses(placed: Iterable[Placed]) -> _Named:
    return _Named(addresses=tuple(p.machine.private_ip for p in placed))


def _instances(visible: _Visible, *, with_stopped: bool) -> str:
    placed = (p for app in visible.apps() for p in visible.view.machines.get(app, ()))
    return _joined(
        ";",
        (
            f"instance={p.machine.id},app={p.machine.app},ip={p.machine.private_ip},region={p.machine.region}"
            for p in placed
            if p.started or with_stopped
        ),
    )


def _joined(separator: str, parts: Iterable[str]) -> str:
    """As many of the parts as fit in one answer."""
    chosen: list[str] = []
    room = MAX_TEXT_BYTES
    for part in parts:
        room -= len(part.encode()) + len(separator)
        if room < 0:
            break
        chosen.append(part)
    return separator.join(chosen)
