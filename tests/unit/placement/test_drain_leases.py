"""A drain meets a machine that somebody holds: over a store in memory, in virtual time."""

from __future__ import annotations

from flyd.machines import leases
from flyd.model import App, Desired, encode
from flyd.model.cluster import DrainState
from flyd.placement.drain import LEASE_WAIT_S
from flyd.store import keys
from tests.support.repairing import World, repaired, until


@repaired
async def test_a_drain_waits_for_a_lease_and_goes_on_when_it_ends(world: World):
    await world.kv.put(keys.app("web"), encode(App(name="web")))
    await world.place("m1")
    world.say("m1")
    await leases.acquire(
        world.kv, "web", "m1", owner="ann", ttl_s=900, clock=world.clock, entropy=world.entropy
    )
    world.drain()
    await until(lambda: any("leased by ann" in line for line in world.drained().doing))
    await until(lambda: world.drained().state is DrainState.DRAINED, LEASE_WAIT_S + 10)
    assert "leased by ann until" in world.drained().left["m1"]
    assert list(world.claims()) == ["m1"]
    await until(lambda: "m1" in world.drained().replacing, 700)
    new_id = world.drained().replacing["m1"]
    await until(lambda: new_id in world.claims())
    world.say(new_id)
    await until(lambda: world.claims()["m1"].desired is Desired.DESTROYED)
