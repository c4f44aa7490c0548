"""[flyd.volumes.NAME]: how the volumes of a mount are copied, and come back by themselves."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from flyd.deploy.appconfig import inspect, parse
from flyd.model import MachineConfig, Volume, VolumeRule, decode, encode
from flyd.placement.scheduler import Order
from flyd.store import keys
from flyd.store.memory import MemoryEtcd, MemoryKV
from tests.support.placing import CountedEntropy, FixedClock, join, make_host, place

MOUNT = 'app = "web"\n[mounts]\nsource = "data"\ndestination = "/data"\n'


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", None),
        ("[flyd.volumes.data]\n", VolumeRule(replicas=1)),
        (
            '[flyd.volumes.data]\nreplicas = 2\nevery = "5m"\nrecover_within = "1h"\n',
            VolumeRule(replicas=2, copy_every_s=300.0, recover_max_age_s=3600.0),
        ),
        ("[flyd.volumes.data]\nreplicas = 0\n", VolumeRule(replicas=0)),
    ],
)
def test_what_a_file_says(text: str, rule: VolumeRule | None) -> None:
    report = inspect(MOUNT + text, "fly.toml")
    assert report.errors == report.warnings == ()
    assert parse(MOUNT + text, "fly.toml").groups["app"].mounts[0].rule == rule


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[flyd.volumes.date]\n", "no mount has the source 'date'"),
        ("[flyd]\nvolumes = 3\n", "expected a table"),
        ("[flyd.volumes.data]\nreplicas = 4\n", "4 is not between 0 and 3"),
        ("[flyd.volumes.data]\nreplicas = -1\n", "-1 is not between 0 and 3"),
        ('[flyd.volumes.data]\nevery = "0s"\n', "it must be 1 s to 7 days"),
        ('[flyd.volumes.data]\nevery = "soon"\n', "expected a duration"),
        ('[flyd.volumes.data]\nreplicas = 0\nrecover_within = "1h"\n', "can not come back by itself"),
        ('[flyd.volumes.data]\nrecover_within = "9000h"\n', "30 days"),
    ],
)
def test_what_it_may_not_say(text: str, said: str) -> None:
    report = inspect(MOUNT + text, "fly.toml")
    assert report.config is None
    assert said in "\n".join(r.message for r in report.errors)


async def test_each_placing_gives_it_to_the_volume() -> None:
    kv, clock, entropy = MemoryKV(MemoryEtcd()), FixedClock(), CountedEntropy()
    await join(kv, make_host("ams-1"))

    async def placed(machine_id: str, text: str) -> Volume:
        mounts = parse(MOUNT + text, "fly.toml").groups["app"].mounts
        config = MachineConfig(image="host:", mounts=mounts)
        await place(kv, Order(app="web", machine_id=machine_id, config=config), clock=clock, entropy=entropy)
        found = [decode(item.value, Volume) for item in (await kv.list(keys.VOLUMES)).items]
        return next(v for v in found if v.attached_machine == machine_id)

    ruled = await placed("m1", '[flyd.volumes.data]\nrecover_within = "1h"\n')
    assert (ruled.replicas, ruled.copy_every_s, ruled.recover_max_age_s) == (1, 900.0, 3600.0)
    free = await placed("m2", "")
    assert (free.replicas, free.recover_max_age_s) == (0, 0.0)
    await kv.put(keys.volume("web", ruled.id), encode(replace(ruled, attached_machine="", replicas=2)))
    kept = await placed("m3", "")
    assert (kept.id, kept.replicas) == (ruled.id, 2), "a file that says nothing changes nothing"
