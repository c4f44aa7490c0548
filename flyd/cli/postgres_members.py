"""fly postgres members: who the members of a cluster are, one more, one less."""

from __future__ import annotations

import click

from flyd.cli.connection import app_name, call
from flyd.cli.options import json_option
from flyd.cli.output import done, emit, note, out, state, table, waiting
from flyd.cli.postgres_common import cluster_argument, stub
from flyd.v1 import postgres_pb2

CHANGE_TIMEOUT_S = 3600.0  # a new member copies all data first


@click.group()
def members() -> None:
    """Who the members of a cluster are.

    A change goes by steps that keep every acknowledged write; writes pause for a moment at one of
    them. It goes on by itself if you stop watching, and after a crash of anything.
    """


@members.command("list", epilog="Example: fly postgres members list -a chat-db")
@cluster_argument
@json_option
def list_members(cluster: str | None, json_output: bool) -> None:
    """Each member, whether its word counts, and how far a change is."""
    request = postgres_pb2.ListMembersRequest(cluster_name=app_name(cluster))
    found = call(stub().ListMembers, request)
    if json_output:
        emit(found)
        return
    out.print(found.quorum)
    if found.changing:
        out.print(f"a change is under way: {found.progress or 'waiting for a primary'}")
    table(
        ["MEMBER", "REGION", "STANDING", "ROLE", "MACHINE", "HOST"],
        [
            (m.node, m.region, m.standing, state(m.role), m.machine_id, state(m.host_status))
            for m in found.members
        ],
        empty="No members.",
    )


@members.command(epilog="Example: fly postgres members add -a chat-db --region fra")
@cluster_argument
@click.option("--region", required=True, help="Where the new member is to be.")
@json_option
def add(cluster: str | None, region: str, json_output: bool) -> None:
    """Make a member in a region; wait until it has all data and its word counts.

    Asked again while that is under way, it only waits. `remove` turns it back.
    """
    request = postgres_pb2.AddMemberRequest(cluster_name=app_name(cluster), region=region)
    with waiting(f"a new member in {region} copies the data"):
        made = call(stub().AddMember, request, CHANGE_TIMEOUT_S)
    if json_output:
        emit(made)
    else:
        done(f"{made.member.node} is a member of {request.cluster_name}")


@members.command(epilog="Example: fly postgres members remove -a chat-db chat-db-3")
@click.argument("member")
@cluster_argument
@json_option
def remove(member: str, cluster: str | None, json_output: bool) -> None:
    """Take a member out, then destroy its machine and its volume.

    Not the primary: switch over first. Asked again after a crash, it goes on where that was.
    """
    request = postgres_pb2.RemoveMemberRequest(cluster_name=app_name(cluster), node=member)
    with waiting(f"taking {member} out"):
        made = call(stub().RemoveMember, request, CHANGE_TIMEOUT_S)
    if json_output:
        emit(made)
        return
    done(f"{member} is no member of {request.cluster_name} any more")
    if made.machine_left:
        note(f"machine {made.machine_id} is on a host that is not there: it ends when the host is back")
