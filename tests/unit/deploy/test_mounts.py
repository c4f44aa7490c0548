"""No deploy begins with an empty volume while the app's data lies elsewhere."""

from __future__ import annotations

import msgspec
import pytest

from flyd.deploy.appconfig import AppConfig
from flyd.deploy.mounts import refuse_lost_data
from flyd.deploy.releases import DeployRun, Release, RunState
from flyd.errors import Refused
from flyd.model import Machine, MachineConfig, Mount, Volume, encode
from flyd.store import keys
from flyd.store.memory import MemoryKV
from tests.simulation.loop import current
from tests.support.deployers import all_well, deployer_process, new_cluster, simulate, start, wait_ended
from tests.support.placing import make_host, make_machine
from tests.support.rollouts import STATEFUL, WEB, make_config

DATA = make_config(app=STATEFUL)


def volume(region: str, *, machine: str = "", name: str = "data", number: int = 1, epoch: int = 1) -> Volume:
    return Volume(
        id=f"vol_{region}{number}",
        name=name,
        app="chat",
        region=region,
        host=f"{region}-1",
        size_gb=1,
        attached_machine=machine,
        epoch=epoch,
    )


def holder(machine_id: str, region: str, *, group: str = "app", release: int = 1) -> Machine:
    mounts = (Mount(path="/data", name="data", volume=f"vol_{region}1"),)
    config = MachineConfig(image="host:", process_group=group, mounts=mounts)
    made = make_machine(machine_id, make_host(f"{region}-1"))
    return msgspec.structs.replace(made, config=config, release=release)


def check(
    regions: str,
    *volumes: Volume,
    machines: tuple[Machine, ...] = (),
    config: AppConfig = DATA,
    previous: int = 1,
) -> str:
    """What the refusal says; empty if there is none."""
    run = DeployRun(id="r", app="chat", version=2, regions=tuple(regions.split()), previous_version=previous)
    try:
        refuse_lost_data(run, Release(version=2, app="chat", image="i", config=config), machines, volumes)
    except Refused as error:
        return f"{error.message} {error.hint}"
    return ""


@pytest.mark.parametrize("regions", ["iad", "ams iad", "iad ams"])
def test_a_region_without_the_data_is_refused_with_what_to_do(regions: str) -> None:
    said = check(regions, volume("ams", machine="m1"), machines=(holder("m1", "ams"),))
    assert "an empty volume data in iad" in said
    assert "vol_ams1 in ams (attached to machine m1)" in said
    assert "fly volumes create data --region iad -a chat" in said


def test_a_free_volume_there_is_what_was_asked_for() -> None:
    held = volume("ams", machine="m1")
    assert check("ams iad", held, volume("iad", epoch=0), machines=(holder("m1", "ams"),)) == ""
    assert check("iad", volume("ams"), volume("iad")) == ""


def test_the_volume_of_the_old_machine_is_kept() -> None:
    assert check("ams", volume("ams", machine="m1"), machines=(holder("m1", "ams"),)) == ""


def test_a_name_that_the_app_never_had_gets_new_volumes() -> None:
    assert check("ams iad") == ""
    assert check("ams iad", volume("ams", name="cache")) == ""


def test_one_free_volume_is_not_enough_for_two_groups() -> None:
    config = make_config(app=STATEFUL, web=STATEFUL)
    assert "group web of app chat" in check("ams", volume("ams"), config=config)
    assert check("ams", volume("ams"), volume("ams", number=2), config=config) == ""


def test_a_group_with_another_name_does_not_leave_its_data_with_the_old_one() -> None:
    said = check("ams", volume("ams", machine="m1"), machines=(holder("m1", "ams", group="web"),))
    assert "vol_ams1 in ams (attached to machine m1)" in said


def test_a_release_without_the_mount_needs_none() -> None:
    config = make_config(app=WEB)
    assert check("iad", volume("ams", machine="m1"), machines=(holder("m1", "ams"),), config=config) == ""


def test_what_a_failed_first_deploy_left_is_no_obstacle_but_what_a_person_made_is() -> None:
    assert check("ams iad", volume("ams"), previous=0) == ""
    assert "vol_ams1 in ams" in check("iad", volume("ams", epoch=0), previous=0)
    assert "attached to machine m1" in check("iad", volume("ams", machine="m1"), previous=0)


def test_nothing_is_begun_where_data_would_be_left_behind() -> None:
    async def main() -> None:
        kv = await new_cluster(all_well, "chat")
        current().spawn("only", deployer_process(MemoryKV(kv.server), "only"))
        await kv.put(keys.volume("chat", "vol_ams1"), encode(volume("ams", epoch=0)))
        with pytest.raises(Refused, match="vol_ams1 in ams"):  # the app's regions are ams and iad
            await start(kv, "chat", 1, DATA)
        assert (await kv.list(keys.RELEASES)).items == (await kv.list(keys.RUNS)).items == ()
        await kv.put(keys.volume("chat", "vol_iad1"), encode(volume("iad", epoch=0)))
        await start(kv, "chat", 1, DATA)
        assert (await wait_ended(kv, "chat")).state is RunState.COMPLETE

    simulate(main, seeds=1)
