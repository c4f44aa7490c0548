"""fly hosts found, token, join, expel: how hosts come into a cluster and are put out of it."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import click
import grpc

from flyd.api.status import from_rpc
from flyd.cli.connection import CALL_TIMEOUT_S, call, channel, context_path, save_context
from flyd.cli.options import json_option, split
from flyd.cli.output import done, emit, say, waiting
from flyd.cluster.founding import CONFIG, DATA_DIR, founding_layout, host_archive
from flyd.cluster.identities import write_identities
from flyd.cluster.layout import LocalHost
from flyd.deploy.appconfig.units import duration_s
from flyd.errors import FlydError, InvalidInput, Unavailable
from flyd.hosts import newcomer
from flyd.identity.credentials import open_channel
from flyd.identity.folder import replace_file
from flyd.v1 import identity_pb2, identity_pb2_grpc

if TYPE_CHECKING:
    from flyd.identity.tokens import Token

driver_option = click.option(
    "--driver",
    type=click.Choice(["docker", "process"]),
    default="docker",
    show_default=True,
    help="What runs machines: this host's Docker engine, or processes.",
)


def stub() -> identity_pb2_grpc.IdentityServiceStub:
    """The identity service of the cluster."""
    return identity_pb2_grpc.IdentityServiceStub(channel())


@click.command(
    epilog="""\b
Example:
  fly hosts found prod ams-1=ams@192.0.2.1 iad-1=iad@198.51.100.1 sin-1=sin@203.0.113.1
  scp flyd-ams-1.tar root@192.0.2.1:
  ssh root@192.0.2.1 'tar -C / -xf flyd-ams-1.tar && systemctl enable --now etcd flyd'"""
)
@click.argument("name")
@click.argument("hosts", nargs=-1, required=True, metavar="NAME=REGION@ADDRESS...")
@driver_option
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path(), help="Where to write."
)
@json_option
def found(name: str, hosts: tuple[str, ...], driver: str, out: Path, json_output: bool) -> None:
    """Found a cluster: write an archive for each of its first hosts (1, 3 or 5, each with an etcd).

    An archive holds the host's key: hand it to that host alone, and delete it. This machine's user
    becomes the cluster's first.
    """
    plan = founding_layout(name, hosts, driver)
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def keep(host: LocalHost, files: Mapping[str, bytes]) -> None:
        path = out / f"flyd-{host.name}.tar"
        replace_file(path, host_archive(plan, host, files))
        written.append(path)

    identity = context_path().parent / "identities" / name
    write_identities(plan, keep, identity)
    save_context(plan.api, identity)
    if json_output:
        emit({"name": name, "archives": [str(p) for p in written], "identity": str(identity)})
        return
    done(f"cluster {name} is founded; the first flyd that starts puts its authorities into etcd")
    for path, host in zip(written, plan.hosts, strict=True):
        say(f"  {path}: as root on {host.address}: tar -C / -xf, then systemctl enable --now etcd flyd")
    say(f"Your own identity: {identity}. `fly hosts list` works once two thirds of them run.")


@click.command(epilog="Example: fly hosts token --ttl 24h > token && scp token root@192.0.2.9:")
@click.option("--ttl", default="1h", show_default=True, help="How long it is good for.")
@json_option
def token(ttl: str, json_output: bool) -> None:
    """Make a join token: it lets one host in, once."""
    lifetime_s = duration_s(ttl, bare_s=1.0)
    if lifetime_s is None:
        raise InvalidInput(f"{ttl!r} is no duration", hint="Say it like 30m, 24h or 7d.")
    made = call(stub().CreateJoinToken, identity_pb2.CreateJoinTokenRequest(lifetime_s=lifetime_s))
    if json_output:
        emit(made)
    else:
        click.echo(made.token)


@click.command(
    epilog="""\b
