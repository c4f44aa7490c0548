"""fly volumes."""

from __future__ import annotations

import click

from flyd.cli.connection import app_name, call, channel, stream
from flyd.cli.options import app_option, json_option
from flyd.cli.output import ago, clock_time, done, emit, note, table, waiting, warn
from flyd.deploy.appconfig.units import duration_s
from flyd.errors import InvalidInput, Refused
from flyd.v1 import volumes_pb2 as pb
from flyd.v1 import volumes_pb2_grpc

COPY_TIMEOUT_S = 600.0  # hosts whose disk can not share data copy all of it
KEPT_H = 24


def stub() -> volumes_pb2_grpc.VolumesServiceStub:
    """The volumes service of the cluster."""
    return volumes_pb2_grpc.VolumesServiceStub(channel())


@click.group()
def volumes() -> None:
    """Volumes: storage on one host, attached to at most one machine."""


@volumes.command("list", epilog="Example: fly volumes list --destroyed")
@app_option
@click.option("--all", "all_apps", is_flag=True, help="Of all apps.")
@click.option("--destroyed", is_flag=True, help="Those that are destroyed and can be brought back.")
@json_option
def list_volumes(app: str | None, all_apps: bool, destroyed: bool, json_output: bool) -> None:
    """The volumes of an app."""
    request = pb.ListVolumesRequest(app_name="" if all_apps else app_name(app), destroyed=destroyed)
    found = call(stub().ListVolumes, request).volumes
    if json_output:
        emit(found)
        return
    if destroyed:
        headings, told = ["DESTROYED"], [(ago(v.destroyed_at),) for v in found]
    else:
        headings = ["CREATED", "COPY", "RESTORED"]
        told = [(ago(v.created_at), newest_copy(v), last_trial(v)) for v in found]
    table(
        ["ID", "NAME", "APP", "REGION", "HOST", "SIZE GB", "ATTACHED TO", *headings],
        [
            (v.id, v.name, v.app_name, v.region, v.host, v.size_gb, v.attached_machine_id or "-", *last)
            for v, last in zip(found, told, strict=True)
        ],
        empty="No volumes.",
    )  # fmt: skip


@volumes.command(
    epilog="""\b
Examples: fly volumes create data --region ams --size 10
          fly volumes create data --from-snapshot vol_0123456789abcdef/snap-0123456789ab"""
)
@click.argument("name")
@app_option
@click.option("-r", "--region", help="The region it lives in.")
@click.option("-s", "--size", type=int, help="In GB. Default: 1, or the snapshot's volume's.")
@click.option(
    "--from-snapshot", metavar="VOLUME/SNAPSHOT", help="With the contents of a snapshot, on its host."
)
@json_option
def create(
    name: str,
    app: str | None,
    region: str | None,
    size: int | None,
    from_snapshot: str | None,
    json_output: bool,
) -> None:
    """Make a volume on a host of a region, or from a snapshot."""
    if from_snapshot is not None:
        volume_id, _, snapshot_id = from_snapshot.partition("/")
        if not volume_id or not snapshot_id:
            raise InvalidInput(
                f"{from_snapshot!r} names no snapshot",
                hint="Give VOLUME/SNAPSHOT; `fly volumes snapshots list VOLUME` shows them.",
            )
        if region is not None:
            raise InvalidInput(
                "a volume from a snapshot is on the snapshot's host", hint="Leave --region out."
            )
        fork_volume(app_name(app), volume_id, snapshot_id, name, size, json_output)
        return
    if region is None:
        raise InvalidInput("in which region?", hint="Give --region; `fly hosts list` shows those with hosts.")
    request = pb.CreateVolumeRequest(
        app_name=app_name(app), name=name, region=region, size_gb=1 if size is None else size
    )
    made = call(stub().CreateVolume, request).volume
    if json_output:
        emit(made)
    else:
        done(f"volume {made.id} ({made.name}, {made.size_gb} GB) on {made.host}")


@volumes.command(epilog="Example: fly volumes fork vol_0123456789abcdef --name copy")
@click.argument("volume_id")
@app_option
@click.option("-n", "--name", help="Default: the volume's.")
@click.option("-s", "--size", type=int, help="In GB. Default: the volume's.")
@json_option
def fork(volume_id: str, app: str | None, name: str | None, size: int | None, json_output: bool) -> None:
    """Make a new volume with the contents of one, on its host. They have nothing in common afterwards."""
    fork_volume(app_name(app), volume_id, "", name, size, json_output)


