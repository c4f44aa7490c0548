"""IdentityService: join tokens, joining, expelling. The rules are in flyd/hosts/joining.py."""

from __future__ import annotations

from typing import Any

from flyd.api.admission import caller
from flyd.api.context import ApiContext
from flyd.errors import Denied, Refused
from flyd.hosts import joining
from flyd.model import Machine, Volume
from flyd.store import keys
from flyd.v1 import identity_pb2, identity_pb2_grpc


class IdentityServicer(identity_pb2_grpc.IdentityServiceServicer):
    """Identity over gRPC."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def CreateJoinToken(
        self, request: identity_pb2.CreateJoinTokenRequest, context: Any
    ) -> identity_pb2.CreateJoinTokenResponse:
        """A token that names all hosts that are up as places to join at."""
        ctx = self._context
        token, text = await joining.create_token(
            ctx.kv,
            [ctx.host.api_address, *(host.api_address for host in ctx.peers.living())],
            request.lifetime_s,
            str(caller(context)),
            clock=ctx.clock,
            entropy=ctx.entropy,
        )
        return identity_pb2.CreateJoinTokenResponse(token=text, id=token.id, expires_at=token.expires_at_s)

    async def Join(self, request: identity_pb2.JoinRequest, context: Any) -> identity_pb2.JoinResponse:
        """For whoever shows a join token's certificate."""
        subject = caller(context)
        if subject.kind != "join":
            raise Denied("only a join token joins", hint="`fly hosts token` makes one.")
        ctx = self._context
        newcomer = joining.Newcomer(
            name=request.name,
            addresses=tuple(request.addresses),
            subnet=request.subnet,
            public_key=request.public_key,
        )
        joined = await joining.join(ctx.kv, subject.name, newcomer, clock=ctx.clock, entropy=ctx.entropy)
        return identity_pb2.JoinResponse(
            cluster_id=joined.authorities.cluster_id,
            membership=joined.membership.id,
            subnet=joined.membership.subnet,
            certificate=joined.certificate.text,
            lifetime_s=joined.authorities.lifetime_s,
            expires_at=joined.certificate.expires_at_s,
            hosts_certificate=joined.authorities.hosts.certificate_pem,
            clients_certificate=joined.authorities.clients.certificate_pem,
            etcd=ctx.etcd_endpoints,
        )

    async def ExpelHost(
        self, request: identity_pb2.ExpelHostRequest, context: Any
    ) -> identity_pb2.ExpelHostResponse:
        """Refused while something is left on the host, unless forced."""
        ctx = self._context
        empty = self._is_empty(request.name, request.force)
        by = str(caller(context))
        membership = await joining.expel(ctx.kv, request.name, by, empty=empty, clock=ctx.clock)
        return identity_pb2.ExpelHostResponse(expelled_at=membership.expelled_at_s)

    def _is_empty(self, host: str, force: bool) -> bool:
        mirror = self._context.mirror
        machines = [m.value.id for m in mirror.list(keys.MACHINES, Machine) if m.value.host == host]
        volumes = [v.value.id for v in mirror.list(keys.VOLUMES, Volume) if v.value.host == host]
        if (machines or volumes) and not force:
            raise Refused(
                f"{host} still has {len(machines)} machines and {len(volumes)} volumes",
                hint=f"Move them first: fly hosts drain {host}. If the host is not to be trusted: --force.",
            )
        return not machines and not volumes