Examples (as root, on the machine that is to be a host):
  fly hosts join --token-file token --name fra-1 --region fra --address 192.0.2.9
  FLY_JOIN_TOKEN=flyd1... fly hosts join --name fra-1 --region fra --address 192.0.2.9"""
)
@click.option("--token-file", type=click.File(), help="File with the token, - for standard input.")
@click.option(
    "--token", "token_text", envvar="FLY_JOIN_TOKEN", help="The token itself [env: FLY_JOIN_TOKEN]."
)
@click.option(
    "--name", default=socket.gethostname, help="Its name, not another host's [default: the machine's]."
)
@click.option("--region", required=True, help="Its region, like fra.")
@click.option("--address", required=True, help="IP addresses at which the other hosts reach it, by commas.")
@click.option(
    "--subnet", default="", help="First two numbers of its machines' addresses [default: a free one]."
)
@driver_option
@click.option("--data-dir", type=click.Path(path_type=Path), default=DATA_DIR, show_default=True)
@click.option("--config", type=click.Path(path_type=Path), default=CONFIG, show_default=True)
@json_option
def join(
    token_file: TextIO | None,
    token_text: str | None,
    name: str,
    region: str,
    address: str,
    subnet: str,
    driver: str,
    data_dir: Path,
    config: Path,
    json_output: bool,
) -> None:
    """Make this machine a host of a cluster. Run again after an interruption, it goes on."""
    from flyd.identity import certificates, tokens  # load `cryptography`

    text = token_file.read() if token_file is not None else token_text
    if not text:
        raise InvalidInput("no join token", hint="--token-file FILE; `fly hosts token` on a host makes one.")
    leave = tokens.read_token(text)
    folder = newcomer.identity_folder(data_dir)
    key = newcomer.host_key(folder, certificates.new_key)
    addresses = split(address)
    request = identity_pb2.JoinRequest(
        name=name, addresses=addresses, subnet=subnet, public_key=certificates.public_key(key)
    )
    with waiting("joining"):
        joined = _join(leave, request)
    # flyd.toml first: the certificate, written last, makes the join complete.
    settings = newcomer.host_config(
        name=name,
        region=region,
        address=addresses[0],
        subnet=joined.subnet,
        etcd=tuple(joined.etcd),
        data_dir=data_dir,
        driver=driver,
    )
    newcomer.write_config(config, settings)
    unit = newcomer.write_unit(config)
    newcomer.write_joined(folder, name, key, joined)
    if json_output:
        emit({"name": name, "subnet": joined.subnet, "config": str(config), "identity": str(folder)})
        return
    done(f"{name} is a member of cluster {joined.cluster_id}; its machines get {joined.subnet}.0.0/16")
    how = "systemctl enable --now flyd" if unit else f"{newcomer.flyd_program()} --config {config}"
    say(f"Start it: {how}")


def _join(leave: Token, request: identity_pb2.JoinRequest) -> identity_pb2.JoinResponse:
    """Ask one flyd after the other, as the token names them."""
    failed: list[str] = []
    for address in leave.api:
        credentials = grpc.ssl_channel_credentials(
            leave.hosts_certificate.encode(), leave.key.encode(), leave.certificate.encode()
        )
        with open_channel(address, credentials) as opened:
            try:
                return identity_pb2_grpc.IdentityServiceStub(opened).Join(request, timeout=CALL_TIMEOUT_S)
            except grpc.RpcError as error:
                said: FlydError = from_rpc(cast(Any, error), address)
                if not isinstance(said, Unavailable):
                    raise said from None
                failed.append(said.message)
    raise Unavailable(
        "; ".join(failed), hint="The token names these addresses: this machine must reach one of them."
    )


@click.command(epilog="Example: fly hosts expel fra-1")
@click.argument("name")
@click.option("--force", is_flag=True, help="Also if machines or volumes are left on it.")
@json_option
def expel(name: str, force: bool, json_output: bool) -> None:
    """Put a host out: no flyd, etcd or edge talks to it from now on."""
    ended = call(stub().ExpelHost, identity_pb2.ExpelHostRequest(name=name, force=force))
    if json_output:
        emit(ended)
    else:
        done(f"{name} is expelled. With a new token it can join again.")


COMMANDS = (found, token, join, expel)