@volumes.command(epilog="Example: fly volumes extend vol_0123456789abcdef --size 20")
@click.argument("volume_id")
@app_option
@click.option("-s", "--size", type=int, required=True, help="The new size in GB.")
@json_option
def extend(volume_id: str, app: str | None, size: int, json_output: bool) -> None:
    """Make a volume larger; machines that use it run on. A volume never shrinks."""
    request = pb.ExtendVolumeRequest(app_name=app_name(app), volume_id=volume_id, size_gb=size)
    volume = call(stub().ExtendVolume, request).volume
    if json_output:
        emit(volume)
    else:
        done(f"volume {volume.id} has {volume.size_gb} GB")


@volumes.command(epilog="Example: fly volumes destroy vol_0123456789abcdef --yes")
@click.argument("volume_id")
@app_option
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
def destroy(volume_id: str, app: str | None, yes: bool) -> None:
    """Give a volume up; its data and snapshots are kept for 24 hours, then deleted."""
    if not yes and not click.confirm(f"Destroy {volume_id} with its data and snapshots?", err=True):
        raise Refused("nothing was destroyed")
    call(stub().DestroyVolume, pb.DestroyVolumeRequest(app_name=app_name(app), volume_id=volume_id))
    done(f"volume {volume_id} destroyed")
    note(f"For {KEPT_H} hours `fly volumes undestroy {volume_id}` brings it back.")


@volumes.command(epilog="Example: fly volumes undestroy vol_0123456789abcdef")
@click.argument("volume_id")
@app_option
@json_option
def undestroy(volume_id: str, app: str | None, json_output: bool) -> None:
    """Bring back a volume that was destroyed less than 24 hours ago."""
    request = pb.UndestroyVolumeRequest(app_name=app_name(app), volume_id=volume_id)
    volume = call(stub().UndestroyVolume, request).volume
    if json_output:
        emit(volume)
    else:
        done(f"volume {volume.id} ({volume.name}, {volume.size_gb} GB) is back on {volume.host}")


@volumes.command(
    epilog="""\b
Examples: fly volumes update vol_0123456789abcdef --replicas 1 --every 15m
          fly volumes update vol_0123456789abcdef --recover-within 30m --verify-every 168h
          fly volumes update vol_0123456789abcdef --extend-at 90 --extend-by 5 --extend-limit 50"""
)
@click.argument("volume_id")
@app_option
@click.option("--replicas", type=int, help="How many other hosts have copies of it: 0 to 3.")
@click.option("--every", help="How old the newest copy may become. Default: 15m.")
@click.option(
    "--recover-within",
    help="Its host lost, it comes back by itself from a copy that was no older then. 0s: never.",
)
@click.option("--verify-every", help="How often its newest copy is restored and compared. 0s: never.")
@click.option("--extend-at", type=int, help="It grows when it is so full, in percent: 50 to 99; 0: never.")
@click.option("--extend-by", type=int, help="By so many GB. Default: 1.")
@click.option("--extend-limit", type=int, help="To no more than so many GB.")
@json_option
def update(
    volume_id: str,
    app: str | None,
    replicas: int | None,
    every: str | None,
    recover_within: str | None,
    verify_every: str | None,
    extend_at: int | None,
    extend_by: int | None,
    extend_limit: int | None,
    json_output: bool,
) -> None:
    """Have copies of a volume kept on other hosts, and have it grow by itself."""
    request = pb.UpdateVolumeRequest(
        app_name=app_name(app),
        volume_id=volume_id,
        replicas=replicas,
        copy_every_s=None if every is None else _duration_s("--every", every),
        recover_max_age_s=None if recover_within is None else _duration_s("--recover-within", recover_within),
        verify_every_s=None if verify_every is None else _duration_s("--verify-every", verify_every),
        extend_percent=extend_at,
        extend_gb=extend_by,
        extend_limit_gb=extend_limit,
    )
    given = (replicas, every, recover_within, verify_every, extend_at, extend_by, extend_limit)
    if all(option is None for option in given):
        raise InvalidInput("nothing to change", hint="`fly volumes update --help` shows what can be.")
    volume = call(stub().UpdateVolume, request).volume
    if json_output:
        emit(volume)
        return
    copies = (
        f"on {volume.replicas} other hosts, every {volume.copy_every_s:g} s" if volume.replicas else "none"
    )
    grows = f"at {volume.extend_percent} % by {volume.extend_gb} to {volume.extend_limit_gb} GB"
    done(f"volume {volume.id}: copies {copies}; it grows {grows if volume.extend_percent else 'never'}")
    if volume.recover_max_age_s:
        note(
            f"Its host lost, it comes back by itself from a copy at most {volume.recover_max_age_s:g} s old."
        )
    if not volume.replicas:
        note("Without copies it dies with its host. Copies that there are stay until it is destroyed.")


