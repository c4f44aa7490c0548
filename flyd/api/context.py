"""What every servicer is given: this host's parts, built once by the daemon."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from flyd.api.peers import Peers
from flyd.errors import NotFound
from flyd.model import App, Host, Machine, MachineStatus
from flyd.placement.placer import Placer
from flyd.ports import KV, Clock, Driver, Entropy, ImageStore, SourceStore
from flyd.storage.local import LocalVolumes
from flyd.store import keys
from flyd.store.mirror import Mirror


@dataclass(frozen=True)
class ApiContext:
    """The parts of one flyd that its API reads from and writes to."""

    host: Host
    kv: KV
    mirror: Mirror
    clock: Clock
    entropy: Entropy
    driver: Driver
    sources: SourceStore
    peers: Peers
    etcd_endpoints: tuple[str, ...]  # told to hosts that join
    images: ImageStore | None = None  # None: this host's driver runs no containers
    volumes: LocalVolumes | None = None  # None: in tests of what needs no data

    @cached_property
    def placer(self) -> Placer:
        """What places machines for this API, all requests together."""
        return Placer(self.kv, self.mirror, clock=self.clock, entropy=self.entropy)

    def app(self, name: str) -> App:
        """The application, or NotFound with the names that exist."""
        found = self.mirror.get(keys.app(name), App)
        if found is None:
            known = ", ".join(v.value.name for v in self.mirror.list(keys.APPS, App)) or "none yet"
            raise NotFound(f"no app is called {name!r}", hint=f"Apps: {known}. `fly apps create` makes one.")
        return found.value

    def machine(self, app: str, machine_id: str) -> Machine:
        """The machine's claim, or NotFound. An empty `app` searches all of them."""
        if app:
            found = self.mirror.get(keys.machine(app, machine_id), Machine)
            if found is not None:
                return found.value
        else:
            for item in self.mirror.list(keys.MACHINES, Machine):
                if item.value.id == machine_id:
                    return item.value
        raise NotFound(
            f"no machine {machine_id!r}" + (f" in app {app!r}" if app else ""),
            hint="`fly machine list` -a APP shows the machines of an app, `--all` those of every app.",
        )

    def status(self, machine: Machine) -> MachineStatus | None:
        """What the machine's host last said of it; None before it said anything."""
        found = self.mirror.get(keys.status(machine.app, machine.id), MachineStatus)
        return found.value if found else None

    def alive(self, host: str) -> bool:
        """Whether the host's lease stands."""
        return self.mirror.get(keys.alive(host), bool) is not None
