"""What every verb of `fly postgres` needs."""

from __future__ import annotations

import click

from flyd.cli.connection import channel
from flyd.v1 import postgres_pb2_grpc

cluster_argument = click.option("-a", "--app", "cluster", help="The Postgres cluster.")


def stub() -> postgres_pb2_grpc.PostgresServiceStub:
    """The Postgres service of the cluster."""
    return postgres_pb2_grpc.PostgresServiceStub(channel())