@volumes.command(epilog="Example: fly volumes recover vol_0123456789abcdef")
@click.argument("volume_id")
@app_option
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@json_option
def recover(volume_id: str, app: str | None, yes: bool, json_output: bool) -> None:
    """Bring a lost host's volume back from its newest copy elsewhere, with its machine.

    What was written after that copy is not in it. The lost host's volume is kept aside under another
    name: it is never merged or deleted, and is there to look into once the host is back.
    """
    name = app_name(app)
    listed = call(stub().ListVolumes, pb.ListVolumesRequest(app_name=name)).volumes
    found = next((v for v in listed if v.id == volume_id), None)
    if found is not None and found.newest_copy_at and not json_output:
        told = f"The newest copy of {volume_id} is on {found.newest_copy_host}, its data as of"
        note(f"{told} {clock_time(found.newest_copy_at)} ({ago(found.newest_copy_at)}).")
    if not yes and not click.confirm("Go on with that, without what was written since?", err=True):
        raise Refused("nothing was brought back")
    made = call(
        stub().RecoverVolume, pb.RecoverVolumeRequest(app_name=name, volume_id=volume_id), COPY_TIMEOUT_S
    )
    if json_output:
        emit(made)
        return
    done(f"volume {made.volume.id} ({made.volume.name}) on {made.volume.host}")
    note(f"Its data is as of {clock_time(made.data_at)} ({ago(made.data_at)}).")
    if made.machine_id:
        note(f"Machine {made.machine_id} runs there now: `fly machine status {made.machine_id}`.")
    note(f"The lost host's volume {volume_id} is kept as {made.aside.name}.")


@volumes.command(epilog="Example: fly volumes move vol_0123456789abcdef --to iad-1")
@click.argument("volume_id")
@app_option
@click.option("--to", "host", required=True, help="The host that it goes to; `fly hosts list` shows them.")
@json_option
def move(volume_id: str, app: str | None, host: str, json_output: bool) -> None:
    """Move a volume with its machine to another host; the machine stands only for the last of it.

    The hosts do it: Ctrl-C stops the watching, the same command watches again. The old volume is kept for
    24 hours as a destroyed one.
    """
    request = pb.MoveVolumeRequest(app_name=app_name(app), volume_id=volume_id, host=host)
    last = pb.MoveVolumeResponse()
    with waiting("moving") as update:
        for last in stream(stub().MoveVolume, request):
            update(f"{last.phase} ({last.moved_bytes / 2**20:.1f} MB so far)")
    if json_output:
        emit(last)
        return
    done(f"volume {last.volume.id} ({last.volume.name}) on {last.volume.host}")
    note(f"{last.moved_bytes / 2**20:.1f} MB were moved; the machine stood for {last.downtime_s:.1f} s.")


@volumes.command(epilog="Example: fly volumes verify vol_0123456789abcdef")
@click.argument("volume_id")
@app_option
@json_option
def verify(volume_id: str, app: str | None, json_output: bool) -> None:
    """Restore the newest copy of a volume to a scratch volume and compare every file.

    That is the newest copy on another host; of a volume without copies, its newest snapshot.
    """
    request = pb.VerifyVolumeRequest(app_name=app_name(app), volume_id=volume_id)
    found = call(stub().VerifyVolume, request, COPY_TIMEOUT_S)
    if json_output:
        emit(found)
        return
    done(f"{found.snapshot_id} of volume {volume_id} was restored on {found.host}: every file is as it was")
    note(f"Its data is as of {clock_time(found.data_at)} ({ago(found.data_at)}); sha256 {found.sha256[:12]}.")
    if found.compared_with == found.host:
        note("It was compared with the snapshot itself: the volume's own host had none to compare with.")


