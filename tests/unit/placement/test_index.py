"""The indexed snapshot: after any changes, in any order, it is as if it had been built afresh."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flyd.model import Desired, Guest, Host, Machine, Reservations, Resources, Volume
from flyd.placement.index import Snapshot
from flyd.placement.scheduler import Request, schedule
from tests.support.placing import make_host, make_machine

NAMES = st.sampled_from(("ams-1", "ams-2", "iad-1"))
IDS = st.sampled_from(("m1", "m2", "m3", "m4"))
GROUPS = st.sampled_from(("app", "worker"))


def content(snapshot: Snapshot) -> dict[str, Any]:
    """All that it knows, its index included."""
    known = dict(vars(snapshot))
    # Made when asked for, and empty counts: what is left of what was there.
    known["_sorted_volumes"] = None
    known["_groups_on"] = {host: groups for host, groups in known["_groups_on"].items() if groups}
    known["_spreads"] = {
        group: (spread.on_host, spread.in_region, {r: by for r, by in spread.open.items() if by})
        for group, spread in known["_spreads"].items()
    }
    return known


class Changes(RuleBasedStateMachine):
    """Records come, change and go in any order: also a machine before its host, a host after its lease."""

    def __init__(self) -> None:
        super().__init__()
        self.snapshot = Snapshot()
        self.hosts: dict[str, Host] = {}
        self.alive: dict[str, None] = {}
        self.reservations: dict[str, Reservations] = {}
        self.volumes: dict[str, Volume] = {}
        self.machines: dict[str, Machine] = {}

    @rule(
        name=NAMES, cordoned=st.booleans(), memory_mb=st.integers(0, 3), region=st.sampled_from(("ams", "x"))
    )
    def host_joins(self, name: str, cordoned: bool, memory_mb: int, region: str) -> None:
        host = make_host(name, cordoned=cordoned, memory_mb=1024 * memory_mb)
        self.hosts[name] = msgspec.structs.replace(host, region=region)
        self.snapshot.put_host(self.hosts[name])

    @rule(name=NAMES)
    def host_is_removed(self, name: str) -> None:
        self.hosts.pop(name, None)
        self.snapshot.drop_host(name)

    @rule(name=NAMES, alive=st.booleans())
    def lease(self, name: str, alive: bool) -> None:
        if alive:
            self.alive[name] = None
        else:
            self.alive.pop(name, None)
        self.snapshot.set_alive(name, alive)

    @rule(name=NAMES, memory_mb=st.integers(0, 2048))
    def promise(self, name: str, memory_mb: int) -> None:
        held = Reservations(host=name, machines={"x": Resources(memory_mb=memory_mb)})
        self.reservations[name] = held
        self.snapshot.put_reservations(held)

    @rule(name=NAMES, machine_id=IDS, group=GROUPS, desired=st.sampled_from(Desired))
    def machine(self, name: str, machine_id: str, group: str, desired: Desired) -> None:
        made = msgspec.structs.replace(
            make_machine(machine_id, make_host(name), group=group), desired=desired
        )
        self.machines[machine_id] = made
        self.snapshot.put_machine(made)

    @rule(machine_id=IDS)
    def machine_is_gone(self, machine_id: str) -> None:
        self.machines.pop(machine_id, None)
        self.snapshot.drop_machine(machine_id)

    @rule(name=NAMES, volume_id=st.sampled_from(("v1", "v2")), attached=st.sampled_from(("", "m1")))
    def volume(self, name: str, volume_id: str, attached: str) -> None:
        made = Volume(
            id=volume_id,
            name="data",
            app="chat",
            region="ams",
            host=name,
            size_gb=1,
            attached_machine=attached,
        )
        self.volumes[volume_id] = made
        self.snapshot.put_volume(made)
        assert made in self.snapshot.volumes_of("chat")

    @rule(volume_id=st.sampled_from(("v1", "v2")))
    def volume_is_gone(self, volume_id: str) -> None:
        self.volumes.pop(volume_id, None)
        self.snapshot.drop_volume("chat", volume_id)

    def afresh(self) -> Snapshot:
        return Snapshot(
            hosts=self.hosts.values(),
            alive=self.alive,
            reservations=self.reservations,
            volumes=self.volumes.values(),
            machines=self.machines.values(),
        )

    @invariant()
    def it_is_as_if_built_afresh(self) -> None:
        fresh = self.afresh()
        assert content(self.snapshot) == content(fresh)
        request = Request(app="chat", machine_id="m1", guest=Guest(memory_mb=512))
        assert schedule(request, self.snapshot) == schedule(request, fresh)


TestChanges = Changes.TestCase
TestChanges.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_names_that_are_only_asked_for_leave_nothing_in_memory() -> None:
    snapshot = Snapshot()
    for number in range(50):
        app = f"unknown-{number}"
        assert snapshot.volumes_of(app) == ()
        assert snapshot.volume(app, "v1") is None
        assert not snapshot.spread(app, "app").on_host
    assert content(snapshot) == content(Snapshot())
    assert not vars(snapshot)["_sorted_volumes"]