@volumes.group()
def snapshots() -> None:
    """Snapshots: a volume as it was. Hosts with btrfs take one a day and keep five."""


@snapshots.command("list", epilog="Example: fly volumes snapshots list vol_0123456789abcdef")
@click.argument("volume_id")
@app_option
@json_option
def list_snapshots(volume_id: str, app: str | None, json_output: bool) -> None:
    """The snapshots of a volume, the oldest first."""
    request = pb.ListVolumeSnapshotsRequest(app_name=app_name(app), volume_id=volume_id)
    found = call(stub().ListVolumeSnapshots, request).snapshots
    if json_output:
        emit(found)
        return
    table(
        ["ID", "MADE", "BY", "USED GB", "SIZE GB", "OF ONE INSTANT"],
        [
            (s.id, ago(s.created_at), made_by(s), f"{s.used_bytes / 2**30:.2f}",
             s.size_gb, "yes" if s.consistent else "no")
            for s in found
        ],
        empty="No snapshots.",
    )  # fmt: skip


@snapshots.command("create", epilog="Example: fly volumes snapshots create vol_0123456789abcdef")
@click.argument("volume_id")
@app_option
@json_option
def create_snapshot(volume_id: str, app: str | None, json_output: bool) -> None:
    """Keep a volume as it is now, until you destroy the snapshot."""
    request = pb.CreateVolumeSnapshotRequest(app_name=app_name(app), volume_id=volume_id)
    made = call(stub().CreateVolumeSnapshot, request, COPY_TIMEOUT_S).snapshot
    if not made.consistent:
        warn("copied while a machine wrote: its host's disk can not do better. Stop the machine first.")
    if json_output:
        emit(made)
    else:
        done(f"snapshot {made.id} of volume {volume_id}")


@snapshots.command("destroy", epilog="Example: fly volumes snapshots destroy VOLUME snap-0123456789ab")
@click.argument("volume_id")
@click.argument("snapshot_id")
@app_option
def destroy_snapshot(volume_id: str, snapshot_id: str, app: str | None) -> None:
    """Delete a snapshot for ever; volumes made from it stay."""
    request = pb.DestroyVolumeSnapshotRequest(
        app_name=app_name(app), volume_id=volume_id, snapshot_id=snapshot_id
    )
    call(stub().DestroyVolumeSnapshot, request)
    done(f"snapshot {snapshot_id} destroyed")


def fork_volume(
    app: str, volume_id: str, snapshot_id: str, name: str | None, size: int | None, json_output: bool
) -> None:
    """Have a copy made, and show it."""
    if size is not None and size < 1:
        raise InvalidInput(f"a volume of {size} GB: it must be 1 GB or more")
    request = pb.ForkVolumeRequest(
        app_name=app, volume_id=volume_id, snapshot_id=snapshot_id, name=name or "", size_gb=size or 0
    )
    made = call(stub().ForkVolume, request, COPY_TIMEOUT_S).volume
    if json_output:
        emit(made)
    else:
        done(f"volume {made.id} ({made.name}, {made.size_gb} GB) on {made.host}")


def newest_copy(volume: pb.Volume) -> str:
    """The age of what would be left were the host lost."""
    if volume.newest_copy_at:
        return f"{ago(volume.newest_copy_at)} on {volume.newest_copy_host}"
    return "none yet" if volume.replicas else "NONE"


def last_trial(volume: pb.Volume) -> str:
    """When a copy was last shown to be one that can be restored."""
    if not volume.verified_at:
        return "never" if volume.newest_copy_at else "-"
    return f"FAILED {ago(volume.verified_at)}" if volume.verify_error else ago(volume.verified_at)


def made_by(snapshot: pb.VolumeSnapshot) -> str:
    """Whose a snapshot is; only people's stay until somebody removes them."""
    if snapshot.id.startswith("copy-"):
        return "copies"
    return "schedule" if snapshot.scheduled else "you"


def _duration_s(option: str, text: str) -> float:
    try:
        found = duration_s(text, bare_s=1.0)
    except ValueError as error:
        raise InvalidInput(f"{option}: {error}", hint="Like 90s, 15m or 1h.") from None
    if found is None:
        raise InvalidInput(f"{option}: an empty duration", hint="Like 90s, 15m or 1h.")
    return found
